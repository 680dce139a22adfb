//! Rules for Go programs, from the table their runtime unwinds with: `.gopclntab`. It is there in stripped
//! programs too.
//!
//! In: the section. Out: which code it covers, and the rows of each function. Layouts by Go version, from
//! `src/runtime/symtab.go` and `src/debug/gosym/pclntab.go` of Go 1.13 to 1.27.

use std::{fs::File, hash::Hasher};

use profiler_common::unwind::rule::{Rule, cfa, fp};

use super::dwarf::Function;
use crate::elf::{self, Section};

/// Most bytes of the table read.
const MAX_TABLE: u64 = 64 << 20;
/// Most functions taken from a table.
const MAX_FUNCTIONS: usize = 1 << 20;
/// Most rows read of a table: functions may share them.
const MAX_WORK: usize = 1 << 28;
/// Most functions with rules of their own: each has up to two names.
const MAX_SPECIAL: usize = 64;
/// Most bytes of the module data's relocations or section searched.
const MAX_SEARCHED: u64 = 16 << 20;
/// Where `runtime.moduledata` has the address of the first function (Go 1.16 and later).
const MODULE_TEXT: u64 = 176;
/// Instructions are counted in bytes on x86_64, words have 8 of them.
const QUANTUM_AND_WORD: [u8; 2] = [1, 8];

/// Functions that are the root of their stack: goroutines start in `goexit`, threads in `mstart`; `mcall` starts
/// the scheduler's stack over, and the last two hand a thread over to the scheduler and never return.
const OUTERMOST: &[&str] = &[
    "runtime.goexit",
    "runtime.mstart",
    "runtime.mcall",
    "runtime.rt0_go",
    "_rt0_amd64",
    "_rt0_amd64_linux",
    "runtime.goschedImpl",
    "runtime.preemptPark",
];
/// Functions that run their callees on another stack and have a frame of their own on the first.
const OTHER_STACK_FRAMED: &[&str] = &["runtime.nanotime1", "runtime.walltime", "runtime.walltime1", "time.now"];
/// The same without a frame: the frame pointer is still their caller's, which is thereby skipped.
const OTHER_STACK: &[&str] = &["runtime.systemstack", "runtime.asmcgocall", "runtime.asmcgocall_no_g"];
/// Functions that continue a stack that only the runtime's own records lead to.
const STACK_SWITCH: &[&str] = &["runtime.morestack", "runtime.morestack_noctxt"];
/// What signal handlers return to.
const SIGNAL_TRAMPOLINE: &[&str] = &["runtime.sigreturn", "runtime.sigreturn__sigaction"];

/// How a version of Go lays out the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Go 1.2 to 1.15.
    V1_2,
    /// Go 1.16 and 1.17.
    V1_16,
    /// Go 1.18 and later.
    V1_18,
}

/// A program's table.
pub(super) struct GoTable {
    bytes: Vec<u8>,
    layout: Layout,
    /// What function addresses are relative to.
    text: u64,
    /// Where function names, stack depths and the function table are in `bytes`.
    names: usize,
    depths: usize,
    functions: usize,
    count: usize,
    /// Name offsets of the functions with rules of their own.
    special: Vec<(u32, Special)>,
    /// Rows read so far.
    work: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    Plain(u8),
    OtherStack,
    OtherStackFramed,
}

impl GoTable {
    /// Reads the table, if the file has one.
    pub(super) fn find(file: &File, sections: &[Section]) -> Option<Self> {
        let section = sections
            .iter()
            .find(|section| matches!(section.name.as_str(), ".gopclntab" | ".data.rel.ro.gopclntab"))
            .filter(|section| section.size <= MAX_TABLE)?;
        let bytes = elf::read(file, section.offset, usize::try_from(section.size).ok()?)?;
        let mut table = Self::parse(bytes)?;
        if table.layout == Layout::V1_18 && table.text == 0 {
            table.text = module_text(file, sections, section.address)
                .or_else(|| Some(sections.iter().find(|section| section.name == ".text")?.address))?;
        }
        Some(table)
    }

    pub(super) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let layout = match read_u32(&bytes, 0)? {
            0xffff_fffb => Layout::V1_2,
            0xffff_fffa => Layout::V1_16,
            0xffff_fff0 | 0xffff_fff1 => Layout::V1_18,
            _ => return None,
        };
        if bytes.get(6..8)? != QUANTUM_AND_WORD {
            return None;
        }
        let word = |index: usize| usize::try_from(read_u64(&bytes, 8 + 8 * index)?).ok();
        let count = word(0)?;
        let (text, names, depths, functions) = match layout {
            Layout::V1_2 => (0, 0, 0, 16),
            Layout::V1_16 => (0, word(2)?, word(5)?, word(6)?),
            Layout::V1_18 => (word(2)? as u64, word(3)?, word(6)?, word(7)?),
        };
        if count > MAX_FUNCTIONS || [names, depths, functions].iter().any(|&start| start > bytes.len()) {
            return None;
        }
        let mut table = Self { bytes, layout, text, names, depths, functions, count, special: Vec::new(), work: 0 };
        table.special = table.find_special();
        Some(table)
    }

    /// Finds where the names of special functions are, so that functions can be told by their name's place.
    fn find_special(&self) -> Vec<(u32, Special)> {
        let kinds = [
            (OUTERMOST, Special::Plain(cfa::OUTERMOST)),
            (STACK_SWITCH, Special::Plain(cfa::STACK_SWITCH)),
            (SIGNAL_TRAMPOLINE, Special::Plain(cfa::SIGNAL_FRAME)),
            (OTHER_STACK, Special::OtherStack),
            (OTHER_STACK_FRAMED, Special::OtherStackFramed),
        ];
        let mut found = Vec::new();
        let end = if self.layout == Layout::V1_2 { self.bytes.len() } else { self.depths.max(self.names) };
        let mut place = self.names;
        for name in self.bytes.get(self.names..end).unwrap_or_default().split(|&byte| byte == 0) {
            let plain = name.strip_suffix(b".abi0").unwrap_or(name);
            let kind = kinds.iter().find(|(names, _)| names.iter().any(|candidate| candidate.as_bytes() == plain));
            if let (Some((_, kind)), Ok(offset)) = (kind, u32::try_from(place - self.names)) {
                found.push((offset, *kind));
            }
            if found.len() == MAX_SPECIAL {
                break;
            }
            place += name.len() + 1;
        }
        found
    }

    pub(super) fn fingerprint(&self, state: &mut impl Hasher) {
        state.write_u64(self.text);
        state.write(&self.bytes);
    }

    /// Start address and place of the record of the function with this index; the last one's address is the end.
    fn entry(&self, index: usize) -> Option<(u64, usize)> {
        match self.layout {
            Layout::V1_18 => {
                let at = self.functions.checked_add(index.checked_mul(8)?)?;
                let start = self.text.checked_add(u64::from(read_u32(&self.bytes, at)?))?;
                let record = read_u32(&self.bytes, at.saturating_add(4)).unwrap_or_default() as usize;
                Some((start, self.functions.checked_add(record)?))
            }
            Layout::V1_2 | Layout::V1_16 => {
                let at = self.functions.checked_add(index.checked_mul(16)?)?;
                let start = read_u64(&self.bytes, at)?;
                let record = usize::try_from(read_u64(&self.bytes, at.saturating_add(8)).unwrap_or_default()).ok()?;
                let base = if self.layout == Layout::V1_16 { self.functions } else { 0 };
                Some((start, base.checked_add(record)?))
            }
        }
    }

    /// Every function, in the order of the table. `entry` is the place of its record.
    pub(super) fn functions(&self) -> impl Iterator<Item = Function> {
        (0..self.count)
            .map_while(|index| {
                let (start, entry) = self.entry(index)?;
                let (end, _) = self.entry(index + 1)?;
                Some(Function { start, end, entry })
            })
            .filter(|function| function.start < function.end)
    }

    /// Calls `row` with the start and rule of every row of a function, in order.
    ///
    /// # Errors
    /// The address from which on the function's record could not be understood.
    pub(super) fn rows(&mut self, function: Function, mut row: impl FnMut(u64, Rule)) -> Result<(), u64> {
        // The record begins with the function's address, of 4 bytes since 1.18 and of 8 before.
        let fields = function.entry.saturating_add(if self.layout == Layout::V1_18 { 4 } else { 8 });
        let (Some(name), Some(depths)) =
            (read_u32(&self.bytes, fields), read_u32(&self.bytes, fields.saturating_add(12)))
        else {
            return Err(function.start);
        };
        let special = self.special.iter().find(|(offset, _)| *offset == name).map(|(_, kind)| *kind);
        if let Some(Special::Plain(kind)) = special {
            row(function.start, Rule::plain(kind));
            return Ok(());
        }
        let mut place = self.depths.saturating_add(depths as usize);
        let (mut address, mut depth) = (function.start, -1i64);
        while address < function.end {
            self.work += 1;
            if self.work > MAX_WORK {
                return Err(address);
            }
            let (Some(change), Some(length)) = (self.varint(&mut place), self.varint(&mut place)) else {
                return Err(address);
            };
            if (change == 0 && address != function.start) || length == 0 {
                return Ok(());
            }
            depth += i64::from(change >> 1) ^ -i64::from(change & 1);
            row(address, rule_of(depth, special));
            address = address.saturating_add(u64::from(length));
        }
        Ok(())
    }

    /// A number in groups of 7 bits, the lowest first.
    fn varint(&self, place: &mut usize) -> Option<u32> {
        let mut value = 0u32;
        for shift in (0..35).step_by(7) {
            let byte = *self.bytes.get(*place)?;
            *place += 1;
            value |= u32::from(byte & 0x7f).checked_shl(shift)?;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

/// The rule where the stack pointer is `depth` bytes below the return address. Functions with a frame save the
/// frame pointer at its top.
fn rule_of(depth: i64, special: Option<Special>) -> Rule {
    let saved = Rule { fp: fp::AT_CFA, fp_offset: -16, ..Rule::default() };
    match (special, i32::try_from(depth)) {
        (Some(Special::OtherStack), _) => Rule { cfa: cfa::OTHER_STACK, cfa_offset: 16, ..saved },
        (Some(Special::OtherStackFramed), Ok(16..)) => Rule { cfa: cfa::OTHER_STACK, cfa_offset: 16, ..saved },
        (_, Ok(depth @ 0..0x1000_0000)) => {
            let rule = if depth >= 8 { saved } else { Rule::default() };
            Rule { cfa: cfa::STACK_POINTER, cfa_offset: depth + 8, ..rule }
        }
        _ => Rule::plain(cfa::UNSUPPORTED),
    }
}

/// Address of the first function from `runtime.moduledata`, whose first word is the address of the table. In
/// position-independent programs both are relocations.
fn module_text(file: &File, sections: &[Section], table: u64) -> Option<u64> {
    /// Bytes of a relocation: place, kind, addend (`Elf64_Rela`).
    const RELOCATION: usize = 24;
    let read = |name: &str| {
        let section = sections.iter().find(|section| section.name == name && section.size <= MAX_SEARCHED)?;
        Some((section.address, elf::read(file, section.offset, usize::try_from(section.size).ok()?)?))
    };
    for name in [".go.module", ".noptrdata", ".data", ".data.rel.ro"] {
        let Some((_, bytes)) = read(name) else { continue };
        let module = (0..bytes.len()).step_by(8).find(|&place| read_u64(&bytes, place) == Some(table));
        if let Some(text) = module.and_then(|place| read_u64(&bytes, place + MODULE_TEXT as usize))
            && text != 0
        {
            return Some(text);
        }
    }
    let (_, relocations) = read(".rela.dyn").or_else(|| read(".rela"))?;
    let entries =
        || relocations.chunks_exact(RELOCATION).filter_map(|entry| Some((read_u64(entry, 0)?, read_u64(entry, 16)?)));
    entries().filter(|(_, addend)| *addend == table).find_map(|(module, _)| {
        entries().find(|(place, _)| *place == module.wrapping_add(MODULE_TEXT)).map(|(_, addend)| addend)
    })
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of Go 1.18: names, stack depths, and functions by start and record.
    fn table(names: &[u8], depths: &[u8], functions: &[(u32, u32)], records: &[u8]) -> GoTable {
        const HEADER: usize = 8 + 8 * 8;
        let mut bytes = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8];
        let depths_start = HEADER + names.len();
        let functions_start = depths_start + depths.len();
        let count = functions.len() - 1;
        for word in [count, 0, 0x1000, HEADER, 0, 0, depths_start, functions_start] {
            bytes.extend((word as u64).to_le_bytes());
        }
        bytes.extend(names);
        bytes.extend(depths);
        for (start, record) in functions {
            bytes.extend(start.to_le_bytes());
            bytes.extend(record.to_le_bytes());
        }
        bytes.extend(records);
        GoTable::parse(bytes).expect("a table")
    }

    /// A record of a function: start, name, two numbers, stack depths.
    fn record(name: u32, depths: u32) -> Vec<u8> {
        [0, name, 0, 0, depths].iter().flat_map(|half| half.to_le_bytes()).collect()
    }

    fn rows(table: &mut GoTable, function: Function) -> Vec<(u64, u8, i32)> {
        let mut rows = Vec::new();
        let outcome = table.rows(function, |address, rule| rows.push((address, rule.cfa, rule.cfa_offset)));
        assert_eq!(outcome, Ok(()));
        rows
    }

    /// Depths are read as changes (the first one from -1), and special functions by their names.
    #[test]
    fn reads_functions_and_depths() {
        let names = b"main.main\0runtime.goexit.abi0\0";
        let records = [record(0, 0), record(10, 0)].concat();
        // Up by 1 for 4 bytes, up by 24 for 12, down by 24 for 16; the end.
        let depths = [2, 4, 48, 12, 47, 16, 0];
        let mut table = table(names, &depths, &[(0, 24), (0x20, 44), (0x40, 0)], &records);
        let functions: Vec<Function> = table.functions().collect();
        assert_eq!(
            functions.iter().map(|f| (f.start, f.end)).collect::<Vec<_>>(),
            [(0x1000, 0x1020), (0x1020, 0x1040)]
        );
        let (main, goexit) = (functions[0], functions[1]);
        let pointer = cfa::STACK_POINTER;
        assert_eq!(rows(&mut table, main), [(0x1000, pointer, 8), (0x1004, pointer, 32), (0x1010, pointer, 8)]);
        assert_eq!(rows(&mut table, goexit), [(0x1020, cfa::OUTERMOST, 0)]);
    }

    /// Many functions that share many rows, and many names of special functions, cost no more than a large file.
    #[test]
    fn limits_its_work() {
        let mut table = table(&b"runtime.goexit\0".repeat(1000), &[2, 1], &[(0, 16), (0x20, 0)], &record(1, 0));
        assert_eq!(table.special.len(), MAX_SPECIAL);
        let function = table.functions().next().expect("a function");
        table.work = MAX_WORK;
        assert_eq!(table.rows(function, |_, _| {}), Err(function.start));
    }
}

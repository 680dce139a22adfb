//! Rules for Go programs, from the table their runtime unwinds with: `.gopclntab`. It is there in stripped
//! programs too.
//!
//! In: the table. Out: which code it covers, and the rows of each function.

use std::{fs::File, hash::Hasher};

use profiler_common::unwind::rule::{Rule, cfa, fp};

use super::dwarf::Function;
use crate::elf::{GoFunction, GoTable, Section};

/// Most rows read of a table: functions may share them.
const MAX_WORK: usize = 1 << 28;
/// Most functions with rules of their own: each has up to two names.
const MAX_SPECIAL: usize = 64;

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

/// A program's table, read for the rules in it.
pub(super) struct GoRules {
    table: GoTable,
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

impl GoRules {
    /// Reads the table, if the file has one.
    pub(super) fn find(file: &File, sections: &[Section]) -> Option<Self> {
        GoTable::find(file, sections).map(Self::new)
    }

    pub(super) fn new(table: GoTable) -> Self {
        Self { special: find_special(&table), table, work: 0 }
    }

    /// Bytes of the table.
    pub(super) fn size(&self) -> u64 {
        self.table.size()
    }

    pub(super) fn fingerprint(&self, state: &mut impl Hasher) {
        self.table.fingerprint(state);
    }

    /// Every function, in the order of the table. `entry` is the place of its record.
    pub(super) fn functions(&self) -> impl Iterator<Item = Function> {
        self.table.functions().map(|GoFunction { start, end, record }| Function { start, end, entry: record })
    }

    /// Calls `row` with the start and rule of every row of a function, in order.
    ///
    /// # Errors
    /// The address from which on the function's record could not be understood.
    pub(super) fn rows(&mut self, function: Function, mut row: impl FnMut(u64, Rule)) -> Result<(), u64> {
        let go = GoFunction { start: function.start, end: function.end, record: function.entry };
        let (Some(name), Some(mut place)) = (self.table.name(go), self.table.depths(go)) else {
            return Err(function.start);
        };
        let special = self.special.iter().find(|(offset, _)| *offset == name).map(|(_, kind)| *kind);
        if let Some(Special::Plain(kind)) = special {
            row(function.start, Rule::plain(kind));
            return Ok(());
        }
        let (mut address, mut depth) = (function.start, -1i64);
        while address < function.end {
            self.work += 1;
            if self.work > MAX_WORK {
                return Err(address);
            }
            let (Some(change), Some(length)) = (self.table.varint(&mut place), self.table.varint(&mut place)) else {
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
}

/// Finds where the names of special functions are, so that functions can be told by their name's place.
fn find_special(table: &GoTable) -> Vec<(u32, Special)> {
    let kinds = [
        (OUTERMOST, Special::Plain(cfa::OUTERMOST)),
        (STACK_SWITCH, Special::Plain(cfa::STACK_SWITCH)),
        (SIGNAL_TRAMPOLINE, Special::Plain(cfa::SIGNAL_FRAME)),
        (OTHER_STACK, Special::OtherStack),
        (OTHER_STACK_FRAMED, Special::OtherStackFramed),
    ];
    let mut found = Vec::new();
    let mut place = 0;
    for name in table.names().split(|&byte| byte == 0) {
        let plain = name.strip_suffix(b".abi0").unwrap_or(name);
        let kind = kinds.iter().find(|(names, _)| names.iter().any(|candidate| candidate.as_bytes() == plain));
        if let (Some((_, kind)), Ok(offset)) = (kind, u32::try_from(place)) {
            found.push((offset, *kind));
        }
        if found.len() == MAX_SPECIAL {
            break;
        }
        place += name.len() + 1;
    }
    found
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of Go 1.18: names, stack depths, and functions by start and record.
    fn table(names: &[u8], depths: &[u8], functions: &[(u32, u32)], records: &[u8]) -> GoRules {
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
        GoRules::new(GoTable::parse(bytes).expect("a table"))
    }

    /// A record of a function: start, name, two numbers, stack depths.
    fn record(name: u32, depths: u32) -> Vec<u8> {
        [0, name, 0, 0, depths].iter().flat_map(|half| half.to_le_bytes()).collect()
    }

    fn rows(table: &mut GoRules, function: Function) -> Vec<(u64, u8, i32)> {
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

//! The table that Go's runtime unwinds and names functions with: `.gopclntab`. It is there in stripped programs too.
//!
//! In: the section. Out: functions, where they are, what they are called, and how deep their stacks are. Layouts by Go
//! version, from `src/runtime/symtab.go` and `src/debug/gosym/pclntab.go` of Go 1.13 to 1.27.

use std::{fs::File, hash::Hasher};

use super::{Section, read as read_file};

/// Most bytes of the table read.
const MAX_TABLE: u64 = 64 << 20;
/// Most functions taken from a table.
const MAX_FUNCTIONS: usize = 1 << 20;
/// Most bytes of the module data's relocations or section searched.
const MAX_SEARCHED: u64 = 16 << 20;
/// Where `runtime.moduledata` has the address of the first function (Go 1.16 and later).
const MODULE_TEXT: u64 = 176;
/// Instructions are counted in bytes on x86_64, words have 8 of them.
const QUANTUM_AND_WORD: [u8; 2] = [1, 8];

/// A function of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GoFunction {
    /// Stated address.
    pub(crate) start: u64,
    /// The first address behind it.
    pub(crate) end: u64,
    /// Where its record is.
    pub(crate) record: usize,
}

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
pub(crate) struct GoTable {
    bytes: Vec<u8>,
    /// Where it is in its file.
    place: u64,
    layout: Layout,
    /// What function addresses are relative to.
    text: u64,
    /// Where function names, stack depths and the function table are in `bytes`.
    names: usize,
    depths: usize,
    functions: usize,
    count: usize,
}

impl GoTable {
    /// Reads the table, if the file has one.
    pub(crate) fn find(file: &File, sections: &[Section]) -> Option<Self> {
        let section = sections
            .iter()
            .find(|section| matches!(section.name.as_str(), ".gopclntab" | ".data.rel.ro.gopclntab"))
            .filter(|section| section.size <= MAX_TABLE)?;
        let bytes = read_file(file, section.offset, usize::try_from(section.size).ok()?)?;
        let mut table = Self { place: section.offset, ..Self::parse(bytes)? };
        if table.layout == Layout::V1_18 && table.text == 0 {
            table.text = module_text(file, sections, section.address)
                .or_else(|| Some(sections.iter().find(|section| section.name == ".text")?.address))?;
        }
        Some(table)
    }

    pub(crate) fn parse(bytes: Vec<u8>) -> Option<Self> {
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
        Some(Self { bytes, layout, text, names, depths, functions, count, place: 0 })
    }

    /// Bytes of the table.
    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Hashes everything that it says.
    pub(crate) fn fingerprint(&self, state: &mut impl Hasher) {
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

    /// Every function, in the order of the table.
    pub(crate) fn functions(&self) -> impl Iterator<Item = GoFunction> {
        (0..self.count)
            .map_while(|index| {
                let (start, record) = self.entry(index)?;
                let (end, _) = self.entry(index + 1)?;
                Some(GoFunction { start, end, record })
            })
            .filter(|function| function.start < function.end)
    }

    /// Where the name of a function begins, among the names.
    pub(crate) fn name(&self, function: GoFunction) -> Option<u32> {
        read_u32(&self.bytes, self.field(function, 0))
    }

    /// Where the changes of a function's stack depth begin; for [`Self::varint`].
    pub(crate) fn depths(&self, function: GoFunction) -> Option<usize> {
        Some(self.depths.saturating_add(read_u32(&self.bytes, self.field(function, 12))? as usize))
    }

    /// A field of a function's record, which begins with the function's address: of 4 bytes since 1.18 and of 8 before.
    fn field(&self, function: GoFunction, offset: usize) -> usize {
        let address = if self.layout == Layout::V1_18 { 4 } else { 8 };
        function.record.saturating_add(address + offset)
    }

    /// All names, ended by a zero each.
    pub(crate) fn names(&self) -> &[u8] {
        let end = if self.layout == Layout::V1_2 { self.bytes.len() } else { self.depths.max(self.names) };
        self.bytes.get(self.names..end).unwrap_or_default()
    }

    /// Where the names begin in the file.
    pub(crate) fn names_place(&self) -> u64 {
        self.place.saturating_add(self.names as u64)
    }

    /// A number in groups of 7 bits, the lowest first.
    pub(crate) fn varint(&self, place: &mut usize) -> Option<u32> {
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

/// Address of the first function from `runtime.moduledata`, whose first word is the address of the table. In
/// position-independent programs both are relocations.
fn module_text(file: &File, sections: &[Section], table: u64) -> Option<u64> {
    /// Bytes of a relocation: place, kind, addend (`Elf64_Rela`).
    const RELOCATION: usize = 24;
    let read = |name: &str| {
        let section = sections.iter().find(|section| section.name == name && section.size <= MAX_SEARCHED)?;
        Some((section.address, read_file(file, section.offset, usize::try_from(section.size).ok()?)?))
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

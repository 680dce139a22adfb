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
/// Where it has the address that places of inline trees are relative to (Go 1.20 and later, and 1.18 and 1.19).
const MODULE_INLINE_TREES: u64 = 320;
const MODULE_INLINE_TREES_1_18: u64 = 304;
/// Most places that are tried for it.
const MAX_MODULES: usize = 8;
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
pub(super) enum Layout {
    /// Go 1.2 to 1.15.
    V1_2,
    /// Go 1.16 and 1.17.
    V1_16,
    /// Go 1.18 and later.
    V1_18,
}

/// A program's table.
pub(crate) struct GoTable {
    pub(super) bytes: Vec<u8>,
    /// Where it is in its file.
    place: u64,
    /// Its stated address.
    address: u64,
    pub(super) layout: Layout,
    /// Whether records say where functions begin in their files (Go 1.20 and later).
    pub(super) has_start_lines: bool,
    /// What function addresses are relative to.
    pub(super) text: u64,
    /// Where function names, stack depths and the function table are in `bytes`.
    pub(super) names: usize,
    pub(super) depths: usize,
    functions: usize,
    pub(super) count: usize,
    /// Where the names of files, and what leads to them by package, are in `bytes`.
    pub(super) files: usize,
    pub(super) packages: usize,
    /// Where in the file the places of inline trees are counted from, where that was looked for.
    pub(super) inline_trees: Option<u64>,
}

impl GoTable {
    /// Reads the table, if the file has one.
    pub(crate) fn find(file: &File, sections: &[Section]) -> Option<Self> {
        let section = sections
            .iter()
            .find(|section| matches!(section.name.as_str(), ".gopclntab" | ".data.rel.ro.gopclntab"))
            .filter(|section| section.size <= MAX_TABLE)?;
        let bytes = read_file(file, section.offset, usize::try_from(section.size).ok()?)?;
        let mut table = Self { place: section.offset, address: section.address, ..Self::parse(bytes)? };
        if table.layout == Layout::V1_18 && table.text == 0 {
            table.text = module_text(file, sections, section.address)
                .or_else(|| Some(sections.iter().find(|section| section.name == ".text")?.address))?;
        }
        Some(table)
    }

    /// Looks for what says which functions are inlined in others.
    pub(crate) fn find_inline_trees(&mut self, file: &File, sections: &[Section]) {
        if self.layout != Layout::V1_18 {
            return;
        }
        let place = if self.has_start_lines { MODULE_INLINE_TREES } else { MODULE_INLINE_TREES_1_18 };
        let words = module_words(file, sections, self.address, [MODULE_TEXT, place]);
        self.inline_trees = words.filter(|[text, _]| *text == self.text).and_then(|[_, trees]| {
            let inside = |section: &Section| trees.checked_sub(section.address).filter(|&inside| inside < section.size);
            sections
                .iter()
                .filter(|section| section.address != 0)
                .find_map(|section| section.offset.checked_add(inside(section)?))
        });
    }

    /// Sets where the places of inline trees are counted from.
    #[cfg(fuzzing)]
    pub(crate) fn assume_inline_trees(&mut self, place: u64) {
        self.inline_trees = Some(place);
    }

    /// Bytes of memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.bytes.len()
    }

    pub(crate) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let (layout, has_start_lines) = match read_u32(&bytes, 0)? {
            0xffff_fffb => (Layout::V1_2, false),
            0xffff_fffa => (Layout::V1_16, false),
            0xffff_fff0 => (Layout::V1_18, false),
            0xffff_fff1 => (Layout::V1_18, true),
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
        let (packages, files) = match layout {
            // Behind the functions, and the address at which the last of them ends.
            Layout::V1_2 => {
                let behind = count.checked_mul(16).and_then(|size| functions.checked_add(size)?.checked_add(8));
                (0, behind.and_then(|place| read_u32(&bytes, place)).unwrap_or(u32::MAX) as usize)
            }
            Layout::V1_16 => (word(3)?, word(4)?),
            Layout::V1_18 => (word(4)?, word(5)?),
        };
        if count > MAX_FUNCTIONS || [names, depths, functions].iter().any(|&start| start > bytes.len()) {
            return None;
        }
        Some(Self {
            bytes,
            place: 0,
            address: 0,
            layout,
            has_start_lines,
            text,
            names,
            depths,
            functions,
            count,
            files,
            packages,
            inline_trees: None,
        })
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
    pub(super) fn entry(&self, index: usize) -> Option<(u64, usize)> {
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
    pub(super) fn field(&self, function: GoFunction, offset: usize) -> usize {
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

/// Address of the first function.
fn module_text(file: &File, sections: &[Section], table: u64) -> Option<u64> {
    module_words(file, sections, table, [MODULE_TEXT]).map(|[text]| text)
}

/// Words of `runtime.moduledata`, whose first one is the address of the table. In position-independent programs all
/// are relocations.
fn module_words<const COUNT: usize>(
    file: &File,
    sections: &[Section],
    table: u64,
    places: [u64; COUNT],
) -> Option<[u64; COUNT]> {
    /// Bytes of a relocation: place, kind, addend (`Elf64_Rela`).
    const RELOCATION: usize = 24;
    let all = |word: &dyn Fn(u64) -> Option<u64>| {
        let mut words = [0; COUNT];
        for (place, into) in places.into_iter().zip(&mut words) {
            *into = word(place).filter(|&word| word != 0)?;
        }
        Some(words)
    };
    let read = |name: &str| {
        let section = sections.iter().find(|section| section.name == name && section.size <= MAX_SEARCHED)?;
        read_file(file, section.offset, usize::try_from(section.size).ok()?)
    };
    for name in [".go.module", ".noptrdata", ".data", ".data.rel.ro"] {
        let Some(bytes) = read(name) else { continue };
        let module = (0..bytes.len()).step_by(8).find(|&place| read_u64(&bytes, place) == Some(table));
        let words = module.and_then(|module| all(&|place| read_u64(&bytes, module + place as usize)));
        if words.is_some() {
            return words;
        }
    }
    let relocations = read(".rela.dyn").or_else(|| read(".rela"))?;
    let entries =
        || relocations.chunks_exact(RELOCATION).filter_map(|entry| Some((read_u64(entry, 0)?, read_u64(entry, 16)?)));
    let modules = entries().filter(|(_, addend)| *addend == table).take(MAX_MODULES);
    let mut words = modules.map(|(module, _)| {
        all(&|place| entries().find(|(at, _)| *at == module.wrapping_add(place)).map(|(_, addend)| addend))
    });
    words.find_map(|words| words)
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

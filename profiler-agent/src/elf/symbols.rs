//! Symbol tables: which functions a file names, read piece by piece.

use std::fs::File;

use object::{
    LittleEndian as LE,
    elf::{
        SHF_EXECINSTR, SHN_LORESERVE, SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE,
        SectionHeader64, Sym64,
    },
    pod,
};

use super::{header, read, section_headers};

/// Symbols read at a time.
const PIECE: u64 = 16 << 10;
/// Most bytes of one symbol table that are worth reading: four million symbols.
const MAX_TABLE: u64 = 96 << 20;

/// One symbol table of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SymbolTable {
    /// Whether it only has what other files may use (`.dynsym`).
    pub(crate) is_dynamic: bool,
    /// Where its names are in the file, and how many bytes they have.
    pub(crate) names: (u64, u64),
    offset: u64,
    count: u64,
    /// For each section of the file that holds instructions, the first address behind it.
    code: Vec<Option<u64>>,
}

/// A symbol of a function, or of code that may be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Symbol {
    /// Stated address.
    pub(crate) address: u64,
    /// Bytes; zero: the file does not say.
    pub(crate) size: u64,
    /// Bytes to the end of its section.
    pub(crate) left: u64,
    /// Where its name begins, in the table's names.
    pub(crate) name: u32,
    /// Whether the file calls it a function.
    pub(crate) is_function: bool,
}

/// The symbol tables of a file, the full one first: no file has more than one of each kind, whatever it states. Such
/// that are absurdly large are left out.
pub(crate) fn symbol_tables(file: &File) -> Vec<SymbolTable> {
    let headers = header(file).and_then(|header| section_headers(file, &header)).unwrap_or_default();
    let end = |section: &SectionHeader64<LE>| {
        let is_code = section.sh_flags.get(LE) & u64::from(SHF_EXECINSTR) != 0;
        is_code.then(|| section.sh_addr.get(LE).saturating_add(section.sh_size.get(LE)))
    };
    let code: Vec<Option<u64>> = headers.iter().map(end).collect();
    let table = |section: &SectionHeader64<LE>| {
        let names = headers.get(usize::try_from(section.sh_link.get(LE)).ok()?)?;
        let size = section.sh_size.get(LE);
        (size <= MAX_TABLE).then(|| SymbolTable {
            is_dynamic: section.sh_type.get(LE) == SHT_DYNSYM,
            names: (names.sh_offset.get(LE), names.sh_size.get(LE)),
            offset: section.sh_offset.get(LE),
            count: size / size_of::<Sym64<LE>>() as u64,
            code: code.clone(),
        })
    };
    let first = |kind| headers.iter().find(|section| section.sh_type.get(LE) == kind).and_then(table);
    [SHT_SYMTAB, SHT_DYNSYM].into_iter().filter_map(first).collect()
}

impl SymbolTable {
    /// Bytes of the table.
    pub(crate) fn bytes(&self) -> u64 {
        self.count.saturating_mul(size_of::<Sym64<LE>>() as u64)
    }

    /// Calls `symbol` for every symbol of code. Returns whether the table could be read to its end, and `symbol` wanted
    /// it to be.
    pub(crate) fn each(&self, file: &File, mut symbol: impl FnMut(Symbol) -> bool) -> bool {
        let entry = size_of::<Sym64<LE>>() as u64;
        let mut done = 0;
        while done < self.count {
            let count = PIECE.min(self.count - done);
            let place = self.offset.checked_add(done * entry);
            let Some(bytes) = place.and_then(|place| read(file, place, (count * entry) as usize)) else { return false };
            let Ok((symbols, _)) = pod::slice_from_bytes::<Sym64<LE>>(&bytes, count as usize) else { return false };
            if !symbols.iter().filter_map(|raw| self.symbol(raw)).all(&mut symbol) {
                return false;
            }
            done += count;
        }
        true
    }

    fn symbol(&self, raw: &Sym64<LE>) -> Option<Symbol> {
        let kind = raw.st_info & 0xf;
        let section = raw.st_shndx.get(LE);
        let is_function = kind == STT_FUNC || kind == STT_GNU_IFUNC;
        if section == SHN_UNDEF || raw.st_name.get(LE) == 0 || !(is_function || kind == STT_NOTYPE) {
            return None;
        }
        // (What has no type may be data, or a number. Reserved indexes name no section.)
        let address = raw.st_value.get(LE);
        let end = match self.code.get(usize::from(section)).copied().flatten() {
            Some(end) if section < SHN_LORESERVE => end,
            _ if is_function && section >= SHN_LORESERVE => address,
            _ => return None,
        };
        Some(Symbol {
            address,
            size: raw.st_size.get(LE),
            left: end.saturating_sub(address),
            name: raw.st_name.get(LE),
            is_function,
        })
    }
}

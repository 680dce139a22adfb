//! Procedure linkage tables: the small pieces of code through which a file calls functions of other files.
//!
//! No symbol names them, but each jumps to where a word of the file's data points, and a relocation says which symbol's
//! address the dynamic linker writes there.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    os::unix::fs::FileExt as _,
};

use object::{
    LittleEndian as LE,
    elf::{R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT, Rela64, Sym64},
    pod,
};

use super::{Section, read};

/// Most bytes of one linkage table: a quarter of a million functions.
const MAX_TABLE: u64 = 4 << 20;
/// Most bytes of relocations; browsers have a third of that.
const MAX_RELOCATIONS: u64 = 64 << 20;
/// Relocations read at a time.
const PIECE: u64 = 16 << 10;
/// Most functions of other files that are told apart.
const MAX_SLOTS: usize = 256 << 10;
/// Bytes of an entry, but for those that are half as long.
const ENTRY: u64 = 16;
const HALF: usize = 8;

/// One entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stub {
    /// Stated address.
    pub(crate) address: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Where the name begins of the function that is called, in the names of dynamic symbols.
    pub(crate) name: u32,
}

/// The stubs of a file, of which `sections` are the sections.
pub(crate) fn stubs(file: &File, sections: &[Section]) -> Vec<Stub> {
    let find = |name: &str| sections.iter().find(|section| section.name == name);
    let Some(symbols) = find(".dynsym") else { return Vec::new() };
    let tables = sections.iter().filter(|section| is_table(&section.name) && section.size <= MAX_TABLE);
    let mut stubs = Vec::new();
    for table in tables {
        let code = usize::try_from(table.size).ok().and_then(|size| read(file, table.offset, size));
        jumps(&code.unwrap_or_default(), table.address, |address, slot| stubs.push((address, slot)));
    }
    if stubs.is_empty() {
        return Vec::new();
    }
    let relocations = [".rela.plt", ".rela.dyn"].into_iter().filter_map(find);
    let slots = slots(file, relocations);
    let ends: Vec<u64> = stubs.iter().skip(1).map(|&(next, _)| next).chain([u64::MAX]).collect();
    let named = stubs.into_iter().zip(ends).filter_map(|((address, slot), end)| {
        let name = name_of(file, symbols, *slots.get(&slot)?)?;
        // (Tables need not be in the order of their addresses.)
        Some(Stub { address, size: end.checked_sub(address).map_or(ENTRY, |size| size.min(ENTRY)), name })
    });
    named.collect()
}

/// Whether a section with this name is a linkage table.
pub(crate) fn is_table(name: &str) -> bool {
    matches!(name, ".plt" | ".plt.sec" | ".plt.got")
}

/// Calls `found` with the address of each entry of a table and of the word that it jumps to: `jmp *place(%rip)`, perhaps
/// behind `endbr64` and a prefix (System V ABI, AMD64 supplement, "Procedure Linkage Table"; what binutils 2.40 writes).
fn jumps(code: &[u8], address: u64, mut found: impl FnMut(u64, u64)) {
    for start in (0..code.len()).step_by(HALF) {
        let entry = &code[start..];
        let after_landing = entry.strip_prefix(&[0xf3, 0x0f, 0x1e, 0xfa]).unwrap_or(entry);
        let jump = after_landing.strip_prefix(&[0xf2]).unwrap_or(after_landing);
        let Some([0xff, 0x25, a, b, c, d]) = jump.first_chunk() else { continue };
        let behind = address.wrapping_add((start + entry.len() - jump.len() + 6) as u64);
        let distance = i64::from(i32::from_le_bytes([*a, *b, *c, *d]));
        found(address.wrapping_add(start as u64), behind.wrapping_add_signed(distance));
    }
}

/// Words that the dynamic linker fills with addresses of functions, and the numbers of their symbols.
fn slots<'a>(file: &File, sections: impl Iterator<Item = &'a Section>) -> HashMap<u64, u32> {
    let size = size_of::<Rela64<LE>>() as u64;
    let mut slots = HashMap::new();
    for section in sections {
        let count = section.size.min(MAX_RELOCATIONS) / size;
        let mut done = 0;
        while done < count && slots.len() < MAX_SLOTS {
            let piece = PIECE.min(count - done);
            let place = section.offset.checked_add(done * size);
            let Some(bytes) = place.and_then(|place| read(file, place, (piece * size) as usize)) else { break };
            let Ok((relocations, _)) = pod::slice_from_bytes::<Rela64<LE>>(&bytes, piece as usize) else { break };
            for relocation in relocations {
                let kind = relocation.r_type(LE, false);
                if kind == R_X86_64_JUMP_SLOT || kind == R_X86_64_GLOB_DAT {
                    // (The first one counts: a file that has several lies.)
                    if let Entry::Vacant(slot) = slots.entry(relocation.r_offset.get(LE)) {
                        slot.insert(relocation.r_sym(LE, false));
                    }
                }
            }
            done += piece;
        }
    }
    slots
}

/// Where the name of a symbol begins.
fn name_of(file: &File, symbols: &Section, number: u32) -> Option<u32> {
    let place = u64::from(number) * size_of::<Sym64<LE>>() as u64;
    let mut bytes = [0; size_of::<Sym64<LE>>()];
    let end = place + bytes.len() as u64;
    if end > symbols.size {
        return None;
    }
    file.read_exact_at(&mut bytes, symbols.offset.checked_add(place)?).ok()?;
    let (symbol, _) = pod::from_bytes::<Sym64<LE>>(&bytes).ok()?;
    Some(symbol.st_name.get(LE)).filter(|&name| name != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: &[u8], expect: &[(u64, u64)]) {
        let mut jumps_found = Vec::new();
        jumps(code, 0x1000, |address, slot| jumps_found.push((address, slot)));
        assert_eq!(jumps_found, expect);
    }

    /// A lazy table: the entry that calls the linker, and one for a function.
    #[test]
    fn reads_lazy_tables() {
        let mut code = vec![0xff, 0x35, 2, 0, 0, 0, 0xff, 0x25, 4, 0, 0, 0, 0x0f, 0x1f, 0x40, 0];
        code.extend([0xff, 0x25, 0x10, 0, 0, 0, 0x68, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
        check(&code, &[(0x1010, 0x1026)]);
    }

    /// Entries of 8 bytes, and those that begin with a landing place for indirect jumps.
    #[test]
    fn reads_direct_tables() {
        let short = [0xff, 0x25, 0xfa, 0xff, 0xff, 0xff, 0x66, 0x90];
        check(&[short, short].concat(), &[(0x1000, 0x1000), (0x1008, 0x1008)]);
        let code = [0xf3, 0x0f, 0x1e, 0xfa, 0xf2, 0xff, 0x25, 1, 0, 0, 0, 0x0f, 0x1f, 0x44, 0, 0];
        check(&code, &[(0x1000, 0x100c)]);
        check(&code[..10], &[]);
    }
}

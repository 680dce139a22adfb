//! The few things about an ELF file that locating code needs: executable segments and the build ID.

use std::{fs::File, os::unix::fs::FileExt as _};

use object::{
    LittleEndian as LE,
    elf::{
        ELFCLASS64, ELFDATA2LSB, ELFMAG, FileHeader64, NT_GNU_BUILD_ID, NoteHeader64, PF_X, PT_LOAD, PT_NOTE,
        ProgramHeader64, SHT_DYNSYM, SHT_SYMTAB, SectionHeader64,
    },
    pod,
};

use crate::profile::{FileOffset, Segment, VirtualAddress};

/// Most program headers read; real files have about a dozen.
const MAX_PROGRAM_HEADERS: usize = 256;
/// Most bytes of one note segment read.
const MAX_NOTES: usize = 16 << 10;
/// Most section headers read.
const MAX_SECTIONS: usize = 4096;
/// Most bytes of symbol tables that are worth reading: four million symbols. Their index takes a third of it.
const MAX_SYMBOL_BYTES: u64 = 96 << 20;
/// Longest build ID kept.
const MAX_BUILD_ID: usize = 64;

/// What was found in the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ElfSummary {
    pub(super) segments: Vec<Segment>,
    pub(super) build_id: Option<Box<[u8]>>,
    /// Whether the symbol tables are of a size worth reading.
    pub(super) is_nameable: bool,
}

/// Reads headers and notes. `None`: not a little-endian 64-bit ELF file, or a broken one.
pub(super) fn summarize(file: &File) -> Option<ElfSummary> {
    let header_bytes = read(file, 0, size_of::<FileHeader64<LE>>())?;
    let (header, _) = pod::from_bytes::<FileHeader64<LE>>(&header_bytes).ok()?;
    let ident = &header.e_ident;
    if ident.magic != ELFMAG || ident.class != ELFCLASS64 || ident.data != ELFDATA2LSB {
        return None;
    }
    let entry = size_of::<ProgramHeader64<LE>>();
    if usize::from(header.e_phentsize.get(LE)) != entry {
        return None;
    }
    let count = usize::from(header.e_phnum.get(LE)).min(MAX_PROGRAM_HEADERS);
    let table = read(file, header.e_phoff.get(LE), count * entry)?;
    let (programs, _) = pod::slice_from_bytes::<ProgramHeader64<LE>>(&table, count).ok()?;

    let mut summary =
        ElfSummary { is_nameable: symbol_bytes(file, header) <= MAX_SYMBOL_BYTES, ..ElfSummary::default() };
    for program in programs {
        match program.p_type.get(LE) {
            PT_LOAD if program.p_flags.get(LE) & PF_X != 0 => summary.segments.push(Segment {
                offset: FileOffset(program.p_offset.get(LE)),
                size: program.p_filesz.get(LE),
                address: VirtualAddress(program.p_vaddr.get(LE)),
            }),
            PT_NOTE if summary.build_id.is_none() => {
                let size = usize::try_from(program.p_filesz.get(LE)).unwrap_or(usize::MAX).min(MAX_NOTES);
                summary.build_id = read(file, program.p_offset.get(LE), size).and_then(|notes| build_id(&notes));
            }
            _ => {}
        }
    }
    Some(summary)
}

/// Bytes of all symbol tables, as the section headers state them; without section headers there are none.
fn symbol_bytes(file: &File, header: &FileHeader64<LE>) -> u64 {
    let entry = size_of::<SectionHeader64<LE>>();
    let count = usize::from(header.e_shnum.get(LE)).min(MAX_SECTIONS);
    let Some(table) = read(file, header.e_shoff.get(LE), count * entry) else { return 0 };
    let Ok((sections, _)) = pod::slice_from_bytes::<SectionHeader64<LE>>(&table, count) else { return 0 };
    sections
        .iter()
        .filter(|section| matches!(section.sh_type.get(LE), SHT_SYMTAB | SHT_DYNSYM))
        .fold(0, |sum, section| sum.saturating_add(section.sh_size.get(LE)))
}

/// Finds the GNU build ID among notes.
fn build_id(mut notes: &[u8]) -> Option<Box<[u8]>> {
    loop {
        let (header, rest) = pod::from_bytes::<NoteHeader64<LE>>(notes).ok()?;
        let name_len = header.n_namesz.get(LE) as usize;
        let content_len = header.n_descsz.get(LE) as usize;
        let name = rest.get(..name_len)?;
        let content_start = name_len.checked_next_multiple_of(4)?;
        let content = rest.get(content_start..content_start.checked_add(content_len)?)?;
        if name == b"GNU\0" && header.n_type.get(LE) == NT_GNU_BUILD_ID {
            return (1..=MAX_BUILD_ID).contains(&content.len()).then(|| content.into());
        }
        notes = rest.get(content_start.checked_add(content_len.checked_next_multiple_of(4)?)?..)?;
    }
}

/// Reads exactly `len` bytes at `offset`.
fn read(file: &File, offset: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len() as u32, content.len() as u32, kind] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, content] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    /// The build ID is found behind other notes.
    #[test]
    fn finds_the_build_id() {
        let mut notes = note(b"GNU\0", 1, &[0; 16]);
        notes.extend(note(b"GNU\0", NT_GNU_BUILD_ID, &[0xab; 20]));
        assert_eq!(build_id(&notes).as_deref(), Some(&[0xab; 20][..]));
    }

    /// Lengths that lie end the search; they neither panic nor loop.
    #[test]
    fn survives_lying_notes() {
        let mut lying = note(b"GNU\0", NT_GNU_BUILD_ID, &[1; 20]);
        lying[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(build_id(&lying), None);
        let mut lying = note(b"XYZ\0", 7, &[1; 20]);
        lying[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(build_id(&lying), None);
        assert_eq!(build_id(&note(b"GNU\0", NT_GNU_BUILD_ID, &[1; 200])), None);
    }

    /// This very test binary has executable segments; a text file is no ELF file.
    #[test]
    fn reads_a_real_file() {
        let file = File::open("/proc/self/exe").expect("own executable");
        let summary = summarize(&file).expect("own executable is ELF");
        assert!(!summary.segments.is_empty());
        let text = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).expect("manifest");
        assert_eq!(summarize(&text), None);
    }
}

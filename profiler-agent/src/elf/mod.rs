//! ELF files, as far as finding code and its tables needs them: segments, sections, the build ID.
//!
//! In: a file. Out: what its headers say. Headers are read with bounded reads and never mapped, so that a file
//! that shrinks meanwhile is an error and not a signal.

mod contents;
mod debug_file;
mod go_lines;
mod go_table;
mod linkage;
mod symbols;

use std::{collections::BTreeSet, fs::File, os::unix::fs::FileExt as _};

use object::{
    LittleEndian as LE,
    elf::{
        ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_X86_64, FileHeader64, NT_GNU_BUILD_ID, NoteHeader64, PF_X, PT_GNU_EH_FRAME,
        PT_LOAD, PT_NOTE, ProgramHeader64, SHF_COMPRESSED, SHF_EXECINSTR, SHT_NOBITS, SectionHeader64,
    },
    pod,
};

pub(crate) use self::{
    contents::{Unread, contents},
    debug_file::{debug_file, debug_file_name, debug_link, is_split_off, mini_debug_info, shared_debug_file},
    go_lines::GoCall,
    go_table::{GoFunction, GoTable},
    linkage::{Stub, stubs},
    symbols::{SymbolTable, symbol_tables},
};
use crate::profile::{FileOffset, Segment, VirtualAddress};

/// Most program headers read; real files have about a dozen.
const MAX_PROGRAM_HEADERS: usize = 256;
/// Most bytes of one note segment read.
const MAX_NOTES: usize = 16 << 10;
/// Most section headers read.
const MAX_SECTIONS: usize = 4096;
/// Most bytes of section names read.
const MAX_SECTION_NAMES: usize = 256 << 10;
/// Most bytes of all symbol tables in which functions are looked for: about 350,000 symbols.
const MAX_FUNCTION_BYTES: u64 = 8 << 20;
/// What is compared of two files at a time, bytes.
const COMPARED: usize = 256 << 10;
/// Most bytes of two files that are compared.
const MAX_COMPARED: u64 = 512 << 20;
/// Longest build ID kept.
pub(crate) const MAX_BUILD_ID: usize = 64;

/// What a file's headers say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ElfSummary {
    /// Executable parts.
    pub(crate) segments: Vec<Segment>,
    /// GNU build ID.
    pub(crate) build_id: Option<Box<[u8]>>,
    /// Go's build ID.
    pub(crate) go_build_id: Option<Box<str>>,
}

/// A part of a file that its section headers name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) name: String,
    /// Stated virtual address; zero for what is not loaded.
    pub(crate) address: u64,
    pub(crate) offset: u64,
    /// Bytes in the file.
    pub(crate) size: u64,
    /// Whether it holds instructions.
    pub(crate) is_code: bool,
    /// Whether its contents are compressed, behind a compression header.
    pub(crate) is_compressed: bool,
}

/// Where the unwind tables of a file without section headers are: the index that the program headers name, and
/// the loaded part of the file around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnwindIndex {
    /// Stated address of the index.
    pub(crate) address: u64,
    /// Where the index is in the file.
    pub(crate) offset: u64,
    /// Bytes of the index.
    pub(crate) size: u64,
    /// Where the part of the file that holds it ends.
    pub(crate) part_end: u64,
}

type Header = FileHeader64<LE>;

/// Reads headers and notes. `None`: not a little-endian 64-bit ELF file, or a broken one.
pub(crate) fn summarize(file: &File) -> Option<ElfSummary> {
    let header = header(file)?;
    let mut summary = ElfSummary::default();
    for program in program_headers(file, &header)? {
        match program.p_type.get(LE) {
            PT_LOAD if program.p_flags.get(LE) & PF_X != 0 => summary.segments.push(Segment {
                offset: FileOffset(program.p_offset.get(LE)),
                size: program.p_filesz.get(LE),
                address: VirtualAddress(program.p_vaddr.get(LE)),
            }),
            PT_NOTE => {
                let size = usize::try_from(program.p_filesz.get(LE)).unwrap_or(usize::MAX).min(MAX_NOTES);
                if let Some(notes) = read(file, program.p_offset.get(LE), size) {
                    summary.build_id = summary.build_id.or_else(|| build_id(&notes));
                    summary.go_build_id = summary.go_build_id.or_else(|| go_build_id(&notes));
                }
            }
            _ => {}
        }
    }
    Some(summary)
}

/// The file's sections that have contents; none where it has no section headers.
pub(crate) fn sections(file: &File) -> Vec<Section> {
    let try_sections = || {
        let header = header(file)?;
        let headers = section_headers(file, &header)?;
        let (names, size) = section_names(&header, &headers)?;
        let names = read(file, names, usize::try_from(size).unwrap_or(usize::MAX).min(MAX_SECTION_NAMES))?;
        let sections = headers.iter().filter(|section| section.sh_type.get(LE) != SHT_NOBITS).filter_map(|section| {
            Some(Section {
                name: std::str::from_utf8(section_name(&names, section)?).ok()?.to_owned(),
                address: section.sh_addr.get(LE),
                offset: section.sh_offset.get(LE),
                size: section.sh_size.get(LE),
                is_code: section.sh_flags.get(LE) & u64::from(SHF_EXECINSTR) != 0,
                is_compressed: section.sh_flags.get(LE) & u64::from(SHF_COMPRESSED) != 0,
            })
        });
        Some(sections.collect())
    };
    try_sections().unwrap_or_default()
}

/// The unwind index, where the program headers name one.
pub(crate) fn unwind_index(file: &File) -> Option<UnwindIndex> {
    let programs = program_headers(file, &header(file)?)?;
    let index = programs.iter().find(|program| program.p_type.get(LE) == PT_GNU_EH_FRAME)?;
    let (address, offset) = (index.p_vaddr.get(LE), index.p_offset.get(LE));
    let part = programs.iter().filter(|program| program.p_type.get(LE) == PT_LOAD).find(|program| {
        offset.checked_sub(program.p_offset.get(LE)).is_some_and(|inside| inside < program.p_filesz.get(LE))
    })?;
    let part_end = part.p_offset.get(LE).checked_add(part.p_filesz.get(LE))?;
    Some(UnwindIndex { address, offset, size: index.p_filesz.get(LE), part_end })
}

/// Whether two files have the same headers, and the same contents but for their code and debug information.
pub(crate) fn tables_are_equal(a: &File, b: &File) -> bool {
    let len = |file: &File| file.metadata().ok().map(|metadata| metadata.len());
    let tables = |file: &File| {
        let mut sections = sections(file);
        sections.retain(|section| {
            let is_read = !section.is_code || linkage::is_table(&section.name);
            is_read && !section.name.starts_with(".debug")
        });
        sections
    };
    let tables_of_a = tables(a);
    let is_equal = |section: &Section| {
        let end = section.offset.saturating_add(section.size);
        (section.offset..end).step_by(COMPARED).all(|place| {
            let piece = COMPARED.min(usize::try_from(end - place).unwrap_or(COMPARED));
            let contents = read(a, place, piece);
            contents.is_some() && contents == read(b, place, piece)
        })
    };
    let is_known = len(a).is_some() && len(a) == len(b) && !tables_of_a.is_empty();
    let compared = tables_of_a.iter().fold(0u64, |sum, section| sum.saturating_add(section.size));
    is_known
        && compared <= MAX_COMPARED
        && summarize(a) == summarize(b)
        && tables_of_a == tables(b)
        && tables_of_a.iter().all(is_equal)
}

/// Stated address of the program's first instruction.
pub(crate) fn entry(file: &File) -> Option<u64> {
    Some(header(file)?.e_entry.get(LE))
}

/// Stated addresses of the functions that the file's symbols name; none where the tables are absurdly large
/// together.
pub(crate) fn functions(file: &File) -> BTreeSet<u64> {
    let tables = symbol_tables(file);
    let mut functions = BTreeSet::new();
    if tables.iter().map(SymbolTable::bytes).fold(0, u64::saturating_add) > MAX_FUNCTION_BYTES {
        return functions;
    }
    for table in tables {
        table.each(file, |symbol| {
            if symbol.is_function {
                functions.insert(symbol.address);
            }
            true
        });
    }
    functions
}

fn header(file: &File) -> Option<Header> {
    let bytes = read(file, 0, size_of::<Header>())?;
    let (header, _) = pod::from_bytes::<Header>(&bytes).ok()?;
    let ident = &header.e_ident;
    let is_ours = ident.magic == ELFMAG && ident.class == ELFCLASS64 && ident.data == ELFDATA2LSB;
    (is_ours && header.e_machine.get(LE) == EM_X86_64).then_some(*header)
}

fn program_headers(file: &File, header: &Header) -> Option<Vec<ProgramHeader64<LE>>> {
    let entry = size_of::<ProgramHeader64<LE>>();
    if usize::from(header.e_phentsize.get(LE)) != entry {
        return None;
    }
    let count = usize::from(header.e_phnum.get(LE)).min(MAX_PROGRAM_HEADERS);
    let table = read(file, header.e_phoff.get(LE), count * entry)?;
    Some(pod::slice_from_bytes(&table, count).ok()?.0.to_vec())
}

fn section_headers(file: &File, header: &Header) -> Option<Vec<SectionHeader64<LE>>> {
    let entry = size_of::<SectionHeader64<LE>>();
    let count = usize::from(header.e_shnum.get(LE)).min(MAX_SECTIONS);
    let table = read(file, header.e_shoff.get(LE), count * entry)?;
    Some(pod::slice_from_bytes(&table, count).ok()?.0.to_vec())
}

/// Where the names of sections are, and how many bytes they have.
fn section_names(header: &Header, sections: &[SectionHeader64<LE>]) -> Option<(u64, u64)> {
    let names = sections.get(usize::from(header.e_shstrndx.get(LE)))?;
    Some((names.sh_offset.get(LE), names.sh_size.get(LE)))
}

fn section_name<'a>(names: &'a [u8], section: &SectionHeader64<LE>) -> Option<&'a [u8]> {
    names.get(section.sh_name.get(LE) as usize..)?.split(|&byte| byte == 0).next()
}

/// Finds the GNU build ID among notes.
fn build_id(notes: &[u8]) -> Option<Box<[u8]>> {
    let id = note(notes, b"GNU\0", NT_GNU_BUILD_ID)?;
    (1..=MAX_BUILD_ID).contains(&id.len()).then(|| id.into())
}

/// Finds Go's build ID among notes: four parts in base 64 with slashes between them (`cmd/internal/buildid`, Go 1.26).
fn go_build_id(notes: &[u8]) -> Option<Box<str>> {
    const TYPE: u32 = 4;
    const MAX_LEN: usize = 128;
    let id = std::str::from_utf8(note(notes, b"Go\0\0", TYPE)?).ok()?;
    ((1..=MAX_LEN).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())).then(|| id.into())
}

/// The contents of the first note of this owner and type.
fn note<'a>(mut notes: &'a [u8], owner: &[u8], kind: u32) -> Option<&'a [u8]> {
    loop {
        let (header, rest) = pod::from_bytes::<NoteHeader64<LE>>(notes).ok()?;
        let name_len = header.n_namesz.get(LE) as usize;
        let content_len = header.n_descsz.get(LE) as usize;
        let name = rest.get(..name_len)?;
        let content_start = name_len.checked_next_multiple_of(4)?;
        let content = rest.get(content_start..content_start.checked_add(content_len)?)?;
        if name == owner && header.n_type.get(LE) == kind {
            return Some(content);
        }
        notes = rest.get(content_start.checked_add(content_len.checked_next_multiple_of(4)?)?..)?;
    }
}

/// Reads exactly `len` bytes at `offset`; `None` where the file does not hold them. A length that the file
/// cannot hold is refused before memory is set aside for it.
pub(crate) fn read(file: &File, offset: u64, len: usize) -> Option<Vec<u8>> {
    let end = offset.checked_add(u64::try_from(len).ok()?)?;
    if end > file.metadata().ok()?.len() {
        return None;
    }
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
        assert!(sections(&file).iter().any(|section| section.name == ".eh_frame" && section.size > 0));
        let text = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).expect("manifest");
        assert_eq!(summarize(&text), None);
        assert_eq!(sections(&text), []);
    }
}

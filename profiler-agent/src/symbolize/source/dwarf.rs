//! Source lines and inlined functions from DWARF.
//!
//! In: a file with debug information. Out: the functions at a stated address. Sections are read into memory within a
//! budget; units are parsed when an address in them is asked for, and stay parsed.

use std::{fs::File, sync::Arc};

use addr2line::{Context, Location};
use gimli::{AbbreviationsCacheStrategy, AttributeValue, DwAt, SectionId, UnitOffset, UnitRef};
use tracing::debug;

use super::{
    FunctionAt, NoSource,
    reader::{Meter, Piece},
};
use crate::{
    elf::{self, Section},
    profile::SourceLine,
};

/// Reads that opening, or one look-up, may take for each byte of sections, and besides: honest files are read from front to
/// back, about once.
const READS_PER_BYTE: u64 = 8;
const READS: u64 = 64 << 10;
/// Bytes of the budget that a read has to find free. The most that one can lead to is about twice as much.
const FREE_BYTES_PER_READ: u64 = 64;
/// Reads that finding where a function begins may take.
const DECLARATION_READS: u64 = 4 << 10;
/// Entries that say where one function begins, one leading to the next.
const MAX_ENTRIES: usize = 8;
/// Bytes that the heads of units take for each read of opening, and what is parsed later: 12 to 19, and 2 to 4 in C, C++
/// and Rust programs.
const BYTES_PER_HEAD_READ: u64 = 20;
const BYTES_PER_READ: u64 = 5;
/// Most functions at one address.
const MAX_FUNCTIONS: usize = 256;

/// A file's debug information.
pub(super) struct Dwarf {
    context: Context<Piece>,
    meter: Arc<Meter>,
    /// Most bytes that it may take.
    room: usize,
    /// Bytes of sections.
    sections: usize,
    /// Reads that opening took.
    head_reads: u64,
    /// Reads that parsing took.
    reads: u64,
    /// Whether something did not fit.
    is_full: bool,
}

impl Dwarf {
    /// Reads a file's debug information, and what several files share of it, into at most `room` bytes.
    pub(super) fn read(file: &File, sections: &[Section], room: usize) -> Result<Self, NoSource> {
        let meter = Arc::default();
        let mut left = room;
        let mut dwarf = load(file, sections, &meter, &mut left)?;
        if let Some(shared) = elf::shared_debug_file(file, sections) {
            dwarf.set_sup(load(&shared, &elf::sections(&shared), &meter, &mut left)?);
        }
        let allowed = reads_allowed(room - left, left);
        meter.fill(allowed);
        dwarf.populate_abbreviations_cache(AbbreviationsCacheStrategy::Duplicates);
        let context = Context::from_dwarf(dwarf).map_err(|error| {
            debug!("debug information cannot be read: {error}");
            if meter.left() == 0 { NoSource::OverBudget } else { NoSource::Broken }
        })?;
        let head_reads = allowed - meter.left();
        Ok(Self { context, meter, room, sections: room - left, head_reads, reads: 0, is_full: false })
    }

    /// The functions at a stated address, innermost first; none where it does not know.
    pub(super) fn find(&mut self, address: u64) -> Vec<FunctionAt> {
        // (The address after it is calculated.)
        if address == u64::MAX {
            return Vec::new();
        }
        let found = self.try_find(address);
        found.unwrap_or_else(|error| {
            debug!("debug information of {address:#x} cannot be read: {error}");
            Vec::new()
        })
    }

    fn try_find(&mut self, address: u64) -> gimli::Result<Vec<FunctionAt>> {
        let mut functions = Vec::new();
        let allowed = reads_allowed(self.sections, self.room.saturating_sub(self.bytes()));
        self.meter.fill(allowed);
        let frames = self.context.find_frames(address).skip_all_loads();
        // What was parsed stays, whatever came of it.
        self.reads = self.reads.saturating_add(allowed - self.meter.left());
        self.is_full |= self.meter.left() == 0;
        let mut frames = frames?;
        self.meter.fill(READS);
        let unit = self.context.find_dwarf_and_unit(address).skip_all_loads();
        while let Some(frame) = frames.next()?
            && functions.len() < MAX_FUNCTIONS
        {
            let name = match &frame.function {
                Some(function) => Some(function.raw_name()?.into_owned()),
                None => None,
            };
            self.meter.fill(DECLARATION_READS);
            let start_line = unit.zip(frame.dw_die_offset).and_then(|(unit, entry)| declared_at(&unit, entry).ok());
            self.meter.fill(READS);
            functions.push(FunctionAt { name, place: place(frame.location, start_line.unwrap_or(0)) });
        }
        Ok(functions)
    }

    /// Whether it would take more than it may.
    pub(super) fn is_full(&self) -> bool {
        self.is_full || self.bytes() > self.room
    }

    /// Bytes of memory it takes, about.
    pub(super) fn bytes(&self) -> usize {
        let heads = self.head_reads.saturating_mul(BYTES_PER_HEAD_READ);
        let parsed = heads.saturating_add(self.reads.saturating_mul(BYTES_PER_READ));
        self.sections.saturating_add(usize::try_from(parsed).unwrap_or(usize::MAX))
    }
}

/// How many reads may be taken of so many bytes of sections, with so many bytes free for what they say.
fn reads_allowed(sections: usize, free: usize) -> u64 {
    (sections as u64).saturating_mul(READS_PER_BYTE).saturating_add(READS).min(free as u64 / FREE_BYTES_PER_READ)
}

/// Reads the sections that matter.
fn load(
    file: &File,
    sections: &[Section],
    meter: &Arc<Meter>,
    left: &mut usize,
) -> Result<gimli::Dwarf<Piece>, NoSource> {
    gimli::Dwarf::load(|id| {
        let is_wanted = matches!(
            id,
            SectionId::DebugAbbrev
                | SectionId::DebugAddr
                | SectionId::DebugAranges
                | SectionId::DebugInfo
                | SectionId::DebugLine
                | SectionId::DebugLineStr
                | SectionId::DebugRanges
                | SectionId::DebugRngLists
                | SectionId::DebugStr
                | SectionId::DebugStrOffsets
        );
        let section = sections.iter().find(|section| is_wanted && section.name == id.name());
        let bytes = match section {
            Some(section) => elf::contents(file, section, *left).map_err(NoSource::from)?,
            None => Vec::new(),
        };
        *left -= bytes.len();
        Ok(Piece::new(bytes, meter))
    })
}

fn place(location: Option<Location<'_>>, start_line: u32) -> Option<SourceLine> {
    let location = location?;
    let (file, line) = (location.file.unwrap_or_default(), location.line.unwrap_or(0));
    (!file.is_empty() || line != 0).then(|| SourceLine { file: super::file_name(file).into(), line, start_line })
}

/// The line at which the function of an entry begins. The entry, or the one that it is an instance of, says so.
fn declared_at(unit: &UnitRef<'_, Piece>, mut entry: UnitOffset<usize>) -> gimli::Result<u32> {
    const ORIGINS: [DwAt; 2] = [gimli::DW_AT_abstract_origin, gimli::DW_AT_specification];
    for _ in 0..MAX_ENTRIES {
        let die = unit.entry(entry)?;
        if let Some(line) = die.attr(gimli::DW_AT_decl_line).and_then(|line| line.udata_value()) {
            return Ok(u32::try_from(line).unwrap_or(0));
        }
        match ORIGINS.iter().find_map(|&origin| die.attr_value(origin)) {
            Some(AttributeValue::UnitRef(next)) => entry = next,
            // (In another unit: that happens where a whole program is optimized at once.)
            _ => break,
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    /// What entries may look like (numbers from the DWARF standard): a unit, a function, an inlined one, one that says
    /// nothing, and a function with a list of ranges.
    const ABBREVIATIONS: &[u8] = &[
        1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0, 0, //
        2, 0x2e, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x06, 0, 0, //
        3, 0x1d, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x06, 0, 0, //
        4, 0x1d, 1, 0, 0, //
        5, 0x2e, 0, 0x55, 0x17, 0, 0, //
        0,
    ];
    const ROOM: usize = 64 << 20;

    fn place(start: u64, size: u32) -> Vec<u8> {
        [&start.to_le_bytes()[..], &size.to_le_bytes()].concat()
    }

    /// Debug information of one unit with these entries.
    fn dwarf(entries: &[u8], ranges: &[u8]) -> Dwarf {
        let unit = [&[4, 0, 0, 0, 0, 0, 8, 1][..], &place(0x1000, 0x1000), entries].concat();
        let unit = [&(unit.len() as u32).to_le_bytes()[..], &unit].concat();
        let mut file = File::from(memfd_create(c"debug", MFdFlags::MFD_CLOEXEC).expect("a file"));
        let mut sections = Vec::new();
        for (name, contents) in [(".debug_abbrev", ABBREVIATIONS), (".debug_info", &unit), (".debug_ranges", ranges)] {
            sections.push(Section {
                name: name.to_owned(),
                address: 0,
                offset: file.metadata().expect("a file").len(),
                size: contents.len() as u64,
                is_code: false,
                is_compressed: false,
            });
            file.write_all(contents).expect("room");
        }
        Dwarf::read(&file, &sections, ROOM).map_err(NoSource::label).expect("debug information")
    }

    fn names(functions: Vec<FunctionAt>) -> Vec<String> {
        functions.into_iter().filter_map(|function| function.name).collect()
    }

    /// Innermost first, and only where each is.
    #[test]
    fn finds_what_is_inlined() {
        let outer = [&b"\x02outer\0"[..], &place(0x1100, 0x100)].concat();
        let inner = [&b"\x03inner\0"[..], &place(0x1180, 0x10)].concat();
        let mut dwarf = dwarf(&[&outer[..], &inner, &[0, 0, 0]].concat(), &[]);
        assert_eq!(names(dwarf.find(0x1180)), ["inner", "outer"]);
        assert_eq!(names(dwarf.find(0x1190)), ["outer"]);
        assert!(dwarf.find(0x1200).is_empty() && dwarf.find(u64::MAX).is_empty());
        assert!(!dwarf.is_full() && dwarf.bytes() < 10_000);
    }

    /// Functions that nest deeper than any stack are not followed.
    #[test]
    fn survives_endless_nesting() {
        let outer = [&b"\x02outer\0"[..], &place(0x1100, 0x100)].concat();
        let mut dwarf = dwarf(&[&outer[..], &[4; 1 << 20]].concat(), &[]);
        assert!(dwarf.find(0x1180).is_empty());
    }

    /// A file whose functions all have the same long list of ranges says more than it is long.
    #[test]
    fn gives_up_what_is_said_again_and_again() {
        const COUNT: usize = 20_000;
        let range = [0x10u64.to_le_bytes(), 0x20u64.to_le_bytes()].concat();
        let mut dwarf = dwarf(&[5, 0, 0, 0, 0].repeat(COUNT), &range.repeat(COUNT));
        assert!(dwarf.find(0x1180).is_empty() && dwarf.is_full());
        assert!(dwarf.bytes() <= ROOM);
    }
}

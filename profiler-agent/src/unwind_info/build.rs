//! Builds the unwind table of one executable from everything its file says about its frames.
//!
//! In: the file. Out: rows. A file says the same thing in several places: the most trustworthy one that covers
//! a piece of code wins.

use std::{
    fs::File,
    hash::{BuildHasher, Hasher as _},
    io::Read as _,
    sync::Arc,
};

use flate2::read::ZlibDecoder;
use gimli::{BaseAddresses, EhFrameHdr, LittleEndian, Pointer};
use profiler_common::unwind::rule::{Rule, cfa};

use super::{
    code,
    dwarf::{self, Function},
    go::GoRules,
    table::{NO_RULE, Rules, Table, TableWriter, TooLarge},
};
use crate::{
    elf::{self, Section},
    profile::Executable,
};

/// Most bytes read of the sections with frame information of one file, together: as many as a Go table may have. Browsers
/// have a third of it.
const MAX_SECTIONS: u64 = 64 << 20;
/// Most functions of one file, whichever of its sections tell of them.
const MAX_FUNCTIONS: usize = 1 << 20;
/// Gaps between functions up to this many bytes are padding, which never runs.
const MAX_PADDING: u64 = 16;
/// Most bytes of code of one file whose rules are guessed.
const MAX_GUESSED: u64 = 4 << 20;
/// Most bytes of one piece of such code: what is larger was not made by a compiler of C.
const MAX_GAP: u64 = 1 << 20;
/// Most rows of one file that are guessed.
const MAX_GUESSED_ROWS: usize = 1 << 19;
/// Bytes of an entry of the procedure linkage table.
const PLT_ENTRY: u64 = 16;

/// What a file says about its frames, read but not understood yet.
pub(super) struct Source {
    file: Arc<File>,
    /// Stated addresses of its code, start and end, and the place of the start in the file.
    code: Vec<(u64, u64, u64)>,
    /// `.eh_frame`, and where it is loaded.
    eh_frame: Option<(Vec<u8>, u64)>,
    debug_frame: Option<Vec<u8>>,
    /// Procedure linkage tables: start, end, and the rule of their entries.
    linkage: Vec<(u64, u64, Linkage)>,
    go: Option<GoRules>,
    /// Stated address of the program's first instruction.
    entry: u64,
    /// Stated address of `.text`.
    text: u64,
}

/// Kinds of procedure linkage tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Linkage {
    /// A first entry that calls the resolver, then entries that push a number, from this byte on, and jump there.
    Lazy { pushed_from: i32 },
    /// Entries that only jump.
    Direct,
}

/// Which source covers a function. What comes first wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    Go,
    EhFrame,
    DebugFrame,
    Linkage,
    Code,
}

impl Source {
    /// Reads what the file says.
    pub(super) fn read(executable: &Executable) -> Option<Self> {
        let file = executable.file()?;
        let sections = elf::sections(&file);
        let find = |name: &str| sections.iter().find(|section| section.name == name);
        let end = |start: u64, size: u64| start.checked_add(size).filter(|&end| end > start);
        let of_sections = sections
            .iter()
            .filter(|section| section.is_code)
            .filter_map(|section| Some((section.address, end(section.address, section.size)?, section.offset)));
        let of_segments = executable
            .segments
            .iter()
            .filter_map(|segment| Some((segment.address.0, end(segment.address.0, segment.size)?, segment.offset.0)));
        let mut code: Vec<_> = of_sections.collect();
        if code.is_empty() {
            code = of_segments.collect();
        }
        code.sort_unstable();
        let go = GoRules::find(&file, &sections);
        let mut room = MAX_SECTIONS.saturating_sub(go.as_ref().map_or(0, GoRules::size));
        let mut source = Self {
            code,
            eh_frame: find(".eh_frame")
                .and_then(|section| Some((read(&file, section, &mut room)?, section.address)))
                .or_else(|| eh_frame_by_index(&file, &mut room)),
            debug_frame: find(".debug_frame").and_then(|section| read(&file, section, &mut room)),
            linkage: Vec::new(),
            go,
            entry: elf::entry(&file).unwrap_or_default(),
            text: find(".text").map_or(0, |section| section.address),
            file: Arc::clone(&file),
        };
        if source.debug_frame.is_none() {
            source.debug_frame = executable.build_id.as_deref().and_then(|id| separate_debug_frame(id, &mut room));
        }
        let has_jumps = find(".plt.sec").is_some();
        for section in &sections {
            let linkage = match section.name.as_str() {
                ".plt" => Linkage::Lazy { pushed_from: if has_jumps { 9 } else { 11 } },
                ".plt.sec" | ".plt.got" | ".iplt" => Linkage::Direct,
                _ => continue,
            };
            if let Some(end) = end(section.address, section.size) {
                source.linkage.push((section.address, end, linkage));
            }
        }
        Some(source)
    }

    /// Tells sources apart by their contents: equal ones make equal tables, whatever their files are called and
    /// whatever build ID they claim.
    pub(super) fn fingerprint(&self, hasher: &impl BuildHasher) -> u64 {
        let mut state = hasher.build_hasher();
        let mut word = |word: u64| state.write_u64(word);
        for &(start, end, _) in &self.code {
            word(start);
            word(end);
        }
        word(self.entry);
        for &(start, end, linkage) in &self.linkage {
            word(start);
            word(end);
            word(match linkage {
                Linkage::Lazy { pushed_from } => u64::from(pushed_from.unsigned_abs()),
                Linkage::Direct => 0,
            });
        }
        let (eh_frame, address) =
            self.eh_frame.as_ref().map_or((&[][..], 0), |(bytes, address)| (&bytes[..], *address));
        word(address);
        word(self.text);
        for bytes in [eh_frame, self.debug_frame.as_deref().unwrap_or_default()] {
            state.write_usize(bytes.len());
            state.write(bytes);
        }
        if let Some(go) = &self.go {
            go.fingerprint(&mut state);
        }
        state.finish()
    }

    /// Builds the table. `Ok(None)`: the file says nothing about its frames.
    pub(super) fn build(mut self, rules: &mut Rules, max_rows: usize) -> Result<Option<Built>, TooLarge> {
        let (eh_bytes, eh_address) = self.eh_frame.take().unwrap_or_default();
        let debug_bytes = self.debug_frame.take().unwrap_or_default();
        let mut eh_frame = dwarf::eh_frame(&eh_bytes, eh_address, self.text);
        let mut debug_frame = dwarf::debug_frame(&debug_bytes);
        let mut ranges: Vec<(Function, Origin)> = Vec::new();
        let mut add = |origin: Origin, function: Function| {
            let after = self.code.partition_point(|&(start, ..)| start <= function.start);
            let piece = after.checked_sub(1).and_then(|index| self.code.get(index));
            if piece.is_some_and(|&(_, end, _)| function.end <= end) && ranges.len() < MAX_FUNCTIONS {
                ranges.push((function, origin));
            }
        };
        eh_frame.functions(|function| add(Origin::EhFrame, function));
        debug_frame.functions(|function| add(Origin::DebugFrame, function));
        self.go.iter().flat_map(GoRules::functions).for_each(|function| add(Origin::Go, function));
        for (entry, &(start, end, _)) in self.linkage.iter().enumerate() {
            add(Origin::Linkage, Function { start, end, entry });
        }
        ranges.sort_unstable_by_key(|&(function, origin)| (function.start, origin, function.end));
        let guessed = self.guess(&ranges);
        let is_guessed = !guessed.is_empty();
        let function = |(entry, gap): (usize, &Gap)| (Function { start: gap.start, end: gap.end, entry }, Origin::Code);
        ranges.extend(guessed.iter().enumerate().map(function));
        if ranges.is_empty() {
            return Ok(None);
        }
        ranges.sort_unstable_by_key(|&(function, origin)| (function.start, origin, function.end));

        let start = ranges.first().map_or(0, |(function, _)| function.start);
        let end = ranges.iter().map(|(function, _)| function.end).max().unwrap_or(start);
        let mut writer = TableWriter::new(start, end, max_rows)?;
        let mut covered = start;
        let mut last = (Rule::default(), NO_RULE);
        for (function, origin) in ranges {
            let begin = function.start.max(covered);
            if begin >= function.end {
                continue;
            }
            if begin - covered > MAX_PADDING {
                writer.push(covered, NO_RULE)?;
            }
            let mut outcome = Ok(());
            let mut row = |address: u64, rule: Rule| {
                if last.0 != rule || last.1 == NO_RULE {
                    last = (rule, rules.number(rule));
                }
                // The return address of a signal handler is the first byte of its trampoline, and is looked up one
                // byte earlier.
                let early = u64::from(rule.cfa == cfa::SIGNAL_FRAME);
                if address < function.end && outcome.is_ok() {
                    outcome = writer.push(address.max(begin).saturating_sub(early), last.1);
                }
            };
            let understood = match origin {
                Origin::EhFrame => eh_frame.rows(function, &mut row),
                Origin::DebugFrame => debug_frame.rows(function, &mut row),
                Origin::Go => self.go.as_mut().map_or(Ok(()), |go| go.rows(function, &mut row)),
                Origin::Code => {
                    for &(address, rule) in guessed.get(function.entry).map_or(&[][..], |gap| &gap.rows) {
                        row(address, rule);
                    }
                    Ok(())
                }
                Origin::Linkage => {
                    linkage_rows(function, self.linkage.get(function.entry).map(|entry| entry.2), &mut row);
                    Ok(())
                }
            };
            outcome?;
            if let Err(address) = understood {
                writer.push(address.clamp(begin, function.end - 1), rules.number(Rule::plain(cfa::UNSUPPORTED)))?;
            }
            covered = function.end;
        }
        writer.push(covered, NO_RULE)?;
        Ok(Some(Built { table: writer.finish(), is_guessed }))
    }

    /// Reads the code that `ranges`, in the order of their starts, leave uncovered, and guesses its rows.
    fn guess(&self, ranges: &[(Function, Origin)]) -> Vec<Gap> {
        let mut pieces = Vec::new();
        let mut left = MAX_GUESSED;
        let mut next = ranges.iter().peekable();
        for &(start, end, offset) in &self.code {
            let mut covered = start;
            loop {
                let range = next.next_if(|(function, _)| function.start < end);
                let stop = range.map_or(end, |(function, _)| function.start.max(covered));
                let size = stop.saturating_sub(covered);
                if size > MAX_PADDING && size <= left.min(MAX_GAP) {
                    left -= size;
                    pieces.push((covered, size, offset.saturating_add(covered - start)));
                }
                let Some((function, _)) = range else { break };
                covered = covered.max(function.end);
            }
        }
        if pieces.is_empty() {
            return Vec::new();
        }
        let read = |size: u64, offset: u64| elf::read(&self.file, offset, usize::try_from(size).ok()?);
        let mut functions = elf::functions(&self.file);
        let code_size = self.code.iter().fold(0u64, |sum, (start, end, _)| sum.saturating_add(end - start));
        if code_size <= MAX_GUESSED {
            // Small enough to look for calls in what is covered, too.
            for &(start, end, offset) in &self.code {
                functions.extend(read(end - start, offset).iter().flat_map(|bytes| code::called(bytes, start)));
            }
        }
        let mut gaps: Vec<Gap> = Vec::new();
        let mut row_count = 0;
        for (start, size, offset) in pieces {
            let rows = read(size, offset).map(|bytes| code::rows(&bytes, start, self.entry, &functions));
            let rows = rows.unwrap_or_default();
            row_count += rows.len();
            if row_count > MAX_GUESSED_ROWS {
                break;
            }
            if !rows.is_empty() {
                gaps.push(Gap { start, end: start + size, rows });
            }
        }
        gaps
    }
}

/// A finished table.
pub(super) struct Built {
    pub(super) table: Table,
    /// Whether code was looked at besides what the fingerprint covers.
    pub(super) is_guessed: bool,
}

/// A piece of code that nothing covers, and its guessed rows.
struct Gap {
    start: u64,
    end: u64,
    rows: Vec<(u64, Rule)>,
}

/// The rows of a procedure linkage table: what its instructions do to the stack pointer.
fn linkage_rows(table: Function, kind: Option<Linkage>, mut row: impl FnMut(u64, Rule)) {
    let stack_pointer = |offset| Rule { cfa_offset: offset, ..Rule::plain(cfa::STACK_POINTER) };
    match kind {
        Some(Linkage::Lazy { pushed_from }) => {
            // The first entry is reached with a number pushed, and pushes once more with its first instruction,
            // which has 6 bytes.
            row(table.start, stack_pointer(16));
            row(table.start + 6, stack_pointer(24));
            row(table.start + PLT_ENTRY, Rule { cfa_offset: pushed_from, ..Rule::plain(cfa::PLT_ENTRY) });
        }
        Some(Linkage::Direct) => row(table.start, stack_pointer(8)),
        None => {}
    }
}

/// Reads a section, decompressed, and takes its size off the room there is.
fn read(file: &File, section: &Section, room: &mut u64) -> Option<Vec<u8>> {
    /// Bytes of the header before compressed contents: type, reserved, size, alignment (`Elf64_Chdr`).
    const COMPRESSION_HEADER: usize = 24;
    const ZLIB: [u8; 4] = [1, 0, 0, 0];
    if section.size > *room {
        return None;
    }
    let bytes = elf::read(file, section.offset, usize::try_from(section.size).ok()?)?;
    if !section.is_compressed {
        *room -= section.size;
        return Some(bytes);
    }
    let (header, contents) = bytes.split_at_checked(COMPRESSION_HEADER)?;
    if header.get(..4)? != ZLIB {
        return None;
    }
    let mut decompressed = Vec::new();
    ZlibDecoder::new(contents).take(*room).read_to_end(&mut decompressed).ok()?;
    *room -= decompressed.len() as u64;
    Some(decompressed)
}

/// `.eh_frame` of a file without section headers, found through the index that the program headers name.
fn eh_frame_by_index(file: &File, room: &mut u64) -> Option<(Vec<u8>, u64)> {
    /// The index's own header: version, three encodings, pointer and count.
    const HEADER: u64 = 64;
    let index = elf::unwind_index(file)?;
    let header = elf::read(file, index.offset, usize::try_from(index.size.min(HEADER)).ok()?)?;
    let bases = BaseAddresses::default().set_eh_frame_hdr(index.address);
    let parsed = EhFrameHdr::new(&header, LittleEndian).parse(&bases, 8).ok()?;
    let Pointer::Direct(address) = parsed.eh_frame_ptr() else { return None };
    // Both lie in the same loaded part.
    let offset = index.offset.wrapping_add(address.wrapping_sub(index.address));
    let size = index.part_end.checked_sub(offset)?.min(*room);
    let bytes = elf::read(file, offset, usize::try_from(size).ok()?)?;
    *room -= size;
    Some((bytes, address))
}

/// `.debug_frame` of the debug file that was split off the executable with this build ID.
fn separate_debug_frame(build_id: &[u8], room: &mut u64) -> Option<Vec<u8>> {
    let file = elf::debug_file(build_id)?;
    let sections = elf::sections(&file);
    read(&file, sections.iter().find(|section| section.name == ".debug_frame")?, room)
}

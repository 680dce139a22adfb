//! Source lines and inlined functions of code in files, within a byte budget of their own.
//!
//! In: an executable and a stated address in it. Out: the functions at the address. Go's own table is asked first, in
//! stripped programs too; where it does not know, DWARF is, of the file or of the debug file that was split off it.

mod dwarf;
mod reader;
mod store;

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc};

use self::dwarf::Dwarf;
pub use self::store::SourceStats;
pub(super) use self::store::SourceStore;
use super::demangle;
use crate::{
    elf::{self, GoCall, GoTable, Section, Unread},
    profile::{FunctionName, InlinedFunction, SourceLine},
};

/// Longest name of a source file that is kept, bytes.
const MAX_FILE_NAME: usize = 4096;

/// Whether source lines and inlined functions are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceOptions {
    /// Lines of code.
    pub lines: bool,
    /// Functions that are inlined in others.
    pub inlines: bool,
    /// Most bytes for debug information.
    pub bytes: usize,
}

impl SourceOptions {
    /// Most bytes for debug information unless told otherwise.
    pub const DEFAULT_BYTES: usize = 256 << 20;
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { lines: false, inlines: false, bytes: Self::DEFAULT_BYTES }
    }
}

/// Why nothing is known about a file's source code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSource {
    /// The file could not be read, or is none that is understood.
    Unreadable,
    /// Neither it nor what belongs to it has debug information.
    NoDebugInfo,
    /// Its debug information does not fit into the budget, or takes too long to read.
    OverBudget,
    /// Its debug information is compressed in a way that is not understood.
    Compression,
    /// Its debug information contradicts itself.
    Broken,
    /// Looking things up in it takes too long.
    TooSlow,
}

impl NoSource {
    /// Every reason.
    pub const ALL: [Self; 6] =
        [Self::Unreadable, Self::NoDebugInfo, Self::OverBudget, Self::Compression, Self::Broken, Self::TooSlow];

    /// Its name for people and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unreadable => "file unreadable",
            Self::NoDebugInfo => "no debug information",
            Self::OverBudget => "over budget",
            Self::Compression => "unknown compression",
            Self::Broken => "broken debug information",
            Self::TooSlow => "too slow",
        }
    }
}

impl From<Unread> for NoSource {
    fn from(unread: Unread) -> Self {
        match unread {
            Unread::TooLarge => Self::OverBudget,
            Unread::Compression => Self::Compression,
            Unread::Broken => Self::Broken,
        }
    }
}

/// A function at an address, as a file's tables have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FunctionAt {
    /// As its file has it.
    pub(super) name: Option<String>,
    /// Where in it the code is.
    pub(super) place: Option<SourceLine>,
}

/// The functions at an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Source {
    /// What the function itself is called.
    pub(super) function: Option<FunctionName>,
    /// Where in it the code is, or the call of what is inlined there.
    pub(super) place: Option<SourceLine>,
    /// What is inlined, innermost first.
    pub(super) inlined: Box<[InlinedFunction]>,
}

impl Source {
    /// What was asked for of the functions at an address, which come innermost first.
    fn new(mut functions: Vec<FunctionAt>, options: SourceOptions) -> Self {
        let Some(own) = functions.pop() else { return Self::default() };
        let place = |place: Option<SourceLine>| place.filter(|_| options.lines);
        let unnamed = || FunctionName::from("[inlined]");
        let inlined = functions.into_iter().filter(|_| options.inlines).map(|function| InlinedFunction {
            name: function.name.map_or_else(unnamed, demangle::function),
            place: place(function.place),
        });
        Self { inlined: inlined.collect(), function: own.name.map(demangle::function), place: place(own.place) }
    }
}

/// What is known about one file's source code. May be made and used by any thread, one at a time.
pub(super) struct FileSource {
    file: Arc<File>,
    build_id: Option<Box<[u8]>>,
    /// What was split off it, where that is known already.
    split_off: Option<Arc<File>>,
    go: Option<GoTable>,
    dwarf: Option<Result<Dwarf, NoSource>>,
}

impl FileSource {
    /// Reads what the file has besides DWARF, into at most `room` bytes. DWARF follows with the first address that needs it.
    pub(super) fn read(file: &Arc<File>, build_id: Option<&[u8]>, split_off: Option<&Arc<File>>, room: usize) -> Self {
        let sections = elf::sections(file);
        let mut go = GoTable::find(file, &sections).filter(|table| table.bytes() <= room);
        if let Some(table) = &mut go {
            table.find_inline_trees(file, &sections);
        }
        let (build_id, split_off) = (build_id.map(Into::into), split_off.cloned());
        Self { file: Arc::clone(file), build_id, split_off, go, dwarf: None }
    }

    /// The functions at a stated address, innermost first, within `room` bytes of memory.
    pub(super) fn find(&mut self, address: u64, room: usize) -> Result<Vec<FunctionAt>, NoSource> {
        let read = |place, bytes: &mut [u8]| self.file.read_exact_at(bytes, place).ok();
        let go = self.go.as_ref().and_then(|go| Some((go.has_inline_trees(), go.calls_at(address, read)?)));
        let functions = |calls: Vec<GoCall>| calls.into_iter().map(go_function).collect();
        let go = match go {
            Some((true, calls)) => return Ok(functions(calls)),
            // Lines of programs of Go before 1.18: better than none.
            other => other.map(|(_, calls)| functions(calls)),
        };
        let room = room.saturating_sub(self.go.as_ref().map_or(0, GoTable::bytes));
        let dwarf = self
            .dwarf
            .get_or_insert_with(|| read_dwarf(&self.file, self.build_id.as_deref(), self.split_off.as_deref(), room));
        let functions = dwarf.as_mut().map(|dwarf| dwarf.find(address)).map_err(|reason| *reason);
        if dwarf.as_ref().is_ok_and(Dwarf::is_full) {
            *dwarf = Err(NoSource::OverBudget);
        }
        match (functions, go) {
            (Ok(functions), Some(go)) if functions.is_empty() => Ok(go),
            (Err(_), Some(go)) => Ok(go),
            (functions, _) => functions,
        }
    }

    /// Why its DWARF tells nothing, once that is known.
    fn reason(&self) -> Option<NoSource> {
        self.dwarf.as_ref()?.as_ref().err().copied()
    }

    /// Bytes of memory it takes, about.
    pub(super) fn bytes(&self) -> usize {
        let dwarf = self.dwarf.as_ref().and_then(|dwarf| dwarf.as_ref().ok()).map_or(0, Dwarf::bytes);
        size_of::<Self>() + dwarf + self.go.as_ref().map_or(0, GoTable::bytes)
    }
}

fn read_dwarf(file: &File, build_id: Option<&[u8]>, split_off: Option<&File>, room: usize) -> Result<Dwarf, NoSource> {
    let has_dwarf = |sections: &[Section]| sections.iter().any(|section| section.name == ".debug_info");
    let sections = elf::sections(file);
    if has_dwarf(&sections) {
        return Dwarf::read(file, &sections, room);
    }
    let of_machine = if split_off.is_none() { build_id.and_then(elf::debug_file) } else { None };
    let split_off = split_off.or(of_machine.as_ref()).ok_or(NoSource::NoDebugInfo)?;
    let sections = elf::sections(split_off);
    if has_dwarf(&sections) { Dwarf::read(split_off, &sections, room) } else { Err(NoSource::NoDebugInfo) }
}

fn go_function(call: GoCall) -> FunctionAt {
    let file = call.file.as_deref().map(file_name).unwrap_or_default().into();
    let place = SourceLine { file, line: call.line, start_line: call.start_line };
    FunctionAt { name: call.name, place: (!place.file.is_empty() || place.line != 0).then_some(place) }
}

/// A file's name, no longer than is kept.
fn file_name(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_FILE_NAME)]
}

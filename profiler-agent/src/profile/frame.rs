//! A named frame.

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
};

use super::Executable;

/// What kind of code a frame runs, in the terms of OpenTelemetry's `profile.frame.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameType {
    /// Machine code in user mode.
    Native,
    /// Machine code that its process made at run time, from whatever language.
    Runtime,
    /// Kernel code.
    Kernel,
}

impl FrameType {
    /// The attribute's value.
    pub const fn label(self) -> &'static str {
        match self {
            // The conventions know languages and machine code. A map of names does not tell the language, nor does the
            // process: many have several compilers in them.
            Self::Native | Self::Runtime => "native",
            Self::Kernel => "kernel",
        }
    }
}

/// What a function is called.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FunctionName {
    /// For people: demangled.
    pub readable: Box<str>,
    /// As its file has it, where that is something else.
    pub system: Option<Box<str>>,
}

impl FunctionName {
    /// As its file has it.
    pub fn system(&self) -> &str {
        self.system.as_deref().unwrap_or(&self.readable)
    }
}

impl From<&str> for FunctionName {
    fn from(name: &str) -> Self {
        Self { readable: name.into(), system: None }
    }
}

/// Why a place has no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nameless {
    /// The file could not be read, or is none that is understood.
    Unreadable,
    /// It says nothing about its functions, nor does anything that belongs to it.
    NoSymbols,
    /// None of the functions it tells about holds the place.
    NotCovered,
    /// It is still being read.
    Pending,
    /// Reading it took too long.
    TooSlow,
    /// A server that may have its debug file has not sent it yet.
    DebugFilePending,
    /// Servers did not send its debug file.
    DebugFileNotSent,
    /// Code made at run time, by a process that names none of it.
    NoCodeMap,
    /// Code made at run time that its process does not name, or not yet.
    NotInCodeMap,
    /// The configuration wants it not to be told.
    Redacted,
}

impl Nameless {
    /// Every reason that naming finds: all but the last, which comes later.
    pub const ALL: [Self; 9] = [
        Self::Unreadable,
        Self::NoSymbols,
        Self::NotCovered,
        Self::Pending,
        Self::TooSlow,
        Self::DebugFilePending,
        Self::DebugFileNotSent,
        Self::NoCodeMap,
        Self::NotInCodeMap,
    ];

    /// Its name for people, metrics and attributes.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unreadable => "file unreadable",
            Self::NoSymbols => "no symbols",
            Self::NotCovered => "not covered by symbols",
            Self::Pending => "symbols pending",
            Self::TooSlow => "symbols too slow",
            Self::DebugFilePending => "debug file pending",
            Self::DebugFileNotSent => "debug file not sent",
            Self::NoCodeMap => "no perf map or jitdump",
            Self::NotInCodeMap => "not in perf map or jitdump",
            Self::Redacted => "redacted",
        }
    }
}

/// A frame's function, or what is known instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameName {
    /// The function's name.
    Function(FunctionName),
    /// Nothing names the place: where it is in a file, the file's name and the address stand in.
    Unnamed(Nameless),
    /// Memory that no mapping was known for.
    Unmapped,
}

/// A place in a function's source code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceLine {
    /// The file, as the compiler was told its name; empty where it is not known.
    pub file: Box<str>,
    /// The line that runs; 0 where it is not known.
    pub line: u32,
    /// The line at which the function begins; 0 where it is not known.
    pub start_line: u32,
}

/// A function whose code the compiler put into another's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlinedFunction {
    /// Its name.
    pub name: FunctionName,
    /// Where in it the code is: what runs, or the call of the next function inside.
    pub place: Option<SourceLine>,
}

/// A frame, shared by every sample that passes through it.
#[derive(Debug)]
pub struct Frame {
    /// What kind of code it runs.
    pub frame_type: FrameType,
    /// Its function.
    pub name: FrameName,
    /// The file it is in, for user code.
    pub executable: Option<Arc<Executable>>,
    /// The address: as the file states it for code in files, as it was in memory otherwise.
    pub address: u64,
    /// Where in the source code of its own function it is, where that was asked for: the call, where a function is inlined
    /// at the address.
    pub place: Option<SourceLine>,
    /// What is inlined at the address, where that was asked for: innermost first.
    pub inlined: Box<[InlinedFunction]>,
}

impl Frame {
    /// A frame of which no more is known.
    pub fn new(frame_type: FrameType, name: FrameName, executable: Option<Arc<Executable>>, address: u64) -> Self {
        Self { frame_type, name, executable, address, place: None, inlined: Box::default() }
    }

    /// Names of what is inlined, for people: innermost first. Never contain `;` or control characters.
    pub fn inlined_names(&self) -> impl DoubleEndedIterator<Item = String> {
        self.inlined.iter().map(|function| printable(&function.name.readable))
    }

    /// Name for people. Never contains `;` or control characters.
    pub fn display_name(&self) -> String {
        let name = match (&self.name, &self.executable) {
            (FrameName::Function(name), _) => printable(&name.readable),
            (FrameName::Unnamed(_), Some(executable)) => {
                format!("{}+{:#x}", printable(executable.name()), self.address)
            }
            (FrameName::Unnamed(_), None) if self.frame_type == FrameType::Runtime => "[anonymous code]".to_owned(),
            (FrameName::Unnamed(_), None) => "[unnamed]".to_owned(),
            (FrameName::Unmapped, _) => "[unmapped]".to_owned(),
        };
        match self.frame_type {
            FrameType::Native | FrameType::Runtime => name,
            FrameType::Kernel => name + "_[k]",
        }
    }
}

/// Replaces what would end a frame, a line or an XML document: names come from files that anybody may have made.
pub fn printable(name: &str) -> String {
    name.chars()
        .map(|c| if c == ';' || c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') { ':' } else { c })
        .collect()
}

/// Frames are the same when they run the same place of the same code. Where code is made at run time, there may be other
/// code at the same place later: what it is called tells it apart.
impl PartialEq for Frame {
    fn eq(&self, other: &Self) -> bool {
        let id = |frame: &Self| frame.executable.as_ref().map(|executable| executable.id);
        self.address == other.address
            && self.frame_type == other.frame_type
            && id(self) == id(other)
            && (self.frame_type != FrameType::Runtime || self.name == other.name)
    }
}

impl Eq for Frame {}

impl Hash for Frame {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address.hash(state);
        self.frame_type.hash(state);
        self.executable.as_ref().map(|executable| executable.id).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Code that is made at run time may have been something else at the same address before.
    #[test]
    fn code_made_at_run_time_is_told_apart_by_name() {
        let frame = |kind, name: &str| Frame::new(kind, FrameName::Function(name.into()), None, 0x1000);
        let nameless = |reason| Frame { name: FrameName::Unnamed(reason), ..frame(FrameType::Runtime, "") };
        assert_ne!(frame(FrameType::Runtime, "before"), frame(FrameType::Runtime, "after"));
        assert_eq!(frame(FrameType::Runtime, "same"), frame(FrameType::Runtime, "same"));
        assert_eq!(frame(FrameType::Kernel, "alias"), frame(FrameType::Kernel, "other alias"));
        assert_ne!(nameless(Nameless::NoCodeMap), nameless(Nameless::NotInCodeMap));
        assert_eq!(nameless(Nameless::NoCodeMap).display_name(), "[anonymous code]");
    }
}

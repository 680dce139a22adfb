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
    /// Kernel code.
    Kernel,
}

impl FrameType {
    /// The attribute's value.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Native => "native",
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

/// Why the file has no name for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nameless {
    /// The file could not be read, or is none that is understood.
    Unreadable,
    /// It says nothing about its functions, nor does anything that belongs to it.
    NoSymbols,
    /// None of the functions it tells about holds the place.
    NotCovered,
}

impl Nameless {
    /// Every reason.
    pub const ALL: [Self; 3] = [Self::Unreadable, Self::NoSymbols, Self::NotCovered];

    /// Its name for people, metrics and attributes.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unreadable => "file unreadable",
            Self::NoSymbols => "no symbols",
            Self::NotCovered => "not covered by symbols",
        }
    }
}

/// A frame's function, or what is known instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameName {
    /// The function's name.
    Function(FunctionName),
    /// The file has no symbol for the place: its own name and the address stand in.
    Unnamed(Nameless),
    /// Code made at run time, with nothing to name it by.
    Anonymous,
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
            (FrameName::Unnamed(_), None) => "[unnamed]".to_owned(),
            (FrameName::Anonymous, _) => "[anonymous code]".to_owned(),
            (FrameName::Unmapped, _) => "[unmapped]".to_owned(),
        };
        match self.frame_type {
            FrameType::Native => name,
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

/// Frames are the same when they run the same place of the same code.
impl PartialEq for Frame {
    fn eq(&self, other: &Self) -> bool {
        let id = |frame: &Self| frame.executable.as_ref().map(|executable| executable.id);
        self.address == other.address && self.frame_type == other.frame_type && id(self) == id(other)
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

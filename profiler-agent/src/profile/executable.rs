//! A file (or the vDSO) that processes run code from.

use std::{
    fs::File,
    sync::{Arc, Mutex, PoisonError},
};

use super::{FileOffset, VirtualAddress};

/// Handle of an [`Executable`], unique while the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExecutableId(pub u32);

/// One executable part of a file, from its `PT_LOAD` program headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts in the file.
    pub offset: FileOffset,
    /// Bytes in the file.
    pub size: u64,
    /// Where the file states it is loaded.
    pub address: VirtualAddress,
}

/// What is known about an executable file.
#[derive(Debug)]
pub struct Executable {
    /// Its handle.
    pub id: ExecutableId,
    /// Its number in the kernel's map of unwind tables; never zero.
    pub table: u32,
    /// Its path as the process that mapped it sees it.
    pub path: String,
    /// GNU build ID, where the file has one.
    pub build_id: Option<Box<[u8]>>,
    /// What else tells it apart.
    pub identity: FileIdentity,
    /// Executable segments, by offset.
    pub segments: Box<[Segment]>,
    /// The file itself; see [`Self::file`].
    pub(crate) file: Mutex<Option<Arc<File>>>,
    /// See [`Self::debug_file`].
    pub(crate) debug: Mutex<Option<Arc<SplitDebug>>>,
}

/// What tells a file apart, for backends that look for its symbols. The file says what it likes, so nothing of ours
/// depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileIdentity {
    /// Go's build ID.
    pub go_build_id: Option<Box<str>>,
    /// A hash of its beginning, its end and its length, where it could be read.
    pub hash: Option<[u8; 16]>,
}

/// A file that may have been split off an executable, with its symbols and debug information: nobody has looked yet
/// whether it belongs to it.
#[derive(Debug)]
pub struct SplitDebug {
    /// The file.
    pub file: Arc<File>,
    /// The CRC-32 of the file's contents that the executable states, where that is how it was found.
    pub checksum: Option<u32>,
}

impl Executable {
    /// The last component of its path.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// The file itself, open so that it can be read after the process, the path or the mount is gone; an
    /// open file also keeps its inode number from being reused. `None` where it could not be opened, or
    /// when nothing has mapped it for a while.
    pub fn file(&self) -> Option<Arc<File>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The file that may have been split off it, where the process that mapped it could see one.
    pub fn debug_file(&self) -> Option<Arc<SplitDebug>> {
        self.debug.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets go of the files, so that deleted ones can be freed.
    pub fn close(&self) {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.debug.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The executable segment that holds `offset`.
    pub fn segment(&self, offset: FileOffset) -> Option<&Segment> {
        self.segments
            .iter()
            .find(|segment| offset.0.checked_sub(segment.offset.0).is_some_and(|inside| inside < segment.size))
    }

    /// The executable segment that holds the stated address.
    pub fn segment_at(&self, address: u64) -> Option<&Segment> {
        self.segments
            .iter()
            .find(|segment| address.checked_sub(segment.address.0).is_some_and(|inside| inside < segment.size))
    }

    /// Stated address minus place in the file, modulo 2^64, of the code in a mapping that begins at `offset` and has
    /// `size` bytes. Mappings are made of whole pages, so one may begin before its segment does.
    pub fn stated_minus_offset(&self, offset: FileOffset, size: u64) -> Option<u64> {
        let end = offset.0.saturating_add(size);
        let segment = self
            .segments
            .iter()
            .find(|segment| segment.offset.0 < end && offset.0 < segment.offset.0.saturating_add(segment.size))?;
        Some(segment.address.0.wrapping_sub(segment.offset.0))
    }

    /// Where in the file the code with this stated address is.
    pub fn file_offset(&self, address: u64) -> Option<FileOffset> {
        let segment = self.segment_at(address)?;
        segment.offset.0.checked_add(address - segment.address.0).map(FileOffset)
    }

    /// The address that the file states for `offset`.
    pub fn virtual_address(&self, offset: FileOffset) -> Option<VirtualAddress> {
        let segment = self.segment(offset)?;
        segment.address.0.checked_add(offset.0 - segment.offset.0).map(VirtualAddress)
    }
}

/// How a build ID is written: lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // SANITY: writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

//! Opens regular files and nothing else: opening a pipe may block, and opening a device may do anything. Tells whether one
//! was written to since.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

/// Opens a regular file to read it. The path is looked up once, without opening what it names, so that it cannot become
/// something else in between.
pub(crate) fn open(path: impl AsRef<Path>) -> io::Result<File> {
    reopen(&OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH).open(path)?)
}

/// Opens a place that was looked up without opening what is there.
pub(crate) fn reopen(place: &File) -> io::Result<File> {
    if !place.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

/// Opens a regular file whose path ends in no link: what somebody put into a file's place leads nowhere else.
pub(crate) fn open_unlinked(path: &Path) -> io::Result<File> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no regular file"));
    }
    Ok(file)
}

/// Tells contents of one inode apart. (The change time also changes with the last link: a deleted file is still the same.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) size: u64,
    modified: (i64, i64),
}

impl Stamp {
    pub(crate) fn of(file: &File) -> Option<Self> {
        let metadata = file.metadata().ok()?;
        Some(Self { size: metadata.size(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

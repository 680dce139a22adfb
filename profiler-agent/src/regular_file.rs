//! Opens regular files and nothing else: opening a pipe may block, and opening a device may do anything.

use std::{
    fs::{File, OpenOptions},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
};

/// Opens a regular file to read it. The path is looked up once, without opening what it names, so that it cannot become
/// something else in between.
pub(crate) fn open(path: impl AsRef<Path>) -> Option<File> {
    reopen(&OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH).open(path).ok()?)
}

/// Opens a place, itself opened without opening what is there, to read it.
pub(crate) fn reopen(place: &File) -> Option<File> {
    if !place.metadata().ok()?.is_file() {
        return None;
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
        .ok()
}

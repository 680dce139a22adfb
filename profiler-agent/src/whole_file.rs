//! Files that appear whole or not at all: each is written under another name, and renamed when it is whole.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// A file that is being written; removed where it is not kept.
#[derive(Debug)]
pub(crate) struct WholeFile {
    temporary: PathBuf,
    pub(crate) file: File,
}

impl WholeFile {
    /// Begins a file under a temporary name, in the folder where it will be kept. What has that name already is an error.
    pub(crate) fn create(temporary: PathBuf, mode: u32) -> io::Result<Self> {
        let flags = nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags(flags)
            .open(&temporary)?;
        Ok(Self { temporary, file })
    }

    /// Gives the file its name, in the place of another that had it.
    pub(crate) fn keep(self, path: &Path) -> io::Result<()> {
        // A machine that loses power must not leave a file whose head is right and whose rest is not.
        self.file.sync_data()?;
        fs::rename(&self.temporary, path)
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        // It was renamed where it was kept.
        let _ = fs::remove_file(&self.temporary);
    }
}

//! The root folder of a process, which a container has its own of.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    libc,
};

/// The root folder of a process.
pub(crate) struct Root(File);

impl Root {
    /// `None`: the process is gone, or we may not look.
    pub(crate) fn of(tgid: u32) -> Option<Self> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
        options.open(format!("/proc/{tgid}/root")).ok().map(Self)
    }

    /// A folder as if it were the root of a process.
    #[cfg(test)]
    pub(crate) fn at(folder: &std::path::Path) -> Self {
        Self(File::open(folder).expect("a folder"))
    }

    /// Looks up a path inside of it, without opening what is there. No link leads out of it; `flags` may say more about
    /// links.
    pub(crate) fn look_up(&self, path: &str, flags: OFlag) -> Option<File> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.0, path, how).ok().map(File::from)
    }
}

//! Files with symbols that were split off executables, where the processes that run them would find them.
//!
//! They are looked for inside the process's root, which a container has its own of: its links cannot lead out of it. That
//! they belong to the executable is checked when they are read.

use std::{fs::File, os::fd::OwnedFd, path::Path, sync::Arc};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};

use super::proc_fs::MapsLine;
use crate::{elf, profile::SplitDebug, regular_file};

/// Where distributions put debug files.
const DEBUG_FOLDER: &str = "/usr/lib/debug";

/// The first file that may have been split off the one behind a mapping; `None` where that has its symbols itself, or
/// nothing was split off.
pub(super) fn find(tgid: u32, line: &MapsLine, file: &File, build_id: Option<&[u8]>) -> Option<SplitDebug> {
    let sections = elf::sections(file);
    if !line.path.starts_with('/') || sections.iter().any(|section| section.name == ".symtab") {
        return None;
    }
    let link = elf::debug_link(file, &sections);
    if build_id.is_none() && link.is_none() {
        return None;
    }
    let root = Root::of(tgid)?;
    if let Some(file) =
        build_id.and_then(elf::debug_file_name).and_then(|name| root.open(&format!("{DEBUG_FOLDER}/{name}")))
    {
        return Some(SplitDebug { file: Arc::new(file), checksum: None });
    }
    // The places, and their order, are GDB's (its manual, “Debugging Information in Separate Files”).
    let link = link?;
    let folder = Path::new(&line.path).parent()?.to_str()?.trim_end_matches('/');
    let places = [
        format!("{folder}/{}", link.name),
        format!("{folder}/.debug/{}", link.name),
        format!("{DEBUG_FOLDER}{folder}/{}", link.name),
    ];
    // A stripped file may be called as its debug file is.
    let mut others = places.into_iter().filter(|place| *place != line.path);
    let file = others.find_map(|place| root.open(&place))?;
    Some(SplitDebug { file: Arc::new(file), checksum: Some(link.checksum) })
}

/// The root folder of a process.
struct Root(OwnedFd);

impl Root {
    fn of(tgid: u32) -> Option<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        nix::fcntl::open(format!("/proc/{tgid}/root").as_str(), flags, Mode::empty()).ok().map(Self)
    }

    /// Opens a regular file inside of it.
    fn open(&self, path: &str) -> Option<File> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        regular_file::reopen(&File::from(openat2(&self.0, path, how).ok()?))
    }
}

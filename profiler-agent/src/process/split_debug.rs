//! Files with symbols that were split off executables, where the processes that run them would find them.
//!
//! They are looked for inside the process's root, which a container has its own of: its links cannot lead out of it. That
//! they belong to the executable is checked when they are read.

use std::{fs::File, path::Path, sync::Arc};

use nix::fcntl::OFlag;

use crate::{elf, process_root::Root, profile::SplitDebug, regular_file};

/// Where distributions put debug files.
const DEBUG_FOLDER: &str = "/usr/lib/debug";

/// The first file that may have been split off the one that a process knows by this path; `None` where that has its
/// symbols itself, or nothing was split off.
pub(super) fn find(tgid: u32, path: &str, file: &File, build_id: Option<&[u8]>) -> Option<SplitDebug> {
    let sections = elf::sections(file);
    if !path.starts_with('/') || sections.iter().any(|section| section.name == ".symtab") {
        return None;
    }
    let link = elf::debug_link(file, &sections);
    if build_id.is_none() && link.is_none() {
        return None;
    }
    let root = Root::of(tgid)?;
    let open = |path: &str| regular_file::reopen(&root.look_up(path, OFlag::empty())?).ok();
    if let Some(file) = build_id.and_then(elf::debug_file_name).and_then(|name| open(&format!("{DEBUG_FOLDER}/{name}")))
    {
        return Some(SplitDebug { file: Arc::new(file), checksum: None });
    }
    // The places, and their order, are GDB's (its manual, “Debugging Information in Separate Files”).
    let link = link?;
    let folder = Path::new(path).parent()?.to_str()?.trim_end_matches('/');
    let places = [
        format!("{folder}/{}", link.name),
        format!("{folder}/.debug/{}", link.name),
        format!("{DEBUG_FOLDER}{folder}/{}", link.name),
    ];
    // A stripped file may be called as its debug file is.
    let mut others = places.into_iter().filter(|place| place != path);
    let file = others.find_map(|place| open(&place))?;
    Some(SplitDebug { file: Arc::new(file), checksum: Some(link.checksum) })
}

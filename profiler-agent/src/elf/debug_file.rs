//! What was split off executables: debug files by build ID, and MiniDebugInfo.

use std::{
    fs::File,
    io::{self, Read as _},
};

use lzma_rust2::XzReader;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::debug;

use super::{Section, read, summarize};
use crate::regular_file;

/// Where debug files are kept by build ID.
const DEBUG_FILES: &str = "/usr/lib/debug/.build-id";
/// Most bytes of MiniDebugInfo, compressed. Fedora's largest, of web browsers, has five million.
const MAX_COMPRESSED: u64 = 16 << 20;
/// Most bytes of it, decompressed.
const MAX_DECOMPRESSED: u64 = 16 << 20;
/// Most memory that decompression takes, KiB.
const MAX_MEMORY_KIB: u32 = 20 << 10;

/// The debug file that was split off the executable with this build ID, as it says itself.
pub(crate) fn debug_file(build_id: &[u8]) -> Option<File> {
    let (first, rest) = build_id.split_first()?;
    let rest: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = regular_file::open(format!("{DEBUG_FILES}/{first:02x}/{rest}.debug"))?;
    (summarize(&file)?.build_id.as_deref() == Some(build_id)).then_some(file)
}

/// The small ELF file with symbols that some distributions keep inside executables, in memory: `.gnu_debugdata`, of which
/// `sections` are the executable's.
pub(crate) fn mini_debug_info(file: &File, sections: &[Section]) -> Option<File> {
    let section = sections.iter().find(|section| section.name == ".gnu_debugdata")?;
    if section.size > MAX_COMPRESSED {
        return None;
    }
    let compressed = read(file, section.offset, usize::try_from(section.size).ok()?)?;
    let mut reader = XzReader::new_mem_limit(&*compressed, false, MAX_MEMORY_KIB).take(MAX_DECOMPRESSED);
    let mut contents = File::from(memfd_create(c"symbols", MFdFlags::MFD_CLOEXEC).ok()?);
    match io::copy(&mut reader, &mut contents) {
        Ok(_) => Some(contents),
        Err(error) => {
            debug!("MiniDebugInfo cannot be decompressed: {error}");
            None
        }
    }
}

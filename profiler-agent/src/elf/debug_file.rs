//! What was split off executables: debug files by build ID, and MiniDebugInfo.

use std::{
    fs::File,
    io::{self, Read as _},
};

use lzma_rust2::XzReader;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::debug;

use super::{Section, read, summarize};

/// Where debug files are kept by build ID.
const DEBUG_FILES: &str = "/usr/lib/debug/.build-id";
/// Where what several debug files share is kept (`dwz` made it).
const SHARED_DEBUG_FILES: &str = "/usr/lib/debug/.dwz";
/// Most bytes of a path of such a file and its build ID.
const MAX_LINK: u64 = 4096;
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
    let file = File::open(format!("{DEBUG_FILES}/{first:02x}/{rest}.debug")).ok()?;
    (summarize(&file)?.build_id.as_deref() == Some(build_id)).then_some(file)
}

/// What a debug file, of which `sections` are, shares with others. It names the file and its build ID; only what is under
/// the folder of such files is opened.
pub(crate) fn shared_debug_file(file: &File, sections: &[Section]) -> Option<File> {
    let section = sections.iter().find(|section| section.name == ".gnu_debugaltlink" && section.size <= MAX_LINK)?;
    let link = read(file, section.offset, usize::try_from(section.size).ok()?)?;
    let end = link.iter().position(|&byte| byte == 0)?;
    let (path, build_id) = (str::from_utf8(&link[..end]).ok()?, &link[end + 1..]);
    let shared = shared_path(path).and_then(|path| File::open(format!("{SHARED_DEBUG_FILES}/{path}")).ok());
    let shared = shared.filter(|file| file.metadata().is_ok_and(|metadata| metadata.is_file()));
    let shared =
        shared.filter(|file| summarize(file).is_some_and(|summary| summary.build_id.as_deref() == Some(build_id)));
    // (Some distributions link it by its build ID too.)
    shared.or_else(|| debug_file(build_id))
}

/// The part of a path that follows the folder of shared debug files; `None` where it leads out of it again.
fn shared_path(path: &str) -> Option<&str> {
    let (_, path) = path.rsplit_once("/.dwz/")?;
    path.split('/').all(|part| !matches!(part, "" | "." | "..")).then_some(path)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever a file states, nothing outside of the folder is opened.
    #[test]
    fn shared_files_stay_in_their_folder() {
        assert_eq!(shared_path("../../../.dwz/x86_64-linux-gnu/bash.debug"), Some("x86_64-linux-gnu/bash.debug"));
        assert_eq!(shared_path("/usr/lib/debug/.dwz/bash.debug"), Some("bash.debug"));
        for outside in ["/etc/shadow", "/.dwz/../../../../etc/shadow", "/.dwz//etc/shadow", "/.dwz/", ""] {
            assert_eq!(shared_path(outside), None, "{outside}");
        }
    }
}

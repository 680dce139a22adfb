//! What was split off executables: debug files, by build ID or link, and MiniDebugInfo.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
};

use flate2::Crc;
use lzma_rust2::XzReader;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::debug;

use super::{Section, read, summarize};
use crate::{
    profile::{SplitDebug, hex},
    regular_file,
};

/// Where this machine keeps debug files.
const DEBUG_FILES: &str = "/usr/lib/debug";
/// Where what several debug files share is kept (`dwz` made it).
const SHARED_DEBUG_FILES: &str = "/usr/lib/debug/.dwz";
/// Most bytes of a link to another file: a path, and a checksum or a build ID.
const MAX_LINK: u64 = 4096;
/// Most bytes of a file whose checksum is computed.
const MAX_CHECKED: u64 = 1 << 30;
/// Most bytes of MiniDebugInfo, compressed. Fedora's largest, of web browsers, has five million.
const MAX_COMPRESSED: u64 = 16 << 20;
/// Most bytes of it, decompressed.
const MAX_DECOMPRESSED: u64 = 16 << 20;
/// Most memory that decompression takes, KiB.
const MAX_MEMORY_KIB: u32 = 20 << 10;

/// What an executable says of the file with its symbols: `.gnu_debuglink`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DebugLink {
    /// A file name, without a folder.
    pub(crate) name: String,
    /// CRC-32 of the file's contents.
    pub(crate) checksum: u32,
}

/// The link of an executable, of which `sections` are the sections.
pub(crate) fn debug_link(file: &File, sections: &[Section]) -> Option<DebugLink> {
    let section = sections.iter().find(|section| section.name == ".gnu_debuglink")?;
    if section.size > MAX_LINK {
        return None;
    }
    parse_link(&read(file, section.offset, usize::try_from(section.size).ok()?)?)
}

/// A name that ends with a zero, padding to a multiple of four, and the checksum (GDB's manual, "Debugging Information
/// in Separate Files").
fn parse_link(bytes: &[u8]) -> Option<DebugLink> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    let name = str::from_utf8(&bytes[..end]).ok().filter(|name| !name.is_empty() && !name.contains('/'))?;
    let place = (end + 1).next_multiple_of(4);
    let checksum = bytes.get(place..place + 4)?.try_into().ok()?;
    Some(DebugLink { name: name.to_owned(), checksum: u32::from_le_bytes(checksum) })
}

/// Whether a file was split off the executable with this build ID. What states no build ID has to have the right checksum.
pub(crate) fn is_split_off(debug: &SplitDebug, build_id: Option<&[u8]>) -> bool {
    let Some(summary) = summarize(&debug.file) else { return false };
    match (summary.build_id.as_deref(), build_id) {
        (Some(stated), Some(wanted)) => stated == wanted,
        _ => debug.checksum.is_some() && checksum(&debug.file) == debug.checksum,
    }
}

/// CRC-32 of a file's contents.
fn checksum(file: &File) -> Option<u32> {
    let len = file.metadata().ok()?.len();
    if len > MAX_CHECKED {
        return None;
    }
    let mut crc = Crc::new();
    let mut piece = vec![0; 256 << 10];
    let mut done = 0;
    while done < len {
        let read = file.read_at(&mut piece, done).ok().filter(|&read| read > 0)?;
        crc.update(&piece[..read]);
        done += read as u64;
    }
    Some(crc.sum())
}

/// Where the debug file of the executable with this build ID is in a folder of debug files.
pub(crate) fn debug_file_name(build_id: &[u8]) -> Option<String> {
    let (first, rest) = build_id.split_first()?;
    Some(format!(".build-id/{}/{}.debug", hex(&[*first]), hex(rest)))
}

/// The debug file that was split off the executable with this build ID, as it says itself.
pub(crate) fn debug_file(build_id: &[u8]) -> Option<File> {
    let file = regular_file::open(format!("{DEBUG_FILES}/{}", debug_file_name(build_id)?)).ok()?;
    (summarize(&file)?.build_id.as_deref() == Some(build_id)).then_some(file)
}

/// What a debug file, of which `sections` are, shares with others. It names the file and its build ID; only what is under
/// the folder of such files is opened.
pub(crate) fn shared_debug_file(file: &File, sections: &[Section]) -> Option<File> {
    let section = sections.iter().find(|section| section.name == ".gnu_debugaltlink" && section.size <= MAX_LINK)?;
    let link = read(file, section.offset, usize::try_from(section.size).ok()?)?;
    let end = link.iter().position(|&byte| byte == 0)?;
    let (path, build_id) = (str::from_utf8(&link[..end]).ok()?, &link[end + 1..]);
    let shared = shared_path(path).and_then(|path| regular_file::open(format!("{SHARED_DEBUG_FILES}/{path}")).ok());
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

    /// What objcopy writes.
    #[test]
    fn reads_links() {
        let link = |name: &str| Some(DebugLink { name: name.to_owned(), checksum: 0x0403_0201 });
        assert_eq!(parse_link(b"abc\0\x01\x02\x03\x04"), link("abc"));
        assert_eq!(parse_link(b"abcd.debug\0\0\x01\x02\x03\x04"), link("abcd.debug"));
    }

    /// Names that lead elsewhere, and links that are cut off.
    #[test]
    fn refuses_lying_links() {
        for lie in
            [&b""[..], b"abc", b"abc\0\x01\x02\x03", b"\0\0\0\0\x01\x02\x03\x04", b"../x\0\0\0\0\x01\x02\x03\x04"]
        {
            assert_eq!(parse_link(lie), None, "{lie:?}");
        }
    }

    /// The well-known checksum of these digits.
    #[test]
    fn computes_the_checksum_of_a_file() {
        let mut file = File::from(memfd_create(c"digits", MFdFlags::MFD_CLOEXEC).expect("a file"));
        io::Write::write_all(&mut file, b"123456789").expect("room");
        assert_eq!(checksum(&file), Some(0xcbf4_3926));
    }

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

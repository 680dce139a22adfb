//! What `/proc` tells about one process.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _},
    sync::OnceLock,
};

use profiler_common::abi::process::ProcessKey;

/// Most bytes of `/proc/PID/maps` read: a process with half a million mappings is not worth more.
const MAX_MAPS_BYTES: u64 = 16 << 20;

/// One executable line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MapsLine {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) file_offset: u64,
    /// The kernel's device number: major << 20 | minor.
    pub(super) device: u32,
    pub(super) inode: u64,
    /// Path, pseudo-path in brackets, or empty; without the kernel's ` (deleted)`.
    pub(super) path: String,
}

/// The executable mappings of a process.
pub(super) fn executable_maps(tgid: u32) -> io::Result<Vec<MapsLine>> {
    let file = File::open(format!("/proc/{tgid}/maps"))?;
    let mut lines = Vec::new();
    for line in BufReader::new(file.take(MAX_MAPS_BYTES)).split(b'\n') {
        // Paths are bytes of any encoding.
        if let Some(parsed) = parse_maps_line(&String::from_utf8_lossy(&line?)) {
            lines.push(parsed);
        }
    }
    Ok(lines)
}

/// Parses one line; `None` where it is not executable or not understood (format: `man 5 proc`).
pub(super) fn parse_maps_line(line: &str) -> Option<MapsLine> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    if permissions.as_bytes().get(2) != Some(&b'x') {
        return None;
    }
    let file_offset = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?;
    let path = fields.next().unwrap_or_default().trim_start();
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some(MapsLine {
        start: hex(start)?,
        end: hex(end)?,
        file_offset: hex(file_offset)?,
        device: u32::try_from(hex(major)?.checked_mul(1 << 20)?.checked_add(hex(minor)?)?).ok()?,
        inode: inode.parse().ok()?,
        path: path.strip_suffix(" (deleted)").unwrap_or(path).to_owned(),
    })
}

/// What `/proc/PID/status` says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// Its PID as it knows it itself: that in the innermost PID namespace.
    pub(super) pid: u32,
    /// Real, effective, saved and file system user.
    pub(super) uids: [u32; 4],
}

/// Parses the status of a process; `None` where something is missing.
pub(super) fn parse_status(status: &str) -> Option<Status> {
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
    let mut uids = field("Uid:")?.split_ascii_whitespace().map(|uid| uid.parse().ok());
    let mut next_uid = || uids.next().flatten();
    Some(Status {
        pid: field("NSpid:")?.split_ascii_whitespace().last()?.parse().ok()?,
        uids: [next_uid()?, next_uid()?, next_uid()?, next_uid()?],
    })
}

/// Whether the process with this PID is still this one (and whatever program it runs).
pub(super) fn is_running(key: ProcessKey) -> bool {
    start_ticks(key.tgid) == Some(ticks_of(key.start_time_ns))
}

/// When a process started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
pub(super) fn start_ticks(tgid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{tgid}/stat")).ok()?;
    parse_start_ticks(&String::from_utf8_lossy(&stat))
}

pub(super) fn parse_start_ticks(stat: &str) -> Option<u64> {
    // The command name, field 2, may hold spaces and parentheses; what follows its last `)` may not.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Converts the kernel's start time to the ticks that [`start_ticks`] reports.
pub(super) fn ticks_of(start_time_ns: u64) -> u64 {
    start_time_ns / tick_ns()
}

/// The earliest start time that is so many ticks.
pub(super) fn start_of(ticks: u64) -> u64 {
    ticks.saturating_mul(tick_ns())
}

/// Nanoseconds that a clock tick takes.
fn tick_ns() -> u64 {
    static TICKS_PER_SECOND: OnceLock<u64> = OnceLock::new();
    let per_second = *TICKS_PER_SECOND.get_or_init(|| {
        nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
            .ok()
            .flatten()
            .and_then(|ticks| u64::try_from(ticks).ok())
            .filter(|ticks| (1..=1_000_000).contains(ticks))
            .unwrap_or(100)
    });
    1_000_000_000 / per_second
}

/// Every process descended from one of `roots` now, without the roots themselves.
pub fn children_of(roots: &[u32]) -> Vec<u32> {
    if roots.is_empty() {
        return Vec::new();
    }
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|tgid: u32| {
            let stat = fs::read(format!("/proc/{tgid}/stat")).ok()?;
            let stat = String::from_utf8_lossy(&stat);
            let (_, fields) = stat.rsplit_once(')')?;
            Some((tgid, fields.split_ascii_whitespace().nth(1)?.parse().ok()?))
        })
        .collect();
    let mut found: HashSet<u32> = roots.iter().copied().collect();
    let mut grew = true;
    while grew {
        grew = false;
        for (tgid, parent) in &parents {
            grew |= found.contains(parent) && found.insert(*tgid);
        }
    }
    found.into_iter().filter(|tgid| !roots.contains(tgid)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expect: Option<(u64, u64, u64, u32, u64, &str)>) {
        let parsed = parse_maps_line(line);
        let parsed = parsed.as_ref().map(|l| (l.start, l.end, l.file_offset, l.device, l.inode, l.path.as_str()));
        assert_eq!(parsed, expect, "{line:?}");
    }

    /// Paths with spaces, deleted files, pseudo-files and anonymous memory; data is left out.
    #[test]
    fn reads_maps_lines() {
        check(
            "7f10-7f20 r-xp 00001000 fe:01 1234                       /opt/my app/x",
            Some((0x7f10, 0x7f20, 0x1000, 0xfe << 20 | 1, 1234, "/opt/my app/x")),
        );
        check("7f10-7f20 r-xp 0 00:1f 9 /tmp/x (deleted)", Some((0x7f10, 0x7f20, 0, 0x1f, 9, "/tmp/x")));
        check("7f10-7f20 r-xp 00000000 00:00 0   [vdso]", Some((0x7f10, 0x7f20, 0, 0, 0, "[vdso]")));
        check("7f10-7f20 rwxp 00000000 00:00 0 ", Some((0x7f10, 0x7f20, 0, 0, 0, "")));
        check("7f10-7f20 rw-p 00000000 00:00 0 ", None);
        check("nonsense", None);
        check("7f10-7f20 r-xp 0 ffffffffffffffff:00 0 x", None);
    }

    /// The last of the PIDs is the innermost one.
    #[test]
    fn reads_the_status() {
        let status = "Name:\tx\nPid:\t700\nUid:\t1\t2\t3\t4\nNSpid:\t700\t52\t7\n";
        assert_eq!(parse_status(status), Some(Status { pid: 7, uids: [1, 2, 3, 4] }));
        assert_eq!(parse_status("NSpid:\t7\nUid:\t1\t2\n"), None);
        assert_eq!(parse_status("Uid:\t1\t2\t3\t4\n"), None);
    }

    /// A command name with parentheses and spaces does not shift the fields.
    #[test]
    fn reads_the_start_time_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(parse_start_ticks(stat), Some(4242));
        assert_eq!(parse_start_ticks("7 (a"), None);
    }
}

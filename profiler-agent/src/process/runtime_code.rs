//! Finds the files in which processes name the code that they make at run time.
//!
//! Two forms are in use: `/tmp/perf-PID.map`, which a runtime writes for whoever looks, and jitdumps, which it maps
//! executable so that profilers learn of them. The first is a path in the process's own file system, where it may have
//! put anything: it is looked up inside the process's root, and nothing but a regular file is opened.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    time::{ClockId, clock_gettime},
};
use profiler_common::abi::process::ProcessKey;
use tracing::debug;

use super::{
    executables,
    proc_fs::{MapsLine, Status, is_running, parse_status},
};
use crate::{
    process_root::Root,
    profile::{RuntimeCode, RuntimeFile, RuntimeFileKind},
    regular_file,
};

/// Most files of this kind that are open at once.
const MAX_OPEN: usize = 512;
/// Time between two looks for the perf map of one process that has none: some map new code all the time.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// How long a process is looked at again and again that has not begun its perf map: it may end before its samples are read.
const EXPECT_FOR: Duration = Duration::from_secs(5);
/// A file that was written so much earlier than its process began is one of an earlier process of the same PID, which
/// containers use again at every start.
const OLDER: Duration = Duration::from_secs(1);

/// Opens files, and counts what is open.
#[derive(Default)]
pub(super) struct RuntimeFiles {
    /// Every open file holds it.
    permit: Arc<()>,
    /// Times that there were too many open to look for another.
    refused: u64,
}

/// One process's code, and when its perf map was looked for.
pub(super) struct FollowedCode {
    pub(super) code: Arc<RuntimeCode>,
    /// When it was looked for first, and last.
    first_looked: Option<Instant>,
    looked: Option<Instant>,
    /// The drain in which that was.
    looked_in: u64,
}

impl FollowedCode {
    pub(super) fn new(code: RuntimeCode) -> Self {
        Self { code: Arc::new(code), first_looked: None, looked: None, looked_in: 0 }
    }
}

impl RuntimeFiles {
    /// Files that are open.
    pub(super) fn len(&self) -> usize {
        Arc::strong_count(&self.permit) - 1
    }

    /// Times that there were too many open to look for another.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Whether one more may be open.
    fn has_room(&mut self) -> bool {
        let has_room = self.len() < MAX_OPEN;
        self.refused += u64::from(!has_room);
        has_room
    }

    /// Looks for the perf map of a living process that runs code of its own making, unless that was done lately. One
    /// that was found is compared, once a drain, with what is at its path now. Returns whether to look again soon.
    pub(super) fn follow(&mut self, followed: &mut FollowedCode, generation: u64) -> bool {
        let first = *followed.first_looked.get_or_insert_with(Instant::now);
        let held = followed.code.files().into_iter().find(|file| file.kind == RuntimeFileKind::PerfMap);
        let is_early = match (&held, followed.looked) {
            (_, None) => false,
            (Some(_), Some(_)) => followed.looked_in == generation,
            (None, Some(looked)) => looked.elapsed() < LOOK_AGAIN,
        };
        let is_expected = held.is_none() && first.elapsed() < EXPECT_FOR;
        if is_early {
            return is_expected;
        }
        (followed.looked, followed.looked_in) = (Some(Instant::now()), generation);
        if !self.has_room() {
            return false;
        }
        let key = followed.code.process;
        let Some((file, identity)) = open_perf_map(key, held.map(|held| held.identity)) else { return is_expected };
        debug!("process {}: perf map found", key.tgid);
        followed.code.add(RuntimeFile::new(RuntimeFileKind::PerfMap, file, identity, Arc::clone(&self.permit)));
        false
    }

    /// Opens a jitdump that a process has mapped.
    pub(super) fn open_jitdump(&mut self, code: &RuntimeCode, line: &MapsLine) {
        let held = code.files();
        let is_held = |identity| held.iter().any(|file| file.identity == identity);
        // (The device of a mapping and that of an open file differ on some file systems; inode numbers do not.)
        if held.iter().any(|file| file.kind == RuntimeFileKind::Jitdump && file.identity.1 == line.inode) {
            return;
        }
        if !self.has_room() {
            return;
        }
        let Some(file) = executables::open(code.process.tgid, line) else { return };
        if let Some(identity) = identity(&file).filter(|&identity| !is_held(identity))
            // The PID may have been given to another process before the file was opened.
            && is_running(code.process)
        {
            debug!("process {}: jitdump {}", code.process.tgid, line.path);
            code.add(RuntimeFile::new(RuntimeFileKind::Jitdump, file, identity, Arc::clone(&self.permit)));
        }
    }
}

/// Whether a mapping is only there to tell profilers of a jitdump.
pub(super) fn is_jitdump(line: &MapsLine) -> bool {
    let name = line.path.rsplit('/').next().unwrap_or(&line.path);
    let number = name.strip_prefix("jit-").and_then(|name| name.strip_suffix(".dump"));
    line.inode != 0 && number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a mapping is memory in spite of its inode: what is shared between two mappings of it (.NET writes code in one
/// and runs it in the other) or with children (PHP's compiler).
pub(super) fn is_memory(line: &MapsLine) -> bool {
    line.path.starts_with("/memfd:doublemapper") || line.path == "/dev/zero"
}

/// Opens `/tmp/perf-PID.map` of a process, where it is another file than `known`.
fn open_perf_map(key: ProcessKey, known: Option<(u64, u64)>) -> Option<(File, (u64, u64))> {
    let status = fs::read(format!("/proc/{}/status", key.tgid)).ok()?;
    let status = parse_status(&String::from_utf8_lossy(&status))?;
    let found = open_inside(&Root::of(key.tgid)?, &format!("tmp/perf-{}.map", status.pid), known, |owner, written| {
        may_name(&status, owner) && !is_older(written, key.start_time_ns)
    })?;
    // The PID may have been given to another process while we looked.
    is_running(key).then_some(found)
}

/// Opens a file in a process's root. No link leads out of the root, and the last part of the path is no link: what root
/// may read and the process may not would be a map otherwise. `accepts` is asked about the owner and the time of the last
/// change.
fn open_inside(
    root: &Root,
    path: &str,
    known: Option<(u64, u64)>,
    accepts: impl FnOnce(u32, i64) -> bool,
) -> Option<(File, (u64, u64))> {
    let place = root.look_up(path, OFlag::O_NOFOLLOW)?;
    let metadata = place.metadata().ok()?;
    let identity = (metadata.dev(), metadata.ino());
    if known == Some(identity) || !accepts(metadata.uid(), metadata.mtime()) {
        return None;
    }
    Some((regular_file::reopen(&place).ok()?, identity))
}

fn identity(file: &File) -> Option<(u64, u64)> {
    let metadata = file.metadata().ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Whether a file of this owner may say what a process's code is called: the process itself, or root.
fn may_name(status: &Status, owner: u32) -> bool {
    owner == 0 || status.uids.contains(&owner)
}

/// Whether something written at a time, seconds since 1970, was there before a process began.
fn is_older(written: i64, start_time_ns: u64) -> bool {
    let now = |clock| clock_gettime(clock).map(Duration::from);
    let (Ok(since_boot), Ok(today)) = (now(ClockId::CLOCK_BOOTTIME), now(ClockId::CLOCK_REALTIME)) else {
        return false;
    };
    let age = since_boot.saturating_sub(Duration::from_nanos(start_time_ns));
    let began = today.saturating_sub(age).saturating_sub(OLDER);
    u64::try_from(written).unwrap_or(0) < began.as_secs()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A folder of its own, removed at the end.
    struct Folder(std::path::PathBuf, Root);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("tmp")).expect("a folder");
            let root = Root::at(&path);
            Self(path, root)
        }

        fn open(&self, name: &str) -> Option<(File, (u64, u64))> {
            open_inside(&self.1, &format!("tmp/{name}"), None, |_, _| true)
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.0.join("tmp").join(name)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            // What is left of it does no harm.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A pipe in the map's place would block whoever opens it; a link may lead to what only root may read.
    #[test]
    fn opens_regular_files_only() {
        let root = Folder::new("regular");
        fs::write(root.path("map"), "1 1 one\n").expect("room");
        nix::unistd::mkfifo(&root.path("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        symlink("map", root.path("link")).expect("a link");
        assert!(root.open("map").is_some());
        for name in ["pipe", "link", ".", "missing"] {
            assert!(root.open(name).is_none(), "{name}");
        }
        let (_, identity) = root.open("map").expect("a file");
        assert!(open_inside(&root.1, "tmp/map", Some(identity), |_, _| true).is_none(), "it is known");
        assert!(open_inside(&root.1, "tmp/map", None, |_, _| false).is_none(), "it is refused");
    }

    /// `/tmp` may be a link: it leads where it leads for the process, never to our own files.
    #[test]
    fn links_stay_inside_the_root() {
        let root = Folder::new("links");
        fs::create_dir_all(root.0.join("real")).expect("a folder");
        fs::write(root.0.join("real/map"), "1 1 one\n").expect("room");
        for (name, target) in [("in", "/real"), ("above", "../../../../../../../../real"), ("out", "/proc/self")] {
            symlink(target, root.path(name)).expect("a link");
        }
        assert!(root.open("in/map").is_some() && root.open("above/map").is_some());
        assert!(root.open("out/status").is_none());
    }

    #[test]
    fn owners_and_ages() {
        let status = Status { pid: 1, uids: [1000, 1000, 1000, 33] };
        assert!(may_name(&status, 1000) && may_name(&status, 33) && may_name(&status, 0));
        assert!(!may_name(&status, 1001));
        let since_boot = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).expect("a clock"));
        let today = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).expect("a clock")).as_secs() as i64;
        let start = since_boot.as_nanos() as u64;
        assert!(!is_older(today, start) && is_older(today - 10, start));
        assert!(!is_older(today - 10, start.saturating_sub(20_000_000_000)) && is_older(i64::MIN, start));
    }

    #[test]
    fn knows_memory_by_name() {
        let check = |path: &str, expect| {
            let line = MapsLine { start: 0, end: 1, file_offset: 0, device: 1, inode: 5, path: path.to_owned() };
            assert_eq!(is_memory(&line), expect, "{path}");
        };
        check("/memfd:doublemapper", true);
        check("/dev/zero", true);
        check("/memfd:runc_cloned:/proc/self/exe", false);
        check("/usr/lib/libzero.so", false);
    }

    /// perf's convention: a file of this name is mapped executable.
    #[test]
    fn knows_jitdumps_by_name() {
        let check = |path: &str, inode, expect| {
            let line = MapsLine { start: 0, end: 1, file_offset: 0, device: 1, inode, path: path.to_owned() };
            assert_eq!(is_jitdump(&line), expect, "{path}");
        };
        check("/tmp/jit-12.dump", 5, true);
        check("/tmp/jit-12.dump", 0, false);
        check("/tmp/jit-.dump", 5, false);
        check("/tmp/jit-a1.dump", 5, false);
        check("/tmp/jit-12.dump/libx.so", 5, false);
    }
}

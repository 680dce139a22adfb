//! The table of processes: learns from notices and `/proc`, locates samples.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
};

use profiler_common::abi::{
    notice::{ForkNotice, NoticeHeader, NoticeKind, PlaceNotice, TableNotice},
    process::{COMM_LEN, ProcessKey},
    sample::{EventKind, StackEnd},
};
use tracing::debug;
use zerocopy::FromBytes as _;

use super::{
    executables::{Executables, FileKey, executable_name},
    mappings::{Backing, Mapping, Mappings},
    proc_fs::{executable_maps, is_running, start_of, start_ticks},
    published::Change,
    runtime_code::{FollowedCode, RuntimeFiles, is_jitdump, is_memory},
    stack::{leaf_first, trim},
};
use crate::profile::{Cgroup, Executable, LocatedSample, Location, ProcessInfo, RawSample, RuntimeCode};

/// Most program images remembered. A machine with more runs on with fewer frames located.
const MAX_PROCESSES: usize = 32 << 10;
/// Drains for which an exited process is remembered: it may be sampled until the kernel has let go of it.
const KEEP_EXITED: u64 = 2;
/// Times a process's mappings are read between two drains: some map new code all the time.
const MAX_SCANS: u32 = 20;
/// Drains after which a process's mappings are read again when it is sampled: what was unmapped is not announced.
const RESCAN_AFTER: u64 = 12;
/// Most images that are looked at again between drains.
const MAX_EXPECTING: usize = 1024;
/// Drains between two looks at which processes still exist: an exit notice may have been lost.
const SWEEP_EVERY: u64 = 12;

struct Process {
    info: Arc<ProcessInfo>,
    mappings: Arc<Mappings>,
    /// What it says about code that it makes.
    code: FollowedCode,
    /// File name of its executable, once looked up.
    executable: Option<String>,
    /// The drain in which its mappings were last read from `/proc`, or could not be.
    scanned: Option<u64>,
    /// Times they were read in that drain.
    scans: u32,
    /// The drain before which it exited or was replaced by `execve`.
    ended: Option<u64>,
}

/// A range of a process that became executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewMapping {
    /// The process.
    pub tgid: u32,
    /// First address.
    pub start: u64,
    /// First address past the end.
    pub end: u64,
    /// Offset of `start` in the file, bytes.
    pub file_offset: u64,
    /// The kernel's device number: major << 20 | minor.
    pub device: u32,
    /// Inode number; zero where no file backs the range.
    pub inode: u64,
}

/// Sizes and events, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableStats {
    /// Program images remembered.
    pub processes: usize,
    /// Executable files known.
    pub executables: usize,
    /// Files that name code made at run time, open.
    pub runtime_files: usize,
    /// Times that too many of them were open to look for another.
    pub runtime_files_refused: u64,
    /// Notices received.
    pub notices: u64,
    /// Notices that could not be understood.
    pub notices_malformed: u64,
    /// New mappings of known processes that the kernel announced.
    pub mappings_announced: u64,
    /// Times a process's mappings were read.
    pub scans: u64,
    /// Times they could not be: the process was gone, or had become another program.
    pub scans_failed: u64,
    /// Samples of processes of which nothing is known but what the sample says.
    pub samples_unknown_process: u64,
}

/// Every process that may be sampled.
#[derive(Default)]
pub struct ProcessTable {
    processes: HashMap<ProcessKey, Process>,
    /// The newest program image seen per PID: only this one can be read from `/proc`.
    newest: HashMap<u32, ProcessKey>,
    executables: Executables,
    runtime_files: RuntimeFiles,
    /// Images that run new code of their own making.
    compiling: HashSet<ProcessKey>,
    /// Images whose mappings should be read before the next sample is located.
    unread: HashSet<ProcessKey>,
    /// Images that make code and may begin to name it at any moment.
    expecting: HashSet<ProcessKey>,
    exited: HashSet<u32>,
    /// What the kernel programs have to be told.
    changes: Vec<Change>,
    /// Images whose mappings they have to be told after that.
    remapped: HashSet<ProcessKey>,
    /// Executables whose unwind tables samples have missed.
    wanted: Vec<Arc<Executable>>,
    /// Counts drains.
    generation: u64,
    stats: TableStats,
}

impl ProcessTable {
    /// Takes note of what the kernel announced. Call [`Self::catch_up`] when no more notices are waiting.
    pub fn notice(&mut self, bytes: &[u8]) {
        self.stats.notices += 1;
        if self.try_notice(bytes).is_none() {
            self.stats.notices_malformed += 1;
        }
    }

    fn try_notice(&mut self, bytes: &[u8]) -> Option<()> {
        let (header, _) = NoticeHeader::read_from_prefix(bytes).ok()?;
        let process = header.process;
        match NoticeKind::try_from(header.kind).ok()? {
            NoticeKind::Fork => {
                let (notice, _) = ForkNotice::read_from_prefix(bytes).ok()?;
                self.fork(process, notice.child);
            }
            NoticeKind::Exec => {
                self.see(process);
                self.unread.insert(process);
            }
            NoticeKind::Exit => {
                self.unread.remove(&process);
                self.exited.insert(process.tgid);
                if let Some(ended) = self.processes.get_mut(&process) {
                    ended.ended = Some(self.generation);
                }
            }
            NoticeKind::NewPlace => {
                let (notice, _) = PlaceNotice::read_from_prefix(bytes).ok()?;
                self.see(process);
                let known = self.processes.get(&process)?;
                if known.mappings.is_anonymous(notice.address) {
                    self.compiling.insert(process);
                } else if matches!(known.mappings.locate(notice.address, &known.code.code), Location::Unmapped(_)) {
                    self.unread.insert(process);
                }
            }
            NoticeKind::TableWanted => {
                let (notice, _) = TableNotice::read_from_prefix(bytes).ok()?;
                self.wanted.extend(self.executables.by_table(notice.executable));
            }
        }
        Some(())
    }

    /// Reads the mappings of the processes that notices pointed at, while they live.
    pub fn catch_up(&mut self) {
        for key in std::mem::take(&mut self.unread) {
            let is_restless = self
                .processes
                .get(&key)
                .is_some_and(|process| process.scanned == Some(self.generation) && process.scans >= MAX_SCANS);
            if !is_restless {
                self.scan(key);
            }
        }
        for key in std::mem::take(&mut self.compiling) {
            self.follow_code(key);
        }
    }

    /// Looks for what names the code that a process makes.
    fn follow_code(&mut self, key: ProcessKey) {
        if self.newest.get(&key.tgid) == Some(&key)
            && let Some(process) = self.processes.get_mut(&key)
            && process.mappings.has_anonymous()
        {
            let is_expected = self.runtime_files.follow(&mut process.code, self.generation);
            if is_expected && self.expecting.len() < MAX_EXPECTING {
                self.expecting.insert(key);
            }
        }
    }

    /// Whether processes are about to say what the code they make is called: see [`Self::look_again`].
    pub fn is_expecting(&self) -> bool {
        !self.expecting.is_empty()
    }

    /// Looks at those processes again.
    pub fn look_again(&mut self) {
        for key in std::mem::take(&mut self.expecting) {
            self.follow_code(key);
        }
    }

    /// What the kernel programs have to be told since this was last called.
    pub fn take_changes(&mut self) -> Vec<Change> {
        for key in std::mem::take(&mut self.remapped) {
            if let Some(process) = self.processes.get(&key) {
                self.changes.push(Change::Mapped(key, process.mappings.records()));
            }
        }
        std::mem::take(&mut self.changes)
    }

    /// Executables whose unwind tables samples have missed since this was last called.
    pub fn take_wanted(&mut self) -> Vec<Arc<Executable>> {
        std::mem::take(&mut self.wanted)
    }

    /// Numbers of unwind tables that belong to another executable, or to none, since this was last called.
    pub fn take_vacated(&mut self) -> Vec<u32> {
        self.executables.take_vacated()
    }

    /// Whether the process has exited (for as long as it is remembered).
    pub fn has_exited(&self, tgid: u32) -> bool {
        self.exited.contains(&tgid)
    }

    /// Turns a sample's addresses into places in files.
    pub fn locate(&mut self, sample: RawSample, cgroup: Option<Arc<Cgroup>>) -> LocatedSample {
        let key = sample.process;
        if self.newest.get(&key.tgid).is_none_or(|newest| newest.start_time_ns <= key.start_time_ns) {
            self.see(key);
        }
        let mut user = self.locate_user(&sample);
        let scanned = self.processes.get(&key).and_then(|process| process.scanned);
        let is_outdated = scanned.is_some_and(|scanned| self.generation - scanned >= RESCAN_AFTER) && !user.is_empty();
        let is_unknown = user.iter().any(|location| matches!(location, Location::Unmapped(_)));
        if (is_outdated || is_unknown) && scanned != Some(self.generation) && self.scan(key) {
            user = self.locate_user(&sample);
        }
        if user.iter().any(|location| matches!(location, Location::Anonymous { .. })) {
            self.follow_code(key);
        }
        let end = trim(&mut user, sample.end);

        let mut locations: Vec<Location> =
            leaf_first(&sample.kernel).map(|address| Location::Kernel(address.lookup())).collect();
        locations.append(&mut user);
        LocatedSample {
            process: self.info(key, &sample.process_name, cgroup),
            thread_name: sample.thread_name.into(),
            kind: sample.kind,
            end,
            locations,
            count: sample.count,
            time_ns: 0,
        }
    }

    /// Where addresses of a living process are now, as they are: not samples of it.
    pub fn locate_now(&mut self, tgid: u32, addresses: &[u64]) -> io::Result<Vec<Location>> {
        // (Its error says more than that of a scan.)
        executable_maps(tgid)?;
        let ticks = start_ticks(tgid).ok_or(io::ErrorKind::NotFound)?;
        let key = ProcessKey { tgid, start_time_ns: start_of(ticks), exec_id: 0 };
        self.see(key);
        self.scan(key);
        self.follow_code(key);
        let process = self.processes.get(&key).ok_or(io::ErrorKind::NotFound)?;
        Ok(addresses.iter().map(|&address| process.mappings.locate(address, &process.code.code)).collect())
    }

    /// A sample of a process of which nothing but its PID is known.
    pub fn without_stack(&self, tgid: u32, kind: EventKind, end: StackEnd) -> LocatedSample {
        let process = self.newest.get(&tgid).and_then(|key| self.processes.get(key));
        let process = process.map_or_else(
            || {
                let key = ProcessKey { tgid, ..ProcessKey::default() };
                Arc::new(ProcessInfo { key, name: String::new(), cgroup: None })
            },
            |process| Arc::clone(&process.info),
        );
        LocatedSample {
            thread_name: process.name.as_str().into(),
            process,
            kind,
            end,
            locations: Vec::new(),
            count: 0,
            time_ns: 0,
        }
    }

    /// Ends a drain: forgets processes whose last samples have been read. Returns the PIDs of those that no
    /// other process has taken over.
    pub fn end_drain(&mut self) -> Vec<u32> {
        self.generation += 1;
        if self.generation.is_multiple_of(SWEEP_EVERY) {
            self.end_vanished();
        }
        let mut gone = Vec::new();
        let (generation, newest, changes) = (self.generation, &mut self.newest, &mut self.changes);
        self.processes.retain(|key, process| {
            let keep = process.ended.is_none_or(|ended| generation.saturating_sub(ended) < KEEP_EXITED);
            if !keep {
                changes.push(Change::Gone(*key));
            }
            if !keep && newest.get(&key.tgid) == Some(key) {
                newest.remove(&key.tgid);
                gone.push(key.tgid);
            }
            keep
        });
        let newest = &self.newest;
        self.exited.retain(|tgid| newest.contains_key(tgid));
        self.executables.sweep(self.generation);
        gone
    }

    /// Ends every process that is not there any more, whatever notices said.
    fn end_vanished(&mut self) {
        for (key, process) in &mut self.processes {
            if process.ended.is_none() && !is_running(*key) {
                process.ended = Some(self.generation);
            }
        }
    }

    /// Sizes and events so far.
    pub fn stats(&self) -> TableStats {
        TableStats {
            processes: self.processes.len(),
            executables: self.executables.len(),
            runtime_files: self.runtime_files.len(),
            runtime_files_refused: self.runtime_files.refused(),
            ..self.stats
        }
    }

    /// Makes sure that an image is in the table, and that older images of its PID are on their way out.
    fn see(&mut self, key: ProcessKey) {
        if !self.processes.contains_key(&key) && self.processes.len() >= MAX_PROCESSES {
            return;
        }
        let newest = *self.newest.entry(key.tgid).or_insert(key);
        let is_replaced = newest.start_time_ns == key.start_time_ns && newest.exec_id > key.exec_id;
        if newest != key && !is_replaced {
            if let Some(older) = self.processes.get_mut(&newest) {
                older.ended.get_or_insert(self.generation);
            }
            self.newest.insert(key.tgid, key);
            self.exited.remove(&key.tgid);
        }
        // A late sample of an image that has been replaced since does not bring it back for good.
        let ended = is_replaced.then_some(self.generation);
        self.processes.entry(key).or_insert_with(|| Process {
            info: Arc::new(ProcessInfo { key, name: String::new(), cgroup: None }),
            mappings: Arc::default(),
            code: FollowedCode::new(RuntimeCode::new(key)),
            executable: None,
            scanned: None,
            scans: 0,
            ended,
        });
    }

    fn fork(&mut self, parent_key: ProcessKey, child: ProcessKey) {
        self.see(child);
        self.changes.push(Change::Forked { parent: parent_key, child });
        let Some(parent) = self.processes.get(&parent_key) else { return };
        let (mappings, executable) = (Arc::clone(&parent.mappings), parent.executable.clone());
        let code = parent.code.code.of_child(child);
        if self.remapped.contains(&parent_key) {
            self.remapped.insert(child);
        }
        if let Some(child) = self.processes.get_mut(&child) {
            child.mappings = mappings;
            child.code = FollowedCode::new(code);
            child.executable = executable;
        }
    }

    /// Takes note of a new mapping. A file whose identity is known is mapped at once; an unknown one has to be read
    /// from the process. Processes that were never sampled stay unknown. Call [`Self::catch_up`] when no more
    /// mappings are waiting.
    pub fn mapped(&mut self, mapping: &NewMapping) {
        let Some(key) = self.newest.get(&mapping.tgid) else { return };
        let Some(process) = self.processes.get_mut(key) else { return };
        self.stats.mappings_announced += 1;
        let file = self.executables.known(FileKey { device: mapping.device, inode: mapping.inode });
        let backing = match file {
            Some(file) => Backing::File(file),
            None if mapping.inode == 0 => Backing::Anonymous,
            None => {
                self.unread.insert(*key);
                return;
            }
        };
        if mapping.inode == 0 {
            self.compiling.insert(*key);
            let is_anonymous = |address| process.mappings.is_anonymous(address);
            if is_anonymous(mapping.start) && is_anonymous(mapping.end.saturating_sub(1)) {
                return;
            }
        }
        Arc::make_mut(&mut process.mappings).insert(Mapping {
            start: mapping.start,
            end: mapping.end,
            file_offset: mapping.file_offset,
            backing,
        });
        self.remapped.insert(*key);
    }

    /// Reads the mappings of a living process. False: it is gone, or runs another program by now.
    fn scan(&mut self, key: ProcessKey) -> bool {
        self.stats.scans += 1;
        let generation = self.generation;
        if let Some(process) = self.processes.get_mut(&key) {
            // Counted whatever comes of it: what is gone now is gone for the rest of this drain.
            process.scans = if process.scanned == Some(generation) { process.scans + 1 } else { 1 };
            process.scanned = Some(generation);
        }
        let is_newest = self.newest.get(&key.tgid) == Some(&key) && self.processes.contains_key(&key);
        let scanned = is_newest && self.try_scan(key).is_some();
        if !scanned {
            self.stats.scans_failed += 1;
        }
        scanned
    }

    fn try_scan(&mut self, key: ProcessKey) -> Option<()> {
        let lines = executable_maps(key.tgid).ok()?;
        let mut mappings = Mappings::default();
        for line in &lines {
            if is_jitdump(line) {
                if let Some(process) = self.processes.get(&key) {
                    self.runtime_files.open_jitdump(&process.code.code, line);
                }
                continue;
            }
            let mut of_line = || self.executables.of_mapping(key.tgid, line, self.generation);
            let file = if is_memory(line) { None } else { of_line() };
            let backing = file.map_or(Backing::Anonymous, Backing::File);
            mappings.insert(Mapping { start: line.start, end: line.end, file_offset: line.file_offset, backing });
        }
        let executable = executable_name(key.tgid);
        // The PID may have been given to another process while we read.
        if !is_running(key) {
            return None;
        }
        let process = self.processes.get_mut(&key)?;
        process.executable = executable.or(process.executable.take());
        if lines.is_empty() && !process.mappings.is_empty() {
            // Exiting: its memory is gone already, but what was known of it still holds.
            return None;
        }
        self.remapped.insert(key);
        process.mappings = Arc::new(mappings);
        debug!("process {}: {} executable mappings", key.tgid, lines.len());
        self.follow_code(key);
        Some(())
    }

    fn locate_user(&self, sample: &RawSample) -> Vec<Location> {
        let process = self.processes.get(&sample.process);
        leaf_first(&sample.user)
            .map(|address| match process {
                Some(process) => process.mappings.locate(address.lookup(), &process.code.code),
                None => Location::Unmapped(address.lookup()),
            })
            .collect()
    }

    /// Name and identity of a process. The kernel cuts command names to 15 bytes: where one is the beginning
    /// of the executable's name, the whole name is shown.
    fn info(&mut self, key: ProcessKey, comm: &str, cgroup: Option<Arc<Cgroup>>) -> Arc<ProcessInfo> {
        let Some(process) = self.processes.get_mut(&key) else {
            self.stats.samples_unknown_process += 1;
            return Arc::new(ProcessInfo { key, name: comm.to_owned(), cgroup });
        };
        let name = match &process.executable {
            Some(executable) if comm.len() == COMM_LEN - 1 && executable.starts_with(comm) => executable,
            _ => comm,
        };
        if process.info.name != name || process.info.cgroup != cgroup {
            process.info = Arc::new(ProcessInfo { key, name: name.to_owned(), cgroup });
        }
        Arc::clone(&process.info)
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes as _;

    use super::*;

    fn header(kind: NoticeKind, process: ProcessKey) -> NoticeHeader {
        NoticeHeader { kind: kind as u32, reserved: 0, process }
    }

    fn place(process: ProcessKey) -> PlaceNotice {
        PlaceNotice { header: header(NoticeKind::NewPlace, process), address: 0x1000 }
    }

    fn key(tgid: u32, start_time_ns: u64, exec_id: u32) -> ProcessKey {
        ProcessKey { start_time_ns, tgid, exec_id }
    }

    /// A process that has exited stays known until its last samples were drained, and no longer.
    #[test]
    fn forgets_exited_processes_after_their_last_drain() {
        let mut table = ProcessTable::default();
        let process = key(u32::MAX, 5, 0);
        table.notice(place(process).as_bytes());
        table.notice(header(NoticeKind::Exit, process).as_bytes());
        assert!(table.has_exited(u32::MAX));
        table.end_drain();
        assert_eq!(table.stats().processes, 1);
        table.end_drain();
        assert_eq!(table.stats().processes, 0);
        assert!(!table.has_exited(u32::MAX));
    }

    /// A PID that is used again is another process, and the old one is on its way out.
    #[test]
    fn tells_reused_pids_apart() {
        let mut table = ProcessTable::default();
        let (old, new) = (key(u32::MAX, 5, 0), key(u32::MAX, 9, 0));
        table.notice(place(old).as_bytes());
        table.notice(place(new).as_bytes());
        assert_eq!(table.newest.get(&u32::MAX), Some(&new));
        table.end_drain();
        table.end_drain();
        assert!(table.processes.contains_key(&new) && !table.processes.contains_key(&old));
    }

    /// Truncated and unknown notices are counted, whatever they hold.
    #[test]
    fn counts_malformed_notices() {
        let mut table = ProcessTable::default();
        let fork = header(NoticeKind::Fork, key(1, 1, 1));
        for len in 0..fork.as_bytes().len() {
            table.notice(&fork.as_bytes()[..len]);
        }
        table.notice(fork.as_bytes());
        table.notice(&[0xff; 64]);
        assert_eq!(table.stats().notices_malformed, table.stats().notices);
    }

    /// Words beyond the last code address are cut, and the stack says so; a rooted stack is left alone.
    #[test]
    fn trims_what_is_no_code() {
        let made = Arc::new(RuntimeCode::new(key(1, 1, 1)));
        let code = || Location::Anonymous { code: Arc::clone(&made), address: 1 };
        let unmapped = || Location::Unmapped(1);
        let check = |mut user: Vec<Location>, end, expect_len, expect_end| {
            let end = trim(&mut user, end);
            assert_eq!((user.len(), end), (expect_len, expect_end));
        };
        check(vec![code(), code()], StackEnd::FramePointerLost, 2, StackEnd::FramePointerLost);
        check(vec![code(), unmapped(), code(), unmapped()], StackEnd::FramePointerLost, 3, StackEnd::NotCode);
        check(vec![unmapped(), unmapped()], StackEnd::FramePointerLost, 1, StackEnd::NotCode);
        check(vec![code(), unmapped()], StackEnd::Root, 2, StackEnd::Root);
        check(vec![], StackEnd::KernelThread, 0, StackEnd::KernelThread);
    }
}

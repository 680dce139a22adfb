//! Source code of the files that were asked for last, within a byte budget.
//!
//! Debug information takes its time to open and to look things up in: a thread of its own does that, and until it has, what
//! was asked for is pending.

use std::{
    collections::HashMap,
    fs::File,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::debug;

use super::{FileSource, NoSource, Source, SourceOptions};
use crate::{
    allowance::Allowance,
    profile::{Executable, ExecutableId},
    symbolize::workers::Workers,
};

/// Files that are looked at in at the same time: each may take the whole budget until others are let go.
const THREADS: usize = 1;
/// How long the addresses of one batch in one file may take.
const TIME_LIMIT: Duration = Duration::from_secs(15);
/// How often it is checked, while waiting, which files take too long.
const WAIT: Duration = Duration::from_millis(200);

/// Counts, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct SourceStats {
    /// Bytes that debug information takes, about.
    pub bytes: usize,
    /// Times debug information was read, and of how many files it was dropped to keep the budget.
    pub read: u64,
    /// See [`Self::read`].
    pub evicted: u64,
    /// Files that tell nothing about their source code, by reason.
    pub by_reason: [u64; NoSource::ALL.len()],
}

/// Addresses to look up in a file.
struct Job {
    executable: Arc<Executable>,
    split_off: Option<Arc<File>>,
    /// `None`: it has to be opened.
    source: Option<Box<FileSource>>,
    addresses: Vec<u64>,
    options: SourceOptions,
}

/// What came of a job; `None`: the file cannot be read.
type Done = Option<(Box<FileSource>, HashMap<u64, Source>)>;

fn look_up(job: Job) -> Done {
    let Job { executable, split_off, source, addresses, options } = job;
    let mut source = match source {
        Some(source) => source,
        None => {
            let file = executable.file()?;
            let build_id = executable.build_id.as_deref();
            Box::new(FileSource::read(&file, build_id, split_off.as_ref(), options.bytes))
        }
    };
    let mut functions = |address| Source::new(source.find(address, options.bytes).unwrap_or_default(), options);
    let found = addresses.into_iter().map(|address| (address, functions(address))).collect();
    Some((source, found))
}

enum State {
    New,
    Open(Box<FileSource>),
    /// The thread has it.
    Busy,
    Failed,
}

struct Entry {
    executable: Arc<Executable>,
    state: State,
    /// What was found and not fetched yet.
    found: HashMap<u64, Source>,
    bytes: usize,
    used: u64,
    /// Whether it was counted why it tells nothing.
    is_counted: bool,
}

/// Source code of files.
pub(in crate::symbolize) struct SourceStore {
    options: SourceOptions,
    files: HashMap<ExecutableId, Entry>,
    workers: Workers<Job, Done>,
    /// Counts requests, to tell which file was used last.
    clock: u64,
    stats: SourceStats,
}

impl SourceStore {
    /// `None` where nothing is asked for.
    pub(in crate::symbolize) fn new(options: SourceOptions, allowance: Arc<Allowance>) -> Option<Self> {
        (options.lines || options.inlines).then(|| Self {
            options,
            files: HashMap::new(),
            workers: Workers::new(look_up, THREADS, TIME_LIMIT, allowance),
            clock: 0,
            stats: SourceStats::default(),
        })
    }

    /// The functions at stated addresses of a file, and of what was split off it; `None` while they are looked up.
    pub(in crate::symbolize) fn of(
        &mut self,
        executable: &Arc<Executable>,
        split_off: Option<&Arc<File>>,
        addresses: impl Iterator<Item = u64>,
    ) -> Option<HashMap<u64, Source>> {
        self.clock += 1;
        let new = || Entry {
            executable: Arc::clone(executable),
            state: State::New,
            found: HashMap::new(),
            bytes: 0,
            used: 0,
            is_counted: false,
        };
        let entry = self.files.entry(executable.id).or_insert_with(new);
        entry.used = self.clock;
        let missing: Vec<u64> = addresses.filter(|address| !entry.found.contains_key(address)).collect();
        if missing.is_empty() || matches!(entry.state, State::Failed) {
            return Some(mem::take(&mut entry.found));
        }
        let source = match mem::replace(&mut entry.state, State::Busy) {
            State::Busy => return None,
            // (Where a server has sent what was split off since, it is opened again.)
            State::Open(source) if source.split_off.is_some() || split_off.is_none() => Some(source),
            State::New | State::Failed | State::Open(_) => None,
        };
        let is_new = source.is_none();
        let (executable, split_off) = (Arc::clone(executable), split_off.cloned());
        let job = Job { executable, split_off, source, addresses: missing, options: self.options };
        match self.workers.offer(job.executable.id, job) {
            Ok(()) => self.stats.read += u64::from(is_new),
            Err(job) => entry.state = job.source.map_or(State::New, State::Open),
        }
        None
    }

    /// The next file of which something was looked up, or that has failed. Waits for it until `deadline`.
    pub(in crate::symbolize) fn next(&mut self, deadline: Instant) -> Option<ExecutableId> {
        loop {
            if let Some(id) = self.workers.overdue() {
                self.fail(id, NoSource::TooSlow);
                return Some(id);
            }
            let now = Instant::now();
            match self.workers.next(deadline.min(now + WAIT)) {
                Some((id, done)) => {
                    self.finish(id, done.flatten());
                    return Some(id);
                }
                None if now >= deadline => return None,
                None => {}
            }
        }
    }

    fn fail(&mut self, id: ExecutableId, reason: NoSource) {
        if let Some(entry) = self.files.get_mut(&id) {
            debug!("{}: no source lines: {}", entry.executable.path, reason.label());
            entry.state = State::Failed;
            self.stats.by_reason[reason as usize] += 1;
        }
    }

    /// Keeps what the thread has looked up. It may be late, or not be wanted any more.
    fn finish(&mut self, id: ExecutableId, done: Done) {
        let Some((source, found)) = done else { return self.fail(id, NoSource::Unreadable) };
        let Some(entry) = self.files.get_mut(&id) else { return };
        if let Some(reason) = source.reason().filter(|_| !entry.is_counted) {
            entry.is_counted = true;
            self.stats.by_reason[reason as usize] += 1;
        }
        let bytes = source.bytes();
        self.stats.bytes = self.stats.bytes + bytes - mem::replace(&mut entry.bytes, bytes);
        entry.found.extend(found);
        entry.state = State::Open(source);
        while self.stats.bytes > self.options.bytes && self.evict_oldest(id) {}
    }

    /// Lets go of files that were closed.
    pub(in crate::symbolize) fn forget_closed(&mut self) {
        let bytes = &mut self.stats.bytes;
        self.files.retain(|_, entry| {
            let keep = entry.executable.file().is_some();
            if !keep {
                *bytes -= entry.bytes;
            }
            keep
        });
    }

    /// Counts so far.
    pub(in crate::symbolize) fn stats(&self) -> SourceStats {
        self.stats
    }

    /// Returns whether there was one but `newest` that could be let go.
    fn evict_oldest(&mut self, newest: ExecutableId) -> bool {
        let is_idle = |(id, entry): &(&ExecutableId, &mut Entry)| {
            **id != newest && matches!(entry.state, State::Open(_)) && entry.bytes > 0
        };
        let oldest = self.files.iter_mut().filter(is_idle).min_by_key(|(_, entry)| entry.used);
        let Some((_, entry)) = oldest else { return false };
        entry.state = State::New;
        self.stats.bytes -= mem::take(&mut entry.bytes);
        self.stats.evicted += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{elf, symbolize::tests::own};

    /// Longer than reading takes.
    const LONG: Duration = Duration::from_secs(60);

    /// What is asked for is pending, then there; what does not fit into the budget is not kept; a file that was closed
    /// tells nothing any more.
    #[test]
    fn lines_are_looked_up_meanwhile() {
        let executable = own(0, &[1]);
        let address = elf::entry(&executable.file().expect("own executable")).expect("a first instruction");
        let functions = elf::functions(&executable.file().expect("own executable"));
        let addresses: Vec<u64> = functions.range(address..).copied().take(200).collect();
        let options = SourceOptions { lines: true, inlines: true, bytes: 1 << 30 };
        let mut store = SourceStore::new(options, Arc::default()).expect("lines are asked for");
        assert!(store.of(&executable, None, addresses.iter().copied()).is_none());
        assert_eq!(store.next(Instant::now() + LONG), Some(executable.id));
        let found = store.of(&executable, None, addresses.iter().copied()).expect("it is there");
        assert!(found.values().any(|source| source.place.is_some()), "none of {} has a line", found.len());
        assert!(store.stats().bytes > 0 && store.stats().read == 1);
        // (What was fetched is forgotten, and looked up again in what is open.)
        assert!(store.of(&executable, None, addresses.iter().copied()).is_none());
        assert_eq!(store.next(Instant::now() + LONG), Some(executable.id));
        assert_eq!(store.stats().read, 1);

        executable.close();
        store.forget_closed();
        assert_eq!(store.stats().bytes, 0);
        assert!(store.of(&executable, None, addresses.iter().copied()).is_none());
        assert_eq!(store.next(Instant::now() + LONG), Some(executable.id));
        assert!(store.of(&executable, None, addresses.iter().copied()).expect("it has failed").is_empty());
        assert_eq!(store.stats().by_reason[NoSource::Unreadable as usize], 1);
    }
}

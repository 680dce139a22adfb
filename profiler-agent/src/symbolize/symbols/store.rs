//! Symbols of the files that were asked for last, within a byte budget.
//!
//! Files are read by worker threads; until one is done, its file's symbols are pending. Equal files (the same image in
//! many containers) share what was read of the first.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::debug;

use super::FileSymbols;
use crate::{
    allowance::Allowance,
    profile::{Executable, ExecutableId, Nameless, SplitDebug},
    symbolize::{debuginfod::Debuginfod, workers::Workers},
};

/// Files that are read at the same time.
const THREADS: usize = 2;
/// How long a file may take. Real ones take milliseconds; the largest, from a cold disk, some seconds.
const TIME_LIMIT: Duration = Duration::from_secs(15);

/// Most files that are remembered as evicted.
const MAX_EVICTED: usize = 4096;
/// How often it is checked, while waiting, which files take too long.
const WAIT: Duration = Duration::from_millis(200);

/// What is needed to read a file.
struct Job {
    executable: Arc<Executable>,
    file: Arc<File>,
    debug: Option<Arc<SplitDebug>>,
    /// What was read of files with the same build ID.
    alike: Vec<Arc<FileSymbols>>,
    servers: Option<Arc<Debuginfod>>,
}

fn read(job: Job) -> Arc<FileSymbols> {
    let Job { executable, file, debug, alike, servers } = job;
    let equal = alike.into_iter().find(|symbols| symbols.are_of(&file, debug.is_some()));
    let build_id = executable.build_id.as_deref();
    equal.unwrap_or_else(|| Arc::new(FileSymbols::read(&file, build_id, debug.as_deref(), servers.as_deref())))
}

enum State {
    /// Nobody reads it yet: the queue was full, or a file that may be equal is being read.
    Wanted,
    /// A thread reads it, or will.
    Asked,
    /// This much is read, and a server may send more.
    Awaiting(Arc<FileSymbols>),
    Read(Arc<FileSymbols>),
    Failed(Nameless),
}

struct Entry {
    executable: Arc<Executable>,
    state: State,
    /// See [`SymbolStore::is_slow`].
    is_slow: bool,
    used: u64,
}

/// Sizes and events.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::symbolize) struct StoreStats {
    /// Bytes that symbols take.
    pub(in crate::symbolize) bytes: usize,
    /// Files read, however often.
    pub(in crate::symbolize) read: u64,
    /// Of those, the ones that had been let go to keep the budget.
    pub(in crate::symbolize) read_again: u64,
    /// Files that were equal to one that had been read.
    pub(in crate::symbolize) shared: u64,
    /// Files whose symbols were let go to keep the budget.
    pub(in crate::symbolize) evicted: u64,
    /// Files that took too long.
    pub(in crate::symbolize) overdue: u64,
    /// Files that are being read, or will be.
    pub(in crate::symbolize) pending: usize,
}

/// Symbols of files.
pub(in crate::symbolize) struct SymbolStore {
    files: HashMap<ExecutableId, Entry>,
    workers: Workers<Job, Arc<FileSymbols>>,
    /// Who is asked for debug files that this machine does not have.
    servers: Option<Arc<Debuginfod>>,
    budget: usize,
    /// Files that were let go to keep the budget, to tell which are read again.
    evicted: HashSet<ExecutableId>,
    /// Counts requests, to tell which file was used last.
    clock: u64,
    stats: StoreStats,
}

impl SymbolStore {
    pub(in crate::symbolize) fn new(
        budget: usize,
        servers: Option<Arc<Debuginfod>>,
        allowance: Arc<Allowance>,
    ) -> Self {
        Self {
            files: HashMap::new(),
            workers: Workers::new(read, THREADS, TIME_LIMIT, allowance),
            servers,
            budget,
            evicted: HashSet::new(),
            clock: 0,
            stats: StoreStats::default(),
        }
    }

    /// Keeps to another budget from now on.
    pub(in crate::symbolize) fn set_budget(&mut self, budget: usize) {
        self.budget = budget;
        while self.stats.bytes > self.budget && self.evict_oldest() {}
    }

    /// The symbols of a file, which is read now if it was not; pending until it is.
    pub(in crate::symbolize) fn of(&mut self, executable: &Arc<Executable>) -> Result<Arc<FileSymbols>, Nameless> {
        self.clock += 1;
        let used = self.clock;
        let new = || Entry { executable: Arc::clone(executable), state: State::Wanted, is_slow: false, used };
        self.files.entry(executable.id).or_insert_with(new).used = used;
        self.read_again_if_settled(executable.id);
        self.ask(executable.id);
        match self.files.get(&executable.id).map(|entry| &entry.state) {
            Some(State::Read(symbols)) => Ok(Arc::clone(symbols)),
            Some(State::Failed(reason)) => Err(*reason),
            Some(State::Wanted | State::Asked | State::Awaiting(_)) | None => Err(Nameless::Pending),
        }
    }

    /// The symbols of a file as far as they are known, where a server may send more.
    pub(in crate::symbolize) fn so_far(&self, id: ExecutableId) -> Option<Arc<FileSymbols>> {
        match &self.files.get(&id)?.state {
            State::Awaiting(symbols) => Some(Arc::clone(symbols)),
            _ => None,
        }
    }

    /// Files that are worth asking servers about again: they are pending from now on.
    pub(in crate::symbolize) fn ask_servers_again(&mut self) -> HashSet<ExecutableId> {
        let Some(servers) = &self.servers else { return HashSet::new() };
        let is_worth_it = |entry: &Entry| match (&entry.state, &entry.executable.build_id) {
            (State::Read(symbols), Some(build_id)) => {
                symbols.absence().is_some_and(|absence| servers.is_outdated(build_id, absence))
            }
            _ => false,
        };
        let again: HashSet<_> = self.files.iter().filter(|(_, entry)| is_worth_it(entry)).map(|(&id, _)| id).collect();
        for &id in &again {
            self.read_again(id);
            // Nobody waits for what was in vain before.
            self.set_slow(id, true);
        }
        again
    }

    /// The next file that is not pending any more: read, or failed. Waits for it until `deadline`.
    pub(in crate::symbolize) fn next(&mut self, deadline: Instant) -> Option<ExecutableId> {
        loop {
            self.ask_all();
            if let Some(id) = self.workers.overdue() {
                if let Some(entry) = self.files.get_mut(&id) {
                    debug!("{}: reading its symbols takes too long", entry.executable.path);
                    entry.state = State::Failed(Nameless::TooSlow);
                    self.stats.overdue += 1;
                }
                return Some(id);
            }
            let now = Instant::now();
            match self.workers.next(deadline.min(now + WAIT)) {
                Some((id, symbols)) => {
                    self.finish(id, symbols);
                    return Some(id);
                }
                None if now >= deadline => return None,
                None => self.files.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| {
                    self.read_again_if_settled(id);
                }),
            }
        }
    }

    /// Reads a file again for which a server has answered.
    fn read_again_if_settled(&mut self, id: ExecutableId) {
        let (Some(entry), Some(servers)) = (self.files.get(&id), &self.servers) else { return };
        let build_id = entry.executable.build_id.as_deref().unwrap_or_default();
        if matches!(entry.state, State::Awaiting(_)) && !servers.is_pending(build_id) {
            self.read_again(id);
        }
    }

    fn read_again(&mut self, id: ExecutableId) {
        let Some(entry) = self.files.get_mut(&id) else { return };
        let before = std::mem::replace(&mut entry.state, State::Wanted);
        self.release(&before);
    }

    /// Whether a pending file is worth waiting for: nobody has yet, in vain.
    pub(in crate::symbolize) fn is_slow(&self, id: ExecutableId) -> bool {
        self.files.get(&id).is_some_and(|entry| entry.is_slow)
    }

    /// Takes note that somebody has waited for a pending file in vain, or that there is nothing to wait for any more.
    pub(in crate::symbolize) fn set_slow(&mut self, id: ExecutableId, is_slow: bool) {
        if let Some(entry) = self.files.get_mut(&id) {
            entry.is_slow = is_slow;
        }
    }

    /// Hands every wanted file to the threads.
    fn ask_all(&mut self) {
        let wanted = |(&id, entry): (&ExecutableId, &Entry)| matches!(entry.state, State::Wanted).then_some(id);
        for id in self.files.iter().filter_map(wanted).collect::<Vec<_>>() {
            self.ask(id);
        }
    }

    /// Hands a wanted file to the threads, unless one that may be equal is being read.
    fn ask(&mut self, id: ExecutableId) {
        let Some(entry) = self.files.get(&id) else { return };
        if !matches!(entry.state, State::Wanted) {
            return;
        }
        let executable = Arc::clone(&entry.executable);
        let state = match executable.file() {
            None => State::Failed(Nameless::Unreadable),
            Some(file) => {
                let mut alike = Vec::new();
                let is_alike = |other: &Executable| other.build_id.is_some() && other.build_id == executable.build_id;
                for other in self.files.values().filter(|other| is_alike(&other.executable)) {
                    match &other.state {
                        State::Asked => return,
                        State::Read(symbols) if !alike.iter().any(|known| Arc::ptr_eq(known, symbols)) => {
                            alike.push(Arc::clone(symbols));
                        }
                        _ => {}
                    }
                }
                let (debug, servers) = (executable.debug_file(), self.servers.clone());
                if self.workers.offer(id, Job { executable, file, debug, alike, servers }).is_err() {
                    return;
                }
                State::Asked
            }
        };
        if let Some(entry) = self.files.get_mut(&id) {
            entry.state = state;
        }
    }

    /// Keeps what a thread has read. It may be late, or not be wanted any more.
    fn finish(&mut self, id: ExecutableId, symbols: Option<Arc<FileSymbols>>) {
        if !self.files.contains_key(&id) {
            return;
        }
        let state = match symbols {
            None => State::Failed(Nameless::Unreadable),
            Some(symbols) => {
                if self.is_held(&symbols) {
                    self.stats.shared += 1;
                } else {
                    self.stats.read += 1;
                    self.stats.read_again += u64::from(self.evicted.remove(&id));
                    while self.stats.bytes + symbols.bytes() > self.budget && self.evict_oldest() {}
                    self.stats.bytes += symbols.bytes();
                }
                if symbols.is_awaiting() { State::Awaiting(symbols) } else { State::Read(symbols) }
            }
        };
        if let Some(entry) = self.files.get_mut(&id) {
            entry.state = state;
        }
    }

    fn is_held(&self, symbols: &Arc<FileSymbols>) -> bool {
        self.files.values().any(|entry| entry.symbols().is_some_and(|held| Arc::ptr_eq(held, symbols)))
    }

    /// Lets go of files that were closed.
    pub(in crate::symbolize) fn forget_closed(&mut self) {
        let is_closed = |(&id, entry): (&ExecutableId, &Entry)| entry.executable.file().is_none().then_some(id);
        for id in self.files.iter().filter_map(is_closed).collect::<Vec<_>>() {
            self.forget(id);
        }
    }

    /// Returns whether there was one.
    fn evict_oldest(&mut self) -> bool {
        let read = self.files.iter().filter(|(_, entry)| entry.symbols().is_some());
        let Some((&id, _)) = read.min_by_key(|(_, entry)| entry.used) else { return false };
        self.forget(id);
        self.stats.evicted += 1;
        if self.evicted.len() >= MAX_EVICTED {
            self.evicted.clear();
        }
        self.evicted.insert(id);
        true
    }

    fn forget(&mut self, id: ExecutableId) {
        if let Some(entry) = self.files.remove(&id) {
            self.release(&entry.state);
        }
    }

    /// Takes note that a file no longer has these symbols; others may.
    fn release(&mut self, state: &State) {
        if let Some(symbols) = state.symbols()
            && !self.is_held(symbols)
        {
            self.stats.bytes = self.stats.bytes.saturating_sub(symbols.bytes());
        }
    }

    pub(in crate::symbolize) fn stats(&self) -> StoreStats {
        let pending = self.files.values().filter(|entry| matches!(entry.state, State::Wanted | State::Asked)).count();
        StoreStats { pending, ..self.stats }
    }
}

impl Entry {
    fn symbols(&self) -> Option<&Arc<FileSymbols>> {
        self.state.symbols()
    }
}

impl State {
    fn symbols(&self) -> Option<&Arc<FileSymbols>> {
        match self {
            Self::Read(symbols) | Self::Awaiting(symbols) => Some(symbols),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::atomic::Ordering, thread};

    use super::*;
    use crate::symbolize::{
        debuginfod::tests::{FakeServer, Scratch, elf, id, response},
        tests::own,
    };

    /// Longer than reading takes.
    const LONG: Duration = Duration::from_secs(60);

    fn read_now(store: &mut SymbolStore, executable: &Arc<Executable>) -> Arc<FileSymbols> {
        let deadline = Instant::now() + LONG;
        loop {
            match store.of(executable) {
                Ok(symbols) => return symbols,
                Err(reason) => assert_eq!(reason, Nameless::Pending),
            }
            assert!(store.next(deadline).is_some(), "it takes for ever");
        }
    }

    /// Equal files share what was read of the first, even where both are wanted at once; another build ID is another
    /// file.
    #[test]
    fn equal_files_are_read_once() {
        let mut store = SymbolStore::new(usize::MAX, None, Arc::default());
        let files = [own(0, &[1]), own(1, &[1]), own(2, &[2])];
        for file in &files {
            assert!(store.of(file).is_err(), "nothing is read at once");
        }
        let symbols = files.each_ref().map(|file| read_now(&mut store, file));
        assert!(Arc::ptr_eq(&symbols[0], &symbols[1]) && !Arc::ptr_eq(&symbols[0], &symbols[2]));
        let stats = store.stats();
        assert_eq!((stats.read, stats.shared, stats.pending), (2, 1, 0));
        assert_eq!(stats.bytes, 2 * symbols[0].bytes());
        // What is shared is let go of with the last file that has it.
        files[0].close();
        store.forget_closed();
        assert_eq!(store.stats().bytes, 2 * symbols[0].bytes());
        files[1].close();
        files[2].close();
        store.forget_closed();
        assert_eq!(store.stats().bytes, 0);
    }

    /// A file that tells nothing but its build ID, and a store that asks a server.
    fn stripped(scratch: &Scratch, server: &FakeServer) -> (SymbolStore, Arc<Debuginfod>, Arc<Executable>) {
        let settings = server.settings(&Scratch(scratch.0.join("cache")));
        let client = Arc::new(Debuginfod::start(settings).expect("a client"));
        let program = scratch.0.join("program");
        fs::write(&program, elf(&id(7), 200)).expect("a file");
        let executable = own(0, &id(7));
        *executable.file.lock().expect("nobody panicked") = Some(Arc::new(File::open(program).expect("a file")));
        (SymbolStore::new(usize::MAX, Some(Arc::clone(&client)), Arc::default()), client, executable)
    }

    /// What a server does not have is not waited for again, until its answer has aged.
    #[test]
    fn servers_are_asked_again_in_time() {
        let (scratch, server) = (Scratch::new("again"), FakeServer::that_sends(response("404 Not Found", b"")));
        let (mut store, client, executable) = stripped(&scratch, &server);
        let symbols = read_now(&mut store, &executable);
        assert_eq!(symbols.name(0), Err(Nameless::NoSymbols));
        assert!(store.ask_servers_again().is_empty());
        client.forget();
        assert_eq!(store.ask_servers_again(), HashSet::from([executable.id]));
        assert_eq!(store.stats().bytes, 0);
        assert!(store.of(&executable).is_err());
        assert_eq!(read_now(&mut store, &executable).bytes(), store.stats().bytes);
        assert_eq!(server.requests.load(Ordering::Relaxed), 2);
    }

    /// What a server may still send is pending, and what is known so far says so.
    #[test]
    fn servers_may_take_their_time() {
        let (scratch, server) = (Scratch::new("time"), FakeServer::start(|_, _| thread::sleep(LONG)));
        let (mut store, _client, executable) = stripped(&scratch, &server);
        assert!(store.of(&executable).is_err() && store.so_far(executable.id).is_none());
        assert_eq!(store.next(Instant::now() + LONG), Some(executable.id));
        assert!(store.of(&executable).is_err());
        let so_far = store.so_far(executable.id).expect("what the file itself tells");
        assert_eq!(so_far.name(0), Err(Nameless::DebugFilePending));
        assert_eq!(store.next(Instant::now()), None);
    }

    /// What was used last stays.
    #[test]
    fn keeps_its_budget() {
        let mut store = SymbolStore::new(usize::MAX, None, Arc::default());
        let files = [own(0, &[0]), own(1, &[1]), own(2, &[2])];
        store.budget = 2 * read_now(&mut store, &files[0]).bytes();
        read_now(&mut store, &files[1]);
        read_now(&mut store, &files[0]);
        read_now(&mut store, &files[2]);
        assert_eq!((store.stats().evicted, store.stats().bytes), (1, store.budget));
        assert!(store.of(&files[0]).is_ok() && store.of(&files[1]).is_err());
    }
}

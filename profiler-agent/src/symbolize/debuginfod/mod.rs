//! Debug files of stripped programs, from debuginfod servers.
//!
//! In: build IDs. Out: debug files that state them, at once where they are on disk, later where a server has them; else
//! why there are none. One thread asks the servers; whoever wants a file never waits for it. A build ID comes from a
//! file that anybody may have made and an answer from a server that may be anybody's, so both are checked.

mod cache;
mod server;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    fs::File,
    io,
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::debug;

pub use self::server::ServerUrl;
use self::{
    cache::{DiskCache, Incoming},
    server::Server,
};
use crate::{elf::MAX_BUILD_ID, profile::hex};

/// Shortest build ID that servers are asked for: those of linkers have 8 bytes or more, and what is shorter does not
/// tell files apart.
const MIN_BUILD_ID: usize = 8;
/// Build IDs that may wait for a server.
const MAX_WAITING: usize = 256;
/// Build IDs whose outcome is remembered.
const MAX_REMEMBERED: usize = 4096;
/// How long it is believed that no server has a file, or none that would be taken.
const FINAL_PAUSE: Duration = Duration::from_secs(3600);
/// How long nothing is asked about a file after a failure; twice as long after each that follows.
const FIRST_PAUSE: Duration = Duration::from_secs(120);
/// A file that was fetched and evicted is not fetched again so soon: the cache is too small for what runs.
const EVICTED_PAUSE: Duration = Duration::from_secs(600);

/// Which servers are asked, and where what they send is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Servers, in the order in which they are asked.
    pub urls: Vec<ServerUrl>,
    /// The folder of files that were fetched.
    pub cache_folder: PathBuf,
    /// Most bytes of its files; one that is arriving comes on top.
    pub cache_bytes: u64,
    /// Most bytes of one file.
    pub max_file_bytes: u64,
    /// How long one file may take to arrive.
    pub timeout: Duration,
}

/// What is known about a build ID's debug file.
#[derive(Debug)]
pub enum Answer {
    /// Here it is.
    Ready(File),
    /// A server will be asked: it is worth asking again later.
    Pending,
    /// There is none, for now.
    Absent(Absence),
}

/// Why there is no debug file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// The executable's build ID cannot tell it from others.
    NoBuildId,
    /// No server has it.
    NotFound,
    /// It is larger than what is accepted.
    TooLarge,
    /// No connection, or it broke.
    Unreachable,
    /// The server did not send it in time.
    TimedOut,
    /// The server answered with an error, or nonsense.
    ServerError,
    /// What it sent is not the debug file of this build ID.
    NotTheFile,
    /// The servers are not asked now, because they failed several times in a row.
    LeftAlone,
    /// It could not be written to disk.
    NotStored,
    /// It was fetched, and had to make room for others.
    Evicted,
}

impl Absence {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::NoBuildId,
        Self::NotFound,
        Self::TooLarge,
        Self::Unreachable,
        Self::TimedOut,
        Self::ServerError,
        Self::NotTheFile,
        Self::LeftAlone,
        Self::NotStored,
        Self::Evicted,
    ];

    /// Its name for people, metrics and attributes.
    pub const fn label(self) -> &'static str {
        match self {
            Self::NoBuildId => "no usable build ID",
            Self::NotFound => "unknown to the servers",
            Self::TooLarge => "too large",
            Self::Unreachable => "server unreachable",
            Self::TimedOut => "server too slow",
            Self::ServerError => "server error",
            Self::NotTheFile => "not the file that was asked for",
            Self::LeftAlone => "server left alone",
            Self::NotStored => "could not be stored",
            Self::Evicted => "evicted",
        }
    }

    /// Whether asking again soon would give the same answer.
    const fn is_final(self) -> bool {
        matches!(self, Self::NoBuildId | Self::NotFound | Self::TooLarge)
    }
}

/// What was asked and what came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebuginfodStats {
    /// Requests that servers were sent.
    pub requests: u64,
    /// Bytes that they answered.
    pub bytes: u64,
    /// Files that were fetched and kept.
    pub fetched: u64,
    /// Questions that the folder answered.
    pub disk_hits: u64,
    /// Questions for which a server had to be asked.
    pub disk_misses: u64,
    /// Requests that gave no file, by reason.
    pub failures: [u64; Absence::ALL.len()],
    /// Files that made room for others.
    pub evicted: u64,
    /// Build IDs that wait for a server now.
    pub pending: usize,
    /// Bytes of the folder's files when it was last changed or opened.
    pub cache_bytes: u64,
}

/// A build ID of sensible length.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct BuildId(Box<[u8]>);

impl BuildId {
    fn new(bytes: &[u8]) -> Option<Self> {
        (MIN_BUILD_ID..=MAX_BUILD_ID).contains(&bytes.len()).then(|| Self(bytes.into()))
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// What it is called in requests and file names.
    fn hex(&self) -> String {
        hex(&self.0)
    }
}

/// What is remembered about a build ID.
enum Asked {
    /// It waits for the thread, or the thread is at it.
    Waiting { failures: u32 },
    /// There is none; not before then is it worth asking again.
    Absent { reason: Absence, until: Instant, failures: u32 },
    /// It was fetched.
    Fetched { at: Instant },
}

#[derive(Default)]
struct State {
    asked: HashMap<BuildId, Asked>,
    queue: VecDeque<BuildId>,
    stats: DebuginfodStats,
}

struct Shared {
    cache: DiskCache,
    state: Mutex<State>,
    /// Something was queued, or settled.
    changed: Condvar,
    stopping: AtomicBool,
}

impl Settings {
    /// Whether files can be kept where they are to be. An error names the folder.
    pub fn check(&self) -> io::Result<()> {
        DiskCache::open(&self.cache_folder, self.cache_bytes).map(drop)
    }
}

/// A client of debuginfod servers. What it is asked is answered at once; its thread fetches what is missing.
pub struct Debuginfod {
    shared: Arc<Shared>,
}

impl Debuginfod {
    /// Checks the folder and starts the thread. Nothing is asked of a server before somebody wants a file.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let max_bytes = settings.max_file_bytes.min(settings.cache_bytes);
        let servers = settings.urls.into_iter().map(|url| Server::new(url, max_bytes, settings.timeout));
        let servers = servers.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
        let cache = DiskCache::open(&settings.cache_folder, settings.cache_bytes)?;
        let mut state = State::default();
        state.stats.cache_bytes = cache.bytes();
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { cache, state, changed, stopping: AtomicBool::new(false) });
        let thread = Arc::clone(&shared);
        thread::Builder::new().name("debuginfod".to_owned()).spawn(move || thread.ask_servers(servers))?;
        Ok(Self { shared })
    }

    /// The debug file of a build ID. Reads no more than the headers of a file on disk; the first question about what is
    /// not there makes the thread ask.
    pub fn debug_file(&self, build_id: &[u8]) -> Answer {
        let Some(build_id) = BuildId::new(build_id) else { return Answer::Absent(Absence::NoBuildId) };
        match self.shared.state().asked.get(&build_id) {
            Some(Asked::Waiting { .. }) => return Answer::Pending,
            Some(&Asked::Absent { reason, until, .. }) if Instant::now() < until => return Answer::Absent(reason),
            _ => {}
        }
        // (Without the lock: it is a disk.)
        let file = self.shared.cache.find(&build_id);
        let mut state = self.shared.state();
        if let Some(file) = file {
            state.stats.disk_hits += 1;
            return Answer::Ready(file);
        }
        let answer = state.want(build_id);
        self.shared.changed.notify_all();
        answer
    }

    /// Whether the answer is still [`Answer::Pending`].
    pub fn is_pending(&self, build_id: &[u8]) -> bool {
        let Some(build_id) = BuildId::new(build_id) else { return false };
        let state = self.shared.state();
        match state.asked.get(&build_id) {
            Some(Asked::Waiting { .. }) => true,
            Some(Asked::Fetched { .. }) => false,
            Some(Asked::Absent { until, .. }) if Instant::now() < *until => false,
            _ => state.queue.len() >= MAX_WAITING,
        }
    }

    /// Whether somebody who was given this reason would be told something else now.
    pub fn is_outdated(&self, build_id: &[u8], reason: Absence) -> bool {
        let Some(build_id) = BuildId::new(build_id) else { return false };
        match self.shared.state().asked.get(&build_id) {
            Some(Asked::Waiting { .. }) => true,
            Some(Asked::Absent { until, .. }) => Instant::now() >= *until,
            Some(Asked::Fetched { at }) => reason != Absence::Evicted || at.elapsed() >= EVICTED_PAUSE,
            None => true,
        }
    }

    /// Waits until nothing is pending, at most this long; says whether that is so.
    #[cfg(test)]
    fn wait_until_settled(&self, at_most: Duration) -> bool {
        let is_pending = |state: &mut State| state.stats.pending > 0;
        let wait = self.shared.changed.wait_timeout_while(self.shared.state(), at_most, is_pending);
        !wait.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Forgets what servers said, as time would.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.shared.state().asked.clear();
    }

    /// Counts so far.
    pub fn stats(&self) -> DebuginfodStats {
        self.shared.state().stats
    }
}

impl fmt::Debug for Debuginfod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Debuginfod({:?})", self.shared.cache)
    }
}

impl Drop for Debuginfod {
    /// Nobody waits for the thread: it ends with the request it is at, which has a time limit.
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        // (With the lock, so that the thread is not between looking and waiting.)
        let _state = self.shared.state();
        self.shared.changed.notify_all();
    }
}

impl State {
    /// What is said about a file that is not on disk.
    fn want(&mut self, build_id: BuildId) -> Answer {
        let failures = match self.asked.get(&build_id) {
            // Another thread wanted it meanwhile.
            Some(Asked::Waiting { .. }) => return Answer::Pending,
            Some(Asked::Fetched { at }) if at.elapsed() < EVICTED_PAUSE => return Answer::Absent(Absence::Evicted),
            Some(&Asked::Absent { failures, .. }) => failures,
            _ => 0,
        };
        if self.queue.len() >= MAX_WAITING {
            return Answer::Pending;
        }
        self.stats.disk_misses += 1;
        self.stats.pending += 1;
        self.remember(build_id.clone(), Asked::Waiting { failures });
        self.queue.push_back(build_id);
        Answer::Pending
    }

    /// Notes what came of a build ID that was waiting.
    fn settle(&mut self, build_id: BuildId, outcome: Result<(), Absence>) {
        let failures = match self.asked.get(&build_id) {
            Some(&Asked::Waiting { failures }) => failures,
            _ => 0,
        };
        let now = Instant::now();
        self.stats.pending -= 1;
        let asked = match outcome {
            Ok(()) => Asked::Fetched { at: now },
            Err(reason) if reason.is_final() => Asked::Absent { reason, until: now + FINAL_PAUSE, failures: 0 },
            Err(reason) => {
                let pause = FIRST_PAUSE.saturating_mul(1 << failures.min(10)).min(FINAL_PAUSE);
                // That no server could be asked says nothing about the file.
                let failures = if reason == Absence::LeftAlone { failures } else { failures.saturating_add(1) };
                Asked::Absent { reason, until: now + pause, failures }
            }
        };
        self.remember(build_id, asked);
    }

    fn remember(&mut self, build_id: BuildId, asked: Asked) {
        if self.asked.len() >= MAX_REMEMBERED && !self.asked.contains_key(&build_id) {
            let keep_until = |asked: &Asked| match asked {
                Asked::Waiting { .. } => None,
                Asked::Absent { until, .. } => Some(*until),
                Asked::Fetched { at } => Some(*at + EVICTED_PAUSE),
            };
            let first =
                self.asked.iter().filter_map(|(id, asked)| Some((keep_until(asked)?, id))).min_by_key(|it| it.0);
            if let Some(first) = first.map(|(_, id)| id.clone()) {
                self.asked.remove(&first);
            }
        }
        self.asked.insert(build_id, asked);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the thread does until nobody wants files any more.
    fn ask_servers(&self, mut servers: Vec<Server>) {
        while let Some(build_id) = self.next() {
            // Answers are untrusted; should their reader panic, it costs one file's names only.
            let ask = AssertUnwindSafe(|| self.ask(&mut servers, &build_id));
            let outcome = panic::catch_unwind(ask).unwrap_or(Err(Absence::ServerError));
            debug!("debug file of {}: {}", build_id.hex(), outcome.map_or_else(Absence::label, |()| "fetched"));
            self.state().settle(build_id, outcome);
            self.changed.notify_all();
        }
    }

    /// The build ID that has waited longest; `None`: it is time to end.
    fn next(&self) -> Option<BuildId> {
        let mut state = self.state();
        loop {
            if self.stopping.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(build_id) = state.queue.pop_front() {
                return Some(build_id);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks one server after the other. Of several reasons, one that may pass is told.
    fn ask(&self, servers: &mut [Server], build_id: &BuildId) -> Result<(), Absence> {
        let mut outcome = Absence::NotFound;
        for server in servers {
            let answer = if server.is_left_alone() {
                Err(Absence::LeftAlone)
            } else {
                let answer = self.ask_one(server, build_id);
                server.judge(answer);
                answer
            };
            match answer {
                Ok(()) => return Ok(()),
                Err(reason) if outcome == Absence::NotFound || !reason.is_final() => outcome = reason,
                Err(_) => {}
            }
        }
        Err(outcome)
    }

    /// Asks a server, and keeps what it sends where that is what was asked for.
    fn ask_one(&self, server: &Server, build_id: &BuildId) -> Result<(), Absence> {
        let mut received = 0;
        let outcome = match self.cache.receive() {
            Ok(mut incoming) => {
                self.state().stats.requests += 1;
                let is_wanted = || !self.stopping.load(Ordering::Relaxed);
                let fetched = server.fetch(build_id, &mut incoming, is_wanted);
                received = incoming.bytes();
                fetched.and_then(|()| self.keep(incoming, build_id))
            }
            Err(error) => Err(not_stored(&error)),
        };
        // (Adding up a folder's files is not for the lock.)
        let cache_bytes = outcome.is_ok().then(|| self.cache.bytes());
        let mut state = self.state();
        state.stats.bytes += received;
        match outcome {
            Ok(evicted) => {
                state.stats.fetched += 1;
                state.stats.evicted += evicted;
                state.stats.cache_bytes = cache_bytes.unwrap_or_default();
            }
            Err(reason) => state.stats.failures[reason as usize] += 1,
        }
        outcome.map(|_| ())
    }

    /// Checks what arrived and keeps it; the result is how many files made room.
    fn keep(&self, incoming: Incoming, build_id: &BuildId) -> Result<u64, Absence> {
        match self.cache.keep(incoming, build_id) {
            Ok(evicted) => evicted.ok_or(Absence::NotTheFile),
            Err(error) => Err(not_stored(&error)),
        }
    }
}

fn not_stored(error: &io::Error) -> Absence {
    debug!("a debug file cannot be stored: {error}");
    Absence::NotStored
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        fs,
        io::{BufRead as _, BufReader, Read as _, Write as _},
        net::{TcpListener, TcpStream},
        os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
        path::Path,
        sync::atomic::AtomicUsize,
    };

    use super::*;

    /// So long a test waits for what happens at once.
    const GUARD: Duration = Duration::from_secs(60);

    /// A folder of a test's own, removed with it.
    pub(in crate::symbolize) struct Scratch(pub(in crate::symbolize) PathBuf);

    impl Scratch {
        pub(in crate::symbolize) fn new(test: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("debuginfod-{}-{test}", std::process::id()));
            // It may not exist yet.
            let _ = fs::remove_dir_all(&folder);
            fs::DirBuilder::new().mode(0o700).create(&folder).expect("a folder");
            Self(folder)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).expect("the folder");
            let mut names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name().into_string()).collect();
            names.sort();
            names.into_iter().map(|name| name.expect("a name")).collect()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A server that does with each request, whose head is given, what the test says.
    pub(in crate::symbolize) struct FakeServer {
        url: ServerUrl,
        pub(in crate::symbolize) requests: Arc<AtomicUsize>,
    }

    impl FakeServer {
        pub(in crate::symbolize) fn start(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let url = format!("http://{}/", listener.local_addr().expect("an address")).parse().expect("a URL");
            let requests = Arc::new(AtomicUsize::new(0));
            let (counted, answer) = (Arc::clone(&requests), Arc::new(answer));
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let (mut stream, answer) = (stream.expect("a connection"), Arc::clone(&answer));
                    counted.fetch_add(1, Ordering::Relaxed);
                    thread::spawn(move || {
                        let mut lines = BufReader::new(stream.try_clone().expect("a connection")).lines();
                        let line = || lines.next()?.ok().filter(|line| !line.is_empty());
                        let head: Vec<_> = std::iter::from_fn(line).collect();
                        answer(&head.join("\n"), &mut stream);
                    });
                }
            });
            Self { url, requests }
        }

        /// One that sends these bytes, whatever it is asked.
        pub(in crate::symbolize) fn that_sends(bytes: Vec<u8>) -> Self {
            // (The client may hang up first.)
            Self::start(move |_, stream| drop(stream.write_all(&bytes)))
        }

        pub(in crate::symbolize) fn settings(&self, scratch: &Scratch) -> Settings {
            Settings {
                urls: vec![self.url.clone()],
                cache_folder: scratch.0.clone(),
                cache_bytes: 1 << 20,
                max_file_bytes: 64 << 10,
                timeout: GUARD,
            }
        }
    }

    pub(in crate::symbolize) fn id(number: u8) -> [u8; 20] {
        [number; 20]
    }

    /// The smallest ELF file that states a build ID, and is this long.
    pub(in crate::symbolize) fn elf(build_id: &[u8], len: usize) -> Vec<u8> {
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        let note_len = 16 + build_id.len() as u64;
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0\x01\0\0\0".to_vec();
        file.extend(words(&[0, 64, 0]));
        file.extend(b"\0\0\0\0\x40\0\x38\0\x01\0\x40\0\0\0\0\0");
        file.extend(words(&[4 | 4 << 32, 120, 0, 0, note_len, note_len, 4]));
        file.extend(b"\x04\0\0\0");
        file.extend((build_id.len() as u32).to_le_bytes());
        file.extend(b"\x03\0\0\0GNU\0");
        file.extend(build_id);
        file.resize(len.max(file.len()), 0);
        file
    }

    pub(in crate::symbolize) fn response(status: &str, body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    /// Asks, and asks again once there is an answer.
    fn settled(client: &Debuginfod, build_id: &[u8]) -> Answer {
        let first = client.debug_file(build_id);
        assert!(!matches!(first, Answer::Ready(_)), "nobody can have it yet");
        assert!(client.wait_until_settled(GUARD), "no outcome");
        client.debug_file(build_id)
    }

    fn check_absent(client: &Debuginfod, build_id: &[u8], expect: Absence) {
        match settled(client, build_id) {
            Answer::Absent(reason) => assert_eq!(reason, expect),
            answer => panic!("{answer:?} instead of {expect:?}"),
        }
    }

    /// A file is pending, then there; another client finds it on disk though the server is gone.
    #[test]
    fn files_are_fetched_once() {
        let scratch = Scratch::new("fetched");
        let server = FakeServer::start(|request, stream| {
            assert!(request.starts_with(&format!("GET /folder/buildid/{}/debuginfo HTTP/1.1", "07".repeat(20))));
            // What Python's `base64.b64encode(b"user:secret")` says.
            assert!(request.lines().any(|line| line.eq_ignore_ascii_case("authorization: Basic dXNlcjpzZWNyZXQ=")));
            drop(stream.write_all(&response("200 OK", &elf(&id(7), 3000))));
        });
        let folder = scratch.0.join("made/here");
        let url = server.url.to_string().replace("http://", "http://user:secret@") + "/folder/";
        let urls = vec![url.parse().expect("a URL")];
        let settings = Settings { urls, cache_folder: folder.clone(), ..server.settings(&scratch) };
        let client = Debuginfod::start(settings.clone()).expect("a client");
        assert!(matches!(client.debug_file(&id(7)), Answer::Pending));
        assert!(client.wait_until_settled(GUARD));
        let Answer::Ready(mut file) = client.debug_file(&id(7)) else { panic!("no file") };
        let mut contents = Vec::new();
        file.read_to_end(&mut contents).expect("a readable file");
        assert_eq!(contents, elf(&id(7), 3000));
        let stats = client.stats();
        assert_eq!((stats.requests, stats.bytes, stats.fetched, stats.disk_misses), (1, 3000, 1, 1));
        assert_eq!((stats.disk_hits, stats.pending, stats.cache_bytes), (1, 0, 4096));
        assert_eq!(fs::metadata(&folder).expect("the folder").permissions().mode() & 0o777, 0o700);
        drop(client);

        let gone = Settings { urls: vec!["http://127.0.0.1:9".parse().expect("a URL")], ..settings };
        let client = Debuginfod::start(gone).expect("a client");
        assert!(matches!(client.debug_file(&id(7)), Answer::Ready(_)));
        assert_eq!(server.requests.load(Ordering::Relaxed), 1);
    }

    /// Whatever a server does: a reason, nothing left on disk, and no second request for a while.
    #[test]
    fn faults_are_absences() {
        let gzip = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(bytes).expect("memory");
            encoder.finish().expect("memory")
        };
        let gzipped = |body: &[u8]| response("200 OK\r\nContent-Encoding: gzip", &gzip(body));
        let redirect = |to: &str| response(&format!("302 Found\r\nLocation: {to}"), b"");
        let good = response("200 OK", &elf(&id(1), 1000));
        let endless = [b"HTTP/1.1 200 OK\r\n\r\n", &elf(&id(1), 1 << 20)[..]].concat();
        let faults = [
            ("not found", response("404 Not Found", b"no"), Absence::NotFound),
            ("an error page", response("500 Internal Server Error", b"<html>"), Absence::ServerError),
            ("a page", response("200 OK", b"<html>please log in</html>"), Absence::NotTheFile),
            ("nothing", response("200 OK", b""), Absence::NotTheFile),
            ("another file", response("200 OK", &elf(&id(2), 1000)), Absence::NotTheFile),
            ("no HTTP", b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec(), Absence::ServerError),
            ("a hang-up", Vec::new(), Absence::Unreachable),
            ("half a file", good[..good.len() / 2].to_vec(), Absence::Unreachable),
            ("too much, announced", response("200 OK", &elf(&id(1), 1 << 20)), Absence::TooLarge),
            ("too much", endless, Absence::TooLarge),
            ("too much, compressed", gzipped(&elf(&id(1), 64 << 20)), Absence::TooLarge),
            ("broken compression", response("200 OK\r\nContent-Encoding: gzip", b"\x1f\x8bxyz"), Absence::ServerError),
            ("more than it would take", response("406 Not Acceptable", b""), Absence::TooLarge),
            ("a local file", redirect("file:///etc/passwd"), Absence::ServerError),
            ("another protocol", redirect("ftp://127.0.0.1/"), Absence::ServerError),
            ("a ring", redirect("/again"), Absence::ServerError),
        ];
        for (what, bytes, expect) in faults {
            println!("{what}");
            let scratch = Scratch::new("fault");
            let server = FakeServer::that_sends(bytes);
            let client = Debuginfod::start(server.settings(&scratch)).expect("a client");
            check_absent(&client, &id(1), expect);
            assert_eq!(scratch.names(), Vec::<String>::new(), "{what}");
            let stats = client.stats();
            assert_eq!((stats.requests, stats.failures[expect as usize], stats.fetched), (1, 1, 0), "{what}");
        }
        let scratch = Scratch::new("compressed");
        let server = FakeServer::that_sends(gzipped(&elf(&id(1), 1000)));
        let client = Debuginfod::start(server.settings(&scratch)).expect("a client");
        assert!(matches!(settled(&client, &id(1)), Answer::Ready(_)));
    }

    /// Servers that hang, or send a byte now and then, are given up, and asking them blocks nobody.
    #[test]
    fn slow_servers_are_given_up() {
        let hang: fn(&str, &mut TcpStream) = |_, _| thread::sleep(GUARD);
        let trickle: fn(&str, &mut TcpStream) = |_, stream| {
            for byte in response("200 OK", &elf(&id(1), 60_000)) {
                thread::sleep(Duration::from_millis(20));
                if stream.write_all(&[byte]).is_err() {
                    return;
                }
            }
        };
        for behaviour in [hang, trickle] {
            let scratch = Scratch::new("slow");
            let server = FakeServer::start(behaviour);
            let settings = Settings { timeout: Duration::from_millis(500), ..server.settings(&scratch) };
            let client = Debuginfod::start(settings).expect("a client");
            check_absent(&client, &id(1), Absence::TimedOut);
            assert_eq!(scratch.names(), Vec::<String>::new());
        }
    }

    /// More questions than a server answers: all are pending, and few of them are kept.
    #[test]
    fn the_queue_is_bounded() {
        let scratch = Scratch::new("queue");
        let server = FakeServer::start(|_, _| thread::sleep(GUARD));
        let client = Debuginfod::start(server.settings(&scratch)).expect("a client");
        for number in 0..1000u32 {
            let build_id = [&number.to_le_bytes()[..], &[1; 16]].concat();
            assert!(matches!(client.debug_file(&build_id), Answer::Pending));
        }
        assert!(client.stats().pending <= MAX_WAITING + 1);
    }

    /// What is remembered is bounded, and what waits is not forgotten.
    #[test]
    fn memory_is_bounded() {
        let mut state = State::default();
        let build_id = |number: u32| BuildId::new(&[number.to_le_bytes(), [0; 4]].concat()).expect("eight bytes");
        state.want(build_id(0));
        for number in 1..2 * MAX_REMEMBERED as u32 {
            state.want(build_id(number));
            state.settle(build_id(number), Err(Absence::NotFound));
            state.queue.pop_back();
        }
        assert_eq!(state.asked.len(), MAX_REMEMBERED);
        assert!(matches!(state.asked.get(&build_id(0)), Some(Asked::Waiting { .. })));
        assert_eq!(state.stats.pending, 1);
    }

    /// After three failures in a row a server is not asked; the next one in order is.
    #[test]
    fn failing_servers_are_left_alone() {
        let scratch = Scratch::new("left-alone");
        let broken = FakeServer::that_sends(response("503 Service Unavailable", b""));
        let empty = FakeServer::that_sends(response("404 Not Found", b""));
        let client = Debuginfod::start(broken.settings(&scratch)).expect("a client");
        for number in 0..3 {
            check_absent(&client, &id(number), Absence::ServerError);
        }
        check_absent(&client, &id(3), Absence::LeftAlone);
        assert_eq!(broken.requests.load(Ordering::Relaxed), 3);

        let urls = vec![broken.url.clone(), empty.url.clone()];
        let client = Debuginfod::start(Settings { urls, ..broken.settings(&scratch) }).expect("a client");
        for number in 0..3 {
            // What may pass is told, not that the other server has nothing.
            check_absent(&client, &id(number), Absence::ServerError);
        }
        check_absent(&client, &id(3), Absence::LeftAlone);
        assert_eq!((broken.requests.load(Ordering::Relaxed), empty.requests.load(Ordering::Relaxed)), (6, 4));
    }

    /// Servers are asked in order until one has the file.
    #[test]
    fn servers_are_asked_in_order() {
        let scratch = Scratch::new("order");
        let empty = FakeServer::that_sends(response("404 Not Found", b""));
        let full = FakeServer::that_sends(response("200 OK", &elf(&id(1), 1000)));
        let behind = format!("http://user:secret@{}/folder/", full.url.to_string().trim_start_matches("http://"));
        let redirecting = FakeServer::that_sends(response(&format!("302 Found\r\nLocation: {behind}"), b""));
        let urls = vec![empty.url.clone(), redirecting.url.clone(), empty.url.clone()];
        let client = Debuginfod::start(Settings { urls, ..empty.settings(&scratch) }).expect("a client");
        assert!(matches!(settled(&client, &id(1)), Answer::Ready(_)));
        assert_eq!((empty.requests.load(Ordering::Relaxed), full.requests.load(Ordering::Relaxed)), (1, 1));
    }

    /// The folder keeps within its limit; what was used last stays; what was evicted is not fetched at once again.
    #[test]
    fn the_least_recently_used_file_is_evicted() {
        let scratch = Scratch::new("evicted");
        let server = FakeServer::start(|request, stream| {
            let number = u8::from_str_radix(&request["GET /buildid/".len()..][..2], 16).expect("a build ID");
            drop(stream.write_all(&response("200 OK", &elf(&id(number), 4096))));
        });
        let settings = Settings { cache_bytes: 3 * 4096, ..server.settings(&scratch) };
        let client = Debuginfod::start(settings).expect("a client");
        for number in 1..=3 {
            assert!(matches!(settled(&client, &id(number)), Answer::Ready(_)));
        }
        assert!(matches!(client.debug_file(&id(1)), Answer::Ready(_)));
        assert!(matches!(settled(&client, &id(4)), Answer::Ready(_)));
        assert_eq!(scratch.names(), [1, 3, 4].map(|number| format!("{number:02x}").repeat(20)));
        let stats = client.stats();
        assert_eq!((stats.evicted, stats.cache_bytes), (1, 3 * 4096));
        assert!(matches!(client.debug_file(&id(2)), Answer::Absent(Absence::Evicted)));
    }

    /// What others left in the folder: garbage, links and other files' contents are no answers; what a killed agent
    /// left is removed, and what one is receiving is not.
    #[test]
    fn the_folder_is_not_trusted() {
        let scratch = Scratch::new("folder");
        let server = FakeServer::that_sends(response("404 Not Found", b""));
        let path = |number: u8| scratch.0.join(format!("{number:02x}").repeat(20));
        fs::write(path(1), b"garbage").expect("a file");
        fs::write(path(2), elf(&id(9), 1000)).expect("a file");
        fs::write(scratch.0.join("real"), elf(&id(3), 1000)).expect("a file");
        std::os::unix::fs::symlink("real", path(3)).expect("a link");
        fs::create_dir(path(4)).expect("a folder");
        fs::write(scratch.0.join("incoming-1-1"), b"half a file").expect("a file");
        let other = DiskCache::open(&scratch.0, 1 << 20).expect("a cache");
        let receiving = other.receive().expect("a file");
        let client = Debuginfod::start(server.settings(&scratch)).expect("a client");
        for number in 1..=4 {
            check_absent(&client, &id(number), Absence::NotFound);
        }
        let names = scratch.names();
        assert!(names[1].starts_with(&format!("incoming-{}-", std::process::id())), "{names:?}");
        assert_eq!([&names[0], &names[2]], [&"04".repeat(20), "real"]);
        drop(receiving);
        assert_eq!(scratch.names().len(), 2);
    }

    /// A folder that others may use, or that cannot be made: an error that names it.
    #[test]
    fn unusable_folders_are_refused() {
        let scratch = Scratch::new("refused");
        let refused = |folder: &Path| {
            let error = DiskCache::open(folder, 1 << 20).expect_err("refused");
            assert!(error.to_string().contains(&*folder.to_string_lossy()), "{error}");
        };
        let open_to_all = scratch.0.join("open");
        fs::create_dir(&open_to_all).expect("a folder");
        fs::set_permissions(&open_to_all, fs::Permissions::from_mode(0o777)).expect("its owner");
        refused(&open_to_all);
        fs::write(scratch.0.join("file"), b"").expect("a file");
        refused(&scratch.0.join("file"));
        refused(&scratch.0.join("file/folder"));
        refused(Path::new("/proc/debuginfod"));
    }

    /// Build IDs that tell nothing apart, or are absurd, reach neither the disk nor a server.
    #[test]
    fn absurd_build_ids_are_not_asked_for() {
        let scratch = Scratch::new("absurd");
        let server = FakeServer::that_sends(response("404 Not Found", b""));
        let client = Debuginfod::start(server.settings(&scratch)).expect("a client");
        for build_id in [&[][..], &[1; 7], &[1; 65]] {
            assert!(matches!(client.debug_file(build_id), Answer::Absent(Absence::NoBuildId)));
        }
        assert_eq!(client.stats(), DebuginfodStats::default());
    }

    /// URLs are checked, and what may be secret in them is never shown.
    #[test]
    fn urls_are_checked_and_shown_without_secrets() {
        let url: ServerUrl = "https://user:secret@host:8002/folder/".parse().expect("a URL");
        assert_eq!(format!("{url} {url:?}"), "https://host:8002 https://host:8002");
        for text in [
            "",
            "secret",
            "secret@host",
            "ftp://secret@host",
            "https://",
            "https://host/?secret",
            "https://host/#secret",
            "https://secret host",
            "https://secret@",
        ] {
            let error = text.parse::<ServerUrl>().expect_err(text);
            assert!(!error.contains("secret") && error.contains("https://debuginfod.debian.net"), "{text}: {error}");
        }
    }
}

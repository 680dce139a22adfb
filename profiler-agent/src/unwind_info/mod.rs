//! Unwind tables: how the kernel program finds callers in code without frame pointers.
//!
//! In: executables whose tables samples have missed. Out: tables in the kernel's maps. Building takes up to a
//! fraction of a second of CPU time, so it has a thread of its own, which starts with what most samples miss.

mod build;
mod code;
mod dwarf;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod go;
mod store;
mod table;

use std::{
    collections::HashMap,
    hash::RandomState,
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use tracing::{debug, warn};

pub use self::store::{StoreStats, TableMaps};
use self::{
    build::{Built, Source},
    store::Store,
    table::Rules,
};
use crate::{
    allowance::{Allowance, thread_time},
    kernel::release_free_memory,
    profile::Executable,
};

/// Kernel memory for rows unless the operator says otherwise: some 16 million rows.
pub const DEFAULT_TABLE_BYTES: usize = 64 << 20;
/// Rows of a table whose building takes megabytes.
const LARGE: usize = 50_000;
/// Spreads small numbers over 64 bits: 2^64 divided by the golden ratio.
const UNIQUE: u64 = 0x9e37_79b9_7f4a_7c15;
/// How long the thread sleeps without being asked for anything.
const IDLE: Duration = Duration::from_secs(5);

/// How long it sleeps where it may not build anything now.
const NO_ALLOWANCE: Duration = Duration::from_millis(50);

/// Sizes and events, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableBuilderStats {
    /// What is in place.
    pub store: StoreStats,
    /// Tables built.
    pub built: u64,
    /// Rows built.
    pub rows_built: u64,
    /// Requests answered with a table of equal contents.
    pub shared: u64,
    /// Executables that say nothing about their frames.
    pub empty: u64,
    /// CPU time spent on it: reading files, building tables, writing them to the maps.
    pub build_time: Duration,
    /// Different rules.
    pub rules: usize,
}

/// What the thread was asked for and has not begun yet. An executable is in one of both at most.
#[derive(Default)]
struct Inbox {
    wanted: HashMap<u32, Arc<Executable>>,
    forgotten: Vec<u32>,
    stopped: bool,
    stats: TableBuilderStats,
}

type Shared = Arc<(Mutex<Inbox>, Condvar)>;

/// The thread that builds tables.
pub struct TableBuilder {
    inbox: Shared,
    thread: Option<JoinHandle<()>>,
}

impl TableBuilder {
    /// Starts the thread, which builds within an allowance. Rows take at most `budget` bytes of kernel memory.
    pub fn start(maps: impl TableMaps + Send + 'static, budget: usize, allowance: Arc<Allowance>) -> io::Result<Self> {
        let inbox = Shared::default();
        let worker = Worker {
            inbox: Arc::clone(&inbox),
            store: Store::new(maps, budget)?,
            rules: Rules::default(),
            hasher: RandomState::new(),
            stats: TableBuilderStats::default(),
            allowance,
        };
        let thread = thread::Builder::new().name("tables".to_owned()).spawn(move || worker.run())?;
        Ok(Self { inbox, thread: Some(thread) })
    }

    /// Asks for the table of an executable. There are no more requests than executables, so they are not
    /// limited here.
    pub fn want(&self, executable: Arc<Executable>) {
        let (inbox, wake) = &*self.inbox;
        inbox.lock().unwrap_or_else(PoisonError::into_inner).wanted.insert(executable.table, executable);
        wake.notify_one();
    }

    /// Says that nothing maps an executable any more, and its number may be used for another.
    pub fn forget(&self, table: u32) {
        let (inbox, wake) = &*self.inbox;
        let mut inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.wanted.remove(&table);
        inbox.forgotten.push(table);
        wake.notify_one();
    }

    /// Sizes and events so far.
    pub fn stats(&self) -> TableBuilderStats {
        self.inbox.0.lock().unwrap_or_else(PoisonError::into_inner).stats
    }
}

impl Drop for TableBuilder {
    fn drop(&mut self) {
        let (inbox, wake) = &*self.inbox;
        inbox.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
        wake.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that builds unwind tables panicked");
        }
    }
}

/// What the thread owns.
struct Worker<M> {
    inbox: Shared,
    store: Store<M>,
    rules: Rules,
    hasher: RandomState,
    stats: TableBuilderStats,
    allowance: Arc<Allowance>,
}

impl<M: TableMaps> Worker<M> {
    fn run(mut self) {
        if let Err(error) = self.store.prepare() {
            warn!("no room for unwind tables could be made: {error}");
        }
        while let Some((forgotten, wanted)) = self.next() {
            let outcome = self.work(&forgotten, wanted.as_deref());
            if let Err(error) = outcome {
                warn!("an unwind table could not be put in place: {error}");
                if let Some(executable) = wanted {
                    // Tried again in a while; where even that cannot be written there is nothing left to do.
                    let _ = self.store.refuse(executable.table, 0);
                }
            }
        }
    }

    /// Waits for something to do; `None`: stop.
    fn next(&mut self) -> Option<(Vec<u32>, Option<Arc<Executable>>)> {
        let shared = Arc::clone(&self.inbox);
        let (inbox, wake) = &*shared;
        let mut inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
        self.stats.store = self.store.stats();
        self.stats.rules = self.rules.all().len();
        inbox.stats = self.stats;
        let may_build = self.allowance.is_open();
        if (inbox.wanted.is_empty() || !may_build) && inbox.forgotten.is_empty() && !inbox.stopped {
            let pause = if inbox.wanted.is_empty() { IDLE } else { NO_ALLOWANCE };
            inbox = wake.wait_timeout(inbox, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
        if inbox.stopped {
            return None;
        }
        let wanted = inbox.wanted.keys().copied().filter(|_| may_build);
        let first = self.store.most_missed(wanted);
        let wanted = first.and_then(|first| inbox.wanted.remove(&first));
        Some((std::mem::take(&mut inbox.forgotten), wanted))
    }

    fn work(&mut self, forgotten: &[u32], wanted: Option<&Executable>) -> io::Result<()> {
        self.store.forget(forgotten)?;
        self.store.look()?;
        self.store.prepare()?;
        let Some(executable) = wanted else { return Ok(()) };
        self.store.begin(executable.table)?;
        let (time_before, rows_before) = (thread_time(), self.stats.rows_built);
        let outcome = self.provide(executable);
        let time = thread_time().saturating_sub(time_before);
        self.allowance.take(time);
        self.stats.build_time += time;
        debug!(
            "unwind table of {}: {} rows built in {:.1} ms of CPU time",
            executable.path,
            self.stats.rows_built - rows_before,
            time.as_secs_f64() * 1e3
        );
        outcome
    }

    /// Puts a table in place for an executable, or notes why there is none.
    fn provide(&mut self, executable: &Executable) -> io::Result<()> {
        let Some(source) = Source::read(executable) else {
            self.stats.empty += 1;
            return self.store.set_none(executable.table);
        };
        let fingerprint = source.fingerprint(&self.hasher);
        if self.store.share(fingerprint, executable.table)? {
            self.stats.shared += 1;
            return Ok(());
        }
        let built = source.build(&mut self.rules, self.store.max_rows());
        match built {
            Ok(Some(Built { table, is_guessed })) => {
                // What was guessed depends on code that is not in the fingerprint: it is not shared.
                let unique = if is_guessed { u64::from(executable.id.0).wrapping_add(1) } else { 0 };
                let fingerprint = fingerprint ^ unique.wrapping_mul(UNIQUE);
                self.stats.built += 1;
                self.stats.rows_built += table.rows.len() as u64;
                let placed = self.store.insert(fingerprint, executable.table, &table, self.rules.all());
                if table.rows.len() >= LARGE {
                    drop(table);
                    release_free_memory();
                }
                placed
            }
            Ok(None) => {
                self.stats.empty += 1;
                self.store.set_none(executable.table)
            }
            Err(reason) => {
                debug!("no unwind table of {}: too many {reason:?}", executable.path);
                self.store.refuse(executable.table, self.store.max_rows())
            }
        }
    }
}

//! What became of what a destination was to get.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{
    export::otlp::client::Reason,
    profile::Tally,
    status::{Amount, Count},
};

/// Why a destination never gets something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The receiver refused it for good.
    Refused,
    /// It waited in memory, and newer ones needed the room.
    QueueFull,
    /// It waited in the spool, and newer ones needed the room.
    SpoolFull,
    /// It waited for too long.
    TooOld,
    /// What the spool held of it is not what was written.
    Damaged,
    /// It could not be written: files only.
    NotWritten,
    /// The agent ended, and it was nowhere but in memory.
    Shutdown,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Refused,
        Self::QueueFull,
        Self::SpoolFull,
        Self::TooOld,
        Self::Damaged,
        Self::NotWritten,
        Self::Shutdown,
    ];

    /// Its name in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::QueueFull => "queue_full",
            Self::SpoolFull => "spool_full",
            Self::TooOld => "too_old",
            Self::Damaged => "damaged",
            Self::NotWritten => "not_written",
            Self::Shutdown => "shutdown",
        }
    }
}

/// What waits for a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Requests.
    pub requests: u64,
    /// Their bytes, as they are kept.
    pub bytes: u64,
    /// How much they stand for.
    pub tally: Tally,
}

/// Upper limits of the buckets in which answers are counted by how long they took, seconds.
pub const LATENCY_BUCKETS: [f64; 7] = [0.005, 0.025, 0.1, 0.5, 2.5, 10.0, f64::INFINITY];

/// Everything that is counted about one destination.
#[derive(Debug)]
pub struct DestinationStats {
    /// The destination's name.
    pub name: String,
    /// What it accepted.
    pub exported: Amount,
    /// Requests that it accepted.
    pub requests: Count,
    /// Their bytes, before compression.
    pub bytes: Count,
    /// Their bytes as they were sent: compressed.
    pub wire_bytes: Count,
    /// Requests that were sent again.
    pub retries: Count,
    /// Profiles that it rejected while it accepted the rest of their request.
    pub profiles_rejected: Count,
    /// What was written to the spool.
    pub spooled: Amount,
    /// What an earlier run had left in the spool.
    pub recovered: Amount,
    /// Times that something could not be written to the spool.
    pub spool_failures: Count,
    failures: [Count; Reason::ALL.len()],
    dropped: [Amount; DropReason::ALL.len()],
    latency: [Count; LATENCY_BUCKETS.len()],
    latency_ns: Count,
    in_memory: Mutex<Waiting>,
    in_spool: Mutex<Waiting>,
    /// When the window of the oldest that waits was closed, seconds since 1970; zero: nothing waits.
    oldest: AtomicU64,
}

impl DestinationStats {
    /// Nothing has happened yet.
    pub fn new(name: String) -> Self {
        Self {
            name,
            exported: Amount::default(),
            requests: Count::default(),
            bytes: Count::default(),
            wire_bytes: Count::default(),
            retries: Count::default(),
            profiles_rejected: Count::default(),
            spooled: Amount::default(),
            recovered: Amount::default(),
            spool_failures: Count::default(),
            failures: Default::default(),
            dropped: Default::default(),
            latency: Default::default(),
            latency_ns: Count::default(),
            in_memory: Mutex::default(),
            in_spool: Mutex::default(),
            oldest: AtomicU64::new(0),
        }
    }

    /// Counts what will never be delivered.
    pub fn lose(&self, reason: DropReason, tally: Tally) {
        self.dropped[reason as usize].add(tally);
    }

    /// What will never be delivered, by reason.
    pub fn dropped(&self) -> [(DropReason, Tally); DropReason::ALL.len()] {
        DropReason::ALL.map(|reason| (reason, self.dropped[reason as usize].get()))
    }

    /// All of what will never be delivered.
    pub fn dropped_in_all(&self) -> Tally {
        self.dropped.iter().map(Amount::get).sum()
    }

    /// Counts an attempt that failed.
    pub fn fail(&self, reason: Reason) {
        self.failures[reason as usize].add(1);
    }

    /// Attempts that failed, by reason.
    pub fn failures(&self) -> [(Reason, u64); Reason::ALL.len()] {
        Reason::ALL.map(|reason| (reason, self.failures[reason as usize].get()))
    }

    /// Counts how long the receiver took to answer.
    pub fn answered_within(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(bucket) = LATENCY_BUCKETS.iter().position(|&limit| seconds <= limit) {
            self.latency[bucket].add(1);
        }
        self.latency_ns.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Answers by the bucket of how long they took, each bucket on its own, and the time of all in seconds.
    pub fn latency(&self) -> ([u64; LATENCY_BUCKETS.len()], f64) {
        (self.latency.each_ref().map(Count::get), self.latency_ns.get() as f64 / 1e9)
    }

    /// Notes what waits in memory.
    pub fn set_in_memory(&self, waiting: Waiting) {
        *self.in_memory.lock().unwrap_or_else(PoisonError::into_inner) = waiting;
    }

    /// Notes what waits in the spool.
    pub fn set_in_spool(&self, waiting: Waiting) {
        *self.in_spool.lock().unwrap_or_else(PoisonError::into_inner) = waiting;
    }

    /// What waits in memory, and in the spool.
    pub fn waiting(&self) -> [Waiting; 2] {
        [&self.in_memory, &self.in_spool].map(|waiting| *waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes when the window of the oldest that waits was closed.
    pub fn set_oldest(&self, closed: Option<SystemTime>) {
        let seconds = closed.and_then(|closed| closed.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.oldest.store(seconds.map_or(0, |since| since.as_secs()), Ordering::Relaxed);
    }

    /// How long the oldest has been waiting.
    pub fn oldest_age(&self) -> Duration {
        match self.oldest.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            seconds => SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
                .unwrap_or_default(),
        }
    }
}

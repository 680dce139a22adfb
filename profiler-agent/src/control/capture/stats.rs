//! What is counted about captures.

use std::sync::{Mutex, PoisonError};

use super::{
    limits::{Limits, Refusal},
    rules::WatchStats,
};
use crate::status::Count;

/// How a capture ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It had its time.
    Time,
    /// It cost too much.
    Budget,
    /// Somebody has stopped collection.
    Stopped,
    /// The configuration has changed.
    Configuration,
    /// The agent has ended.
    Shutdown,
    /// It could not begin, or go on.
    Failed,
}

impl Ended {
    /// Every way.
    pub const ALL: [Self; 6] =
        [Self::Time, Self::Budget, Self::Stopped, Self::Configuration, Self::Shutdown, Self::Failed];

    /// The way in words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Budget => "budget",
            Self::Stopped => "stopped",
            Self::Configuration => "configuration",
            Self::Shutdown => "shutdown",
            Self::Failed => "failed",
        }
    }
}

/// Counts of captures, for metrics.
#[derive(Debug)]
pub struct CaptureStats {
    ended: [Count; Ended::ALL.len()],
    decided: Mutex<(u64, [(Refusal, u64); Refusal::ALL.len()])>,
    watch: Mutex<WatchStats>,
}

impl Default for CaptureStats {
    fn default() -> Self {
        Self {
            ended: Default::default(),
            decided: Mutex::new((0, Refusal::ALL.map(|refusal| (refusal, 0)))),
            watch: Mutex::default(),
        }
    }
}

impl CaptureStats {
    /// Captures that have ended, by how.
    pub fn ended(&self) -> [(Ended, u64); Ended::ALL.len()] {
        Ended::ALL.map(|ended| (ended, self.ended[ended as usize].get()))
    }

    pub(super) fn add_ended(&self, ended: Ended) {
        self.ended[ended as usize].add(1);
    }

    /// Captures that were admitted, and those that were refused, by reason.
    pub fn decided(&self) -> (u64, [(Refusal, u64); Refusal::ALL.len()]) {
        *self.decided.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_decided(&self, limits: &Limits) {
        *self.decided.lock().unwrap_or_else(PoisonError::into_inner) = (limits.admitted(), limits.refused());
    }

    /// How many containers are watched.
    pub fn watched(&self) -> WatchStats {
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_watched(&self, watch: WatchStats) {
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = watch;
    }
}

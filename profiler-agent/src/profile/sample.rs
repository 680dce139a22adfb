//! What exporters get: the named samples of one window.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use profiler_common::abi::sample::{EventKind, StackEnd};

use super::{Events, Frame, ProcessInfo, Tally};

/// One row of a profile.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The process.
    pub process: Arc<ProcessInfo>,
    /// Command name of the thread.
    pub thread_name: Arc<str>,
    /// What was measured.
    pub kind: EventKind,
    /// Why the stack ends.
    pub end: StackEnd,
    /// Frames, leaf first.
    pub frames: Vec<Arc<Frame>>,
    /// How many samples this stands for; of waits, how many.
    pub count: u64,
    /// Time off the CPU, nanoseconds; zero for samples of CPU time.
    pub time_ns: u64,
}

impl Sample {
    /// How much it stands for.
    pub fn tally(&self) -> Tally {
        Tally::of(self.kind, self.count, self.time_ns)
    }
}

/// The samples of one window.
#[derive(Clone, Debug)]
pub struct Profile {
    /// What was recorded.
    pub events: Events,
    /// When the window opened.
    pub start: SystemTime,
    /// How long it was open.
    pub duration: Duration,
    /// CPU time that one sample of CPU time stands for.
    pub period: Duration,
    /// The rows, each a distinct combination of process, thread name and stack.
    pub samples: Vec<Sample>,
}

impl Profile {
    /// How much the rows stand for together.
    pub fn total(&self) -> Tally {
        self.samples.iter().map(Sample::tally).sum()
    }
}

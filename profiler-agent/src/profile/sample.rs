//! What exporters get: the named samples of one window.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use profiler_common::abi::sample::{EventKind, StackEnd};

use super::{Frame, ProcessInfo};

/// One row of a profile.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The process.
    pub process: Arc<ProcessInfo>,
    /// Command name of the thread.
    pub thread_name: Arc<str>,
    /// Why the stack ends.
    pub end: StackEnd,
    /// Frames, leaf first.
    pub frames: Vec<Arc<Frame>>,
    /// How many samples this stands for.
    pub count: u64,
}

/// The samples of one window.
#[derive(Clone, Debug)]
pub struct Profile {
    /// What was measured.
    pub kind: EventKind,
    /// When the window opened.
    pub start: SystemTime,
    /// How long it was open.
    pub duration: Duration,
    /// CPU time that one sample stands for.
    pub period: Duration,
    /// The rows, each a distinct combination of process, thread name and stack.
    pub samples: Vec<Sample>,
}

impl Profile {
    /// How many samples the rows stand for together.
    pub fn total(&self) -> u64 {
        self.samples.iter().map(|sample| sample.count).sum()
    }
}

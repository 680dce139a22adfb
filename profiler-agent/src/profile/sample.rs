//! What exporters get: the named samples of one window.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use profiler_common::abi::sample::{EventKind, StackEnd};

use super::{Events, Frame, Mark, ProcessInfo, Resource, Tally};

/// What stands in the place of a [`Resource`] until it is known whose sample it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unlabelled;

/// One row of a profile.
#[derive(Clone, Debug)]
pub struct Sample<R = Arc<Resource>> {
    /// Whose it is.
    pub resource: R,
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

impl<R> Sample<R> {
    /// How much it stands for.
    pub fn tally(&self) -> Tally {
        Tally::of(self.kind, self.count, self.time_ns)
    }
}

/// The samples of one window.
#[derive(Clone, Debug)]
pub struct Profile<R = Arc<Resource>> {
    /// What was recorded.
    pub events: Events,
    /// When the window opened.
    pub start: SystemTime,
    /// How long it was open.
    pub duration: Duration,
    /// CPU time that one sample of CPU time stands for.
    pub period: Duration,
    /// What is unusual about how it was collected.
    pub marks: Arc<[Mark]>,
    /// The rows, each a distinct combination of process, thread name and stack.
    pub samples: Vec<Sample<R>>,
}

impl<R> Profile<R> {
    /// How much the rows stand for together.
    pub fn total(&self) -> Tally {
        self.samples.iter().map(Sample::tally).sum()
    }
}

impl Profile<Unlabelled> {
    /// Says of each row whose it is.
    pub fn label(self, mut resource: impl FnMut(&Arc<ProcessInfo>) -> Arc<Resource>) -> Profile {
        let samples = self.samples.into_iter().map(|sample| Sample {
            resource: resource(&sample.process),
            process: sample.process,
            thread_name: sample.thread_name,
            kind: sample.kind,
            end: sample.end,
            frames: sample.frames,
            count: sample.count,
            time_ns: sample.time_ns,
        });
        Profile {
            samples: samples.collect(),
            events: self.events,
            start: self.start,
            duration: self.duration,
            period: self.period,
            marks: self.marks,
        }
    }
}

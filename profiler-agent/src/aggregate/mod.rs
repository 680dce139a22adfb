//! Collects named samples into the profile of one window.

use std::{
    cmp::Reverse,
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use profiler_common::abi::sample::{EventKind, StackEnd};

use crate::profile::{Events, Frame, LocatedSample, Mark, ProcessInfo, Profile, Sample, Unlabelled};

/// Bytes of rows, estimated, after which a window is closed early, so that its memory stays bounded.
const MAX_BYTES: usize = 24 << 20;
/// Estimated bytes of a row besides its frames.
const ROW_BYTES: usize = 128;

#[derive(PartialEq, Eq, Hash)]
struct RowKey {
    process: Arc<ProcessInfo>,
    thread_name: Arc<str>,
    kind: EventKind,
    end: StackEnd,
    frames: Vec<Arc<Frame>>,
}

/// One window under construction.
pub struct Window {
    events: Events,
    period: Duration,
    marks: Arc<[Mark]>,
    start: SystemTime,
    opened: Instant,
    /// Samples or waits, and nanoseconds off the CPU.
    rows: HashMap<RowKey, (u64, u64)>,
    bytes: usize,
}

impl Window {
    /// Opens a window now.
    pub fn open(events: Events, period: Duration, marks: Arc<[Mark]>) -> Self {
        Self { events, period, marks, start: SystemTime::now(), opened: Instant::now(), rows: HashMap::new(), bytes: 0 }
    }

    /// Adds a sample with its named frames.
    pub fn add(&mut self, sample: &LocatedSample, frames: Vec<Arc<Frame>>) {
        let key = RowKey {
            process: Arc::clone(&sample.process),
            thread_name: Arc::clone(&sample.thread_name),
            kind: sample.kind,
            end: sample.end,
            frames,
        };
        match self.rows.entry(key) {
            Entry::Occupied(mut row) => {
                let (count, time_ns) = row.get_mut();
                *count = count.saturating_add(sample.count);
                *time_ns = time_ns.saturating_add(sample.time_ns);
            }
            Entry::Vacant(row) => {
                self.bytes += ROW_BYTES + row.key().frames.len() * size_of::<Arc<Frame>>();
                row.insert((sample.count, sample.time_ns));
            }
        }
    }

    /// Whether it should be closed now, whatever its time.
    pub fn is_full(&self) -> bool {
        self.bytes >= MAX_BYTES
    }

    /// Whether nothing was added to it.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Closes the window and opens the next one.
    pub fn close(&mut self) -> Profile<Unlabelled> {
        let start = std::mem::replace(&mut self.start, SystemTime::now());
        // (The wall clock may be set while the window is open.)
        let opened = std::mem::replace(&mut self.opened, Instant::now());
        self.bytes = 0;
        let mut samples: Vec<Sample<Unlabelled>> = std::mem::take(&mut self.rows)
            .into_iter()
            .map(|(key, (count, time_ns))| Sample {
                resource: Unlabelled,
                process: key.process,
                thread_name: key.thread_name,
                kind: key.kind,
                end: key.end,
                frames: key.frames,
                count,
                time_ns,
            })
            .collect();
        // The heaviest first; what weighs the same in a stable order.
        let weight = |sample: &Sample<Unlabelled>| (sample.kind, Reverse((sample.time_ns, sample.count)));
        samples.sort_by(|a, b| weight(a).cmp(&weight(b)).then_with(|| a.process.key.cmp(&b.process.key)));
        Profile {
            events: self.events,
            start,
            duration: self.opened.duration_since(opened),
            period: self.period,
            marks: Arc::clone(&self.marks),
            samples,
        }
    }
}

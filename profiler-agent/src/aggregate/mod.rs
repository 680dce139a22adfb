//! Collects named samples into the profile of one window.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use profiler_common::abi::sample::{EventKind, StackEnd};

use crate::profile::{Frame, LocatedSample, ProcessInfo, Profile, Sample};

/// Bytes of rows, estimated, after which a window is closed early, so that its memory stays bounded.
const MAX_BYTES: usize = 24 << 20;
/// Estimated bytes of a row besides its frames.
const ROW_BYTES: usize = 128;

#[derive(PartialEq, Eq, Hash)]
struct RowKey {
    process: Arc<ProcessInfo>,
    thread_name: Arc<str>,
    end: StackEnd,
    frames: Vec<Arc<Frame>>,
}

/// One window under construction.
pub struct Window {
    kind: EventKind,
    period: Duration,
    start: SystemTime,
    opened: Instant,
    rows: HashMap<RowKey, u64>,
    bytes: usize,
}

impl Window {
    /// Opens a window now.
    pub fn open(kind: EventKind, period: Duration) -> Self {
        Self { kind, period, start: SystemTime::now(), opened: Instant::now(), rows: HashMap::new(), bytes: 0 }
    }

    /// Adds a sample with its named frames.
    pub fn add(&mut self, sample: &LocatedSample, frames: Vec<Arc<Frame>>) {
        let key = RowKey {
            process: Arc::clone(&sample.process),
            thread_name: Arc::clone(&sample.thread_name),
            end: sample.end,
            frames,
        };
        match self.rows.entry(key) {
            Entry::Occupied(mut row) => *row.get_mut() += sample.count,
            Entry::Vacant(row) => {
                self.bytes += ROW_BYTES + row.key().frames.len() * size_of::<Arc<Frame>>();
                row.insert(sample.count);
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
    pub fn close(&mut self) -> Profile {
        let start = std::mem::replace(&mut self.start, SystemTime::now());
        // (The wall clock may be set while the window is open.)
        let opened = std::mem::replace(&mut self.opened, Instant::now());
        self.bytes = 0;
        let mut samples: Vec<Sample> = std::mem::take(&mut self.rows)
            .into_iter()
            .map(|(key, count)| Sample {
                process: key.process,
                thread_name: key.thread_name,
                end: key.end,
                frames: key.frames,
                count,
            })
            .collect();
        // The heaviest first; what weighs the same in a stable order.
        samples.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.process.key.cmp(&b.process.key)));
        Profile { kind: self.kind, start, duration: self.opened.duration_since(opened), period: self.period, samples }
    }
}

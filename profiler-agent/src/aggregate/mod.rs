//! Collects named samples into the profile of one window.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::{Duration, SystemTime},
};

use profiler_common::abi::sample::{EventKind, StackEnd};

use crate::profile::{Frame, LocatedSample, ProcessInfo, Profile, Sample};

/// Rows after which a window is closed early, so that its memory stays bounded.
pub const MAX_ROWS: usize = 200_000;

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
    rows: HashMap<RowKey, u64>,
}

impl Window {
    /// Opens a window now.
    pub fn open(kind: EventKind, period: Duration) -> Self {
        Self { kind, period, start: SystemTime::now(), rows: HashMap::new() }
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
                row.insert(sample.count);
            }
        }
    }

    /// Whether it should be closed now, whatever its time.
    pub fn is_full(&self) -> bool {
        self.rows.len() >= MAX_ROWS
    }

    /// Closes the window and opens the next one.
    pub fn close(&mut self) -> Profile {
        let end = SystemTime::now();
        let start = std::mem::replace(&mut self.start, end);
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
        Profile {
            kind: self.kind,
            start,
            duration: end.duration_since(start).unwrap_or_default(),
            period: self.period,
            samples,
        }
    }
}

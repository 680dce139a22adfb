//! A sample whose addresses were resolved to places in files, independent of the process that ran them.

use std::sync::Arc;

use profiler_common::abi::{
    process::ProcessKey,
    sample::{EventKind, StackEnd},
};

use super::{Cgroup, Executable, FileOffset, RuntimeCode, Tally};

/// Where a frame's code is.
#[derive(Clone, Debug)]
pub enum Location {
    /// An address in the kernel, already adjusted for lookup.
    Kernel(u64),
    /// A place in a file, already adjusted for lookup.
    File {
        /// The file.
        executable: Arc<Executable>,
        /// The place.
        offset: FileOffset,
    },
    /// Executable memory that no file backs: code made at run time.
    Anonymous {
        /// What its process says about it.
        code: Arc<RuntimeCode>,
        /// An address, already adjusted for lookup.
        address: u64,
    },
    /// No mapping is known at this address.
    Unmapped(u64),
}

/// The process a sample belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessInfo {
    /// Its identity.
    pub key: ProcessKey,
    /// Its name.
    pub name: String,
    /// The cgroup that its sampled thread was in; `None`: not known.
    pub cgroup: Option<Arc<Cgroup>>,
}

/// A sample with its frames located.
#[derive(Clone, Debug)]
pub struct LocatedSample {
    /// The process.
    pub process: Arc<ProcessInfo>,
    /// Command name of the thread.
    pub thread_name: Arc<str>,
    /// What was measured.
    pub kind: EventKind,
    /// Why the stack ends.
    pub end: StackEnd,
    /// Frames, leaf first, kernel before user.
    pub locations: Vec<Location>,
    /// How many samples this stands for; of waits, how many.
    pub count: u64,
    /// Time off the CPU, nanoseconds; zero for samples of CPU time.
    pub time_ns: u64,
}

impl LocatedSample {
    /// Places that no process was sampled at, to be named.
    pub fn of_locations(locations: Vec<Location>) -> Self {
        Self {
            process: Arc::new(ProcessInfo { key: ProcessKey::default(), name: String::new(), cgroup: None }),
            thread_name: "".into(),
            kind: EventKind::OnCpu,
            end: StackEnd::Root,
            locations,
            count: 0,
            time_ns: 0,
        }
    }

    /// Lets a wait stand for `factor` times as much.
    pub fn scale(&mut self, factor: f64) {
        if (factor - 1.0).abs() > f64::EPSILON {
            let scaled = |number: u64| (number as f64 * factor).round() as u64;
            (self.count, self.time_ns) = (scaled(self.count), scaled(self.time_ns));
        }
    }

    /// How much it stands for.
    pub fn tally(&self) -> Tally {
        Tally::of(self.kind, self.count, self.time_ns)
    }
}

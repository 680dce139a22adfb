//! What a profile measures, and how much of it there is.

use std::{fmt, iter::Sum, ops::AddAssign, time::Duration};

use clap::ValueEnum;
use profiler_common::abi::sample::EventKind;
use serde::{Deserialize, Serialize};

/// What is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Events {
    /// Where CPU time goes.
    OnCpu,
    /// Where threads wait, and for how long.
    OffCpu,
    /// Both.
    Both,
}

impl Events {
    /// Whether CPU time is recorded.
    pub const fn includes_on_cpu(self) -> bool {
        matches!(self, Self::OnCpu | Self::Both)
    }

    /// Whether waits are recorded.
    pub const fn includes_off_cpu(self) -> bool {
        matches!(self, Self::OffCpu | Self::Both)
    }
}

/// How much samples stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Samples of CPU time.
    pub samples: u64,
    /// Time off the CPU, nanoseconds.
    pub off_cpu_ns: u64,
}

impl Tally {
    /// What a sample of `kind` stands for.
    pub fn of(kind: EventKind, count: u64, time_ns: u64) -> Self {
        if kind.is_off_cpu() {
            Self { samples: 0, off_cpu_ns: time_ns }
        } else {
            Self { samples: count, off_cpu_ns: 0 }
        }
    }

    /// Time off the CPU.
    pub fn off_cpu(self) -> Duration {
        Duration::from_nanos(self.off_cpu_ns)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} samples", self.samples)?;
        if self.off_cpu_ns != 0 {
            write!(f, " and {:.3} s off the CPU", self.off_cpu().as_secs_f64())?;
        }
        Ok(())
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.samples = self.samples.saturating_add(other.samples);
        self.off_cpu_ns = self.off_cpu_ns.saturating_add(other.off_cpu_ns);
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), |mut sum, tally| {
            sum += tally;
            sum
        })
    }
}

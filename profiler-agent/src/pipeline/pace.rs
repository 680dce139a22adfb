//! How collection goes on at the moment: what the configuration wants, as far as the budget and the schedule let it.

use std::{sync::Arc, time::Duration};

use crate::{kernel::Following, profile::Mark, schedule::Replicas};

/// How closely a machine is looked at. It may change at any time; each profile is of one pace.
#[derive(Clone, Debug, PartialEq)]
pub struct Pace {
    /// Whether anything is sampled at all.
    pub collects: bool,
    /// Samples per second and CPU.
    pub frequency: u64,
    /// Stacks of waits that each CPU may take per second; zero: every wait's.
    pub wait_stacks: u32,
    /// One of 2^this waits is followed, of those that come too often; `None`: no wait is.
    pub wait_share: Option<u32>,
    /// What is seen stands for so many times as much: the schedule collects a part of the time.
    pub scale: f64,
    /// Replicas that take turns, and stand for so many times as much again.
    pub replicas: Option<Replicas>,
    /// Whether source lines and inlined functions are looked for, where they are asked for.
    pub detail: bool,
    /// Bytes for named frames and for symbols of files.
    pub names_bytes: usize,
    /// What readers of the profile have to know of all this.
    pub marks: Arc<[Mark]>,
}

impl Pace {
    /// CPU time that one sample stands for.
    pub(super) fn period(&self) -> Duration {
        let period = Duration::from_nanos(1_000_000_000 / self.frequency.max(1));
        Duration::try_from_secs_f64(period.as_secs_f64() * self.scale).unwrap_or(period)
    }

    /// How waits are followed.
    pub fn following(&self) -> Following {
        Following { stacks_per_second: self.wait_stacks, share: self.wait_share }
    }
}

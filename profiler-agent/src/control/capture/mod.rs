//! Captures: for a bounded time, one container is profiled in more detail, because of what it uses.
//!
//! In: what containers use ([`usage`] reads it from their cgroups). Out: what triggers a capture ([`rules`]), and whether it
//! may run now ([`limits`]). Who runs it is told what to capture and for how long, and decides nothing.

#[cfg(fuzzing)]
pub(crate) mod fuzzing;
pub mod limits;
pub mod rules;
pub mod usage;

use std::{sync::Arc, time::Duration};

use self::{rules::Rule, usage::Resource};
use crate::profile::Events;

/// How captures are triggered.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Time between two looks at what containers use.
    pub interval: Duration,
    /// What is admitted.
    pub limits: limits::Settings,
    /// What triggers; none: nothing has to be read.
    pub rules: Vec<Arc<Rule>>,
}

impl Settings {
    /// What has to be read of containers.
    pub fn resources(&self) -> Vec<Resource> {
        let of_rules = |resource: &Resource| self.rules.iter().any(|rule| rule.threshold.resource() == *resource);
        Resource::ALL.into_iter().filter(of_rules).collect()
    }
}

/// What is captured. What is not said is as in the daemon's own profiles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// How long.
    pub duration: Duration,
    /// Samples per second and CPU.
    pub frequency: Option<u64>,
    /// CPU time, waits, or both.
    pub events: Option<Events>,
    /// Whether source lines are looked for.
    pub lines: Option<bool>,
    /// Whether inlined functions are looked for.
    pub inlines: Option<bool>,
}

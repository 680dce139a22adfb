//! Captures: for a bounded time, one container is profiled in more detail, because of what it uses, or whatever somebody
//! asks for by hand.
//!
//! In: what containers use ([`usage`] reads it from their cgroups, as often as [`watching`] asks), and orders. Out: what
//! triggers a capture ([`rules`]), whether it may run now ([`limits`]), and captures that run ([`running`]).

#[cfg(fuzzing)]
pub(crate) mod fuzzing;
pub mod limits;
pub mod rules;
pub(super) mod running;
mod stats;
pub mod usage;
pub(super) mod watching;

use std::{sync::Arc, time::Duration};

pub use self::stats::{CaptureStats, Ended};
use self::{
    rules::{Rule, Trigger},
    usage::Resource,
};
use crate::{profile::Events, scope::Matcher};

/// What stands for a rule's name where somebody has asked by hand.
pub const BY_HAND: &str = "trigger";

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

/// A capture that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The rule that has fired, or [`BY_HAND`].
    pub rule: Box<str>,
    /// Of whom, as far as they are in the configuration's scope; `None`: of all of it.
    pub scope: Option<Matcher>,
    /// What.
    pub capture: Capture,
    /// Why.
    pub reason: Box<str>,
}

impl Order {
    /// Of whom, in words.
    pub fn subject(&self) -> String {
        let Some(scope) = &self.scope else { return "the whole machine".to_owned() };
        let pids = scope.pids.iter().map(|pid| format!("process {pid}"));
        let patterns = [
            ("executable", &scope.executables),
            ("cgroup", &scope.cgroups),
            ("container", &scope.containers),
            ("namespace", &scope.namespaces),
        ];
        let patterns = patterns
            .into_iter()
            .flat_map(|(field, patterns)| patterns.iter().map(move |pattern| format!("{field} {}", pattern.as_str())));
        let pairs = scope.pod_labels.iter().chain(&scope.pod_annotations);
        let pairs = pairs.map(|(name, value)| format!("pods of {name}={}", value.as_str()));
        pids.chain(patterns).chain(pairs).collect::<Vec<_>>().join(", ")
    }
}

impl From<&Trigger> for Order {
    fn from(trigger: &Trigger) -> Self {
        Self {
            rule: trigger.rule.name.clone(),
            scope: Some(Matcher { containers: vec![(&*trigger.container).into()], ..Matcher::default() }),
            capture: trigger.rule.capture.clone(),
            reason: trigger.reason.as_str().into(),
        }
    }
}

//! How much is done: what the configuration asks for, what the governor leaves of it, and what the pipeline is told.

use super::governor::{FILES_PART, Governor};
use crate::{
    config::Config,
    kernel,
    pipeline::Pace,
    profile::Mark,
    schedule::{NotAMember, Phase, Replicas, Schedule},
};

/// How closely the machine is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Samples per second and CPU.
    pub frequency: u64,
    /// Stacks of waits per second and CPU; zero: all.
    pub wait_stacks: u32,
    /// One of 2^this waits is followed, of those that come too often; `None`: no wait is, since the scheduler switches
    /// threads so often that to be called is too much.
    pub wait_share: Option<u32>,
    /// Whether source lines and inlined functions are looked for.
    pub detail: bool,
    /// Bytes for names.
    pub names_bytes: usize,
}

/// What the configuration asks for.
pub(super) fn wanted(config: &Config) -> Effort {
    Effort {
        frequency: config.frequency,
        wait_stacks: config.waits.stacks_per_second,
        wait_share: Some(0),
        detail: config.source.lines || config.source.inlines,
        names_bytes: config.names_bytes,
    }
}

/// A control loop for a configuration.
pub(super) fn governor(config: &Config) -> Governor {
    Governor::new(cpu_budget(config), config.budget.memory, wanted(config))
}

/// CPU seconds per second; the machine's, not the cgroup's.
fn cpu_budget(config: &Config) -> f64 {
    config.budget.cpu * kernel::online_cpus().map_or(1, |cpus| cpus.len()) as f64
}

/// CPU seconds per second for work that can wait.
pub(super) fn deferred_work(config: &Config) -> f64 {
    if config.budget.cpu >= 1.0 { f64::INFINITY } else { cpu_budget(config) * FILES_PART }
}

/// What the pipeline is told of it.
pub(super) fn pace(config: &Config, effort: &Effort, phase: &Phase, replicas: Option<Replicas>) -> Pace {
    let mut marks = Vec::new();
    let wanted = wanted(config);
    if *effort != (Effort { names_bytes: effort.names_bytes, ..wanted }) {
        marks.push(Mark { name: "profiler.limited_by", value: "budget".into() });
    }
    if effort.wait_share.is_none() && config.events.includes_off_cpu() {
        marks.push(Mark { name: "profiler.off_cpu", value: "suspended".into() });
    }
    if phase.scale > 1.0 {
        marks.push(Mark { name: "profiler.schedule.share", value: format!("{:.6}", 1.0 / phase.scale).into() });
    }
    if let Some(replicas) = replicas {
        marks.push(Mark { name: "profiler.schedule.replicas", value: format!("1/{}", replicas.scale()).into() });
    }
    Pace {
        collects: phase.collects,
        frequency: effort.frequency,
        wait_stacks: effort.wait_stacks,
        wait_share: effort.wait_share,
        scale: phase.scale,
        replicas,
        detail: effort.detail,
        names_bytes: effort.names_bytes,
        marks: marks.into(),
    }
}

/// What the governor has decided, for people.
pub(super) fn describe(effort: &Effort, wanted: &Effort, cost: f64, budget: f64) -> String {
    let mut text = format!("the budget allows {} Hz of {}", effort.frequency, wanted.frequency);
    if effort.wait_stacks != wanted.wait_stacks {
        text += &format!(", {} stacks of waits a second", effort.wait_stacks);
    }
    match effort.wait_share {
        Some(share) if effort.wait_share != wanted.wait_share => {
            text += &format!(", one of {} waits followed where they come too often", 1_u32 << share);
        }
        Some(_) => {}
        None => text += ", no waits: there are more switches between threads than can be followed",
    }
    if effort.detail != wanted.detail {
        text += ", no source lines or inlined functions";
    }
    if effort.names_bytes != wanted.names_bytes {
        text += &format!(", {} MiB of names", effort.names_bytes >> 20);
    }
    format!("{text} (cost {:.1} ms a second, budget {:.1})", cost * 1e3, budget * 1e3)
}

/// When this node collects.
pub(super) fn schedule(config: &Config) -> Result<Schedule, NotAMember> {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let node = config.kubernetes.as_ref().map_or(host, |kubernetes| kubernetes.node.clone());
    Schedule::new(&config.schedule, &node)
}

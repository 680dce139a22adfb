//! Whose turn it is among the replicas of a workload, and what their samples stand for.
//!
//! A pod whose turn it is not is out of scope, as if a rule excluded it; one that nobody knows yet is kept out until it is
//! known, since nobody knows either what its samples stand for. What is no replica is not touched.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use profiler_common::abi::scope::{ScopeControl, ScopeMatch};

use super::rules::{POD_BIT, PodOf};
use crate::{profile::CgroupId, schedule::Replicas};

/// The turns that replicas take, if they do.
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: Option<Taken>,
}

#[derive(Debug)]
struct Taken {
    replicas: Replicas,
    /// When somebody last looked at whose turn it is: what is new meanwhile has the same one.
    now: SystemTime,
    /// Cgroups of replicas. They stay what they are until they are gone, since their samples come later.
    members: HashSet<CgroupId>,
}

impl Turns {
    pub(super) fn new(replicas: Option<Replicas>, now: SystemTime) -> Self {
        Self { taken: replicas.map(|replicas| Taken { replicas, now, members: HashSet::new() }) }
    }

    pub(super) fn are_taken(&self) -> bool {
        self.taken.is_some()
    }

    /// How long they stay as they are; nothing: they have changed already.
    pub(super) fn time_left(&self, now: SystemTime) -> Option<Duration> {
        let taken = self.taken.as_ref()?;
        let is_over = !taken.replicas.is_same_turn(taken.now, now);
        Some(if is_over { Duration::ZERO } else { taken.replicas.time_left(now) })
    }

    /// The time is this.
    pub(super) fn go_on(&mut self, now: SystemTime) {
        if let Some(taken) = &mut self.taken {
            taken.now = now;
        }
    }

    /// The rules with one about turns.
    pub(super) fn control(&self, mut rules: ScopeControl) -> ScopeControl {
        if self.are_taken() {
            rules.exclude |= POD_BIT;
            rules.any_process |= POD_BIT;
            rules.unknown_when_made |= POD_BIT;
        }
        rules
    }

    /// What a cgroup meets besides the rules.
    pub(super) fn of_cgroup(&mut self, id: CgroupId, pod: PodOf<'_>, rules: ScopeMatch) -> ScopeMatch {
        let Some(taken) = &mut self.taken else { return rules };
        match pod {
            PodOf::None => rules,
            PodOf::Unknown => ScopeMatch { possible: rules.possible | POD_BIT, ..rules },
            PodOf::Known(pod) => {
                let Some(workload) = &pod.workload else { return rules };
                taken.members.insert(id);
                if taken.replicas.has_turn(workload, &pod.name, taken.now) {
                    return rules;
                }
                ScopeMatch { met: rules.met | POD_BIT, possible: rules.possible | POD_BIT }
            }
        }
    }

    pub(super) fn forget(&mut self, id: CgroupId) {
        if let Some(taken) = &mut self.taken {
            taken.members.remove(&id);
        }
    }

    /// What a sample stands for.
    pub(super) fn weight(&self, id: CgroupId) -> u64 {
        let member = self.taken.as_ref().filter(|taken| taken.members.contains(&id));
        member.map_or(1, |taken| taken.replicas.scale())
    }
}

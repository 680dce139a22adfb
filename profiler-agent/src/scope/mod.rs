//! Who is recorded: finds out which rules processes and cgroups meet, and tells the kernel programs, which decide.
//!
//! In: rules, whose turn it is, notices, the table of cgroups, and what is known of pods. Out: entries of the kernel's maps.
//! Whoever is new takes after its parent there, before anything is known of it here.

#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod proc_fs;
mod rules;
mod turns;

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use profiler_common::abi::{
    notice::{ForkNotice, NoticeHeader, NoticeKind},
    scope::{ScopeControl, ScopeMatch, Verdict, state},
};
use tracing::{debug, info, warn};
use zerocopy::FromBytes as _;

pub use self::rules::{MAX_CONFIGURED, Matcher, Rules};
use self::{
    rules::{Executable, PodOf},
    turns::Turns,
};
use crate::{
    profile::{Cgroup, CgroupId, PodFacts},
    schedule::Replicas,
};

/// Drains for which what is known of an exited process is kept: ending takes CPU time too.
const KEEP_EXITED: u64 = 2;
/// Drains between two looks at all processes: notices may have been lost.
const SWEEP_EVERY: u64 = 12;
/// Most processes of which something is remembered, besides what the kernel's map holds.
const MAX_KNOWN: usize = 32 << 10;
/// Times that a process's executable is looked at while it changes.
const MAX_LOOKS: usize = 3;

/// The kernel's maps. What is to be removed may be absent.
pub trait ScopeMaps {
    /// Sets the rules.
    fn set_control(&mut self, control: &ScopeControl) -> io::Result<()>;
    /// Sets which rules a cgroup meets.
    fn set_cgroup(&mut self, id: u64, matched: &ScopeMatch) -> io::Result<()>;
    /// It meets none.
    fn remove_cgroup(&mut self, id: u64) -> io::Result<()>;
    /// Cgroups that meet any.
    fn cgroups(&self) -> io::Result<Vec<u64>>;
    /// Sets which rules a process meets.
    fn set_process(&mut self, tgid: u32, matched: &ScopeMatch) -> io::Result<()>;
    /// Whether anything is said about a process.
    fn has_process(&self, tgid: u32) -> bool;
    /// It meets none.
    fn remove_process(&mut self, tgid: u32) -> io::Result<()>;
    /// Processes that meet any.
    fn processes(&self) -> io::Result<Vec<u32>>;
}

/// Who knows pods.
pub trait Pods: Send {
    /// A number that changes whenever an answer may.
    fn version(&self) -> u64;
    /// The pod of a cgroup, if it is known.
    fn of(&self, cgroup: &Cgroup) -> Option<PodFacts>;
}

/// Sizes and events, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScopeStats {
    /// Cgroups that rules are about.
    pub cgroups: usize,
    /// Processes that rules are about.
    pub processes: usize,
    /// Times that one of them found no room.
    pub refused: u64,
}

#[derive(Default)]
struct Process {
    matched: ScopeMatch,
    /// PIDs of rules that it is, or descends from.
    lineage: Vec<u32>,
    /// The drain before which it exited.
    ended: Option<u64>,
}

/// Keeps what the kernel programs know of the scope.
pub struct Scope<M> {
    maps: M,
    rules: Rules,
    turns: Turns,
    pods: Option<Box<dyn Pods>>,
    /// The pods by which cgroups were looked at last.
    pods_version: Option<u64>,
    /// As the kernel has it.
    control: ScopeControl,
    /// Those that meet any rule, as the kernel has them.
    cgroups: HashMap<CgroupId, ScopeMatch>,
    processes: HashMap<u32, Process>,
    generation: u64,
    refused: u64,
}

impl<M: ScopeMaps> Scope<M> {
    /// With rules that [`Self::apply`] puts into force.
    pub fn new(maps: M, rules: Rules, pods: Option<Box<dyn Pods>>) -> Self {
        Self {
            maps,
            rules,
            turns: Turns::default(),
            pods,
            pods_version: None,
            control: ScopeControl::default(),
            cgroups: HashMap::new(),
            processes: HashMap::new(),
            generation: 0,
            refused: 0,
        }
    }

    /// The rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Puts rules into force, for all that is there and all that comes. Until everybody has been looked at, nobody is in
    /// scope. `cgroups` are all that are known.
    pub fn apply(&mut self, rules: Rules, cgroups: impl Iterator<Item = Arc<Cgroup>>) {
        let next = self.turns.control(rules.control());
        // Bits mean something else then.
        if self.control.is_limited() || rules.are_strict() || self.turns.are_taken() {
            self.withhold();
            self.set_control(ScopeControl { state: state::CHANGING, ..next });
            let part = if rules.within.is_empty() { "" } else { ", of which a part is meant" };
            let turns = if self.turns.are_taken() { ", replicas take turns" } else { "" };
            info!("scope: {} rules include and {} exclude{part}{turns}", rules.include.len(), rules.exclude.len());
        } else {
            self.set_control(ScopeControl { state: state::OPEN, ..next });
        }
        self.rules = rules;
        self.look_at_cgroups(cgroups);
        self.look_at_processes();
        self.settle();
    }

    /// Decides nothing until rules are put into force again.
    pub fn withhold(&mut self) {
        self.set_control(ScopeControl { state: state::CHANGING, ..self.control });
    }

    /// Lets replicas take turns, or no more, once [`Self::apply`] is called. Until then their samples have no weight.
    pub fn set_turns(&mut self, replicas: Option<Replicas>, now: SystemTime) {
        self.turns = Turns::new(replicas, now);
    }

    /// How long turns stay as they are, if any are taken; nothing: they have changed already.
    pub fn turns_left(&self, now: SystemTime) -> Option<Duration> {
        self.turns.time_left(now)
    }

    /// Looks at whose turn it is.
    pub fn change_turns(&mut self, now: SystemTime, cgroups: impl Iterator<Item = Arc<Cgroup>>) {
        self.turns.go_on(now);
        self.look_at_cgroups(cgroups);
        self.settle();
    }

    /// What a sample of a cgroup stands for: replicas also stand for those whose turn it is not.
    pub fn weight(&self, cgroup: CgroupId) -> u64 {
        self.turns.weight(cgroup)
    }

    /// Takes note of cgroups that came, and of those that are gone for good.
    pub fn cgroups_changed(&mut self, appeared: &[Arc<Cgroup>], gone: &[CgroupId]) {
        if self.is_empty() {
            return;
        }
        for &id in gone {
            self.turns.forget(id);
            self.set_cgroup(id, ScopeMatch::default());
        }
        for cgroup in appeared {
            let matched = self.of_cgroup(cgroup);
            self.set_cgroup(cgroup.id, matched);
        }
        self.settle();
    }

    /// Looks at cgroups again if others of their pods are known now.
    pub fn follow_pods(&mut self, cgroups: impl Iterator<Item = Arc<Cgroup>>) {
        let version = self.pods.as_ref().map(|pods| pods.version());
        if version != self.pods_version {
            self.look_at_cgroups(cgroups);
            self.settle();
        }
    }

    /// Whether rules ask about pods, and somebody knows them.
    pub fn follows_pods(&self) -> bool {
        self.pods.is_some() && self.asks_about_pods()
    }

    /// Looks at all cgroups: something may have been missed.
    pub fn look_at_cgroups(&mut self, cgroups: impl Iterator<Item = Arc<Cgroup>>) {
        if self.is_empty() && self.cgroups.is_empty() {
            return;
        }
        // (Asked before: what changes meanwhile is looked at again.)
        self.pods_version = self.pods.as_ref().map(|pods| pods.version());
        let before = self.maps.cgroups().unwrap_or_default();
        let mut seen = HashSet::new();
        for cgroup in cgroups {
            seen.insert(cgroup.id);
            let matched = self.of_cgroup(&cgroup);
            // Those that meet no rule are many, and mostly have no entry.
            if matched != ScopeMatch::default() || self.cgroups.contains_key(&cgroup.id) {
                self.set_cgroup(cgroup.id, matched);
            } else {
                seen.remove(&cgroup.id);
            }
        }
        for id in before.into_iter().map(CgroupId).filter(|id| !seen.contains(id)) {
            self.set_cgroup(id, ScopeMatch::default());
        }
    }

    /// Looks at all processes: something may have been missed.
    pub fn look_at_processes(&mut self) {
        let before = self.maps.processes().unwrap_or_default();
        let mut seen = HashSet::new();
        if self.control.asks_about_processes() {
            let processes = proc_fs::processes();
            let mut lineages = proc_fs::lineages(&processes, &self.rules.pids());
            for tgid in processes {
                seen.insert(tgid);
                if self.processes.get(&tgid).is_some_and(|process| process.ended.is_some()) {
                    continue;
                }
                // Who has lost his parent since is still his child.
                let known = self.processes.remove(&tgid).map(|process| process.lineage).unwrap_or_default();
                let lineage = lineages.remove(&tgid).filter(|lineage| lineage.len() >= known.len()).unwrap_or(known);
                self.look_at_process(tgid, lineage);
            }
        }
        self.processes.retain(|tgid, process| seen.contains(tgid) || process.ended.is_some());
        for tgid in before.into_iter().filter(|tgid| !seen.contains(tgid)) {
            if !self.processes.contains_key(&tgid) {
                self.remove_process(tgid);
            }
        }
    }

    /// Takes note of what the kernel announced of processes.
    pub fn notice(&mut self, bytes: &[u8]) {
        // (What cannot be understood is counted by who keeps the processes.)
        let Ok((header, _)) = NoticeHeader::read_from_prefix(bytes) else { return };
        if !self.control.asks_about_processes() {
            return;
        }
        let tgid = header.process.tgid;
        match NoticeKind::try_from(header.kind) {
            Ok(NoticeKind::Fork) => {
                let Ok((notice, _)) = ForkNotice::read_from_prefix(bytes) else { return };
                let child = notice.child.tgid;
                let mut lineage = self.processes.get(&tgid).map(|parent| parent.lineage.clone()).unwrap_or_default();
                lineage.extend(self.rules.pids().contains(&child).then_some(child));
                self.processes.remove(&child);
                self.look_at_process(child, lineage);
            }
            Ok(NoticeKind::Exec) => {
                let lineage = self.processes.remove(&tgid).map(|process| process.lineage).unwrap_or_default();
                self.look_at_process(tgid, lineage);
            }
            Ok(NoticeKind::Exit) if self.processes.len() < MAX_KNOWN => {
                self.processes.entry(tgid).or_default().ended = Some(self.generation);
            }
            Ok(NoticeKind::Exit) => self.remove_process(tgid),
            _ => {}
        }
    }

    /// Ends a drain: forgets processes whose last samples have been read.
    pub fn end_drain(&mut self) {
        self.generation += 1;
        let generation = self.generation;
        let is_over = |process: &Process| process.ended.is_some_and(|ended| generation - ended >= KEEP_EXITED);
        let over: Vec<u32> =
            self.processes.iter().filter(|(_, process)| is_over(process)).map(|(&tgid, _)| tgid).collect();
        for tgid in over {
            self.remove_process(tgid);
        }
        if generation.is_multiple_of(SWEEP_EVERY) && self.control.asks_about_processes() {
            self.look_at_processes();
        }
    }

    /// Whether what is of a process in a cgroup is recorded.
    pub fn includes(&self, tgid: u32, cgroup: Option<CgroupId>) -> bool {
        let process = self.processes.get(&tgid).map(|process| process.matched).unwrap_or_default();
        let cgroup = cgroup.and_then(|id| self.cgroups.get(&id)).copied().unwrap_or_default();
        self.control.decide(process, cgroup) == Verdict::InScope
    }

    /// Whether rules decide at all.
    pub fn is_limited(&self) -> bool {
        self.control.is_limited()
    }

    /// Sizes and events so far.
    pub fn stats(&self) -> ScopeStats {
        let matched = self.processes.values().filter(|process| process.matched != ScopeMatch::default());
        ScopeStats { cgroups: self.cgroups.len(), processes: matched.count(), refused: self.refused }
    }

    /// Whether there is no rule.
    fn is_empty(&self) -> bool {
        self.control.rules() == 0
    }

    fn asks_about_pods(&self) -> bool {
        self.rules.asks_about_pods() || self.turns.are_taken()
    }

    fn of_cgroup(&mut self, cgroup: &Cgroup) -> ScopeMatch {
        let is_asked = self.asks_about_pods() && (cgroup.pod_uid.is_some() || !cgroup.containers.is_empty());
        let facts = self.pods.as_ref().filter(|_| is_asked).and_then(|pods| pods.of(cgroup));
        let pod = match &facts {
            Some(facts) => PodOf::Known(facts),
            None if cgroup.pod_uid.is_some() && self.pods.is_some() => PodOf::Unknown,
            None => PodOf::None,
        };
        self.turns.of_cgroup(cgroup.id, pod, self.rules.of_cgroup(cgroup, pod))
    }

    fn set_cgroup(&mut self, id: CgroupId, matched: ScopeMatch) {
        if matched == ScopeMatch::default() {
            // (The programs may have made an entry.)
            self.cgroups.remove(&id);
            let removed = self.maps.remove_cgroup(id.0);
            self.check(removed);
        } else if self.cgroups.get(&id) != Some(&matched) {
            let set = self.maps.set_cgroup(id.0, &matched);
            if self.check(set) {
                self.cgroups.insert(id, matched);
            }
        }
    }

    /// Finds out which rules a process meets. One that is ending stays what it was.
    fn look_at_process(&mut self, tgid: u32, lineage: Vec<u32>) {
        let mut matched = ScopeMatch::default();
        let asks_about_files = self.control.unknown_after_exec != 0;
        let mut executable = if asks_about_files { proc_fs::executable(tgid) } else { Some(Executable::Unknown) };
        for _ in 0..MAX_LOOKS {
            let Some(now) = &executable else { break };
            matched = self.rules.of_process(&lineage, now);
            if matched == ScopeMatch::default() {
                // What is not there is not removed: it may be put there at any moment, when the process executes something.
                if self.maps.has_process(tgid) {
                    let removed = self.maps.remove_process(tgid);
                    self.check(removed);
                }
            } else {
                let set = self.maps.set_process(tgid, &matched);
                self.check(set);
            }
            // What it executes meanwhile makes it undecided, which may just have been overwritten.
            let later = if asks_about_files { proc_fs::executable(tgid) } else { executable.clone() };
            if later == executable {
                break;
            }
            executable = later;
        }
        if (matched != ScopeMatch::default() || !lineage.is_empty()) && self.processes.len() < MAX_KNOWN {
            self.processes.insert(tgid, Process { matched, lineage, ended: None });
        }
    }

    fn remove_process(&mut self, tgid: u32) {
        self.processes.remove(&tgid);
        let removed = self.maps.remove_process(tgid);
        self.check(removed);
    }

    /// Lets the rules decide, where there is anything to decide.
    fn settle(&mut self) {
        let is_needed = self.rules.are_strict() || self.turns.are_taken() || !self.cgroups.is_empty();
        let state = if is_needed { state::LIMITED } else { state::OPEN };
        self.set_control(ScopeControl { state, ..self.control });
    }

    fn set_control(&mut self, control: ScopeControl) {
        let has_gaps = u32::from(self.control.has_gaps == 1 || control.is_limited());
        let control = ScopeControl { has_gaps, ..control };
        if control == self.control {
            return;
        }
        if let Err(error) = self.maps.set_control(&control) {
            warn!("the scope could not be changed: {error}");
        }
        debug!("scope: {control:x?}");
        self.control = control;
    }

    /// Whether it went well; what did not is counted, and said once.
    fn check(&mut self, outcome: io::Result<()>) -> bool {
        let Err(error) = outcome else { return true };
        if self.refused == 0 {
            warn!("the scope does not hold for everybody: there is no room for more entries: {error}");
        }
        self.refused += 1;
        false
    }
}

#[cfg(test)]
mod tests;

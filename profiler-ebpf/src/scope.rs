//! Which processes are recorded: of everything in the agent's PID namespace what the agent's rules say, or the targets and
//! their children.

use profiler_common::abi::{
    counter::Counter,
    scope::{ScopeControl, ScopeMatch, Verdict},
    settings::target,
};

use crate::{
    cgroup,
    layout::loaded,
    maps::{SCOPE, SCOPE_CGROUPS, SCOPE_PROCESSES, TARGETS, count},
    memory::kernel,
};

/// Levels of PID namespaces at which the agent's is looked for. (The kernel allows 32, `MAX_PID_NS_LEVEL`; clusters in
/// containers in containers have three.)
const MAX_LEVELS: u32 = 8;

/// The PID of the process that `task` is a thread of, in the agent's PID namespace; zero: it is not in there.
#[inline(always)]
pub fn tgid(task: u64) -> u32 {
    if loaded!(SETTINGS.pid_namespace) == 0 {
        return kernel(task, loaded!(LAYOUT.task_tgid));
    }
    nested_tgid(task)
}

/// Looks for the agent's namespace among those that the process is in, which all have a number for it.
#[inline(never)]
fn nested_tgid(task: u64) -> u32 {
    let leader: u64 = kernel(task, loaded!(LAYOUT.task_group_leader));
    let pid: u64 = kernel(leader, loaded!(LAYOUT.task_thread_pid));
    let innermost: u32 = kernel(pid, loaded!(LAYOUT.pid_level));
    for level in 1..=MAX_LEVELS {
        if level > innermost {
            break;
        }
        let number = pid + u64::from(loaded!(LAYOUT.pid_numbers)) + u64::from(level * loaded!(LAYOUT.upid_size));
        let namespace: u64 = kernel(number, loaded!(LAYOUT.upid_ns));
        let inum: u32 = kernel(namespace, loaded!(LAYOUT.pid_namespace_inum));
        if inum == loaded!(SETTINGS.pid_namespace) {
            return kernel(number, 0);
        }
    }
    0
}

/// Target flags of a process; zero when it is no target.
#[inline(always)]
pub fn target_flags(tgid: u32) -> u32 {
    match TARGETS.get_ptr(tgid) {
        // SAFETY: a value of this preallocated map stays readable while the program runs.
        Some(flags) => (unsafe { *flags }),
        None => 0,
    }
}

/// Whether the recording is limited to targets.
#[inline(always)]
pub fn is_limited() -> bool {
    loaded!(SETTINGS.targets_only) == 1
}

/// Whether notices of the process are sent, whose samples may come into scope at any time. Zero is no process.
#[inline(always)]
pub fn includes(tgid: u32) -> bool {
    if is_limited() { target_flags(tgid) & target::SAMPLE != 0 } else { tgid != 0 }
}

/// Whether samples and waits of a thread are recorded.
#[inline(always)]
pub fn of(task: u64, tgid: u32) -> u32 {
    if !includes(tgid) {
        return OUT_OF_SCOPE;
    }
    if is_limited() {
        return IN_SCOPE;
    }
    match rules() {
        Some(rules) if rules.is_limited() => decide(task, tgid),
        _ => IN_SCOPE,
    }
}

/// [`Verdict`]s as programs compare them.
pub const IN_SCOPE: u32 = Verdict::InScope as u32;
const OUT_OF_SCOPE: u32 = Verdict::OutOfScope as u32;
/// See [`IN_SCOPE`].
pub const UNDECIDED: u32 = Verdict::Undecided as u32;

/// Looks at the rules. One copy for all who ask.
#[inline(never)]
fn decide(task: u64, tgid: u32) -> u32 {
    let Some(rules) = rules() else { return IN_SCOPE };
    let process = if rules.asks_about_processes() { of_process(tgid) } else { ScopeMatch::default() };
    let cgroup = if rules.asks_about_cgroups() { of_cgroup(cgroup::of(task)) } else { ScopeMatch::default() };
    rules.decide(process, cgroup) as u32
}

/// Whether threads may have run or waited while nobody looked, because they were out of scope.
#[inline(always)]
pub fn has_gaps() -> bool {
    rules().is_some_and(|rules| rules.has_gaps == 1)
}

/// A new process takes after its parent.
#[inline(always)]
pub fn forked(parent: u32, child: u32) {
    let Some(rules) = rules() else { return };
    if !rules.is_limited() || !rules.asks_about_processes() {
        return;
    }
    let matched = of_process(parent);
    if matched == ScopeMatch::default() {
        // The PID may have belonged to another before.
        let _absent_is_fine = SCOPE_PROCESSES.remove(child);
    } else if SCOPE_PROCESSES.insert(child, matched, 0).is_err() {
        count(Counter::ScopeFull);
    }
}

/// A process runs another program, which the agent has to look at first where rules ask for it.
#[inline(always)]
pub fn executed(tgid: u32) {
    let Some(rules) = rules() else { return };
    if !rules.is_limited() || rules.unknown_after_exec == 0 {
        return;
    }
    let matched = of_process(tgid).with_unknown(rules.unknown_after_exec);
    if SCOPE_PROCESSES.insert(tgid, matched, 0).is_err() {
        count(Counter::ScopeFull);
    }
}

/// A new cgroup takes after its parent, until the agent has looked at it.
#[inline(always)]
pub fn cgroup_made(parent: u64, child: u64) {
    let Some(rules) = rules() else { return };
    if !rules.is_limited() || !rules.asks_about_cgroups() {
        return;
    }
    let inherited = of_cgroup(parent);
    let matched = ScopeMatch { met: inherited.met, possible: inherited.possible | rules.unknown_when_made };
    if matched != ScopeMatch::default() && SCOPE_CGROUPS.insert(child, matched, 0).is_err() {
        count(Counter::ScopeFull);
    }
}

#[inline(always)]
fn rules() -> Option<&'static ScopeControl> {
    // SAFETY: an array's slots are always there. (The agent changes the rules while nothing is decided, and the state alone
    // decides that.)
    SCOPE.get_ptr(0).map(|rules| unsafe { &*rules })
}

#[inline(always)]
fn of_process(tgid: u32) -> ScopeMatch {
    // SAFETY: a value of this preallocated map stays readable while the program runs.
    SCOPE_PROCESSES.get_ptr(tgid).map_or(ScopeMatch::default(), |matched| unsafe { *matched })
}

#[inline(always)]
fn of_cgroup(id: u64) -> ScopeMatch {
    // SAFETY: as above.
    SCOPE_CGROUPS.get_ptr(id).map_or(ScopeMatch::default(), |matched| unsafe { *matched })
}

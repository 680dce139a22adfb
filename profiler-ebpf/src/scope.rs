//! Which processes are recorded: everything in the agent's PID namespace, or the targets and their children.

use profiler_common::abi::settings::target;

use crate::{layout::loaded, maps::TARGETS, memory::kernel};

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

/// Whether samples of the process are kept and its notices sent. Zero is no process.
#[inline(always)]
pub fn includes(tgid: u32) -> bool {
    if is_limited() { target_flags(tgid) & target::SAMPLE != 0 } else { tgid != 0 }
}

//! What the agent tells the kernel programs once, at load: settings and the running kernel's struct layout.
//!
//! Both live in read-only data, so that the verifier knows their values and prunes what they rule out.

use zerocopy::{Immutable, IntoBytes};

/// Choices made before load.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub struct Settings {
    /// 1: sample only processes in the target map, and follow their children; 0: sample everything.
    pub targets_only: u32,
    /// 1: `bpf_task_pt_regs` exists (Linux 5.15 and later).
    pub has_task_pt_regs: u32,
    /// Task flags of threads that never run in user mode.
    pub no_user_mode_flags: u32,
    /// Never zero, so that no other read-only global can be merged with this one.
    pub magic: u32,
    /// 1: `sched_switch` says in its fourth argument in what state the thread leaves (Linux 5.18 and later).
    pub has_state_argument: u32,
    /// 1: the scheduler keeps books of when threads become ready to run, so that nobody has to watch them wake up.
    pub has_queue_times: u32,
    /// One of [`cgroups`]: how a thread leads to its cgroup.
    pub cgroups: u32,
    /// `cgroup_root::hierarchy_id` of the hierarchy whose cgroups are announced.
    pub cgroup_hierarchy: u32,
    /// The agent's PID namespace (`ns_common::inum`); zero: the initial one.
    pub pid_namespace: u32,
    /// Zero.
    pub reserved: u32,
    /// Waits that are shorter are not exported, nanoseconds.
    pub min_wait_ns: u64,
    /// Where the kernel keeps the code of its scheduler (`__sched_text_start`): stacks of waits begin there. Zero:
    /// not known.
    pub sched_text_start: u64,
    /// The end of that code.
    pub sched_text_end: u64,
}

/// Value of [`Settings::magic`].
pub const SETTINGS_MAGIC: u32 = 0x7072_6f66;

/// Byte offsets of the members the programs read, from the running kernel's BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
pub struct KernelLayout {
    /// `task_struct::stack`.
    pub task_stack: u32,
    /// `task_struct::flags`.
    pub task_flags: u32,
    /// `task_struct::tgid`.
    pub task_tgid: u32,
    /// `task_struct::group_leader`.
    pub task_group_leader: u32,
    /// `task_struct::start_boottime`.
    pub task_start_boottime: u32,
    /// `task_struct::self_exec_id`.
    pub task_self_exec_id: u32,
    /// `task_struct::comm`.
    pub task_comm: u32,
    /// `task_struct::signal`.
    pub task_signal: u32,
    /// `task_struct::pid`.
    pub task_pid: u32,
    /// `task_struct::__state`, or `state` before 5.14.
    pub task_state: u32,
    /// `task_struct::start_time`.
    pub task_start_time: u32,
    /// `task_struct::sched_info.run_delay`: time it has waited for CPUs so far. This and the next four are zero where
    /// the kernel does not keep these books.
    pub task_run_delay: u32,
    /// `task_struct::sched_info.last_queued`: since when it waits for a CPU, by that CPU's `rq::clock`.
    pub task_last_queued: u32,
    /// `task_struct::se.cfs_rq`.
    pub task_cfs_rq: u32,
    /// `cfs_rq::rq`.
    pub cfs_rq_rq: u32,
    /// `rq::clock`.
    pub rq_clock: u32,
    /// `signal_struct::live`.
    pub signal_live: u32,
    /// `task_struct::thread_pid`.
    pub task_thread_pid: u32,
    /// `pid::level`.
    pub pid_level: u32,
    /// `pid::numbers`.
    pub pid_numbers: u32,
    /// `upid::ns`. (`upid::nr` is its first member.)
    pub upid_ns: u32,
    /// Size of `struct upid`.
    pub upid_size: u32,
    /// `pid_namespace::ns.inum`.
    pub pid_namespace_inum: u32,
    /// `task_struct::cgroups`. This and the next eight are zero where cgroups are not told apart.
    pub task_cgroups: u32,
    /// Member of `css_set` that leads to the cgroup: `dfl_cgrp`, or one of `subsys`.
    pub css_set_link: u32,
    /// `cgroup_subsys_state::cgroup`.
    pub css_cgroup: u32,
    /// `cgroup_subsys_state::parent`; zero: not known, new cgroups do not take after their parents.
    pub css_parent: u32,
    /// `cgroup::self`.
    pub cgroup_self: u32,
    /// `cgroup::kn`.
    pub cgroup_kn: u32,
    /// `cgroup::root`.
    pub cgroup_root: u32,
    /// `cgroup_root::hierarchy_id`.
    pub cgroup_root_hierarchy_id: u32,
    /// `kernfs_node::id`.
    pub kernfs_node_id: u32,
    /// Size of a kernel stack, bytes.
    pub thread_size: u32,
    /// Never zero, so that no other read-only global can be merged with this one.
    pub magic: u32,
}

/// Value of [`KernelLayout::magic`].
pub const LAYOUT_MAGIC: u32 = 0x6c61_796f;

/// How a thread leads to its cgroup.
pub mod cgroups {
    /// Not at all.
    pub const NONE: u32 = 0;
    /// By the second version's hierarchy: [`super::KernelLayout::css_set_link`] is the cgroup.
    pub const UNIFIED: u32 = 1;
    /// By a controller of the first version: it is the controller's state of the cgroup.
    pub const BY_CONTROLLER: u32 = 2;
}

/// Flags of an entry in the target map.
pub mod target {
    /// Samples of the process are kept.
    pub const SAMPLE: u32 = 1;
    /// Children of the process become targets too.
    pub const FOLLOW: u32 = 2;
}

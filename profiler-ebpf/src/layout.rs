//! Settings and struct offsets, as the agent set them before load.

use profiler_common::abi::settings::{KernelLayout, LAYOUT_MAGIC, SETTINGS_MAGIC, Settings};

#[unsafe(no_mangle)]
pub static SETTINGS: Settings = Settings {
    targets_only: 0,
    has_task_pt_regs: 0,
    no_user_mode_flags: 0,
    magic: SETTINGS_MAGIC,
    has_state_argument: 0,
    has_queue_times: 0,
    cgroups: 0,
    cgroup_hierarchy: 0,
    pid_namespace: 0,
    reserved: 0,
    min_wait_ns: 0,
    sched_text_start: 0,
    sched_text_end: 0,
};

#[unsafe(no_mangle)]
pub static LAYOUT: KernelLayout = KernelLayout {
    task_stack: 0,
    task_flags: 0,
    task_tgid: 0,
    task_group_leader: 0,
    task_start_boottime: 0,
    task_self_exec_id: 0,
    task_comm: 0,
    task_signal: 0,
    task_pid: 0,
    task_state: 0,
    task_start_time: 0,
    task_run_delay: 0,
    task_last_queued: 0,
    task_cfs_rq: 0,
    cfs_rq_rq: 0,
    rq_clock: 0,
    signal_live: 0,
    task_thread_pid: 0,
    pid_level: 0,
    pid_numbers: 0,
    upid_ns: 0,
    upid_size: 0,
    pid_namespace_inum: 0,
    task_cgroups: 0,
    css_set_link: 0,
    css_cgroup: 0,
    css_parent: 0,
    cgroup_self: 0,
    cgroup_kn: 0,
    cgroup_root: 0,
    cgroup_root_hierarchy_id: 0,
    kernfs_node_id: 0,
    thread_size: 0,
    magic: LAYOUT_MAGIC,
};

/// Reads a field of a static that the agent replaces before load.
///
/// Volatile, so that the compiler does not fold the placeholder; the verifier folds the real value.
macro_rules! loaded {
    ($global:ident . $field:ident) => {
        // SAFETY: the static is initialized, aligned and never written while programs run.
        unsafe { core::ptr::read_volatile(core::ptr::addr_of!($crate::layout::$global.$field)) }
    };
}

pub(crate) use loaded;

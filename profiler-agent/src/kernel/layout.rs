//! The running kernel's struct layout and features, as the kernel programs need them.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::Path,
};

use profiler_common::abi::settings::{KernelLayout, LAYOUT_MAGIC};

use super::{
    CgroupHierarchy, KernelError,
    btf::{BtfError, KernelTypes},
    namespaces,
};

/// Size of an x86_64 kernel stack (`THREAD_SIZE`, `arch/x86/include/asm/page_64_types.h`, without KASAN).
const THREAD_SIZE: u32 = 16 << 10;

const STRUCTS: &[&str] = &[
    "task_struct",
    "signal_struct",
    "sched_entity",
    "sched_info",
    "cfs_rq",
    "rq",
    "pid",
    "upid",
    "pid_namespace",
    "ns_common",
    "css_set",
    "cgroup_subsys_state",
    "cgroup",
    "cgroup_root",
    "kernfs_node",
];

/// Optional parts of the kernel that change which programs are loaded.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// `bpf_loop` (5.17): deeper user stacks.
    pub bpf_loop: bool,
    /// `bpf_task_pt_regs` (5.15): user registers without assuming the stack's layout.
    pub task_pt_regs: bool,
    /// `sched_switch` passes the thread's state as its fourth argument (5.18): it cannot have changed since.
    pub switch_state: bool,
    /// The scheduler keeps books of when threads become ready to run (`CONFIG_SCHED_INFO`, and group scheduling to
    /// find its clock by).
    pub queue_times: bool,
    /// Threads lead to their cgroups (`CONFIG_CGROUPS`).
    pub cgroups: bool,
}

/// Flags of threads that never run in user mode (`include/linux/sched.h`): io_uring workers, kernel threads, and
/// since 6.4 user workers, whose bit meant something else before.
pub(super) fn no_user_mode_flags() -> u32 {
    const PF_IO_WORKER: u32 = 0x10;
    const PF_USER_WORKER: u32 = 0x4000;
    const PF_KTHREAD: u32 = 0x20_0000;
    let has_user_workers = kernel_version().is_some_and(|version| version >= (6, 4));
    PF_IO_WORKER | PF_KTHREAD | if has_user_workers { PF_USER_WORKER } else { 0 }
}

/// Major and minor version of the running kernel.
pub fn kernel_version() -> Option<(u32, u32)> {
    let name = nix::sys::utsname::uname().ok()?;
    let release = name.release().to_str()?.to_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// Reads layout and features from the BTF at `path`.
pub fn read(path: &Path, hierarchy: &CgroupHierarchy) -> Result<(KernelLayout, Features), KernelError> {
    // What calls the programs of a tracepoint: its parameters are `void *` and the tracepoint's.
    const CALL_SWITCH: &str = "__traceiter_sched_switch";
    let types = KernelTypes::read(path, STRUCTS, &["bpf_loop", "bpf_task_pt_regs", CALL_SWITCH])?;
    let has_state_by_version = || kernel_version().is_some_and(|version| version >= (5, 18));
    let queue_times = if keeps_queue_times() { queue_offsets(&types) } else { None };
    let [task_run_delay, task_last_queued, task_cfs_rq, cfs_rq_rq, rq_clock] = queue_times.unwrap_or_default();
    let mut layout = KernelLayout::default();
    namespaces::lay_out(&types, &mut layout)
        .ok_or(KernelError::MissingMember { structure: "task_struct", member: "thread_pid" })?;
    let features = Features {
        cgroups: hierarchy.lay_out(&types, &mut layout).is_some(),
        bpf_loop: types.has_function("bpf_loop"),
        task_pt_regs: types.has_function("bpf_task_pt_regs"),
        switch_state: types.parameters(CALL_SWITCH).map_or_else(has_state_by_version, |parameters| parameters >= 5),
        queue_times: queue_times.is_some(),
    };
    let offset = |structure: &'static str, member: &'static str| {
        types.offset(structure, member).ok_or(KernelError::MissingMember { structure, member })
    };
    let layout = KernelLayout {
        task_stack: offset("task_struct", "stack")?,
        task_flags: offset("task_struct", "flags")?,
        task_tgid: offset("task_struct", "tgid")?,
        task_group_leader: offset("task_struct", "group_leader")?,
        task_start_boottime: offset("task_struct", "start_boottime")?,
        task_self_exec_id: offset("task_struct", "self_exec_id")?,
        task_comm: offset("task_struct", "comm")?,
        task_signal: offset("task_struct", "signal")?,
        task_pid: offset("task_struct", "pid")?,
        // (Renamed in 5.14.)
        task_state: offset("task_struct", "__state").or_else(|_| offset("task_struct", "state"))?,
        task_start_time: offset("task_struct", "start_time")?,
        task_run_delay,
        task_last_queued,
        task_cfs_rq,
        cfs_rq_rq,
        rq_clock,
        signal_live: offset("signal_struct", "live")?,
        thread_size: THREAD_SIZE,
        magic: LAYOUT_MAGIC,
        ..layout
    };
    Ok((layout, features))
}

/// Where the scheduler keeps its books of waiting threads: see [`KernelLayout::task_run_delay`] and the next four.
fn queue_offsets(types: &KernelTypes) -> Option<[u32; 5]> {
    let info = types.offset("task_struct", "sched_info")?;
    Some([
        info.checked_add(types.offset("sched_info", "run_delay")?)?,
        info.checked_add(types.offset("sched_info", "last_queued")?)?,
        types.offset("task_struct", "se")?.checked_add(types.offset("sched_entity", "cfs_rq")?)?,
        types.offset("cfs_rq", "rq")?,
        types.offset("rq", "clock")?,
    ])
}

/// Whether those books are kept: they may be switched off at boot (before 5.14, with `nodelayacct`). A thread that runs
/// has been put on a CPU at least once, which is the third number of its `schedstat`.
fn keeps_queue_times() -> bool {
    fs::read_to_string("/proc/thread-self/schedstat")
        .is_ok_and(|times| times.split_ascii_whitespace().nth(2).is_some_and(|count| count != "0"))
}

/// Where the kernel keeps its scheduler's code: `__sched_text_start` and `__sched_text_end`. `None` where symbols
/// cannot be read.
pub(super) fn scheduler_code() -> Option<(u64, u64)> {
    let mut symbols = BufReader::new(File::open("/proc/kallsyms").ok()?);
    let (mut start, mut end) = (None, None);
    let mut line = String::new();
    while (start.is_none() || end.is_none()) && symbols.read_line(&mut line).ok()? > 0 {
        // (`ffffffff81e00000 T __sched_text_start`)
        let bound = match line.trim_end().rsplit(' ').next() {
            Some("__sched_text_start") => Some(&mut start),
            Some("__sched_text_end") => Some(&mut end),
            _ => None,
        };
        if let Some(bound) = bound {
            *bound = u64::from_str_radix(line.split(' ').next()?, 16).ok().filter(|&address| address != 0);
        }
        line.clear();
    }
    Some((start?, end?))
}

impl From<BtfError> for KernelError {
    fn from(error: BtfError) -> Self {
        Self::Btf(error)
    }
}

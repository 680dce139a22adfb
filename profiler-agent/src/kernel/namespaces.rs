//! The PID namespace that the agent sees `/proc` in: PIDs from the kernel programs have to be those of the same.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use profiler_common::abi::settings::KernelLayout;

use super::btf::KernelTypes;

/// The initial PID namespace (`PROC_PID_INIT_INO`, `include/linux/proc_ns.h`).
const INITIAL: u32 = 0xefff_fffc;

/// The PID namespace we are in; `None`: the initial one.
pub fn pid_namespace() -> Option<u32> {
    let inum = fs::metadata("/proc/self/ns/pid").ok()?.ino();
    u32::try_from(inum).ok().filter(|&inum| inum != INITIAL)
}

/// Fills in where the programs find a process's PID in it; `None` where this kernel has it elsewhere.
pub(super) fn lay_out(types: &KernelTypes, layout: &mut KernelLayout) -> Option<()> {
    layout.task_thread_pid = types.offset("task_struct", "thread_pid")?;
    layout.pid_level = types.offset("pid", "level")?;
    layout.pid_numbers = types.offset("pid", "numbers")?;
    layout.upid_ns = types.offset("upid", "ns")?;
    // A number, and a pointer.
    layout.upid_size = layout.upid_ns.checked_add(8)?;
    layout.pid_namespace_inum = types.offset("pid_namespace", "ns")?.checked_add(types.offset("ns_common", "inum")?)?;
    Some(())
}

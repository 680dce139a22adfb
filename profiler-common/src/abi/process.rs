//! Which process, and which program image of it, a record speaks of.

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Length of a task's command name in the kernel, terminating NUL included (`TASK_COMM_LEN`).
pub const COMM_LEN: usize = 16;

/// A task's command name as the kernel keeps it: NUL-terminated bytes of any encoding.
pub type Comm = [u8; COMM_LEN];

/// One program image in one process.
///
/// A PID alone is reused, so the start time is part of the key; `execve` keeps both but replaces every
/// mapping, so the kernel's own exec counter is part of it too.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct ProcessKey {
    /// Start of the thread group's leader, nanoseconds since boot, suspend included
    /// (`task_struct::start_boottime`, Linux 5.5 and later).
    pub start_time_ns: u64,
    /// Thread group ID in the agent's PID namespace: what userspace there calls the PID.
    pub tgid: u32,
    /// Low 32 bits of `task_struct::self_exec_id`: raised by every `execve` before the new image is mapped,
    /// inherited by fork.
    pub exec_id: u32,
}

const _: () = {
    assert!(size_of::<ProcessKey>() == 16);
    assert!(offset_of!(ProcessKey, tgid) == 8);
    assert!(offset_of!(ProcessKey, exec_id) == 12);
};

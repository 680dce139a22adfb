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
    /// `signal_struct::live`.
    pub signal_live: u32,
    /// Size of a kernel stack, bytes.
    pub thread_size: u32,
    /// Never zero, so that no other read-only global can be merged with this one.
    pub magic: u32,
}

/// Value of [`KernelLayout::magic`].
pub const LAYOUT_MAGIC: u32 = 0x6c61_796f;

/// Flags of an entry in the target map.
pub mod target {
    /// Samples of the process are kept.
    pub const SAMPLE: u32 = 1;
    /// Children of the process become targets too.
    pub const FOLLOW: u32 = 2;
}

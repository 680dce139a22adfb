//! Notices about cgroups, sent through a ring of their own: whoever may make cgroups can make many.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most bytes of a path, terminating NUL included: the kernel's own limit for what it hands to tracepoints
/// (`TRACE_CGROUP_PATH_LEN`, `kernel/cgroup/cgroup-internal.h`, Linux 5.10 and 6.18).
pub const MAX_PATH: usize = 1024;

/// A cgroup came or went. The path follows, without its NUL, where the cgroup came.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct CgroupNotice {
    /// `kernfs_node::id` of its folder: unique in its hierarchy until the machine is started again.
    pub id: u64,
    /// A [`CgroupChange`].
    pub change: u32,
    /// Bytes of the path.
    pub path_len: u32,
}

const _: () = assert!(size_of::<CgroupNotice>() == 16);

/// What became of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CgroupChange {
    /// It was made; nothing is in it yet.
    Made = 1,
    /// It was removed; nothing that is alive was in it.
    Removed = 2,
}

impl TryFrom<u32> for CgroupChange {
    type Error = u32;

    fn try_from(value: u32) -> Result<Self, u32> {
        match value {
            1 => Ok(Self::Made),
            2 => Ok(Self::Removed),
            other => Err(other),
        }
    }
}

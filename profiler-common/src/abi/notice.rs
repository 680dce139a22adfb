//! Notices about processes, sent through a ring buffer in the order in which things happened.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::process::ProcessKey;

/// First bytes of every notice.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct NoticeHeader {
    /// A [`NoticeKind`].
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
    /// The process it is about; for a fork, the parent.
    pub process: ProcessKey,
}

/// What a notice tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NoticeKind {
    /// [`ForkNotice`]: a process has a new child, with a copy of its mappings.
    Fork = 1,
    /// [`NoticeHeader`] alone, with the new image's exec ID: the image is in place.
    Exec = 2,
    /// [`NoticeHeader`] alone: the last thread of the process has exited.
    Exit = 3,
    /// [`PlaceNotice`]: code was sampled where this image had not been sampled lately.
    NewPlace = 4,
    /// [`TableNotice`]: the unwind table of an executable is needed.
    TableWanted = 5,
}

impl TryFrom<u32> for NoticeKind {
    type Error = u32;

    fn try_from(value: u32) -> Result<Self, u32> {
        match value {
            1 => Ok(Self::Fork),
            2 => Ok(Self::Exec),
            3 => Ok(Self::Exit),
            4 => Ok(Self::NewPlace),
            5 => Ok(Self::TableWanted),
            other => Err(other),
        }
    }
}

/// A new process. (New threads are not announced.)
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct ForkNotice {
    /// Kind and parent.
    pub header: NoticeHeader,
    /// The child.
    pub child: ProcessKey,
}

/// Code runs in a place that the agent may not know yet.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct PlaceNotice {
    /// Kind and process.
    pub header: NoticeHeader,
    /// The sampled instruction pointer in user space.
    pub address: u64,
}

/// The first sample that needs the unwind table of an executable.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct TableNotice {
    /// Kind and process.
    pub header: NoticeHeader,
    /// Index in the executables map.
    pub executable: u32,
    /// Zero.
    pub reserved: u32,
}

/// Places are told apart by 64 KiB of address space: smaller than almost every library.
pub const PLACE_SHIFT: u32 = 16;
/// Places that are remembered as announced, over all processes; a power of two.
pub const PLACES: usize = 1 << 16;

const _: () = {
    assert!(size_of::<NoticeHeader>() == 24);
    assert!(size_of::<PlaceNotice>() == 32);
    assert!(size_of::<TableNotice>() == 32);
    assert!(PLACES.is_power_of_two());
    assert!(size_of::<ForkNotice>() == 40);
};

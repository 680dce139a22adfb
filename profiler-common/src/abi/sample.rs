//! Aggregated samples: the rows of the double-buffered maps.

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::process::{Comm, ProcessKey};

/// Frames (kernel and user together) a row of the smallest size class holds.
pub const SMALL_FRAMES: usize = 32;
/// Frames a row of the middle size class holds.
pub const MEDIUM_FRAMES: usize = 128;
/// Frames a row of the largest size class holds: the deepest stack that is kept. A power of two, so that
/// indexes can be masked for the verifier.
pub const LARGE_FRAMES: usize = 1024;
/// Most kernel frames asked of `bpf_get_stack` (the kernel's own default limit, `perf_event_max_stack`).
pub const MAX_KERNEL_FRAMES: usize = 127;

/// What identifies a row within one buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct SampleKey {
    /// Hash over process, thread name, cgroup, event kind, stack end and every frame.
    pub hash: u64,
    /// Repeated from the process key, so that a hash collision cannot cross processes.
    pub tgid: u32,
    /// Number of kernel frames, then user frames in the upper half: a collision cannot change the shape.
    pub shape: u32,
}

/// Everything of a row but its frames.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct SampleHeader {
    /// How many samples this row stands for; of waits, how many that ended. Raised atomically in the map.
    pub count: u64,
    /// Nanoseconds that threads were blocked here. Raised atomically.
    pub blocked_ns: u64,
    /// Nanoseconds that threads waited for a CPU here. Raised atomically.
    pub queued_ns: u64,
    /// Sampled waits: how many began (low half) and how many ended (high half) in this row. Raised atomically.
    pub waits: u64,
    /// The hash of the row's key.
    pub hash: u64,
    /// The cgroup that the thread was in, as `kernfs_node::id`; zero: not known.
    pub cgroup: u64,
    /// The process the sample was taken in.
    pub process: ProcessKey,
    /// Command name of the thread group's leader when the row was made.
    pub process_comm: Comm,
    /// Command name of the sampled thread.
    pub thread_comm: Comm,
    /// Number of kernel frames; they come first in `frames`, leaf first.
    pub kernel_frames: u16,
    /// Number of user frames; they follow the kernel's, leaf first.
    pub user_frames: u16,
    /// An [`EventKind`].
    pub kind: u8,
    /// A [`StackEnd`]: why the user stack ends where it does.
    pub user_end: u8,
    /// 1: the row has no frames, although it counts them; they were in an earlier row of the same key.
    pub is_reference: u8,
    /// [`super::waits::WaitControl::epoch`] when it was begun.
    pub epoch: u8,
}

impl SampleHeader {
    /// The key of the row that the header is part of.
    pub const fn key(&self) -> SampleKey {
        SampleKey {
            hash: self.hash,
            tgid: self.process.tgid,
            shape: self.kernel_frames as u32 | (self.user_frames as u32) << 16,
        }
    }
}

/// One row: a header and room for `FRAMES` instruction or return addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable)]
pub struct Sample<const FRAMES: usize> {
    /// Identity, names and count.
    pub header: SampleHeader,
    /// Kernel frames, then user frames. What follows them is undefined.
    pub frames: [u64; FRAMES],
}

const _: () = {
    assert!(size_of::<SampleKey>() == 16);
    assert!(size_of::<SampleHeader>() == 104);
    assert!(offset_of!(SampleHeader, count) == 0);
    assert!(offset_of!(SampleHeader, blocked_ns) == 8);
    assert!(offset_of!(SampleHeader, queued_ns) == 16);
    assert!(offset_of!(SampleHeader, waits) == 24);
    assert!(offset_of!(SampleHeader, cgroup) == 40);
    assert!(offset_of!(SampleHeader, process) == 48);
    assert!(offset_of!(SampleHeader, process_comm) == 64);
    assert!(offset_of!(SampleHeader, thread_comm) == 80);
    assert!(offset_of!(SampleHeader, kernel_frames) == 96);
    assert!(offset_of!(SampleHeader, user_end) == 101);
    assert!(size_of::<Sample<SMALL_FRAMES>>() == 104 + 8 * SMALL_FRAMES);
    assert!(size_of::<Sample<LARGE_FRAMES>>() == 104 + 8 * LARGE_FRAMES);
    assert!(LARGE_FRAMES.is_power_of_two());
};

/// What a sample measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum EventKind {
    /// The thread was running on a CPU when the sampling clock fired.
    OnCpu = 1,
    /// The thread waited for something that a signal could have interrupted, or was stopped.
    Blocked = 2,
    /// The thread waited for something that nothing interrupts, usually a disk.
    Uninterruptible = 3,
    /// The thread could have run, but its CPU was given to another.
    RunQueue = 4,
}

impl EventKind {
    /// Whether it is measured in time off the CPU.
    pub const fn is_off_cpu(self) -> bool {
        !matches!(self, Self::OnCpu)
    }

    /// Short lower-case words for labels and the marker frame.
    pub const fn label(self) -> &'static str {
        match self {
            Self::OnCpu => "on-cpu",
            Self::Blocked => "blocked",
            Self::Uninterruptible => "uninterruptible",
            Self::RunQueue => "run queue",
        }
    }
}

impl TryFrom<u8> for EventKind {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        match value {
            1 => Ok(Self::OnCpu),
            2 => Ok(Self::Blocked),
            3 => Ok(Self::Uninterruptible),
            4 => Ok(Self::RunQueue),
            other => Err(other),
        }
    }
}

/// Declares [`StackEnd`] with the label and sentence of each reason in one place.
macro_rules! stack_ends {
    ($($name:ident = $value:literal, $label:literal, $doc:literal;)*) => {
        /// Why a user stack ends where it does. Only [`StackEnd::Root`] and [`StackEnd::KernelThread`] are
        /// whole stacks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum StackEnd {
            $(#[doc = $doc] $name = $value,)*
        }

        impl StackEnd {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Short lower-case words for metrics, labels and the marker frame.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }
        }

        impl TryFrom<u8> for StackEnd {
            type Error = u8;

            fn try_from(value: u8) -> Result<Self, u8> {
                match value { $($value => Ok(Self::$name),)* other => Err(other) }
            }
        }
    };
}

stack_ends! {
    Root = 1, "root", "The outermost frame was reached: a return address that is zero or stated to be undefined, or a zero frame pointer.";
    KernelThread = 2, "kernel thread", "A kernel thread: there is no user stack.";
    DepthLimit = 3, "depth limit", "More frames than a row or the walker's loop can hold.";
    FramePointerLost = 4, "frame pointer lost", "No table covers the code, and its frame pointer does not lead to a caller.";
    MemoryUnreadable = 5, "memory unreadable", "The stack memory that should hold the caller could not be read.";
    Exiting = 6, "exiting", "The thread is exiting and its memory is already gone.";
    Compat = 7, "32-bit code", "The thread runs 32-bit code, whose frames have another shape.";
    NotCode = 8, "not code", "The next return address points into no executable memory that is known.";
    UnknownProcess = 9, "unknown process", "The process was sampled before its mappings were known.";
    TablePending = 10, "table pending", "The unwind table of the code was still being built.";
    OverBudget = 11, "table over budget", "The unwind table of the code does not fit into the memory budget.";
    UnsupportedRule = 12, "unsupported rule", "The unwind table says something that cannot be followed.";
    FrameCorrupt = 13, "frame corrupt", "The frame's contents contradict its unwind table.";
    StackSwitch = 14, "stack switch", "The code continues another stack in a way that cannot be followed.";
    Rationed = 15, "rationed", "The CPU's ration of stacks for waits was used up: the time is known, the stack is not.";
    BeganEarlier = 16, "began earlier", "The wait began before the recording, or found no room: only its end was seen.";
    NotStarted = 17, "not started", "A new thread that waited for its first turn on a CPU.";
    Forgotten = 18, "stack forgotten", "The stack was taken when the wait began, and dropped before it ended.";
    BufferFull = 19, "buffer full", "There was no room for the stack when the wait began.";
}

impl StackEnd {
    /// Whether nothing is missing at the root of the stack.
    pub const fn is_whole(self) -> bool {
        matches!(self, Self::Root | Self::KernelThread | Self::NotStarted)
    }
}

//! How to find a caller at one place in the code: what an unwind table's row stands for.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where the canonical frame address (CFA) of a frame comes from: the value of the stack pointer before the
/// call that made the frame. Values of [`Rule::cfa`].
pub mod cfa {
    /// No table covers the place: the frame pointer, if there is one, leads on.
    pub const FRAME_POINTER_CHAIN: u8 = 0;
    /// Stack pointer plus `cfa_offset`.
    pub const STACK_POINTER: u8 = 1;
    /// Frame pointer plus `cfa_offset`.
    pub const FRAME_POINTER: u8 = 2;
    /// RBX plus `cfa_offset`: functions that realign their stack (glibc's lazy binding).
    pub const BASE_POINTER: u8 = 3;
    /// Procedure linkage table: stack pointer plus 8, and 8 more from byte `cfa_offset` of each 16-byte entry
    /// on.
    pub const PLT_ENTRY: u8 = 4;
    /// The word at frame pointer plus `cfa_offset`, plus `cfa_addend`: functions that realign their stack.
    pub const AT_FRAME_POINTER: u8 = 5;
    /// The word at stack pointer plus `cfa_offset`, plus `cfa_addend`.
    pub const AT_STACK_POINTER: u8 = 6;
    /// The interrupted thread's register number `cfa_addend` (in `struct pt_regs` words) plus `cfa_offset`:
    /// known in the leaf frame only.
    pub const LEAF_REGISTER: u8 = 7;
    /// The trampoline a signal handler returns to: registers are in the signal frame.
    pub const SIGNAL_FRAME: u8 = 8;
    /// The outermost frame: its return address is undefined.
    pub const OUTERMOST: u8 = 9;
    /// A function that runs its callees on another stack: like [`FRAME_POINTER`], but the caller's stack may
    /// lie anywhere.
    pub const OTHER_STACK: u8 = 10;
    /// A function that continues another stack in a way that cannot be followed.
    pub const STACK_SWITCH: u8 = 11;
    /// The table says something that cannot be followed.
    pub const UNSUPPORTED: u8 = 12;
    /// A jump out of the frame: the caller goes on at register number `cfa_addend` (in `struct pt_regs` words),
    /// with stack pointer plus `cfa_offset`; known in the leaf frame only. Exceptions land this way.
    pub const LEAF_JUMP: u8 = 13;
    /// Added to another value where the rule is not stated but guessed from the code: the caller it leads to has to
    /// look like one.
    pub const GUESSED: u8 = 0x80;
}

/// How the caller's frame pointer is found. Values of [`Rule::fp`].
pub mod fp {
    /// It has not been changed.
    pub const SAME: u8 = 0;
    /// It was saved at CFA plus `fp_offset`.
    pub const AT_CFA: u8 = 1;
    /// It was saved at frame pointer plus `fp_offset`.
    pub const AT_FRAME_POINTER: u8 = 2;
    /// Its value cannot be told.
    pub const LOST: u8 = 3;
}

/// [`Rule::bx_offset`] of an RBX whose value cannot be told.
pub const LOST_OFFSET: i16 = i16::MIN;

/// One way to find a caller. Few different ones exist (some thousands in a whole system), so rows refer to
/// them by number.
///
/// The return address is always at CFA - 8 (System V AMD64 psABI, figure 3.36); what says otherwise is
/// [`cfa::UNSUPPORTED`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Rule {
    /// One of [`cfa`].
    pub cfa: u8,
    /// One of [`fp`].
    pub fp: u8,
    /// Where RBX was saved, from the CFA; zero: it has not been changed; or [`LOST_OFFSET`].
    pub bx_offset: i16,
    /// Bytes, as `cfa` says.
    pub cfa_offset: i32,
    /// Bytes, as `fp` says.
    pub fp_offset: i16,
    /// As `cfa` says.
    pub cfa_addend: i16,
}

impl Rule {
    /// A rule without parameters.
    pub const fn plain(cfa: u8) -> Self {
        Self { cfa, fp: fp::SAME, bx_offset: 0, cfa_offset: 0, fp_offset: 0, cfa_addend: 0 }
    }
}

const _: () = assert!(size_of::<Rule>() == 12);

//! Waits: what the scheduler's programs remember of every thread that is off the CPU.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::sample::SampleKey;

/// Slots for threads, indexed by the low bits of their ID. A power of two.
pub const THREAD_SLOTS: usize = 65_536;
/// Threads that can be remembered whose slot is another's.
pub const MORE_THREADS: usize = 16_384;
/// Places of waits that can be remembered. A power of two, so that indexes can be masked.
pub const SITES: usize = 16_384;

/// One of so many switches is timed.
pub const TIMED_SWITCHES: u64 = 64;
/// Most that [`WaitControl::share`] may be: one of 16 waits. Those that are left out cost half as much as any other, and the
/// fewer are followed the less the few long ones among many short ones are worth.
pub const MAX_SHARE: u32 = 4;
/// Waits of a thread in each unit of [`USED_SHIFT`] that are followed whatever [`WaitControl::share`] says: who waits
/// seldom costs little, and usually for long.
pub const FIRST_WAITS: u8 = 32;

/// A thread's last wait. As large as a cache line, because several CPUs may use neighbouring slots.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct ThreadWait {
    /// When the thread left the CPU (`CLOCK_MONOTONIC`, nanoseconds); zero while it runs.
    pub began_ns: u64,
    /// When it became ready to run again; zero: it has not, or it was all the time. Where the scheduler's own books are
    /// used: what it had waited for CPUs until it left this one, nanoseconds.
    pub ready_ns: u64,
    /// The row that has its stack, where one was taken.
    pub key: SampleKey,
    /// How many waits this one stands for; zero: no stack was taken.
    pub weight: u32,
    /// The [`WaitSite::tag`] of the place; zero: it has none.
    pub site: u32,
    /// An `EventKind`: why the thread left the CPU.
    pub kind: u8,
    /// A `StackEnd`: without a stack, the reason to charge its time to; zero: others stand for it.
    pub unsampled: u8,
    /// This wait stands for 2^this.
    pub thinned: u8,
    /// Waits that were followed in the unit of [`Self::used`], up to [`FIRST_WAITS`]; then so many more than that are left out
    /// before the next one is followed.
    pub begun: u8,
    /// The thread; zero: the slot is free.
    pub thread: u32,
    /// [`WaitSite::expected_ns`] of the place, which only learns of it when the thread turns to another, or in another
    /// unit of [`Self::used`].
    pub expected_ns: u32,
    /// When that was known last, in units of 2^[`USED_SHIFT`] nanoseconds.
    pub used: u32,
    /// Time blocked that is to be added to [`Balance::owed_ns`] then.
    pub blocked_owed_ns: u32,
    /// Time waiting for a CPU, likewise.
    pub queued_owed_ns: u32,
}

/// A place where a thread waits, as far as its user registers and the kind of wait tell.
///
/// It knows how long waits last here, which decides how often their stacks are taken, and what the sampled waits
/// have been charged too little (or too much) for the others: weights alone are right on average, and the balance
/// makes them right in the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct WaitSite {
    /// Hash of what makes the place; zero: the slot is free.
    pub tag: u32,
    /// The longest wait lately, fading, nanoseconds; anything longer than fits is as good as forever.
    pub expected_ns: u32,
    /// When a wait last began here (`CLOCK_MONOTONIC`), in units of 2^[`USED_SHIFT`] nanoseconds.
    pub used: u32,
    /// Zero: a place is as large as a cache line.
    pub padding: u32,
    /// The row of the last sampled wait here; its `tgid` is whose place this is.
    pub key: SampleKey,
    /// Time blocked here.
    pub blocked: Balance,
    /// Time waiting for a CPU.
    pub queued: Balance,
}

/// See [`WaitSite::used`]: units of about a second.
pub const USED_SHIFT: u32 = 30;

/// What a place's samples were charged, against what its waits took. Each member has one writer while programs run, so
/// that none needs a lock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Balance {
    /// The programs': nanoseconds that no sample was charged with; falls where one was charged with more than its own.
    pub owed_ns: i64,
    /// The agent's: how much of it has been taken care of.
    pub taken_ns: i64,
}

/// One CPU's ration of stacks.
///
/// A wait is chosen with a probability of `expected / threshold_ns` (where that is below one), decided before its
/// duration is known, and then stands for as many waits as the inverse: that is unbiased whatever the expectation
/// was, and the better it was the smaller is the error.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Ration {
    /// How much `CLOCK_MONOTONIC` is ahead of the run queue's clock, nanoseconds: the lesser of
    /// [`Self::ahead_lately_ns`] and [`Self::ahead_before_ns`]. (What every switch needs comes first.)
    pub ahead_ns: i64,
    /// Start of the current comparison of clocks, by the run queue's.
    pub compared_ns: u64,
    /// Switches at which the clocks were compared in it.
    pub compared: u64,
    /// State of a generator of random numbers.
    pub random: u64,
    /// Switches, to tell which of them are timed.
    pub switches: u64,
    /// Start of the current period.
    pub period_ns: u64,
    /// Waits that are expected to last this long are chosen always, shorter ones in proportion. Zero: all are.
    pub threshold_ns: u64,
    /// What waits on this CPU lasted lately: the expectation for places that are new.
    pub typical_ns: u64,
    /// Waits that ended.
    pub ended: u64,
    /// Time that threads waited, by kind: index is the `EventKind`.
    pub waited_ns: [u64; 8],
    /// Stacks that may still be taken, in billionths.
    pub tokens: u64,
    /// Waits that were chosen in the current period.
    pub wanted: u64,
    /// The least difference in the current comparison of clocks.
    pub ahead_lately_ns: i64,
    /// The least in the one before.
    pub ahead_before_ns: i64,
}

/// What the agent tells the programs while they run.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct WaitControl {
    /// Since when waits are charged (`CLOCK_MONOTONIC`, nanoseconds): when they were attached, or later, where what was
    /// before has been charged; zero: they do nothing yet.
    pub since_ns: u64,
    /// 1: a thread found no room once, so that one that is not known may have been waiting since any time.
    pub is_incomplete: u64,
    /// Stacks that each CPU may take per second; zero: as many as there are.
    pub stacks_per_second: u32,
    /// Where a thread has begun [`FIRST_WAITS`] in a unit of [`USED_SHIFT`], one of 2^this waits is followed and stands for
    /// as many; [`MAX_SHARE`] at most.
    pub share: u32,
    /// Changes whenever anything here does, or the rate of the sampling clock: rows say at which one they were made. (Eight
    /// bits of it.)
    pub epoch: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<ThreadWait>() == 64);
    assert!(size_of::<WaitSite>() == 64);
    assert!(SITES.is_power_of_two());
};

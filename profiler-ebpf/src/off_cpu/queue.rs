//! The scheduler's own books: what time it is, and how long a thread that was blocked has been ready to run.
//!
//! The scheduler reads a clock of each run queue just before a switch (or, where a thread that woke up takes the CPU at
//! once, when it woke up), and measures what threads run by it. So do we: it is three loads of what the scheduler has just
//! used, where asking for the time takes longer than all the rest, and time off the CPU is what the kernel does not count
//! as time on it. The clock runs at the counter's rate and begins anywhere; `CLOCK_MONOTONIC` runs at the rate that NTP
//! makes of it. The least difference seen lately is the difference.
//!
//! `sched_info` (`kernel/sched/stats.h`) notes by the same clock when a thread is queued, and adds what it waited to
//! `run_delay` when it is moved to another queue. That is cheaper than to watch every thread wake up.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use profiler_common::abi::waits::{Ration, ThreadWait};

use super::member;
use crate::layout::loaded;

/// How long differences are good for, nanoseconds: rates differ by less than 100 parts in a million, two microseconds
/// in 17 milliseconds.
const COMPARISON: u64 = 1 << 24;
/// Switches within that time at which the clocks are compared: its first ones.
const COMPARED_SWITCHES: u64 = 8;

/// The time of a switch to `next` by `CLOCK_MONOTONIC`, and by the run queue's clock where it is used.
#[derive(Clone, Copy)]
pub struct Now {
    pub monotonic_ns: u64,
    queue_ns: u64,
}

/// The time of a switch to `next`.
#[inline(always)]
pub fn now(ration: &mut Ration, next: u64) -> Now {
    if loaded!(SETTINGS.has_queue_times) != 1 {
        return Now { monotonic_ns: ktime(), queue_ns: 0 };
    }
    let queues: u64 = member(next, loaded!(LAYOUT.task_cfs_rq));
    let queue: u64 = member(queues, loaded!(LAYOUT.cfs_rq_rq));
    let clock: u64 = member(queue, loaded!(LAYOUT.rq_clock));
    let age = clock.wrapping_sub(ration.compared_ns);
    if age >= COMPARISON || ration.compared < COMPARED_SWITCHES {
        compare(ration, clock, age);
    }
    Now { monotonic_ns: clock.wrapping_add(ration.ahead_ns as u64), queue_ns: clock }
}

/// Compares the clocks, `age` after the current comparison began.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn compare(ration: &mut Ration, clock: u64, age: u64) {
    let ahead = ktime().wrapping_sub(clock) as i64;
    if age >= COMPARISON {
        ration.ahead_before_ns = if age < 2 * COMPARISON { ration.ahead_lately_ns } else { i64::MAX };
        ration.ahead_lately_ns = i64::MAX;
        ration.compared_ns = clock;
        ration.compared = 0;
    }
    ration.compared += 1;
    if ahead < ration.ahead_lately_ns {
        ration.ahead_lately_ns = ahead;
    }
    let (lately, before) = (ration.ahead_lately_ns, ration.ahead_before_ns);
    ration.ahead_ns = if lately < before { lately } else { before };
}

#[inline(always)]
fn ktime() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// What part of a wait of `total` nanoseconds that ends now the thread waited for a CPU.
#[inline(always)]
pub fn time_queued(task: u64, wait: &ThreadWait, now: Now, total: u64) -> u64 {
    let on_other_queues = member::<u64>(task, loaded!(LAYOUT.task_run_delay)).wrapping_sub(wait.ready_ns);
    let last: u64 = member(task, loaded!(LAYOUT.task_last_queued));
    let here = if last == 0 { 0 } else { now.queue_ns.saturating_sub(last) };
    let queued = on_other_queues.wrapping_add(here);
    if queued < total { queued } else { total }
}

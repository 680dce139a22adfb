//! How long a thread that was blocked has been ready to run, by the scheduler's own books.
//!
//! `sched_info` (`kernel/sched/stats.h`) notes when a thread is queued, by the clock of its run queue, and adds what it
//! waited to `run_delay` when it is moved to another queue. That is cheaper than to watch every thread wake up, but
//! the clock is another one: `sched_clock` runs at the counter's rate, `CLOCK_MONOTONIC` at the rate that NTP makes of it.
//! The scheduler reads its clock just before a switch (or, where a thread that woke up takes the CPU, some time
//! before), so the least difference seen lately is the difference.

use profiler_common::abi::waits::{Ration, ThreadWait};

use super::member;
use crate::layout::loaded;

/// How long differences are good for, nanoseconds: rates differ by less than 100 parts in a million, a microsecond
/// in ten milliseconds.
const COMPARISON: u64 = 1 << 22;
/// Within that time, the clocks are compared at one switch in four: where these bits of the time happen to be zero.
const CHANCE: u64 = 0xc0;

/// Compares the clocks at a switch to `next`.
#[inline(always)]
pub fn compare_clocks(ration: &mut Ration, next: u64, now: u64) {
    let age = now.wrapping_sub(ration.compared_ns);
    if age < COMPARISON && now & CHANCE != 0 {
        return;
    }
    let queues: u64 = member(next, loaded!(LAYOUT.task_cfs_rq));
    let queue: u64 = member(queues, loaded!(LAYOUT.cfs_rq_rq));
    let clock: u64 = member(queue, loaded!(LAYOUT.rq_clock));
    let ahead = now.wrapping_sub(clock) as i64;
    if age >= COMPARISON {
        ration.ahead_ns[1] = if age < 2 * COMPARISON { ration.ahead_ns[0] } else { i64::MAX };
        ration.ahead_ns[0] = ahead;
        ration.compared_ns = now;
    } else if ahead < ration.ahead_ns[0] {
        ration.ahead_ns[0] = ahead;
    }
}

/// What part of a wait of `total` nanoseconds that ends `now` the thread waited for a CPU.
#[inline(always)]
pub fn time_queued(ration: &Ration, task: u64, wait: &ThreadWait, now: u64, total: u64) -> u64 {
    let on_other_queues = member::<u64>(task, loaded!(LAYOUT.task_run_delay)).wrapping_sub(wait.run_delay_ns);
    let last: u64 = member(task, loaded!(LAYOUT.task_last_queued));
    let here = if last == 0 {
        0
    } else {
        let [recent, before] = ration.ahead_ns;
        let ahead = if recent < before { recent } else { before };
        let since = now.wrapping_sub(last).wrapping_sub(ahead as u64) as i64;
        if since > 0 { since as u64 } else { 0 }
    };
    let queued = on_other_queues.wrapping_add(here);
    if queued < total { queued } else { total }
}

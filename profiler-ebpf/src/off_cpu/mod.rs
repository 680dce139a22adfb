//! The scheduler's events: which threads wait, where, and for how long.
//!
//! A thread that leaves its CPU is remembered with the time and, if its wait was chosen, with the row that has its
//! stack: only now can its memory be read. When it runs again, on whichever CPU, the row is raised by what it
//! waited, split at the moment it was woken.

mod queue;
mod ration;
mod sites;
mod threads;

use core::ptr::read_volatile;

use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, generated::bpf_ktime_get_ns},
    programs::BtfTracePointContext,
};
use profiler_common::abi::{
    counter::Counter,
    sample::{EventKind, SampleKey, StackEnd},
    waits::{Ration, ThreadWait, WaitControl},
};

use crate::{
    aggregate::{self, mix},
    capture, cost,
    layout::loaded,
    maps::{self, RATIONS, WAIT_CONTROL, WAIT_WALK_ON, count},
    scope,
    unwind::{self, Scratch},
};

/// Thread states (`include/linux/sched.h`, unchanged since 4.14).
const TASK_UNINTERRUPTIBLE: u64 = 0x2;
const TASK_DEAD: u64 = 0x80;
/// With [`TASK_UNINTERRUPTIBLE`]: a kernel thread without work.
const TASK_NOLOAD: u64 = 0x400;

const RATIONED: u8 = StackEnd::Rationed as u8;
/// Frames of tracing that may lie above the scheduler's.
const MAX_TRACING_FRAMES: usize = 12;

/// `sched_switch(preempt, prev, next[, prev_state])`; `walk` drives the user stack walk.
#[inline(always)]
pub fn switch(ctx: &BtfTracePointContext, walk: impl Fn(&BtfTracePointContext, &mut Scratch)) {
    let (Some(ration), Some(control)) = (RATIONS.get_ptr_mut(0), WAIT_CONTROL.get_ptr(0)) else { return };
    // SAFETY: this CPU's value is used by one program at a time: they run with interrupts off. What is read of the control
    // only changes while no program runs.
    let (ration, control) = unsafe { (&mut *ration, &*control) };
    let began = cost::begin_switch(ration);
    threads::touch(member(ctx.arg(1), loaded!(LAYOUT.task_pid)));
    let now = queue::now(ration, ctx.arg(2));
    arrive(ctx.arg(2), now, control.since_ns, ration);
    leave(ctx, now.monotonic_ns, ration, control, walk);
    cost::end_switch(began);
}

/// Whether the thread that leaves the CPU does so for the last time.
#[inline(always)]
fn is_ending(ctx: &BtfTracePointContext) -> bool {
    !is_preempted(ctx) && state(ctx) & TASK_DEAD != 0
}

#[inline(always)]
fn is_preempted(ctx: &BtfTracePointContext) -> bool {
    ctx.arg::<u64>(0) & 1 == 1
}

/// The state in which a thread leaves the CPU.
#[inline(always)]
fn state(ctx: &BtfTracePointContext) -> u64 {
    if loaded!(SETTINGS.has_state_argument) == 1 {
        ctx.arg::<u64>(3) & 0xffff_ffff
    } else {
        u64::from(member::<u32>(ctx.arg(1), loaded!(LAYOUT.task_state)))
    }
}

/// `sched_wakeup(task)`: from here on the thread only waits for a CPU. Used where the scheduler does not tell.
#[inline(always)]
pub fn wake(ctx: &BtfTracePointContext) {
    let task: u64 = ctx.arg(0);
    let thread: u32 = member(task, loaded!(LAYOUT.task_pid));
    let Some(wait) = threads::find(thread) else { return };
    if wait.began_ns != 0 && wait.ready_ns == 0 && wait.kind != EventKind::RunQueue as u8 {
        // SAFETY: the helper has no arguments.
        wait.ready_ns = unsafe { bpf_ktime_get_ns() };
    }
}

/// Goes on with the walk that another program could not finish.
#[inline(always)]
pub fn walk_on(ctx: &BtfTracePointContext) {
    let Some(scratch) = maps::scratch(maps::OFF_CPU) else { return };
    // SAFETY: as in `take_stack`, whose run this goes on with.
    let scratch = unsafe { &mut *scratch };
    unwind::walk_in_parts(ctx, unwind::advance_off_cpu, &WAIT_WALK_ON);
    finish(scratch);
}

/// A thread gets the CPU: what it waited is charged.
#[inline(always)]
fn arrive(task: u64, at: queue::Now, since: u64, ration: &mut Ration) {
    let thread: u32 = member(task, loaded!(LAYOUT.task_pid));
    let known = threads::find(thread);
    if thread == 0 || known.as_ref().is_some_and(|wait| wait.began_ns == 0) {
        return;
    }
    if scope::of(task, tgid(task)) != scope::IN_SCOPE {
        // It may have been in scope when it left its CPU.
        if scope::has_gaps()
            && let Some(wait) = known
        {
            wait.began_ns = 0;
        }
        return;
    }
    let Some(wait) = known else {
        ration.ended += 1;
        return arrive_unknown(task, thread, at.monotonic_ns);
    };
    let now = at.monotonic_ns;
    let began = wait.began_ns;
    wait.began_ns = 0;
    // (What began before has been charged already. Slots are emptied then, but a program may just have been at it.)
    let total = now.saturating_sub(if began < since { since } else { began });
    let queued = if wait.kind == EventKind::RunQueue as u8 {
        total
    } else if loaded!(SETTINGS.has_queue_times) == 1 {
        queue::time_queued(task, wait, at, total)
    } else if wait.ready_ns != 0 {
        now.saturating_sub(wait.ready_ns)
    } else {
        0
    };
    // (More than any shift is never set, which the verifier does not know.)
    let thinned = wait.thinned & 15;
    let (blocked_once, queued_once) = (total.saturating_sub(queued), queued);
    let (blocked, queued) = (blocked_once << thinned, queued_once << thinned);
    ration::note_duration(ration, wait.kind, total, thinned, blocked, queued);
    sites::learn(wait, total);
    let is_short = total < loaded!(SETTINGS.min_wait_ns);
    if is_short {
        count(Counter::WaitsShort);
    }
    if wait.weight == 0 {
        let is_represented = wait.unsampled == 0;
        if !is_short && !(is_represented && sites::owe(wait, blocked, queued)) {
            let end = if is_represented { RATIONED } else { wait.unsampled };
            charge_without_stack(task, wait.kind, end, blocked, queued);
        }
        return;
    }
    if is_short {
        charge(task, wait, 0, 0, 0);
        return;
    }
    let weight = u64::from(wait.weight);
    // (A place that is another's meanwhile was charged for the others.)
    let (mut blocked_ns, mut queued_ns) = (blocked, queued);
    if let Some(site) = sites::settle(task, wait) {
        site.key = wait.key;
        blocked_ns = sites::balance(&mut site.blocked, blocked, blocked_once * weight);
        queued_ns = sites::balance(&mut site.queued, queued, queued_once * weight);
    }
    charge(task, wait, weight, blocked_ns, queued_ns);
}

/// A thread gets the CPU that was never seen to leave one: it is new, or its wait began before the recording.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn arrive_unknown(task: u64, thread: u32, now: u64) {
    let Some(control) = WAIT_CONTROL.get_ptr(0) else { return };
    // SAFETY: an array's slots are always there.
    let (since, is_incomplete) = unsafe { ((*control).since_ns, (*control).is_incomplete == 1) };
    if since == 0 {
        return;
    }
    // Where it was out of scope, it has run and waited since, and nobody knows how long.
    if threads::remember(thread).is_none() || scope::has_gaps() {
        return;
    }
    let started: u64 = member(task, loaded!(LAYOUT.task_start_time));
    if started >= since {
        let queued = now.saturating_sub(started);
        charge_without_stack(task, EventKind::RunQueue as u8, StackEnd::NotStarted as u8, 0, queued);
        return;
    }
    if !is_incomplete {
        let blocked = now.saturating_sub(since);
        charge_without_stack(task, EventKind::Blocked as u8, StackEnd::BeganEarlier as u8, blocked, 0);
    }
}

/// Raises the row of a sampled wait. Where it is gone already, because the agent has read it, another row refers
/// to it.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn charge(task: u64, wait: &ThreadWait, weight: u64, blocked: u64, queued: u64) {
    const ENDED: u64 = 1 << 32;
    let key = wait.key;
    if aggregate::raise(&key, weight, blocked, queued, ENDED) {
        return;
    }
    let Some(scratch) = maps::scratch(maps::OFF_CPU) else { return };
    // SAFETY: as in `take_stack`.
    let scratch = unsafe { &mut *scratch };
    let header = &mut scratch.sample.header;
    let tgid = tgid(task);
    capture::identify(header, task, tgid, wait.kind);
    header.user_end = StackEnd::Forgotten as u8;
    header.count = weight;
    header.blocked_ns = blocked;
    header.queued_ns = queued;
    header.waits = ENDED;
    header.kernel_frames = key.shape as u16;
    header.user_frames = (key.shape >> 16) as u16;
    header.is_reference = 1;
    header.hash = key.hash;
    if !aggregate::add_reference(header, &key) {
        count(Counter::WaitsLost);
        maps::add(Counter::WaitsLostNs, blocked + queued);
    }
}

/// Charges a wait of which there is no stack to its thread.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn charge_without_stack(task: u64, kind: u8, end: u8, blocked: u64, queued: u64) {
    let tgid = tgid(task);
    let Some(scratch) = maps::scratch(maps::OFF_CPU) else { return };
    // SAFETY: as in `take_stack`.
    let scratch = unsafe { &mut *scratch };
    let header = &mut scratch.sample.header;
    capture::identify(header, task, tgid, kind);
    header.user_end = end;
    header.count = 1;
    header.blocked_ns = blocked;
    header.queued_ns = queued;
    header.hash = mix(capture::hash_identity(header), u64::from(end));
    let key = SampleKey { hash: header.hash, tgid, shape: 0 };
    if aggregate::raise(&key, 1, blocked, queued, 0) {
        return;
    }
    if !aggregate::add_reference(header, &key) {
        count(Counter::WaitsLost);
        maps::add(Counter::WaitsLostNs, blocked + queued);
    }
}

/// The current thread leaves the CPU.
#[inline(always)]
fn leave(
    ctx: &BtfTracePointContext,
    now: u64,
    ration: &mut Ration,
    control: &WaitControl,
    walk: impl Fn(&BtfTracePointContext, &mut Scratch),
) {
    let task: u64 = ctx.arg(1);
    let thread: u32 = member(task, loaded!(LAYOUT.task_pid));
    if thread == 0 {
        return;
    }
    if is_ending(ctx) {
        if let Some(wait) = threads::find(thread) {
            sites::settle(task, wait);
            threads::forget(thread);
        }
        return;
    }
    let Some(thinned) = ration::thin(ration, threads::find(thread), control.share, now) else { return };
    let tgid = tgid(task);
    if scope::of(task, tgid) != scope::IN_SCOPE {
        return;
    }
    let state = state(ctx);
    let kind = if is_preempted(ctx) || state == 0 {
        EventKind::RunQueue
    } else if state & (TASK_UNINTERRUPTIBLE | TASK_NOLOAD) == TASK_UNINTERRUPTIBLE {
        EventKind::Uninterruptible
    } else {
        EventKind::Blocked
    };
    let Some(wait) = threads::find(thread).or_else(|| threads::remember(thread)) else { return };
    sites::enter(task, wait, sites::tag(task, tgid, thread, kind), now);
    wait.began_ns = now;
    wait.ready_ns =
        if loaded!(SETTINGS.has_queue_times) == 1 { member(task, loaded!(LAYOUT.task_run_delay)) } else { 0 };
    wait.kind = kind as u8;
    wait.weight = 0;
    wait.unsampled = 0;
    wait.thinned = thinned;
    match ration::choose(ration, u64::from(control.stacks_per_second), wait, now) {
        ration::Choice::Stack(weight) => {
            wait.weight = weight << (thinned & 15);
            count(Counter::WaitsSampled);
            take_stack(ctx, task, tgid, kind, walk);
        }
        ration::Choice::Represented => {}
        ration::Choice::Rationed => {
            wait.unsampled = RATIONED;
            count(Counter::WaitsRationed);
        }
    }
}

/// Records the stacks of the thread that leaves the CPU.
#[inline(always)]
fn take_stack(
    ctx: &BtfTracePointContext,
    task: u64,
    tgid: u32,
    kind: EventKind,
    walk: impl Fn(&BtfTracePointContext, &mut Scratch),
) {
    let Some(scratch) = maps::scratch(maps::OFF_CPU) else { return };
    // SAFETY: this CPU's scratch is used by one program at a time: they run with interrupts off; the map value is
    // initialized.
    let scratch = unsafe { &mut *scratch };
    scratch.began_ns = cost::now();
    capture::identify(&mut scratch.sample.header, task, tgid, kind as u8);
    scratch.sample.header.waits = 1;
    kernel_stack(ctx, scratch);
    capture::user_stack(ctx, scratch, task, true, walk);
    finish(scratch);
}

/// Records the kernel stack from the scheduler on. How many frames of tracing lie above it is learned once.
#[inline(always)]
fn kernel_stack(ctx: &BtfTracePointContext, scratch: &mut Scratch) {
    let identity = capture::hash_identity(&scratch.sample.header);
    scratch.frames = 0;
    scratch.hash = identity;
    capture::kernel_stack(ctx, scratch, scratch.tracing_frames);
    if is_scheduler(scratch.sample.frames[0]) {
        return;
    }
    for index in 1..MAX_TRACING_FRAMES {
        if is_scheduler(scratch.sample.frames[index]) {
            scratch.tracing_frames = scratch.tracing_frames.wrapping_add(index as u8);
            scratch.frames = 0;
            scratch.hash = identity;
            capture::kernel_stack(ctx, scratch, scratch.tracing_frames);
            return;
        }
    }
}

/// Whether an address belongs to the scheduler.
#[inline(always)]
fn is_scheduler(address: u64) -> bool {
    address >= loaded!(SETTINGS.sched_text_start) && address < loaded!(SETTINGS.sched_text_end)
}

/// Counts the begin of the wait whose stacks are complete, and lets the thread know its row.
#[inline(always)]
fn finish(scratch: &mut Scratch) {
    capture::complete(scratch);
    let is_counted = aggregate::add(scratch);
    cost::charge(Counter::WaitStacksNs, scratch.began_ns);
    let Some(wait) = threads::find(bpf_get_current_pid_tgid() as u32) else { return };
    if is_counted {
        wait.key = scratch.sample.header.key();
    } else {
        wait.weight = 0;
        wait.unsampled = StackEnd::BufferFull as u8;
    }
}

/// The PID of a thread's process in the agent's PID namespace; zero: it is not in there.
#[inline(always)]
fn tgid(task: u64) -> u32 {
    // A plain load is cheaper, where it says enough.
    if loaded!(SETTINGS.pid_namespace) == 0 { member(task, loaded!(LAYOUT.task_tgid)) } else { scope::tgid(task) }
}

/// Reads a member of a kernel object whose type the verifier knows: a plain load.
#[inline(always)]
fn member<T: Copy>(object: u64, offset: u32) -> T {
    // SAFETY: the verifier only accepts a load of an object it knows; one that turns out to be gone reads as zero.
    unsafe { read_volatile((object + u64::from(offset)) as *const T) }
}

//! The scheduler's events: which threads wait, where, and for how long.
//!
//! A thread that leaves its CPU is remembered with the time and, if its wait was chosen, with the row that has its
//! stack: only now can its memory be read. When it runs again, on whichever CPU, the row is raised by what it
//! waited, split at the moment it was woken.

use core::ptr::read_volatile;

use aya_ebpf::{
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{bpf_ktime_get_ns, bpf_task_pt_regs},
    },
    programs::BtfTracePointContext,
};
use profiler_common::{
    abi::{
        counter::Counter,
        sample::{EventKind, SampleKey, StackEnd},
        waits::{Ration, SITES, THREAD_SLOTS, ThreadWait, WaitSite},
    },
    unwind::pt_regs,
};

use crate::{
    aggregate::{self, mix},
    capture,
    layout::loaded,
    lifecycle,
    maps::{self, MORE_THREADS, RATIONS, THREADS, WAIT_CONTROL, WAIT_SITES, WAIT_WALK_ON, count},
    memory::atomic_add,
    scope,
    unwind::{self, Scratch},
};

/// Thread states (`include/linux/sched.h`, unchanged since 4.14).
const TASK_UNINTERRUPTIBLE: u64 = 0x2;
const TASK_DEAD: u64 = 0x80;
/// With [`TASK_UNINTERRUPTIBLE`]: a kernel thread without work.
const TASK_NOLOAD: u64 = 0x400;

/// Time between two looks at the ration: about 16 ms, in nanoseconds.
const PERIOD: u64 = 1 << 24;
/// A stack, in the units of [`Ration::tokens`]: so that a ration of one per second earns one unit per nanosecond.
const STACK: u64 = 1_000_000_000;
/// What has to be earned before it says something: eight stacks.
const ENOUGH: u64 = 8 * STACK;
/// The ration that can be saved: this part of a second.
const BURST_DIVISOR: u64 = 4;
/// Most waits that one may stand for.
const MAX_WEIGHT: u64 = 1 << 16;
/// Expectations are at least this, nanoseconds: nothing is shorter.
const SHORTEST: u64 = 256;
const RATIONED: u8 = StackEnd::Rationed as u8;
/// Frames of tracing that may lie above the scheduler's.
const MAX_TRACING_FRAMES: usize = 12;

/// `sched_switch(preempt, prev, next[, prev_state])`; `walk` drives the user stack walk.
#[inline(always)]
pub fn switch(ctx: &BtfTracePointContext, walk: impl Fn(&BtfTracePointContext, &mut Scratch)) {
    let Some(control) = WAIT_CONTROL.get_ptr(0) else { return };
    // SAFETY: an array's slots are always there.
    let since = unsafe { (*control).since_ns };
    if since == 0 {
        return;
    }
    let Some(ration) = RATIONS.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's value is used by one program at a time: they run with interrupts off.
    let ration = unsafe { &mut *ration };
    // SAFETY: the helper has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    arrive(ctx.arg(2), now, since, ration);
    leave(ctx, now, ration, walk);
}

/// What is remembered of a thread.
#[inline(always)]
fn thread_wait(thread: u32) -> Option<&'static mut ThreadWait> {
    let slot = THREADS.get_ptr_mut(thread & (THREAD_SLOTS as u32 - 1))?;
    // SAFETY: an array's slots are always there; the scheduler's locks order what happens to one thread.
    let slot = unsafe { &mut *slot };
    if slot.thread == thread {
        return Some(slot);
    }
    if slot.thread == 0 {
        return None;
    }
    // SAFETY: a value of this preallocated map stays readable while the program runs; as above.
    MORE_THREADS.get_ptr_mut(thread).map(|wait| unsafe { &mut *wait })
}

/// Makes room for a thread that is not remembered.
#[inline(always)]
fn remember(thread: u32) -> Option<&'static mut ThreadWait> {
    let slot = THREADS.get_ptr_mut(thread & (THREAD_SLOTS as u32 - 1))?;
    // SAFETY: as in `thread_wait`. (Should two CPUs take the same slot at the same moment, the later one has it, and
    // the other thread's wait is not known when it ends.)
    let slot = unsafe { &mut *slot };
    if slot.thread == 0 {
        slot.began_ns = 0;
        slot.thread = thread;
        return Some(slot);
    }
    let _checked_below = MORE_THREADS.insert(thread, ThreadWait { thread, ..ThreadWait::default() }, 0);
    let wait = MORE_THREADS.get_ptr_mut(thread);
    if wait.is_none() {
        count(Counter::ThreadsFull);
        // From now on, an unknown thread may also be one for which there was no room.
        if let Some(control) = WAIT_CONTROL.get_ptr_mut(0) {
            // SAFETY: an array's slots are always there.
            unsafe { (*control).is_incomplete = 1 };
        }
    }
    // SAFETY: as in `thread_wait`.
    wait.map(|wait| unsafe { &mut *wait })
}

/// Forgets a thread that has ended.
#[inline(always)]
fn forget(thread: u32) {
    let Some(slot) = THREADS.get_ptr_mut(thread & (THREAD_SLOTS as u32 - 1)) else { return };
    // SAFETY: as in `thread_wait`.
    let slot = unsafe { &mut *slot };
    if slot.thread == thread {
        slot.began_ns = 0;
        slot.thread = 0;
    } else if slot.thread != 0 {
        let _unknown_is_fine = MORE_THREADS.remove(thread);
    }
}

/// `sched_wakeup(task)`: from here on the thread only waits for a CPU.
#[inline(always)]
pub fn wake(ctx: &BtfTracePointContext) {
    let task: u64 = ctx.arg(0);
    let thread: u32 = member(task, loaded!(LAYOUT.task_pid));
    let Some(wait) = thread_wait(thread) else { return };
    if wait.began_ns != 0 && wait.woken_ns == 0 && wait.kind != EventKind::RunQueue as u8 {
        // SAFETY: the helper has no arguments.
        wait.woken_ns = unsafe { bpf_ktime_get_ns() };
    }
}

/// Goes on with the walk that another program could not finish.
#[inline(always)]
pub fn walk_on(ctx: &BtfTracePointContext) {
    let Some(scratch) = maps::scratch(maps::OFF_CPU) else { return };
    // SAFETY: as in `take_stack`, whose run this goes on with.
    let scratch = unsafe { &mut *scratch };
    unwind::walk_in_parts(ctx, scratch, &WAIT_WALK_ON);
    finish(scratch);
}

/// A thread gets the CPU: what it waited is charged.
#[inline(always)]
fn arrive(task: u64, now: u64, since: u64, ration: &mut Ration) {
    let thread: u32 = member(task, loaded!(LAYOUT.task_pid));
    if thread == 0 {
        return;
    }
    let tgid: u32 = member(task, loaded!(LAYOUT.task_tgid));
    if !scope::includes(tgid) {
        return;
    }
    let Some(wait) = thread_wait(thread) else {
        ration.ended += 1;
        return arrive_unknown(task, thread, tgid, now, since);
    };
    let began = wait.began_ns;
    if began == 0 {
        return;
    }
    wait.began_ns = 0;
    let total = now.saturating_sub(began);
    let queued = if wait.kind == EventKind::RunQueue as u8 {
        total
    } else if wait.woken_ns != 0 {
        now.saturating_sub(wait.woken_ns)
    } else {
        0
    };
    let blocked = total.saturating_sub(queued);
    note_duration(ration, wait.kind, blocked, queued);
    let mut site = site_of(wait.site);
    if let Some(site) = site.as_deref_mut() {
        learn(site, total, now);
    }
    if wait.weight == 0 {
        match site {
            Some(site) if wait.unsampled == 0 => {
                owe(&raw mut site.blocked_ns, blocked);
                owe(&raw mut site.queued_ns, queued);
            }
            _ => {
                let (kind, end) = (wait.kind, if wait.unsampled == 0 { RATIONED } else { wait.unsampled });
                charge_without_stack(task, tgid, kind, end, blocked, queued);
            }
        }
        return;
    }
    if total < loaded!(SETTINGS.min_wait_ns) {
        count(Counter::WaitsShort);
        charge(task, tgid, wait, 0, 0, 0);
        return;
    }
    let weight = u64::from(wait.weight);
    let (mut blocked_ns, mut queued_ns) = (blocked * weight, queued * weight);
    if let Some(site) = site {
        site.key = wait.key;
        blocked_ns = balance(&raw mut site.blocked_ns, blocked, blocked_ns);
        queued_ns = balance(&raw mut site.queued_ns, queued, queued_ns);
    }
    charge(task, tgid, wait, weight, blocked_ns, queued_ns);
}

/// The place of a wait, if the slot still belongs to it.
#[inline(always)]
fn site_of(tag: u32) -> Option<&'static mut WaitSite> {
    let site = WAIT_SITES.get_ptr_mut(tag & (SITES as u32 - 1))?;
    // SAFETY: an array's slots are always there; what several CPUs raise at once is raised atomically, and of the
    // rest the last writer is as good as any.
    let site = unsafe { &mut *site };
    if site.tag == tag && tag != 0 { Some(site) } else { None }
}

/// Lets the expectation learn from a wait that ended.
#[inline(always)]
fn learn(site: &mut WaitSite, total: u64, now: u64) {
    let faded = site.expected_ns - site.expected_ns / 8;
    site.expected_ns = if total > faded { total } else { faded };
    site.used_ns = now;
}

/// Notes time that no sample was charged with.
#[inline(always)]
fn owe(balance: *mut i64, time: u64) {
    if time != 0 {
        atomic_add(balance.cast(), time);
    }
}

/// What a sampled wait is charged with that lasted `time` and stands for `weighted`: a part of what the place is due
/// or owes corrects it, so that weights come out exactly right in the end.
#[inline(always)]
fn balance(balance: *mut i64, time: u64, weighted: u64) -> u64 {
    // SAFETY: an array's slots are always there.
    let due = unsafe { balance.read_volatile() };
    let after = due - (weighted - time) as i64;
    let corrected = weighted as i64 + (after >> 2);
    let charged = if corrected > 0 { corrected as u64 } else { 0 };
    atomic_add(balance.cast(), time.wrapping_sub(charged));
    charged
}

/// A thread gets the CPU that was never seen to leave one: it is new, or its wait began before the recording.
#[inline(always)]
fn arrive_unknown(task: u64, thread: u32, tgid: u32, now: u64, since: u64) {
    if remember(thread).is_none() {
        return;
    }
    let started: u64 = member(task, loaded!(LAYOUT.task_start_time));
    if started >= since {
        let queued = now.saturating_sub(started);
        charge_without_stack(task, tgid, EventKind::RunQueue as u8, StackEnd::NotStarted as u8, 0, queued);
        return;
    }
    let is_incomplete = match WAIT_CONTROL.get_ptr(0) {
        // SAFETY: an array's slots are always there.
        Some(control) => (unsafe { (*control).is_incomplete }) == 1,
        None => true,
    };
    if !is_incomplete {
        let blocked = now.saturating_sub(since);
        charge_without_stack(task, tgid, EventKind::Blocked as u8, StackEnd::BeganEarlier as u8, blocked, 0);
    }
}

/// Lets this CPU's totals and expectation learn from a wait that ended.
#[inline(always)]
fn note_duration(ration: &mut Ration, kind: u8, blocked: u64, queued: u64) {
    ration.ended += 1;
    ration.waited_ns[usize::from(kind & 7)] += blocked;
    ration.waited_ns[EventKind::RunQueue as usize] += queued;
    let total = blocked + queued;
    // A second is as good as forever.
    let bounded = if total > STACK { STACK } else { total };
    ration.typical_ns = ration.typical_ns - ration.typical_ns / 64 + bounded / 64;
}

/// Raises the row of a sampled wait. Where it is gone already, because the agent has read it, another row refers
/// to it.
#[inline(always)]
fn charge(task: u64, tgid: u32, wait: &ThreadWait, weight: u64, blocked: u64, queued: u64) {
    const ENDED: u64 = 1 << 32;
    let key = wait.key;
    if aggregate::raise(&key, weight, blocked, queued, ENDED) {
        return;
    }
    let Some(scratch) = maps::scratch(maps::OFF_CPU) else { return };
    // SAFETY: as in `take_stack`.
    let scratch = unsafe { &mut *scratch };
    let header = &mut scratch.sample.header;
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
#[inline(always)]
fn charge_without_stack(task: u64, tgid: u32, kind: u8, end: u8, blocked: u64, queued: u64) {
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
fn leave(ctx: &BtfTracePointContext, now: u64, ration: &mut Ration, walk: impl Fn(&BtfTracePointContext, &mut Scratch)) {
    let pid_tgid = bpf_get_current_pid_tgid();
    let (tgid, thread) = ((pid_tgid >> 32) as u32, pid_tgid as u32);
    if thread == 0 || !scope::includes(tgid) {
        return;
    }
    let task: u64 = ctx.arg(1);
    let is_preempted = ctx.arg::<u64>(0) & 1 == 1;
    let state: u64 = if loaded!(SETTINGS.has_state_argument) == 1 {
        ctx.arg::<u64>(3) & 0xffff_ffff
    } else {
        u64::from(member::<u32>(task, loaded!(LAYOUT.task_state)))
    };
    if !is_preempted && state & TASK_DEAD != 0 {
        forget(thread);
        return;
    }
    let kind = if is_preempted || state == 0 {
        EventKind::RunQueue
    } else if state & (TASK_UNINTERRUPTIBLE | TASK_NOLOAD) == TASK_UNINTERRUPTIBLE {
        EventKind::Uninterruptible
    } else {
        EventKind::Blocked
    };
    let Some(wait) = thread_wait(thread).or_else(|| remember(thread)) else { return };
    wait.began_ns = now;
    wait.woken_ns = 0;
    wait.kind = kind as u8;
    wait.weight = 0;
    wait.unsampled = 0;
    let tag = tag(task, tgid, kind);
    wait.site = tag;
    match choose(ration, claim_site(tag, tgid, now), now) {
        Choice::Stack(weight) => {
            wait.weight = weight;
            count(Counter::WaitsSampled);
            take_stack(ctx, task, tgid, kind, walk);
        }
        Choice::Represented => {}
        Choice::Rationed => {
            wait.unsampled = RATIONED;
            count(Counter::WaitsRationed);
        }
    }
}

/// The place of a wait that begins: its own, or one that is free. `None`: the slot is another's.
#[inline(always)]
fn claim_site(tag: u32, tgid: u32, now: u64) -> Option<&'static mut WaitSite> {
    let site = WAIT_SITES.get_ptr_mut(tag & (SITES as u32 - 1))?;
    // SAFETY: as in `site_of`.
    let site = unsafe { &mut *site };
    if site.tag != tag {
        if site.tag != 0 {
            return None;
        }
        site.expected_ns = 0;
        site.key = SampleKey { hash: 0, tgid: 0, shape: 0 };
        site.tgid = tgid;
        site.tag = tag;
    }
    site.used_ns = now;
    Some(site)
}

/// What is to be done about a wait that begins.
enum Choice {
    /// Take its stack; it stands for so many waits.
    Stack(u32),
    /// Others stand for it.
    Represented,
    /// Its stack would be taken if the ration allowed it.
    Rationed,
}

/// Decides about a wait that begins, before anybody knows how long it will last. Where its place has no slot, there
/// is nothing that others could stand for it by.
#[inline(always)]
fn choose(ration: &mut Ration, site: Option<&mut WaitSite>, now: u64) -> Choice {
    let rate = u64::from(loaded!(SETTINGS.wait_stacks_per_second));
    if rate == 0 {
        return Choice::Stack(1);
    }
    let elapsed = now.saturating_sub(ration.period_ns);
    if elapsed >= PERIOD {
        next_period(ration, now, elapsed, rate);
    }
    let mut weight = 1;
    if ration.threshold_ns != 0
        && let Some(site) = site
    {
        let expected = if site.expected_ns == 0 { ration.typical_ns } else { site.expected_ns };
        weight = ration.threshold_ns / if expected > SHORTEST { expected } else { SHORTEST };
        if weight > MAX_WEIGHT {
            weight = MAX_WEIGHT;
        }
        if weight <= 1 {
            weight = 1;
        } else if (random(ration, now) * weight) >> 32 != 0 {
            return Choice::Represented;
        }
    }
    ration.wanted += 1;
    if ration.tokens < STACK {
        return Choice::Rationed;
    }
    ration.tokens -= STACK;
    Choice::Stack(weight as u32)
}

/// A random number of 32 bits (xorshift64, by Marsaglia): the kernel's helper takes longer than all the rest.
#[inline(always)]
fn random(ration: &mut Ration, now: u64) -> u64 {
    let mut state = if ration.random == 0 { now | 1 } else { ration.random };
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    ration.random = state;
    state >> 32
}

/// Pays out the ration of the time since the last period, and moves the threshold so that it will last.
#[inline(always)]
fn next_period(ration: &mut Ration, now: u64, elapsed: u64, rate: u64) {
    let capacity = (STACK / BURST_DIVISOR) * rate;
    let elapsed = if elapsed > STACK { STACK } else { elapsed };
    let earned = elapsed * rate;
    // (Unless everything is used up: that says enough.)
    if earned < ENOUGH && elapsed < STACK && ration.tokens >= STACK {
        return;
    }
    let tokens = ration.tokens + earned;
    ration.tokens = if tokens > capacity { capacity } else { tokens };
    // With little left, some is saved.
    let wanted = ration.wanted * STACK * if ration.tokens < capacity / 4 { 2 } else { 1 };
    if wanted > earned && ration.tokens < capacity / 2 {
        let threshold =
            if ration.threshold_ns > ration.typical_ns { ration.threshold_ns } else { ration.typical_ns + SHORTEST };
        let threshold = threshold / 4 * (wanted / (earned / 4));
        ration.threshold_ns = if threshold > 64 * STACK { 64 * STACK } else { threshold };
    } else if wanted < earned / 4 * 3 || ration.tokens > capacity / 4 * 3 {
        ration.threshold_ns -= ration.threshold_ns / 4;
        if ration.threshold_ns < SHORTEST {
            ration.threshold_ns = 0;
        }
    }
    ration.wanted = 0;
    ration.period_ns = now;
}

/// Where the thread waits, as far as its user registers tell: see [`WaitSite::tag`].
#[inline(always)]
fn tag(task: u64, tgid: u32, kind: EventKind) -> u32 {
    let registers = if loaded!(SETTINGS.has_task_pt_regs) == 1 {
        // SAFETY: the helper takes a task that the verifier knows.
        unsafe { bpf_task_pt_regs(task as *mut _) }.cast_unsigned()
    } else {
        0
    };
    let (pc, stack) = if loaded!(SETTINGS.has_task_pt_regs) == 1 {
        (member::<u64>(registers, (pt_regs::RIP * 8) as u32), member::<u64>(registers, (pt_regs::RSP * 8) as u32))
    } else {
        (capture::saved_register(task, pt_regs::RIP), capture::saved_register(task, pt_regs::RSP))
    };
    let hash = mix(mix(u64::from(tgid) << 8 | kind as u64, pc), stack);
    // (Never zero.)
    (hash >> 32) as u32 | 1 << 31
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
    capture::identify(&mut scratch.sample.header, task, tgid, kind as u8);
    scratch.sample.header.waits = 1;
    kernel_stack(ctx, scratch);
    if capture::has_user_stack(scratch, task, true) {
        if scratch.is_exiting == 0 {
            lifecycle::announce(&scratch.sample.header.process, scratch.user_registers[pt_regs::RIP]);
        }
        unwind::start(scratch);
        walk(ctx, scratch);
    }
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
    let Some(wait) = thread_wait(bpf_get_current_pid_tgid() as u32) else { return };
    if is_counted {
        wait.key = scratch.sample.header.key();
    } else {
        wait.weight = 0;
        wait.unsampled = StackEnd::BufferFull as u8;
    }
}

/// Reads a member of a kernel object whose type the verifier knows: a plain load.
#[inline(always)]
fn member<T: Copy>(object: u64, offset: u32) -> T {
    // SAFETY: the verifier only accepts a load of an object it knows; one that turns out to be gone reads as zero.
    unsafe { read_volatile((object + u64::from(offset)) as *const T) }
}

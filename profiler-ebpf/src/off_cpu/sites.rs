//! Places of waits: how long waits last there, and what they are due.

use aya_ebpf::helpers::generated::bpf_task_pt_regs;
use profiler_common::{
    abi::{
        sample::{EventKind, SampleKey, StackEnd},
        waits::{Balance, SITES, ThreadWait, USED_SHIFT, WaitSite},
    },
    unwind::pt_regs,
};

use super::{member, tgid};
use crate::{aggregate::mix, capture, layout::loaded, maps::WAIT_SITES};

/// Expectations that are longer say no more.
const LONGEST: u64 = u32::MAX as u64;

/// Where the thread waits: see [`WaitSite::tag`]. Where it lost its CPU is no place: it would have run on.
#[inline(always)]
pub fn tag(task: u64, tgid: u32, thread: u32, kind: EventKind) -> u32 {
    // (An ID of a thread has 22 bits.)
    let whose = u64::from(tgid) << 32 | u64::from(thread) << 8 | kind as u64;
    let (pc, stack) = if matches!(kind, EventKind::RunQueue) { (0, 0) } else { user_registers(task) };
    // (Never zero.)
    (mix(mix(whose, pc), stack) >> 32) as u32 | 1 << 31
}

/// The user registers that tell places apart: instruction and stack pointer.
#[inline(always)]
fn user_registers(task: u64) -> (u64, u64) {
    if loaded!(SETTINGS.has_task_pt_regs) == 1 {
        // SAFETY: the helper takes a task that the verifier knows.
        let registers = unsafe { bpf_task_pt_regs(task as *mut _) }.cast_unsigned();
        (member(registers, (pt_regs::RIP * 8) as u32), member(registers, (pt_regs::RSP * 8) as u32))
    } else {
        (capture::saved_register(task, pt_regs::RIP), capture::saved_register(task, pt_regs::RSP))
    }
}

/// The thread begins to wait in a place. What is known of it is kept with the thread, since most waits are in the same
/// place as the one before: another line of memory, which the caches have long lost, takes as long as all the rest.
#[inline(always)]
pub fn enter(task: u64, wait: &mut ThreadWait, tag: u32, now: u64) {
    let used = (now >> USED_SHIFT) as u32;
    if wait.site != tag || wait.used != used {
        turn_to(task, wait, tag, used);
    }
}

/// The thread turns to a place: its own, or one that is free. It has none where that is another's.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn turn_to(task: u64, wait: &mut ThreadWait, tag: u32, used: u32) {
    settle(task, wait);
    wait.site = 0;
    wait.used = used;
    let Some(site) = WAIT_SITES.get_ptr_mut(tag & (SITES as u32 - 1)) else { return };
    // SAFETY: as in `of`.
    let site = unsafe { &mut *site };
    if site.tag != tag {
        if site.tag != 0 {
            return;
        }
        site.expected_ns = 0;
        site.key = SampleKey { hash: 0, tgid: tgid(task), shape: 0 };
        site.tag = tag;
    }
    site.used = used;
    wait.site = tag;
    wait.expected_ns = site.expected_ns;
}

/// Lets the thread's place know what is kept with the thread. `None`: it has none, or it is another's meanwhile.
#[inline(always)]
pub fn settle(task: u64, wait: &mut ThreadWait) -> Option<&'static mut WaitSite> {
    let (blocked, queued) = (u64::from(wait.blocked_owed_ns), u64::from(wait.queued_owed_ns));
    wait.blocked_owed_ns = 0;
    wait.queued_owed_ns = 0;
    let site = of(wait.site);
    match site {
        Some(site) => {
            site.expected_ns = wait.expected_ns;
            add(&mut site.blocked, blocked);
            add(&mut site.queued, queued);
            Some(site)
        }
        None => {
            if blocked + queued != 0 {
                super::charge_without_stack(task, wait.kind, StackEnd::Rationed as u8, blocked, queued);
            }
            None
        }
    }
}

/// The place of a wait, if the slot still belongs to it.
#[inline(always)]
fn of(tag: u32) -> Option<&'static mut WaitSite> {
    let site = WAIT_SITES.get_ptr_mut(tag & (SITES as u32 - 1))?;
    // SAFETY: an array's slots are always there. A place is one thread's, and what happens to one thread is ordered; the agent only writes members that programs only read.
    let site = unsafe { &mut *site };
    if site.tag == tag && tag != 0 { Some(site) } else { None }
}

/// Lets the expectation learn from a wait that ended.
#[inline(always)]
pub fn learn(wait: &mut ThreadWait, total: u64) {
    let faded = u64::from(wait.expected_ns - wait.expected_ns / 8);
    let expected = if total > faded { total } else { faded };
    wait.expected_ns = if expected > LONGEST { LONGEST as u32 } else { expected as u32 };
}

/// Notes time that no sample was charged with. False: the place is gone.
#[inline(always)]
pub fn owe(wait: &mut ThreadWait, blocked: u64, queued: u64) -> bool {
    let blocked = u64::from(wait.blocked_owed_ns) + blocked;
    let queued = u64::from(wait.queued_owed_ns) + queued;
    // (Waits may stand for many, and for longer than they could last.)
    if blocked <= LONGEST && queued <= LONGEST {
        wait.blocked_owed_ns = blocked as u32;
        wait.queued_owed_ns = queued as u32;
        return true;
    }
    let Some(site) = of(wait.site) else { return false };
    wait.blocked_owed_ns = 0;
    wait.queued_owed_ns = 0;
    add(&mut site.blocked, blocked);
    add(&mut site.queued, queued);
    true
}

#[inline(always)]
fn add(balance: &mut Balance, time: u64) {
    balance.owed_ns = balance.owed_ns.wrapping_add(time as i64);
}

/// What a sampled wait is charged with that lasted `time` and stands for `weighted`: a part of what the place is due
/// or owes corrects it, so that weights come out exactly right in the end. It is never more than the place is due besides: a
/// wait that was expected to be short, and is the one long one of thousands, would stand for thousands of long ones.
#[inline(always)]
pub fn balance(balance: &mut Balance, time: u64, weighted: u64) -> u64 {
    // SAFETY: an array's slots are always there.
    let taken = unsafe { (&raw const balance.taken_ns).read_volatile() };
    let due = balance.owed_ns.wrapping_sub(taken);
    let after = due.wrapping_sub((weighted - time) as i64);
    let corrected = (weighted as i64).wrapping_add(after >> 2);
    let most = (time as i64).wrapping_add(if due > 0 { due } else { 0 });
    let corrected = if corrected < most { corrected } else { most };
    let charged = if corrected > 0 { corrected as u64 } else { 0 };
    add(balance, time.wrapping_sub(charged));
    charged
}

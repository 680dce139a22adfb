//! Places of waits: how long waits last there, and what they are due.

use aya_ebpf::helpers::generated::bpf_task_pt_regs;
use profiler_common::{
    abi::{
        sample::{EventKind, SampleKey},
        waits::{Balance, SITES, USED_SHIFT, WaitSite},
    },
    unwind::pt_regs,
};

use super::member;
use crate::{aggregate::mix, capture, layout::loaded, maps::WAIT_SITES};

/// Expectations that are longer say no more.
const LONGEST: u64 = u32::MAX as u64;

/// Where the thread waits: see [`WaitSite::tag`]. Where it lost its CPU is no place: it would have run on.
#[inline(always)]
pub fn tag(task: u64, tgid: u32, thread: u32, kind: EventKind) -> u32 {
    let whose = u64::from(tgid) << 32 | u64::from(thread);
    let hash = if matches!(kind, EventKind::RunQueue) {
        mix(kind as u64, whose)
    } else {
        let (pc, stack) = user_registers(task);
        mix(mix(mix(kind as u64, whose), pc), stack)
    };
    // (Never zero.)
    (hash >> 32) as u32 | 1 << 31
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

/// The place of a wait that begins: its own, or one that is free. `None`: the slot is another's.
#[inline(always)]
pub fn claim(tag: u32, tgid: u32, now: u64) -> Option<&'static mut WaitSite> {
    let site = WAIT_SITES.get_ptr_mut(tag & (SITES as u32 - 1))?;
    // SAFETY: as in `of`.
    let site = unsafe { &mut *site };
    if site.tag != tag {
        if site.tag != 0 {
            return None;
        }
        site.expected_ns = 0;
        site.key = SampleKey { hash: 0, tgid, shape: 0 };
        site.tag = tag;
    }
    site.used = (now >> USED_SHIFT) as u32;
    Some(site)
}

/// The place of a wait, if the slot still belongs to it.
#[inline(always)]
pub fn of(tag: u32) -> Option<&'static mut WaitSite> {
    let site = WAIT_SITES.get_ptr_mut(tag & (SITES as u32 - 1))?;
    // SAFETY: an array's slots are always there. A place is one thread's, and what happens to one thread is ordered; the agent only writes members that programs only read.
    let site = unsafe { &mut *site };
    if site.tag == tag && tag != 0 { Some(site) } else { None }
}

/// Lets the expectation learn from a wait that ended.
#[inline(always)]
pub fn learn(site: &mut WaitSite, total: u64, now: u64) {
    let faded = u64::from(site.expected_ns - site.expected_ns / 8);
    let expected = if total > faded { total } else { faded };
    site.expected_ns = if expected > LONGEST { LONGEST as u32 } else { expected as u32 };
    site.used = (now >> USED_SHIFT) as u32;
}

/// Notes time that no sample was charged with.
#[inline(always)]
pub fn owe(balance: &mut Balance, time: u64) {
    balance.owed_ns = balance.owed_ns.wrapping_add(time as i64);
}

/// What a sampled wait is charged with that lasted `time` and stands for `weighted`: a part of what the place is due
/// or owes corrects it, so that weights come out exactly right in the end.
#[inline(always)]
pub fn balance(balance: &mut Balance, time: u64, weighted: u64) -> u64 {
    // SAFETY: an array's slots are always there.
    let taken = unsafe { (&raw const balance.taken_ns).read_volatile() };
    let due = balance.owed_ns.wrapping_sub(taken);
    let after = due.wrapping_sub((weighted - time) as i64);
    let corrected = (weighted as i64).wrapping_add(after >> 2);
    let charged = if corrected > 0 { corrected as u64 } else { 0 };
    owe(balance, time.wrapping_sub(charged));
    charged
}

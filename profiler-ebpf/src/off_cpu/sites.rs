//! Places of waits: how long waits last there, and what they are due.

use aya_ebpf::helpers::generated::bpf_task_pt_regs;
use profiler_common::{
    abi::{
        sample::{EventKind, SampleKey},
        waits::{SITES, WaitSite},
    },
    unwind::pt_regs,
};

use super::member;
use crate::{aggregate::mix, capture, layout::loaded, maps::WAIT_SITES, memory::atomic_add};

/// Where the thread waits, as far as its user registers tell: see [`WaitSite::tag`].
#[inline(always)]
pub fn tag(task: u64, tgid: u32, kind: EventKind) -> u32 {
    let (pc, stack) = if loaded!(SETTINGS.has_task_pt_regs) == 1 {
        // SAFETY: the helper takes a task that the verifier knows.
        let registers = unsafe { bpf_task_pt_regs(task as *mut _) }.cast_unsigned();
        (member::<u64>(registers, (pt_regs::RIP * 8) as u32), member::<u64>(registers, (pt_regs::RSP * 8) as u32))
    } else {
        (capture::saved_register(task, pt_regs::RIP), capture::saved_register(task, pt_regs::RSP))
    };
    let hash = mix(mix(u64::from(tgid) << 8 | kind as u64, pc), stack);
    // (Never zero.)
    (hash >> 32) as u32 | 1 << 31
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
        site.key = SampleKey { hash: 0, tgid: 0, shape: 0 };
        site.tgid = tgid;
        site.tag = tag;
    }
    site.used_ns = now;
    Some(site)
}

/// The place of a wait, if the slot still belongs to it.
#[inline(always)]
pub fn of(tag: u32) -> Option<&'static mut WaitSite> {
    let site = WAIT_SITES.get_ptr_mut(tag & (SITES as u32 - 1))?;
    // SAFETY: an array's slots are always there; what several CPUs raise at once is raised atomically, and of the
    // rest the last writer is as good as any.
    let site = unsafe { &mut *site };
    if site.tag == tag && tag != 0 { Some(site) } else { None }
}

/// Lets the expectation learn from a wait that ended.
#[inline(always)]
pub fn learn(site: &mut WaitSite, total: u64, now: u64) {
    let faded = site.expected_ns - site.expected_ns / 8;
    site.expected_ns = if total > faded { total } else { faded };
    site.used_ns = now;
}

/// Notes time that no sample was charged with.
#[inline(always)]
pub fn owe(balance: *mut i64, time: u64) {
    if time != 0 {
        atomic_add(balance.cast(), time);
    }
}

/// What a sampled wait is charged with that lasted `time` and stands for `weighted`: a part of what the place is due
/// or owes corrects it, so that weights come out exactly right in the end.
#[inline(always)]
pub fn balance(balance: *mut i64, time: u64, weighted: u64) -> u64 {
    // SAFETY: an array's slots are always there.
    let due = unsafe { balance.read_volatile() };
    let after = due - (weighted - time) as i64;
    let corrected = weighted as i64 + (after >> 2);
    let charged = if corrected > 0 { corrected as u64 } else { 0 };
    atomic_add(balance.cast(), time.wrapping_sub(charged));
    charged
}

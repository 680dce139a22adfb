//! The sampling clock: what is the current thread doing?

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, generated::bpf_get_current_task},
    programs::PerfEventContext,
};
use profiler_common::{
    abi::{counter::Counter, sample::EventKind},
    unwind::pt_regs,
};

use crate::{
    aggregate, capture, cost,
    maps::{self, WALK_ON, count},
    scope,
    unwind::{self, Scratch},
};

/// Takes one sample of the current thread; `walk` drives the user stack walk.
#[inline(always)]
pub fn sample(ctx: &PerfEventContext, walk: impl Fn(&PerfEventContext, &mut Scratch)) {
    count(Counter::Fired);
    let pid_tgid = bpf_get_current_pid_tgid();
    if pid_tgid == 0 {
        count(Counter::Idle);
        return;
    }
    // SAFETY: the helper only returns the current task's address.
    let task = unsafe { bpf_get_current_task() };
    let tgid = scope::tgid(task);
    let verdict = scope::of(task, tgid);
    if verdict != scope::IN_SCOPE {
        count(if verdict == scope::UNDECIDED { Counter::Undecided } else { Counter::OutOfScope });
        return;
    }
    count(Counter::Seen);
    let began = cost::now();
    let Some(scratch) = maps::scratch(maps::ON_CPU) else {
        count(Counter::LostScratch);
        return;
    };
    // SAFETY: this CPU's scratch is used by one sampling program at a time; the map value is initialized.
    let scratch = unsafe { &mut *scratch };

    scratch.began_ns = began;
    capture::identify(&mut scratch.sample.header, task, tgid, EventKind::OnCpu as u8);
    scratch.sample.header.count = 1;
    scratch.frames = 0;
    scratch.hash = capture::hash_identity(&scratch.sample.header);

    interrupted_registers(ctx, &mut scratch.user_registers);
    let in_kernel = scratch.user_registers[pt_regs::CS] & 3 == 0;
    if in_kernel {
        capture::kernel_stack(ctx, scratch, 0);
    }
    capture::user_stack(ctx, scratch, task, in_kernel, walk);
    finish(scratch);
}

/// Goes on with the walk that another program could not finish.
#[inline(always)]
pub fn walk_on(ctx: &PerfEventContext) {
    let Some(scratch) = maps::scratch(maps::ON_CPU) else {
        count(Counter::LostScratch);
        return;
    };
    // SAFETY: as in `sample`, whose run this goes on with.
    let scratch = unsafe { &mut *scratch };
    unwind::walk_in_parts(ctx, unwind::advance_on_cpu, &WALK_ON);
    finish(scratch);
}

/// Counts the sample whose stacks are complete.
#[inline(always)]
fn finish(scratch: &mut Scratch) {
    capture::complete(scratch);
    // What finds no room is counted there.
    let _is_counted = aggregate::add(scratch);
    cost::charge(Counter::OnCpuNs, scratch.began_ns);
}

/// Copies the registers at the moment of the interrupt, of user or kernel mode.
#[inline(always)]
fn interrupted_registers(ctx: &PerfEventContext, into: &mut [u64; pt_regs::WORDS]) {
    // SAFETY: the context begins with the registers, which are readable; volatile keeps each a plain load from
    // the context, which the verifier requires.
    let word = |index: usize| unsafe { read_volatile(addr_of!((*ctx.ctx).regs).cast::<u64>().add(index)) };
    macro_rules! copy {
        ($($index:literal)*) => { $(into[$index] = word($index);)* };
    }
    copy!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 16 17 19);
}

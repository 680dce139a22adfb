//! The sampling clock: what is the current thread doing?

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    EbpfContext as _, bindings,
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid,
        generated::{
            bpf_get_current_task, bpf_get_current_task_btf, bpf_get_stack, bpf_probe_read_kernel, bpf_task_pt_regs,
        },
    },
    programs::PerfEventContext,
};
use profiler_common::{
    abi::{
        counter::Counter,
        process::Comm,
        sample::{EventKind, MAX_KERNEL_FRAMES, SampleHeader, StackEnd},
    },
    unwind::pt_regs,
};

use crate::{
    aggregate::{self, mix},
    layout::loaded,
    lifecycle,
    maps::{SCRATCH, count},
    memory::kernel,
    scope,
    unwind::{self, Scratch},
};

/// Task flag (`include/linux/sched.h`): the thread is exiting.
const PF_EXITING: u32 = 0x4;
/// Code segment selector of 64-bit user code on x86_64 (`__USER_CS`, `arch/x86/include/asm/segment.h`).
const USER_CS_64: u64 = 0x33;
/// Takes one sample of the current thread; `walk` drives the user stack walk.
#[inline(always)]
pub fn sample(ctx: &PerfEventContext, walk: impl Fn(&PerfEventContext, &mut Scratch)) {
    count(Counter::Fired);
    let pid_tgid = bpf_get_current_pid_tgid();
    if pid_tgid == 0 {
        count(Counter::Idle);
        return;
    }
    let tgid = (pid_tgid >> 32) as u32;
    if !scope::includes(tgid) {
        count(Counter::OutOfScope);
        return;
    }
    count(Counter::Seen);
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        count(Counter::LostScratch);
        return;
    };
    // SAFETY: this CPU's scratch is used by one sampling program at a time; the map value is initialized.
    let scratch = unsafe { &mut *scratch };
    // SAFETY: the helper only returns the current task's address.
    let task = unsafe { bpf_get_current_task() };

    fill_header(&mut scratch.sample.header, task, tgid);
    let flags: u32 = kernel(task, loaded!(LAYOUT.task_flags));
    scratch.frames = 0;
    scratch.hash = hash_header(&scratch.sample.header);

    interrupted_registers(ctx, &mut scratch.user_registers);
    let in_kernel = scratch.user_registers[pt_regs::CS] & 3 == 0;
    if in_kernel {
        kernel_stack(ctx, scratch);
    }
    scratch.sample.header.kernel_frames = scratch.frames as u16;
    scratch.is_exiting = u8::from(flags & PF_EXITING != 0);
    if has_user_stack(scratch, task, flags, in_kernel) {
        if scratch.is_exiting == 0 {
            lifecycle::announce(&scratch.sample.header.process, scratch.user_registers[pt_regs::RIP]);
        }
        unwind::start(scratch);
        walk(ctx, scratch);
    }
    finish(scratch);
}

/// Goes on with the walk that another program could not finish.
#[inline(always)]
pub fn walk_on(ctx: &PerfEventContext) {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        count(Counter::LostScratch);
        return;
    };
    // SAFETY: as in `sample`, whose run this goes on with.
    let scratch = unsafe { &mut *scratch };
    unwind::walk_in_parts(ctx, scratch);
    finish(scratch);
}

/// Counts the sample whose stacks are complete.
#[inline(always)]
fn finish(scratch: &mut Scratch) {
    let header = &mut scratch.sample.header;
    header.user_frames = (scratch.frames - u64::from(header.kernel_frames)) as u16;
    if scratch.is_exiting == 1 && header.user_end == StackEnd::MemoryUnreadable as u8 {
        header.user_end = StackEnd::Exiting as u8;
    }
    scratch.hash = mix(scratch.hash, u64::from(header.user_end));
    aggregate::add(scratch);
}

#[inline(always)]
fn fill_header(header: &mut SampleHeader, task: u64, tgid: u32) {
    let leader: u64 = kernel(task, loaded!(LAYOUT.task_group_leader));
    header.count = 1;
    header.process = lifecycle::process_key(task, leader, tgid);
    header.thread_comm = bpf_get_current_comm().unwrap_or_default();
    header.process_comm =
        if leader == task { header.thread_comm } else { kernel::<Comm>(leader, loaded!(LAYOUT.task_comm)) };
    header.kind = EventKind::OnCpu as u8;
    header.user_end = StackEnd::DepthLimit as u8;
    header.reserved = [0; 2];
}

/// Hash over what tells rows apart besides their frames.
#[inline(always)]
fn hash_header(header: &SampleHeader) -> u64 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = header.thread_comm;
    let process = u64::from(header.process.tgid) << 32 | u64::from(header.process.exec_id);
    let hash = mix(header.process.start_time_ns, process);
    let hash = mix(hash, u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
    let hash = mix(hash, u64::from_ne_bytes([i, j, k, l, m, n, o, p]));
    mix(hash, u64::from(header.kind))
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

/// Records the kernel stack, leaf first.
#[inline(always)]
fn kernel_stack(ctx: &PerfEventContext, scratch: &mut Scratch) {
    let frames = scratch.sample.frames.as_mut_ptr();
    // SAFETY: the buffer holds more than MAX_KERNEL_FRAMES words.
    let bytes = unsafe { bpf_get_stack(ctx.as_ptr(), frames.cast(), (MAX_KERNEL_FRAMES * 8) as u32, 0) };
    if bytes <= 0 {
        return;
    }
    let recorded = (bytes as u64 / 8) & (MAX_KERNEL_FRAMES as u64);
    let mut hash = scratch.hash;
    for index in 0..MAX_KERNEL_FRAMES {
        if index as u64 >= recorded {
            break;
        }
        hash = mix(hash, scratch.sample.frames[index]);
    }
    scratch.hash = hash;
    scratch.frames = recorded;
}

/// Whether there is a user stack that can be walked from `user_registers`; if not, the header says why.
#[inline(always)]
fn has_user_stack(scratch: &mut Scratch, task: u64, flags: u32, in_kernel: bool) -> bool {
    if flags & loaded!(SETTINGS.no_user_mode_flags) != 0 {
        scratch.sample.header.user_end = StackEnd::KernelThread as u8;
        return false;
    }
    if in_kernel {
        saved_user_registers(task, &mut scratch.user_registers);
    }
    if scratch.user_registers[pt_regs::CS] != USER_CS_64 {
        scratch.sample.header.user_end = StackEnd::Compat as u8;
        return false;
    }
    true
}

/// Copies the registers with which the thread entered the kernel from the top of its kernel stack.
#[inline(always)]
fn saved_user_registers(task: u64, into: &mut [u64; pt_regs::WORDS]) {
    const BYTES: u32 = size_of::<bindings::pt_regs>() as u32;
    let address = if loaded!(SETTINGS.has_task_pt_regs) == 1 {
        // SAFETY: the helper takes the current task, as the verifier checks.
        unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) }.cast_unsigned()
    } else {
        // Before 5.15 `task_pt_regs()` is the top of the stack without padding (TOP_OF_KERNEL_STACK_PADDING
        // is zero on x86_64 until 6.9).
        kernel::<u64>(task, loaded!(LAYOUT.task_stack)) + u64::from(loaded!(LAYOUT.thread_size)) - u64::from(BYTES)
    };
    // SAFETY: the destination has the size of `struct pt_regs`; the helper checks the source.
    let failed = unsafe { bpf_probe_read_kernel(into.as_mut_ptr().cast(), BYTES, address as *const _) };
    if failed != 0 {
        into[pt_regs::CS] = 0;
    }
}

const _: () = assert!(size_of::<bindings::pt_regs>() == pt_regs::WORDS * 8);

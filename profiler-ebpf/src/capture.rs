//! What every sample records besides its user frames: who the thread is, its kernel stack, its user registers.

use aya_ebpf::{
    EbpfContext, bindings,
    helpers::generated::{bpf_get_current_task_btf, bpf_get_stack, bpf_probe_read_kernel, bpf_task_pt_regs},
};
use profiler_common::{
    abi::{
        process::Comm,
        sample::{EventKind, MAX_KERNEL_FRAMES, SampleHeader, StackEnd},
    },
    unwind::pt_regs,
};

use crate::{
    aggregate::mix,
    cgroup,
    layout::loaded,
    lifecycle, maps,
    memory::kernel,
    unwind::{self, Scratch},
};

/// Task flag (`include/linux/sched.h`): the thread is exiting.
const PF_EXITING: u32 = 0x4;
/// Code segment selector of 64-bit user code on x86_64 (`__USER_CS`, `arch/x86/include/asm/segment.h`).
const USER_CS_64: u64 = 0x33;

/// Says who the thread is; everything else is empty.
#[inline(always)]
pub fn identify(header: &mut SampleHeader, task: u64, tgid: u32, kind: u8) {
    let leader: u64 = kernel(task, loaded!(LAYOUT.task_group_leader));
    header.count = 0;
    header.blocked_ns = 0;
    header.queued_ns = 0;
    header.waits = 0;
    header.cgroup = cgroup::of(task);
    header.process = lifecycle::process_key(task, leader, tgid);
    header.thread_comm = kernel::<Comm>(task, loaded!(LAYOUT.task_comm));
    header.process_comm =
        if leader == task { header.thread_comm } else { kernel::<Comm>(leader, loaded!(LAYOUT.task_comm)) };
    header.kernel_frames = 0;
    header.user_frames = 0;
    header.kind = kind;
    header.user_end = StackEnd::DepthLimit as u8;
    header.is_reference = 0;
    header.epoch = maps::epoch();
}

/// Hash over what tells rows apart besides their frames.
#[inline(always)]
pub fn hash_identity(header: &SampleHeader) -> u64 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = header.thread_comm;
    let process = u64::from(header.process.tgid) << 32 | u64::from(header.process.exec_id);
    let hash = mix(header.process.start_time_ns, process);
    let hash = mix(hash, u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
    let hash = mix(hash, u64::from_ne_bytes([i, j, k, l, m, n, o, p]));
    // What a wait stands for does not depend on when it began.
    let epoch = if header.kind == EventKind::OnCpu as u8 { header.epoch } else { 0 };
    mix(mix(hash, header.cgroup), u64::from(header.kind) << 8 | u64::from(epoch))
}

/// Completes a sample whose frames are all recorded.
#[inline(always)]
pub fn complete(scratch: &mut Scratch) {
    let header = &mut scratch.sample.header;
    header.user_frames = (scratch.frames - u64::from(header.kernel_frames)) as u16;
    if scratch.is_exiting == 1 && header.user_end == StackEnd::MemoryUnreadable as u8 {
        header.user_end = StackEnd::Exiting as u8;
    }
    header.hash = mix(scratch.hash, u64::from(header.user_end));
}

/// Records the kernel stack, leaf first, without its first `skipped` frames.
#[inline(always)]
pub fn kernel_stack(ctx: &impl EbpfContext, scratch: &mut Scratch, skipped: u8) {
    let frames = scratch.sample.frames.as_mut_ptr();
    // SAFETY: the buffer holds more than MAX_KERNEL_FRAMES words.
    let bytes =
        unsafe { bpf_get_stack(ctx.as_ptr(), frames.cast(), (MAX_KERNEL_FRAMES * 8) as u32, u64::from(skipped)) };
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
    scratch.sample.header.kernel_frames = recorded as u16;
}

/// Records the user stack, if there is one; `walk` drives the walk. `in_kernel`: `user_registers` are still those of
/// kernel mode.
#[inline(always)]
pub fn user_stack<C>(ctx: &C, scratch: &mut Scratch, task: u64, in_kernel: bool, walk: impl Fn(&C, &mut Scratch)) {
    if !has_user_stack(scratch, task, in_kernel) {
        return;
    }
    if scratch.is_exiting == 0 {
        lifecycle::announce(&scratch.sample.header.process, scratch.user_registers[pt_regs::RIP]);
    }
    unwind::start(scratch);
    walk(ctx, scratch);
}

/// Whether there is a user stack that can be walked from `user_registers`; if not, the header says why.
#[inline(always)]
fn has_user_stack(scratch: &mut Scratch, task: u64, in_kernel: bool) -> bool {
    let flags: u32 = kernel(task, loaded!(LAYOUT.task_flags));
    scratch.is_exiting = u8::from(flags & PF_EXITING != 0);
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
        saved_registers(task)
    };
    // SAFETY: the destination has the size of `struct pt_regs`; the helper checks the source.
    let failed = unsafe { bpf_probe_read_kernel(into.as_mut_ptr().cast(), BYTES, address as *const _) };
    if failed != 0 {
        into[pt_regs::CS] = 0;
    }
}

/// Where a thread's user registers are, before 5.15: `task_pt_regs()` is the top of the stack without padding
/// (`TOP_OF_KERNEL_STACK_PADDING` is zero on x86_64 until 6.9).
#[inline(always)]
fn saved_registers(task: u64) -> u64 {
    let stack: u64 = kernel(task, loaded!(LAYOUT.task_stack));
    stack + u64::from(loaded!(LAYOUT.thread_size)) - size_of::<bindings::pt_regs>() as u64
}

/// One of a thread's user registers, before 5.15.
#[inline(always)]
pub fn saved_register(task: u64, index: usize) -> u64 {
    kernel(saved_registers(task), (index * 8) as u32)
}

const _: () = assert!(size_of::<bindings::pt_regs>() == pt_regs::WORDS * 8);

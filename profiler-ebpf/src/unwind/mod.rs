//! Walks the user stack of the current thread into the scratch sample.
//!
//! The walk is a state machine in per-CPU memory: `advance` records one frame and finds its caller. Which
//! rule finds the caller is decided there, so further runtimes are further states of one loop; the drivers
//! below only repeat it.

mod native;

use core::{ffi::c_void, ptr::null_mut};

use aya_ebpf::{EbpfContext, btf_maps::ProgramArray, helpers::generated::bpf_loop};
use profiler_common::{
    abi::{
        sample::{LARGE_FRAMES, Sample, StackEnd},
        tables::MappingRange,
    },
    unwind::{Registers, pt_regs},
};

use crate::{
    aggregate::mix,
    maps::{self, PROCESSES},
    memory::{StackWindow, opaque},
};

/// Frames walked by one program where the loop has to be bounded by the verifier. The kernel lets 33 programs
/// follow each other (`MAX_TAIL_CALL_CNT`).
const FRAMES_PER_PROGRAM: usize = 32;

/// A sample under construction and the state of its walk.
#[repr(C)]
pub struct Scratch {
    pub sample: Sample<LARGE_FRAMES>,
    /// The frame to record next.
    pub registers: Registers,
    /// Hash over everything recorded so far.
    pub hash: u64,
    /// Frames recorded so far, kernel and user.
    pub frames: u64,
    /// When this sample was begun.
    pub began_ns: u64,
    /// Registers with which the thread left user mode, as `struct pt_regs`.
    pub user_registers: [u64; pt_regs::WORDS],
    /// What is mapped in the process.
    mappings: MappingRange,
    /// Where the last frame was.
    place: native::Place,
    /// The part of the stack that was read last.
    window: StackWindow,
    /// Bounds of the search that is under way.
    search: native::Bounds,
    /// 1: no caller has been found yet.
    is_leaf: u8,
    /// 1: the thread is exiting: its memory may be gone already.
    pub is_exiting: u8,
    /// 1: `registers.pc` is a return address.
    is_return: u8,
    /// Frames of tracing that lie above the scheduler's.
    pub tracing_frames: u8,
}

/// Prepares the walk from `user_registers`.
#[inline(always)]
pub fn start(scratch: &mut Scratch) {
    scratch.registers = Registers::interrupted(&scratch.user_registers);
    scratch.is_leaf = 1;
    scratch.is_return = 0;
    native::start(&mut scratch.place);
    scratch.window.start = 0;
    scratch.mappings = match PROCESSES.get_ptr(scratch.sample.header.process) {
        // SAFETY: a value of this preallocated map stays readable while the program runs.
        Some(range) => unsafe { *range },
        None => MappingRange { first: 0, count: 0 },
    };
}

/// Records the current frame and moves on to its caller. False: the walk is over, and
/// `header.user_end` says why.
#[inline(always)]
fn advance(scratch: &mut Scratch) -> bool {
    let index = opaque(scratch.frames);
    if index >= LARGE_FRAMES as u64 {
        scratch.sample.header.user_end = StackEnd::DepthLimit as u8;
        return false;
    }
    // See `native::leave_signal_handler`.
    let is_interrupted = (scratch.is_leaf | scratch.is_return) ^ 1;
    let recorded = scratch.registers.pc + u64::from(is_interrupted);
    scratch.sample.frames[(index & (LARGE_FRAMES as u64 - 1)) as usize] = recorded;
    scratch.hash = mix(scratch.hash, recorded);
    scratch.frames = index + 1;
    match native::caller(scratch) {
        Ok(caller) => {
            scratch.registers = caller;
            scratch.is_leaf = 0;
            true
        }
        Err(end) => {
            scratch.sample.header.user_end = end as u8;
            false
        }
    }
}

/// Driver for kernels with `bpf_loop`, over the scratch of index `SCRATCH`.
#[inline(always)]
pub fn walk_with_helper<const SCRATCH: u32>() {
    // SAFETY: the callback has the signature the helper asks for and finds its state by itself.
    unsafe { bpf_loop(LARGE_FRAMES as u32 + 1, advance_once::<SCRATCH> as *mut c_void, null_mut(), 0) };
}

/// One turn of [`walk_with_helper`]; returns 1 to stop.
unsafe extern "C" fn advance_once<const SCRATCH: u32>(_turn: u32, _context: *mut c_void) -> i64 {
    let Some(scratch) = maps::scratch(SCRATCH) else {
        return 1;
    };
    // SAFETY: this CPU's scratch is used by one program at a time; the map value is initialized.
    i64::from(!advance(unsafe { &mut *scratch }))
}

/// Driver for older kernels: programs of some frames each follow each other. `advance` is one of the functions below.
/// Where the stack goes on after this part of it, this does not return: the program in `next` finishes the sample.
#[inline(always)]
pub fn walk_in_parts(ctx: &impl EbpfContext, advance: extern "C" fn() -> u32, next: &ProgramArray<1>) {
    for _ in 0..FRAMES_PER_PROGRAM {
        if advance() == 0 {
            return;
        }
    }
    // SAFETY: nothing here needs to be dropped. Where the call fails, because too many programs have followed
    // each other, the stack ends with the reason it was given at first: the depth limit.
    unsafe { next.tail_call(ctx, 0) };
}

/// One turn of [`walk_in_parts`] over the scratch of samples of CPU time; returns 0 to stop. The verifier knows this as a
/// global function (Linux 5.6): it looks at it once and not at every turn, which would be as many instructions as it is
/// willing to look at.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn advance_on_cpu() -> u32 {
    advance_scratch::<{ maps::ON_CPU }>()
}

/// The same over the scratch of waits.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn advance_off_cpu() -> u32 {
    advance_scratch::<{ maps::OFF_CPU }>()
}

#[inline(always)]
fn advance_scratch<const SCRATCH: u32>() -> u32 {
    let Some(scratch) = maps::scratch(SCRATCH) else {
        return 0;
    };
    // SAFETY: this CPU's scratch is used by one program at a time; the map value is initialized.
    u32::from(advance(unsafe { &mut *scratch }))
}

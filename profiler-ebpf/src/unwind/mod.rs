//! Walks the user stack of the current thread into the scratch sample.
//!
//! The walk is a state machine in per-CPU memory: `advance` records one frame and finds its caller. Which
//! rule finds the caller is decided there, so further rules and runtimes are further states of one loop;
//! the drivers below only repeat it.

mod native;

use core::{ffi::c_void, ptr::null_mut};

use aya_ebpf::helpers::generated::bpf_loop;
use profiler_common::{
    abi::sample::{LARGE_FRAMES, Sample, StackEnd},
    unwind::Registers,
};

use crate::{aggregate::mix, maps, memory::opaque};

/// Frames walked where the loop has to be bounded by the verifier.
const BOUNDED_FRAMES: usize = 127;

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
    /// Saved user registers of a thread in kernel mode, as `struct pt_regs`.
    pub user_registers: [u64; 21],
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
    scratch.sample.frames[(index & (LARGE_FRAMES as u64 - 1)) as usize] = scratch.registers.pc;
    scratch.hash = mix(scratch.hash, scratch.registers.pc);
    scratch.frames = index + 1;
    match native::caller(&scratch.registers) {
        Ok(caller) => {
            scratch.registers = caller;
            true
        }
        Err(end) => {
            scratch.sample.header.user_end = end as u8;
            false
        }
    }
}

/// Driver for kernels with `bpf_loop`.
#[inline(always)]
pub fn walk_with_helper(_scratch: &mut Scratch) {
    // SAFETY: the callback has the signature the helper asks for and finds its state by itself.
    unsafe { bpf_loop(LARGE_FRAMES as u32, advance_once as *mut c_void, null_mut(), 0) };
}

/// One turn of [`walk_with_helper`]; returns 1 to stop.
unsafe extern "C" fn advance_once(_turn: u32, _context: *mut c_void) -> i64 {
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else {
        return 1;
    };
    // SAFETY: this CPU's scratch is used by one sampling program at a time; the map value is initialized.
    i64::from(!advance(unsafe { &mut *scratch }))
}

/// Driver for older kernels: the verifier follows every turn.
#[inline(always)]
pub fn walk_bounded(scratch: &mut Scratch) {
    for _ in 0..BOUNDED_FRAMES {
        if !advance(scratch) {
            return;
        }
    }
}

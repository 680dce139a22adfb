//! Native frames: C, C++, Rust, Go and everything else that runs on the machine's own stack.

use profiler_common::{
    abi::sample::StackEnd,
    unwind::{Registers, step_frame_pointer},
};

use crate::memory::UserMemory;

/// Finds the caller of a native frame.
#[inline(always)]
pub fn caller(registers: &Registers) -> Result<Registers, StackEnd> {
    step_frame_pointer(registers, &mut UserMemory)
}

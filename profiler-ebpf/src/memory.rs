//! The only reads of user and kernel memory, and the few operations the BPF target lacks.

use aya_ebpf::helpers::{bpf_probe_read_kernel, bpf_probe_read_user};
use profiler_common::unwind::Memory;

/// Memory of the current thread's process.
pub struct UserMemory;

impl Memory for UserMemory {
    #[inline(always)]
    fn read_pair(&mut self, address: u64) -> Option<[u64; 2]> {
        // SAFETY: the helper checks the address and fails instead of faulting.
        unsafe { bpf_probe_read_user(address as *const [u64; 2]) }.ok()
    }

    #[inline(always)]
    fn read_word(&mut self, address: u64) -> Option<u64> {
        // SAFETY: as above.
        unsafe { bpf_probe_read_user(address as *const u64) }.ok()
    }
}

/// Reads a kernel object's member; zero where it cannot be read.
#[inline(always)]
pub fn kernel<T: Copy + Default>(object: u64, offset: u32) -> T {
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel((object + u64::from(offset)) as *const T) }.unwrap_or_default()
}

/// `*slot += value`, atomically: core's atomics have no add on this target.
#[inline(always)]
pub fn atomic_add(slot: *mut u64, value: u64) {
    // SAFETY: callers pass a pointer to a map value's aligned counter, which outlives the program's run.
    unsafe {
        core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) slot, in(reg) value, options(nostack));
    }
}

/// Hides a value from the compiler, so that a bound written after it stays in the code for the verifier.
#[inline(always)]
pub fn opaque(mut value: u64) -> u64 {
    // SAFETY: a register is moved onto itself. (An empty template would leave two line records for one
    // instruction, which the kernel refuses.)
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) value, options(nomem, nostack, preserves_flags));
    }
    value
}

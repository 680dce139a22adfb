//! The only reads of user and kernel memory, and the few operations the BPF target lacks.

use aya_ebpf::helpers::{bpf_probe_read_kernel, bpf_probe_read_user, generated};
use profiler_common::unwind::Memory;

/// Words of the stack that are read at once.
const WINDOW_WORDS: usize = 32;

/// A piece of the stack that was read: callers' frames are mostly small and lie close together, and reading 16
/// bytes takes nearly as long as reading 256.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct StackWindow {
    /// Address of the first word; zero: nothing was read.
    pub start: u64,
    words: [u64; WINDOW_WORDS],
}

/// Memory of the current thread's process, stack first.
pub struct UserMemory<'a>(pub &'a mut StackWindow);

impl Memory for UserMemory<'_> {
    #[inline(always)]
    fn read_pair(&mut self, address: u64) -> Option<[u64; 2]> {
        const LAST_PAIR: u64 = (WINDOW_WORDS as u64 - 2) * 8;
        let window = &mut *self.0;
        let mut offset = address.wrapping_sub(window.start);
        if offset > LAST_PAIR || offset & 7 != 0 {
            // SAFETY: the destination has the size that is read; the helper checks the source.
            let failed = unsafe {
                generated::bpf_probe_read_user(
                    window.words.as_mut_ptr().cast(),
                    (WINDOW_WORDS * 8) as u32,
                    address as *const _,
                )
            };
            if failed != 0 {
                // The end of the stack may be near.
                window.start = 0;
                // SAFETY: the helper checks the address and fails instead of faulting.
                return unsafe { bpf_probe_read_user(address as *const [u64; 2]) }.ok();
            }
            window.start = address;
            offset = 0;
        }
        let index = opaque(offset / 8) as usize;
        Some([window.words[index & (WINDOW_WORDS - 1)], window.words[(index + 1) & (WINDOW_WORDS - 1)]])
    }

    #[inline(always)]
    fn read_word(&mut self, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.0.start);
        if offset < WINDOW_WORDS as u64 * 8 && offset & 7 == 0 {
            return Some(self.0.words[opaque(offset / 8) as usize & (WINDOW_WORDS - 1)]);
        }
        // SAFETY: the helper checks the address and fails instead of faulting.
        unsafe { bpf_probe_read_user(address as *const u64) }.ok()
    }
}

/// Two consecutive words of code, or `None` where they cannot be read.
#[inline(always)]
pub fn code_pair(address: u64) -> Option<[u64; 2]> {
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_user(address as *const [u64; 2]) }.ok()
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

//! One step of a native stack walk: from a frame to its caller.
//!
//! Pure: memory comes through [`Memory`], so that the kernel program and userspace tests run the same code.
//! How to find the caller is a rule; frame pointers are the only one so far.

use crate::abi::sample::StackEnd;

/// End of user space on x86_64 with four-level paging; five-level processes stay below it unless they ask
/// (Linux `Documentation/arch/x86/x86_64/5level-paging.rst`).
pub const USER_SPACE_END: u64 = 0x0000_8000_0000_0000;
/// Nothing is mapped in the first page (`vm.mmap_min_addr`).
const FIRST_PAGE_END: u64 = 0x1000;

/// Reads the memory of the thread that is being unwound.
pub trait Memory {
    /// Two consecutive words at `address`, or `None` where they cannot be read.
    fn read_pair(&mut self, address: u64) -> Option<[u64; 2]>;
}

/// The registers that unwinding needs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Instruction pointer in the leaf frame, return address in every other.
    pub pc: u64,
    /// Stack pointer.
    pub sp: u64,
    /// Frame pointer.
    pub fp: u64,
}

/// Steps to the caller by the frame pointer: `[fp]` holds the caller's frame pointer and `[fp + 8]` the
/// return address (System V AMD64 psABI, figure 3.3).
///
/// The stack grows down, so a caller's frame lies above; a chain that turns back is no chain.
#[inline(always)]
pub fn step_frame_pointer(registers: &Registers, memory: &mut impl Memory) -> Result<Registers, StackEnd> {
    let Registers { sp, fp, .. } = *registers;
    if fp == 0 {
        return Err(StackEnd::Root);
    }
    if fp & 7 != 0 || fp < sp || fp >= USER_SPACE_END {
        return Err(StackEnd::FramePointerLost);
    }
    let Some([caller_fp, return_address]) = memory.read_pair(fp) else {
        return Err(StackEnd::MemoryUnreadable);
    };
    if return_address == 0 {
        return Err(StackEnd::Root);
    }
    if !(FIRST_PAGE_END..USER_SPACE_END).contains(&return_address) {
        return Err(StackEnd::FramePointerLost);
    }
    Ok(Registers { pc: return_address, sp: fp + 16, fp: caller_fp })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory given as (address, word) pairs; everything else is unreadable.
    struct Words<'a>(&'a [(u64, u64)]);

    impl Memory for Words<'_> {
        fn read_pair(&mut self, address: u64) -> Option<[u64; 2]> {
            let word = |at| self.0.iter().find(|(a, _)| *a == at).map(|(_, w)| *w);
            Some([word(address)?, word(address + 8)?])
        }
    }

    fn check(registers: Registers, memory: &[(u64, u64)], expect: Result<Registers, StackEnd>) {
        assert_eq!(step_frame_pointer(&registers, &mut Words(memory)), expect);
    }

    const LEAF: Registers = Registers { pc: 0x40_1000, sp: 0x7000, fp: 0x7010 };

    /// The saved pair at the frame pointer is the caller.
    #[test]
    fn follows_the_saved_pair() {
        check(LEAF, &[(0x7010, 0x7040), (0x7018, 0x40_2000)], Ok(Registers { pc: 0x40_2000, sp: 0x7020, fp: 0x7040 }));
    }

    /// The ABI's outermost frame has a zero frame pointer, a thread's start a zero return address.
    #[test]
    fn ends_at_the_root() {
        check(Registers { fp: 0, ..LEAF }, &[], Err(StackEnd::Root));
        check(LEAF, &[(0x7010, 0), (0x7018, 0)], Err(StackEnd::Root));
    }

    /// A general-purpose value in the frame pointer register is recognised rather than followed.
    #[test]
    fn refuses_what_cannot_be_a_frame() {
        check(Registers { fp: 0x7011, ..LEAF }, &[], Err(StackEnd::FramePointerLost));
        check(Registers { fp: 0x6ff8, ..LEAF }, &[], Err(StackEnd::FramePointerLost));
        check(Registers { fp: USER_SPACE_END, ..LEAF }, &[], Err(StackEnd::FramePointerLost));
        check(LEAF, &[(0x7010, 0x7040), (0x7018, 0x10)], Err(StackEnd::FramePointerLost));
        check(LEAF, &[(0x7010, 0x7040), (0x7018, u64::MAX)], Err(StackEnd::FramePointerLost));
    }

    /// Memory that cannot be read ends the stack under its own reason.
    #[test]
    fn names_unreadable_memory() {
        check(LEAF, &[(0x7010, 0x7040)], Err(StackEnd::MemoryUnreadable));
    }
}

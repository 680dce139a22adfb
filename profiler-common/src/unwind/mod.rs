//! One step of a native stack walk: from a frame to its caller.
//!
//! Pure: memory comes through [`Memory`], so that the kernel program and userspace tests run the same code.
//! Which rule applies is looked up by the caller; [`step`] follows it.

pub mod rule;

use self::rule::{LOST_OFFSET, Rule, cfa, fp};
use crate::abi::sample::StackEnd;

/// End of user space on x86_64 with four-level paging; five-level processes stay below it unless they ask
/// (Linux `Documentation/arch/x86/x86_64/5level-paging.rst`).
pub const USER_SPACE_END: u64 = 0x0000_8000_0000_0000;
/// Nothing is mapped in the first page (`vm.mmap_min_addr`).
const FIRST_PAGE_END: u64 = 0x1000;

/// Words of `struct pt_regs` on x86_64, and the ones unwinding names (`arch/x86/include/asm/ptrace.h`).
pub mod pt_regs {
    /// How many words it has.
    pub const WORDS: usize = 21;
    /// Frame pointer.
    pub const RBP: usize = 4;
    /// Callee-saved, and the base of frames that realign their stack.
    pub const RBX: usize = 5;
    /// Instruction pointer.
    pub const RIP: usize = 16;
    /// Code segment selector.
    pub const CS: usize = 17;
    /// Stack pointer.
    pub const RSP: usize = 19;
}

/// The first words of `struct pt_regs`: every general-purpose register but the stack pointer.
pub const GENERAL_REGISTERS: usize = 16;

/// Reads the memory of the thread that is being unwound.
pub trait Memory {
    /// Two consecutive words at `address`, or `None` where they cannot be read.
    fn read_pair(&mut self, address: u64) -> Option<[u64; 2]>;
    /// The word at `address`, or `None` where it cannot be read.
    fn read_word(&mut self, address: u64) -> Option<u64>;
}

/// A callee-saved register of a frame: its value, or where the value was saved. Most are never needed, so they
/// are read when a rule asks for them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// The value, where `address` is zero.
    pub value: u64,
    /// Where the value is in memory; zero: it is in `value`; all ones: nobody knows.
    pub address: u64,
}

impl Saved {
    /// A known value.
    pub const fn value(value: u64) -> Self {
        Self { value, address: 0 }
    }

    /// A value that cannot be told.
    const LOST: Self = Self { value: 0, address: u64::MAX };

    #[inline(always)]
    fn read(self, memory: &mut impl Memory) -> Result<u64, StackEnd> {
        if self.address == 0 {
            return Ok(self.value);
        }
        if self.address == u64::MAX {
            return Err(StackEnd::UnsupportedRule);
        }
        memory.read_word(self.address).ok_or(StackEnd::MemoryUnreadable)
    }
}

/// The registers that unwinding carries from frame to frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Instruction pointer in the leaf frame, return address in every other.
    pub pc: u64,
    /// Stack pointer.
    pub sp: u64,
    /// Frame pointer (RBP).
    pub fp: Saved,
    /// RBX.
    pub bx: Saved,
}

impl Registers {
    /// The registers of an interrupted thread, from its `struct pt_regs`.
    #[inline(always)]
    pub fn interrupted(words: &[u64; pt_regs::WORDS]) -> Self {
        Self {
            pc: words[pt_regs::RIP],
            sp: words[pt_regs::RSP],
            fp: Saved::value(words[pt_regs::RBP]),
            bx: Saved::value(words[pt_regs::RBX]),
        }
    }
}

/// Whether a return address may be one: it lies in user space.
#[inline(always)]
fn is_plausible(return_address: u64) -> bool {
    (FIRST_PAGE_END..USER_SPACE_END).contains(&return_address)
}

/// Steps to the caller as `rule` says. `leaf` holds the interrupted thread's registers while the frame is the
/// leaf.
///
/// # Errors
/// Why the stack ends here.
#[inline(always)]
pub fn step(
    rule: &Rule,
    registers: &Registers,
    leaf: Option<&[u64; pt_regs::WORDS]>,
    memory: &mut impl Memory,
) -> Result<Registers, StackEnd> {
    let offset = i64::from(rule.cfa_offset) as u64;
    let addend = i64::from(rule.cfa_addend) as u64;
    let mut may_switch = false;
    let address = match rule.cfa & !cfa::GUESSED {
        cfa::STACK_POINTER => registers.sp.wrapping_add(offset),
        cfa::FRAME_POINTER => registers.fp.read(memory)?.wrapping_add(offset),
        cfa::BASE_POINTER => registers.bx.read(memory)?.wrapping_add(offset),
        cfa::OTHER_STACK => {
            may_switch = true;
            registers.fp.read(memory)?.wrapping_add(offset)
        }
        cfa::PLT_ENTRY => {
            let pushed = if registers.pc & 15 >= offset { 8 } else { 0 };
            registers.sp.wrapping_add(8).wrapping_add(pushed)
        }
        cfa::AT_FRAME_POINTER | cfa::AT_STACK_POINTER => {
            let base = if rule.cfa == cfa::AT_FRAME_POINTER { registers.fp.read(memory)? } else { registers.sp };
            let word = memory.read_word(base.wrapping_add(offset)).ok_or(StackEnd::MemoryUnreadable)?;
            word.wrapping_add(addend)
        }
        cfa::LEAF_REGISTER => {
            let Some(words) = leaf else { return Err(StackEnd::UnsupportedRule) };
            words[addend as usize & (GENERAL_REGISTERS - 1)].wrapping_add(offset)
        }
        cfa::LEAF_JUMP => {
            let Some(words) = leaf else { return Err(StackEnd::UnsupportedRule) };
            let pc = words[addend as usize & (GENERAL_REGISTERS - 1)];
            if !is_plausible(pc) {
                return Err(StackEnd::FrameCorrupt);
            }
            return Ok(Registers { pc, sp: registers.sp.wrapping_add(offset), ..*registers });
        }
        cfa::SIGNAL_FRAME => return step_signal_frame(registers, memory),
        cfa::FRAME_POINTER_CHAIN => return step_frame_pointer(registers, memory),
        cfa::OUTERMOST => return Err(StackEnd::Root),
        cfa::STACK_SWITCH => return Err(StackEnd::StackSwitch),
        _ => return Err(StackEnd::UnsupportedRule),
    };
    // The stack grows down, so a caller's frame lies above its callee's.
    if address <= registers.sp && !may_switch {
        return Err(StackEnd::FrameCorrupt);
    }
    let Some([below, return_address]) = memory.read_pair(address.wrapping_sub(16)) else {
        return Err(StackEnd::MemoryUnreadable);
    };
    let saved = |offset: i16| address.wrapping_add(i64::from(offset) as u64);
    let fp = match rule.fp {
        fp::AT_CFA if rule.fp_offset == -16 => Saved::value(below),
        fp::AT_CFA => Saved { value: 0, address: saved(rule.fp_offset) },
        fp::AT_FRAME_POINTER => {
            let base = registers.fp.read(memory)?;
            Saved { value: 0, address: base.wrapping_add(i64::from(rule.fp_offset) as u64) }
        }
        fp::SAME => registers.fp,
        _ => Saved::LOST,
    };
    let bx = match rule.bx_offset {
        0 => registers.bx,
        LOST_OFFSET => Saved::LOST,
        offset => Saved { value: 0, address: saved(offset) },
    };
    if return_address == 0 {
        return Err(StackEnd::Root);
    }
    if !is_plausible(return_address) {
        return Err(StackEnd::FrameCorrupt);
    }
    Ok(Registers { pc: return_address, sp: address, fp, bx })
}

/// Steps to the caller by the frame pointer: `[fp]` holds the caller's frame pointer and `[fp + 8]` the
/// return address (System V AMD64 psABI, figure 3.3).
///
/// The stack grows down, so a caller's frame lies above; a chain that turns back is no chain.
#[inline(always)]
fn step_frame_pointer(registers: &Registers, memory: &mut impl Memory) -> Result<Registers, StackEnd> {
    let fp = registers.fp.read(memory)?;
    if fp == 0 {
        return Err(StackEnd::Root);
    }
    if fp & 7 != 0 || fp < registers.sp || fp >= USER_SPACE_END {
        return Err(StackEnd::FramePointerLost);
    }
    let Some([caller_fp, return_address]) = memory.read_pair(fp) else {
        return Err(StackEnd::MemoryUnreadable);
    };
    if return_address == 0 {
        return Err(StackEnd::Root);
    }
    if !is_plausible(return_address) {
        return Err(StackEnd::FramePointerLost);
    }
    Ok(Registers { pc: return_address, sp: fp + 16, fp: Saved::value(caller_fp), bx: registers.bx })
}

/// Steps from the signal trampoline to the interrupted frame.
///
/// When the handler has returned, the stack pointer is at `struct ucontext`, and the registers are in the
/// `struct sigcontext` 40 bytes into it (`arch/x86/include/uapi/asm/{ucontext,sigcontext}.h`).
#[inline(always)]
fn step_signal_frame(registers: &Registers, memory: &mut impl Memory) -> Result<Registers, StackEnd> {
    const SIGCONTEXT: u64 = 40;
    const RBP: u64 = SIGCONTEXT + 8 * 10;
    const RSP: u64 = SIGCONTEXT + 8 * 15;
    let Some([fp, bx]) = memory.read_pair(registers.sp.wrapping_add(RBP)) else {
        return Err(StackEnd::MemoryUnreadable);
    };
    let Some([sp, pc]) = memory.read_pair(registers.sp.wrapping_add(RSP)) else {
        return Err(StackEnd::MemoryUnreadable);
    };
    if !is_plausible(pc) {
        return Err(StackEnd::FrameCorrupt);
    }
    Ok(Registers { pc, sp, fp: Saved::value(fp), bx: Saved::value(bx) })
}

/// Whether the code around a return address, in memory order from 8 bytes before it, may have made a call: a
/// value that only looks like a return address is hardly ever preceded by one.
///
/// Encodings: `E8 rel32`; `FF /2` with 2 to 7 bytes (Intel SDM, volume 2, CALL).
#[inline(always)]
pub fn follows_a_call(before: u64) -> bool {
    // Byte 7 of the word is the last one before the return address.
    let byte = |back: u64| (before >> (64 - 8 * back)) & 0xff;
    let is_indirect = |opcode: u64, mod_rm: u64| opcode == 0xff && mod_rm & 0x38 == 0x10;
    byte(5) == 0xe8
        || is_indirect(byte(2), byte(1))
        || is_indirect(byte(3), byte(2))
        || is_indirect(byte(4), byte(3))
        || is_indirect(byte(6), byte(5))
        || is_indirect(byte(7), byte(6))
}

/// Whether code begins like the trampoline that signal handlers return to: `mov $15, %rax` or `%eax`, then
/// `syscall` (number 15 is `rt_sigreturn`; Linux `arch/x86/entry/syscalls/syscall_64.tbl`).
#[inline(always)]
pub fn is_signal_trampoline(code: u64) -> bool {
    code == u64::from_le_bytes([0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f])
        || code << 8 == u64::from_le_bytes([0, 0xb8, 15, 0, 0, 0, 0x0f, 0x05])
}

#[cfg(test)]
mod tests;

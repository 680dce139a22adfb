//! Rules from the code itself, where nothing else covers it: C libraries built without tables (musl's, in every
//! Alpine container), assembly, runtimes' stubs.
//!
//! In: bytes of code. Out: rows. Every instruction that is reached from the start of a function is followed, and
//! what it does to the stack pointer is added up. That is a guess, so the rules are marked as such: what they lead
//! to has to look like a caller.

use std::collections::BTreeSet;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use profiler_common::unwind::rule::{Rule, cfa, fp};

/// Compilers begin functions at multiples of this.
const FUNCTION_ALIGNMENT: u64 = 16;
/// Deepest stack frame that is believed.
const MAX_DEPTH: i64 = 1 << 24;

/// Where the stack is, at one instruction of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    /// Bytes between the stack pointer and the return address; `None`: it cannot be told.
    depth: Option<i64>,
    /// Where the caller's frame pointer was saved, from the CFA; 0: nowhere.
    fp: i16,
    /// The same of RBX.
    bx: i16,
    /// Whether the frame pointer is this frame's: 16 bytes below the CFA.
    is_framed: bool,
}

impl State {
    /// At the first instruction of a function.
    const ENTRY: Self = Self { depth: Some(0), fp: 0, bx: 0, is_framed: false };

    fn rule(self) -> Rule {
        let saved = |offset: i16| if offset == 0 { (fp::SAME, 0) } else { (fp::AT_CFA, offset) };
        let (fp, fp_offset) = saved(self.fp);
        let rule = Rule { fp, fp_offset, bx_offset: self.bx, ..Rule::default() };
        match self.depth.and_then(|depth| i32::try_from(depth + 8).ok()) {
            _ if self.is_framed => Rule { cfa: cfa::FRAME_POINTER | cfa::GUESSED, cfa_offset: 16, ..rule },
            Some(offset) => Rule { cfa: cfa::STACK_POINTER | cfa::GUESSED, cfa_offset: offset, ..rule },
            None => Rule::plain(cfa::FRAME_POINTER_CHAIN),
        }
    }

    /// The place, from the CFA, that the stack pointer is at.
    fn top(self) -> i16 {
        self.depth.and_then(|depth| i16::try_from(-(depth + 8)).ok()).unwrap_or(0)
    }

    fn set_depth(&mut self, depth: Option<i64>) {
        self.depth = depth.filter(|depth| (0..MAX_DEPTH).contains(depth));
    }

    /// What the instruction does to the stack.
    fn follow(&mut self, instruction: &Instruction) {
        let (first, second) = (instruction.op0_register(), instruction.op1_register());
        let immediate = || match instruction.op1_kind() {
            OpKind::Immediate8to64 | OpKind::Immediate32to64 | OpKind::Immediate64 => {
                Some(instruction.immediate(1).cast_signed())
            }
            _ => None,
        };
        let shift = |by: Option<i64>| self.depth.zip(by).and_then(|(depth, by)| depth.checked_add(by));
        match instruction.code() {
            Code::Call_rel32_64 | Code::Call_rm64 => {}
            Code::Leaveq => {
                let depth = self.is_framed.then_some(0);
                self.set_depth(depth);
                (self.is_framed, self.fp) = (false, 0);
            }
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 if (first, second) == (Register::RBP, Register::RSP) => {
                self.is_framed = self.depth == Some(8) && self.fp == -16;
            }
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 if (first, second) == (Register::RSP, Register::RBP) => {
                let depth = self.is_framed.then_some(8);
                self.set_depth(depth);
            }
            Code::Add_rm64_imm8 | Code::Add_rm64_imm32 if first == Register::RSP => {
                let depth = shift(immediate().map(|bytes| -bytes));
                self.set_depth(depth);
            }
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 if first == Register::RSP => {
                let depth = shift(immediate());
                self.set_depth(depth);
            }
            Code::Lea_r64_m if first == Register::RSP => {
                let displacement = instruction.memory_displacement64().cast_signed();
                let is_plain = instruction.memory_index() == Register::None;
                let depth = match instruction.memory_base() {
                    Register::RSP if is_plain => shift(Some(-displacement)),
                    Register::RBP if is_plain && self.is_framed => 8i64.checked_sub(displacement),
                    _ => None,
                };
                self.set_depth(depth);
            }
            _ => {
                let moved = -i64::from(instruction.stack_pointer_increment());
                let writes_stack_pointer =
                    first == Register::RSP && instruction.op_count() > 1 && !is_comparison(instruction);
                if writes_stack_pointer {
                    self.depth = None;
                } else if moved != 0 {
                    let depth = shift(Some(moved));
                    self.set_depth(depth);
                    self.push_or_pop(first, moved);
                } else if first == Register::RBP
                    && self.is_framed
                    && !is_comparison(instruction)
                    && instruction.op_count() > 1
                {
                    self.is_framed = false;
                }
            }
        }
    }

    fn push_or_pop(&mut self, register: Register, moved: i64) {
        let top = self.top();
        let is_push = moved > 0;
        match register {
            Register::RBP if is_push && self.fp == 0 => self.fp = top,
            Register::RBX if is_push && self.bx == 0 => self.bx = top,
            Register::RBP if !is_push => (self.fp, self.is_framed) = (0, false),
            Register::RBX if !is_push => self.bx = 0,
            _ => {}
        }
    }
}

/// Whether the first operand is only read.
fn is_comparison(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Bt)
}

/// A piece of code that is followed.
struct Walk<'a> {
    code: &'a [u8],
    start: u64,
    /// The program's first instruction.
    entry: u64,
    /// Where functions begin: places that are called, and symbols.
    functions: BTreeSet<u64>,
    /// One bit for every byte: whether an instruction that was reached begins there, and whether one holds it.
    begins: Vec<u64>,
    holds: Vec<u64>,
    /// Where each instruction that was reached begins and ends, and its rule.
    reached: Vec<(u64, u64, Rule)>,
    /// Places to go on from.
    todo: Vec<(u64, State)>,
    /// The state in which the function now followed jumps to places that cannot be told: a switch.
    switch: Option<State>,
}

/// The rows of code that nothing else covers, in order. `entry` is the address of the program's first
/// instruction; `functions` are places where functions are known to begin, here or elsewhere.
pub(super) fn rows(code: &[u8], start: u64, entry: u64, functions: &BTreeSet<u64>) -> Vec<(u64, Rule)> {
    let end = start.saturating_add(code.len() as u64);
    let mut functions: BTreeSet<u64> = functions.range(start..end).copied().collect();
    if (start..end).contains(&entry) {
        functions.insert(entry);
    }
    functions.extend(called(code, start).filter(|target| (start..end).contains(target)));
    let words = code.len().div_ceil(64);
    let mut walk = Walk {
        code,
        start,
        entry,
        functions,
        begins: vec![0; words],
        holds: vec![0; words],
        reached: Vec::new(),
        todo: Vec::new(),
        switch: None,
    };
    walk.follow_everything();
    let mut rows: Vec<(u64, Rule)> = Vec::new();
    let mut end = start;
    walk.reached.sort_unstable_by_key(|&(address, ..)| address);
    for (address, next, rule) in walk.reached {
        if address > end {
            rows.push((end, Rule::plain(cfa::FRAME_POINTER_CHAIN)));
        }
        if address > end || rows.last().is_none_or(|(_, last)| *last != rule) {
            rows.push((address, rule));
        }
        end = next;
    }
    rows
}

/// The targets of all direct calls in some code.
pub(super) fn called(code: &[u8], start: u64) -> impl Iterator<Item = u64> {
    let mut decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    std::iter::from_fn(move || {
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if instruction.code() == Code::Call_rel32_64 {
                return Some(instruction.near_branch_target());
            }
        }
        None
    })
}

impl Walk<'_> {
    fn offset(&self, address: u64) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        (offset < self.code.len()).then_some(offset)
    }

    /// Follows the code function by function, in the order of addresses. What remains of a function afterwards is
    /// what its switch jumps to; anything else that was not reached begins another function.
    fn follow_everything(&mut self) {
        let mut offset = 0;
        while offset < self.code.len() {
            let address = self.start + offset as u64;
            let is_function = self.functions.contains(&address);
            if is_function {
                self.switch = None;
            }
            if bit(&self.holds, offset) {
                offset += 1;
                continue;
            }
            let code = self.code.get(offset..).unwrap_or_default();
            let instruction = Decoder::with_ip(64, code, address, DecoderOptions::NONE).decode();
            if is_function || !is_padding(&instruction) {
                if address.is_multiple_of(FUNCTION_ALIGNMENT) && is_beginning(&instruction) {
                    self.switch = None;
                }
                self.todo.push((address, self.switch.unwrap_or(State::ENTRY)));
                while let Some((address, state)) = self.todo.pop() {
                    self.follow(address, state);
                }
            }
            offset += instruction.len().max(1);
        }
    }

    /// Follows the code from one place on until it ends or is known.
    fn follow(&mut self, address: u64, mut state: State) {
        let Some(code) = self.offset(address).and_then(|offset| self.code.get(offset..)) else { return };
        let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let fixed = if is_signal_trampoline(code) {
            Some(Rule::plain(cfa::SIGNAL_FRAME))
        } else {
            (address == self.entry).then_some(Rule::plain(cfa::OUTERMOST))
        };
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            let ip = instruction.ip();
            let Some(offset) = self.offset(ip) else { return };
            // A function that begins here is not gone on into: what was called last does not return.
            let is_other_function = ip != address && self.functions.contains(&ip);
            if instruction.is_invalid() || is_other_function || bit(&self.begins, offset) {
                return;
            }
            set_bit(&mut self.begins, offset);
            for held in offset..(offset + instruction.len()).min(self.code.len()) {
                set_bit(&mut self.holds, held);
            }
            self.reached.push((ip, instruction.next_ip(), fixed.unwrap_or_else(|| state.rule())));
            state.follow(&instruction);
            match instruction.flow_control() {
                FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall => {}
                FlowControl::ConditionalBranch => self.jump(&instruction, state),
                FlowControl::UnconditionalBranch => {
                    self.jump(&instruction, state);
                    return;
                }
                FlowControl::IndirectBranch => {
                    if state.depth != Some(0) {
                        self.switch = Some(state);
                    }
                    return;
                }
                // System calls are interrupts that return.
                FlowControl::Interrupt if instruction.mnemonic() != Mnemonic::Int3 => {}
                _ => return,
            }
        }
    }

    fn jump(&mut self, instruction: &Instruction, state: State) {
        let target = instruction.near_branch_target();
        let is_new = self.offset(target).is_some_and(|offset| !bit(&self.begins, offset));
        if is_new && !self.functions.contains(&target) {
            self.todo.push((target, state));
        }
    }
}

fn bit(bits: &[u64], index: usize) -> bool {
    bits.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
}

fn set_bit(bits: &mut [u64], index: usize) {
    if let Some(word) = bits.get_mut(index / 64) {
        *word |= 1 << (index % 64);
    }
}

/// Whether compilers fill the space between functions with it.
fn is_padding(instruction: &Instruction) -> bool {
    instruction.is_invalid() || matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Int3)
}

/// Whether functions begin like this and parts of functions do not.
fn is_beginning(instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        Mnemonic::Push | Mnemonic::Endbr64 => true,
        Mnemonic::Sub => instruction.op0_register() == Register::RSP,
        _ => false,
    }
}

/// Whether code is what signal handlers return to; see `profiler_common::unwind::is_signal_trampoline`.
fn is_signal_trampoline(code: &[u8]) -> bool {
    let word = code.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
    word.is_some_and(profiler_common::unwind::is_signal_trampoline)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows as (offset, CFA kind, CFA offset, fp offset).
    fn check(code: &[u8], expect: &[(u64, u8, i32, i16)]) {
        const START: u64 = 0x1000;
        let rows = rows(code, START, 0, &BTreeSet::new());
        let rows: Vec<_> = rows
            .iter()
            .map(|(address, rule)| (address - START, rule.cfa & !cfa::GUESSED, rule.cfa_offset, rule.fp_offset))
            .collect();
        assert_eq!(rows, expect, "{code:x?}");
    }

    const SP: u8 = cfa::STACK_POINTER;

    /// push rbx; push rbp; sub rsp, 24; add rsp, 24; pop rbp; pop rbx; ret
    #[test]
    fn follows_pushes_and_pops() {
        check(
            &[0x53, 0x55, 0x48, 0x83, 0xec, 24, 0x48, 0x83, 0xc4, 24, 0x5d, 0x5b, 0xc3],
            &[
                (0, SP, 8, 0),
                (1, SP, 16, 0),
                (2, SP, 24, -24),
                (6, SP, 48, -24),
                (10, SP, 24, -24),
                (11, SP, 16, 0),
                (12, SP, 8, 0),
            ],
        );
    }

    /// push rbp; mov rbp, rsp; and rsp, -32; leave; ret
    #[test]
    fn trusts_a_frame_pointer_that_was_set_up() {
        check(
            &[0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xe4, 0xe0, 0xc9, 0xc3],
            &[(0, SP, 8, 0), (1, SP, 16, -16), (4, cfa::FRAME_POINTER, 16, -16), (9, SP, 8, 0)],
        );
    }

    /// push rbx; jmp test; body: nop; test: dec eax; jne body; pop rbx; ret
    #[test]
    fn follows_loops_that_begin_at_their_end() {
        check(
            &[0x53, 0xeb, 0x01, 0x90, 0xff, 0xc8, 0x75, 0xfb, 0x5b, 0xc3],
            &[(0, SP, 8, 0), (1, SP, 16, 0), (9, SP, 8, 0)],
        );
    }

    /// push rbx; jmp [rax]; case: pop rbx; ret: what a switch jumps to has the switch's stack.
    #[test]
    fn what_a_switch_jumps_to_has_its_stack() {
        check(&[0x53, 0xff, 0x20, 0x5b, 0xc3], &[(0, SP, 8, 0), (1, SP, 16, 0), (4, SP, 8, 0)]);
    }

    /// pop rax; call rax: a stack that shrinks above the return address is not understood.
    #[test]
    fn gives_up_where_the_stack_makes_no_sense() {
        check(&[0x58, 0xff, 0xd0], &[(0, SP, 8, 0), (1, cfa::FRAME_POINTER_CHAIN, 0, 0)]);
    }

    /// Any bytes give rows in order, and end.
    #[test]
    fn survives_any_bytes() {
        let mut state = 1u32;
        let bytes: Vec<u8> = (0..20_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let rows = rows(&bytes, 0x1000, 0x1000, &BTreeSet::new());
        assert!(rows.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }
}

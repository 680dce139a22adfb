//! One step at a time, from memory that is given word by word.

use super::*;

/// Memory given as (address, word) pairs; everything else is unreadable.
struct Words<'a>(&'a [(u64, u64)]);

impl Memory for Words<'_> {
    fn read_pair(&mut self, address: u64) -> Option<[u64; 2]> {
        Some([self.read_word(address)?, self.read_word(address + 8)?])
    }

    fn read_word(&mut self, address: u64) -> Option<u64> {
        self.0.iter().find(|(candidate, _)| *candidate == address).map(|(_, word)| *word)
    }
}

fn check(rule: Rule, registers: Registers, memory: &[(u64, u64)], expect: Result<Registers, StackEnd>) {
    assert_eq!(step(&rule, &registers, None, &mut Words(memory)), expect, "{rule:?}");
}

fn at(address: u64) -> Saved {
    Saved { value: 0, address }
}

const LEAF: Registers = Registers { pc: 0x40_1000, sp: 0x7000, fp: Saved::value(0x7010), bx: Saved::value(0x7080) };
const CHAIN: Rule = Rule::plain(cfa::FRAME_POINTER_CHAIN);

/// The saved pair at the frame pointer is the caller.
#[test]
fn follows_the_saved_pair() {
    let caller = Registers { pc: 0x40_2000, sp: 0x7020, fp: Saved::value(0x7040), ..LEAF };
    check(CHAIN, LEAF, &[(0x7010, 0x7040), (0x7018, 0x40_2000)], Ok(caller));
}

/// The ABI's outermost frame has a zero frame pointer, a thread's start a zero return address.
#[test]
fn ends_at_the_root() {
    check(CHAIN, Registers { fp: Saved::value(0), ..LEAF }, &[], Err(StackEnd::Root));
    check(CHAIN, LEAF, &[(0x7010, 0), (0x7018, 0)], Err(StackEnd::Root));
    check(Rule::plain(cfa::OUTERMOST), LEAF, &[], Err(StackEnd::Root));
}

/// A general-purpose value in the frame pointer register is recognised rather than followed.
#[test]
fn refuses_what_cannot_be_a_frame() {
    for fp in [0x7011, 0x6ff8, USER_SPACE_END] {
        check(CHAIN, Registers { fp: Saved::value(fp), ..LEAF }, &[], Err(StackEnd::FramePointerLost));
    }
    check(CHAIN, LEAF, &[(0x7010, 0x7040), (0x7018, 0x10)], Err(StackEnd::FramePointerLost));
    check(CHAIN, LEAF, &[(0x7010, 0x7040), (0x7018, u64::MAX)], Err(StackEnd::FramePointerLost));
}

/// Memory that cannot be read ends the stack under its own reason.
#[test]
fn names_unreadable_memory() {
    check(CHAIN, LEAF, &[(0x7010, 0x7040)], Err(StackEnd::MemoryUnreadable));
    check(Rule { cfa_offset: 32, ..Rule::plain(cfa::STACK_POINTER) }, LEAF, &[], Err(StackEnd::MemoryUnreadable));
}

/// Registers that a frame saved are known by their place, and read only when a rule asks for them.
#[test]
fn reads_saved_registers_when_they_are_needed() {
    let pushes =
        Rule { fp: fp::AT_CFA, fp_offset: -32, bx_offset: -40, cfa_offset: 48, ..Rule::plain(cfa::STACK_POINTER) };
    let caller = Registers { pc: 0x40_2000, sp: 0x7030, fp: at(0x7010), bx: at(0x7008) };
    check(pushes, LEAF, &[(0x7020, 1), (0x7028, 0x40_2000)], Ok(caller));

    let framed = Rule { fp: fp::AT_CFA, fp_offset: -16, cfa_offset: 16, ..Rule::plain(cfa::FRAME_POINTER) };
    let memory = [(0x7010, 0x7100), (0x7100, 0x7200), (0x7108, 0x40_3000)];
    let outer = Registers { pc: 0x40_3000, sp: 0x7110, fp: Saved::value(0x7200), bx: at(0x7008) };
    check(framed, caller, &memory, Ok(outer));

    let realigned = Rule { cfa_offset: 8, ..Rule::plain(cfa::BASE_POINTER) };
    let memory = [(0x7008, 0x7300), (0x72f8, 5), (0x7300, 0x40_4000)];
    check(realigned, outer, &memory, Ok(Registers { pc: 0x40_4000, sp: 0x7308, ..outer }));
}

/// A frame that realigned its stack keeps the caller's stack pointer in memory.
#[test]
fn follows_a_saved_frame_address() {
    let by_frame = Rule { fp: fp::AT_FRAME_POINTER, cfa_offset: -8, ..Rule::plain(cfa::AT_FRAME_POINTER) };
    let memory = [(0x7008, 0x7100), (0x70f0, 0), (0x70f8, 0x40_2000)];
    check(by_frame, LEAF, &memory, Ok(Registers { pc: 0x40_2000, sp: 0x7100, fp: at(0x7010), bx: LEAF.bx }));
    let by_stack = Rule { cfa_offset: 0x18, cfa_addend: 8, ..Rule::plain(cfa::AT_STACK_POINTER) };
    let memory = [(0x7018, 0x7100), (0x70f8, 0), (0x7100, 0x40_2000)];
    check(by_stack, LEAF, &memory, Ok(Registers { pc: 0x40_2000, sp: 0x7108, ..LEAF }));
}

/// Before its push a linkage table's entry has one word on the stack, after it two.
#[test]
fn knows_the_linkage_table() {
    let rule = Rule { cfa_offset: 11, ..Rule::plain(cfa::PLT_ENTRY) };
    let memory = [(0x6ff8, 0), (0x7000, 0x40_2000), (0x7008, 0x40_3000)];
    let before = Registers { pc: 0x40_102a, ..LEAF };
    check(rule, before, &memory, Ok(Registers { pc: 0x40_2000, sp: 0x7008, ..before }));
    let after = Registers { pc: 0x40_102b, ..LEAF };
    check(rule, after, &memory, Ok(Registers { pc: 0x40_3000, sp: 0x7010, ..after }));
}

/// The signal frame holds every register of what was interrupted.
#[test]
fn leaves_a_signal_handler() {
    let memory = [(0x7078, 0x9010), (0x7080, 77), (0x70a0, 0x9000), (0x70a8, 0x40_5000)];
    let interrupted = Registers { pc: 0x40_5000, sp: 0x9000, fp: Saved::value(0x9010), bx: Saved::value(77) };
    check(Rule::plain(cfa::SIGNAL_FRAME), LEAF, &memory, Ok(interrupted));
}

/// Registers that no frame saves are known in the leaf only.
#[test]
fn uses_any_register_of_the_leaf() {
    let rule = Rule { cfa_offset: 8, cfa_addend: 10, ..Rule::plain(cfa::LEAF_REGISTER) };
    let mut words = [0; pt_regs::WORDS];
    words[10] = 0x7100;
    let memory = [(0x70f8, 0), (0x7100, 0x40_2000)];
    let stepped = step(&rule, &LEAF, Some(&words), &mut Words(&memory));
    assert_eq!(stepped, Ok(Registers { pc: 0x40_2000, sp: 0x7108, ..LEAF }));
    check(rule, LEAF, &memory, Err(StackEnd::UnsupportedRule));
}

/// An exception lands by a jump: no return address is on the stack.
#[test]
fn follows_a_jump_out_of_the_leaf() {
    let rule = Rule { cfa_offset: 8, cfa_addend: 11, ..Rule::plain(cfa::LEAF_JUMP) };
    let mut words = [0; pt_regs::WORDS];
    words[11] = 0x40_7000;
    assert_eq!(step(&rule, &LEAF, Some(&words), &mut Words(&[])), Ok(Registers { pc: 0x40_7000, sp: 0x7008, ..LEAF }));
    check(rule, LEAF, &[], Err(StackEnd::UnsupportedRule));
}

/// A frame address below the stack pointer is nonsense, except where stacks are switched on purpose.
#[test]
fn stacks_grow() {
    let rule = Rule { cfa_offset: -8, ..Rule::plain(cfa::STACK_POINTER) };
    check(rule, LEAF, &[], Err(StackEnd::FrameCorrupt));
    let other = Registers { fp: Saved::value(0x2000), ..LEAF };
    let rule = Rule { cfa_offset: 16, fp: fp::AT_CFA, fp_offset: -16, ..Rule::plain(cfa::OTHER_STACK) };
    let memory = [(0x2000, 0x2100), (0x2008, 0x40_2000)];
    check(rule, other, &memory, Ok(Registers { pc: 0x40_2000, sp: 0x2010, fp: Saved::value(0x2100), bx: LEAF.bx }));
}

/// Calls are recognised by the bytes before their return address.
#[test]
fn recognises_calls() {
    let word = |tail: &[u8]| {
        let mut bytes = [0x90; 8];
        bytes[8 - tail.len()..].copy_from_slice(tail);
        u64::from_le_bytes(bytes)
    };
    for call in [
        &[0xe8, 1, 2, 3, 4][..],
        &[0xff, 0xd0],
        &[0x41, 0xff, 0xd3],
        &[0xff, 0x50, 0x18],
        &[0xff, 0x15, 1, 2, 3, 4],
        &[0xff, 0x94, 0x24, 1, 2, 3, 4],
    ] {
        assert!(follows_a_call(word(call)), "{call:x?}");
    }
    for other in [&[0x90][..], &[0xff, 0xe0], &[0xe9, 1, 2, 3, 4], &[0x48, 0x89, 0xe5]] {
        assert!(!follows_a_call(word(other)), "{other:x?}");
    }
}

/// Both ways to write the trampoline, and nothing else.
#[test]
fn recognises_the_signal_trampoline() {
    assert!(is_signal_trampoline(u64::from_le_bytes([0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f])));
    assert!(is_signal_trampoline(u64::from_le_bytes([0xb8, 15, 0, 0, 0, 0x0f, 0x05, 0xcc])));
    assert!(!is_signal_trampoline(u64::from_le_bytes([0xb8, 14, 0, 0, 0, 0x0f, 0x05, 0xcc])));
}

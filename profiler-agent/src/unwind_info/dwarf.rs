//! Rules from DWARF call frame information: `.eh_frame` and `.debug_frame`.
//!
//! In: the bytes of a section. Out: which code it covers, and the rows of each function. The bytes are an
//! allegation: work is limited, and what does not parse covers nothing.

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, CommonInformationEntry, DebugFrame, EhFrame, EndianSlice, Expression,
    FrameDescriptionEntry, LittleEndian, Operation, Register, RegisterRule, UnwindContext, UnwindExpression,
    UnwindOffset, UnwindSection, UnwindTableRow, X86_64,
};
use profiler_common::unwind::rule::{LOST_OFFSET, Rule, cfa, fp};

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// Most functions taken from one section: some browsers have nearly as many.
const MAX_FUNCTIONS: usize = 1 << 20;
/// Most common entries remembered; real files have a few.
const MAX_COMMON: usize = 4 << 10;
/// Most bytes of instructions that a common entry may repeat in each of its functions.
const MAX_COMMON_INSTRUCTIONS: usize = 4 << 10;
/// Most bytes of common entries parsed and of instructions executed for one section.
const MAX_WORK: usize = 1 << 30;

/// Code that the section covers with one entry: stated addresses, and the entry's place in the section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) entry: usize,
}

/// One of the two sections, and what was read of it.
pub(super) struct Frames<'a, S: UnwindSection<Bytes<'a>>> {
    section: S,
    bases: BaseAddresses,
    common: Common<'a>,
    context: UnwindContext<usize>,
}

/// The common entries of a section.
struct Common<'a> {
    bytes: &'a [u8],
    /// By their place; `None`: what is there does not parse.
    known: HashMap<usize, Option<CommonInformationEntry<Bytes<'a>>>>,
    /// Bytes parsed and instructions executed so far.
    work: usize,
}

/// `.eh_frame`, stated to be loaded at `address`; `text` is where `.text` is.
pub(super) fn eh_frame(bytes: &[u8], address: u64, text: u64) -> Frames<'_, EhFrame<Bytes<'_>>> {
    let mut section = EhFrame::new(bytes, LittleEndian);
    section.set_address_size(8);
    Frames::new(bytes, section, BaseAddresses::default().set_eh_frame(address).set_text(text))
}

/// `.debug_frame`.
pub(super) fn debug_frame(bytes: &[u8]) -> Frames<'_, DebugFrame<Bytes<'_>>> {
    let mut section = DebugFrame::new(bytes, LittleEndian);
    section.set_address_size(8);
    Frames::new(bytes, section, BaseAddresses::default())
}

impl<'a, S: UnwindSection<Bytes<'a>>> Frames<'a, S>
where
    S::Offset: UnwindOffset<usize>,
{
    fn new(bytes: &'a [u8], section: S, bases: BaseAddresses) -> Self {
        let common = Common { bytes, known: HashMap::new(), work: 0 };
        Self { section, bases, common, context: UnwindContext::new() }
    }

    /// Calls `function` with every function that has an entry, in the order of the section. Ends early where the
    /// section does not parse.
    pub(super) fn functions(&mut self, mut function: impl FnMut(Function)) {
        let mut left = MAX_FUNCTIONS;
        let mut entries = self.section.entries(&self.bases);
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let common = &mut self.common;
            let Ok(entry) = partial.parse(|section, bases, offset| common.entry(section, bases, offset)) else {
                continue;
            };
            let (start, end) = (entry.initial_address(), entry.end_address());
            if start < end && left > 0 {
                left -= 1;
                function(Function { start, end, entry: entry.offset() });
            }
        }
    }

    /// Calls `row` with the start and rule of every row of a function, in order.
    ///
    /// # Errors
    /// The address from which on the entry could not be understood.
    pub(super) fn rows(&mut self, function: Function, mut row: impl FnMut(u64, Rule)) -> Result<(), u64> {
        let common = &mut self.common;
        let entry = self.section.fde_from_offset(&self.bases, function.entry.into(), |section, bases, offset| {
            common.entry(section, bases, offset)
        });
        let Ok(entry) = entry else { return Err(function.start) };
        common.work = common.work.saturating_add(entry.entry_len()).saturating_add(entry.cie().entry_len());
        if common.work > MAX_WORK || entry.cie().entry_len() > MAX_COMMON_INSTRUCTIONS {
            return Err(function.start);
        }
        let mut understood = function.start;
        let Ok(mut rows) = entry.rows(&self.section, &self.bases, &mut self.context) else { return Err(understood) };
        loop {
            match rows.next_row() {
                Ok(Some(current)) => {
                    row(current.start_address(), rule_of(current, &entry, &self.section));
                    understood = current.end_address();
                }
                Ok(None) => return Ok(()),
                Err(_) => return Err(understood),
            }
        }
    }
}

impl<'a> Common<'a> {
    /// The common entry at `offset`, parsed once as long as there are not too many.
    fn entry<S: UnwindSection<Bytes<'a>>>(
        &mut self,
        section: &S,
        bases: &BaseAddresses,
        offset: S::Offset,
    ) -> gimli::Result<CommonInformationEntry<Bytes<'a>>>
    where
        S::Offset: UnwindOffset<usize>,
    {
        let place = UnwindOffset::into(offset);
        if let Some(entry) = self.known.get(&place) {
            return entry.clone().ok_or(gimli::Error::NotCieId(place as u64));
        }
        self.work = self.work.saturating_add(self.stated_len(place));
        if self.work > MAX_WORK {
            return Err(gimli::Error::NotCieId(place as u64));
        }
        let entry = section.cie_from_offset(bases, offset);
        if self.known.len() < MAX_COMMON {
            self.known.insert(place, entry.as_ref().ok().cloned());
        }
        entry
    }

    /// The bytes that the entry at a place says it has. Parsing it reads no more, and may read all of them before
    /// it fails.
    fn stated_len(&self, place: usize) -> usize {
        let rest = self.bytes.get(place..).unwrap_or_default();
        let stated = rest.first_chunk::<4>().map_or(0, |length| u32::from_le_bytes(*length) as usize);
        stated.min(rest.len())
    }
}

/// The rule that a row stands for.
fn rule_of<'a, S: UnwindSection<Bytes<'a>>>(
    row: &UnwindTableRow<usize>,
    entry: &FrameDescriptionEntry<Bytes<'a>>,
    section: &S,
) -> Rule {
    if entry.is_signal_trampoline() {
        return Rule::plain(cfa::SIGNAL_FRAME);
    }
    match row.register(X86_64::RA) {
        Some(RegisterRule::Undefined) => return Rule::plain(cfa::OUTERMOST),
        Some(RegisterRule::Offset(-8)) => {}
        Some(RegisterRule::Register(register)) => {
            return jump(row.cfa(), register).unwrap_or(Rule::plain(cfa::UNSUPPORTED));
        }
        _ => return Rule::plain(cfa::UNSUPPORTED),
    }
    let operations = |expression: &UnwindExpression<usize>| {
        expression.get(section).ok().map(|expression| operations(expression, entry.cie().encoding()))
    };
    let Some(frame) = (match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => from_register(*register, *offset),
        CfaRule::Expression(expression) => operations(expression).and_then(|operations| from_expression(&operations)),
    }) else {
        return Rule::plain(cfa::UNSUPPORTED);
    };
    let (fp, fp_offset) = match row.register(X86_64::RBP) {
        None | Some(RegisterRule::Undefined | RegisterRule::SameValue) => (fp::SAME, 0),
        Some(RegisterRule::Offset(offset)) => narrow(offset).map_or((fp::LOST, 0), |offset| (fp::AT_CFA, offset)),
        Some(RegisterRule::Expression(expression)) => match operations(&expression).as_deref() {
            Some(&[Operation::RegisterOffset { register: X86_64::RBP, offset, .. }]) => {
                narrow(offset).map_or((fp::LOST, 0), |offset| (fp::AT_FRAME_POINTER, offset))
            }
            _ => (fp::LOST, 0),
        },
        Some(_) => (fp::LOST, 0),
    };
    let bx_offset = match row.register(X86_64::RBX) {
        None | Some(RegisterRule::Undefined | RegisterRule::SameValue) => 0,
        Some(RegisterRule::Offset(offset)) => narrow(offset).filter(|&offset| offset != 0).unwrap_or(LOST_OFFSET),
        Some(_) => LOST_OFFSET,
    };
    Rule { fp, fp_offset, bx_offset, ..frame }
}

/// A frame that is left by a jump to what a register holds.
fn jump(frame: &CfaRule<usize>, target: Register) -> Option<Rule> {
    let CfaRule::RegisterAndOffset { register: X86_64::RSP, offset } = *frame else { return None };
    let cfa_offset = i32::try_from(offset).ok()?;
    Some(Rule { cfa_offset, cfa_addend: pt_regs_word(target)?, ..Rule::plain(cfa::LEAF_JUMP) })
}

fn narrow(offset: i64) -> Option<i16> {
    i16::try_from(offset).ok()
}

/// A CFA that is a register plus an offset.
fn from_register(register: Register, offset: i64) -> Option<Rule> {
    let cfa_offset = i32::try_from(offset).ok()?;
    let kind = match register {
        X86_64::RSP => cfa::STACK_POINTER,
        X86_64::RBP => cfa::FRAME_POINTER,
        X86_64::RBX => cfa::BASE_POINTER,
        other => {
            return Some(Rule { cfa_offset, cfa_addend: pt_regs_word(other)?, ..Rule::plain(cfa::LEAF_REGISTER) });
        }
    };
    Some(Rule { cfa_offset, ..Rule::plain(kind) })
}

/// Where `struct pt_regs` has a register (Linux `arch/x86/include/asm/ptrace.h`).
fn pt_regs_word(register: Register) -> Option<i16> {
    let order = [
        X86_64::R15,
        X86_64::R14,
        X86_64::R13,
        X86_64::R12,
        X86_64::RBP,
        X86_64::RBX,
        X86_64::R11,
        X86_64::R10,
        X86_64::R9,
        X86_64::R8,
        X86_64::RAX,
        X86_64::RCX,
        X86_64::RDX,
        X86_64::RSI,
        X86_64::RDI,
    ];
    order.iter().position(|&candidate| candidate == register).and_then(|index| i16::try_from(index).ok())
}

/// The first operations of an expression; those of interest are short.
fn operations(expression: Expression<Bytes<'_>>, encoding: gimli::Encoding) -> Vec<Operation<Bytes<'_>>> {
    const LONGEST: usize = 12;
    let mut iterator = expression.operations(encoding);
    let mut operations = Vec::with_capacity(LONGEST);
    while let Ok(Some(operation)) = iterator.next() {
        if operations.len() == LONGEST {
            return Vec::new();
        }
        operations.push(operation);
    }
    operations
}

/// A CFA that is an expression of one of the known shapes.
fn from_expression(operations: &[Operation<Bytes<'_>>]) -> Option<Rule> {
    use Operation::{And, Deref, Ge, Plus, PlusConstant, RegisterOffset, Shl, UnsignedConstant};
    match *operations {
        // What linkers write for the procedure linkage table: RSP + 8 + ((RIP & 15) >= n) * 8.
        [
            RegisterOffset { register: X86_64::RSP, offset: 8, .. },
            RegisterOffset { register: X86_64::RA, offset: 0, .. },
            UnsignedConstant { value: 15 },
            And,
            UnsignedConstant { value: pushed_from },
            Ge,
            UnsignedConstant { value: 3 },
            Shl,
            Plus,
        ] => Some(Rule { cfa_offset: i32::try_from(pushed_from).ok()?, ..Rule::plain(cfa::PLT_ENTRY) }),
        [RegisterOffset { register, offset, .. }, Deref { size: 8, .. }] => at_register(register, offset, 0),
        [RegisterOffset { register, offset, .. }, Deref { size: 8, .. }, PlusConstant { value }] => {
            at_register(register, offset, value)
        }
        _ => None,
    }
}

fn at_register(register: Register, offset: i64, addend: u64) -> Option<Rule> {
    let kind = match register {
        X86_64::RBP => cfa::AT_FRAME_POINTER,
        X86_64::RSP => cfa::AT_STACK_POINTER,
        _ => return None,
    };
    Some(Rule { cfa_offset: i32::try_from(offset).ok()?, cfa_addend: i16::try_from(addend).ok()?, ..Rule::plain(kind) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of a section: its length, then the rest.
    fn entry(rest: &[u8]) -> Vec<u8> {
        let mut bytes = (rest.len() as u32).to_le_bytes().to_vec();
        bytes.extend(rest);
        bytes
    }

    /// A common entry: code alignment 1, data alignment -8, return address in register 16; CFA: RSP + 8, return
    /// address: CFA - 8.
    fn common(augmentation: &[u8]) -> Vec<u8> {
        const VERSION: u8 = 3;
        let header = [&u32::MAX.to_le_bytes()[..], &[VERSION], augmentation, &[0]].concat();
        entry(&[&header[..], &[1, 0x78, 16, 0x0c, 7, 8, 0x90, 1]].concat())
    }

    /// A function of 16 bytes with the common entry at a place, and its instructions.
    fn function(common: usize, start: u64, instructions: &[u8]) -> Vec<u8> {
        let common = (common as u32).to_le_bytes();
        entry(&[&common[..], &start.to_le_bytes(), &16u64.to_le_bytes(), instructions].concat())
    }

    fn functions_of<'a>(frames: &mut Frames<'a, DebugFrame<Bytes<'a>>>) -> Vec<Function> {
        let mut functions = Vec::new();
        frames.functions(|function| functions.push(function));
        functions
    }

    /// Rows are read with what the common entry says.
    #[test]
    fn reads_rows() {
        // After 4 bytes, CFA: RSP + 16.
        let instructions = [0x44, 0x0e, 16];
        let bytes = [common(b""), function(0, 0x1000, &[]), function(0, 0x1010, &instructions)].concat();
        let mut frames = debug_frame(&bytes);
        let functions = functions_of(&mut frames);
        let ranges: Vec<_> = functions.iter().map(|function| (function.start, function.end)).collect();
        assert_eq!(ranges, [(0x1000, 0x1010), (0x1010, 0x1020)]);
        let mut rows = Vec::new();
        let outcome = frames.rows(functions[1], |address, rule| rows.push((address, rule.cfa, rule.cfa_offset)));
        assert_eq!((outcome, frames.common.known.len()), (Ok(()), 1));
        assert_eq!(rows, [(0x1010, cfa::STACK_POINTER, 8), (0x1014, cfa::STACK_POINTER, 16)]);
    }

    /// A large common entry that does not parse, hidden in a function's instructions, is not read again for each of
    /// many functions that name it.
    #[test]
    fn reads_what_does_not_parse_once() {
        let mut bytes = [common(b""), function(0, 0x1000, &common(&[b'!'; 1000]))].concat();
        let hidden = common(b"").len() + function(0, 0, b"").len();
        for index in 0..1000 {
            bytes.extend(function(hidden, 0x2000 + 16 * index, &[]));
        }
        let mut frames = debug_frame(&bytes);
        assert_eq!(functions_of(&mut frames).len(), 1);
        assert!((1000..2000).contains(&frames.common.work), "{}", frames.common.work);
    }
}

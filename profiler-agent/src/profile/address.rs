//! Addresses that must not be confused with one another.

/// An address of running code, and how it was learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeAddress {
    /// An instruction pointer: the instruction that was running.
    Instruction(u64),
    /// A return address: the instruction after the call.
    Return(u64),
}

impl CodeAddress {
    /// The address to look up: inside the calling instruction for a return address, which may lie just past
    /// the end of its function.
    pub const fn lookup(self) -> u64 {
        match self {
            Self::Instruction(address) => address,
            Self::Return(address) => address.saturating_sub(1),
        }
    }
}

/// Offset in a file, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileOffset(pub u64);

/// Address as an ELF file states it, before any relocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VirtualAddress(pub u64);

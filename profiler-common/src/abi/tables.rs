//! Unwind tables and mappings: what the agent knows about code, as the kernel programs read it.
//!
//! A place in a process leads to a mapping, its executable's table, the 64 KiB page of that table, the row
//! within the page, and the rule of the row.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Tables are split into pages of 64 KiB of code, so that a row needs 16 bits for its place.
pub const PAGE_SHIFT: u32 = 16;
/// Rows of a chunk: one value of an inner map, 256 KiB.
pub const CHUNK_ROWS: usize = 1 << 16;
/// Most chunks: 64 MiB of rows.
pub const MAX_CHUNKS: usize = 256;
/// Most pages, over all executables: 4 GiB of code.
pub const MAX_PAGES: usize = 1 << 16;
/// Most different rules.
pub const MAX_RULES: usize = 1 << 14;
/// Most executables with a table; number 0 is for code without one.
pub const MAX_EXECUTABLES: usize = 1 << 13;
/// Most mappings, over all processes.
pub const MAX_MAPPINGS: usize = 1 << 16;
/// Most mappings of one process.
pub const MAX_PROCESS_MAPPINGS: usize = 1 << MAPPING_SEARCH_STEPS;
/// Halvings that find a mapping among as many.
pub const MAPPING_SEARCH_STEPS: u32 = 12;
/// Most processes whose mappings are known.
pub const MAX_PROCESSES: usize = 1 << 14;

/// One row: where it begins within its page, and its rule. It holds until the next row begins.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Row(pub u32);

impl Row {
    /// A row that begins at `place`, bytes into its page.
    pub const fn new(place: u16, rule: u16) -> Self {
        Self((place as u32) << 16 | rule as u32)
    }

    /// Bytes into its page.
    pub const fn place(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Number of its rule.
    pub const fn rule(self) -> u16 {
        self.0 as u16
    }
}

/// Where the rows of a page are. The first row of a page begins at its first byte.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Page {
    /// The chunk.
    pub chunk: u16,
    /// Index of the first row in the chunk.
    pub first: u16,
    /// How many rows; zero: no table covers the page.
    pub rows: u16,
    /// First step of a binary search: the largest power of two below `rows`, or zero.
    pub first_half: u16,
}

impl Page {
    /// The most rows a page can have.
    pub const MAX_ROWS: usize = u16::MAX as usize;

    /// A page whose `rows` rows, at least one, begin at `first` in `chunk`.
    pub const fn new(chunk: u16, first: u16, rows: u16) -> Self {
        let first_half = if rows > 1 { 1 << (rows - 1).ilog2() } else { 0 };
        Self { chunk, first, rows, first_half }
    }
}

/// What is known about an executable's table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct ExecutableTable {
    /// A [`TableState`].
    pub state: u32,
    /// Page number of the first page: stated virtual address >> [`PAGE_SHIFT`].
    pub base: u32,
    /// Index of its first page in the page map.
    pub first_page: u32,
    /// How many pages it has.
    pub pages: u32,
    /// Set by the programs when the table is used; cleared by the agent to see which are not.
    pub used: u32,
    /// Samples that missed the table since it was asked for, roughly.
    pub missed: u32,
}

/// Whether an executable has a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TableState {
    /// None yet, or not any more: the first sample that needs it asks for it.
    Absent = 0,
    /// It was asked for.
    Requested = 1,
    /// Its rows are in place.
    Ready = 2,
    /// It has nothing to make a table from: frame pointers are followed.
    None = 3,
    /// It does not fit into the budget.
    OverBudget = 4,
}

/// One executable range of a process's addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct MappingRecord {
    /// First address.
    pub start: u64,
    /// First address past the end.
    pub end: u64,
    /// Address minus stated virtual address, modulo 2^64.
    pub bias: u64,
    /// Index in the executables map; 0: code made at run time, or a file that is not known.
    pub executable: u32,
    /// Zero.
    pub reserved: u32,
}

/// The mappings of a process: a range of the mapping map, sorted by address. Never changed in place.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct MappingRange {
    /// Index of the first.
    pub first: u32,
    /// How many.
    pub count: u32,
}

const _: () = {
    assert!(size_of::<Row>() == 4);
    assert!(size_of::<Page>() == 8);
    assert!(size_of::<ExecutableTable>() == 24);
    assert!(size_of::<MappingRecord>() == 32);
    assert!(size_of::<MappingRange>() == 8);
    assert!(CHUNK_ROWS == 1 << PAGE_SHIFT);
    assert!(MAX_CHUNKS <= u16::MAX as usize);
    assert!(MAX_RULES <= u16::MAX as usize);
};

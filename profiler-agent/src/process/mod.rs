//! Which processes run, and what code is mapped where in them.
//!
//! In: notices from the kernel and `/proc`. Out: located samples. Everything read from a process is an
//! allegation: counts and sizes are bounded, and a process that vanishes while it is read is an expected
//! outcome.

mod executables;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod mappings;
mod proc_fs;
mod published;
mod runtime_code;
mod split_debug;
mod stack;
mod table;

pub use self::{
    executables::open_executable,
    proc_fs::children_of,
    published::{Change, MappingMaps, Published},
    table::{NewMapping, ProcessTable, TableStats},
};

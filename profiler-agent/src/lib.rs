//! The profiler's agent: samples a machine through kernel programs, names what it sees, and exports profiles.
//!
//! Data flows from [`kernel`] through [`process`], [`symbolize`] and [`aggregate`] to [`export`]; the stages
//! share the nouns in [`profile`] and meet only in [`pipeline`].

pub mod aggregate;
pub mod allowance;
mod cgroup_mount;
pub mod cgroups;
pub mod cli;
pub mod config;
pub mod control;
mod credentials;
mod elf;
pub mod export;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
pub mod kernel;
pub mod label;
pub mod pattern;
pub mod pipeline;
pub mod process;
mod process_root;
pub mod profile;
mod ranges;
pub mod redact;
mod regular_file;
pub mod schedule;
pub mod scope;
pub mod status;
pub mod symbolize;
mod system_certificates;
pub mod unwind_info;
pub mod waits;
mod whole_file;

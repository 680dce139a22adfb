//! Records that cross the border between the kernel programs and the agent.
//!
//! Every record is `repr(C)` with fixed-width fields and explicit padding. The agent treats what it
//! reads as an allegation: lengths and enum values are checked once, where the bytes are decoded.

pub mod cgroup;
pub mod counter;
pub mod notice;
pub mod process;
pub mod sample;
pub mod scope;
pub mod settings;
pub mod tables;
pub mod waits;

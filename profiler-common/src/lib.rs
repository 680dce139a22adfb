//! What the kernel programs and the agent agree on.
//!
//! `abi` holds every record that crosses the kernel/user border, one noun per file, with its layout
//! asserted at compile time. `unwind` holds the single-frame unwind step, written over a memory-read
//! trait so that the same code runs in the kernel and in userspace tests. Nothing here does I/O.
#![no_std]

pub mod abi;
pub mod unwind;

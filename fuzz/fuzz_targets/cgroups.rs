//! The kernel programs' notices about cgroups, and what paths say.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::cgroups(bytes));

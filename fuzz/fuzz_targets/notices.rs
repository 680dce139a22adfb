//! The kernel programs' notices about processes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::notices(bytes));

//! Who rules of the scope are about.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::scope(bytes));

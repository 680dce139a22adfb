//! Mappings of a process, in any order.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::mappings(bytes));

//! Rules from code without tables.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::guessed_code(bytes));

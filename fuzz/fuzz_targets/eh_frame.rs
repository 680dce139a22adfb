//! Rules from `.eh_frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::eh_frame(bytes));

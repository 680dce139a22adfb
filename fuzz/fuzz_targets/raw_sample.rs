//! Rows of sample buffers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::raw_sample(bytes));

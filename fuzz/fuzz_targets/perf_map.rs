//! Perf maps, read while they grow: what processes call the code that they make.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::perf_map(bytes));

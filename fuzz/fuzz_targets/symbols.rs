//! Symbol tables, read by blazesym.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::symbols(bytes));

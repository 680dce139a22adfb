//! Paths in what the log says and in what runtimes call functions.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::redact(bytes));

//! Lines of `/proc`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::proc_text(bytes));

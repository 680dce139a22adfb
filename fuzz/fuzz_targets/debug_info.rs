//! Source lines and inlined functions from debug information.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::debug_info(bytes));

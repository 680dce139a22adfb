//! Source lines and inlined functions from Go's `.gopclntab`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::go_lines(bytes));

//! The unwind table of a file with any sections.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::sections(bytes));

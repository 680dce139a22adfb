//! The kernel's records of new mappings.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::mmap_record(bytes));

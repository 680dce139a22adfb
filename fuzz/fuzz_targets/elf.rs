//! ELF headers, notes and symbols.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::elf(bytes));

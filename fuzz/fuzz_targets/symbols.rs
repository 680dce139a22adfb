//! Symbol tables, MiniDebugInfo and Go tables: names of functions.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::symbols(bytes));

//! Stored requests: what an earlier agent, or anybody, left on disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::spool(bytes));

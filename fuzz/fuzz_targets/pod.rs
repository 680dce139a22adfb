//! Pods' metadata, as the API server sends it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::pod(bytes));

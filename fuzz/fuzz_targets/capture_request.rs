//! A capture that a client of the control socket asks for.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::capture_request(bytes));

//! What a receiver of profiles answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::otlp_answer(bytes));

//! Steps of a walk, by any rules.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::unwind_step(bytes));

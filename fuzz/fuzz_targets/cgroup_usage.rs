//! Files of cgroups about what is used, and what triggers captures.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| profiler_agent::fuzzing::cgroup_usage(bytes));

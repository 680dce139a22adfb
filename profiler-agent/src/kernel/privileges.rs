//! What this process may do, as far as profiling needs it.

use std::{fmt, fs};

/// Capabilities by their numbers in `include/uapi/linux/capability.h`.
const CAPABILITIES: &[(&str, u32, &str)] = &[
    ("CAP_BPF", 39, "load the kernel programs"),
    ("CAP_PERFMON", 38, "sample other processes and read kernel stacks"),
    ("CAP_SYS_PTRACE", 19, "read other processes' mappings"),
];
/// Before Linux 5.8 split it up, and still, this one implies the first two.
const CAP_SYS_ADMIN: u32 = 21;

/// Capabilities that are needed and not held.
#[derive(Debug, PartialEq, Eq)]
pub struct MissingPrivileges(Vec<(&'static str, &'static str)>);

impl fmt::Display for MissingPrivileges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.0.iter().map(|(name, _)| *name).collect();
        let purposes: Vec<&str> = self.0.iter().map(|(_, purpose)| *purpose).collect();
        write!(
            f,
            "missing privileges: {} ({}); run as root, or grant these capabilities",
            names.join(", "),
            purposes.join("; ")
        )
    }
}

impl std::error::Error for MissingPrivileges {}

/// Checks this process's effective capabilities.
pub fn check() -> Result<(), MissingPrivileges> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing_in(&status)
}

fn missing_in(status: &str) -> Result<(), MissingPrivileges> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let holds = |capability: u32| effective >> capability & 1 == 1;
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(name, number, _)| !(holds(*number) || (holds(CAP_SYS_ADMIN) && *name != "CAP_SYS_PTRACE")))
        .map(|(name, _, purpose)| (*name, *purpose))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(MissingPrivileges(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(effective: u64, expect: &[&str]) {
        let missing = match missing_in(&format!("Name:\tx\nCapEff:\t{effective:016x}\n")) {
            Ok(()) => Vec::new(),
            Err(MissingPrivileges(missing)) => missing.into_iter().map(|(name, _)| name).collect(),
        };
        assert_eq!(missing, expect);
    }

    /// Root has everything, SYS_ADMIN stands in for what was split off it, nobody has nothing.
    #[test]
    fn names_what_is_missing() {
        check(u64::MAX, &[]);
        check(1 << 39 | 1 << 38 | 1 << 19, &[]);
        check(1 << 21 | 1 << 19, &[]);
        check(1 << 39 | 1 << 19, &["CAP_PERFMON"]);
        check(0, &["CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"]);
    }
}

//! What a process and its kernel programs do, by the kernel's own books (`kernel.bpf_stats_enabled`, Linux 5.1).

use std::{collections::BTreeMap, fs};

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// The kernel keeps books of every program's runs while this lives.
pub struct Statistics {
    before: String,
}

impl Statistics {
    /// Switches them on.
    pub fn on() -> Self {
        let before = fs::read_to_string(SWITCH).unwrap_or_else(|error| panic!("{SWITCH}: {error}"));
        fs::write(SWITCH, "1").unwrap_or_else(|error| panic!("{SWITCH}: {error}"));
        Self { before }
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        // What was on before stays on; there is nobody to tell if that fails.
        let _ = fs::write(SWITCH, self.before.trim());
    }
}

/// Runs of programs, and how long they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// Programs that are loaded.
    pub programs: usize,
    /// How often they ran since [`Statistics::on`].
    pub count: u64,
    /// How long that took, nanoseconds.
    pub time_ns: u64,
}

/// What the programs that a process holds have done.
pub fn runs_of(pid: u32) -> Runs {
    let mut programs: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten() {
        // (A descriptor may be closed meanwhile.)
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().parse::<u64>().ok()
        };
        // (Links have a `prog_id` too, but no counts.)
        if let (Some(id), Some(time), Some(count)) = (field("prog_id"), field("run_time_ns"), field("run_cnt")) {
            programs.insert(id, (count, time));
        }
    }
    Runs {
        programs: programs.len(),
        count: programs.values().map(|(count, _)| count).sum(),
        time_ns: programs.values().map(|(_, time)| time).sum(),
    }
}

/// CPU time of a process's threads, seconds: the first field of their schedstat. (`/proc/PID/stat` counts ticks of the clock,
/// each of which is half of what is allowed.)
pub fn cpu_seconds(pid: u32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

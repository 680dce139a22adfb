//! What profiling costs this machine: the CPU time of the agent's threads, and of the kernel programs.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};
use profiler_common::abi::counter::Counter;

use crate::{allowance::Allowance, status::Stats};

/// Time to enter and leave a program, which its own looks at the clock do not see. (Linux 6.18: with it, what is measured is
/// what the kernel's books of the programs' run time say. Throughput loses some 50 ns more.)
const ENTRY_SECONDS: f64 = 50e-9;

/// CPU seconds, by what took them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// How long this is about, seconds.
    pub elapsed: f64,
    /// The agent's threads, but for the next.
    pub agent: f64,
    /// Reading symbols and building unwind tables, which has an allowance of its own.
    pub files: f64,
    /// The program of the sampling clock.
    pub samples: f64,
    /// Following waits, without taking stacks.
    pub switches: f64,
    /// Taking stacks of waits.
    pub wait_stacks: f64,
    /// Announcing processes and cgroups.
    pub notices: f64,
    /// How often CPUs switched from one thread to another, which is no time.
    pub switched: f64,
}

impl Spent {
    /// What the kernel programs took.
    pub fn programs(&self) -> f64 {
        self.samples + self.switches + self.wait_stacks + self.notices
    }

    /// What everything took.
    pub fn total(&self) -> f64 {
        self.agent + self.files + self.programs()
    }

    /// Adds what was spent besides.
    pub(super) fn add(&mut self, other: &Self) {
        self.elapsed += other.elapsed;
        self.agent += other.agent;
        self.files += other.files;
        self.samples += other.samples;
        self.switches += other.switches;
        self.wait_stacks += other.wait_stacks;
        self.notices += other.notices;
        self.switched += other.switched;
    }

    /// What was added since `earlier`.
    fn since(&self, earlier: &Self) -> Self {
        let since = |now: f64, then: f64| (now - then).max(0.0);
        Self {
            elapsed: since(self.elapsed, earlier.elapsed),
            agent: since(self.agent, earlier.agent),
            files: since(self.files, earlier.files),
            samples: since(self.samples, earlier.samples),
            switches: since(self.switches, earlier.switches),
            wait_stacks: since(self.wait_stacks, earlier.wait_stacks),
            notices: since(self.notices, earlier.notices),
            switched: since(self.switched, earlier.switched),
        }
    }
}

/// Reads what was spent.
pub struct Meter {
    started: Instant,
    allowance: Arc<Allowance>,
    last: Spent,
    /// Switches as of the last look, while no program counts them.
    switches: Option<f64>,
}

impl Meter {
    /// Reads from now on.
    pub fn new(stats: &Stats, allowance: Arc<Allowance>) -> Self {
        let mut meter = Self { started: Instant::now(), allowance, last: Spent::default(), switches: None };
        meter.last = meter.total(stats);
        meter
    }

    /// What was spent since this was last asked. `follows_waits`: programs count switches; otherwise the kernel is asked.
    pub fn read(&mut self, stats: &Stats, follows_waits: bool) -> Spent {
        let total = self.total(stats);
        let mut spent = total.since(&self.last);
        self.last = total;
        // (It takes milliseconds on large machines.)
        let switches = if follows_waits { None } else { machine_switches() };
        if let (Some(before), Some(now)) = (self.switches, switches) {
            spent.switched += (now - before).max(0.0);
        }
        self.switches = switches;
        spent
    }

    fn total(&self, stats: &Stats) -> Spent {
        let seconds = |counter| stats.kernel_in_all(counter) as f64 / 1e9;
        let entries = |counter| stats.kernel_in_all(counter) as f64 * ENTRY_SECONDS;
        let files = self.allowance.used();
        Spent {
            elapsed: self.started.elapsed().as_secs_f64(),
            agent: process_time().as_secs_f64() - files,
            files,
            samples: seconds(Counter::OnCpuNs) + entries(Counter::Fired),
            switches: seconds(Counter::SwitchesNs) + entries(Counter::Switches),
            wait_stacks: seconds(Counter::WaitStacksNs),
            notices: seconds(Counter::NoticesNs),
            switched: stats.kernel_in_all(Counter::Switches) as f64,
        }
    }
}

/// CPU time of this process.
pub fn process_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// How often the machine's CPUs have switched from one thread to another so far.
fn machine_switches() -> Option<f64> {
    // (man 5 proc_stat; behind a line for each CPU, and one that may be long.)
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("ctxt "))?.trim().parse().ok()
}

/// Memory of this process that is not shared with files, bytes: what `RssAnon` of `/proc/self/status` says. Pages of files
/// can be had back at any time.
pub fn memory() -> Option<usize> {
    // statm (man 5 proc_pid_statm): size, resident, shared (with files), each in pages.
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = statm.split_ascii_whitespace().skip(1).map(str::parse::<usize>);
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| usize::try_from(size).ok())?;
    Some(resident.saturating_sub(shared).saturating_mul(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was spent is told once.
    #[test]
    fn tells_what_was_added() {
        let stats = Stats::default();
        let mut counters = vec![0; Counter::COUNT];
        let mut meter = Meter::new(&stats, Arc::default());
        counters[Counter::OnCpuNs as usize] = 3_000_000;
        counters[Counter::SwitchesNs as usize] = 2_000_000_000;
        counters[Counter::Switches as usize] = 1_000_000;
        stats.set_kernel_counters(&counters);
        let spent = meter.read(&stats, true);
        assert!((spent.samples - 0.003).abs() < 1e-6 && (spent.switches - 2.05).abs() < 1e-6, "{spent:?}");
        assert!(spent.total() >= spent.programs() && spent.elapsed > 0.0);
        assert!(meter.read(&stats, true).programs() < 1e-9);
        // Where no program counts switches, the kernel does.
        meter.read(&stats, false);
        std::thread::sleep(Duration::from_millis(20));
        assert!(meter.read(&stats, false).switched > 0.0);
    }

    /// This process has some memory, and less than there is.
    #[test]
    fn memory_is_read() {
        let bytes = memory().expect("statm");
        assert!(bytes > 64 << 10 && bytes < 64 << 30, "{bytes}");
    }
}

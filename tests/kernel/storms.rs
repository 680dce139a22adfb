//! The budget, under loads that are as expensive to profile as they come.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent, eventually, free_port, http_get, kernel_is_usable, metric,
    programs::{Statistics, cpu_seconds, runs_of},
    recorded, scratch, stderr, stdout,
    stopped::Stopped,
    workload,
};

/// How long each load lasts; `PROFILER_BUDGET_SECONDS` makes it longer.
const SECONDS: u64 = 35;
/// Time between two looks at what profiling costs.
const LOOK: Duration = Duration::from_secs(5);
/// Executables besides the storm.
const HERD: usize = 2000;

/// What a storm under a daemon came to.
struct Outcome {
    /// Share of the machine that profiling took between two looks.
    shares: Vec<f64>,
    /// CPU time and time off the CPU: as exported, in parts of what the storm says itself.
    ran: f64,
    waited: f64,
    /// Samples of it.
    samples: u64,
    /// Whether waits were suspended at any time, and what profiles were marked so then.
    is_suspended: bool,
    marked: usize,
}

/// Many processes, each of an executable of its own: no two have the same build ID.
fn herd(test: &str, seconds: u64) -> Vec<Background> {
    const NOTE: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let folder = scratch(test);
    let original = fs::read(workload("herd")).expect("the workload");
    let id = original.windows(NOTE.len()).position(|bytes| bytes == NOTE).expect("a build ID") + NOTE.len();
    let start = |number: usize| {
        let mut bytes = original.clone();
        bytes[id..id + 8].copy_from_slice(&number.to_ne_bytes());
        let path = folder.join(format!("herd-{number}"));
        fs::write(&path, bytes).expect("an executable");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("an executable");
        Background::start(Command::new(path).arg(seconds.to_string()))
    };
    (0..HERD).map(start).collect()
}

/// Runs a storm of so many switches per second and CPU under a daemon of its own.
fn storm(test: &str, switches: u64, seconds: u64, has_herd: bool, budget: &str) -> Outcome {
    let folder = scratch(test);
    fs::write(folder.join("agent.yaml"), "export: {window: 5s}\n").expect("a configuration file");
    let status = free_port();
    let daemon = Background::start(
        Command::new(agent())
            .args(["run", "--kubernetes", "false", "--event", "both", "--budget-cpu", budget])
            .args(["--status-listen", &format!("127.0.0.1:{status}"), "--output-format", "otlp", "--output-folder"])
            .arg(folder.join("profiles"))
            .arg("--config")
            .arg(folder.join("agent.yaml"))
            .arg("--stop-file")
            .arg(folder.join("stop"))
            .arg("--control-socket")
            .arg(folder.join("agent.sock")),
    );
    eventually("readiness", Duration::from_secs(20), || {
        http_get(status, "/readyz").filter(|page| page.starts_with("HTTP/1.1 200"))
    });
    let pid = daemon.pid();
    // (What it takes to begin is no part of this.)
    thread::sleep(Duration::from_secs(10));
    let herd = if has_herd { herd(&format!("{test}-herd"), seconds + 60) } else { Vec::new() };
    // Two switches make a round trip, of which there are so many in two milliseconds.
    let load = Background::start(
        Command::new(workload("storm")).arg(seconds.to_string()).arg((switches / 2 / 500).to_string()),
    );
    let begun = Instant::now();
    let cpus = thread::available_parallelism().map_or(1, usize::from) as f64;
    let mut last = (cpu_seconds(pid), runs_of(pid), Instant::now());
    println!("{test}, budget {budget}\nsecond  Hz  stacks  followed    agent  programs  of the machine");
    let (mut shares, mut is_suspended) = (Vec::new(), false);
    while begun.elapsed() + LOOK <= Duration::from_secs(seconds) {
        thread::sleep(LOOK);
        let now = (cpu_seconds(pid), runs_of(pid), Instant::now());
        let elapsed = (now.2 - last.2).as_secs_f64();
        let agent = (now.0 - last.0) / elapsed;
        let programs = (now.1.time_ns - last.1.time_ns) as f64 / 1e9 / elapsed;
        let share = (agent + programs) / cpus;
        let gauge = |name: &str| metric(status, &format!("profiler_agent_{name}")).unwrap_or(f64::NAN);
        println!(
            "{:6}  {:2}  {:6}  {:8.3}  {:5.2} %   {:5.2} %  {:.2} %",
            begun.elapsed().as_secs(),
            gauge("sampling_frequency"),
            gauge("wait_stacks_per_second"),
            gauge("waits_followed_ratio"),
            agent * 100.0,
            programs * 100.0,
            share * 100.0
        );
        is_suspended |= gauge("waits_followed_ratio") == 0.0;
        shares.push(share);
        last = now;
    }
    let report = stdout(&load.finish());
    drop(herd);
    daemon.signal(Signal::SIGTERM);
    let text = stderr(&daemon.finish());
    assert!(Stopped::of(&text).balances(), "{text}");

    let field = |name: &str| {
        // (`ran` and `switched`, each at the start of its line.)
        let line = report.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
        line.trim().parse::<f64>().expect("a number")
    };
    let (mut ran, mut waited, mut taken, mut marked) = (0.0, 0.0, 0, 0);
    for file in fs::read_dir(folder.join("profiles")).expect("profiles").flatten() {
        let samples = recorded::samples(&fs::read(file.path()).expect("a profile"));
        marked += usize::from(samples.iter().any(|sample| sample.marks.contains_key("profiler.off_cpu")));
        for sample in samples.iter().filter(|sample| sample.process == "storm") {
            *(if sample.is_wait { &mut waited } else { &mut ran }) += sample.time_ns as f64;
            taken += if sample.is_wait { 0 } else { sample.count };
        }
    }
    let expect_ran = field("ran");
    // Its threads, two for each CPU, either run or wait (the first one waits for all of them).
    let expect_waited = (2.0 * cpus + 1.0) * seconds as f64 * 1e9 - expect_ran;
    println!(
        "{:.0} switches a second; CPU time {:.2} s of {:.2} s, off the CPU {:.2} s of {:.2} s",
        field("switched") / seconds as f64,
        ran / 1e9,
        expect_ran / 1e9,
        waited / 1e9,
        expect_waited / 1e9,
    );
    Outcome { shares, ran: ran / expect_ran, waited: waited / expect_waited, samples: taken, is_suspended, marked }
}

fn mean(shares: &[f64]) -> f64 {
    shares.iter().sum::<f64>() / shares.len() as f64 * 100.0
}

/// After a few seconds the budget holds, and what is exported adds up to what the load says itself. Where there are more
/// switches than the budget has room for, no waits are followed, and profiles say so.
#[test]
fn the_budget_is_kept() {
    if !kernel_is_usable() {
        return;
    }
    let _statistics = Statistics::on();
    let seconds = std::env::var("PROFILER_BUDGET_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let free = storm("storm-free", 100_000, 15, false, "100%");
    println!("without a budget: {:.2} % of the machine", mean(&free.shares));
    assert!(mean(&free.shares) > 1.0, "the load is not expensive enough to tell");
    for (test, switches, has_herd) in [("storm", 100_000, true), ("breeze", 60_000, false)] {
        let kept = storm(test, switches, seconds, has_herd, "1%");
        let (cost, over) = (mean(&kept.shares[1..]), kept.shares[1..].iter().filter(|&&share| share > 0.01).count());
        println!(
            "after five seconds {cost:.2} % of the machine, {over} of {} times above 1 %; CPU time {:.4}, off the CPU {:.4}",
            kept.shares.len() - 1,
            kept.ran,
            kept.waited
        );
        assert!(cost <= 1.0, "the budget of 1 % does not hold: {:?}", kept.shares);
        // (Three standard deviations of so many samples, or of the few long waits of which one of sixteen is followed, come on
        // top; they are gone after ten minutes.)
        let by_chance = 3.0 / (kept.samples as f64).sqrt();
        assert!((kept.ran - 1.0).abs() < 0.03 + by_chance, "{} by {} samples", kept.ran, kept.samples);
        let by_chance = 0.6 / (seconds as f64).sqrt();
        assert!(kept.is_suspended || (kept.waited - 1.0).abs() < 0.03 + by_chance, "{}", kept.waited);
        assert_eq!(kept.is_suspended, kept.marked > 0);
    }
}

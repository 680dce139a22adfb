//! The daemon: delivery to an independent receiver, status, start and footprint, hotplug.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent, ask_within, eventually, free_port, http_get, kernel_is_usable, metric, stderr, stdout,
    stopped::{Stopped, number},
    workload, workspace,
};

/// How long the footprint is watched; `PROFILER_SOAK_SECONDS` makes it longer.
const SOAK: Duration = Duration::from_secs(30);
const MIB: f64 = 1024.0 * 1024.0;

fn daemon(endpoint: u16, status: u16, more: &[&str]) -> Background {
    Background::start(
        Command::new(agent())
            .args(["run", "--budget-cpu", "100%", "--endpoint", &format!("http://127.0.0.1:{endpoint}")])
            .args(["--status-listen", &format!("127.0.0.1:{status}")])
            .args(more),
    )
}

/// A receiver with types of its own finds every request valid, and its samples and waits add up to what was recorded.
#[test]
fn an_independent_receiver_gets_everything() {
    if !kernel_is_usable() {
        return;
    }
    let (otlp, status) = (free_port(), free_port());
    let mut receiver = Background::start(
        Command::new(workspace().join("target/venv/bin/python"))
            .arg(workspace().join("tests/receivers/otlp_receiver.py"))
            .arg(otlp.to_string()),
    );
    receiver.wait_for_line("listening");
    let agent = daemon(otlp, status, &["--window", "3s", "--event", "both"]);
    let load = Background::start(Command::new(workload("burner")).args(["2", "10"]));
    let _ = load.finish();
    let exported = format!("profiler_agent_samples_exported_total{{destination=\"127.0.0.1:{otlp}\"}}");
    let exports = ask_within(Duration::from_secs(15), || metric(status, &exported).filter(|&samples| samples > 1000.0));
    agent.signal(Signal::SIGTERM);
    let agent = agent.finish();
    let text = stderr(&agent);
    println!("{text}");
    assert!(agent.status.success(), "{text}");
    assert!(exports.is_some(), "exports: not within 15 s: {text}");
    receiver.signal(Signal::SIGTERM);
    let report = stdout(&receiver.finish());
    println!("{report}");

    let stopped = Stopped::of(&text);
    assert!(report.contains("\"violations\": []"), "{report}");
    let received = number(&report, "\"samples\": ").expect("a number of samples");
    assert_eq!((stopped.seen, stopped.exported), (received, received), "{text}");
    assert_eq!((stopped.lost, stopped.dropped), (0, 0), "{text}");
    let waited = number(&report, "\"off_cpu_ms\": ").expect("a time") as f64 / 1e3;
    let exported = stopped.waited.expect("a time").as_secs_f64();
    // The sleepers of a machine alone wait for longer than it runs.
    assert!(waited > 10.0 && (waited - exported).abs() < 0.1, "{waited} s received: {text}");
    for expected in ["\"burner\"", "\"burn\"", "\"schedule\"", "\"native\"", "\"kernel\""] {
        assert!(report.contains(expected), "the report does not mention {expected}: {report}");
    }
    assert!(number(&report, "\"build_ids\": ").is_some_and(|count| count > 0), "{report}");
}

/// Where the receiver takes everything and answers nothing, shutdown gives up in time, and what could not be
/// delivered is counted.
#[test]
fn a_silent_receiver_delays_shutdown_but_not_for_ever() {
    if !kernel_is_usable() {
        return;
    }
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = silent.local_addr().expect("its address").port();
    let agent = daemon(port, free_port(), &["--window", "2s"]);
    let load = Background::start(Command::new(workload("burner")).args(["2", "5"]));
    let _ = load.finish();
    let stopped = Instant::now();
    agent.signal(Signal::SIGTERM);
    let output = agent.finish();
    let last = stderr(&output).lines().last().unwrap_or_default().to_owned();
    println!("{last}");
    assert!(output.status.success() && stopped.elapsed() < Duration::from_secs(15), "{:?}", stopped.elapsed());
    let books = Stopped::of(&last);
    assert!(books.seen > 500, "{last}");
    assert_eq!(books.seen, books.exported + books.lost + books.dropped, "{last}");
}

/// The daemon samples within a second of its start, stays small, and its status endpoint tells.
#[test]
fn starts_fast_and_stays_small() {
    if !kernel_is_usable() {
        return;
    }
    let soak = std::env::var("PROFILER_SOAK_SECONDS").ok().and_then(|text| text.parse().ok());
    let soak = soak.map_or(SOAK, Duration::from_secs);
    let status = free_port();
    let started = Instant::now();
    // Nothing listens at the endpoint: the daemon has to live with that too.
    let agent = daemon(free_port(), status, &["--window", "2s"]);
    eventually("readiness", Duration::from_secs(5), || {
        http_get(status, "/readyz").filter(|page| page.starts_with("HTTP/1.1 200"))
    });
    let ready = started.elapsed();
    assert!(http_get(status, "/healthz").is_some_and(|page| page.starts_with("HTTP/1.1 200")));
    assert!(http_get(status, "/nonsense").is_some_and(|page| page.starts_with("HTTP/1.1 404")));

    let load = Background::start(Command::new("bash").args([
        "-c",
        "while :; do python3 -c 'sum(i*i for i in range(300000))'; gcc --version >/dev/null; ls -lR /usr/lib >/dev/null; done",
    ]));
    let mut peak: f64 = 0.0;
    let deadline = Instant::now() + soak;
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_secs(1));
        peak = peak.max(metric(status, "profiler_agent_resident_memory_bytes").expect("the metric"));
    }
    let resident = metric(status, "profiler_agent_resident_memory_bytes").expect("the metric");
    let cpu = metric(status, "profiler_agent_cpu_seconds_total").expect("the metric");
    drop(load);
    agent.signal(Signal::SIGINT);
    let output = agent.finish();
    println!(
        "sampling {} ms after start; {:.1} MiB resident after {} s (peak {:.1}), {:.2} % of one CPU",
        ready.as_millis(),
        resident / MIB,
        soak.as_secs(),
        peak / MIB,
        100.0 * cpu / soak.as_secs_f64(),
    );
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    assert!(ready <= Duration::from_secs(1), "sampling only after {ready:?}");
    assert!(resident <= 50.0 * MIB, "{:.1} MiB resident", resident / MIB);
}

/// A CPU that goes offline and comes back is sampled again.
#[test]
fn follows_cpu_hotplug() {
    if !kernel_is_usable() {
        return;
    }
    const SWITCH: &str = "/sys/devices/system/cpu/cpu1/online";
    if fs::write(SWITCH, "1").is_err() {
        eprintln!("SKIPPED: CPU 1 cannot be taken offline on this machine ({SWITCH})");
        return;
    }
    struct Online;
    impl Drop for Online {
        fn drop(&mut self) {
            // The test has failed already if this does.
            let _ = fs::write(SWITCH, "1");
        }
    }
    let status = free_port();
    let agent = daemon(free_port(), status, &["--window", "1s"]);
    let cpus = |expected: f64| {
        eventually("the number of sampled CPUs", Duration::from_secs(10), || {
            metric(status, "profiler_agent_cpus_sampled").filter(|&cpus| cpus == expected)
        })
    };
    let all = eventually("the daemon", Duration::from_secs(5), || {
        metric(status, "profiler_agent_cpus_sampled").filter(|&cpus| cpus > 1.0)
    });
    let online = Online;
    if let Err(error) = fs::write(SWITCH, "0") {
        eprintln!("SKIPPED: CPU 1 cannot be taken offline on this machine: {error}");
        return;
    }
    cpus(all - 1.0);
    drop(online);
    cpus(all);
    // Both CPUs are kept busy: some hypervisors' idle CPUs sleep through their timers.
    let load = Background::start(Command::new(workload("burner")).args(["2", "8"]));
    std::thread::sleep(Duration::from_secs(2));
    let seen = || metric(status, "profiler_agent_samples_seen_total").expect("the metric");
    let (before, started) = (seen(), Instant::now());
    std::thread::sleep(Duration::from_secs(4));
    let rate = (seen() - before) / started.elapsed().as_secs_f64();
    drop(load);
    println!("{rate:.0} samples a second of two busy threads after CPU 1 came back");
    assert!(rate > 0.7 * 99.0 * 2.0, "{rate}");
    agent.signal(Signal::SIGTERM);
    assert!(agent.finish().status.success());
}

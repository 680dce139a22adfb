//! Delivery: what happens to profiles when receivers stay away, misbehave, or the agent is killed.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use profiler_tests::{
    Background, agent, eventually, free_port, http_get, kernel_is_usable, metric,
    receiver::{Answer, Options, Receiver, Speaks},
    run, scratch, stderr, stdout,
    stopped::Stopped,
    workload,
};
use prost::Message as _;

/// How long the receiver stays away; `PROFILER_OUTAGE_SECONDS` makes it longer.
const OUTAGE: Duration = Duration::from_secs(20);
/// How many times the agent is killed; `PROFILER_KILLS` makes it more.
const KILLS: u32 = 8;
const MIB: f64 = 1024.0 * 1024.0;

/// A daemon with a configuration file of its own.
struct Daemon {
    process: Background,
    status: u16,
}

impl Daemon {
    fn start(folder: &Path, export: &str) -> Self {
        let config = folder.join("agent.yaml");
        fs::write(&config, format!("export:\n{export}")).expect("a configuration");
        let status = free_port();
        let process = Background::start(
            Command::new(agent())
                .args(["run", "--budget-cpu", "100%", "--status-listen", &format!("127.0.0.1:{status}"), "--config"])
                .arg(config),
        );
        Self { process, status }
    }

    fn metric(&self, name: &str) -> Option<f64> {
        metric(self.status, &format!("profiler_agent_{name}"))
    }

    /// Ends it in order; what it said.
    fn stop(self) -> String {
        self.process.signal(Signal::SIGTERM);
        let text = stderr(&self.process.finish());
        println!("{text}");
        text
    }
}

fn endless_load() -> Background {
    Background::start(Command::new(workload("burner")).args(["2", "3600"]))
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// A profile of CPU time that was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Accepted {
    id: Vec<u8>,
    /// When its window was opened, nanoseconds since 1970.
    start: u64,
    samples: i64,
}

/// What a receiver accepted, in that order.
fn accepted(receiver: &Receiver) -> Vec<Accepted> {
    let mut accepted = Vec::new();
    for received in receiver.received().into_iter().filter(|received| received.is_accepted) {
        let request = ExportProfilesServiceRequest::decode(received.body).expect("a request");
        let scopes = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
        let profiles = scopes.flat_map(|scope| &scope.profiles).filter(|profile| profile.period != 0);
        accepted.extend(profiles.map(|profile| Accepted {
            id: profile.profile_id.clone(),
            start: profile.time_unix_nano,
            samples: profile.samples.iter().flat_map(|sample| &sample.values).sum(),
        }));
    }
    accepted
}

fn listen(port: u16) -> Receiver {
    Receiver::start_at(([127, 0, 0, 1], port).into(), Options::grpc())
}

fn spool(folder: &Path, port: u16) -> String {
    let spool = folder.join("spool");
    format!(
        "  window: 1s\n  destinations:\n    - name: central\n      endpoint: http://127.0.0.1:{port}\n  \
         spool:\n    folder: {}\n",
        spool.display()
    )
}

/// Samples of profiles, each counted once. A profile that came twice has to be the same.
fn distinct_samples(accepted: &[Accepted]) -> (u64, usize) {
    let mut by_id: HashMap<&[u8], &Accepted> = HashMap::new();
    let mut duplicates = 0;
    for profile in accepted {
        assert_eq!(profile.id.len(), 16, "a profile without an ID");
        if let Some(first) = by_id.insert(&profile.id, profile) {
            assert_eq!(first, profile, "an ID that stands for two profiles");
            duplicates += 1;
        }
    }
    (by_id.values().map(|profile| profile.samples as u64).sum(), duplicates)
}

/// A receiver that is away for a while gets everything, in order, once it is back; meanwhile the agent does not grow.
#[test]
fn an_outage_loses_nothing() {
    if !kernel_is_usable() {
        return;
    }
    let outage = from_environment("PROFILER_OUTAGE_SECONDS").map_or(OUTAGE, Duration::from_secs);
    let (folder, port) = (scratch("delivery-outage"), free_port());
    let load = endless_load();
    let daemon = Daemon::start(&folder, &spool(&folder, port));
    // What is named for the first time takes memory that has nothing to do with the outage.
    let begun = Instant::now();
    let mut resident = Vec::new();
    while begun.elapsed() < outage {
        sleep(Duration::from_secs(1));
        resident.extend(daemon.metric("resident_memory_bytes"));
    }
    let waiting = daemon.metric("export_queue_samples{destination=\"central\",place=\"spool\"}").expect("the metric");
    let receiver = listen(port);
    eventually("delivery after the outage", Duration::from_secs(60), || {
        daemon
            .metric("samples_exported_total{destination=\"central\"}")
            .filter(|&samples| samples >= waiting && samples > 0.0)
    });
    let books = Stopped::of(&daemon.stop());
    drop(load);
    let accepted = accepted(&receiver);
    let (samples, duplicates) = distinct_samples(&accepted);
    let [early, late] = [resident.len() / 4, resident.len() - 1].map(|index| resident[index] / MIB);
    println!(
        "away for {} s: {waiting} samples in the spool; {:?}; received {samples} samples in {} profiles; \
         {early:.1} MiB resident early in the outage, {late:.1} MiB at its end",
        outage.as_secs(),
        books,
        accepted.len(),
    );
    assert!(books.balances() && (books.dropped, books.spool) == (0, 0), "{books:?}");
    assert_eq!((samples, duplicates), (books.exported, 0));
    assert!(accepted.is_sorted_by_key(|profile| profile.start), "out of order");
    assert!(waiting > 99.0 * (outage.as_secs_f64() - 8.0), "{waiting} samples waited");
    // (In the first minute the names of what runs are learned.)
    assert!(late < early + 12.0, "{early:.1} to {late:.1} MiB");
    let left: Vec<PathBuf> = files_in(&folder.join("spool"));
    assert!(left.iter().all(|file| fs::metadata(file).is_ok_and(|file| file.len() == 0)), "{left:?}");
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            files.extend(files_in(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files
}

/// An agent that is killed at any moment loses nothing of what reached its spool, and what arrives is whole. What arrives
/// twice can be told by its profile ID.
#[test]
fn kills_lose_nothing_that_was_spooled() {
    if !kernel_is_usable() {
        return;
    }
    let kills = from_environment("PROFILER_KILLS").map_or(KILLS, |kills| kills as u32);
    let (folder, port) = (scratch("delivery-kills"), free_port());
    let load = endless_load();
    let mut receiver = Some(listen(port));
    let (mut all, mut spooled) = (Vec::new(), 0.0);
    for kill in 0..kills {
        // At random within two windows, once it has begun.
        let moment = 600
            + u64::from(SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").subsec_nanos()) / 1_000 % 2000;
        let daemon = Daemon::start(&folder, &spool(&folder, port));
        let killed = Instant::now() + Duration::from_millis(moment);
        let mut last = 0.0;
        while Instant::now() < killed {
            sleep(Duration::from_millis(20));
            last = daemon.metric("export_samples_spooled_total{destination=\"central\"}").unwrap_or(last);
        }
        daemon.process.signal(Signal::SIGKILL);
        let _ = daemon.process.finish();
        spooled += last;
        // The receiver is away for one of every three.
        if kill % 3 == 0 {
            all.extend(receiver.take().map(|receiver| accepted(&receiver)).unwrap_or_default());
        } else if receiver.is_none() {
            receiver = Some(listen(port));
        }
    }
    let receiver = receiver.unwrap_or_else(|| listen(port));
    let daemon = Daemon::start(&folder, &spool(&folder, port));
    sleep(Duration::from_secs(2));
    let books = Stopped::of(&daemon.stop());
    drop(load);
    all.extend(accepted(&receiver));
    let (samples, duplicates) = distinct_samples(&all);
    println!(
        "{kills} kills: at least {spooled} samples reached the spool; received {samples} in {} profiles, {duplicates} of them \
         twice; the last run: {books:?}",
        all.len() - duplicates
    );
    assert!(books.balances() && (books.dropped, books.spool) == (0, 0), "{books:?}");
    assert!(samples as f64 >= spooled + (books.seen - books.lost) as f64, "{samples} of {spooled}");
    assert!(spooled > 0.0);
}

/// Without a spool, what waits is bounded by memory, the oldest make room, and every sample is accounted for.
#[test]
fn memory_alone_is_bounded_and_counted() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("delivery-memory");
    let load = endless_load();
    let daemon = Daemon::start(
        &folder,
        &format!("  window: 1s\n  endpoint: http://127.0.0.1:{}\n  queue_mib: 8\n", free_port()),
    );
    eventually("a failed attempt", Duration::from_secs(15), || {
        let page = http_get(daemon.status, "/metrics")?;
        let failed = |line: &str| line.contains("export_failures_total") && !line.ends_with(" 0");
        page.lines().any(failed).then_some(())
    });
    sleep(Duration::from_secs(3));
    let books = Stopped::of(&daemon.stop());
    drop(load);
    assert!(books.balances() && books.exported == 0 && books.dropped > 0, "{books:?}");
}

/// One daemon, many receivers, each bad in its own way for a while: those whose failure passes get everything, what others
/// refuse is counted under why, and none keeps another.
#[test]
fn every_failure_has_its_consequence() {
    if !kernel_is_usable() {
        return;
    }
    let http = |status, headers: &[(&'static str, &str)]| Answer::Http {
        status,
        headers: headers.iter().map(|&(name, value)| (name, value.to_owned())).collect(),
        body: Vec::new(),
    };
    let page = Answer::Http {
        status: 200,
        headers: vec![("content-type", "text/html".to_owned())],
        body: b"<html>welcome</html>".to_vec(),
    };
    const RESOURCE_EXHAUSTED: i32 = 8;
    const UNAVAILABLE: i32 = 14;
    let grpc = |code| Answer::Grpc { code, message: "not now".to_owned(), details: Vec::new() };
    // Name, protocol, what the receiver does, the reason that is counted, and whether what it did not take is sent again.
    let cases = [
        ("fine", Options::grpc(), Answer::Accept, None, true),
        ("stalls", Options::grpc(), Answer::Stall, Some("timeout"), true),
        ("stalls-http", Options::http(), Answer::Stall, Some("timeout"), true),
        ("resets", Options::http(), Answer::ResetAfter(10), Some("unreachable"), true),
        ("busy", Options::http(), http(503, &[("retry-after", "1")]), Some("unavailable"), true),
        ("throttles", Options::http(), http(429, &[("retry-after", "1")]), Some("throttled"), true),
        ("unavailable", Options::grpc(), grpc(UNAVAILABLE), Some("unavailable"), true),
        ("exhausted", Options::grpc(), grpc(RESOURCE_EXHAUSTED), Some("exhausted"), false),
    ];
    let more = [
        ("small", Options::http(), http(413, &[]), Some("too_large"), false),
        ("expired", Options::http(), http(401, &[]), Some("unauthorized"), false),
        ("garbage", Options::http(), page, Some("garbage"), false),
    ];
    for (round, cases) in [&cases[..], &more[..]].into_iter().enumerate() {
        let folder = scratch(&format!("delivery-failures-{round}"));
        let receivers: Vec<Receiver> = cases.iter().map(|(_, options, ..)| Receiver::start(options.clone())).collect();
        let mut config = "  window: 1s\n  destinations:\n".to_owned();
        for ((name, options, answer, ..), receiver) in cases.iter().zip(&receivers) {
            receiver.answer(answer.clone());
            let protocol = if options.speaks == Speaks::Grpc { "grpc" } else { "http/protobuf" };
            config +=
                &format!("    - {{name: {name}, endpoint: '{}', protocol: {protocol}, timeout: 1s}}\n", receiver.url());
        }
        let load = endless_load();
        let daemon = Daemon::start(&folder, &config);
        for (name, _, _, reason, _) in cases {
            let metric = match reason {
                Some(reason) => format!("export_failures_total{{destination=\"{name}\",reason=\"{reason}\"}}"),
                None => format!("export_requests_total{{destination=\"{name}\"}}"),
            };
            eventually(&metric, Duration::from_secs(60), || daemon.metric(&metric).filter(|&count| count >= 2.0));
        }
        receivers.iter().for_each(|receiver| receiver.answer(Answer::Accept));
        for (name, ..) in cases {
            let metric = format!("export_requests_total{{destination=\"{name}\"}}");
            eventually(&metric, Duration::from_secs(60), || daemon.metric(&metric).filter(|&count| count >= 1.0));
        }
        let text = daemon.stop();
        drop(load);
        for ((name, _, _, _, is_sent_again), receiver) in cases.iter().zip(&receivers) {
            let books = Stopped::of_destination(&text, name);
            let (samples, duplicates) = distinct_samples(&accepted(receiver));
            println!("{name}: {books:?}, {samples} received, {duplicates} profiles twice");
            assert!(books.balances() && books.spool == 0, "{name}: {books:?}");
            assert_eq!(samples, books.exported, "{name}");
            assert_eq!(books.dropped == 0, *is_sent_again, "{name}: {books:?}");
        }
    }
}

/// Files are written for those who have no backend: `go tool pprof` reads each, and they hold every sample.
#[test]
fn files_hold_every_sample() {
    if !kernel_is_usable() {
        return;
    }
    for format in ["pprof", "otlp"] {
        let folder = scratch(&format!("delivery-files-{format}"));
        let profiles = folder.join("profiles");
        let load = endless_load();
        let daemon = Daemon::start(
            &folder,
            &format!("  window: 1s\n  files:\n    folder: {}\n    format: {format}\n", profiles.display()),
        );
        sleep(Duration::from_secs(4));
        let books = Stopped::of(&daemon.stop());
        drop(load);
        let files = files_in(&profiles);
        println!("{format}: {files:?}");
        assert!(books.balances() && books.dropped == 0 && files.len() >= 3, "{books:?}");
        if format == "pprof" {
            let total: u64 = files.iter().map(|file| samples_of_pprof(file)).sum();
            assert_eq!(total, books.exported);
        }
    }
}

fn samples_of_pprof(file: &Path) -> u64 {
    let output = run(Command::new("go").args(["tool", "pprof", "-top", "-sample_index=samples"]).arg(file));
    assert!(output.status.success(), "{}: {}", file.display(), stderr(&output));
    let text = stdout(&output);
    let total =
        text.split(" of ").nth(1).and_then(|rest| rest.split(' ').next()?.trim_end_matches("samples").parse().ok());
    total.unwrap_or_else(|| panic!("no total: {text}"))
}

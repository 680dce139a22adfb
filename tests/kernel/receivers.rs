//! Do receivers of other people's making get everything, and read it as it was meant?

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent, books, eventually, free_port, http_get, kernel_is_usable, record,
    recorded::{self, Sample},
    run, scratch, stderr, stdout,
    stopped::{Stopped, number},
    workload, workspace,
};

/// How long the daemon runs against a Collector; `PROFILER_SOAK_SECONDS` makes it longer.
const SOAK_SECONDS: u64 = 20;
/// Longer than anything here takes.
const GUARD: Duration = Duration::from_secs(180);
/// Keeps the machine busy with programs that live long and shortly.
const BUSY: &str = "while :; do python3 -c 'sum(i*i for i in range(300000))'; gcc --version >/dev/null; ls -lR /usr/lib >/dev/null; done";

/// The Collector that `cargo xtask setup` builds, and the folder where it keeps what it receives.
struct Collector {
    process: Background,
    requests: PathBuf,
    /// Where it takes gRPC.
    grpc: u16,
    /// Where it takes HTTP, at `/v1development/profiles`.
    http: u16,
}

/// What a Collector says it received.
#[derive(Debug)]
struct Received {
    samples: u64,
    waited: Duration,
    requests: Vec<PathBuf>,
}

impl Collector {
    /// Starts it; `None` where it could not be built.
    fn start(test: &str) -> Option<Self> {
        let program = workspace().join("target/receivers/collector");
        if !program.is_file() {
            eprintln!("SKIPPED: there is no Collector (`cargo xtask setup` builds it where Go is new enough)");
            return None;
        }
        let (requests, grpc, http) = (scratch(test), free_port(), free_port());
        let process = Background::start(
            Command::new(program)
                .arg("--config")
                .arg(workspace().join("tests/receivers/collector/config.yaml"))
                .args(["--feature-gates", "service.profilesSupport"])
                .env("COLLECTOR_FOLDER", &requests)
                .env("COLLECTOR_GRPC_PORT", grpc.to_string())
                .env("COLLECTOR_HTTP_PORT", http.to_string()),
        );
        let collector = Self { process, requests, grpc, http };
        eventually("the Collector", GUARD, || {
            TcpStream::connect(("127.0.0.1", grpc)).and(TcpStream::connect(("127.0.0.1", http))).ok()
        });
        Some(collector)
    }

    /// Ends it and asks what it received.
    fn finish(self) -> Received {
        self.process.signal(Signal::SIGTERM);
        let output = self.process.finish();
        assert!(output.status.success(), "{}", stderr(&output));
        let report = stdout(&output);
        println!("the Collector: {}", report.trim());
        let entries = fs::read_dir(&self.requests).expect("its folder").flatten();
        let mut requests: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        requests.sort();
        assert_eq!(number(&report, "\"requests\":"), Some(requests.len() as u64), "{report}");
        Received {
            samples: number(&report, "\"samples/count\":").unwrap_or(0),
            waited: Duration::from_nanos(number(&report, "\"off_cpu/nanoseconds\":").unwrap_or(0)),
            requests,
        }
    }
}

/// Profiles the machine and two busy threads for so many seconds, while a daemon exports to these ports by these protocols.
/// The result is what it said of each.
fn export_to(test: &str, receivers: &[(u16, &str)], seconds: u64) -> Vec<Stopped> {
    let config = scratch(&format!("{test}-agent")).join("agent.yaml");
    let mut text = "export:\n  window: 5s\n  destinations:\n".to_owned();
    for (port, protocol) in receivers {
        text += &format!("    - {{name: to-{port}, endpoint: 'http://127.0.0.1:{port}', protocol: {protocol}}}\n");
    }
    fs::write(&config, text).expect("a configuration");
    let daemon = Background::start(
        Command::new(agent())
            .args([
                "run",
                "--budget-cpu",
                "100%",
                "--event",
                "both",
                "--status-listen",
                &format!("127.0.0.1:{}", free_port()),
                "--config",
            ])
            .arg(config),
    );
    let busy = Background::start(Command::new("bash").args(["-c", BUSY]));
    let burner = Background::start(Command::new(workload("burner")).args(["2", &seconds.to_string()]));
    let _ = burner.finish();
    drop(busy);
    daemon.signal(Signal::SIGTERM);
    let output = daemon.finish();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    println!("{text}");
    match receivers {
        [_] => vec![Stopped::of(&text)],
        several => several.iter().map(|(port, _)| Stopped::of_destination(&text, &format!("to-{port}"))).collect(),
    }
}

/// Collectors get every sample that the kernel counted and did not count as lost, each once, by either protocol; the samples
/// can be read from what they make of them, and are valid by the validator of the profiling working group.
#[test]
fn a_collector_gets_every_sample() {
    if !kernel_is_usable() {
        return;
    }
    let (Some(by_grpc), Some(by_http)) = (Collector::start("collector-grpc"), Collector::start("collector-http"))
    else {
        return;
    };
    let seconds = std::env::var("PROFILER_SOAK_SECONDS").ok().and_then(|text| text.parse().ok());
    let seconds: u64 = seconds.unwrap_or(SOAK_SECONDS);
    let receivers = [(by_grpc.grpc, "grpc"), (by_http.http, "http/protobuf")];
    let stopped = export_to("collectors", &receivers, seconds);
    for (stopped, collector) in stopped.into_iter().zip([by_grpc, by_http]) {
        let received = collector.finish();
        assert!(stopped.seen > 20 * seconds, "{stopped:?}");
        assert_eq!(received.samples, stopped.seen - stopped.lost - stopped.dropped, "{stopped:?}");
        assert_eq!(received.samples, stopped.exported, "{stopped:?}");
        // Told to the millisecond.
        assert!(
            received.waited.abs_diff(stopped.waited.expect("time off the CPU")) < Duration::from_millis(1),
            "{received:?}: {stopped:?}"
        );
        let burnt: u64 = received.requests.iter().map(|request| ending_in(&recorded(request), "burn")).sum();
        println!("{} samples, {burnt} of them in burn(), in {} requests", received.samples, received.requests.len());
        assert!(burnt > 0, "nothing of the burner arrived");
        validate(&received.requests, &["-check-dupes"]);
    }
}

/// A recording in OTLP's format is what an HTTP receiver expects.
#[test]
fn a_collector_takes_recordings_by_http() {
    if !kernel_is_usable() {
        return;
    }
    let Some(collector) = Collector::start("collector-recording") else { return };
    let (recording, output) = recording_of_burner("recording_for_collector", "both");
    let answer = post(collector.http, &fs::read(&recording).expect("the recording"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let received = collector.finish();
    assert_eq!(received.samples, books(&output).exported);
    assert_eq!(received.requests.len(), 1);
    // (What a Collector writes has entries that nothing refers to: it keeps resources in other tables.)
    validate(&[recording], &["-check-orphans", "-check-dupes"]);
}

/// Pyroscope stores both kinds of profiles, and answers with our counts.
#[test]
fn pyroscope_answers_with_our_counts() {
    if !kernel_is_usable() {
        return;
    }
    let Some(pyroscope) = Pyroscope::start() else { return };
    let (recording, output) = recording_of_burner("recording_for_pyroscope", "on-cpu");
    let answer = post(pyroscope.http, &fs::read(&recording).expect("the recording"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    const PERIOD: u64 = 1_000_000_000 / 99;
    let burner = |total: &BTreeMap<String, u64>| total.get("burn").copied().unwrap_or(0) / PERIOD;
    let ours = passing_through(&recorded(&recording), "burn");
    let only_burner = "process_cpu:cpu:nanoseconds:cpu:nanoseconds{service_name=\"burner\"}";
    let theirs = eventually("the burner in Pyroscope", GUARD, || {
        Some(burner(&pyroscope.functions(only_burner))).filter(|&n| n > 0)
    });
    println!("burn(): {theirs} samples by Pyroscope, {ours} by us; {}", stderr(&output).trim());
    assert!(theirs.abs_diff(ours) * 50 <= ours, "{theirs} is not within 2 % of {ours}");

    let recorded = books(&output).exported;
    let stopped = export_to("pyroscope", &[(pyroscope.http, "grpc")], SOAK_SECONDS).remove(0);
    let waits = "off_cpu:off_cpu:nanoseconds::{}";
    let all = "process_cpu:cpu:nanoseconds:cpu:nanoseconds{}";
    let of = |query: &str| pyroscope.functions(query).get("total").copied().unwrap_or(0);
    let sent = stopped.exported + recorded;
    // What was accepted can be asked for a moment later.
    let theirs = eventually("the daemon's samples in Pyroscope", GUARD, || {
        Some(of(all) / PERIOD).filter(|&samples| samples.abs_diff(sent) * 50 <= sent)
    });
    let waited = Duration::from_nanos(of(waits));
    let said = stopped.waited.expect("time off the CPU");
    println!("{theirs} of {sent} samples, {waited:?} off the CPU of {said:?} by the daemon");
    assert_eq!(stopped.seen, stopped.exported + stopped.lost + stopped.dropped, "{stopped:?}");
    assert!(waited.as_secs_f64() > 0.98 * said.as_secs_f64(), "{waited:?}: {stopped:?}");
}

/// Go's pprof reads recordings of every kind, and finds as much in them as we say is there.
#[test]
fn pprof_reads_every_kind_of_recording() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("pprof");
    for events in ["on-cpu", "off-cpu", "both"] {
        let file = folder.join(events).with_extension("pb.gz");
        let burner = workload("burner");
        let output = run(record(&["--event", events, "--output"]).arg(&file).arg("--").arg(burner).args(["2", "3"]));
        let said = stderr(&output);
        assert!(output.status.success(), "{said}");
        println!("{}", said.lines().last().unwrap_or_default());
        let raw = pprof(&["-raw"], &file);
        let totals = raw_totals(&raw);
        println!("go tool pprof: {totals:?}");
        if events != "off-cpu" {
            assert_eq!(totals["cpu/nanoseconds"] % (1_000_000_000 / 99), 0, "not a whole number of periods");
            assert_eq!(totals["cpu/nanoseconds"] / (1_000_000_000 / 99), books(&output).exported);
        }
        if events != "on-cpu" {
            let exported = said.split(" s exported").next().and_then(|text| text.rsplit(' ').next()?.parse().ok());
            let exported = Duration::from_secs_f64(exported.unwrap_or_else(|| panic!("no time in {said}")));
            let read = Duration::from_nanos(totals["offcpu/nanoseconds"]);
            assert!(read.abs_diff(exported) < Duration::from_millis(1), "{read:?} read, {exported:?} exported");
        }
        let (index, function) = if events == "off-cpu" { ("offcpu", "schedule") } else { ("cpu", "burn") };
        let top = pprof(&["-top", "-sample_index", index], &file);
        assert!(top.contains(&format!("Type: {index}")), "{top}");
        assert!(top.lines().any(|line| line.trim_end().ends_with(function)), "{function} is not in {top}");
    }
}

/// What `go tool pprof` prints about a file.
fn pprof(arguments: &[&str], file: &Path) -> String {
    let output = run(Command::new("go").args(["tool", "pprof"]).args(arguments).arg(file));
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

/// Adds up every value of `pprof -raw`: a line of types, then lines of values, a colon and locations.
fn raw_totals(raw: &str) -> BTreeMap<String, u64> {
    let mut lines = raw.lines().skip_while(|line| *line != "Samples:").skip(1);
    let types = lines.next().expect("the types of the samples").split_whitespace();
    let types: Vec<&str> = types.map(|name| name.trim_end_matches("[dflt]")).collect();
    let mut totals = BTreeMap::new();
    for line in lines.take_while(|line| *line != "Locations") {
        let Some((values, _)) = line.split_once(':') else { continue };
        let values: Option<Vec<u64>> = values.split_whitespace().map(|value| value.parse().ok()).collect();
        // Lines between those of samples tell their labels.
        for (name, value) in types.iter().zip(values.filter(|values| values.len() == types.len()).unwrap_or_default()) {
            *totals.entry((*name).to_owned()).or_default() += value;
        }
    }
    totals
}

/// Records two busy threads in OTLP's format.
fn recording_of_burner(test: &str, events: &str) -> (PathBuf, std::process::Output) {
    let file = scratch(test).join("burner.otlp");
    let burner = workload("burner");
    let output = run(record(&["--event", events, "--output"]).arg(&file).arg("--").arg(burner).args(["2", "5"]));
    assert!(output.status.success(), "{}", stderr(&output));
    (file, output)
}

/// The samples of a request that was kept as a file.
fn recorded(request: &Path) -> Vec<Sample> {
    recorded::samples(&fs::read(request).expect("a request"))
}

/// How many samples were taken in this very function. (What waits ends in the scheduler.)
fn ending_in(samples: &[Sample], function: &str) -> u64 {
    let is_leaf = |sample: &&Sample| sample.frames.first().is_some_and(|leaf| leaf.name.as_deref() == Some(function));
    samples.iter().filter(is_leaf).map(|sample| sample.count).sum()
}

/// How many samples of a recording of CPU time were taken in a function or in what it called.
fn passing_through(samples: &[Sample], function: &str) -> u64 {
    let is_there = |sample: &&Sample| sample.frames.iter().any(|frame| frame.name.as_deref() == Some(function));
    samples.iter().filter(is_there).map(|sample| sample.count).sum()
}

/// Has the working group's validator look at requests, where it is installed.
fn validate(requests: &[PathBuf], more: &[&str]) {
    if !is_installed("profcheck") {
        eprintln!("SKIPPED: there is no `profcheck` on this machine: requests were not validated");
        return;
    }
    for request in requests {
        let output = run(Command::new("profcheck").args(more).arg(request));
        assert!(output.status.success(), "{}", stdout(&output));
    }
    println!("profcheck: {} requests are valid", requests.len());
}

/// Whether PATH has a program of this name.
fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// Posts an export request; the answer's first line is the status.
fn post(port: u16, body: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a receiver");
    write!(
        stream,
        "POST /v1development/profiles HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/x-protobuf\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .and_then(|()| stream.write_all(body))
    .expect("a receiver that reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

/// A Pyroscope in one process, all of whose ports are on the loopback interface.
struct Pyroscope {
    _process: Background,
    /// Where it takes and answers everything, OTLP over gRPC too.
    http: u16,
}

impl Pyroscope {
    /// Starts it; `None` where none is installed.
    fn start() -> Option<Self> {
        if !is_installed("pyroscope") {
            eprintln!("SKIPPED: there is no `pyroscope` on this machine: nothing was stored in it and queried");
            return None;
        }
        let (http, grpc, raft, gossip) = (free_port(), free_port(), free_port(), free_port());
        let address = |port: u16| format!("127.0.0.1:{port}");
        let mut program = Command::new("pyroscope");
        for (option, value) in [
            ("server.http-listen-address", "127.0.0.1".to_owned()),
            ("server.http-listen-port", http.to_string()),
            ("server.grpc-listen-address", "127.0.0.1".to_owned()),
            ("server.grpc-listen-port", grpc.to_string()),
            ("metastore.address", address(grpc)),
            ("query-backend.address", address(grpc)),
            ("metastore.raft.bind-address", address(raft)),
            ("metastore.raft.advertise-address", address(raft)),
            ("metastore.raft.server-id", address(raft)),
            ("memberlist.bind-addr", "127.0.0.1".to_owned()),
            ("memberlist.bind-port", gossip.to_string()),
            ("memberlist.advertise-addr", "127.0.0.1".to_owned()),
            ("memberlist.advertise-port", gossip.to_string()),
            ("distributor.ring.instance-addr", "127.0.0.1".to_owned()),
            ("query-frontend.instance-addr", "127.0.0.1".to_owned()),
            ("query-scheduler.ring.instance-addr", "127.0.0.1".to_owned()),
            ("segment-writer.lifecycler.addr", "127.0.0.1".to_owned()),
            ("overrides-exporter.ring.instance-addr", "127.0.0.1".to_owned()),
            ("architecture.storage", "v2".to_owned()),
            // It would profile itself, and tell its makers that it is used.
            ("self-profiling.disable-push", "true".to_owned()),
            ("usage-stats.enabled", "false".to_owned()),
            ("log.level", "error".to_owned()),
        ] {
            program.arg(format!("-{option}={value}"));
        }
        // It keeps its data in the current folder.
        let process = Background::start(program.current_dir(scratch("pyroscope")));
        let is_ready = || http_get(http, "/ready").filter(|page| page.starts_with("HTTP/1.1 200"));
        eventually("Pyroscope", GUARD, is_ready);
        Some(Self { _process: process, http })
    }

    /// Each function of the flame graph that answers a query, with the nanoseconds spent in it or what it called.
    fn functions(&self, query: &str) -> BTreeMap<String, u64> {
        let script = workspace().join("tests/receivers/pyroscope_functions.py");
        let output = run(Command::new("python3").arg(script).arg(self.http.to_string()).arg(query));
        assert!(output.status.success(), "{}", stderr(&output));
        let line = |line: &str| {
            let (value, name) = line.split_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        stdout(&output).lines().filter_map(line).collect()
    }
}

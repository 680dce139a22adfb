//! Captures: more detail for a short time, because a rule has fired or somebody has asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, Output},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent,
    container::{Cgroups, Runc},
    eventually, free_port, http_get, kernel_is_usable, metric,
    programs::{Statistics, runs_of},
    recorded::{Sample, samples},
    run, scratch, stderr, stdout,
    stopped::Stopped,
    workload,
};

/// A cgroup below the root that nothing else uses.
const ROOT: &str = "profiler-captures";

/// A daemon that writes profiles to a folder of the test's.
struct Daemon {
    process: Background,
    folder: PathBuf,
    status: u16,
}

impl Daemon {
    fn start(test: &str, config: &str) -> Self {
        let (folder, status) = (scratch(test), free_port());
        let place = folder.display();
        let config = format!(
            "export: {{window: 2s, destinations: [], files: {{folder: {place}/profiles, format: otlp}}}}\n\
             status: {{listen: '127.0.0.1:{status}'}}\n\
             control: {{socket: {place}/agent.sock, stop_file: {place}/stop}}\n\
             kubernetes: {{enabled: false}}\n{config}"
        );
        fs::write(folder.join("agent.yaml"), config).expect("a configuration file");
        let process = Background::start(Command::new(agent()).args(["run", "--config"]).arg(folder.join("agent.yaml")));
        let daemon = Self { process, folder, status };
        eventually("readiness", Duration::from_secs(30), || {
            http_get(status, "/readyz").filter(|page| page.starts_with("HTTP/1.1 200"))
        });
        daemon
    }

    fn metric(&self, name: &str) -> f64 {
        metric(self.status, &format!("profiler_agent_{name}")).unwrap_or_else(|| panic!("no metric {name}"))
    }

    fn wait_for(&self, name: &str, least: f64) {
        eventually(name, Duration::from_secs(120), || (self.metric(name) >= least).then_some(()));
    }

    /// `profiler-agent trigger`.
    fn trigger(&self, arguments: &[&str]) -> Output {
        run(self.command("trigger").args(arguments))
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(agent());
        command.arg(name).arg("--control-socket").arg(self.folder.join("agent.sock"));
        command
    }

    /// Asks over the control socket: the status, and what comes with it.
    fn ask(&self, request: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(self.folder.join("agent.sock")).expect("the control socket");
        let length = body.len();
        write!(
            stream,
            "{request} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status"), body.to_owned())
    }

    /// Ends it: its log, whose books balance, and the samples of each profile that is marked as a capture's.
    fn end(self) -> (String, Vec<Vec<Sample>>) {
        self.process.signal(Signal::SIGTERM);
        let output = self.process.finish();
        let text = stderr(&output);
        println!("{}", text.lines().filter(|line| !line.contains(" scope: ")).collect::<Vec<_>>().join("\n"));
        assert!(output.status.success(), "{text}");
        let books = Stopped::of(&text);
        assert!(books.balances() && books.seen > 0 && books.dropped == 0, "{text}");
        let files = fs::read_dir(self.folder.join("profiles")).expect("a folder").flatten();
        let profiles = files.map(|file| samples(&fs::read(file.path()).expect("a profile")));
        let is_capture = |profile: &Vec<Sample>| profile.iter().any(|sample| rule_of(sample).is_some());
        (text, profiles.filter(is_capture).collect())
    }
}

fn rule_of(sample: &Sample) -> Option<&str> {
    sample.marks.get("profiler.capture.rule").map(String::as_str)
}

fn mark<'a>(profile: &'a [Sample], name: &str) -> Option<&'a str> {
    profile.first()?.marks.get(name).map(String::as_str)
}

/// CPU time of a profile's samples, seconds.
fn cpu_seconds(profile: &[Sample]) -> f64 {
    profile.iter().filter(|sample| !sample.is_wait).map(|sample| sample.time_ns).sum::<u64>() as f64 / 1e9
}

/// A container whose memory grows and one whose quota is used up are captured, once each, and nobody else is: neither a
/// container beside them nor what runs on the host.
#[test]
fn rules_fire_for_real_containers() {
    if !kernel_is_usable() {
        return;
    }
    let _cgroups = Cgroups(&[ROOT]);
    let (growing, burning) =
        (Runc::new("captures-growing", "grower", &[]), Runc::new("captures-burning", "burner", &[]));
    let [leak, throttled, steady] = [1, 2, 3].map(Runc::id);
    let path = |id: &str| format!("/{ROOT}/{id}");
    let quota = r#"{"cpu": {"quota": 20000, "period": 100000}}"#;
    let daemon = Daemon::start(
        "captures-rules",
        "sampling: {frequency: 49}\nbudget: {cpu: 100%}\n\
         capture:\n  interval: 1s\n  max_running: 2\n  rules:\n\
         \x20   - {name: leak, memory_growth: 120, for: 3s, capture: {duration: 5s, frequency: 499}}\n\
         \x20   - {name: throttled, throttled: 0.5, for: 3s, capture: {duration: 5s, event: both}}\n\
         \x20   - {name: never, cpu: 64, for: 1s}\n\
         \x20   - {name: never-late, run_queue_delay: 1, for: 1m}\n",
    );
    let containers = [
        growing.start(&leak, &path(&leak), &["/bin/grower", "8", "60"]),
        Background::start(&mut burning.limited(&throttled, &path(&throttled), &["/bin/burner", "1", "60"], quota)),
        burning.start(&steady, &path(&steady), &["/bin/burner", "1", "60"]),
    ];
    daemon.wait_for("containers_watched", 3.0);
    daemon.wait_for("captures_total", 2.0);
    let (status, state) = daemon.ask("GET /state", "");
    println!("{state}");
    assert_eq!(status, 200);
    daemon.wait_for("captures_ended_total{reason=\"time\"}", 2.0);
    // Both rules still hold: nothing comes of it.
    thread::sleep(Duration::from_secs(6));
    assert_eq!((daemon.metric("captures_total"), daemon.metric("captures_running")), (2.0, 0.0));
    drop(containers);
    let (text, captures) = daemon.end();
    assert_eq!(captures.len(), 2, "{text}");
    for (rule, container, process, reason) in
        [("leak", &leak, "grower", "MiB more a minute"), ("throttled", &throttled, "burner", "throttled in")]
    {
        let profile = captures.iter().find(|profile| mark(profile, "profiler.capture.rule") == Some(rule));
        let profile = profile.unwrap_or_else(|| panic!("no capture by {rule}"));
        let said = mark(profile, "profiler.capture.reason").expect("a reason");
        let (seconds, waits) = (cpu_seconds(profile), profile.iter().filter(|sample| sample.is_wait).count());
        println!("{rule}: {said}: {seconds:.3} s on the CPU, {waits} stacks of waits");
        assert!(said.contains(reason) && said.contains("threshold"), "{said}");
        assert_eq!(mark(profile, "profiler.capture.ended"), None);
        for sample in profile {
            assert_eq!(sample.resource.get("container.id"), Some(container), "{sample:?}");
            // (runc's own part of a container's life is over.)
            assert_eq!(sample.process, process);
        }
        // What it had of its CPU depends on what else there is; of its quota it had most.
        let range = if rule == "leak" { 0.5..5.6 } else { 0.2..1.6 };
        assert!(range.contains(&seconds), "{rule}: {seconds} s");
        assert_eq!(waits > 0, rule == "throttled");
    }
    let periods: BTreeSet<u64> = captures
        .iter()
        .flatten()
        .filter(|sample| !sample.is_wait)
        .map(|sample| sample.time_ns / sample.count)
        .collect();
    assert_eq!(periods, BTreeSet::from([1_000_000_000 / 499, 1_000_000_000 / 49]));
}

/// By hand: one process at a higher rate, once, and not again at once. What is excluded is not captured, whoever asks.
#[test]
fn captures_are_asked_for_by_hand() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("captures-programs");
    let secret = folder.join("secret");
    fs::copy(workload("burner"), &secret).expect("a copy");
    let daemon = Daemon::start(
        "captures-by-hand",
        "sampling: {frequency: 49}\nbudget: {cpu: 100%}\nscope: {exclude: [{executables: [secret]}]}\n",
    );
    let shown = Background::start(Command::new(workload("burner")).args(["1", "60"]));
    let hidden = Background::start(Command::new(&secret).args(["1", "60"]));
    let (shown_pid, hidden_pid) = (shown.pid().to_string(), hidden.pid().to_string());

    let wanted = ["--pid", &shown_pid, "--frequency", "997", "--duration", "4s", "--reason", "slow logins", "--wait"];
    let first = daemon.trigger(&wanted);
    print!("{}{}", stdout(&first), stderr(&first));
    assert!(first.status.success() && stdout(&first).lines().count() == 1);
    assert!(stdout(&first).starts_with(&format!("capturing process {shown_pid} at 997 Hz until 2")));
    let again = daemon.trigger(&wanted);
    print!("{}", stderr(&again));
    assert_eq!((again.status.code(), stderr(&again).lines().count()), (Some(1), 1));
    assert!(stderr(&again).contains("captured a short time ago") && stderr(&again).contains("cooldown: 10m"));

    let nothing = daemon.trigger(&["--pid", &hidden_pid, "--duration", "2s", "--wait"]);
    assert!(nothing.status.success(), "{}", stderr(&nothing));
    for (arguments, expected) in [
        (&["--duration", "6m"][..], "capture.duration: 6m is outside of 1s to 5m"),
        (&["--frequency", "0"], "capture.frequency"),
        (&["--pid", "4194304"], "there is no process 4194304"),
        (&["--namespace", "shop"], "kubernetes.enabled"),
        (&["--reason", "a\u{7}b"], "reason"),
    ] {
        let refused = daemon.trigger(arguments);
        assert_eq!((refused.status.code(), stderr(&refused).lines().count()), (Some(1), 1), "{arguments:?}");
        assert!(stderr(&refused).contains(expected), "{arguments:?}: {}", stderr(&refused));
    }
    for (body, status, expected) in [
        ("{", 400, "EOF"),
        (r#"{"capture": {"durtion": "1s"}}"#, 400, "durtion"),
        (&" ".repeat(9000), 413, "8192 bytes"),
    ] {
        let answer = daemon.ask("POST /trigger", body);
        assert!(answer.0 == status && answer.1.contains(expected), "{answer:?}");
    }
    assert_eq!(daemon.metric("captures_total"), 2.0);
    assert_eq!(daemon.metric("captures_refused_total{reason=\"cooldown\"}"), 1.0);
    drop((shown, hidden));
    let (text, captures) = daemon.end();
    assert_eq!(captures.len(), 1, "{text}");
    let profile = &captures[0];
    println!("{:.3} s on the CPU in 4 s, {:?}", cpu_seconds(profile), profile[0].marks);
    assert_eq!(mark(profile, "profiler.capture.rule"), Some("trigger"));
    assert_eq!(mark(profile, "profiler.capture.reason"), Some("slow logins"));
    assert!(profile.iter().all(|sample| sample.pid.to_string() == shown_pid));
    assert!(profile.iter().all(|sample| sample.time_ns / sample.count == 1_000_000_000 / 997));
    // (Three programs share two CPUs, and those with others.)
    assert!((0.4..4.5).contains(&cpu_seconds(profile)));
    assert!(!text.contains("panicked"));
}

/// Two hundred triggers for two containers, as fast as they can be sent, lead to no more than the limits allow; all others
/// are refused, by reason.
#[test]
fn a_storm_stays_within_limits() {
    const TRIGGERS: usize = 200;
    if !kernel_is_usable() {
        return;
    }
    let _cgroups = Cgroups(&[ROOT]);
    let runc = Runc::new("captures-storm", "burner", &[]);
    let ids = [11, 12].map(Runc::id);
    let daemon =
        Daemon::start("captures-limits", "budget: {cpu: 100%}\ncapture: {max_running: 1, per_hour: 3, cooldown: 1s}\n");
    let containers: Vec<Background> =
        ids.iter().map(|id| runc.start(id, &format!("/{ROOT}/{id}"), &["/bin/burner", "1", "120"])).collect();
    let mut answers = BTreeMap::<u16, usize>::new();
    for number in 0..TRIGGERS {
        let body = format!(
            r#"{{"scope": {{"containers": ["{}"]}}, "capture": {{"duration": "1s", "frequency": 199}}}}"#,
            ids[number % 2]
        );
        let (status, answer) = daemon.ask("POST /trigger", &body);
        assert!(status == 200 || answer.contains("capture.max_running: 1, per_hour: 3, cooldown: 1s"), "{answer}");
        *answers.entry(status).or_default() += 1;
        assert!(daemon.metric("captures_running") <= 1.0);
        thread::sleep(Duration::from_millis(30));
    }
    println!("{TRIGGERS} triggers: {answers:?}");
    // (The last one may still be under way.)
    eventually("rest", Duration::from_secs(60), || (daemon.metric("captures_running") == 0.0).then_some(()));
    let refused: Vec<f64> = ["running", "hourly", "cooldown", "stopped"]
        .map(|reason| daemon.metric(&format!("captures_refused_total{{reason=\"{reason}\"}}")))
        .to_vec();
    println!("refused: running, hourly, cooldown, stopped: {refused:?}");
    assert_eq!(answers.get(&200), Some(&3));
    assert_eq!(answers.get(&429), Some(&(TRIGGERS - 3)));
    assert_eq!(refused.iter().sum::<f64>(), (TRIGGERS - 3) as f64);
    assert_eq!(daemon.metric("captures_total"), 3.0);
    drop(containers);
    let (text, captures) = daemon.end();
    assert_eq!(captures.len(), 3, "{text}");
    for profile in captures {
        let containers: BTreeSet<_> = profile.iter().map(|sample| sample.resource.get("container.id")).collect();
        assert_eq!(containers.len(), 1);
    }
}

/// The kill switch ends a capture with everything else: its programs are gone when the command returns, and what was
/// captured so far arrives. While it is on, nothing is captured.
#[test]
fn the_kill_switch_ends_captures() {
    if !kernel_is_usable() {
        return;
    }
    let _statistics = Statistics::on();
    let daemon = Daemon::start("captures-stopped", "budget: {cpu: 100%}\ncapture: {cooldown: 0s}\n");
    let load = Background::start(Command::new(workload("burner")).args(["1", "300"]));
    let pid = daemon.process.pid();
    let before = runs_of(pid).programs;
    let (status, running) =
        daemon.ask("POST /trigger", r#"{"capture": {"duration": "5m", "frequency": 199, "event": "both"}}"#);
    println!("{running}");
    assert!(status == 200 && running.contains("the whole machine"));
    assert!(runs_of(pid).programs > before);
    thread::sleep(Duration::from_secs(4));
    assert!(daemon.ask("GET /state", "").1.contains("asked for by hand"));
    let stopped = daemon.ask("POST /stop", "");
    let runs = runs_of(pid);
    assert!(stopped.1.contains("\"collecting\":false"), "{stopped:?}");
    thread::sleep(Duration::from_secs(1));
    let later = runs_of(pid);
    // (What is unloaded takes its counts with it.)
    assert!(later.count <= runs.count, "{runs:?} {later:?}");
    eventually("nothing that is loaded", Duration::from_secs(60), || (runs_of(pid).programs == 0).then_some(()));
    let refused = daemon.trigger(&[]);
    assert!(stderr(&refused).contains("nothing is captured while collection is stopped"), "{}", stderr(&refused));
    assert_eq!(daemon.ask("POST /trigger", "{}").0, 503);
    assert_eq!(daemon.metric("captures_refused_total{reason=\"stopped\"}"), 2.0);
    assert_eq!(daemon.metric("captures_ended_total{reason=\"stopped\"}"), 1.0);
    assert_eq!(daemon.ask("POST /resume", "").0, 200);
    // The end of the agent ends one too, and a changed configuration.
    let begin = |scope: [&str; 2]| {
        let begun = daemon.trigger(&[scope[0], scope[1], "--frequency", "199", "--duration", "5m"]);
        assert!(begun.status.success(), "{}", stderr(&begun));
        thread::sleep(Duration::from_secs(2));
    };
    begin(["--pid", &load.pid().to_string()]);
    let config = fs::read_to_string(daemon.folder.join("agent.yaml")).expect("a configuration file");
    fs::write(daemon.folder.join("next.yaml"), config.replace("cooldown: 0s", "cooldown: 0s, per_hour: 7"))
        .expect("a file");
    fs::rename(daemon.folder.join("next.yaml"), daemon.folder.join("agent.yaml")).expect("a changed file");
    daemon.wait_for("captures_ended_total{reason=\"configuration\"}", 1.0);
    begin(["--executable", "burner"]);
    let (text, captures) = daemon.end();
    assert_eq!(captures.len(), 3, "{text}");
    let ended = |how: &str| {
        let ended = captures.iter().find(|profile| mark(profile, "profiler.capture.ended") == Some(how));
        let seconds = ended.map(|profile| cpu_seconds(profile)).unwrap_or_else(|| panic!("none was ended by {how}"));
        println!("ended by {how}: {seconds:.3} s on the CPU");
        seconds
    };
    assert!(ended("stopped") > 1.0 && ended("configuration") > 0.2 && ended("shutdown") > 0.2);
}

/// A capture is paid from the budget: where there is nothing else to give up, it is ended.
#[test]
fn a_capture_that_costs_too_much_is_ended() {
    if !kernel_is_usable() {
        return;
    }
    let daemon = Daemon::start("captures-budget", "sampling: {frequency: 49}\nbudget: {cpu: 0.05%}\n");
    let load = Background::start(Command::new(workload("burner")).args(["2", "120"]));
    let (status, running) =
        daemon.ask("POST /trigger", r#"{"capture": {"duration": "5m", "frequency": 1999}, "reason": "everything"}"#);
    assert_eq!(status, 200, "{running}");
    daemon.wait_for("captures_ended_total{reason=\"budget\"}", 1.0);
    println!("at {} Hz beside it", daemon.metric("sampling_frequency"));
    drop(load);
    let (text, captures) = daemon.end();
    assert_eq!(captures.len(), 1, "{text}");
    assert_eq!(mark(&captures[0], "profiler.capture.ended"), Some("budget"));
}

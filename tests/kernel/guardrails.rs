//! What keeps profiling in bounds: the kill switch, the budget, and a configuration that changes while the agent runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent, ask_within, eventually, free_port, http_get, kernel_is_usable, metric,
    programs::{Statistics, cpu_seconds, runs_of},
    recorded, run, scratch, stderr, stdout,
    stopped::Stopped,
    workload,
};

/// Times that each way to stop is tried; `PROFILER_STOPS` makes it more.
const STOPS: usize = 2;

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// A daemon whose files are a test's own.
struct Daemon {
    process: Background,
    folder: PathBuf,
    status: u16,
}

impl Daemon {
    fn start(test: &str, config: &str, more: &[&str]) -> Self {
        let folder = scratch(test);
        fs::write(folder.join("agent.yaml"), config).expect("a configuration file");
        let status = free_port();
        let process = Background::start(
            Command::new(agent())
                .args(["run", "--kubernetes", "false", "--status-listen", &format!("127.0.0.1:{status}")])
                .arg("--config")
                .arg(folder.join("agent.yaml"))
                .arg("--stop-file")
                .arg(folder.join("stop"))
                .arg("--control-socket")
                .arg(folder.join("agent.sock"))
                .arg("--output-folder")
                .arg(folder.join("profiles"))
                .args(["--output-format", "otlp"])
                .args(more),
        );
        Self { process, folder, status }
    }

    fn is_ready(&self) -> Option<()> {
        http_get(self.status, "/readyz").filter(|page| page.starts_with("HTTP/1.1 200")).map(drop)
    }

    fn wait_until_ready(&self) {
        eventually("readiness", Duration::from_secs(20), || self.is_ready());
    }

    /// `profiler-agent stop` or `resume`.
    fn command(&self, name: &str) -> String {
        let output = run(Command::new(agent())
            .arg(name)
            .arg("--stop-file")
            .arg(self.folder.join("stop"))
            .arg("--control-socket")
            .arg(self.folder.join("agent.sock")));
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        stdout(&output)
    }

    /// Asks over the control socket by hand.
    fn post(&self, path: &str) -> String {
        let output = run(Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "10", "--request", "POST", "--unix-socket"])
            .arg(self.folder.join("agent.sock"))
            .arg(format!("http://agent{path}")));
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    }

    /// Replaces the configuration file, as a ConfigMap's is replaced: all at once.
    fn configure(&self, text: &str) {
        replace(&self.folder.join("agent.yaml"), text);
    }

    /// The end of a run: its log, which has the books.
    fn end(self) -> String {
        self.process.signal(Signal::SIGTERM);
        let output = self.process.finish();
        let text = stderr(&output);
        assert!(output.status.success(), "{text}");
        text
    }
}

fn replace(path: &Path, text: &str) {
    let next = path.with_extension("next");
    fs::write(&next, text).and_then(|()| fs::rename(&next, path)).expect("a configuration file");
}

/// Every way to stop detaches every program within a second, every way back resumes, and nothing that was collected
/// before is lost.
#[test]
fn the_kill_switch_detaches_everything() {
    if !kernel_is_usable() {
        return;
    }
    let _statistics = Statistics::on();
    let tries = number_from("PROFILER_STOPS").map_or(STOPS, |tries| tries as usize);
    let (go, stop) = ("export: {window: 2s}\n", "export: {window: 2s}\ncontrol: {stopped: true}\n");
    let daemon = Daemon::start("kill-switch", go, &["--event", "both", "--budget-cpu", "100%"]);
    let pid = daemon.process.pid();
    let file = daemon.folder.join("stop");
    let load = Background::start(Command::new(workload("burner")).args(["2", "600"]));
    type Act<'a> = Box<dyn Fn() + 'a>;
    let ways: Vec<(&str, Act<'_>, Act<'_>)> = vec![
        (
            "file",
            Box::new(|| fs::write(&file, "").expect("a file")),
            Box::new(|| fs::remove_file(&file).expect("gone")),
        ),
        (
            "signal",
            Box::new(|| daemon.process.signal(Signal::SIGUSR1)),
            Box::new(|| daemon.process.signal(Signal::SIGUSR2)),
        ),
        (
            "socket",
            Box::new(|| assert!(daemon.post("/stop").contains("\"collecting\":false"))),
            Box::new(|| drop(daemon.post("/resume"))),
        ),
        ("configuration", Box::new(|| daemon.configure(stop)), Box::new(|| daemon.configure(go))),
        (
            "command",
            Box::new(|| assert!(daemon.command("stop").starts_with("stopped"))),
            Box::new(|| assert!(daemon.command("resume").starts_with("resumed"))),
        ),
    ];
    for (way, stop, resume) in &ways {
        let mut took = Vec::new();
        for _ in 0..tries {
            daemon.wait_until_ready();
            let running = eventually("programs that run", Duration::from_secs(5), || {
                Some(runs_of(pid)).filter(|runs| runs.count > 0)
            });
            thread::sleep(Duration::from_millis(200));
            assert!(runs_of(pid).count > running.count, "{way}: nothing runs");
            let begun = Instant::now();
            stop();
            // The last moment at which some program had run since the look before.
            let (mut runs, mut last) = (runs_of(pid), begun);
            while last.elapsed() < Duration::from_millis(700) {
                thread::sleep(Duration::from_millis(5));
                let now = runs_of(pid);
                // (What is unloaded takes its counts with it.)
                if now.programs == runs.programs && now.count != runs.count {
                    last = Instant::now();
                }
                runs = now;
            }
            took.push(last - begun);
            assert!(http_get(daemon.status, "/readyz").is_some_and(|page| page.ends_with("stopped\n")), "{way}");
            resume();
        }
        took.sort();
        println!("stopped by {way}: {tries} tries, median {:?}, longest {:?}", took[tries / 2], took[tries - 1]);
        assert!(took[tries - 1] <= Duration::from_secs(1), "{way}: {took:?}");
    }
    daemon.wait_until_ready();
    thread::sleep(Duration::from_secs(3));
    drop(load);
    drop(ways);
    let text = daemon.end();
    let books = Stopped::of(&text);
    println!("{}", text.lines().last().unwrap_or_default());
    assert!(books.balances() && books.seen > 1000, "{text}");
}

/// A stopped agent attaches nothing, also after a restart, and is as good as not there.
#[test]
fn a_stopped_agent_rests() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("stopped");
    let file = folder.join("stop");
    fs::write(&file, "").expect("a file");
    let daemon = Daemon::start("stopped-agent", "", &[]);
    daemon.wait_until_ready();
    assert!(daemon.command("stop").starts_with("stopped"));
    let stop_file = daemon.folder.join("stop");
    assert!(stop_file.exists());
    // (What was collected before is still being handed on.)
    eventually("an empty pipeline", Duration::from_secs(30), || {
        Some(runs_of(daemon.process.pid()).programs).filter(|&programs| programs == 0)
    });
    let (before, begun) = (cpu_seconds(daemon.process.pid()), Instant::now());
    thread::sleep(Duration::from_secs(20));
    let share = (cpu_seconds(daemon.process.pid()) - before) / begun.elapsed().as_secs_f64();
    println!("stopped: {:.3} % of a CPU", share * 100.0);
    assert!(share < 0.001, "{share}");
    daemon.end();
    // The next one begins as the last one ended.
    let next = Background::start(
        Command::new(agent())
            .args(["run", "--kubernetes", "false", "--status-listen"])
            .arg(format!("127.0.0.1:{}", free_port()))
            .arg("--stop-file")
            .arg(&file)
            .arg("--control-socket")
            .arg(folder.join("agent.sock")),
    );
    thread::sleep(Duration::from_secs(2));
    assert_eq!(runs_of(next.pid()).programs, 0);
    next.signal(Signal::SIGTERM);
    let text = stderr(&next.finish());
    assert!(text.contains("stopped by file"), "{text}");
}

/// A changed configuration holds within moments, a wrong one is refused with the place, and no sample is lost by either.
#[test]
fn the_configuration_may_change() {
    if !kernel_is_usable() {
        return;
    }
    let daemon =
        Daemon::start("reload", "sampling: {frequency: 49}\nexport: {window: 3s}\n", &["--budget-cpu", "100%"]);
    daemon.wait_until_ready();
    let load = Background::start(Command::new(workload("burner")).args(["2", "60"]));
    let frequency = |wanted: f64| {
        ask_within(Duration::from_secs(10), || {
            metric(daemon.status, "profiler_agent_sampling_frequency").filter(|&now| (now - wanted).abs() < 0.5)
        })
    };
    assert!(frequency(49.0).is_some());
    daemon.configure("sampling: {frequency: 19}\nexport: {window: 3s}\n");
    assert!(frequency(19.0).is_some(), "a lower rate does not hold");
    daemon.configure("sampling:\n  frequency: 19\n  evnt: both\nexport: {window: 3s}\n");
    let refused = || metric(daemon.status, "profiler_agent_config_reloads_refused_total").filter(|&count| count >= 1.0);
    eventually("a refusal", Duration::from_secs(10), refused);
    assert!(frequency(19.0).is_some());
    daemon.configure("sampling: {frequency: 99, event: both}\nexport: {window: 3s}\n");
    assert!(frequency(99.0).is_some(), "a higher rate does not hold");
    daemon.wait_until_ready();
    thread::sleep(Duration::from_secs(5));
    drop(load);
    let folder = daemon.folder.join("profiles");
    let text = daemon.end();
    println!("{text}");
    assert!(text.contains("evnt") && text.contains("line 3"), "{text}");
    let books = Stopped::of(&text);
    assert!(books.balances() && books.dropped == 0, "{text}");
    let mut periods: Vec<u64> = Vec::new();
    for file in fs::read_dir(folder).expect("profiles").flatten() {
        let samples = recorded::samples(&fs::read(file.path()).expect("a profile"));
        periods.extend(samples.iter().filter(|sample| !sample.is_wait).map(|sample| sample.time_ns / sample.count));
    }
    periods.sort_unstable();
    periods.dedup();
    assert_eq!(periods, [1_000_000_000 / 99, 1_000_000_000 / 49, 1_000_000_000 / 19]);
}

/// A valid configuration, of which wrong ones are made.
const VALID: &str = "\
sampling:
  frequency: 49
  event: both
  wait_stacks: 20
  min_wait: 1ms
unwind:
  table_mib: 32
symbolize:
  lines: false
  inlines: false
  dwarf_mib: 64
  names_mib: 16
labels:
  service_from_labels: true
  allow: [service.*]
  rename: {a: b}
scope:
  honor_annotation: true
  exclude:
    - executables: [nothing-like-this]
schedule:
  every: 1m
  probability: 1
redact:
  paths: [/secret/*]
  functions: true
export:
  window: 5s
  queue_mib: 8
budget:
  cpu: 100%
  memory_mib: 300
control:
  stopped: false
";

/// Every line of a configuration made wrong in several ways.
fn wrong_configurations() -> Vec<String> {
    let lines: Vec<&str> = VALID.lines().collect();
    let with = |index: usize, line: String| {
        let mut lines: Vec<String> = lines.iter().map(|&line| line.to_owned()).collect();
        lines[index] = line;
        lines.join("\n") + "\n"
    };
    let mut wrong = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let (key, value) = line.split_once(':').expect("a key");
        // A name that nobody knows, one that is there twice, and what is not YAML at all.
        wrong.push(with(index, format!("{key}x:{value}")));
        wrong.push(with(index, format!("{line}\n{key}: 1")));
        wrong.push(with(index, format!("{key}: {{unclosed")));
        wrong.push(with(index, format!("{key}: \"unclosed")));
        wrong.push(with(index, format!("\t{}", line.trim_start())));
        // A mapping or a list of something else in the place of a value.
        if !key.contains("rename") {
            wrong.push(with(index, format!("{key}: {{nobody: 1}}")));
        }
        wrong.push(with(index, format!("{key}: [[1, 2], {{a: 3}}]")));
    }
    for (from, to) in [
        ("frequency: 49", "frequency: 0"),
        ("frequency: 49", "frequency: -1"),
        ("frequency: 49", "frequency: 100000000"),
        ("event: both", "event: sometimes"),
        ("min_wait: 1ms", "min_wait: soon"),
        ("table_mib: 32", "table_mib: 1"),
        ("dwarf_mib: 64", "dwarf_mib: 1"),
        ("names_mib: 16", "names_mib: 99999999"),
        ("window: 5s", "window: 5"),
        ("window: 5s", "window: 1ms"),
        ("queue_mib: 8", "queue_mib: 0"),
        ("cpu: 100%", "cpu: 100"),
        ("cpu: 100%", "cpu: 101%"),
        ("memory_mib: 300", "memory_mib: 3"),
        ("stopped: false", "stopped: perhaps"),
        ("every: 1m", "every: 0s"),
        ("probability: 1", "probability: 1.5"),
    ] {
        assert!(VALID.contains(from), "{from}");
        wrong.push(VALID.replacen(from, to, 1));
    }
    wrong
}

/// Whatever is wrong with a configuration, it is refused with a clear message, and the one before holds.
#[test]
fn wrong_configurations_change_nothing() {
    if !kernel_is_usable() {
        return;
    }
    let daemon = Daemon::start("wrong", VALID, &[]);
    daemon.wait_until_ready();
    let before = daemon.post("/reload");
    let count = |name: &str| metric(daemon.status, &format!("profiler_agent_config_reloads{name}_total"));
    let loaded = count("").expect("a count");
    let wrong = wrong_configurations();
    for text in &wrong {
        let refused = count("_refused").expect("a count");
        daemon.configure(text);
        assert_eq!(daemon.post("/reload"), before, "{text}");
        // (It may have been noticed by itself, too.)
        assert!(count("_refused").is_some_and(|now| now > refused), "taken over: {text}");
        assert_eq!(count(""), Some(loaded), "taken over: {text}");
    }
    daemon.configure(VALID);
    assert_eq!(daemon.post("/reload"), before);
    assert!(daemon.is_ready().is_some());
    let text = daemon.end();
    let refusals: Vec<&str> = text.lines().filter(|line| line.contains("is left as it is")).collect();
    println!("{} wrong configurations; of what was said, every tenth line:", wrong.len());
    for line in refusals.iter().step_by(refusals.len() / 10) {
        println!("  {line}");
    }
    assert!(wrong.len() >= 200 && refusals.len() >= wrong.len(), "{}", refusals.len());
    for line in refusals {
        assert!(line.contains("agent.yaml") && line.contains("line "), "{line}");
    }
}

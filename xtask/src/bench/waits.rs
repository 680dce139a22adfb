//! What following waits costs: per switch, and for servers that switch a lot.
//!
//! All is measured in pairs, one with and one without a recording, in turns.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{Statistics, bpf_objects, number};
use crate::{
    Outcome,
    process::{find, run},
    setup::install_packages,
};

const PAIRS: usize = 15;
/// How long a measurement takes, what it waits for before, and how long is counted.
const MEASURE: Duration = Duration::from_secs(2);
const SETTLE: Duration = Duration::from_secs(2);
const COUNT: Duration = Duration::from_secs(15);
/// Turns of one run, a fraction of a second, and how often it runs to find its least: other machines disturb it.
const TURNS: &str = "60000";
const RUNS: usize = 4;
const PORT: &str = "16379";
/// Programs and the packages that bring them.
const PROGRAMS: &[(&str, &str)] = &[
    ("redis-server", "redis-server"),
    ("redis-benchmark", "redis-tools"),
    ("pgbench", "postgresql-contrib"),
    ("perf", "linux-perf"),
];

/// Measures everything about waits.
pub(super) fn measure(workspace: &Path) -> Outcome {
    let missing: Vec<&str> =
        PROGRAMS.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        install_packages(&missing)?;
    }
    let folder = workspace.join("target/workloads/bench");
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    println!("\n| waits | value |\n|---|---|");
    switches(workspace, &folder)?;
    println!("\n| server, in pairs | without | with `--event both` | change, % |\n|---|---|---|---|");
    let recording = folder.join("server.folded");
    let redis = Redis::start(&folder)?;
    pairs(workspace, &recording, "redis-server, requests a second", || redis.read())?;
    recognise(&recording, "redis-server", &["do_epoll_wait"]);
    drop(redis);
    let postgres = Postgres::start()?;
    pairs(workspace, &recording, "postgres, transactions a second", || postgres.read())?;
    recognise(&recording, "postgres", &["do_epoll_wait", "do_futex", "fsync", "fdatasync"]);
    Ok(())
}

/// A recording that runs until it is dropped.
struct Recording(Child);

impl Recording {
    fn start(workspace: &Path, arguments: &[&str]) -> Result<Self, String> {
        let mut command = Command::new(workspace.join("target/release/profiler-agent"));
        command.args(["record", "--duration", "600s"]).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| format!("{command:?} cannot be started: {error}"))?;
        // It is under way in a fraction of that.
        thread::sleep(Duration::from_secs(1));
        Ok(Self(child))
    }

    /// Ends it and waits for its file.
    fn finish(mut self) -> Outcome {
        run(Command::new("kill").args(["-INT", &self.0.id().to_string()]))?;
        self.0.wait().map(|_| ()).map_err(|error| error.to_string())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What one switch costs that is not sampled, by the kernel's statistics and by the clock on the wall.
fn switches(workspace: &Path, folder: &Path) -> Outcome {
    let output = folder.join("switches.folded");
    let output = output.to_string_lossy();
    // So few stacks that they do not count.
    let record = || Recording::start(workspace, &["--event", "off-cpu", "--wait-stacks", "20", "--output", &output]);
    let statistics = Statistics::on()?;
    let recording = record()?;
    turn()?;
    let programs = program_times(recording.0.id());
    drop((recording, statistics));
    // The program that runs most is the one that follows switches; where there is one that follows wake-ups, its time
    // counts too.
    let switches = programs.iter().map(|&(runs, _)| runs).max().unwrap_or_default().max(1);
    let time: u64 = programs.iter().map(|&(_, time)| time).sum();
    println!("| `perf bench sched pipe`: kernel programs, ns a switch | {:.0} |", time as f64 / switches as f64);
    println!("| switches measured | {switches} |");
    let mut added = Vec::new();
    for _ in 0..PAIRS {
        let without = turn()?;
        let recording = record()?;
        let with = turn()?;
        drop(recording);
        // A turn is two switches.
        added.push((with - without) * 1000.0 / 2.0);
    }
    let all: Vec<String> = added.iter().map(|ns| format!("{ns:.0}")).collect();
    println!("| by the wall, ns a switch: median, all pairs | {:.0} ({}) |", median(&mut added), all.join(", "));
    Ok(())
}

/// Two threads that wake each other, on one CPU: the least microseconds a turn of some runs.
fn turn() -> Result<f64, String> {
    let mut least = f64::INFINITY;
    for _ in 0..RUNS {
        least = least.min(turn_once()?);
    }
    Ok(least)
}

fn turn_once() -> Result<f64, String> {
    let text = text_of(Command::new("taskset").args(["-c", "0", "perf", "bench", "sched", "pipe", "-l", TURNS]))?;
    let line = text.lines().find(|line| line.contains("usecs/op")).ok_or("perf bench printed no usecs/op")?;
    line.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).ok_or_else(|| format!("{line:?}"))
}

/// What has been done so far, and when that was asked.
struct Reading {
    done: f64,
    at: Instant,
}

/// Reads a server's progress with and without a recording, in turns, and prints the pairs; then what the recording
/// took of the machine, counted.
///
/// The load goes on all the time: caches stay warm, and what disturbs the machine for a while disturbs both of a pair.
/// What a recording learns and names when it begins is no part of what it costs. How much runs differ by themselves tell
/// the runs without a recording, each compared with its neighbours in the same way.
fn pairs(workspace: &Path, recording: &Path, name: &str, read: impl Fn() -> Result<Reading, String>) -> Outcome {
    let output = recording.to_string_lossy();
    let record = || Recording::start(workspace, &["--event", "both", "--output", &output]);
    let rate = || -> Result<f64, String> {
        thread::sleep(SETTLE);
        let before = read()?;
        thread::sleep(MEASURE);
        let after = read()?;
        Ok((after.done - before.done) / after.at.duration_since(before.at).as_secs_f64())
    };
    let mut without = vec![rate()?];
    let mut with = Vec::new();
    for _ in 0..PAIRS {
        let recording = record()?;
        with.push(rate()?);
        recording.finish()?;
        without.push(rate()?);
    }
    let change = |rate: f64, before: f64, after: f64| 100.0 * (rate / f64::midpoint(before, after) - 1.0);
    let mut changes = Vec::new();
    for (neighbours, &rate) in without.windows(2).zip(&with) {
        let [before, after] = neighbours else { continue };
        let change = change(rate, *before, *after);
        println!("| {name} | {:.0} | {rate:.0} | {change:+.2} |", f64::midpoint(*before, *after));
        changes.push(change);
    }
    let by_themselves: Vec<f64> = without.windows(3).map(|runs| change(runs[1], runs[0], runs[2])).collect();
    println!("| {name}, median of {PAIRS} | | | {:+.2} |", median(&mut changes));
    println!(
        "| {name}, standard deviation of pairs; of runs without a recording | | | {:.2}; {:.2} |",
        deviation(&changes),
        deviation(&by_themselves)
    );
    counted(&record()?, name)
}

/// Prints how much of the machine's CPU time a recording takes: its programs by the kernel's own statistics, and its
/// process.
fn counted(recording: &Recording, name: &str) -> Outcome {
    let process = recording.0.id();
    let _statistics = Statistics::on()?;
    let programs = || program_times(process).into_iter().fold((0, 0), |sum, (runs, time)| (sum.0 + runs, sum.1 + time));
    thread::sleep(SETTLE);
    let (start, runs, cpu) = (Instant::now(), programs(), cpu_seconds(process));
    thread::sleep(COUNT);
    let (runs_after, cpu_after) = (programs(), cpu_seconds(process));
    let seconds = start.elapsed().as_secs_f64();
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let share = |cpu_seconds: f64| 100.0 * cpu_seconds / seconds / cpus as f64;
    let (programs, agent) = (share((runs_after.1 - runs.1) as f64 / 1e9), share(cpu_after - cpu));
    let runs = (runs_after.0 - runs.0) as f64 / seconds;
    println!(
        "| {name}: counted, % of the machine | | kernel programs {programs:.2} ({runs:.0} runs a second), agent \
         {agent:.2} | {:.2} |",
        programs + agent
    );
    Ok(())
}

/// How often each kernel program of a process has run, and for how many nanoseconds.
fn program_times(process: u32) -> Vec<(u64, u64)> {
    let programs = bpf_objects(process).into_iter().filter(|fields| fields.contains_key("prog_id"));
    let of = |fields: &BTreeMap<String, String>, name: &str| fields.get(name).map_or(0, |value| number(value));
    programs.map(|fields| (of(&fields, "run_cnt"), of(&fields, "run_time_ns"))).collect()
}

/// CPU time of a process so far.
fn cpu_seconds(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // User and system time follow the name, which may hold anything, and eleven other fields; 100 ticks are a second.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_ascii_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Says how much of a server's waiting is recognised by its functions' names.
fn recognise(recording: &Path, process: &str, functions: &[&str]) {
    let text = fs::read_to_string(recording).unwrap_or_default();
    let mut found: BTreeMap<&str, u64> = BTreeMap::new();
    for (stack, time) in text.lines().filter_map(|line| line.rsplit_once(' ')) {
        if stack.starts_with(process) && stack.contains(";[off-cpu];") {
            for &function in functions.iter().filter(|function| stack.contains(**function)) {
                *found.entry(function).or_default() += time.parse::<u64>().unwrap_or(0);
            }
        }
    }
    let seconds: Vec<String> =
        found.iter().map(|(function, time)| format!("{function} {:.2} s", *time as f64 / 1e6)).collect();
    println!("| {process}, waits in | {} | | |", seconds.join(", "));
}

/// A server that answers on a local port, and what asks it.
pub(super) struct Redis {
    server: Child,
    load: Option<Child>,
}

impl Redis {
    pub(super) fn start(folder: &Path) -> Result<Self, String> {
        let mut command = Command::new("redis-server");
        command.args(["--port", PORT, "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--dir"]).arg(folder);
        let mut redis = Self { server: start(&mut command)?, load: None };
        thread::sleep(Duration::from_secs(1));
        let mut command = Command::new("redis-benchmark");
        command.args(["-p", PORT, "-t", "set", "-n", "1000000000", "-c", "50", "--csv"]);
        redis.load = Some(start(&mut command)?);
        Ok(redis)
    }

    fn read(&self) -> Result<Reading, String> {
        let at = Instant::now();
        let text = text_of(Command::new("redis-cli").args(["-p", PORT, "info", "stats"]))?;
        let done = text.lines().find_map(|line| line.strip_prefix("total_commands_processed:")?.trim().parse().ok());
        Ok(Reading { done: done.ok_or_else(|| format!("redis-cli printed {text:?}"))?, at })
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        for child in self.load.iter_mut().chain([&mut self.server]) {
            // It has usually not ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A database in a folder of its own, which belongs to the user that the package makes (the server refuses root), and
/// what changes it.
struct Postgres {
    folder: PathBuf,
    programs: PathBuf,
    load: Option<Child>,
}

impl Postgres {
    fn start() -> Result<Self, String> {
        let versions = fs::read_dir("/usr/lib/postgresql").map_err(|error| format!("postgresql: {error}"))?;
        let version = versions.flatten().next().ok_or("no version of postgresql is installed")?;
        let folder = std::env::temp_dir().join(format!("profiler-bench-{}", std::process::id()));
        let mut postgres = Self { folder, programs: version.path().join("bin"), load: None };
        fs::create_dir_all(&postgres.folder).map_err(|error| error.to_string())?;
        run(Command::new("chown").arg("postgres").arg(&postgres.folder))?;
        postgres.run("initdb", &["-D", "data", "-A", "trust"])?;
        let folder = postgres.folder.display().to_string();
        let options = format!("-c listen_addresses= -c unix_socket_directories={folder}");
        postgres.run("pg_ctl", &["-D", "data", "-w", "-l", "log", "-o", &options, "start"])?;
        postgres.run("pgbench", &["-h", &folder, "-i", "-s", "5", "-q", "postgres"])?;
        let load = ["-h", &folder, "-c", "4", "-j", "2", "-T", "3600", "postgres"];
        postgres.load = Some(start(&mut postgres.command("pgbench", &load))?);
        Ok(postgres)
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(self.programs.join(program)).args(arguments);
        command.current_dir(&self.folder);
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Outcome {
        run(self.command(program, arguments).stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// Every transaction of the load has a number.
    fn read(&self) -> Result<Reading, String> {
        let folder = self.folder.display().to_string();
        let at = Instant::now();
        let text = text_of(&mut self.command("psql", &["-h", &folder, "-Atc", "select txid_current()", "postgres"]))?;
        Ok(Reading { done: text.trim().parse().map_err(|_| format!("psql printed {text:?}"))?, at })
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // What cannot be stopped or removed is left to the machine's owner.
        let _ = self.run("pg_ctl", &["-D", "data", "-m", "immediate", "stop"]);
        if let Some(load) = &mut self.load {
            let _ = load.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Starts a command that prints nothing.
fn start(command: &mut Command) -> Result<Child, String> {
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    child.map_err(|error| format!("{command:?} cannot be started: {error}"))
}

/// Standard output of a command that has to succeed.
fn text_of(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?} cannot be started: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

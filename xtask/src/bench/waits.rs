//! What following waits costs: per switch, and for servers that switch a lot.
//!
//! Servers are measured in pairs of runs, one with and one without a recording, in turns: what disturbs the machine
//! for a while disturbs both of a pair.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use super::{BPF_STATISTICS, bpf_objects, number, write};
use crate::{
    Outcome,
    process::{find, run},
    setup::install_packages,
};

const PAIRS: usize = 7;
/// Requests, transactions' seconds and turns of one run: a few seconds each.
const REQUESTS: &str = "400000";
const SECONDS: &str = "6";
const TURNS: &str = "300000";
const PORT: &str = "16379";
/// `BPF_PROG_TYPE_TRACING`.
const TRACING: &str = "26";
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
    pairs(workspace, &recording, "redis-server, requests a second", || redis.requests_per_second())?;
    recognise(&recording, "redis-server", &["do_epoll_wait"]);
    drop(redis);
    let postgres = Postgres::start()?;
    pairs(workspace, &recording, "postgres, transactions a second", || postgres.transactions_per_second())?;
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
    let before = fs::read_to_string(BPF_STATISTICS).unwrap_or_default();
    write(BPF_STATISTICS, "1")?;
    let recording = record()?;
    turn()?;
    let mut programs: Vec<(u64, u64)> = bpf_objects(recording.0.id())
        .iter()
        .filter(|fields| fields.get("prog_type").is_some_and(|kind| kind == TRACING))
        .map(|fields| {
            let of = |name: &str| fields.get(name).map_or(0, |value| number(value));
            (of("run_cnt"), of("run_time_ns"))
        })
        .collect();
    drop(recording);
    write(BPF_STATISTICS, before.trim())?;
    programs.sort_unstable();
    let (switches, time) = programs.pop().ok_or("the recording has no programs")?;
    let (wakes, wake_time) = programs.pop().ok_or("the recording has one program")?;
    let each = |time: u64| time as f64 / switches.max(1) as f64;
    println!(
        "| `perf bench sched pipe`: kernel programs, ns a switch | {:.0} ({:.0} switching, {:.0} waking) |",
        each(time + wake_time),
        each(time),
        each(wake_time)
    );
    println!("| switches measured, wake-ups | {switches}, {wakes} |");
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

/// Two threads that wake each other, on one CPU: microseconds a turn.
fn turn() -> Result<f64, String> {
    let text = text_of(Command::new("taskset").args(["-c", "0", "perf", "bench", "sched", "pipe", "-l", TURNS]))?;
    let line = text.lines().find(|line| line.contains("usecs/op")).ok_or("perf bench printed no usecs/op")?;
    line.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).ok_or_else(|| format!("{line:?}"))
}

/// Runs a benchmark in pairs and prints them.
fn pairs(workspace: &Path, recording: &Path, name: &str, once: impl Fn() -> Result<f64, String>) -> Outcome {
    let output = recording.to_string_lossy();
    // Every measured run follows one that is not: caches fill, disks settle, and what a recording learns and names once
    // is no part of what it costs.
    let warm = || {
        once()?;
        once()
    };
    let with_recording = || -> Result<f64, String> {
        let recording = Recording::start(workspace, &["--event", "both", "--output", &output])?;
        let result = warm()?;
        recording.finish()?;
        Ok(result)
    };
    let mut changes = Vec::new();
    for pair in 0..PAIRS {
        let (without, with) = if pair % 2 == 0 {
            let without = warm()?;
            (without, with_recording()?)
        } else {
            let with = with_recording()?;
            (warm()?, with)
        };
        let change = 100.0 * (with / without - 1.0);
        println!("| {name} | {without:.0} | {with:.0} | {change:+.2} |");
        changes.push(change);
    }
    println!("| {name}, median | | | {:+.2} |", median(&mut changes));
    Ok(())
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

/// A server that answers on a local port.
struct Redis(Child);

impl Redis {
    fn start(folder: &Path) -> Result<Self, String> {
        let mut command = Command::new("redis-server");
        command.args(["--port", PORT, "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--dir"]).arg(folder);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let redis = Self(child.map_err(|error| format!("redis-server cannot be started: {error}"))?);
        thread::sleep(Duration::from_secs(1));
        Ok(redis)
    }

    fn requests_per_second(&self) -> Result<f64, String> {
        let text = text_of(
            Command::new("redis-benchmark").args(["-p", PORT, "-t", "set", "-n", REQUESTS, "-c", "50", "--csv"]),
        )?;
        let line = text.lines().find_map(|line| line.strip_prefix("\"SET\",\""));
        let rate = line.and_then(|line| line.split('"').next()?.parse().ok());
        rate.ok_or_else(|| format!("redis-benchmark printed {text:?}"))
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It has usually not ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A database in a folder of its own, which belongs to the user that the package makes: the server refuses root.
struct Postgres {
    folder: PathBuf,
    programs: PathBuf,
}

impl Postgres {
    fn start() -> Result<Self, String> {
        let versions = fs::read_dir("/usr/lib/postgresql").map_err(|error| format!("postgresql: {error}"))?;
        let version = versions.flatten().next().ok_or("no version of postgresql is installed")?;
        let folder = std::env::temp_dir().join(format!("profiler-bench-{}", std::process::id()));
        let postgres = Self { folder, programs: version.path().join("bin") };
        fs::create_dir_all(&postgres.folder).map_err(|error| error.to_string())?;
        run(Command::new("chown").arg("postgres").arg(&postgres.folder))?;
        postgres.run("initdb", &["-D", "data", "-A", "trust"])?;
        let folder = postgres.folder.display().to_string();
        let options = format!("-c listen_addresses= -c unix_socket_directories={folder}");
        postgres.run("pg_ctl", &["-D", "data", "-w", "-l", "log", "-o", &options, "start"])?;
        postgres.run("pgbench", &["-h", &folder, "-i", "-s", "5", "-q", "postgres"])?;
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

    fn transactions_per_second(&self) -> Result<f64, String> {
        let folder = self.folder.display().to_string();
        let text =
            text_of(&mut self.command("pgbench", &["-h", &folder, "-c", "4", "-j", "2", "-T", SECONDS, "postgres"]))?;
        let line = text.lines().find_map(|line| line.strip_prefix("tps = "));
        let rate = line.and_then(|line| line.split(' ').next()?.parse().ok());
        rate.ok_or_else(|| format!("pgbench printed {text:?}"))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // What cannot be stopped or removed is left to the machine's owner.
        let _ = self.run("pg_ctl", &["-D", "data", "-m", "immediate", "stop"]);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Standard output of a command that has to succeed.
fn text_of(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?} cannot be started: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

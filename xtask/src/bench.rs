//! `cargo xtask bench [programs|waits|wire]`: what profiling costs, on a fixed set of programs.
//!
//! The daemon runs as users run it, with a receiver; each program runs on every CPU. What the kernel programs cost
//! comes from the kernel's own run-time statistics, the rest from the daemon's metrics and from `/proc`.

mod waits;
mod wire;

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Outcome,
    process::{cargo, is_root, output, run},
    setup,
};

/// Samples per second and CPU: enough of them for the kernel programs' average to settle in a few seconds.
const FREQUENCY: &str = "999";
const RECEIVER: &str = "127.0.0.1:14317";
const STATUS: &str = "127.0.0.1:17081";
/// How long a program runs before anything is measured (samples of its first moments are drained by then), and is
/// measured.
const LEARNING: Duration = Duration::from_secs(7);
const MEASURED: Duration = Duration::from_secs(6);
const BPF_STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// What can be measured alone.
const PARTS: [&str; 3] = ["programs", "waits", "wire"];

/// One program of the set.
struct Workload {
    name: &'static str,
    /// Frames of its stacks, where they are all alike.
    frames: Option<u64>,
    command: Vec<String>,
}

/// What was measured of one.
struct Measured {
    samples: u64,
    ns_per_sample: f64,
    agent_cpu: f64,
    resident: u64,
    rooted: f64,
    ends: BTreeMap<String, u64>,
}

pub(crate) fn main(workspace: &Path, arguments: &[String]) -> Outcome {
    let only = match arguments {
        [] => None,
        [part] if PARTS.contains(&part.as_str()) => Some(part.as_str()),
        _ => return Err(format!("bench takes one argument at most: {}", PARTS.join(", "))),
    };
    if !is_root() {
        return Err("the daemon needs root: run this command as root".to_owned());
    }
    setup::for_build(workspace)?;
    setup::for_tests(workspace)?;
    run(cargo(workspace).args(["build", "--release", "--package", "profiler-agent"]))?;
    run(cargo(workspace).args(["build", "--release", "--package", "profiler-tests", "--bins"]))?;
    println!("\n{}", machine());
    let is_wanted = |part| only.is_none_or(|only| only == part);
    if is_wanted("programs") {
        programs(workspace)?;
    }
    if is_wanted("wire") {
        wire::measure(workspace)?;
    }
    if is_wanted("waits") {
        waits::measure(workspace)?;
    }
    Ok(())
}

/// Measures the set of programs under the daemon.
fn programs(workspace: &Path) -> Outcome {
    let workloads = workloads(workspace, (LEARNING + MEASURED).as_secs() + 2)?;
    let _statistics = Statistics::on()?;
    measure(workspace, &workloads)
}

/// The kernel's statistics of its programs, while it lives.
struct Statistics {
    before: String,
}

impl Statistics {
    fn on() -> Result<Self, String> {
        let before = fs::read_to_string(BPF_STATISTICS).unwrap_or_default();
        write(BPF_STATISTICS, "1")?;
        Ok(Self { before })
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        // They cost a little, no more.
        let _ = write(BPF_STATISTICS, self.before.trim());
    }
}

/// The set of programs, each of which runs for so many seconds.
fn workloads(workspace: &Path, seconds: u64) -> Result<Vec<Workload>, String> {
    let folder = workspace.join("target/workloads/bench");
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let sources = workspace.join("tests/workloads/native");
    let shapes = folder.join("shapes");
    let flags = ["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-pthread", "-o"];
    run(Command::new("gcc").args(flags).arg(&shapes).arg(sources.join("shapes.c")))?;
    let go = folder.join("shapes-go");
    run(Command::new("go").args(["build", "-o"]).arg(&go).arg(sources.join("shapes.go")))?;
    let deep = |name, frames: u64| {
        // Around DEPTH frames of `descend` are `_start`, two of the C library, `main`, `spin_to_deadline` and `spin`.
        let depth = frames - 6;
        let command = [&*shapes.to_string_lossy(), "deep", &seconds.to_string(), &depth.to_string()].map(str::to_owned);
        Workload { name, frames: Some(frames), command: command.to_vec() }
    };
    let other = |name, command: &[&str]| {
        let command = command.iter().map(|&word| word.to_owned()).collect();
        Workload { name, frames: None, command }
    };
    let again = |command: String| {
        format!("end=$((SECONDS + {seconds})); while [ $SECONDS -lt $end ]; do {command} >/dev/null 2>&1; done")
    };
    let compile = again(format!("g++ -O2 -o /dev/null {}", sources.join("shapes.cpp").display()));
    let rust = format!(
        "rustc -C opt-level=3 --edition 2024 -o {}/$$ {}",
        folder.display(),
        sources.join("shapes.rs").display()
    );
    let (rust, java) = (again(rust), again("java --list-modules".to_owned()));
    let python = format!(
        "import time\nend = time.time() + {seconds}\nwhile time.time() < end:\n    sorted([str(sum(range(50))) for _ in range(100)], key=len)"
    );
    let node = format!(
        "const end = Date.now() + {seconds}000; const f = n => n < 2 ? 1 : f(n - 1) + f(n - 2); \
         while (Date.now() < end) {{ f(18); JSON.parse(JSON.stringify({{a: [1, 2, 3, 'x'.repeat(100)]}})) }}"
    );
    Ok(vec![
        deep("c, 8 frames", 8),
        deep("c, 28 frames", 28),
        deep("c, 118 frames", 118),
        deep("c, 1,000 frames", 1000),
        other("go, allocating", &[&go.to_string_lossy(), "allocate", &seconds.to_string()]),
        other("python3", &["python3", "-c", &python]),
        other("node", &["node", "-e", &node]),
        other("g++, again and again", &["bash", "-c", &compile]),
        other("rustc, again and again", &["bash", "-c", &rust]),
        other("java, starting again and again", &["bash", "-c", &java]),
    ])
}

/// The daemon and its receiver; both end with this.
struct Daemon {
    agent: Child,
    sink: Child,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for child in [&mut self.agent, &mut self.sink] {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Daemon {
    fn start(workspace: &Path, arguments: &[&str]) -> Result<Self, String> {
        let binaries = workspace.join("target/release");
        let start = |command: &mut Command| {
            let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
            quiet.spawn().map_err(|error| format!("{command:?} cannot be started: {error}"))
        };
        let sink = start(Command::new(binaries.join("otlp-sink")).args(["--listen", RECEIVER]))?;
        let agent = start(
            Command::new(binaries.join("profiler-agent"))
                .args(["run", "--endpoint", &format!("http://{RECEIVER}")])
                .args(arguments)
                .args(["--status-listen", STATUS]),
        )?;
        let daemon = Self { agent, sink };
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if page("/readyz").is_ok_and(|page| page.starts_with("HTTP/1.1 200")) {
                return Ok(daemon);
            }
            thread::sleep(Duration::from_millis(50));
        }
        Err("the daemon did not become ready in 10 s".to_owned())
    }

    /// A file of the daemon's own in `/proc`.
    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.agent.id()))
    }

    fn status_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap_or_default();
        number(status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default())
    }

    /// Run time in nanoseconds and number of runs of the sampling program (`BPF_PROG_TYPE_PERF_EVENT` is 7).
    fn sampling(&self) -> (u64, u64) {
        let programs = bpf_objects(self.agent.id());
        let of = |fields: &BTreeMap<String, String>, name: &str| fields.get(name).map_or(0, |value| number(value));
        programs
            .iter()
            .filter(|fields| fields.get("prog_type").is_some_and(|kind| kind == "7"))
            .map(|fields| (of(fields, "run_time_ns"), of(fields, "run_cnt")))
            .max_by_key(|(_, runs)| *runs)
            .unwrap_or_default()
    }
}

/// Fields of every BPF program and map that a process holds.
fn bpf_objects(process: u32) -> Vec<BTreeMap<String, String>> {
    let descriptors = fs::read_dir(format!("/proc/{process}/fdinfo")).into_iter().flatten().flatten();
    descriptors
        .filter_map(|descriptor| fs::read_to_string(descriptor.path()).ok())
        .map(|text| {
            let fields = text.lines().filter_map(|line| line.split_once(':'));
            fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect::<BTreeMap<_, _>>()
        })
        .filter(|fields| fields.contains_key("prog_id") || fields.contains_key("map_id"))
        .collect()
}

fn measure(workspace: &Path, workloads: &[Workload]) -> Outcome {
    let daemon = Daemon::start(workspace, &["--frequency", FREQUENCY])?;
    let idle_resident = daemon.status_kib("VmRSS:");
    println!();
    println!(
        "| program on every CPU | samples | kernel program, µs a sample | agent, % of one CPU | resident, MiB | rooted, % | other ends |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut results = Vec::new();
    for workload in workloads {
        let measured = measure_one(&daemon, workload)?;
        let ends: Vec<String> = measured.ends.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        println!(
            "| {} | {} | {:.2} | {:.2} | {:.1} | {:.3} | {} |",
            workload.name,
            measured.samples,
            measured.ns_per_sample / 1000.0,
            100.0 * measured.agent_cpu,
            measured.resident as f64 / 1024.0,
            100.0 * measured.rooted,
            ends.join(", ")
        );
        results.push((workload.frames, measured));
    }
    summary(&daemon, &results, idle_resident)
}

fn measure_one(daemon: &Daemon, workload: &Workload) -> Result<Measured, String> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let (program, arguments) = workload.command.split_first().ok_or("a workload without a command")?;
    let mut running = Vec::new();
    for _ in 0..cpus {
        let mut command = Command::new(program);
        let quiet = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        running.push(quiet.spawn().map_err(|error| format!("{program} cannot be started: {error}"))?);
    }
    thread::sleep(LEARNING);
    let (metrics, sampling, cpu, started) =
        (metrics()?, daemon.sampling(), metric("cpu_seconds_total")?, Instant::now());
    thread::sleep(MEASURED);
    let after = self::metrics()?;
    let (time, runs) = daemon.sampling();
    let elapsed = started.elapsed().as_secs_f64();
    for child in &mut running {
        // It ends by itself soon.
        let _ = child.wait();
    }
    let difference = |name: &str| {
        let value = |page: &BTreeMap<String, f64>| page.get(name).copied().unwrap_or_default();
        (value(&after) - value(&metrics)) as u64
    };
    let runs = runs.saturating_sub(sampling.1).max(1);
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    for name in after.keys() {
        if let Some(reason) = name.strip_prefix("stack_ends_total{reason=\"") {
            ends.insert(reason.trim_end_matches("\"}").to_owned(), difference(name));
        }
    }
    ends.remove("kernel thread");
    let whole = ends.remove("root").unwrap_or_default();
    ends.retain(|_, count| *count > 0);
    let others: u64 = ends.values().sum();
    Ok(Measured {
        samples: difference("samples_seen_total"),
        ns_per_sample: time.saturating_sub(sampling.0) as f64 / runs as f64,
        agent_cpu: (after.get("cpu_seconds_total").copied().unwrap_or_default() - cpu) / elapsed,
        resident: daemon.status_kib("VmRSS:"),
        rooted: whole as f64 / (whole + others).max(1) as f64,
        ends,
    })
}

fn summary(daemon: &Daemon, results: &[(Option<u64>, Measured)], idle_resident: u64) -> Outcome {
    let cost = |frames: u64| {
        results.iter().find(|(candidate, _)| *candidate == Some(frames)).map(|(_, measured)| measured.ns_per_sample)
    };
    let page = metrics()?;
    let value = |name: &str| page.get(name).copied().unwrap_or_default();
    println!("\n| what | value |\n|---|---|");
    if let (Some(short), Some(long)) = (cost(28), cost(118)) {
        println!("| kernel program, ns a frame (from 28 to 118 frames) | {:.0} |", (long - short) / 90.0);
    }
    let seconds = value("unwind_table_build_seconds_total");
    let rows = value("unwind_table_rows_built_total");
    println!("| unwind tables built | {} with {rows} rows in {seconds:.3} s |", value("unwind_tables_built_total"));
    println!("| rows built a second | {:.2} million |", rows / seconds.max(1e-9) / 1e6);
    println!("| different unwind rules | {} |", value("unwind_rules"));
    println!("| resident before the first program, MiB | {:.1} |", idle_resident as f64 / 1024.0);
    println!("| resident at most, MiB | {:.1} |", daemon.status_kib("VmHWM:") as f64 / 1024.0);
    let objects = bpf_objects(daemon.agent.id());
    let memory = |key: &str| -> u64 {
        let of_kind = objects.iter().filter(|fields| fields.contains_key(key));
        of_kind.filter_map(|fields| fields.get("memlock")).map(|bytes| number(bytes)).sum()
    };
    println!("| kernel memory of maps, MiB | {:.1} |", memory("map_id") as f64 / f64::from(1 << 20));
    println!("| kernel memory of programs, MiB | {:.2} |", memory("prog_id") as f64 / f64::from(1 << 20));
    let verified: Vec<u64> =
        objects.iter().filter_map(|fields| fields.get("verified_insns")).map(|value| number(value)).collect();
    println!("| instructions verified, largest program | {} |", verified.iter().max().copied().unwrap_or_default());
    println!("| instructions verified, all programs | {} |", verified.iter().sum::<u64>());
    Ok(())
}

/// Kernel, CPUs and memory, in one line.
fn machine() -> String {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        model.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("", |(_, name)| name);
    let commit = output(Command::new("git").args(["rev-parse", "--short", "HEAD"])).unwrap_or_default();
    format!("Linux {}, {cpus} × {model}, {FREQUENCY} Hz, commit {}", kernel.trim(), commit.trim())
}

/// The daemon's metrics by name and labels, without their prefix.
fn metrics() -> Result<BTreeMap<String, f64>, String> {
    let page = page("/metrics").map_err(|error| format!("the daemon's metrics cannot be read: {error}"))?;
    Ok(page
        .lines()
        .filter_map(|line| line.strip_prefix("profiler_agent_")?.rsplit_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
        .collect())
}

fn metric(name: &str) -> Result<f64, String> {
    metrics()?.get(name).copied().ok_or_else(|| format!("the daemon has no metric {name}"))
}

fn page(path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(STATUS)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {STATUS}\r\nConnection: close\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// The first number in a text; zero where there is none.
fn number(text: &str) -> u64 {
    let digits = text.trim_start().split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or_default()
}

fn write(path: &str, text: &str) -> Outcome {
    fs::write(path, text).map_err(|error| format!("{path}: {error}"))
}

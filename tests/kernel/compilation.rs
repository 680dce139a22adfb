//! The machine while it compiles: thousands of functions a second, in the largest files that machines commonly run. What
//! does naming them cost?

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent, eventually, free_port, kernel_is_usable, metric, peak_memory, record,
    recorded::{Sample, samples},
    scratch, workspace,
};

const MIB: f64 = 1024.0 * 1024.0;
/// What the agent may take while it records such a machine.
const MOST_RESIDENT_MIB: u64 = 96;
/// What the daemon's named frames may take, and its symbols, each.
const BUDGET_MIB: f64 = 16.0;

/// Starts to compile what these tests are made of, anew.
fn compile(test: &str) -> Background {
    let folder = scratch(test);
    let mut command = Command::new("cargo");
    command.args(["build", "--offline", "--quiet", "--package", "profiler-tests", "--target-dir"]).arg(folder);
    // It is ended as a group: cargo's compilers would outlive it.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    Background::start(command.current_dir(workspace()))
}

/// Ends a compilation with all its compilers, and removes what they have made.
fn end(test: &str, compilation: Background) {
    let group = i32::try_from(compilation.pid()).expect("a PID");
    // An error means that it has ended.
    let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(group), Signal::SIGKILL);
    drop(compilation);
    scratch(test);
}

/// Frames of code in files with and without a name, weighted by samples.
fn named_and_not(samples: &[Sample]) -> (u64, u64) {
    let (mut named, mut nameless) = (0, 0);
    for sample in samples {
        for frame in sample.frames.iter().filter(|frame| !frame.file.is_empty()) {
            *if frame.name.is_some() { &mut named } else { &mut nameless } += sample.count;
        }
    }
    (named, nameless)
}

/// Ten seconds of a compilation into a file: memory, and what was read how often, are told.
#[test]
fn recording_a_compilation() {
    if !kernel_is_usable() {
        return;
    }
    let compilation = compile("compilation");
    let recording = scratch("compilation-recording").join("machine.otlp");
    let arguments = record(&["--duration", "10s", "--output"]);
    let mut command = Command::new(agent());
    command.args(["--log-level", "debug"]).args(arguments.get_args()).arg(&recording);
    let log = recording.with_extension("log");
    let mut recorder = Background(command.stderr(fs::File::create(&log).expect("a log")).spawn().expect("the agent"));
    let mut most = 0;
    let started = Instant::now();
    let status = eventually("the end of the recording", Duration::from_secs(90), || {
        most = most.max(peak_memory(recorder.pid()));
        recorder.0.try_wait().expect("a child")
    });
    let took = started.elapsed();
    end("compilation", compilation);
    let log = fs::read_to_string(&log).expect("the log");
    assert!(status.success(), "{log}");
    let told = log.lines().find(|line| line.contains(" frames named in ")).expect("what naming cost");
    println!("{}", log.lines().last().unwrap_or_default());
    println!("{}", told.split_once("DEBUG").map_or(told, |(_, told)| told.trim()));
    let (named, nameless) = named_and_not(&samples(&fs::read(&recording).expect("the recording")));
    println!("by samples: {named} frames with names, {nameless} without");
    println!("{most} MiB resident at most; it took {:.1} s in all", took.as_secs_f64());
    assert!(most <= MOST_RESIDENT_MIB, "{most} MiB resident");
    let number = |after: &str| {
        let digits = told.split_once(after)?.1;
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok()
    };
    assert_eq!(number(" files read, "), Some(0), "{told}");
}

/// The daemon through four windows of the same: its names are within their budget at all times.
#[test]
fn following_a_compilation() {
    if !kernel_is_usable() {
        return;
    }
    let compilation = compile("compilation");
    let status = free_port();
    let daemon = Background::start(
        Command::new(agent())
            .args([
                "run",
                "--budget-cpu",
                "100%",
                "--window",
                "5s",
                "--endpoint",
                &format!("http://127.0.0.1:{}", free_port()),
            ])
            .args(["--status-listen", &format!("127.0.0.1:{status}")]),
    );
    eventually("the daemon", Duration::from_secs(10), || {
        metric(status, "profiler_agent_cpus_sampled").filter(|&cpus| cpus > 0.0)
    });
    let value =
        |name: &str| eventually(name, Duration::from_secs(10), || metric(status, &format!("profiler_agent_{name}")));
    let (mut symbols, mut frames) = (0.0f64, 0.0f64);
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(250));
        symbols = symbols.max(value("symbol_bytes"));
        frames = frames.max(value("frame_cache_bytes"));
    }
    let [read, again, evicted, named, unnamed, seconds] = [
        "symbols_read_total",
        "symbols_read_again_total",
        "symbols_evicted_total",
        "frames_named_total",
        "frames_unnamed_total",
        "naming_seconds_total",
    ]
    .map(value);
    let most = peak_memory(daemon.pid());
    end("compilation", compilation);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.finish().status.success());
    println!(
        "symbols took at most {:.1} MiB, frames {:.1} MiB, {most} MiB resident at most",
        symbols / MIB,
        frames / MIB
    );
    println!("{named} frames named, {unnamed} not, in {seconds:.3} s");
    println!("symbols of {read} files read, {again} of them again, {evicted} evicted");
    assert!(symbols <= BUDGET_MIB * MIB && frames <= BUDGET_MIB * MIB);
    assert!(most <= MOST_RESIDENT_MIB, "{most} MiB resident");
    assert!(named > 1000.0);
}

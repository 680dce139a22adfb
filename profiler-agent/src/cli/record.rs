//! `profiler-agent record`: a recording into a file.

use std::{
    fs,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use profiler_common::abi::{counter::Counter, sample::EventKind, settings::target};
use tokio::sync::mpsc;
use tracing::info;

use super::{debuginfod::DebuginfodOptions, labels, logging::Logging, output::Output};
use crate::{
    config::{DEFAULT_FREQUENCY, DEFAULT_WAITS, dwarf_bytes, valid_frequency},
    export::Format,
    kernel::{
        self, BufferRows, Kernel, WaitOptions,
        privileges::{self, Holder},
    },
    pipeline::{self, DRAIN_INTERVAL, LAST_PATIENCE, PROFILE_QUEUE, Pace, Pipeline, rows_per_second},
    process::children_of,
    profile::{Events, Profile},
    scope,
    status::Stats,
    symbolize::{
        SourceOptions,
        debuginfod::{self, Debuginfod},
    },
    unwind_info::DEFAULT_TABLE_BYTES,
};

const DEFAULT_DURATION: Duration = Duration::from_secs(10);
const NAMES_BYTES: usize = 64 << 20;
/// How long a command that outlives the recording may take to end after being asked to.
const END_GRACE: Duration = Duration::from_secs(2);

/// Record the whole machine, some processes, or a command, into a file.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Record this process and the children it starts; may be given several times.
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<u32>,
    /// How long to record, for example 10s or 2m. With a command, the default is until it ends; without one, 10s.
    /// A command that is still running then is ended.
    #[arg(long, value_parser = parse_duration)]
    duration: Option<Duration>,
    /// Samples per second and CPU.
    #[arg(long, default_value_t = DEFAULT_FREQUENCY)]
    frequency: u64,
    /// What to record.
    #[arg(long, value_enum, default_value = "on-cpu")]
    event: Events,
    /// Stacks of waits that each CPU may take per second; 0: every wait's. Waits that are not sampled are
    /// represented by others.
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_WAITS.stacks_per_second)]
    wait_stacks: u32,
    /// Leave out waits that are shorter than this, for example 1ms.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "0s")]
    min_wait: Duration,
    #[command(flatten)]
    debuginfod: DebuginfodOptions,
    /// Look for source files and lines: in debug information, and in Go's tables.
    #[arg(long)]
    lines: bool,
    /// Show functions that the compiler inlined as frames of their own.
    #[arg(long)]
    inlines: bool,
    /// Most memory for debug information, MiB, where lines or inlined functions are looked for [default: 256].
    #[arg(long, value_name = "MIB")]
    dwarf_mib: Option<u32>,
    /// Form of the output; by default what its name ends in says (.svg, .folded, .pb.gz, .otlp).
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// File to write; `-` is standard output. By default `profile` with the format's ending.
    #[arg(long, short)]
    output: Option<PathBuf>,
    /// The kernel's type information, where it is not in its usual place.
    #[arg(long, value_name = "FILE", default_value = kernel::DEFAULT_BTF, hide = true)]
    btf: PathBuf,
    /// Walk stacks as on kernels without bpf_loop.
    #[arg(long, hide = true)]
    walk_in_parts: bool,
    /// Watch threads wake up, as on kernels whose scheduler keeps no books of it.
    #[arg(long, hide = true)]
    watch_wakeups: bool,
    /// Tell cgroups apart by the second version's hierarchy, whatever containers use.
    #[arg(long, hide = true)]
    unified_cgroups: bool,
    /// A command to start and record, with everything it starts.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<std::ffi::OsString>,
}

const EXAMPLES: &str = "\
Examples:
  profiler-agent record --output machine.svg
  profiler-agent record --duration 30s --pid 1234 --pid 5678 --output app.pb.gz
  profiler-agent record --lines --inlines --output app.pb.gz -- ./app
  profiler-agent record --format folded --output - | sort -k2 -n
  profiler-agent record --output build.svg -- make -j8
Ctrl-C ends a recording early; what was recorded is written.";

/// Arguments, checked.
struct Recording {
    pids: Vec<u32>,
    duration: Option<Duration>,
    frequency: u64,
    events: Events,
    waits: WaitOptions,
    debuginfod: Option<debuginfod::Settings>,
    source: SourceOptions,
    format: Format,
    output: Output,
    btf: PathBuf,
    walk_in_parts: bool,
    watch_wakeups: bool,
    unified_cgroups: bool,
    command: Vec<std::ffi::OsString>,
}

impl Arguments {
    fn validate(self) -> anyhow::Result<Recording> {
        let frequency = valid_frequency(self.frequency)?;
        for &pid in &self.pids {
            check_pid(pid)?;
        }
        if self.duration.is_some_and(|duration| duration.is_zero()) {
            bail!("a recording needs a duration above zero");
        }
        let (path, format) = match (self.output, self.format) {
            (Some(path), Some(format)) => (path, format),
            (Some(path), None) if path == Path::new("-") => (path, Format::Folded),
            (Some(path), None) => {
                let format = Format::of_file_name(&path).with_context(|| {
                    format!(
                        "the format cannot be told from the name {:?}; use --format, or a name that ends in \
                         .svg, .folded, .pb.gz or .otlp",
                        path.display().to_string()
                    )
                })?;
                (path, format)
            }
            (None, format) => {
                let format = format.unwrap_or(Format::Svg);
                let name = match format {
                    Format::Folded => "profile.folded",
                    Format::Pprof => "profile.pb.gz",
                    Format::Svg => "profile.svg",
                    Format::Otlp => "profile.otlp",
                };
                (PathBuf::from(name), format)
            }
        };
        let debuginfod = self.debuginfod.settings().validate()?;
        let bytes = dwarf_bytes(self.dwarf_mib)?;
        privileges::check()?;
        // Whether it can be used, before anything is begun; who asks servers is started without privileges.
        if let Some(settings) = &debuginfod {
            settings.check().context("debuginfod cannot be used")?;
        }
        Ok(Recording {
            pids: self.pids,
            duration: self.duration,
            frequency,
            events: self.event,
            waits: WaitOptions { stacks_per_second: self.wait_stacks, min_duration: self.min_wait },
            debuginfod,
            source: SourceOptions { lines: self.lines, inlines: self.inlines, bytes },
            format,
            output: Output::open(path)?,
            btf: self.btf,
            walk_in_parts: self.walk_in_parts,
            watch_wakeups: self.watch_wakeups,
            unified_cgroups: self.unified_cgroups,
            command: self.command,
        })
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "expected a duration such as 10s, 500ms or 2m".to_owned())
}

/// A PID that names no process is a mistake worth a sentence; so is a thread's.
pub(super) fn check_pid(pid: u32) -> anyhow::Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .map_err(|_| anyhow::anyhow!("there is no process with PID {pid}"))?;
    let tgid = status.lines().find_map(|line| line.strip_prefix("Tgid:")).map(str::trim);
    match tgid {
        Some(tgid) if tgid != pid.to_string() => bail!("{pid} is a thread of process {tgid}; use --pid {tgid}"),
        _ => Ok(()),
    }
}

pub(super) fn main(arguments: Arguments, logging: Logging) -> anyhow::Result<ExitCode> {
    let mut recording = arguments.validate()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the event loop could not be started")?;
    runtime.block_on(record(&mut recording, logging))
}

async fn record(recording: &mut Recording, logging: Logging) -> anyhow::Result<ExitCode> {
    use tokio::signal::unix::{SignalKind, signal};
    // Signals are caught before anything starts, so that none of them can lose the recording.
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;

    let stats = Arc::new(Stats::default());
    let (kernel, mut child) = start_sampling(recording, logging)?;
    let started = Instant::now();
    // The command has what its user has, and we keep what we need: nothing of any process was read so far.
    privileges::give_up(Holder::Recording { of_command: child.is_some() }).context("privileges cannot be given up")?;
    let debuginfod = recording.debuginfod.take().map(Debuginfod::start).transpose();
    let debuginfod = debuginfod.context("debuginfod cannot be used")?.map(Arc::new);
    match kernel.clock() {
        Some(clock) => info!(
            "sampling {} CPUs at {} Hz by {}",
            clock.cpus(),
            recording.frequency,
            clock.source().map_or_else(String::new, |source| source.to_string()),
        ),
        None => info!("following waits"),
    }
    let mut watch = recording.pids.clone();
    watch.extend(child.as_ref().map(Child::id));
    let options = pipeline::Options {
        events: recording.events,
        pace: Pace {
            collects: true,
            frequency: recording.frequency,
            wait_stacks: recording.waits.stacks_per_second,
            wait_share: Some(0),
            scale: 1.0,
            replicas: None,
            detail: true,
            names_bytes: NAMES_BYTES,
            marks: Arc::default(),
        },
        window: None,
        patience: LAST_PATIENCE,
        ending: Arc::default(),
        debuginfod,
        source: recording.source,
        unwind_table_bytes: DEFAULT_TABLE_BYTES,
        allowance: Arc::default(),
        labels: labels::of_recording(&stats),
        scope: scope::Rules::default(),
        watch: (!watch.is_empty()).then_some(watch),
    };
    let (sender, mut profiles) = mpsc::channel(PROFILE_QUEUE);
    let mut pipeline = Pipeline::start(kernel, options, sender, &stats)?;

    let duration = match (recording.duration, child.is_some() || !recording.pids.is_empty()) {
        (Some(duration), _) => Some(duration),
        (None, true) if child.is_some() => None,
        (None, _) => Some(DEFAULT_DURATION),
    };
    let mut collected: Vec<Profile> = Vec::new();
    let progress = progress_bar(duration);
    let deadline = async {
        match duration {
            Some(duration) => tokio::time::sleep(duration.saturating_sub(started.elapsed())).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(deadline);
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    let reason = loop {
        tokio::select! {
            () = &mut deadline => break "",
            _ = interrupt.recv() => break " (interrupted)",
            _ = terminate.recv() => break " (terminated)",
            exited = &mut pipeline.watched_exited => match exited {
                Ok(()) => break " (the recorded processes ended)",
                // The collector ended by itself: its error comes out of `join`.
                Err(_) => break " (collection ended)",
            },
            _ = ticks.tick() => {
                progress.set_position(millis(started.elapsed()));
                if child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_)))) {
                    break " (the command ended)";
                }
            }
            Some(profile) = profiles.recv() => collected.push(profile),
        }
    };
    let elapsed = started.elapsed();
    progress.finish_and_clear();
    pipeline.stop();
    while let Some(profile) = profiles.recv().await {
        collected.push(profile);
    }
    let outcome = pipeline.join();
    if let Some(child) = &mut child {
        end_command(child);
    }

    let profile = merge(collected, recording, elapsed);
    let bytes = recording.format.encode(&profile)?;
    recording.output.write(&bytes)?;
    stats.recorded.add(profile.total());
    eprintln!("{}", summary(&profile, &stats, elapsed, reason, &recording.output));
    outcome?;
    Ok(ExitCode::SUCCESS)
}

/// Loads and starts the kernel side, and the command if there is one.
fn start_sampling(recording: &Recording, logging: Logging) -> anyhow::Result<(Kernel, Option<Child>)> {
    let limited = !recording.pids.is_empty() || !recording.command.is_empty();
    let cpus = kernel::online_cpus().map_or(1, |cpus| cpus.len());
    let mut kernel = Kernel::load(&kernel::Options {
        btf: &recording.btf,
        events: recording.events,
        frequency: recording.frequency,
        waits: recording.waits,
        targets_only: limited,
        rows: BufferRows::for_rate(
            cpus,
            rows_per_second(recording.events, recording.frequency),
            DRAIN_INTERVAL.as_secs(),
        ),
        cgroups: if recording.unified_cgroups {
            kernel::CgroupHierarchy::Unified
        } else {
            kernel::CgroupHierarchy::of_machine()
        },
        debug_log: logging.kernel_debug,
        walk_in_parts: recording.walk_in_parts,
        watch_wakeups: recording.watch_wakeups,
        attachments: kernel::Attachments::default(),
    })?;
    kernel.attach_notices()?;
    for &pid in &recording.pids {
        kernel.set_target(pid, target::SAMPLE | target::FOLLOW)?;
    }
    // Children that exist already: read after the fork notices are attached, so that none falls in between.
    // Repeated, because a child may fork between being listed and becoming a target.
    let mut known = recording.pids.clone();
    loop {
        let new = children_of(&known);
        if new.is_empty() {
            break;
        }
        for &pid in &new {
            kernel.set_target(pid, target::SAMPLE | target::FOLLOW)?;
        }
        known.extend(new);
    }
    if recording.command.is_empty() {
        kernel.start()?;
        return Ok((kernel, None));
    }
    // Our own children are recorded while the command starts, but not we ourselves.
    let own = std::process::id();
    kernel.set_target(own, target::FOLLOW)?;
    kernel.start()?;
    let child = Command::new(&recording.command[0])
        .args(&recording.command[1..])
        .spawn()
        .with_context(|| format!("{} cannot be started", recording.command[0].display()))?;
    kernel.remove_target(own)?;
    Ok((kernel, Some(child)))
}

/// A command that outlives its recording was only started for it: it is asked to end, then made to.
fn end_command(child: &mut Child) {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    let exited = |child: &mut Child| matches!(child.try_wait(), Ok(Some(_)) | Err(_));
    if exited(child) {
        return;
    }
    if let Ok(pid) = i32::try_from(child.id()) {
        // An error means that it has just ended.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let deadline = Instant::now() + END_GRACE;
    while !exited(child) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    if !exited(child) {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A bar on a terminal, nothing in a pipe.
fn progress_bar(duration: Option<Duration>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    match duration {
        Some(duration) => ProgressBar::new(millis(duration)).with_style(
            ProgressStyle::with_template("recording {bar:40} {elapsed} of {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        ),
        None => ProgressBar::new_spinner(),
    }
    .with_message(duration.map_or_else(String::new, |duration| humantime::format_duration(duration).to_string()))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// One profile out of the windows that were closed early because they were full.
fn merge(profiles: Vec<Profile>, recording: &Recording, duration: Duration) -> Profile {
    let mut profiles = profiles.into_iter();
    let mut merged = profiles.next().unwrap_or_else(|| Profile {
        events: recording.events,
        start: std::time::SystemTime::now(),
        duration,
        period: Duration::from_nanos(1_000_000_000 / recording.frequency),
        marks: Arc::default(),
        samples: Vec::new(),
    });
    for profile in profiles {
        merged.samples.extend(profile.samples);
    }
    merged.duration = duration;
    merged
}

/// The last lines: what was recorded, and what was not.
fn summary(profile: &Profile, stats: &Stats, elapsed: Duration, reason: &str, output: &Output) -> String {
    let total = profile.total();
    let mut text = format!("recorded {:.1} s{reason}: ", elapsed.as_secs_f64());
    let stacks = format!("{} stacks to {}", profile.samples.len(), output.name());
    if profile.events.includes_off_cpu() {
        let (_, totals) = stats.waits();
        let seconds = |kind: EventKind| Duration::from_nanos(totals.waited_ns[kind as usize]).as_secs_f64();
        text += &format!(
            "{} waits ended, {} of them sampled; {:.3} s blocked, {:.3} s uninterruptible, {:.3} s for a CPU, \
             {:.3} s exported, {:.3} s lost",
            totals.ended,
            stats.kernel(Counter::WaitsSampled),
            seconds(EventKind::Blocked),
            seconds(EventKind::Uninterruptible),
            seconds(EventKind::RunQueue),
            total.off_cpu().as_secs_f64(),
            Duration::from_nanos(stats.kernel(Counter::WaitsLostNs) + stats.dropped_in_all().off_cpu_ns).as_secs_f64(),
        );
        text += if profile.events.includes_on_cpu() { "; " } else { "; in " };
    }
    if profile.events.includes_on_cpu() {
        text += &format!(
            "{} samples in {stacks}; seen {} = exported {} + lost {}",
            total.samples,
            stats.kernel(Counter::Seen),
            stats.recorded.get().samples,
            stats.lost_in_kernel() + stats.dropped_in_all().samples,
        );
    } else {
        text += &stacks;
    }
    text
}

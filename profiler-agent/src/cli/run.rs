//! `profiler-agent run`: the daemon.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Args;
use profiler_common::abi::counter::Counter;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tracing::{info, warn};

use super::{debuginfod::DebuginfodOptions, export::ExportOptions, logging::Logging};
use crate::{
    config::{Config, Overrides},
    export::otlp::{self, Client},
    kernel::{self, BufferRows, Clock, Kernel, privileges},
    pipeline::{self, DRAIN_INTERVAL, Pipeline, rows_per_second},
    profile::{Events, Profile},
    status::{self, Stats},
    symbolize::debuginfod::Debuginfod,
};

/// Times a request is sent before its samples are given up.
const SEND_ATTEMPTS: u32 = 5;
/// Pause before the first repetition; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// How long the last window may take to be delivered at shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);

/// Run the daemon: sample all the time, export over OTLP, serve status on the loopback interface.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// YAML configuration file. Flags and environment override it.
    #[arg(long, env = "PROFILER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Samples per second and CPU.
    #[arg(long, env = "PROFILER_FREQUENCY")]
    frequency: Option<u64>,
    /// What to record.
    #[arg(long, value_enum, env = "PROFILER_EVENT")]
    event: Option<Events>,
    /// Stacks of waits that each CPU may take per second; 0: every wait's. Waits that are not sampled are
    /// represented by others.
    #[arg(long, env = "PROFILER_WAIT_STACKS", value_name = "NUMBER")]
    wait_stacks: Option<u32>,
    /// Leave out waits that are shorter than this, for example 1ms.
    #[arg(long, env = "PROFILER_MIN_WAIT", value_name = "DURATION", value_parser = humantime::parse_duration)]
    min_wait: Option<Duration>,
    /// Most kernel memory for the rows of unwind tables, MiB. What does not fit is evicted by least use.
    #[arg(long, env = "PROFILER_UNWIND_TABLE_MIB", value_name = "MIB")]
    unwind_table_mib: Option<u32>,
    #[command(flatten)]
    debuginfod: DebuginfodOptions,
    /// Look for source files and lines: in debug information, and in Go's tables.
    #[arg(long, env = "PROFILER_LINES", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    lines: Option<bool>,
    /// Show functions that the compiler inlined as frames of their own.
    #[arg(long, env = "PROFILER_INLINES", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    inlines: Option<bool>,
    /// Most memory for debug information, MiB, where lines or inlined functions are looked for.
    #[arg(long, env = "PROFILER_DWARF_MIB", value_name = "MIB")]
    dwarf_mib: Option<u32>,
    /// Most memory for names, MiB: named frames, symbols of files, and what processes say of code they make.
    #[arg(long, env = "PROFILER_NAMES_MIB", value_name = "MIB")]
    names_mib: Option<u32>,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, env = "PROFILER_STATUS_LISTEN", value_name = "ADDRESS")]
    status_listen: Option<SocketAddr>,
    /// The kernel's type information, where it is not in its usual place.
    #[arg(long, value_name = "FILE", default_value = kernel::DEFAULT_BTF, hide = true)]
    btf: PathBuf,
    #[command(flatten)]
    export: ExportOptions,
}

const EXAMPLES: &str = "\
Examples:
  profiler-agent run
  profiler-agent run --config /etc/profiler/agent.yaml
  OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317 profiler-agent run --log-format json

Configuration file, with the defaults:
  sampling:
    frequency: 99
    event: on-cpu
    wait_stacks: 50
    min_wait: 0s
  unwind:
    table_mib: 64
  symbolize:
    lines: false
    inlines: false
    dwarf_mib: 256
    names_mib: 32
    debuginfod:
      urls: []
      cache: /var/cache/profiler-agent/debuginfod
      cache_mib: 1024
  export:
    window: 15s
    endpoint: http://127.0.0.1:4317
    queue_mib: 16
    original_payload: false
  status:
    listen: 127.0.0.1:7081

Several destinations take the place of export.endpoint, each with its own queue; files and the spool need folders:
  export:
    destinations:
      - name: central
        endpoint: https://collector.example:4317
        protocol: grpc
        compression: gzip
        timeout: 10s
        headers: {x-scope-orgid: team}
        bearer_token_file: /var/run/secrets/token
        tls: {ca_file: ca.pem, cert_file: tls.crt, key_file: tls.key}
    spool: {folder: /var/lib/profiler-agent/spool, mib: 512, max_age: 24h}
    files: {folder: /var/lib/profiler-agent/profiles, format: pprof, mib: 1024}

SIGINT and SIGTERM stop the daemon; the last window is exported first.";

pub(super) fn main(arguments: Arguments, logging: Logging) -> anyhow::Result<ExitCode> {
    let overrides = Overrides {
        frequency: arguments.frequency,
        events: arguments.event,
        wait_stacks: arguments.wait_stacks,
        min_wait: arguments.min_wait,
        table_mib: arguments.unwind_table_mib,
        debuginfod: arguments.debuginfod.settings(),
        lines: arguments.lines,
        inlines: arguments.inlines,
        dwarf_mib: arguments.dwarf_mib,
        names_mib: arguments.names_mib,
        export: arguments.export.overrides()?,
        status: arguments.status_listen,
    };
    let config = Config::load(arguments.config.as_deref(), overrides)?;
    privileges::check()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the event loop could not be started")?;
    runtime.block_on(run(config, &arguments.btf, logging))
}

async fn run(config: Config, btf: &std::path::Path, logging: Logging) -> anyhow::Result<ExitCode> {
    use tokio::signal::unix::{SignalKind, signal};
    let started = std::time::Instant::now();
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
    let destination = config.export.destinations.first().cloned().context("there is no destination")?;
    let client = Client::new(destination).context("the destination cannot be used")?;
    let debuginfod = config.debuginfod.map(Debuginfod::start).transpose().context("debuginfod cannot be used")?;
    let listener = TcpListener::bind(config.status)
        .await
        .with_context(|| format!("the status endpoint cannot listen on {}", config.status))?;

    let stats = Arc::new(Stats::default());
    let status = tokio::spawn(status::serve(listener, Arc::clone(&stats)));
    let cpus = kernel::online_cpus().map_or(1, |cpus| cpus.len());
    let mut kernel = Kernel::load(&kernel::Options {
        btf,
        events: config.events,
        waits: config.waits,
        frequency: config.frequency,
        targets_only: false,
        rows: BufferRows::for_rate(cpus, rows_per_second(config.events, config.frequency), DRAIN_INTERVAL.as_secs()),
        debug_log: logging.kernel_debug,
        walk_in_parts: false,
        watch_wakeups: false,
    })?;
    kernel.attach_notices()?;
    kernel.start()?;
    let cpu_time = kernel.clock().map(|clock| {
        let source = clock.source().map_or_else(String::new, |source| source.to_string());
        format!("sampling {} CPUs at {} Hz by {source}", clock.cpus(), config.frequency)
    });
    let waits = config.events.includes_off_cpu().then(|| "following waits".to_owned());
    info!(
        "{}, {} ms after start; exporting to {} every {}; status on http://{}/metrics",
        [cpu_time, waits].into_iter().flatten().collect::<Vec<_>>().join(" and "),
        started.elapsed().as_millis(),
        client.settings().endpoint,
        humantime::format_duration(config.export.window),
        config.status,
    );
    stats.set_clock(kernel.clock().map_or(0, Clock::cpus));
    let options = pipeline::Options {
        events: config.events,
        period: Duration::from_nanos(1_000_000_000 / config.frequency),
        window: Some(config.export.window),
        names_bytes: config.names_bytes,
        debuginfod: debuginfod.map(Arc::new),
        source: config.source,
        unwind_table_bytes: config.table_bytes,
        watch: None,
    };
    let (mut pipeline, profiles) = Pipeline::start(kernel, options, &stats)?;
    stats.set_ready(true);
    let (give_up, given_up) = watch::channel(false);
    let mut exporter = tokio::spawn(export(client, profiles, Arc::clone(&stats), given_up));

    tokio::select! {
        _ = interrupt.recv() => info!("interrupted: exporting the last window"),
        _ = terminate.recv() => info!("terminated: exporting the last window"),
        // The queue of profiles closes by itself only when collection failed.
        _ = &mut exporter => {}
    }
    stats.set_ready(false);
    pipeline.stop();
    if !exporter.is_finished() && tokio::time::timeout(FLUSH_TIMEOUT, &mut exporter).await.is_err() {
        warn!("not everything could be delivered within {FLUSH_TIMEOUT:?}");
        // It counts what it still has, and ends. An error means that it has just ended.
        let _ = give_up.send(true);
        let _ = exporter.await;
    }
    let outcome = pipeline.join();
    status.abort();
    info!(
        "stopped: seen {}, exported {}, lost in kernel {}, dropped {}",
        stats.kernel(Counter::Seen),
        stats.exported.get().samples,
        stats.lost_in_kernel(),
        stats.dropped_in_all().samples,
    );
    if config.events.includes_off_cpu() {
        info!(
            "off the CPU: exported {:.3} s, lost in kernel {:.3} s, dropped {:.3} s",
            stats.exported.get().off_cpu().as_secs_f64(),
            Duration::from_nanos(stats.kernel(Counter::WaitsLostNs)).as_secs_f64(),
            stats.dropped_in_all().off_cpu().as_secs_f64(),
        );
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Sends every profile that comes, in order, until the queue closes; once told to give up, counts them instead.
async fn export(
    mut client: Client,
    mut profiles: mpsc::Receiver<Profile>,
    stats: Arc<Stats>,
    mut given_up: watch::Receiver<bool>,
) {
    let mut reachable = true;
    while let Some(profile) = profiles.recv().await {
        for request in otlp::requests(&profile, &otlp::Options::default()) {
            let (tally, sent) = (request.tally, request.profiles as usize);
            let outcome = tokio::select! {
                biased;
                _ = given_up.wait_for(|&given_up| given_up) => {
                    stats.dropped_at_shutdown.add(tally);
                    continue;
                }
                outcome = send(&mut client, request, &stats) => outcome,
            };
            match outcome {
                Ok(rejected) => {
                    let rejected = usize::try_from(rejected).unwrap_or_default();
                    stats.profiles_rejected.add(rejected as u64);
                    // (Which samples a partial rejection hit is not said; all of them is the only sure case.)
                    let counter = if rejected >= sent { &stats.dropped_refused } else { &stats.exported };
                    counter.add(tally);
                    if !reachable {
                        info!("{} accepts profiles again", client.settings().endpoint);
                    }
                    reachable = true;
                }
                Err(error) => {
                    stats.dropped_refused.add(tally);
                    if reachable {
                        warn!("{tally} were dropped: {}: {error}", client.settings().endpoint);
                    }
                    reachable = false;
                }
            }
        }
    }
}

async fn send(client: &mut Client, request: otlp::Request, stats: &Stats) -> Result<u64, otlp::client::Failure> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..SEND_ATTEMPTS {
        match client.send(&request).await {
            Err(error) if error.is_retryable() => {
                stats.export_retries.add(1);
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            outcome => return outcome.map(|accepted| accepted.rejected_profiles),
        }
    }
    client.send(&request).await.map(|accepted| accepted.rejected_profiles)
}

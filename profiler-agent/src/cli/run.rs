//! `profiler-agent run`: the daemon.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Args;
use profiler_common::abi::counter::Counter;
use tokio::net::TcpListener;
use tracing::info;

use super::{
    debuginfod::DebuginfodOptions,
    export::ExportOptions,
    labels::{self, KubernetesOptions, LabelOptions},
    logging::Logging,
};
use crate::{
    config::{self, Config, FileFormat, Overrides},
    export::{
        self, Format,
        delivery::{self, Delivery},
        files, otlp,
    },
    kernel::{self, BufferRows, Clock, Kernel, privileges},
    pipeline::{self, DRAIN_INTERVAL, Pipeline, rows_per_second},
    profile::Events,
    status::{self, Stats},
    symbolize::debuginfod::Debuginfod,
};

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
    /// Address of /metrics, /healthz, /readyz and /debug/state.
    #[arg(long, env = "PROFILER_STATUS_LISTEN", value_name = "ADDRESS")]
    status_listen: Option<SocketAddr>,
    /// The kernel's type information, where it is not in its usual place.
    #[arg(long, value_name = "FILE", default_value = kernel::DEFAULT_BTF, hide = true)]
    btf: PathBuf,
    #[command(flatten)]
    kubernetes: KubernetesOptions,
    #[command(flatten)]
    labels: LabelOptions,
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
  kubernetes:
    enabled: auto
    node: ''
    kubeconfig: ''
    wait: 5s
    grace: 60s
  scope:
    honor_annotation: true
    include: []
    exclude: []
  labels:
    extra: {}
    pod_labels: []
    pod_annotations: []
    service_from_labels: false
    allow: []
    deny: []
    rename: {}
  export:
    window: 15s
    endpoint: http://127.0.0.1:4317
    queue_mib: 16
    original_payload: false
  status:
    listen: 127.0.0.1:7081

Who is recorded: whoever one of scope.include matches, or all if it is empty, and none of scope.exclude. All fields of an
entry have to match, and one value of each; * stands for any characters:
  scope:
    exclude:
      - executables: [postgres, /opt/secret/*]
      - cgroups: [/system.slice/backup.service]
      - pids: [4711]
      - namespaces: [kube-*]
        pod_labels: {tier: batch}
        pod_annotations: {example.com/private: '*'}
        containers: [istio-proxy]

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
    let (kubernetes, labels) = arguments.labels.overrides(arguments.kubernetes)?;
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
        kubernetes,
        labels,
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
    let debuginfod = config.debuginfod.map(Debuginfod::start).transpose().context("debuginfod cannot be used")?;
    let listener = TcpListener::bind(config.status)
        .await
        .with_context(|| format!("the status endpoint cannot listen on {}", config.status))?;

    let stats = Arc::new(Stats::default());
    let window = config.export.window;
    let labels = labels::options(config.kubernetes, config.labels, Some(window), &stats)?;
    let delivery = Delivery::open(delivery_options(config.export), &stats)?;
    let status = tokio::spawn(status::serve(listener, Arc::clone(&stats)));
    let cpus = kernel::online_cpus().map_or(1, |cpus| cpus.len());
    let mut kernel = Kernel::load(&kernel::Options {
        btf,
        events: config.events,
        waits: config.waits,
        frequency: config.frequency,
        targets_only: false,
        rows: BufferRows::for_rate(cpus, rows_per_second(config.events, config.frequency), DRAIN_INTERVAL.as_secs()),
        cgroups: kernel::CgroupHierarchy::of_machine(),
        debug_log: logging.kernel_debug,
        walk_in_parts: false,
        watch_wakeups: false,
    })?;
    if config.scope.are_strict() {
        kernel.withhold()?;
    }
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
        destinations(&stats),
        humantime::format_duration(window),
        config.status,
    );
    if let Some(number) = kernel::pid_namespace() {
        info!("only processes of the agent's own PID namespace ({number}) are seen");
    }
    stats.set_clock(kernel.clock().map_or(0, Clock::cpus));
    let options = pipeline::Options {
        events: config.events,
        period: Duration::from_nanos(1_000_000_000 / config.frequency),
        window: Some(window),
        names_bytes: config.names_bytes,
        debuginfod: debuginfod.map(Arc::new),
        source: config.source,
        unwind_table_bytes: config.table_bytes,
        labels,
        scope: config.scope,
        watch: None,
    };
    let (mut pipeline, profiles) = Pipeline::start(kernel, options, &stats)?;
    stats.set_ready(true);
    let mut delivering = delivery.start(profiles)?;
    tokio::select! {
        _ = interrupt.recv() => info!("interrupted: exporting the last window"),
        _ = terminate.recv() => info!("terminated: exporting the last window"),
        // The queue of profiles closes by itself only when collection failed.
        _ = &mut delivering.ended => {}
    }
    stats.set_ready(false);
    pipeline.stop();
    // (An error means that a thread panicked, which was said.)
    let _ = tokio::task::spawn_blocking(move || delivering.finish(FLUSH_TIMEOUT)).await;
    let outcome = pipeline.join();
    status.abort();
    for line in books(&stats, config.events) {
        info!("{line}");
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

/// The configuration in the exporters' own words.
fn delivery_options(export: config::Export) -> delivery::Options {
    let limits = |bytes, age| export::Limits { bytes, age };
    delivery::Options {
        destinations: export.destinations,
        spool: export.spool.map(|spool| delivery::SpoolOptions {
            folder: spool.folder,
            limits: limits(spool.bytes, Some(spool.max_age)),
        }),
        queue_bytes: export.queue_bytes,
        files: export.files.map(|files| files::Settings {
            folder: files.folder,
            format: match files.format {
                FileFormat::Pprof => Format::Pprof,
                FileFormat::Otlp => Format::Otlp,
            },
            limits: limits(files.bytes, None),
        }),
        encoding: otlp::Options { original_payload: export.original_payload },
    }
}

/// Where profiles go, for people.
fn destinations(stats: &Stats) -> String {
    stats.destinations().iter().map(|destination| destination.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// How the books balance, for each destination: what was seen, and what earlier runs left, is exported, lost, dropped or still
/// in the spool.
fn books(stats: &Stats, events: Events) -> Vec<String> {
    let destinations = stats.destinations();
    let mut lines = Vec::new();
    for destination in &destinations {
        let name = if destinations.len() == 1 { String::new() } else { format!("{}: ", destination.name) };
        let exported = destination.exported.get();
        let mut dropped = stats.dropped_in_all();
        dropped += destination.dropped_in_all();
        let (recovered, [_, spool]) = (destination.recovered.get(), destination.waiting());
        if events.includes_on_cpu() {
            let mut line = format!(
                "stopped: {name}seen {}, exported {}, lost in kernel {}, dropped {}",
                stats.kernel(Counter::Seen),
                exported.samples,
                stats.lost_in_kernel(),
                dropped.samples,
            );
            if recovered.samples > 0 || spool.tally.samples > 0 {
                line +=
                    &format!(", left in the spool {}; from earlier runs {}", spool.tally.samples, recovered.samples);
            }
            lines.push(line);
        }
        if events.includes_off_cpu() {
            let seconds = |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64();
            let mut line = format!(
                "off the CPU: {name}exported {:.3} s, lost in kernel {:.3} s, dropped {:.3} s",
                seconds(exported.off_cpu_ns),
                seconds(stats.kernel(Counter::WaitsLostNs)),
                seconds(dropped.off_cpu_ns),
            );
            if recovered.off_cpu_ns > 0 || spool.tally.off_cpu_ns > 0 {
                line += &format!(
                    ", left in the spool {:.3} s; from earlier runs {:.3} s",
                    seconds(spool.tally.off_cpu_ns),
                    seconds(recovered.off_cpu_ns)
                );
            }
            lines.push(line);
        }
    }
    lines
}

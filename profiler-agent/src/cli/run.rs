//! `profiler-agent run`: the daemon.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::Args;
use tracing::info;

use super::{
    debuginfod::DebuginfodOptions,
    export::ExportOptions,
    labels::{KubernetesOptions, LabelOptions},
    logging::{self, Logging},
    status::StatusOptions,
};
use crate::{
    config::{Config, ControlOverrides, Overrides},
    control,
    kernel::{
        self,
        privileges::{self, Holder},
    },
    profile::Events,
};

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
    /// Most CPU time, the agent's own and the kernel programs', as a share of the machine, for example 0.5%.
    #[arg(long, env = "PROFILER_BUDGET_CPU", value_name = "SHARE")]
    budget_cpu: Option<String>,
    /// Most memory of the agent, MiB. Caches shrink before it is reached.
    #[arg(long, env = "PROFILER_BUDGET_MEMORY_MIB", value_name = "MIB")]
    budget_memory_mib: Option<u32>,
    /// While this file exists, nothing is collected.
    #[arg(long, env = "PROFILER_STOP_FILE", value_name = "FILE")]
    stop_file: Option<PathBuf>,
    /// Socket for `profiler-agent stop`, `resume` and `trigger`.
    #[arg(long, env = "PROFILER_CONTROL_SOCKET", value_name = "FILE")]
    control_socket: Option<PathBuf>,
    /// The kernel's type information, where it is not in its usual place.
    #[arg(long, value_name = "FILE", default_value = kernel::DEFAULT_BTF, hide = true)]
    btf: PathBuf,
    #[command(flatten)]
    status: StatusOptions,
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
  redact:
    paths: []
    processes: []
    functions: true
  export:
    window: 15s
    endpoint: http://127.0.0.1:4317
    queue_mib: 16
    original_payload: false
  status:
    listen: 127.0.0.1:7081
  schedule:
    every: 1m
    collect: 1m
    probability: 1
  capture:
    interval: 5s
    max_running: 1
    per_hour: 6
    cooldown: 10m
    rules: []
  budget:
    cpu: 1%
    memory_mib: 256
  control:
    stopped: false
    stop_file: /run/profiler/stop
    socket: /run/profiler/agent.sock

The status endpoint may speak TLS and ask for a token:
  status:
    tls: {cert_file: tls.crt, key_file: tls.key}
    token_file: token

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

What is captured in more detail, and when; `profiler-agent trigger` does the same by hand:
  capture:
    rules:
      - {name: leak, memory_growth: 64, for: 30s, capture: {duration: 30s, frequency: 499, event: both}}

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

SIGINT and SIGTERM end the daemon; the last window is exported first. SIGUSR1 stops collection at once, SIGUSR2 resumes
it, SIGHUP reads the configuration again.";

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
        status: arguments.status.overrides(),
        control: ControlOverrides {
            cpu: arguments.budget_cpu,
            memory_mib: arguments.budget_memory_mib,
            stop_file: arguments.stop_file,
            socket: arguments.control_socket,
        },
    };
    let config = Config::load(arguments.config.as_deref(), overrides.clone())?;
    privileges::check()?;
    let kept = privileges::give_up(Holder::Daemon).context("privileges cannot be given up")?;
    logging::redact(&config.redact);
    info!("capabilities that are kept: {kept}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the event loop could not be started")?;
    let options = control::Options {
        config: arguments.config,
        overrides,
        btf: arguments.btf,
        kernel_debug: logging.kernel_debug,
        redact_log: logging::redact,
    };
    runtime.block_on(control::run(options, config))
}

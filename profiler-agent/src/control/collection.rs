//! One run of collection: kernel programs and a pipeline, from start to stop. There may be many in the life of a daemon.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
};
use tracing::debug;

use crate::{
    allowance::Allowance,
    config::{Config, Kubernetes, Labels},
    kernel::{self, Attachments, BufferRows, Clock, Counters, Kernel},
    label::{
        self,
        kubernetes::{self, Pods},
    },
    pipeline::{self, DRAIN_INTERVAL, NAMING_PATIENCE, Pace, Pipeline, rows_per_second},
    profile::{Mark, Profile},
    redact::Redaction,
    scope,
    status::Stats,
    symbolize::debuginfod::Debuginfod,
};

/// What all runs have in common.
#[derive(Clone)]
pub(super) struct Surroundings {
    /// The kernel's type information.
    pub(super) btf: PathBuf,
    /// Whether kernel programs write to the log.
    pub(super) kernel_debug: bool,
    /// CPU time for work that can wait.
    pub(super) allowance: Arc<Allowance>,
    pub(super) stats: Arc<Stats>,
    /// Where profiles go.
    pub(super) profiles: mpsc::Sender<Profile>,
}

/// What a run does.
pub(super) struct Plan {
    /// What is collected, and of whom.
    pub(super) config: Config,
    pub(super) labels: label::Options,
    pub(super) pace: Pace,
    /// How long a window stays open; `None`: until the end.
    pub(super) window: Option<Duration>,
    /// How long a window that is closed waits for files to be read.
    pub(super) patience: Duration,
    /// Who is asked for debug files.
    pub(super) debuginfod: Option<Arc<Debuginfod>>,
    /// The links of its programs: see [`kernel::Options`].
    pub(super) attachments: Attachments,
    /// See [`pipeline::Options`].
    pub(super) ending: Arc<OnceLock<Mark>>,
}

/// A run that is under way.
pub(super) struct Collection {
    pipeline: Pipeline,
    attachments: Attachments,
    counters: Counters,
    debuginfod: Option<Arc<Debuginfod>>,
    /// What is collected, in words.
    pub(super) description: String,
}

impl Plan {
    /// The daemon's own.
    pub(super) fn new(config: &Config, labels: label::Options, pace: Pace) -> anyhow::Result<Self> {
        let debuginfod =
            config.debuginfod.clone().map(Debuginfod::start).transpose().context("debuginfod cannot be used")?;
        Ok(Self {
            config: config.clone(),
            labels,
            pace,
            window: Some(config.export.window),
            patience: NAMING_PATIENCE,
            debuginfod: debuginfod.map(Arc::new),
            attachments: Attachments::default(),
            ending: Arc::default(),
        })
    }
}

impl Collection {
    /// Loads the programs and starts to collect.
    pub(super) fn start(plan: Plan, surroundings: &Surroundings) -> anyhow::Result<Self> {
        let Plan { config, labels, pace, window, patience, debuginfod, attachments, ending } = plan;
        let stats = &surroundings.stats;
        let cpus = kernel::online_cpus().map_or(1, |cpus| cpus.len());
        let rows = rows_per_second(config.events, config.frequency);
        let mut kernel = Kernel::load(&kernel::Options {
            btf: &surroundings.btf,
            events: config.events,
            waits: config.waits,
            frequency: config.frequency,
            targets_only: false,
            rows: BufferRows::for_rate(cpus, rows, DRAIN_INTERVAL.as_secs()),
            cgroups: kernel::CgroupHierarchy::of_machine(),
            debug_log: surroundings.kernel_debug,
            walk_in_parts: false,
            watch_wakeups: false,
            attachments: attachments.clone(),
        })?;
        stats.keep_kernel_counters();
        let counters = kernel.counters();
        if config.scope.are_strict() || pace.replicas.is_some() {
            kernel.withhold()?;
        }
        kernel.attach_notices()?;
        kernel.set_pace(pace.frequency, pace.following());
        if pace.collects {
            kernel.start()?;
        }
        stats.set_clock(kernel.clock().map_or(0, Clock::cpus));
        let cpu_time = kernel.clock().map(|clock| {
            let source = clock.source().map_or_else(String::new, |source| format!(" by {source}"));
            format!("sampling {} CPUs at {} Hz{source}", clock.cpus(), pace.frequency)
        });
        let waits = config.events.includes_off_cpu().then(|| "following waits".to_owned());
        let description = [cpu_time, waits].into_iter().flatten().collect::<Vec<_>>().join(" and ");
        let options = pipeline::Options {
            events: config.events,
            pace,
            window,
            patience,
            ending,
            debuginfod: debuginfod.clone(),
            source: config.source,
            unwind_table_bytes: config.table_bytes,
            allowance: Arc::clone(&surroundings.allowance),
            labels,
            scope: config.scope,
            watch: None,
        };
        let pipeline = Pipeline::start(kernel, options, surroundings.profiles.clone(), stats)?;
        Ok(Self { pipeline, attachments, counters, debuginfod, description })
    }

    /// Who is asked for debug files.
    pub(super) fn debuginfod(&self) -> Option<Arc<Debuginfod>> {
        self.debuginfod.clone()
    }

    /// Goes on at another pace.
    pub(super) fn set_pace(&self, pace: Pace) {
        self.pipeline.set_pace(pace);
    }

    /// Looks at the kernel programs' counters, however busy the collector is.
    pub(super) fn count(&self, stats: &Stats) {
        match self.counters.read() {
            Ok(counters) => stats.set_kernel_counters(&counters),
            Err(error) => debug!("the kernel programs' counters could not be read: {error}"),
        }
    }

    /// Records whom these rules are about, from now on.
    pub(super) fn set_scope(&self, rules: scope::Rules) {
        self.pipeline.set_scope(rules);
    }

    /// Whether it goes on at the pace that was set last.
    pub(super) fn has_reached_pace(&self) -> bool {
        self.pipeline.has_reached_pace()
    }

    /// Resolves when collection has ended by itself: something failed, which [`Self::stop`] returns.
    pub(super) fn failed(&mut self) -> &mut oneshot::Receiver<()> {
        &mut self.pipeline.watched_exited
    }

    /// Detaches every program, before this returns. What was collected is handed on by and by.
    pub(super) fn stop(mut self) -> JoinHandle<anyhow::Result<()>> {
        self.attachments.cut();
        self.pipeline.stop();
        spawn_blocking(move || self.pipeline.join())
    }
}

/// The configuration in the labeller's own words; follows the pods, if there are any. Windows are never held up for longer
/// than `window`.
pub fn label_options(
    kubernetes: Option<Kubernetes>,
    labels: Labels,
    redact: Redaction,
    window: Option<Duration>,
    stats: &Stats,
) -> anyhow::Result<label::Options> {
    let wait = kubernetes.as_ref().map_or(Duration::ZERO, |kubernetes| kubernetes.wait);
    let settings = kubernetes.map(|kubernetes| kubernetes::Settings {
        access: kubernetes.access,
        node: kubernetes.node,
        grace: kubernetes.grace,
        wanted: labels.wanted,
    });
    let pods = settings.map(Pods::start).transpose().context("the thread that follows pods could not be started")?;
    stats.set_pods(pods.clone());
    Ok(label::Options {
        pods,
        wait: window.map_or(wait, |window| wait.min(window)),
        redact,
        rules: labels.rules,
        stats: stats.labels.clone(),
    })
}

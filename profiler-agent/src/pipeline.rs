//! Names every stage, the queues between them with their bounds, and the order of shutdown.
//!
//! ```text
//! collector thread                         namer thread               labeller thread      caller
//! kernel ─► drain ─► locate ──(batches)──► name ─► aggregate ──(windows)──► label ──(profiles)──► export
//!    ▲        notices ─► process table, cgroups
//! ```
//!
//! All queues are bounded. When the namer falls behind, the collector stops draining and the kernel's
//! buffers fill up: what does not fit is counted there. When exporters fall behind, whole profiles are
//! dropped here, and counted.
//!
//! Shutdown runs along the flow: the clock stops, the last buffers are drained, named, aggregated and labelled, and
//! the queue of profiles is closed behind the last one.

mod collector;
mod epoch;
mod pace;

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, error, warn};

use self::collector::{Collector, Orders};
pub use self::pace::Pace;
use crate::{
    aggregate::Window,
    allowance::Allowance,
    cgroups::Cgroups,
    kernel::{Kernel, KernelError},
    label::{self, Labeller, kubernetes},
    process::{ProcessTable, Published},
    profile::{Cgroup, Events, KernelChanges, LocatedSample, Mark, PodFacts, Profile, Unlabelled},
    scope::{self, Scope},
    status::Stats,
    symbolize::{FrameNamer, SourceOptions, debuginfod::Debuginfod},
    unwind_info::TableBuilder,
    waits::WaitBook,
};

/// Time between two drains: how long an exited process may have to be remembered, and how much the kernel's
/// buffers have to hold.
pub const DRAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Batches that may wait for the namer.
const BATCH_QUEUE: usize = 2;
/// Windows that may wait for the labeller: it waits for metadata, and never longer than a window.
const WINDOW_QUEUE: usize = 2;
/// Profiles that may wait for the exporters.
pub const PROFILE_QUEUE: usize = 4;

/// How long the namer waits for a file before it leaves its frames pending: until the window closes, and once more then.
pub const NAMING_PATIENCE: Duration = Duration::from_secs(1);
/// How long it waits for files where nothing comes after the window.
pub const LAST_PATIENCE: Duration = Duration::from_secs(20);

/// Rows that each CPU may add to the sample buffers per second: a stack of its own for every sample of CPU time, and
/// of waits as many stacks as steady services have.
pub fn rows_per_second(events: Events, frequency: u64) -> u64 {
    const WAITS: u64 = 200;
    let on_cpu = if events.includes_on_cpu() { frequency } else { 0 };
    on_cpu.saturating_add(if events.includes_off_cpu() { WAITS } else { 0 })
}

/// What a pipeline is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is recorded.
    pub events: Events,
    /// How closely, at first.
    pub pace: Pace,
    /// How long a window stays open; `None`: until the end.
    pub window: Option<Duration>,
    /// How long a window that is closed waits for files to be read.
    pub patience: Duration,
    /// What readers have to know of how it ended: whoever ends it may say so before.
    pub ending: Arc<OnceLock<Mark>>,
    /// Who is asked for debug files that this machine does not have.
    pub debuginfod: Option<Arc<Debuginfod>>,
    /// Whether source lines and inlined functions are looked for.
    pub source: SourceOptions,
    /// Most bytes of kernel memory for the rows of unwind tables.
    pub unwind_table_bytes: usize,
    /// CPU time for reading symbols and building unwind tables.
    pub allowance: Arc<Allowance>,
    /// Whose samples they are.
    pub labels: label::Options,
    /// Who is recorded.
    pub scope: scope::Rules,
    /// Report when all of these processes have exited.
    pub watch: Option<Vec<u32>>,
}

impl scope::Pods for kubernetes::Pods {
    fn version(&self) -> u64 {
        self.version()
    }

    fn of(&self, cgroup: &Cgroup) -> Option<PodFacts> {
        self.facts(cgroup)
    }
}

/// Samples on their way to the namer.
struct Batch {
    samples: Vec<LocatedSample>,
    /// What came and went in the kernel since the last batch.
    kernel_code: KernelChanges,
    closes_window: bool,
    /// How what comes after this batch is collected, where that changes; it closes the window then.
    next: Option<Pace>,
}

/// A running pipeline.
pub struct Pipeline {
    stop: Option<oneshot::Sender<()>>,
    pace: watch::Sender<Pace>,
    scope: watch::Sender<scope::Rules>,
    /// The pace that was reached last.
    reached: watch::Receiver<Pace>,
    collector: JoinHandle<Result<(), KernelError>>,
    namer: JoinHandle<()>,
    labeller: JoinHandle<()>,
    /// Resolves when every watched process has exited.
    pub watched_exited: oneshot::Receiver<()>,
}

impl Pipeline {
    /// Starts the threads. `kernel` has its programs attached and its clock running.
    pub fn start(
        mut kernel: Kernel,
        options: Options,
        profile_sender: mpsc::Sender<Profile>,
        stats: &Arc<Stats>,
    ) -> anyhow::Result<Self> {
        let (batch_sender, batches) = sync_channel(BATCH_QUEUE);
        let (window_sender, windows) = sync_channel(WINDOW_QUEUE);
        let (stop, stopped) = oneshot::channel();
        let (pace, new_pace) = watch::channel(options.pace.clone());
        let (scope_rules, new_scope) = watch::channel(options.scope.clone());
        let (reach_pace, reached) = watch::channel(options.pace.clone());
        let (report_exit, watched_exited) = oneshot::channel();
        let namer = {
            let (options, stats) = (options.clone(), Arc::clone(stats));
            thread::Builder::new()
                .name("namer".to_owned())
                .spawn(move || name_batches(&batches, &window_sender, &options, &stats))
                .context("the namer thread could not be started")?
        };
        let labeller = {
            let (labels, stats) = (options.labels.clone(), Arc::clone(stats));
            thread::Builder::new()
                .name("labeller".to_owned())
                .spawn(move || label_windows(&windows, &profile_sender, labels, &stats))
                .context("the labeller thread could not be started")?
        };
        if let Some(error) = kernel.waits_refused() {
            warn!("off-CPU time is not recorded: {error}");
        }
        let published = Published::new(kernel.take_mappings()?);
        let tables =
            TableBuilder::start(kernel.take_tables()?, options.unwind_table_bytes, Arc::clone(&options.allowance))
                .context("the thread that builds unwind tables could not be started")?;
        let pods = options.labels.pods.clone().map(|pods| Box::new(pods) as Box<dyn scope::Pods>);
        let scope = Scope::new(kernel.take_scope()?, options.scope, pods);
        let collector = {
            let stats = Arc::clone(stats);
            thread::Builder::new()
                .name("collector".to_owned())
                .spawn(move || {
                    let collector = Collector {
                        kernel,
                        table: ProcessTable::default(),
                        cgroups: Cgroups::default(),
                        published,
                        tables,
                        scope,
                        waits: options.events.includes_off_cpu().then(WaitBook::default),
                        kernel_code: KernelChanges::default(),
                        batches: batch_sender,
                        waiting: VecDeque::new(),
                        stats,
                        notices_lost: [0; 2],
                        pace: reach_pace,
                        watch: options.watch.unwrap_or_default(),
                        report_exit: Some(report_exit),
                    };
                    let outcome = collector.run(options.window, Orders { stopped, pace: new_pace, scope: new_scope });
                    if let Err(error) = &outcome {
                        error!("collection ended: {error}");
                    }
                    outcome
                })
                .context("the collector thread could not be started")?
        };
        Ok(Self { stop: Some(stop), pace, scope: scope_rules, reached, collector, namer, labeller, watched_exited })
    }

    /// Asks the pipeline to stop the clock and flush; profiles still to come follow on the queue.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // An error means that the collector has ended already.
            let _ = stop.send(());
        }
    }

    /// Goes on at another pace; a window ends where one does.
    pub fn set_pace(&self, pace: Pace) {
        self.pace.send_if_modified(|current| {
            let is_new = *current != pace;
            *current = pace;
            is_new
        });
    }

    /// Records whom these rules are about, from now on.
    pub fn set_scope(&self, rules: scope::Rules) {
        self.scope.send_if_modified(|current| {
            let is_new = *current != rules;
            *current = rules;
            is_new
        });
    }

    /// Whether collection goes on at the pace that was last wished for.
    pub fn has_reached_pace(&self) -> bool {
        *self.pace.borrow() == *self.reached.borrow()
    }

    /// Waits for the threads. Call after the queue of profiles has closed.
    pub fn join(self) -> anyhow::Result<()> {
        drop(self.stop);
        let outcome = self.collector.join().map_err(|_| anyhow::anyhow!("the collector thread panicked"))?;
        self.namer.join().map_err(|_| anyhow::anyhow!("the namer thread panicked"))?;
        self.labeller.join().map_err(|_| anyhow::anyhow!("the labeller thread panicked"))?;
        Ok(outcome?)
    }
}

/// The second stage: names frames and fills windows until the collector is done.
fn name_batches(
    batches: &Receiver<Batch>,
    windows: &SyncSender<Profile<Unlabelled>>,
    options: &Options,
    stats: &Stats,
) {
    let mut pace = options.pace.clone();
    let mut namer =
        FrameNamer::new(pace.names_bytes, options.debuginfod.clone(), options.source, Arc::clone(&options.allowance));
    let mut window = Window::open(options.events, pace.period(), Arc::clone(&pace.marks));
    let close = |window: &mut Window, namer: &mut FrameNamer| {
        let mut profile = window.close();
        if let Some(ending) = options.ending.get() {
            profile.marks = profile.marks.iter().chain([ending]).cloned().collect();
        }
        namer.settle(&mut profile, options.patience);
        stats.set_symbolize(namer.stats());
        stats.windows_closed.add(1);
        // Where the labeller is behind, so are the exporters: it never waits for longer than a window.
        if let Err(TrySendError::Full(profile) | TrySendError::Disconnected(profile)) = windows.try_send(profile) {
            count_dropped(&profile, stats);
        }
    };
    for batch in batches {
        namer.announce(&batch.kernel_code);
        let frames = namer.name(&batch.samples, NAMING_PATIENCE);
        for (sample, frames) in batch.samples.iter().zip(frames) {
            window.add(sample, frames);
        }
        stats.set_symbolize(namer.stats());
        // (Where nothing was collected, nothing being seen says nothing.)
        let has_something = pace.collects || !window.is_empty();
        if (batch.closes_window || batch.next.is_some() || window.is_full()) && has_something {
            close(&mut window, &mut namer);
        }
        if let Some(next) = batch.next {
            window = Window::open(options.events, next.period(), Arc::clone(&next.marks));
            namer.set_budget(next.names_bytes);
            namer.set_source(next.detail.then_some(options.source));
            pace = next;
        }
    }
    if !window.is_empty() {
        close(&mut window, &mut namer);
    }
    debug!("{}", namer.stats());
}

/// The third stage: says whose samples are, and hands profiles to the exporters.
fn label_windows(
    windows: &Receiver<Profile<Unlabelled>>,
    profiles: &mpsc::Sender<Profile>,
    labels: label::Options,
    stats: &Stats,
) {
    let mut labeller = Labeller::new(labels);
    for window in windows {
        let profile = labeller.label(window);
        stats.rows_exported.add(profile.samples.len() as u64);
        if let Err(refused) = profiles.try_send(profile) {
            count_dropped(&refused.into_inner(), stats);
        }
    }
}

/// Counts a window for which the next stage has no room.
fn count_dropped<R>(profile: &Profile<R>, stats: &Stats) {
    let total = profile.total();
    stats.dropped_queue_full.add(total);
    warn!("exporters are behind: a window of {total} was dropped");
}

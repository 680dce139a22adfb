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

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use profiler_common::abi::sample::{EventKind, StackEnd};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval_at},
};
use tracing::{debug, error, warn};

use crate::{
    aggregate::Window,
    kernel::{Clock, DebugLog, Kernel, KernelError, KernelMappings, Ring, SideBand},
    label::{self, Labeller},
    process::{ProcessTable, Published},
    profile::{Events, KernelChanges, LocatedSample, Profile, RawSample, Tally, Unlabelled},
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
const PROFILE_QUEUE: usize = 4;

/// Time between two looks at processes that are about to name the code they make.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// How long the namer waits for a file before it leaves its frames pending: until the window closes, and once more then.
const NAMING_PATIENCE: Duration = Duration::from_secs(1);
/// How long it waits for files where nothing comes after the window.
const LAST_PATIENCE: Duration = Duration::from_secs(20);

/// Rows that each CPU may add to the sample buffers per second: a stack of its own for every sample of CPU time, and
/// of waits as many stacks as steady services have.
pub fn rows_per_second(events: Events, frequency: u64) -> u64 {
    const WAITS: u64 = 200;
    let on_cpu = if events.includes_on_cpu() { frequency } else { 0 };
    on_cpu.saturating_add(if events.includes_off_cpu() { WAITS } else { 0 })
}

/// A place of waits that was not used for so long makes room for others.
const SITE_IDLE: Duration = Duration::from_secs(10);

/// What a pipeline is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is recorded.
    pub events: Events,
    /// CPU time one sample stands for.
    pub period: Duration,
    /// How long a window stays open; `None`: until the end.
    pub window: Option<Duration>,
    /// Bytes for named frames and for symbols of files.
    pub names_bytes: usize,
    /// Who is asked for debug files that this machine does not have.
    pub debuginfod: Option<Arc<Debuginfod>>,
    /// Whether source lines and inlined functions are looked for.
    pub source: SourceOptions,
    /// Most bytes of kernel memory for the rows of unwind tables.
    pub unwind_table_bytes: usize,
    /// Whose samples they are.
    pub labels: label::Options,
    /// Report when all of these processes have exited.
    pub watch: Option<Vec<u32>>,
}

/// Samples on their way to the namer.
struct Batch {
    samples: Vec<LocatedSample>,
    /// What came and went in the kernel since the last batch.
    kernel_code: KernelChanges,
    closes_window: bool,
}

/// A running pipeline.
pub struct Pipeline {
    stop: Option<oneshot::Sender<()>>,
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
        stats: &Arc<Stats>,
    ) -> anyhow::Result<(Self, mpsc::Receiver<Profile>)> {
        let (batch_sender, batches) = sync_channel(BATCH_QUEUE);
        let (window_sender, windows) = sync_channel(WINDOW_QUEUE);
        let (profile_sender, profiles) = mpsc::channel(PROFILE_QUEUE);
        let (stop, stopped) = oneshot::channel();
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
        let tables = TableBuilder::start(kernel.take_tables()?, options.unwind_table_bytes)
            .context("the thread that builds unwind tables could not be started")?;
        let collector = {
            let stats = Arc::clone(stats);
            thread::Builder::new()
                .name("collector".to_owned())
                .spawn(move || {
                    let collector = Collector {
                        kernel,
                        table: ProcessTable::default(),
                        published,
                        tables,
                        waits: options.events.includes_off_cpu().then(WaitBook::default),
                        kernel_code: KernelChanges::default(),
                        batches: batch_sender,
                        waiting: None,
                        stats,
                        watch: options.watch.unwrap_or_default(),
                        report_exit: Some(report_exit),
                    };
                    let outcome = collector.run(options.window, stopped);
                    if let Err(error) = &outcome {
                        error!("collection ended: {error}");
                    }
                    outcome
                })
                .context("the collector thread could not be started")?
        };
        Ok((Self { stop: Some(stop), collector, namer, labeller, watched_exited }, profiles))
    }

    /// Asks the pipeline to stop the clock and flush; profiles still to come follow on the queue.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // An error means that the collector has ended already.
            let _ = stop.send(());
        }
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

/// What the collector waits for.
struct Sources {
    notices: AsyncFd<Ring>,
    /// New mappings and code of the kernel's, where it lets us have them.
    side_band: Option<AsyncFd<SideBand>>,
    overflow: AsyncFd<Ring>,
    log: Option<AsyncFd<DebugLog>>,
}

/// The first stage: owns the kernel side and the process table.
struct Collector {
    kernel: Kernel,
    table: ProcessTable,
    published: Published<KernelMappings>,
    tables: TableBuilder,
    waits: Option<WaitBook>,
    /// For the next batch.
    kernel_code: KernelChanges,
    batches: SyncSender<Batch>,
    /// A batch that found the queue full. Nothing is drained while it waits.
    waiting: Option<Batch>,
    stats: Arc<Stats>,
    watch: Vec<u32>,
    report_exit: Option<oneshot::Sender<()>>,
}

impl Collector {
    fn run(mut self, window: Option<Duration>, stopped: oneshot::Receiver<()>) -> Result<(), KernelError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| KernelError::System { what: "starting the collector's event loop", error })?;
        runtime.block_on(self.collect(window, stopped))
    }

    async fn collect(&mut self, window: Option<Duration>, stopped: oneshot::Receiver<()>) -> Result<(), KernelError> {
        let unwatchable = |error| KernelError::System { what: "waiting for a ring buffer", error };
        let notices = self.kernel.take_notices()?.watch().map_err(unwatchable)?;
        let overflow = self.kernel.take_overflow()?.watch().map_err(unwatchable)?;
        let side_band = match self.kernel.side_band() {
            Ok(events) => Some(events.watch().map_err(unwatchable)?),
            Err(error) => {
                warn!("{error}; new mappings are read when samples hit them");
                None
            }
        };
        let log = self.kernel.take_log().map(DebugLog::watch).transpose().map_err(unwatchable)?;
        let mut sources = Sources { notices, side_band, overflow, log };
        let outcome = self.collect_until_stopped(window, stopped, &mut sources).await;
        // Whatever ended collection: the clock stops, and what was sampled is still read and handed on.
        let stopped = self.kernel.stop();
        self.learn(&mut sources);
        self.deliver_waiting();
        let drained = self.drain(sources.overflow.get_mut(), true, true);
        self.deliver_waiting();
        outcome.and(stopped).and(drained)
    }

    async fn collect_until_stopped(
        &mut self,
        window: Option<Duration>,
        mut stopped: oneshot::Receiver<()>,
        sources: &mut Sources,
    ) -> Result<(), KernelError> {
        let interval = window.map_or(DRAIN_INTERVAL, |window| window.min(DRAIN_INTERVAL));
        let mut drains = interval_at(tokio::time::Instant::now() + interval, interval);
        drains.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = interval_at(tokio::time::Instant::now(), LOOK_AGAIN);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut window_opened = Instant::now();
        loop {
            tokio::select! {
                _ = &mut stopped => return Ok(()),
                guard = sources.notices.readable_mut() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    self.learn(sources);
                }
                () = code_appears(&mut sources.side_band) => self.learn(sources),
                guard = sources.overflow.readable_mut() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    self.learn(sources);
                    self.drain(sources.overflow.get_mut(), false, false)?;
                }
                _ = drains.tick() => {
                    let closes_window = window.is_some_and(|window| window_opened.elapsed() + interval / 2 >= window);
                    if closes_window {
                        window_opened = Instant::now();
                    }
                    if let Err(error) = self.kernel.follow_hotplug() {
                        warn!("CPUs that came or went could not be followed: {error}");
                    }
                    if let Some(Err(error)) = sources.side_band.as_mut().map(|side_band| side_band.get_mut().follow_hotplug()) {
                        warn!("new mappings on CPUs that came or went could not be followed: {error}");
                    }
                    self.learn(sources);
                    let lost = sources.side_band.as_ref().map_or(0, |side_band| side_band.get_ref().lost());
                    self.stats.set_mappings_lost(lost);
                    self.drain(sources.overflow.get_mut(), closes_window, false)?;
                }
                () = flush_log(&mut sources.log) => {}
                _ = looks.tick(), if self.table.is_expecting() => self.table.look_again(),
            }
        }
    }

    /// Reads what the kernel announced: first processes, then what was mapped in them.
    fn learn(&mut self, sources: &mut Sources) {
        sources.notices.get_mut().read(|notice| self.table.notice(notice));
        if let Some(side_band) = &mut sources.side_band {
            let (table, kernel_code) = (&mut self.table, &mut self.kernel_code);
            let lost = side_band.get_ref().lost();
            side_band.get_mut().read(|mapping| table.mapped(mapping), |code| kernel_code.add(code));
            kernel_code.is_incomplete |= side_band.get_ref().lost() != lost;
        }
        self.table.catch_up();
        self.publish();
        self.report_exits();
    }

    /// Tells the kernel programs, and the thread that builds unwind tables, what the process table has learned.
    fn publish(&mut self) {
        for table in self.table.take_vacated() {
            self.tables.forget(table);
        }
        for change in self.table.take_changes() {
            if let Err(error) = self.published.apply(change) {
                warn!("a process's mappings could not be published: {error}");
            }
        }
        for executable in self.table.take_wanted() {
            self.tables.want(executable);
        }
    }

    /// Tells the caller once all watched processes are gone.
    fn report_exits(&mut self) {
        if self.watch.is_empty() {
            return;
        }
        let table = &self.table;
        // A notice may have been lost; a process that is not there has ended all the same.
        self.watch.retain(|&tgid| !table.has_exited(tgid) && Path::new(&format!("/proc/{tgid}")).exists());
        if self.watch.is_empty()
            && let Some(report) = self.report_exit.take()
        {
            // An error means that nobody waits for it.
            let _ = report.send(());
        }
    }

    /// Reads the sample buffers and hands the samples on. `is_last`: nothing is sampled any more.
    fn drain(&mut self, overflow: &mut Ring, closes_window: bool, is_last: bool) -> Result<(), KernelError> {
        if let Some(waiting) = self.waiting.take() {
            self.offer(waiting);
        }
        if let Some(waiting) = &mut self.waiting {
            waiting.closes_window |= closes_window;
            self.stats.drains_postponed.add(1);
            return Ok(());
        }
        let (table, waits, stats) = (&mut self.table, &mut self.waits, &self.stats);
        let mut samples = Vec::new();
        let drained = self.kernel.drain(overflow, |row| match RawSample::decode(row) {
            Ok(sample) if sample.kind.is_off_cpu() => {
                let Some(waits) = waits else { return };
                let (key, count, waited, is_reference) = (sample.key, sample.count, sample.waited, sample.is_reference);
                waits.add(key, count, waited, is_reference, table.locate(sample, None));
            }
            Ok(sample) => {
                stats.samples_drained.add(sample.count);
                samples.push(table.locate(sample, None));
            }
            Err(error) => {
                stats.dropped_malformed.add(Tally { samples: RawSample::count_of(row), off_cpu_ns: 0 });
                warn!("{error}");
            }
        });
        stats.rows_drained.add(samples.len() as u64);
        for sample in &samples {
            stats.count_end(sample.end, sample.count);
        }
        let settled = self.settle_waits(is_last, &mut samples);
        // Replacing the buffers has waited for every program that was running.
        self.published.reuse_released();
        self.publish();
        let kernel_code = std::mem::take(&mut self.kernel_code);
        self.offer(Batch { samples, kernel_code, closes_window });
        for tgid in self.table.end_drain() {
            self.kernel.remove_target(tgid)?;
        }
        self.publish();
        self.stats.set_table(self.table.stats());
        self.stats.set_unwind_tables(self.tables.stats(), self.published.refused());
        self.stats.set_kernel_counters(&self.kernel.counters()?);
        self.stats.set_clock(self.kernel.clock().map_or(0, Clock::cpus));
        drained.and(settled)
    }

    /// Adds what waits have cost since the last drain.
    fn settle_waits(&mut self, is_last: bool, samples: &mut Vec<LocatedSample>) -> Result<(), KernelError> {
        let Some(waits) = &mut self.waits else { return Ok(()) };
        let mut threads = HashMap::new();
        let idle = if is_last { Duration::ZERO } else { SITE_IDLE };
        self.kernel.take_wait_dues(idle, |due| {
            waits.add_due(&due, || self.table.without_stack(due.key.tgid, EventKind::Blocked, StackEnd::Rationed));
        });
        let now = self.kernel.waiting_threads(|thread, wait| {
            threads.insert(thread, wait);
        });
        // Where the threads could not be read, what has ended is still handed on.
        let now_ns = now.as_ref().map_or(0, |now| now.unwrap_or(0));
        let settled = waits.settle(&threads, now_ns, is_last);
        for sample in &settled {
            self.stats.count_wait_end(sample.end, sample.time_ns);
        }
        samples.extend(settled);
        self.stats.set_waits(waits.stats(), self.kernel.wait_totals()?);
        now.map(|_| ())
    }

    fn offer(&mut self, batch: Batch) {
        match self.batches.try_send(batch) {
            Ok(()) => {}
            Err(TrySendError::Full(batch)) => self.waiting = Some(batch),
            Err(TrySendError::Disconnected(batch)) => self.count_undeliverable(&batch),
        }
    }

    fn deliver_waiting(&mut self) {
        if let Some(batch) = self.waiting.take()
            && let Err(refused) = self.batches.send(batch)
        {
            self.count_undeliverable(&refused.0);
        }
    }

    fn count_undeliverable(&self, batch: &Batch) {
        let tally = batch.samples.iter().map(LocatedSample::tally).sum();
        self.stats.dropped_namer_gone.add(tally);
    }
}

/// Waits for new code; for ever where it is not announced.
async fn code_appears(side_band: &mut Option<AsyncFd<SideBand>>) {
    let Some(side_band) = side_band else { return std::future::pending().await };
    if let Ok(mut guard) = side_band.readable_mut().await {
        guard.clear_ready();
    }
}

/// Passes on what the kernel programs logged; pending forever when they do not log.
async fn flush_log(log: &mut Option<AsyncFd<DebugLog>>) {
    let Some(log) = log else { return std::future::pending().await };
    if let Ok(mut guard) = log.readable_mut().await {
        guard.clear_ready();
        guard.get_inner_mut().flush();
    }
}

/// The second stage: names frames and fills windows until the collector is done.
fn name_batches(
    batches: &Receiver<Batch>,
    windows: &SyncSender<Profile<Unlabelled>>,
    options: &Options,
    stats: &Stats,
) {
    let mut namer = FrameNamer::new(options.names_bytes, options.debuginfod.clone(), options.source);
    let mut window = Window::open(options.events, options.period);
    let patience = if options.window.is_some() { NAMING_PATIENCE } else { LAST_PATIENCE };
    let close = |window: &mut Window, namer: &mut FrameNamer| {
        let mut profile = window.close();
        namer.settle(&mut profile, patience);
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
        if batch.closes_window || window.is_full() {
            close(&mut window, &mut namer);
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

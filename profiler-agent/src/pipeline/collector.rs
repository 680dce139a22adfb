//! The first stage: owns the kernel side and what is known of processes and cgroups, and turns what the kernel has
//! recorded into batches of located samples.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError},
    },
    time::{Duration, Instant, SystemTime},
};

use profiler_common::abi::counter::Counter;
use tokio::{
    io::unix::AsyncFd,
    sync::{oneshot, watch},
    time::{MissedTickBehavior, interval_at},
};
use tracing::warn;

use super::{Batch, DRAIN_INTERVAL, Pace};
use crate::{
    cgroups::Cgroups,
    kernel::{Clock, DebugLog, Kernel, KernelError, KernelMappings, Ring, SideBand, Unfinished, scope::KernelScope},
    process::{ProcessTable, Published},
    profile::{KernelChanges, LocatedSample},
    scope::{Rules, Scope},
    status::Stats,
    unwind_info::TableBuilder,
    waits::WaitBook,
};

/// Time between two looks at processes that are about to name the code they make.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// Time between two looks at whether a change of pace may go on that had to wait.
const RETRY_PACE: Duration = Duration::from_secs(1);
/// Time between two looks at whether pods have changed that the scope asks about, and at whose turn it is.
const FOLLOW_PODS: Duration = Duration::from_millis(500);
/// Time between two looks at whose turn it is, at least.
const LEAST_TURN: Duration = Duration::from_millis(10);

/// What the collector waits for.
struct Sources {
    notices: AsyncFd<Ring>,
    /// New and removed cgroups, where the kernel announces them.
    cgroups: Option<AsyncFd<Ring>>,
    /// New mappings and code of the kernel's, where it lets us have them.
    side_band: Option<AsyncFd<SideBand>>,
    overflow: AsyncFd<Ring>,
    log: Option<AsyncFd<DebugLog>>,
}

/// What the collector is told while it runs.
pub(super) struct Orders {
    pub(super) stopped: oneshot::Receiver<()>,
    pub(super) pace: watch::Receiver<Pace>,
    pub(super) scope: watch::Receiver<Rules>,
}

/// The first stage: owns the kernel side and the process table.
pub(super) struct Collector {
    pub(super) kernel: Kernel,
    pub(super) table: ProcessTable,
    pub(super) cgroups: Cgroups,
    pub(super) published: Published<KernelMappings>,
    pub(super) tables: TableBuilder,
    pub(super) scope: Scope<KernelScope>,
    pub(super) waits: Option<WaitBook>,
    /// For the next batch.
    pub(super) kernel_code: KernelChanges,
    pub(super) batches: SyncSender<Batch>,
    /// Batches that found the queue full. Nothing is drained while they wait, unless the pace changes.
    pub(super) waiting: VecDeque<Batch>,
    pub(super) stats: Arc<Stats>,
    /// Notices of cgroups and of processes that were lost, as of the last look.
    pub(super) notices_lost: [u64; 2],
    /// How it collects, which others may ask for.
    pub(super) pace: watch::Sender<Pace>,
    pub(super) watch: Vec<u32>,
    pub(super) report_exit: Option<oneshot::Sender<()>>,
}

impl Collector {
    /// Collects until it is told to stop, and then what is left.
    pub(super) fn run(mut self, window: Option<Duration>, orders: Orders) -> Result<(), KernelError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| KernelError::System { what: "starting the collector's event loop", error })?;
        runtime.block_on(self.collect(window, orders))
    }

    async fn collect(&mut self, window: Option<Duration>, orders: Orders) -> Result<(), KernelError> {
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
        let cgroups = match self.kernel.attach_cgroups() {
            Ok(notices) => Some(notices.watch().map_err(unwatchable)?),
            Err(error) => {
                warn!("{error}; containers that come and go between two looks at the cgroups are not known");
                None
            }
        };
        self.cgroups = Cgroups::read(self.kernel.cgroups().controller());
        self.scope.set_turns(self.pace.borrow().replicas, SystemTime::now());
        self.set_scope(self.scope.rules().clone());
        let log = self.kernel.take_log().map(DebugLog::watch).transpose().map_err(unwatchable)?;
        let mut sources = Sources { notices, cgroups, side_band, overflow, log };
        let outcome = self.collect_until_stopped(window, orders, &mut sources).await;
        // Whatever ended collection: the clock stops, and what was sampled is still read and handed on.
        let stopped = self.kernel.stop();
        self.learn(&mut sources);
        self.deliver_waiting();
        let (unfinished, stopped) = match stopped {
            Ok(unfinished) => (unfinished, Ok(())),
            Err(error) => (Unfinished::default(), Err(error)),
        };
        let drained = self.drain_epoch(sources.overflow.get_mut(), Some(&unfinished), None);
        self.deliver_waiting();
        outcome.and(stopped).and(drained)
    }

    async fn collect_until_stopped(
        &mut self,
        window: Option<Duration>,
        mut orders: Orders,
        sources: &mut Sources,
    ) -> Result<(), KernelError> {
        let interval = window.map_or(DRAIN_INTERVAL, |window| window.min(DRAIN_INTERVAL));
        let mut drains = interval_at(tokio::time::Instant::now() + interval, interval);
        drains.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = interval_at(tokio::time::Instant::now(), LOOK_AGAIN);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut retries = interval_at(tokio::time::Instant::now(), RETRY_PACE);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pods = interval_at(tokio::time::Instant::now(), FOLLOW_PODS);
        pods.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut window_opened = Instant::now();
        let mut wanted = None;
        loop {
            let turns_left = self.scope.turns_left(SystemTime::now());
            tokio::select! {
                _ = &mut orders.stopped => return Ok(()),
                pace = changed(&mut orders.pace) => {
                    self.learn(sources);
                    wanted = Some(pace);
                    if self.reach_pace(sources.overflow.get_mut(), &mut wanted)? {
                        window_opened = Instant::now();
                    }
                }
                rules = changed(&mut orders.scope) => self.set_scope(rules),
                _ = retries.tick(), if wanted.is_some() => {
                    if self.reach_pace(sources.overflow.get_mut(), &mut wanted)? {
                        window_opened = Instant::now();
                    }
                }
                guard = sources.notices.readable_mut() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                    self.learn(sources);
                }
                () = cgroups_change(&mut sources.cgroups) => self.learn_cgroups(sources),
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
                () = turns_end(turns_left) => self.change_turns(sources)?,
                _ = pods.tick(), if self.scope.follows_pods() => self.scope.follow_pods(self.cgroups.iter()),
            }
        }
    }

    /// Reads what the kernel announced of cgroups.
    fn learn_cgroups(&mut self, sources: &mut Sources) {
        if let Some(notices) = &mut sources.cgroups {
            notices.get_mut().read(|notice| self.cgroups.notice(notice));
        }
        let news = self.cgroups.take_news();
        self.scope.cgroups_changed(&news.appeared, &news.gone);
    }

    /// Puts other rules into force at once.
    pub(super) fn set_scope(&mut self, rules: Rules) {
        self.scope.apply(rules, self.cgroups.iter());
    }

    /// Looks at whose turn it is among replicas, if that has changed. Waits are charged up to here, and in a next turn from its
    /// beginning: what they cost in between is not what was seen of them.
    fn change_turns(&mut self, sources: &mut Sources) -> Result<(), KernelError> {
        let now = SystemTime::now();
        if self.scope.turns_left(now).is_none_or(|left| !left.is_zero()) {
            return Ok(());
        }
        if self.waits.is_some() {
            self.learn(sources);
            self.offer_waiting();
            if !self.waiting.is_empty() {
                // (Turns may last longer, as long as all do.)
                return Ok(());
            }
            self.drain(sources.overflow.get_mut(), false, true)?;
        }
        self.scope.change_turns(now, self.cgroups.iter());
        Ok(())
    }

    /// Reads what the kernel announced: first processes, then what was mapped in them.
    fn learn(&mut self, sources: &mut Sources) {
        self.learn_cgroups(sources);
        sources.notices.get_mut().read(|notice| {
            self.scope.notice(notice);
            self.table.notice(notice);
        });
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

    /// Goes on at the wanted pace, behind everything that was collected before. False: there is none, or it has to wait
    /// because the namer is too far behind.
    fn reach_pace(&mut self, overflow: &mut Ring, wanted: &mut Option<Pace>) -> Result<bool, KernelError> {
        self.offer_waiting();
        let Some(pace) = wanted.take_if(|_| self.waiting.len() < 2) else { return Ok(false) };
        let collected = self.pace.borrow().collects;
        // What is read below weighs what it did when it was taken, so nothing more is taken before the weights change.
        let other_turns = (pace.replicas != self.pace.borrow().replicas).then_some(pace.replicas);
        if other_turns.is_some() {
            self.scope.withhold();
        }
        let unfinished = match (collected, pace.collects) {
            (true, true) => self.kernel.change_pace(pace.frequency, pace.following())?,
            (_, collects) => {
                let unfinished = if collected { Some(self.kernel.stop()?) } else { None };
                self.kernel.set_pace(pace.frequency, pace.following());
                if collects {
                    self.kernel.start()?;
                }
                unfinished
            }
        };
        // The buffers are read afterwards, since that may take long.
        self.drain_epoch(overflow, unfinished.as_ref(), Some(pace))?;
        if let Some(replicas) = other_turns {
            self.scope.set_turns(replicas, SystemTime::now());
            self.set_scope(self.scope.rules().clone());
        }
        Ok(true)
    }

    /// Reads the sample buffers and hands the samples on.
    fn drain(&mut self, overflow: &mut Ring, closes_window: bool, ends_turn: bool) -> Result<(), KernelError> {
        self.offer_waiting();
        if let Some(waiting) = self.waiting.back_mut() {
            waiting.closes_window |= closes_window;
            self.stats.drains_postponed.add(1);
            return Ok(());
        }
        let mut samples = Vec::new();
        let drained = self.read_rows(overflow, &mut samples, None);
        let settled = self.settle_waits(&mut samples, ends_turn);
        self.hand_on(samples, closes_window, None);
        self.end_drain()?;
        drained.and(settled)
    }

    /// Reads the sample buffers at the end of an epoch, and hands on what is of it, and then what is of the next one already,
    /// if there is one. `unfinished`: the waits that are under way, if they are not followed any more.
    fn drain_epoch(
        &mut self,
        overflow: &mut Ring,
        unfinished: Option<&Unfinished>,
        next: Option<Pace>,
    ) -> Result<(), KernelError> {
        let (mut ended, mut begun) = (Vec::new(), Vec::new());
        let drained = self.read_rows(overflow, &mut ended, next.is_some().then_some(&mut begun));
        let settled = match unfinished {
            Some(unfinished) => self.end_waits(&mut ended, unfinished),
            None => self.settle_waits(&mut ended, false),
        };
        self.hand_on(ended, true, next.clone());
        if let Some(next) = next {
            self.pace.send_replace(next);
            self.hand_on(begun, false, None);
        }
        self.end_drain()?;
        drained.and(settled)
    }

    /// Passes samples to the namer.
    fn hand_on(&mut self, samples: Vec<LocatedSample>, closes_window: bool, next: Option<Pace>) {
        // Replacing the buffers has waited for every program that was running.
        self.published.reuse_released();
        self.publish();
        let kernel_code = std::mem::take(&mut self.kernel_code);
        self.offer(Batch { samples, kernel_code, closes_window, next });
    }

    /// Forgets what no sample can be of any more, and counts.
    fn end_drain(&mut self) -> Result<(), KernelError> {
        for tgid in self.table.end_drain() {
            self.kernel.remove_target(tgid)?;
        }
        self.publish();
        self.cgroups.end_drain();
        self.scope.end_drain();
        self.stats.set_table(self.table.stats());
        self.stats.set_unwind_tables(self.tables.stats(), self.published.refused());
        self.count()?;
        let news = self.cgroups.take_news();
        self.scope.cgroups_changed(&news.appeared, &news.gone);
        self.stats.set_scope(self.scope.stats());
        self.stats.set_cgroups(self.cgroups.stats(), self.cgroups.take_containers());
        self.stats.set_clock(self.kernel.clock().map_or(0, Clock::cpus));
        Ok(())
    }

    /// Reads the kernel programs' counters.
    fn count(&mut self) -> Result<(), KernelError> {
        self.stats.set_kernel_counters(&self.kernel.counters().read()?);
        let lost = [Counter::CgroupNoticesLost, Counter::NoticesLost].map(|counter| self.stats.kernel(counter));
        let before = std::mem::replace(&mut self.notices_lost, lost);
        if lost[0] != before[0] {
            self.cgroups.scan();
            self.scope.look_at_cgroups(self.cgroups.iter());
        }
        if lost[1] != before[1] {
            self.scope.look_at_processes();
        }
        Ok(())
    }

    fn offer(&mut self, batch: Batch) {
        self.waiting.push_back(batch);
        self.offer_waiting();
    }

    /// Hands on what the queue has room for.
    fn offer_waiting(&mut self) {
        while let Some(batch) = self.waiting.pop_front() {
            match self.batches.try_send(batch) {
                Ok(()) => {}
                Err(TrySendError::Full(batch)) => return self.waiting.push_front(batch),
                Err(TrySendError::Disconnected(batch)) => self.count_undeliverable(&batch),
            }
        }
    }

    fn deliver_waiting(&mut self) {
        while let Some(batch) = self.waiting.pop_front() {
            if let Err(refused) = self.batches.send(batch) {
                self.count_undeliverable(&refused.0);
            }
        }
    }

    fn count_undeliverable(&self, batch: &Batch) {
        let tally = batch.samples.iter().map(LocatedSample::tally).sum();
        self.stats.dropped_namer_gone.add(tally);
    }
}

/// Waits for another order.
async fn changed<T: Clone>(order: &mut watch::Receiver<T>) -> T {
    // An error means that nobody can change it any more.
    if order.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    order.borrow_and_update().clone()
}

/// Waits for turns to end, or for a moment, since clocks are set; for ever where none are taken.
async fn turns_end(left: Option<Duration>) {
    let Some(left) = left else { return std::future::pending().await };
    tokio::time::sleep(left.clamp(LEAST_TURN, FOLLOW_PODS)).await;
}

/// Waits for new code; for ever where it is not announced.
async fn code_appears(side_band: &mut Option<AsyncFd<SideBand>>) {
    let Some(side_band) = side_band else { return std::future::pending().await };
    if let Ok(mut guard) = side_band.readable_mut().await {
        guard.clear_ready();
    }
}

/// Waits for cgroups to come or go; for ever where they are not announced.
async fn cgroups_change(cgroups: &mut Option<AsyncFd<Ring>>) {
    let Some(cgroups) = cgroups else { return std::future::pending().await };
    if let Ok(mut guard) = cgroups.readable_mut().await {
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

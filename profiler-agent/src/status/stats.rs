//! Counts shared by all stages.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use profiler_common::abi::{
    counter::{Counter, Role},
    sample::StackEnd,
};

use crate::{
    cgroups::CgroupStats,
    control::{CaptureStats, Control},
    export::delivery::DestinationStats,
    kernel::WaitTotals,
    label::{LabelStats, kubernetes::Pods},
    process::TableStats,
    profile::{Cgroup, Tally},
    scope::ScopeStats,
    symbolize::SymbolizeStats,
    unwind_info::TableBuilderStats,
    waits::WaitStats,
};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to it.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Its value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A tally that only grows.
#[derive(Debug, Default)]
pub struct Amount {
    samples: Count,
    off_cpu_ns: Count,
}

impl Amount {
    /// Adds to it.
    pub fn add(&self, tally: Tally) {
        self.samples.add(tally.samples);
        self.off_cpu_ns.add(tally.off_cpu_ns);
    }

    /// Its value now.
    pub fn get(&self) -> Tally {
        Tally { samples: self.samples.get(), off_cpu_ns: self.off_cpu_ns.get() }
    }
}

/// What the kernel programs have counted.
#[derive(Debug)]
struct KernelCounters {
    /// Those that were loaded before.
    before: [u64; Counter::COUNT],
    now: Vec<u64>,
}

impl Default for KernelCounters {
    fn default() -> Self {
        Self { before: [0; Counter::COUNT], now: Vec::new() }
    }
}

impl KernelCounters {
    /// Adds what programs have counted that ran beside these, and have ended.
    fn add(&mut self, others: &Self) {
        for &counter in Counter::ALL {
            let before = &mut self.before[counter as usize];
            *before = before.saturating_add(others.total(counter));
        }
    }

    fn total(&self, counter: Counter) -> u64 {
        let now = self.now.get(counter as usize).copied().unwrap_or_default();
        self.before[counter as usize].saturating_add(now)
    }
}

/// Everything that is counted. Written by the stages, read by `/metrics` and reports.
#[derive(Debug, Default)]
pub struct Stats {
    /// Samples read from the kernel, with those that they stand for.
    pub samples_drained: Count,
    /// Samples that are among these only because others stand for them: replicas whose turn it was not.
    pub samples_extrapolated: Count,
    /// Rows read from the kernel: distinct stacks per drain.
    pub rows_drained: Count,
    /// Samples whose rows did not decode.
    pub dropped_malformed: Amount,
    /// Drains put off because the namer was behind.
    pub drains_postponed: Count,
    /// Windows closed.
    pub windows_closed: Count,
    /// Rows handed to exporters: distinct stacks per window.
    pub rows_exported: Count,
    /// Rows sent over OTLP: distinct stacks of functions per window.
    pub rows_encoded: Count,
    /// What a recording has written.
    pub recorded: Amount,
    /// Samples dropped because the namer had ended.
    pub dropped_namer_gone: Amount,
    /// Samples dropped because exporters were behind.
    pub dropped_queue_full: Amount,
    /// Whose samples were.
    pub labels: Arc<LabelStats>,
    pods: Mutex<Option<Pods>>,
    destinations: Mutex<Vec<Arc<DestinationStats>>>,
    ends: [Count; StackEnd::ALL.len()],
    wait_ends: [Count; StackEnd::ALL.len()],
    waits: Mutex<(WaitStats, WaitTotals)>,
    kernel: Mutex<KernelCounters>,
    table: Mutex<TableStats>,
    cgroups: Mutex<(CgroupStats, Vec<Arc<Cgroup>>)>,
    scope: Mutex<ScopeStats>,
    symbolize: Mutex<SymbolizeStats>,
    mappings_lost: AtomicU64,
    unwind_tables: Mutex<(TableBuilderStats, u64)>,
    cpus: AtomicUsize,
    ready: AtomicBool,
    stopped: AtomicBool,
    /// How the budget is kept.
    pub control: Control,
    /// Times that the configuration was read again and holds.
    pub config_loaded: Count,
    /// Times that it was read again and refused.
    pub config_refused: Count,
    /// How many captures there were.
    pub captures: CaptureStats,
    /// What captures that are under way have counted so far.
    capturing: Mutex<Vec<Arc<Self>>>,
}

impl Stats {
    /// Counts samples by why their stack ends.
    pub fn count_end(&self, end: StackEnd, samples: u64) {
        if let Some(index) = StackEnd::ALL.iter().position(|&candidate| candidate == end) {
            self.ends[index].add(samples);
        }
    }

    /// Samples by why their stack ends.
    pub fn ends(&self) -> impl Iterator<Item = (StackEnd, u64)> {
        StackEnd::ALL.iter().copied().zip(self.ends.iter().map(Count::get))
    }

    /// Counts time off the CPU by why the stack of the wait ends.
    pub fn count_wait_end(&self, end: StackEnd, time_ns: u64) {
        if let Some(index) = StackEnd::ALL.iter().position(|&candidate| candidate == end) {
            self.wait_ends[index].add(time_ns);
        }
    }

    /// Nanoseconds off the CPU by why the stack of the wait ends.
    pub fn wait_ends(&self) -> impl Iterator<Item = (StackEnd, u64)> {
        StackEnd::ALL.iter().copied().zip(self.wait_ends.iter().map(Count::get))
    }

    pub(crate) fn set_waits(&self, stats: WaitStats, totals: WaitTotals) {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner) = (stats, totals);
    }

    /// The stacks of waits that are kept, and what all threads in scope have waited.
    pub fn waits(&self) -> (WaitStats, WaitTotals) {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the kernel's counters, in the order of [`Counter::ALL`].
    pub fn set_kernel_counters(&self, counters: &[u64]) {
        counters.clone_into(&mut self.kernel.lock().unwrap_or_else(PoisonError::into_inner).now);
    }

    /// The programs are loaded anew: their counters begin at zero.
    pub fn keep_kernel_counters(&self) {
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        for counter in Counter::ALL {
            kernel.before[*counter as usize] = kernel.total(*counter);
        }
        kernel.now.clear();
    }

    /// A kernel counter as of the last look.
    pub fn kernel(&self, counter: Counter) -> u64 {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner).total(counter)
    }

    /// The same with what the programs of captures have counted that are under way: what has been spent.
    pub fn kernel_in_all(&self, counter: Counter) -> u64 {
        let capturing = self.capturing.lock().unwrap_or_else(PoisonError::into_inner);
        capturing.iter().map(|capture| capture.kernel(counter)).fold(self.kernel(counter), u64::saturating_add)
    }

    /// Captures that are under way.
    pub fn capturing(&self) -> usize {
        self.capturing.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// A capture begins, which counts by itself.
    pub fn begin_capture(&self) -> Arc<Self> {
        let capture = Arc::new(Self { labels: Arc::clone(&self.labels), ..Self::default() });
        self.capturing.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&capture));
        capture
    }

    /// A capture has ended, all of whose samples were handed on: what it has counted becomes part of the whole, so that the
    /// books balance. What tells how things are (sizes of tables, totals of waits) is about the daemon's own collection.
    pub fn end_capture(&self, capture: &Arc<Self>) {
        let mut capturing = self.capturing.lock().unwrap_or_else(PoisonError::into_inner);
        capturing.retain(|other| !Arc::ptr_eq(other, capture));
        self.kernel
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(&capture.kernel.lock().unwrap_or_else(PoisonError::into_inner));
        for (own, its) in [
            (&self.samples_drained, &capture.samples_drained),
            (&self.rows_drained, &capture.rows_drained),
            (&self.drains_postponed, &capture.drains_postponed),
            (&self.windows_closed, &capture.windows_closed),
            (&self.rows_exported, &capture.rows_exported),
        ] {
            own.add(its.get());
        }
        for (own, its) in [
            (&self.dropped_malformed, &capture.dropped_malformed),
            (&self.dropped_namer_gone, &capture.dropped_namer_gone),
            (&self.dropped_queue_full, &capture.dropped_queue_full),
        ] {
            own.add(its.get());
        }
        for (own, its) in self.ends.iter().zip(&capture.ends).chain(self.wait_ends.iter().zip(&capture.wait_ends)) {
            own.add(its.get());
        }
    }

    /// Samples that the kernel programs saw and could not keep.
    pub fn lost_in_kernel(&self) -> u64 {
        Counter::ALL.iter().filter(|counter| counter.role() == Role::Lost).map(|&counter| self.kernel(counter)).sum()
    }

    /// What was dropped on the way from the kernel to the exporters, by stage and reason.
    pub fn dropped(&self) -> [(&'static str, &'static str, Tally); 3] {
        [
            ("drain", "malformed", self.dropped_malformed.get()),
            ("name", "namer_gone", self.dropped_namer_gone.get()),
            ("export", "queue_full", self.dropped_queue_full.get()),
        ]
    }

    /// Everything that was dropped before it reached any destination.
    pub fn dropped_in_all(&self) -> Tally {
        self.dropped().into_iter().map(|(_, _, tally)| tally).sum()
    }

    /// Says where pods are known.
    pub fn set_pods(&self, pods: Option<Pods>) {
        *self.pods.lock().unwrap_or_else(PoisonError::into_inner) = pods;
    }

    /// The pods of this node, where there is a cluster.
    pub fn pods(&self) -> Option<Pods> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Names the destinations.
    pub fn set_destinations(&self, destinations: Vec<Arc<DestinationStats>>) {
        *self.destinations.lock().unwrap_or_else(PoisonError::into_inner) = destinations;
    }

    /// What is counted about each destination.
    pub fn destinations(&self) -> Vec<Arc<DestinationStats>> {
        self.destinations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_table(&self, stats: TableStats) {
        *self.table.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }

    /// The process table's sizes and events.
    pub fn table(&self) -> TableStats {
        *self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `containers`: cgroups of containers, where they have changed.
    pub(crate) fn set_cgroups(&self, stats: CgroupStats, containers: Option<Vec<Arc<Cgroup>>>) {
        let mut cgroups = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner);
        cgroups.0 = stats;
        if let Some(containers) = containers {
            cgroups.1 = containers;
        }
    }

    /// The cgroups' sizes and events.
    pub fn cgroups(&self) -> CgroupStats {
        self.cgroups.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Cgroups of containers and pods.
    pub fn containers(&self) -> Vec<Arc<Cgroup>> {
        self.cgroups.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    pub(crate) fn set_scope(&self, stats: ScopeStats) {
        *self.scope.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }

    /// The scope's sizes and events.
    pub fn scope(&self) -> ScopeStats {
        *self.scope.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_mappings_lost(&self, lost: u64) {
        self.mappings_lost.store(lost, Ordering::Relaxed);
    }

    /// Announcements of new mappings that found their ring full.
    pub fn mappings_lost(&self) -> u64 {
        self.mappings_lost.load(Ordering::Relaxed)
    }

    pub(crate) fn set_unwind_tables(&self, stats: TableBuilderStats, mappings_refused: u64) {
        *self.unwind_tables.lock().unwrap_or_else(PoisonError::into_inner) = (stats, mappings_refused);
    }

    /// The unwind tables' sizes and events, and how many times a process's mappings found no room.
    pub fn unwind_tables(&self) -> (TableBuilderStats, u64) {
        *self.unwind_tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_symbolize(&self, stats: SymbolizeStats) {
        *self.symbolize.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }

    /// The namer's counts.
    pub fn symbolize(&self) -> SymbolizeStats {
        *self.symbolize.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how many CPUs the clock runs on.
    pub fn set_clock(&self, cpus: usize) {
        self.cpus.store(cpus, Ordering::Relaxed);
    }

    /// CPUs that are being sampled.
    pub fn cpus(&self) -> usize {
        self.cpus.load(Ordering::Relaxed)
    }

    /// Notes whether somebody has stopped collection.
    pub fn set_stopped(&self, stopped: bool) {
        self.stopped.store(stopped, Ordering::Relaxed);
    }

    /// Whether somebody has stopped collection.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Notes whether sampling is under way.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Whether sampling is under way.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a capture counts is spent at once, and part of the whole from its end on: nothing is counted twice, and nothing
    /// is forgotten when programs are loaded anew.
    #[test]
    fn captures_are_added() {
        let counters = |seen: u64| {
            let mut counters = vec![0; Counter::COUNT];
            counters[Counter::Seen as usize] = seen;
            counters
        };
        let stats = Stats::default();
        stats.set_kernel_counters(&counters(100));
        let captures = [stats.begin_capture(), stats.begin_capture()];
        for (capture, seen) in captures.iter().zip([7, 30]) {
            capture.set_kernel_counters(&counters(seen));
            capture.count_end(StackEnd::ALL[0], seen);
            capture.dropped_queue_full.add(Tally { samples: 1, off_cpu_ns: 5 });
        }
        let both = |stats: &Stats| (stats.kernel(Counter::Seen), stats.kernel_in_all(Counter::Seen));
        assert_eq!(both(&stats), (100, 137));
        stats.end_capture(&captures[0]);
        assert_eq!(both(&stats), (107, 137));
        // The daemon's own programs go on counting, and are loaded anew.
        stats.set_kernel_counters(&counters(200));
        assert_eq!(both(&stats), (207, 237));
        stats.keep_kernel_counters();
        stats.set_kernel_counters(&counters(1));
        stats.end_capture(&captures[1]);
        assert_eq!(both(&stats), (238, 238));
        assert_eq!(stats.dropped_in_all(), Tally { samples: 2, off_cpu_ns: 10 });
        assert_eq!(stats.ends().next(), Some((StackEnd::ALL[0], 37)));
    }
}

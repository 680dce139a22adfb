//! What a drain reads, and what waits have cost.

use std::{collections::HashMap, time::Duration};

use profiler_common::abi::sample::{EventKind, StackEnd};
use tracing::warn;

use super::collector::Collector;
use crate::{
    kernel::{KernelError, Ring, Unfinished},
    profile::{LocatedSample, RawSample, Tally},
    waits::WaitBook,
};

/// A place of waits that was not used for so long makes room for others.
const SITE_IDLE: Duration = Duration::from_secs(10);

impl Collector {
    /// Reads the sample buffers. `begun`: where samples of CPU time go that are of the epoch which has just begun; waits go
    /// on, whatever the epoch is.
    pub(super) fn read_rows(
        &mut self,
        overflow: &mut Ring,
        samples: &mut Vec<LocatedSample>,
        mut begun: Option<&mut Vec<LocatedSample>>,
    ) -> Result<(), KernelError> {
        let (table, cgroups, scope) = (&mut self.table, &mut self.cgroups, &self.scope);
        let (waits, stats) = (&mut self.waits, &self.stats);
        let current = self.kernel.epoch();
        let mut locate = |sample: RawSample| {
            let cgroup = cgroups.get(sample.cgroup);
            table.locate(sample, cgroup)
        };
        self.kernel.drain(overflow, |row| match RawSample::decode(row) {
            Ok(sample) if sample.kind.is_off_cpu() => {
                let Some(waits) = waits else { return };
                let (key, count, waited, is_reference) = (sample.key, sample.count, sample.waited, sample.is_reference);
                waits.add(key, count, waited, is_reference, locate(sample));
            }
            Ok(mut sample) => {
                let taken = sample.count;
                sample.count = taken.saturating_mul(scope.weight(sample.cgroup));
                stats.samples_extrapolated.add(sample.count - taken);
                stats.samples_drained.add(sample.count);
                stats.rows_drained.add(1);
                stats.count_end(sample.end, sample.count);
                match &mut begun {
                    Some(begun) if sample.epoch == current => begun.push(locate(sample)),
                    _ => samples.push(locate(sample)),
                }
            }
            Err(error) => {
                stats.dropped_malformed.add(Tally { samples: RawSample::count_of(row), off_cpu_ns: 0 });
                warn!("{error}");
            }
        })
    }

    /// Adds what waits have cost since the last drain; `ends_turn`: those that are under way too, since others may be in scope
    /// from now on.
    pub(super) fn settle_waits(
        &mut self,
        samples: &mut Vec<LocatedSample>,
        ends_turn: bool,
    ) -> Result<(), KernelError> {
        let Some(waits) = &mut self.waits else { return Ok(()) };
        let mut threads = HashMap::new();
        self.kernel.take_wait_dues(SITE_IDLE, |due| {
            waits.add_due(&due, || self.table.without_stack(due.key.tgid, EventKind::Blocked, StackEnd::Rationed));
        });
        let now = self.kernel.waiting_threads(|thread, wait| {
            threads.insert(thread, wait);
        });
        let all = if ends_turn { threads.clone() } else { HashMap::new() };
        if self.scope.is_limited() {
            // What is out of scope now is not charged any more, however long it has been waiting.
            threads.retain(|_, wait| {
                let process = waits.process(&wait.key);
                process.is_none_or(|process| {
                    self.scope.includes(process.key.tgid, process.cgroup.as_ref().map(|cgroup| cgroup.id))
                })
            });
        }
        // Where the threads could not be read, what has ended is still handed on.
        let now_ns = now.as_ref().map_or(0, |now| now.unwrap_or(0));
        let settled = waits.settle(&threads, now_ns, ends_turn);
        if ends_turn && now_ns != 0 {
            waits.restart(&all, now_ns);
            self.kernel.restart_waits(now_ns)?;
        }
        self.add_waits(samples, settled)?;
        now.map(|_| ())
    }

    /// Adds what waits have cost since the last drain, those that go on too: they are not followed any more.
    pub(super) fn end_waits(
        &mut self,
        samples: &mut Vec<LocatedSample>,
        unfinished: &Unfinished,
    ) -> Result<(), KernelError> {
        let Some(waits) = &mut self.waits else { return Ok(()) };
        for due in &unfinished.dues {
            waits.add_due(due, || self.table.without_stack(due.key.tgid, EventKind::Blocked, StackEnd::Rationed));
        }
        let settled = waits.settle(&unfinished.threads, unfinished.now_ns, true);
        *waits = waits.successor();
        self.add_waits(samples, settled)
    }

    fn add_waits(&self, samples: &mut Vec<LocatedSample>, mut settled: Vec<LocatedSample>) -> Result<(), KernelError> {
        let scale = self.pace.borrow().scale;
        for sample in &mut settled {
            let weight = sample.process.cgroup.as_ref().map_or(1, |cgroup| self.scope.weight(cgroup.id));
            sample.scale(scale * weight as f64);
            self.stats.count_wait_end(sample.end, sample.time_ns);
        }
        samples.extend(settled);
        let waits = self.waits.as_ref().map(WaitBook::stats).unwrap_or_default();
        self.stats.set_waits(waits, self.kernel.wait_totals()?);
        Ok(())
    }
}

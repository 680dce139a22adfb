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

/// What a drain finds of the time between two changes of pace.
pub(super) struct Epoch {
    pub(super) samples: Vec<LocatedSample>,
    /// What joins waits with their stacks.
    pub(super) waits: Option<WaitBook>,
}

impl Collector {
    /// Reads the sample buffers. `now`: where rows of the epoch go that has just begun.
    pub(super) fn read_rows(
        &mut self,
        overflow: &mut Ring,
        before: &mut Epoch,
        mut now: Option<&mut Epoch>,
    ) -> Result<(), KernelError> {
        let (table, cgroups, stats) = (&mut self.table, &mut self.cgroups, &self.stats);
        let current = self.kernel.epoch();
        let mut locate = |sample: RawSample| {
            let cgroup = cgroups.get(sample.cgroup);
            table.locate(sample, cgroup)
        };
        self.kernel.drain(overflow, |row| {
            let sample = match RawSample::decode(row) {
                Ok(sample) => sample,
                Err(error) => {
                    stats.dropped_malformed.add(Tally { samples: RawSample::count_of(row), off_cpu_ns: 0 });
                    return warn!("{error}");
                }
            };
            let epoch = match &mut now {
                Some(now) if sample.epoch == current && !sample.kind.is_off_cpu() => &mut **now,
                _ => &mut *before,
            };
            if sample.kind.is_off_cpu() {
                let Some(waits) = &mut epoch.waits else { return };
                let (key, count, waited, is_reference) = (sample.key, sample.count, sample.waited, sample.is_reference);
                waits.add(key, count, waited, is_reference, locate(sample));
            } else {
                stats.samples_drained.add(sample.count);
                stats.rows_drained.add(1);
                stats.count_end(sample.end, sample.count);
                epoch.samples.push(locate(sample));
            }
        })
    }

    /// Adds what waits have cost since the last drain.
    pub(super) fn settle_waits(&mut self, epoch: &mut Epoch) -> Result<(), KernelError> {
        let Some(waits) = &mut epoch.waits else { return Ok(()) };
        let mut threads = HashMap::new();
        self.kernel.take_wait_dues(SITE_IDLE, |due| {
            waits.add_due(&due, || self.table.without_stack(due.key.tgid, EventKind::Blocked, StackEnd::Rationed));
        });
        let now = self.kernel.waiting_threads(|thread, wait| {
            threads.insert(thread, wait);
        });
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
        let settled = waits.settle(&threads, now_ns, false);
        self.add_waits(epoch, settled)?;
        now.map(|_| ())
    }

    /// Adds what waits have cost since the last drain, those that go on too: they are not followed any more.
    pub(super) fn end_waits(&mut self, epoch: &mut Epoch, unfinished: &Unfinished) -> Result<(), KernelError> {
        let Some(waits) = &mut epoch.waits else { return Ok(()) };
        for due in &unfinished.dues {
            waits.add_due(due, || self.table.without_stack(due.key.tgid, EventKind::Blocked, StackEnd::Rationed));
        }
        let settled = waits.settle(&unfinished.threads, unfinished.now_ns, true);
        self.add_waits(epoch, settled)
    }

    fn add_waits(&self, epoch: &mut Epoch, mut settled: Vec<LocatedSample>) -> Result<(), KernelError> {
        let scale = self.pace.borrow().scale;
        for sample in &mut settled {
            sample.scale(scale);
            self.stats.count_wait_end(sample.end, sample.time_ns);
        }
        epoch.samples.extend(settled);
        let waits = epoch.waits.as_ref().map(WaitBook::stats).unwrap_or_default();
        self.stats.set_waits(waits, self.kernel.wait_totals()?);
        Ok(())
    }
}

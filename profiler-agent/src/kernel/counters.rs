//! What the kernel programs count.

use std::sync::Arc;

use aya::maps::{MapData, PerCpuArray};
use profiler_common::abi::counter::Counter;

use super::KernelError;

/// The programs' counters, for as many readers as there are.
#[derive(Clone)]
pub struct Counters(Arc<PerCpuArray<MapData, u64>>);

impl Counters {
    pub(super) fn new(map: PerCpuArray<MapData, u64>) -> Self {
        Self(Arc::new(map))
    }

    /// The sum of every counter over all CPUs, in the order of [`Counter::ALL`].
    pub fn read(&self) -> Result<Vec<u64>, KernelError> {
        Counter::ALL.iter().map(|&counter| Ok(self.by_cpu(counter)?.iter().sum())).collect()
    }

    /// A counter of each CPU.
    pub(super) fn by_cpu(&self, counter: Counter) -> Result<Vec<u64>, KernelError> {
        Ok(self.0.get(&(counter as u32), 0)?.to_vec())
    }
}

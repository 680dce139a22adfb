//! Double-buffered sample maps: one fills while the other is read.

use std::{io, os::fd::AsFd as _};

use aya::maps::{ArrayOfMaps, MapData};
use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_HASH;
use profiler_common::abi::sample::{LARGE_FRAMES, MEDIUM_FRAMES, SMALL_FRAMES, Sample, SampleKey};

use super::{KernelError, commands};

/// Rows of each size class, per buffer.
#[derive(Clone, Copy, Debug)]
pub struct BufferRows {
    /// Stacks of at most [`SMALL_FRAMES`].
    pub small: u32,
    /// Stacks of at most [`MEDIUM_FRAMES`].
    pub medium: u32,
    /// Stacks of at most [`LARGE_FRAMES`].
    pub large: u32,
}

impl BufferRows {
    /// Rows for a machine of `cpus` CPUs sampled `frequency` times a second and drained every
    /// `seconds`: enough for every stack to be unique, within a budget of 32 MiB for all buffers.
    pub fn for_rate(cpus: usize, frequency: u64, seconds: u64) -> Self {
        const MAX_SMALL: u64 = 16 << 10;
        let samples = (cpus as u64).saturating_mul(frequency).saturating_mul(seconds);
        let small = samples.clamp(1 << 10, MAX_SMALL);
        // SANITY: at most MAX_SMALL, which fits.
        let rows = |divisor: u64| u32::try_from(small / divisor).unwrap_or(u32::MAX);
        Self { small: rows(1), medium: rows(4), large: rows(32) }
    }

    /// Bytes of kernel memory that both buffers of every class take, without the kernel's bookkeeping
    /// (about 48 bytes a row).
    pub fn bytes(self) -> u64 {
        let row = |rows: u32, sample: usize| u64::from(rows) * (sample + size_of::<SampleKey>()) as u64;
        2 * (row(self.small, size_of::<Sample<SMALL_FRAMES>>())
            + row(self.medium, size_of::<Sample<MEDIUM_FRAMES>>())
            + row(self.large, size_of::<Sample<LARGE_FRAMES>>()))
    }
}

/// The two buffers of one size class.
pub(super) struct DoubleBuffer {
    slot: ArrayOfMaps<MapData, MapData>,
    buffers: [MapData; 2],
    /// Which of `buffers` the programs fill.
    active: usize,
    value_size: usize,
}

impl DoubleBuffer {
    /// Makes both buffers of `rows` rows and installs the first.
    pub(super) fn new(slot: ArrayOfMaps<MapData, MapData>, value_size: usize, rows: u32) -> Result<Self, KernelError> {
        let key_size = size_of::<SampleKey>() as u32;
        let create = || {
            let definition =
                aya_obj::Map::new_from_params(BPF_MAP_TYPE_HASH as u32, key_size, value_size as u32, rows, 0);
            MapData::create(definition, "samples", None)
        };
        let mut this = Self { slot, buffers: [create()?, create()?], active: 0, value_size };
        this.slot.set(0, &this.buffers[0], 0)?;
        Ok(this)
    }

    /// Swaps the buffers and empties the one that was being filled, row by row.
    ///
    /// The kernel returns from replacing a map in a map only after an RCU grace period
    /// (`maybe_wait_bpf_programs`, `kernel/bpf/syscall.c`), so no program still writes to the old buffer:
    /// nothing is lost and nothing is counted twice.
    pub(super) fn drain(&mut self, mut row: impl FnMut(&[u8])) -> Result<(), KernelError> {
        let next = 1 - self.active;
        self.slot.set(0, &self.buffers[next], 0)?;
        let filled = self.buffers[self.active].fd().as_fd();
        self.active = next;
        commands::drain(filled, size_of::<SampleKey>(), self.value_size, |_, value| row(value))
            .map_err(|error: io::Error| KernelError::System { what: "reading a sample buffer", error })
    }
}

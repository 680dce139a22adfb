//! Every map the programs share with the agent. Names and shapes are part of the ABI.

use aya_ebpf::{
    btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use profiler_common::abi::{
    counter::Counter,
    notice::PLACES,
    sample::{LARGE_FRAMES, MEDIUM_FRAMES, SMALL_FRAMES, Sample, SampleKey},
};

use crate::unwind::Scratch;

/// One buffer of aggregated samples. The agent makes the real ones and chooses their size; preallocated,
/// because the sampling program may run in an interrupt.
pub type Buffer<const FRAMES: usize> = HashMap<SampleKey, Sample<FRAMES>, 1>;

/// Slot 0 holds the buffer that is being filled. The agent swaps it; the swap returns only when no program
/// uses the old buffer any more.
#[btf_map]
pub static SAMPLES_SMALL: ArrayOfMaps<Buffer<SMALL_FRAMES>, 1> = ArrayOfMaps::new();
#[btf_map]
pub static SAMPLES_MEDIUM: ArrayOfMaps<Buffer<MEDIUM_FRAMES>, 1> = ArrayOfMaps::new();
#[btf_map]
pub static SAMPLES_LARGE: ArrayOfMaps<Buffer<LARGE_FRAMES>, 1> = ArrayOfMaps::new();

/// Samples that found their buffer full or locked, each with a count of one.
#[btf_map]
pub static OVERFLOW: RingBuf<[u8; 0], { 512 * 1024 }> = RingBuf::new();

/// Process notices, in order.
#[btf_map]
pub static NOTICES: RingBuf<[u8; 0], { 1024 * 1024 }> = RingBuf::new();

/// Per-CPU counters, indexed by `Counter`.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::COUNT }> = PerCpuArray::new();

/// Where the sampling program builds a sample.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// Processes to record (by tgid, with `abi::settings::target` flags) when the scope is limited.
#[btf_map]
pub static TARGETS: HashMap<u32, u32, 16384> = HashMap::new();

/// Places that were announced: tags in a direct-mapped cache, indexed by their own low bits. It never fills up,
/// takes no lock and needs no cleaning: what is overwritten is announced again.
#[btf_map]
pub static ANNOUNCED: Array<u64, PLACES> = Array::new();

/// Adds one to a counter.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        crate::memory::atomic_add(slot, 1);
    }
}

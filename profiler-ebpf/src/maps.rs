//! Every map the programs share with the agent. Names and shapes are part of the ABI.

use core::ptr::{self, NonNull};

use aya_ebpf::{
    bindings::{
        BPF_F_MMAPABLE, BPF_NOEXIST,
        bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH},
    },
    btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, ProgramArray, RingBuf},
    helpers::generated::{bpf_map_lookup_elem, bpf_map_update_elem},
    macros::btf_map,
};
use profiler_common::{
    abi::{
        counter::Counter,
        notice::PLACES,
        process::ProcessKey,
        sample::{LARGE_FRAMES, MEDIUM_FRAMES, SMALL_FRAMES, Sample, SampleKey},
        scope::{MAX_SCOPED_CGROUPS, MAX_SCOPED_PROCESSES, ScopeControl, ScopeMatch},
        tables::{
            CHUNK_ROWS, ExecutableTable, MAX_CHUNKS, MAX_EXECUTABLES, MAX_MAPPINGS, MAX_PAGES, MAX_PROCESSES,
            MAX_RULES, MappingRange, MappingRecord, Page, Row,
        },
        waits::{self, Ration, SITES, THREAD_SLOTS, ThreadWait, WaitControl, WaitSite},
    },
    unwind::rule::Rule,
};

use crate::{cgroup, unwind::Scratch};

/// The shape of maps that the agent makes and puts into a map of maps.
///
/// It gives sizes where other definitions give types: a map without type information can only take the place of
/// another without (`bpf_map_meta_equal` compares `timer_off` from 5.15 to 6.2, which tells them apart).
#[repr(C)]
pub struct Inner<const KIND: usize, const KEY_BYTES: usize, const VALUE_BYTES: usize, const FLAGS: usize> {
    r#type: *const [i32; KIND],
    key_size: *const [i32; KEY_BYTES],
    value_size: *const [i32; VALUE_BYTES],
    max_entries: *const [i32; 1],
    map_flags: *const [i32; FLAGS],
}

impl<const KIND: usize, const KEY_BYTES: usize, const VALUE_BYTES: usize, const FLAGS: usize>
    Inner<KIND, KEY_BYTES, VALUE_BYTES, FLAGS>
{
    const fn check_sizes<K, V>() {
        assert!(size_of::<K>() == KEY_BYTES && size_of::<V>() == VALUE_BYTES);
    }

    /// The value of a key, which stays readable while the program runs.
    #[inline(always)]
    pub fn get_ptr_mut<K, V>(&self, key: &K) -> Option<NonNull<V>> {
        const { Self::check_sizes::<K, V>() };
        // SAFETY: the kernel gave us the map's address in place of this definition's; the key has its size.
        NonNull::new(unsafe { bpf_map_lookup_elem(ptr::from_ref(self).cast_mut().cast(), ptr::from_ref(key).cast()) })
            .map(NonNull::cast)
    }

    /// Adds a key and its value. False: the key is there already, or there is no room.
    #[inline(always)]
    pub fn add<K, V>(&self, key: &K, value: &V) -> bool {
        const { Self::check_sizes::<K, V>() };
        let map = ptr::from_ref(self).cast_mut().cast();
        // SAFETY: as above; the value has the map's size too.
        let result = unsafe {
            bpf_map_update_elem(map, ptr::from_ref(key).cast(), ptr::from_ref(value).cast(), u64::from(BPF_NOEXIST))
        };
        result == 0
    }
}

/// One buffer of aggregated samples: `SampleKey` to `Sample`. The agent chooses how many it holds; preallocated,
/// because the sampling program may run in an interrupt.
pub type Buffer<const VALUE_BYTES: usize> =
    Inner<{ BPF_MAP_TYPE_HASH as usize }, { size_of::<SampleKey>() }, VALUE_BYTES, 0>;

/// Slot 0 holds the buffer that is being filled. The agent swaps it; the swap returns only when no program
/// uses the old buffer any more.
#[btf_map]
pub static SAMPLES_SMALL: ArrayOfMaps<Buffer<{ size_of::<Sample<SMALL_FRAMES>>() }>, 1> = ArrayOfMaps::new();
#[btf_map]
pub static SAMPLES_MEDIUM: ArrayOfMaps<Buffer<{ size_of::<Sample<MEDIUM_FRAMES>>() }>, 1> = ArrayOfMaps::new();
#[btf_map]
pub static SAMPLES_LARGE: ArrayOfMaps<Buffer<{ size_of::<Sample<LARGE_FRAMES>>() }>, 1> = ArrayOfMaps::new();

/// Samples that found their buffer full or locked, each with a count of one.
#[btf_map]
pub static OVERFLOW: RingBuf<[u8; 0], { 512 * 1024 }> = RingBuf::new();

/// Process notices, in order.
#[btf_map]
pub static NOTICES: RingBuf<[u8; 0], { 1024 * 1024 }> = RingBuf::new();

/// Notices about cgroups.
#[btf_map]
pub static CGROUPS: RingBuf<[u8; 0], { 128 * 1024 }> = RingBuf::new();

/// Where they are put together.
#[btf_map]
pub static CGROUP_NOTICE: PerCpuArray<cgroup::Scratch, 1> = PerCpuArray::new();

/// Per-CPU counters, indexed by `Counter`.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::COUNT }> = PerCpuArray::new();

/// Where samples are built: one place for the sampling clock, one for the scheduler's events, which the clock may
/// interrupt.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 2> = PerCpuArray::new();

/// Index of the sampling clock's scratch.
pub const ON_CPU: u32 = 0;
/// Index of the scratch of the scheduler's events.
pub const OFF_CPU: u32 = 1;

/// This CPU's scratch.
#[inline(always)]
pub fn scratch(index: u32) -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(index)
}

/// Processes to record (by tgid, with `abi::settings::target` flags) when the scope is limited.
#[btf_map]
pub static TARGETS: HashMap<u32, u32, 16384> = HashMap::new();

/// The rules of the scope. The agent changes them at any time.
#[btf_map]
pub static SCOPE: Array<ScopeControl, 1> = Array::new();

/// Cgroups that rules are about, by ID.
#[btf_map]
pub static SCOPE_CGROUPS: HashMap<u64, ScopeMatch, MAX_SCOPED_CGROUPS> = HashMap::new();

/// Processes that rules are about, by tgid in the agent's PID namespace.
#[btf_map]
pub static SCOPE_PROCESSES: HashMap<u32, ScopeMatch, MAX_SCOPED_PROCESSES> = HashMap::new();

/// Places that were announced: tags in a direct-mapped cache, indexed by their own low bits. It never fills up,
/// takes no lock and needs no cleaning: what is overwritten is announced again.
#[btf_map]
pub static ANNOUNCED: Array<u64, PLACES> = Array::new();

/// The mappings of each process whose mappings are known. A forked process starts with its parent's.
#[btf_map]
pub static PROCESSES: HashMap<ProcessKey, MappingRange, MAX_PROCESSES> = HashMap::new();

/// Mappings, in ranges that belong to one or more processes.
#[btf_map]
pub static MAPPINGS: Array<MappingRecord, MAX_MAPPINGS> = Array::new();

/// Unwind tables of executables. The programs mark those that are missing and those that are used.
#[btf_map]
pub static EXECUTABLES: Array<ExecutableTable, MAX_EXECUTABLES> = Array::new();

/// Pages of tables, in ranges that belong to one table.
#[btf_map]
pub static PAGES: Array<Page, MAX_PAGES> = Array::new();

/// One chunk of rows: a single `[Row; CHUNK_ROWS]`, so that one lookup leads to all of them. Memory-mapped, so
/// that the agent can change a part of it.
pub type Chunk = Inner<
    { BPF_MAP_TYPE_ARRAY as usize },
    { size_of::<u32>() },
    { size_of::<[Row; CHUNK_ROWS]>() },
    { BPF_F_MMAPABLE as usize },
>;

/// Rows, in chunks that the agent makes when it needs them.
#[btf_map]
pub static CHUNKS: ArrayOfMaps<Chunk, MAX_CHUNKS> = ArrayOfMaps::new();

/// What rows stand for. Number 0 is the frame-pointer chain.
#[btf_map]
pub static RULES: Array<Rule, MAX_RULES> = Array::new();

/// The program that goes on with a walk, where one program may only walk a part of it.
#[btf_map]
pub static WALK_ON: ProgramArray<1> = ProgramArray::new();

/// The same for the stacks of waits: programs of different kinds cannot share one.
#[btf_map]
pub static WAIT_WALK_ON: ProgramArray<1> = ProgramArray::new();

/// Threads that were seen to leave a CPU: slots that are indexed by the low bits of the thread's ID, since that takes
/// a tenth of the time of a hash map's lookup. They are freed when the thread ends. Memory-mapped, so that the agent can
/// look through them at no cost.
#[btf_map]
pub static THREADS: Array<ThreadWait, THREAD_SLOTS, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Threads whose slot is another's.
#[btf_map]
pub static MORE_THREADS: HashMap<u32, ThreadWait, { waits::MORE_THREADS }> = HashMap::new();

/// Each CPU's ration of stacks of waits.
#[btf_map]
pub static RATIONS: PerCpuArray<Ration, 1> = PerCpuArray::new();

/// Places of waits, indexed by the low bits of their tag. The agent frees those that are not used any more; until
/// then, others with the same index have none. Memory-mapped, so that the agent can take what is due.
#[btf_map]
pub static WAIT_SITES: Array<WaitSite, SITES, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Whether waits are followed, and since when.
#[btf_map]
pub static WAIT_CONTROL: Array<WaitControl, 1> = Array::new();

/// What rows are marked with now.
#[inline(always)]
pub fn epoch() -> u8 {
    match WAIT_CONTROL.get_ptr(0) {
        // SAFETY: an array's slots are always there.
        Some(control) => unsafe { (&raw const (*control).epoch).read_volatile() as u8 },
        None => 0,
    }
}

/// Adds one to a counter.
#[inline(always)]
pub fn count(counter: Counter) {
    add(counter, 1);
}

/// Adds to a counter.
#[inline(always)]
pub fn add(counter: Counter, amount: u64) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        crate::memory::atomic_add(slot, amount);
    }
}

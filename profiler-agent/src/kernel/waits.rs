//! The programs on the scheduler's events, and their maps.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::{self, NonNull},
    sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use aya::{
    Btf, Ebpf,
    maps::{Array, MapData, PerCpuArray, ProgramArray},
    programs::{BtfTracePoint, tp_btf::BtfTracePointLinkId},
};
use nix::time::{ClockId, clock_gettime};
use profiler_common::abi::{
    sample::SampleKey,
    waits::{MORE_THREADS, Ration, SITES, THREAD_SLOTS, ThreadWait, WaitControl, WaitSite},
};
use zerocopy::FromBytes as _;

use super::{KernelError, commands, program, take_map};

/// The maps of threads.
const THREADS: &str = "THREADS";
const MORE_THREADS_MAP: &str = "MORE_THREADS";
const SWITCH: &str = "sched_switch";
const SITES_MAP: &str = "WAIT_SITES";
const WAKE: &str = "sched_wakeup";

/// The maps' sizes: next to nothing where waits are not recorded.
pub(super) fn map_sizes(follow: bool) -> [(&'static str, u32); 3] {
    let size = |entries: usize| if follow { entries as u32 } else { 1 };
    [(THREADS, size(THREAD_SLOTS)), (MORE_THREADS_MAP, size(MORE_THREADS)), (SITES_MAP, size(SITES))]
}

/// What threads in scope have waited, whether their stacks were sampled or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitTotals {
    /// Waits that ended.
    pub ended: u64,
    /// Nanoseconds, by `EventKind`.
    pub waited_ns: [u64; 8],
}

/// The programs that follow waits, loaded.
pub(super) struct WaitPrograms {
    /// Program and, while attached, its link; the one that must come first comes first.
    programs: [(&'static str, Option<BtfTracePointLinkId>); 2],
    threads: MapData,
    more_threads: MapData,
    rations: PerCpuArray<MapData, RationCell>,
    control: Array<MapData, ControlCell>,
    sites: Sites,
    /// The kernel empties it when nobody holds it any more.
    _walk_on: Option<ProgramArray<MapData>>,
}

/// The records as aya wants them: plain data of its own.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct RationCell(Ration);
#[repr(transparent)]
#[derive(Clone, Copy)]
struct ControlCell(WaitControl);

// SAFETY: integers only, without padding: any bytes are a valid value.
unsafe impl aya::Pod for RationCell {}
// SAFETY: as above.
unsafe impl aya::Pod for ControlCell {}

impl WaitPrograms {
    /// Loads the programs; they do nothing before [`Self::attach`].
    pub(super) fn load(ebpf: &mut Ebpf, types: &Btf, in_parts: bool) -> Result<Self, KernelError> {
        let switch = if in_parts { "off_cpu_in_parts" } else { "off_cpu_loop" };
        let wake = "off_cpu_wake";
        let load = |ebpf: &mut Ebpf, name: &'static str, event: &str| {
            let program: &mut BtfTracePoint = program(ebpf, name)?;
            program.load(event, types).map_err(|error| KernelError::Program { program: name, error })
        };
        let walk_on = if in_parts {
            let name = "wait_walk_on";
            load(ebpf, name, SWITCH)?;
            let mut programs: ProgramArray<MapData> = take_map(ebpf, "WAIT_WALK_ON")?;
            let walk_on: &mut BtfTracePoint = program(ebpf, name)?;
            let descriptor = walk_on.fd().map_err(|error| KernelError::Program { program: name, error })?;
            programs.set(0, descriptor, 0)?;
            Some(programs)
        } else {
            None
        };
        load(ebpf, switch, SWITCH)?;
        load(ebpf, wake, WAKE)?;
        let threads = match ebpf.take_map(THREADS) {
            Some(aya::maps::Map::Array(map)) => map,
            _ => return Err(KernelError::MissingPart(THREADS)),
        };
        let more_threads = match ebpf.take_map(MORE_THREADS_MAP) {
            Some(aya::maps::Map::HashMap(map)) => map,
            _ => return Err(KernelError::MissingPart(MORE_THREADS_MAP)),
        };
        let sites = match ebpf.take_map(SITES_MAP) {
            Some(aya::maps::Map::Array(map)) => map,
            _ => return Err(KernelError::MissingPart(SITES_MAP)),
        };
        Ok(Self {
            programs: [(wake, None), (switch, None)],
            threads,
            more_threads,
            rations: take_map(ebpf, "RATIONS")?,
            control: take_map(ebpf, "WAIT_CONTROL")?,
            sites: Sites::map(&sites)
                .map_err(|error| KernelError::System { what: "mapping the places of waits", error })?,
            _walk_on: walk_on,
        })
    }

    /// Follows waits from here on.
    pub(super) fn attach(&mut self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        for (name, link) in &mut self.programs {
            let program: &mut BtfTracePoint = program(ebpf, name)?;
            *link = Some(program.attach().map_err(|error| KernelError::Program { program: name, error })?);
        }
        let control = WaitControl { since_ns: monotonic_ns(), is_incomplete: 0 };
        Ok(self.control.set(0, ControlCell(control), 0)?)
    }

    /// Follows no more waits. Threads that wait now are still in the map.
    pub(super) fn detach(&mut self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        for (name, link) in self.programs.iter_mut().rev() {
            if let Some(link) = link.take() {
                let program: &mut BtfTracePoint = program(ebpf, name)?;
                program.detach(link).map_err(|error| KernelError::Program { program: name, error })?;
            }
        }
        Ok(())
    }

    /// Calls `thread` for every thread that is waiting; returns when the reading began.
    pub(super) fn threads(&self, mut thread: impl FnMut(u32, ThreadWait)) -> Result<u64, KernelError> {
        let now = monotonic_ns();
        for map in [&self.threads, &self.more_threads] {
            commands::read(map.fd().as_fd(), size_of::<u32>(), size_of::<ThreadWait>(), |_, value| {
                let Ok(wait) = ThreadWait::read_from_bytes(value) else { return };
                if wait.thread != 0 && wait.began_ns != 0 {
                    thread(wait.thread, wait);
                }
            })
            .map_err(|error| KernelError::System { what: "reading the waiting threads", error })?;
        }
        Ok(now)
    }

    /// Takes what places are due (or owe), and frees those that were not used in the last `idle`.
    pub(super) fn take_dues(&self, idle: Duration, due: impl FnMut(WaitSite)) {
        let idle = u64::try_from(idle.as_nanos()).unwrap_or(u64::MAX);
        self.sites.take_dues(monotonic_ns().saturating_sub(idle), due);
    }

    /// What has been waited.
    pub(super) fn totals(&self) -> Result<WaitTotals, KernelError> {
        let mut totals = WaitTotals::default();
        for RationCell(ration) in self.rations.get(&0, 0)?.iter() {
            totals.ended = totals.ended.saturating_add(ration.ended);
            for (sum, waited) in totals.waited_ns.iter_mut().zip(ration.waited_ns) {
                *sum = sum.saturating_add(waited);
            }
        }
        Ok(totals)
    }
}

/// The map of places, in this process's memory.
struct Sites {
    first: NonNull<WaitSite>,
}

impl Sites {
    const BYTES: usize = SITES * size_of::<WaitSite>();

    fn map(map: &MapData) -> io::Result<Self> {
        let descriptor = map.fd().as_fd().as_raw_fd();
        // SAFETY: a new mapping of the map's values, which the kernel keeps alive for as long as they are mapped.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                Self::BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                descriptor,
                0,
            )
        };
        match NonNull::new(mapped.cast()) {
            Some(first) if mapped != libc::MAP_FAILED => Ok(Self { first }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Calls `due` for each place that is due something; frees those that were last used before `before_ns`.
    fn take_dues(&self, before_ns: u64, mut due: impl FnMut(WaitSite)) {
        for index in 0..SITES {
            // SAFETY: the mapping holds SITES values, aligned to eight bytes each, and lives as long as `self`. Programs
            // change them at the same time: each member is only accessed atomically.
            let (tag, tgid, used, blocked, queued, hash, shape) = unsafe {
                let site = self.first.as_ptr().add(index);
                (
                    AtomicU32::from_ptr(&raw mut (*site).tag),
                    AtomicU32::from_ptr(&raw mut (*site).tgid),
                    AtomicU64::from_ptr(&raw mut (*site).used_ns),
                    AtomicI64::from_ptr(&raw mut (*site).blocked_ns),
                    AtomicI64::from_ptr(&raw mut (*site).queued_ns),
                    AtomicU64::from_ptr(&raw mut (*site).key.hash),
                    AtomicU32::from_ptr(&raw mut (*site).key.shape),
                )
            };
            let owner = tag.load(Relaxed);
            if owner == 0 {
                continue;
            }
            let tgid = tgid.load(Relaxed);
            let key = SampleKey { hash: hash.load(Relaxed), tgid, shape: shape.load(Relaxed) };
            let (blocked_ns, queued_ns) = (blocked.swap(0, Relaxed), queued.swap(0, Relaxed));
            if used.load(Relaxed) <= before_ns {
                // A wait that ends here at this moment leaves its time to whoever has the slot next.
                tag.store(0, Relaxed);
            }
            if blocked_ns != 0 || queued_ns != 0 {
                due(WaitSite { tag: owner, tgid, blocked_ns, queued_ns, key, ..WaitSite::default() });
            }
        }
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` and is not used any more.
        unsafe { libc::munmap(self.first.as_ptr().cast(), Self::BYTES) };
    }
}

// SAFETY: the memory is only accessed atomically, and belongs to no thread.
unsafe impl Send for Sites {}

/// The clock of `bpf_ktime_get_ns`.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

//! The programs on the scheduler's events, and their maps.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicI64, AtomicU8, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed},
    },
    time::Duration,
};

use aya::{
    Btf, Ebpf,
    maps::{Array, MapData, PerCpuArray, ProgramArray},
    programs::BtfTracePoint,
};
use nix::time::{ClockId, clock_gettime};
use profiler_common::abi::{
    sample::SampleKey,
    waits::{
        Balance, MAX_SHARE, MORE_THREADS, Ration, SITES, THREAD_SLOTS, ThreadWait, USED_SHIFT, WaitControl, WaitSite,
    },
};
use zerocopy::FromBytes as _;

use super::{Attachments, KernelError, commands, program, take_map};
use crate::profile::WaitDue;

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

/// Which waits are followed, and how closely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Following {
    /// Stacks that each CPU may take per second; zero: every wait's.
    pub stacks_per_second: u32,
    /// One of 2^this waits is followed, of those that come too often; `None`: no wait is.
    pub share: Option<u32>,
}

/// What was under way when waits were followed in another way, or no more.
#[derive(Debug, Default)]
pub struct Unfinished {
    /// The threads that waited, by ID.
    pub threads: HashMap<u32, ThreadWait>,
    /// When that was, by the kernel's clock, nanoseconds.
    pub now_ns: u64,
    /// What places were due, or owed.
    pub dues: Vec<WaitDue>,
}

/// The programs that follow waits, loaded.
pub(super) struct WaitPrograms {
    /// The one that must be attached first comes first.
    programs: Vec<&'static str>,
    attachments: Attachments,
    threads: Shared<ThreadWait>,
    more_threads: MapData,
    rations: PerCpuArray<MapData, RationCell>,
    sites: Shared<WaitSite>,
    /// Whether wakeups are watched: the scheduler's own books are not used.
    watches_wakeups: bool,
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

/// What programs are told while they run.
pub(super) struct Control(Array<MapData, ControlCell>);

impl Control {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Ok(Self(take_map(ebpf, "WAIT_CONTROL")?))
    }

    /// Goes on as before, but for how waits are followed.
    pub(super) fn change(&mut self, following: Following, epoch: u32) -> Result<(), KernelError> {
        let ControlCell(before) = self.0.get(&0, 0)?;
        self.set(WaitControl {
            stacks_per_second: following.stacks_per_second,
            share: following.share.unwrap_or_default().min(MAX_SHARE),
            epoch,
            ..before
        })
    }

    /// Charges waits from this time on.
    pub(super) fn restart(&mut self, since_ns: u64) -> Result<(), KernelError> {
        let ControlCell(before) = self.0.get(&0, 0)?;
        self.set(WaitControl { since_ns, ..before })
    }

    pub(super) fn set(&mut self, control: WaitControl) -> Result<(), KernelError> {
        Ok(self.0.set(0, ControlCell(control), 0)?)
    }
}

impl WaitPrograms {
    /// Loads the programs; they do nothing before [`Self::attach`].
    pub(super) fn load(
        ebpf: &mut Ebpf,
        types: &Btf,
        in_parts: bool,
        watch_wakeups: bool,
        attachments: Attachments,
    ) -> Result<Self, KernelError> {
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
        let mut programs = vec![switch];
        if watch_wakeups {
            load(ebpf, wake, WAKE)?;
            programs.insert(0, wake);
        }
        let threads = Shared::map(ebpf, THREADS, THREAD_SLOTS)?;
        let sites = Shared::map(ebpf, SITES_MAP, SITES)?;
        let more_threads = match ebpf.take_map(MORE_THREADS_MAP) {
            Some(aya::maps::Map::HashMap(map)) => map,
            _ => return Err(KernelError::MissingPart(MORE_THREADS_MAP)),
        };
        Ok(Self {
            programs,
            attachments,
            threads,
            more_threads,
            rations: take_map(ebpf, "RATIONS")?,
            sites,
            watches_wakeups: watch_wakeups,
            _walk_on: walk_on,
        })
    }

    /// Follows waits from here on: nothing is known of any thread.
    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        following: Following,
        epoch: u32,
        control: &mut Control,
    ) -> Result<(), KernelError> {
        self.forget_threads()?;
        control.set(WaitControl {
            since_ns: monotonic_ns(),
            is_incomplete: 0,
            stacks_per_second: following.stacks_per_second,
            share: following.share.unwrap_or_default().min(MAX_SHARE),
            epoch,
            reserved: 0,
        })?;
        self.programs.iter().try_for_each(|name| self.attachments.add_event(ebpf, name))
    }

    /// Follows no more waits; returns what is under way.
    pub(super) fn detach(&mut self) -> Result<Unfinished, KernelError> {
        for name in self.programs.iter().rev() {
            self.attachments.remove_event(name);
        }
        // What threads kept of what their places are due is the places' now.
        self.each_thread(|wait| self.sites.settle(&wait))?;
        let mut unfinished = Unfinished::default();
        unfinished.now_ns = self.threads(|thread, wait| {
            unfinished.threads.insert(thread, wait);
        })?;
        self.take_dues(Duration::ZERO, |due| unfinished.dues.push(due));
        Ok(unfinished)
    }

    /// Empties the maps of threads: what they say is about waits that were charged long ago.
    fn forget_threads(&mut self) -> Result<(), KernelError> {
        self.threads.clear();
        let more = self.more_threads.fd().as_fd();
        commands::drain(more, size_of::<u32>(), size_of::<ThreadWait>(), |_, _| {})
            .map_err(|error| KernelError::System { what: "forgetting the waiting threads", error })
    }

    /// Calls `thread` for every thread that is waiting; returns when the reading began.
    pub(super) fn threads(&self, mut thread: impl FnMut(u32, ThreadWait)) -> Result<u64, KernelError> {
        let now = monotonic_ns();
        self.each_thread(|wait| {
            if wait.began_ns != 0 {
                // By the scheduler's books, nothing is known of that moment before the wait ends.
                let ready_ns = if self.watches_wakeups { wait.ready_ns } else { 0 };
                thread(wait.thread, ThreadWait { ready_ns, ..wait });
            }
        })?;
        Ok(now)
    }

    /// Calls `thread` for every thread that is known.
    fn each_thread(&self, mut thread: impl FnMut(ThreadWait)) -> Result<(), KernelError> {
        self.threads.each(&mut thread);
        commands::read(self.more_threads.fd().as_fd(), size_of::<u32>(), size_of::<ThreadWait>(), |_, value| {
            if let Ok(wait) = ThreadWait::read_from_bytes(value) {
                thread(wait);
            }
        })
        .map_err(|error| KernelError::System { what: "reading the waiting threads", error })
    }

    /// Takes what places are due (or owe), and frees those that were not used in the last `idle`.
    pub(super) fn take_dues(&self, idle: Duration, due: impl FnMut(WaitDue)) {
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

/// A map's values, in this process's memory too. Programs change them at any time, so that they are only accessed
/// atomically, member by member.
struct Shared<T> {
    first: NonNull<T>,
    len: usize,
}

impl<T> Shared<T> {
    /// Maps the array `name`, which has `len` values.
    fn map(ebpf: &mut Ebpf, name: &'static str, len: usize) -> Result<Self, KernelError> {
        let Some(aya::maps::Map::Array(map)) = ebpf.take_map(name) else {
            return Err(KernelError::MissingPart(name));
        };
        let descriptor = map.fd().as_fd().as_raw_fd();
        // SAFETY: a new mapping of the map's values, which the kernel keeps alive for as long as they are mapped.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                descriptor,
                0,
            )
        };
        match NonNull::new(mapped.cast()) {
            Some(first) if mapped != libc::MAP_FAILED => Ok(Self { first, len }),
            _ => Err(KernelError::System { what: "mapping what is known of waits", error: io::Error::last_os_error() }),
        }
    }

    /// The values' addresses, all of them aligned and valid as long as `self`.
    fn addresses(&self) -> impl Iterator<Item = *mut T> {
        // SAFETY: the mapping holds `len` values.
        (0..self.len).map(|index| unsafe { self.first.as_ptr().add(index) })
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` and is not used any more.
        unsafe { libc::munmap(self.first.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

// SAFETY: the memory is only accessed atomically, and belongs to no thread.
unsafe impl<T> Send for Shared<T> {}

impl Shared<ThreadWait> {
    /// Forgets every thread. The programs have to be detached.
    fn clear(&self) {
        for slot in self.addresses() {
            // SAFETY: see `addresses`; each member is accessed atomically.
            let (owner, began, site) = unsafe {
                (
                    AtomicU32::from_ptr(&raw mut (*slot).thread),
                    AtomicU64::from_ptr(&raw mut (*slot).began_ns),
                    AtomicU32::from_ptr(&raw mut (*slot).site),
                )
            };
            if owner.load(Relaxed) != 0 {
                began.store(0, Relaxed);
                site.store(0, Relaxed);
                owner.store(0, Relaxed);
            }
        }
    }

    /// Calls `thread` for each thread that is known.
    fn each(&self, mut thread: impl FnMut(ThreadWait)) {
        for slot in self.addresses() {
            // SAFETY: see `addresses`; each member is accessed atomically.
            let (owner, began, ready, hash, tgid, shape, weight, site, kind, thinned, blocked, queued) = unsafe {
                (
                    AtomicU32::from_ptr(&raw mut (*slot).thread),
                    AtomicU64::from_ptr(&raw mut (*slot).began_ns),
                    AtomicU64::from_ptr(&raw mut (*slot).ready_ns),
                    AtomicU64::from_ptr(&raw mut (*slot).key.hash),
                    AtomicU32::from_ptr(&raw mut (*slot).key.tgid),
                    AtomicU32::from_ptr(&raw mut (*slot).key.shape),
                    AtomicU32::from_ptr(&raw mut (*slot).weight),
                    AtomicU32::from_ptr(&raw mut (*slot).site),
                    AtomicU8::from_ptr(&raw mut (*slot).kind),
                    AtomicU8::from_ptr(&raw mut (*slot).thinned),
                    AtomicU32::from_ptr(&raw mut (*slot).blocked_owed_ns),
                    AtomicU32::from_ptr(&raw mut (*slot).queued_owed_ns),
                )
            };
            let (owner, began_ns) = (owner.load(Relaxed), began.load(Acquire));
            if owner == 0 {
                continue;
            }
            let wait = ThreadWait {
                thread: owner,
                began_ns,
                ready_ns: ready.load(Relaxed),
                key: SampleKey { hash: hash.load(Relaxed), tgid: tgid.load(Relaxed), shape: shape.load(Relaxed) },
                weight: weight.load(Relaxed),
                site: site.load(Relaxed),
                blocked_owed_ns: blocked.load(Relaxed),
                queued_owed_ns: queued.load(Relaxed),
                thinned: thinned.load(Relaxed),
                kind: kind.load(Acquire),
                ..ThreadWait::default()
            };
            // A wait that ended meanwhile, or became another, was none of what was asked for.
            if began.load(Relaxed) == began_ns {
                thread(wait);
            }
        }
    }
}

impl Shared<WaitSite> {
    /// Adds what a thread kept of what its place is due. The programs have to be detached.
    fn settle(&self, wait: &ThreadWait) {
        let index = wait.site as usize & (SITES - 1);
        let Some(site) = self.addresses().nth(index) else { return };
        // SAFETY: see `addresses`; each member is accessed atomically.
        let (tag, blocked, queued) = unsafe {
            (
                AtomicU32::from_ptr(&raw mut (*site).tag),
                AtomicI64::from_ptr(&raw mut (*site).blocked.owed_ns),
                AtomicI64::from_ptr(&raw mut (*site).queued.owed_ns),
            )
        };
        if wait.site != 0 && tag.load(Relaxed) == wait.site {
            blocked.fetch_add(i64::from(wait.blocked_owed_ns), Relaxed);
            queued.fetch_add(i64::from(wait.queued_owed_ns), Relaxed);
        }
    }

    /// Calls `due` for each place that is due something; frees those that were last used before `before_ns`.
    fn take_dues(&self, before_ns: u64, mut due: impl FnMut(WaitDue)) {
        let before = (before_ns >> USED_SHIFT) as u32;
        for site in self.addresses() {
            // SAFETY: see `addresses`; each member is accessed atomically.
            let (tag, used, hash, tgid, shape, blocked, queued) = unsafe {
                (
                    AtomicU32::from_ptr(&raw mut (*site).tag),
                    AtomicU32::from_ptr(&raw mut (*site).used),
                    AtomicU64::from_ptr(&raw mut (*site).key.hash),
                    AtomicU32::from_ptr(&raw mut (*site).key.tgid),
                    AtomicU32::from_ptr(&raw mut (*site).key.shape),
                    &raw mut (*site).blocked,
                    &raw mut (*site).queued,
                )
            };
            let owner = tag.load(Relaxed);
            if owner == 0 {
                continue;
            }
            let key = SampleKey { hash: hash.load(Relaxed), tgid: tgid.load(Relaxed), shape: shape.load(Relaxed) };
            let (blocked_ns, queued_ns) = (Self::take(blocked), Self::take(queued));
            if used.load(Relaxed) <= before {
                // A wait that ends here at this moment leaves its time to whoever has the slot next.
                tag.store(0, Relaxed);
            }
            if blocked_ns != 0 || queued_ns != 0 {
                due(WaitDue { tag: owner, key, blocked_ns, queued_ns });
            }
        }
    }

    /// What is due, which is none of the balance any more.
    fn take(balance: *mut Balance) -> i64 {
        // SAFETY: as in `take_dues`, whose member it is.
        let (owed, taken) = unsafe {
            (AtomicI64::from_ptr(&raw mut (*balance).owed_ns), AtomicI64::from_ptr(&raw mut (*balance).taken_ns))
        };
        let owed = owed.load(Relaxed);
        owed.wrapping_sub(taken.swap(owed, Relaxed))
    }
}

/// The clock of `bpf_ktime_get_ns`.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

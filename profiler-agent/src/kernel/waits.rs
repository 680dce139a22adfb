//! The programs on the scheduler's events, and their maps.

use std::os::fd::AsFd as _;

use aya::{
    Btf, Ebpf,
    maps::{Array, MapData, PerCpuArray, ProgramArray},
    programs::{BtfTracePoint, tp_btf::BtfTracePointLinkId},
};
use nix::time::{ClockId, clock_gettime};
use profiler_common::abi::waits::{MAX_THREADS, Ration, ThreadWait, WaitControl};
use zerocopy::FromBytes as _;

use super::{KernelError, commands, program, take_map};

/// The map of threads.
pub(super) const THREADS: &str = "THREADS";
const SWITCH: &str = "sched_switch";
const WAKE: &str = "sched_wakeup";

/// Threads that can be followed: none where waits are not recorded, so that the map takes no memory.
pub(super) fn max_threads(follow: bool) -> u32 {
    if follow { MAX_THREADS as u32 } else { 1 }
}

/// The programs that follow waits, loaded.
pub(super) struct WaitPrograms {
    /// Program and, while attached, its link; the one that must come first comes first.
    programs: [(&'static str, Option<BtfTracePointLinkId>); 2],
    threads: MapData,
    rations: PerCpuArray<MapData, RationCell>,
    control: Array<MapData, ControlCell>,
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
            Some(aya::maps::Map::HashMap(map)) => map,
            _ => return Err(KernelError::MissingPart(THREADS)),
        };
        Ok(Self {
            programs: [(wake, None), (switch, None)],
            threads,
            rations: take_map(ebpf, "RATIONS")?,
            control: take_map(ebpf, "WAIT_CONTROL")?,
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
        commands::read(self.threads.fd().as_fd(), size_of::<u32>(), size_of::<ThreadWait>(), |key, value| {
            let (Ok(id), Ok(wait)) = (u32::read_from_bytes(key), ThreadWait::read_from_bytes(value)) else { return };
            if wait.began_ns != 0 {
                thread(id, wait);
            }
        })
        .map_err(|error| KernelError::System { what: "reading the waiting threads", error })?;
        Ok(now)
    }

    /// Time waited, by `EventKind`.
    pub(super) fn waited(&self) -> Result<[u64; 8], KernelError> {
        let mut sum = [0u64; 8];
        for RationCell(ration) in self.rations.get(&0, 0)?.iter() {
            for (sum, waited) in sum.iter_mut().zip(ration.waited_ns) {
                *sum = sum.saturating_add(waited);
            }
        }
        Ok(sum)
    }
}

/// The clock of `bpf_ktime_get_ns`.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

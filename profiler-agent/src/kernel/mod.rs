//! Everything that touches the kernel's BPF and perf interfaces; the only user of aya.
//!
//! In: settings. Out: raw rows and notices as bytes of the ABI's records, and counters. What they mean is
//! decided elsewhere.

mod attachments;
mod btf;
mod buffers;
mod cgroups;
mod clock;
mod commands;
mod counters;
mod cpus;
mod error;
mod free_memory;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod layout;
mod namespaces;
pub mod privileges;
mod rings;
pub mod scope;
mod side_band;
mod tables;
mod waits;

use std::{io, path::Path, time::Duration};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{ArrayOfMaps, HashMap, MapData, MapError, ProgramArray},
    programs::{BtfTracePoint, PerfEvent, ProgramError},
};
use aya_log::EbpfLogger;
use profiler_common::abi::{
    counter::Counter,
    sample::{LARGE_FRAMES, MEDIUM_FRAMES, SMALL_FRAMES, Sample},
    settings::{self, SETTINGS_MAGIC, Settings},
    waits::{ThreadWait, WaitControl},
};
use tracing::warn;
use zerocopy::IntoBytes as _;

use crate::profile::{Events, WaitDue};

pub use self::{
    attachments::Attachments,
    btf::BtfError,
    buffers::BufferRows,
    cgroups::CgroupHierarchy,
    clock::{Clock, ClockSource},
    counters::Counters,
    cpus::online as online_cpus,
    error::KernelError,
    free_memory::{release_free_memory, share_free_memory},
    layout::{Features, kernel_version},
    namespaces::pid_namespace,
    rings::{DebugLog, Ring},
    side_band::SideBand,
    tables::{KernelMappings, KernelTables},
    waits::{Following, Unfinished, WaitTotals},
};
use self::{
    buffers::DoubleBuffer,
    waits::{Control, WaitPrograms},
};

/// The kernel programs, built from `profiler-ebpf` by the build script.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PROFILER_EBPF_OBJECT"));

/// Where the kernel keeps its type information.
pub const DEFAULT_BTF: &str = "/sys/kernel/btf/vmlinux";

/// What to load, and how.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// Where to read the kernel's type information.
    pub btf: &'a Path,
    /// What to record.
    pub events: Events,
    /// Samples per second and CPU.
    pub frequency: u64,
    /// How waits are sampled.
    pub waits: WaitOptions,
    /// Sample only processes named with [`Kernel::set_target`], and their children.
    pub targets_only: bool,
    /// Rows of the sample buffers.
    pub rows: BufferRows,
    /// The cgroups that tell containers apart.
    pub cgroups: CgroupHierarchy,
    /// Let the programs log through aya-log.
    pub debug_log: bool,
    /// Walk stacks as on kernels without `bpf_loop`, although this one has it.
    pub walk_in_parts: bool,
    /// Watch threads wake up, as on kernels whose scheduler keeps no books of it.
    pub watch_wakeups: bool,
    /// Where the programs' links are kept: whoever has them may cut them before they are there.
    pub attachments: Attachments,
}

/// How waits are sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitOptions {
    /// Stacks that each CPU may take per second; zero: as many as there are.
    pub stacks_per_second: u32,
    /// Sampled waits that are shorter are not exported.
    pub min_duration: Duration,
}

/// The loaded kernel programs and their maps.
pub struct Kernel {
    ebpf: Ebpf,
    attachments: Attachments,
    /// Absent where only waits are recorded.
    clock: Option<Clock>,
    /// Absent where only CPU time is recorded.
    waits: Option<WaitPrograms>,
    following: Following,
    control: Control,
    /// Counts the changes of pace.
    epoch: u32,
    waits_refused: Option<KernelError>,
    cgroups_refused: Option<KernelError>,
    /// Until somebody takes it.
    side_band: Option<io::Result<SideBand>>,
    small: DoubleBuffer,
    medium: DoubleBuffer,
    large: DoubleBuffer,
    counters: Counters,
    targets: HashMap<MapData, u32, u32>,
    targets_only: bool,
    features: Features,
    cgroups: CgroupHierarchy,
    debug_log: bool,
    /// The kernel empties it when nobody holds it any more.
    _walk_on: Option<ProgramArray<MapData>>,
}

impl Kernel {
    /// Loads programs and maps. Nothing is sampled before [`Self::start`].
    pub fn load(options: &Options<'_>) -> Result<Self, KernelError> {
        let (layout, mut features) = layout::read(options.btf, &options.cgroups)?;
        features.queue_times &= !options.watch_wakeups;
        let follow_waits = options.events.includes_off_cpu();
        let scheduler = if follow_waits { layout::scheduler_code().unwrap_or_default() } else { (0, 0) };
        let settings = Settings {
            targets_only: u32::from(options.targets_only),
            has_task_pt_regs: u32::from(features.task_pt_regs),
            no_user_mode_flags: layout::no_user_mode_flags(),
            magic: SETTINGS_MAGIC,
            has_state_argument: u32::from(features.switch_state),
            has_queue_times: u32::from(features.queue_times),
            cgroups: if features.cgroups { options.cgroups.setting() } else { settings::cgroups::NONE },
            cgroup_hierarchy: options.cgroups.number(),
            pid_namespace: pid_namespace().unwrap_or(0),
            reserved: 0,
            min_wait_ns: u64::try_from(options.waits.min_duration.as_nanos()).unwrap_or(u64::MAX),
            sched_text_start: scheduler.0,
            sched_text_end: scheduler.1,
        };
        let types = Btf::parse_file(options.btf, aya::Endianness::default())
            .map_err(|error| KernelError::Load(aya::EbpfError::BtfError(error)))?;
        let log_level: u8 = if options.debug_log { aya_log::Level::Debug as u8 } else { 0 };
        let mut loader = EbpfLoader::new();
        for (map, size) in waits::map_sizes(follow_waits) {
            loader.map_max_entries(map, size);
        }
        let mut ebpf = loader
            .btf(Some(&types))
            .override_global("SETTINGS", settings.as_bytes(), true)
            .override_global("LAYOUT", layout.as_bytes(), true)
            .override_global(aya_log::LEVEL, &log_level, true)
            .load(OBJECT)?;

        let buffer = |ebpf: &mut Ebpf, name: &'static str, value_size: usize, rows: u32| {
            let slot: ArrayOfMaps<MapData, MapData> = take_map(ebpf, name)?;
            DoubleBuffer::new(slot, value_size, rows)
        };
        let rows = options.rows;
        let small = buffer(&mut ebpf, "SAMPLES_SMALL", size_of::<Sample<SMALL_FRAMES>>(), rows.small)?;
        let medium = buffer(&mut ebpf, "SAMPLES_MEDIUM", size_of::<Sample<MEDIUM_FRAMES>>(), rows.medium)?;
        let large = buffer(&mut ebpf, "SAMPLES_LARGE", size_of::<Sample<LARGE_FRAMES>>(), rows.large)?;
        let counters = Counters::new(take_map(&mut ebpf, "COUNTERS")?);
        let targets = take_map(&mut ebpf, "TARGETS")?;

        for (name, event) in [
            ("process_fork", "sched_process_fork"),
            ("process_exec", "sched_process_exec"),
            ("process_exit", "sched_process_exit"),
        ] {
            let program: &mut BtfTracePoint = program(&mut ebpf, name)?;
            program.load(event, &types).map_err(|error| KernelError::Program { program: name, error })?;
        }
        let attachments = options.attachments.clone();
        let control = Control::take(&mut ebpf)?;
        let in_parts = options.walk_in_parts || !features.bpf_loop;
        let mut walk_on = None;
        let mut clock = None;
        if options.events.includes_on_cpu() {
            let clock_program = if in_parts { "on_cpu_in_parts" } else { "on_cpu_loop" };
            walk_on = if in_parts { Some(load_walk_on(&mut ebpf)?) } else { None };
            let program: &mut PerfEvent = program(&mut ebpf, clock_program)?;
            program.load().map_err(|error| KernelError::Program { program: clock_program, error })?;
            clock = Some(Clock::new(clock_program, options.frequency, attachments.clone()));
        }
        let (waits, waits_refused) = match follow_waits
            .then(|| WaitPrograms::load(&mut ebpf, &types, in_parts, !features.queue_times, attachments.clone()))
        {
            Some(Ok(waits)) => (Some(waits), None),
            // CPU time alone is better than nothing.
            Some(Err(error)) if options.events.includes_on_cpu() => (None, Some(error)),
            Some(Err(error)) => return Err(error),
            None => (None, None),
        };
        let cgroups_refused = load_cgroup_programs(&mut ebpf, &types, features).err();
        drop(types);
        release_free_memory();
        Ok(Self {
            ebpf,
            attachments,
            clock,
            waits,
            following: Following { stacks_per_second: options.waits.stacks_per_second, share: Some(0) },
            control,
            epoch: 0,
            waits_refused,
            cgroups_refused,
            side_band: None,
            small,
            medium,
            large,
            counters,
            targets,
            targets_only: options.targets_only,
            features,
            cgroups: options.cgroups.clone(),
            debug_log: options.debug_log,
            _walk_on: walk_on,
        })
    }

    /// Attaches the process notices: from here on every fork, exec and exit is announced, and new code is recorded.
    pub fn attach_notices(&mut self) -> Result<(), KernelError> {
        self.side_band = Some(SideBand::open());
        let (attachments, ebpf) = (&self.attachments, &mut self.ebpf);
        ["process_fork", "process_exec", "process_exit"]
            .into_iter()
            .try_for_each(|name| attachments.add_event(ebpf, name))
    }

    /// Attaches the notices of cgroups, and returns their ring: from here on every new and removed one is announced.
    pub fn attach_cgroups(&mut self) -> Result<Ring, KernelError> {
        if let Some(refused) = self.cgroups_refused.take() {
            return Err(refused);
        }
        for (name, _) in CGROUP_PROGRAMS {
            self.attachments.add_event(&mut self.ebpf, name)?;
        }
        Ok(Ring(take_map(&mut self.ebpf, "CGROUPS")?))
    }

    /// Starts the sampling clock on every online CPU, and follows waits from here on.
    pub fn start(&mut self) -> Result<(), KernelError> {
        match &mut self.waits {
            Some(waits) if self.following.share.is_some() => {
                waits.attach(&mut self.ebpf, self.following, self.epoch, &mut self.control)?;
            }
            _ => self.control.set(WaitControl { epoch: self.epoch, ..WaitControl::default() })?,
        }
        self.clock.as_mut().map_or(Ok(()), |clock| clock.start(&mut self.ebpf))
    }

    /// What rows are marked with that are made now, eight bits of it.
    pub fn epoch(&self) -> u8 {
        self.epoch as u8
    }

    /// Starts the clock on CPUs that came online and forgets those that went.
    pub fn follow_hotplug(&mut self) -> Result<(), KernelError> {
        let fired = self.counters.by_cpu(Counter::Fired)?;
        self.clock.as_mut().map_or(Ok(()), |clock| clock.follow_hotplug(&mut self.ebpf, fired))
    }

    /// Stops the sampling clock everywhere and follows no more waits; samples already taken stay in the buffers. Returns
    /// the waits that are under way.
    pub fn stop(&mut self) -> Result<Unfinished, KernelError> {
        if let Some(clock) = &mut self.clock {
            clock.stop();
        }
        self.followed_waits().map_or_else(|| Ok(Unfinished::default()), WaitPrograms::detach)
    }

    /// What follows waits, if they are followed at the moment.
    fn followed_waits(&mut self) -> Option<&mut WaitPrograms> {
        self.waits.as_mut().filter(|_| self.following.share.is_some())
    }

    /// Samples per second and CPU, and how closely waits are followed, from the next start on, which is a new epoch. Returns
    /// whether the sampling clock has another rate then.
    pub fn set_pace(&mut self, frequency: u64, following: Following) -> bool {
        self.following = following;
        self.epoch = self.epoch.wrapping_add(1);
        self.clock.as_mut().is_some_and(|clock| clock.set_frequency(frequency))
    }

    /// The same for programs that run, and go on: a new epoch begins now. Waits are followed all the while if they are before
    /// and after, since it may take seconds to attach a program to a busy event again. Returns the waits that are under way,
    /// if none are followed any more.
    pub fn change_pace(&mut self, frequency: u64, following: Following) -> Result<Option<Unfinished>, KernelError> {
        let ends = following.share.is_none();
        let unfinished = self.followed_waits().filter(|_| ends).map(WaitPrograms::detach).transpose()?;
        let begins = self.following.share.is_none() && !ends;
        let restarts = self.set_pace(frequency, following);
        match &mut self.waits {
            Some(waits) if begins => waits.attach(&mut self.ebpf, following, self.epoch, &mut self.control)?,
            _ => self.control.change(following, self.epoch)?,
        }
        if let Some(clock) = self.clock.as_mut().filter(|_| restarts) {
            clock.stop();
            clock.start(&mut self.ebpf)?;
        }
        Ok(unfinished)
    }

    /// What the clock is; `None` where only waits are recorded.
    pub fn clock(&self) -> Option<&Clock> {
        self.clock.as_ref()
    }

    /// Why waits are not followed although they were asked for.
    pub fn waits_refused(&self) -> Option<&KernelError> {
        self.waits_refused.as_ref()
    }

    /// Reads every thread that is waiting now, with the time of the kernel's clock at the beginning; `None` where
    /// waits are not followed.
    pub fn waiting_threads(&self, thread: impl FnMut(u32, ThreadWait)) -> Result<Option<u64>, KernelError> {
        let waits = self.waits.as_ref().filter(|_| self.following.share.is_some());
        waits.map(|waits| waits.threads(thread)).transpose()
    }

    /// Charges waits from this time on: what they have cost before was charged.
    pub fn restart_waits(&mut self, since_ns: u64) -> Result<(), KernelError> {
        self.control.restart(since_ns)
    }

    /// Takes what places of waits are due (or owe), and frees those that were not used in the last `idle`.
    pub fn take_wait_dues(&self, idle: Duration, due: impl FnMut(WaitDue)) {
        if let Some(waits) = &self.waits {
            waits.take_dues(idle, due);
        }
    }

    /// What threads in scope have waited.
    pub fn wait_totals(&self) -> Result<WaitTotals, KernelError> {
        self.waits.as_ref().map_or_else(|| Ok(WaitTotals::default()), WaitPrograms::totals)
    }

    /// The cgroups that samples are told apart by.
    pub fn cgroups(&self) -> &CgroupHierarchy {
        &self.cgroups
    }

    /// What this kernel offers.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The process notices' ring.
    pub fn take_notices(&mut self) -> Result<Ring, KernelError> {
        Ok(Ring(take_map(&mut self.ebpf, "NOTICES")?))
    }

    /// The ring of samples that found their buffer full; readable means: drain now.
    pub fn take_overflow(&mut self) -> Result<Ring, KernelError> {
        Ok(Ring(take_map(&mut self.ebpf, "OVERFLOW")?))
    }

    /// The programs' debug log; `None` unless it was asked for at load.
    pub fn take_log(&mut self) -> Option<DebugLog> {
        if !self.debug_log {
            return None;
        }
        EbpfLogger::init(&mut self.ebpf)
            .map(DebugLog)
            .inspect_err(|error| warn!("the kernel programs' debug log is not available: {error}"))
            .ok()
    }

    /// Code as it appears, on every online CPU, since notices were attached.
    pub fn side_band(&mut self) -> Result<SideBand, KernelError> {
        self.side_band
            .take()
            .unwrap_or_else(SideBand::open)
            .map_err(|error| KernelError::System { what: "opening the records of new mappings", error })
    }

    /// The maps of unwind tables.
    pub fn take_tables(&mut self) -> Result<KernelTables, KernelError> {
        KernelTables::take(&mut self.ebpf)
    }

    /// The maps that say what is mapped where.
    pub fn take_mappings(&mut self) -> Result<KernelMappings, KernelError> {
        KernelMappings::take(&mut self.ebpf)
    }

    /// Empties the overflow ring and every buffer, row by row. Rows are bytes of a `Sample`, header first.
    pub fn drain(&mut self, overflow: &mut Ring, mut row: impl FnMut(&[u8])) -> Result<(), KernelError> {
        self.small.drain(&mut row)?;
        self.medium.drain(&mut row)?;
        self.large.drain(&mut row)?;
        overflow.read(row);
        Ok(())
    }

    /// What the programs count.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// Makes a process part of the recording, with `abi::settings::target` flags.
    pub fn set_target(&mut self, tgid: u32, flags: u32) -> Result<(), KernelError> {
        Ok(self.targets.insert(tgid, flags, 0)?)
    }

    /// Takes a process out of the recording; nothing to do when everything is recorded.
    pub fn remove_target(&mut self, tgid: u32) -> Result<(), KernelError> {
        if !self.targets_only {
            return Ok(());
        }
        match self.targets.remove(&tgid) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The programs that announce cgroups, and their tracepoints.
const CGROUP_PROGRAMS: [(&str, &str); 2] = [("cgroup_made", "cgroup_mkdir"), ("cgroup_removed", "cgroup_rmdir")];

/// Loads the programs that announce cgroups. Samples can do without them.
fn load_cgroup_programs(ebpf: &mut Ebpf, types: &Btf, features: Features) -> Result<(), KernelError> {
    if !features.cgroups {
        return Err(KernelError::MissingMember { structure: "task_struct", member: "cgroups" });
    }
    for (name, event) in CGROUP_PROGRAMS {
        let program: &mut BtfTracePoint = program(ebpf, name)?;
        program.load(event, types).map_err(|error| KernelError::Program { program: name, error })?;
    }
    Ok(())
}

/// Loads the program that goes on with a walk, and puts it where programs find it.
fn load_walk_on(ebpf: &mut Ebpf) -> Result<ProgramArray<MapData>, KernelError> {
    let mut programs: ProgramArray<MapData> = take_map(ebpf, "WALK_ON")?;
    let name = "walk_on";
    let walk_on: &mut PerfEvent = program(ebpf, name)?;
    walk_on.load().map_err(|error| KernelError::Program { program: name, error })?;
    let descriptor = walk_on.fd().map_err(|error| KernelError::Program { program: name, error })?;
    programs.set(0, descriptor, 0)?;
    Ok(programs)
}

fn take_map<M: TryFrom<aya::maps::Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<M, KernelError> {
    Ok(M::try_from(ebpf.take_map(name).ok_or(KernelError::MissingPart(name))?)?)
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or(KernelError::MissingPart(name))?;
    program.try_into().map_err(|error| KernelError::Program { program: name, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// aya tells functions that programs call apart by their addresses in their section, so there may be only one.
    #[test]
    fn called_functions_are_in_one_section() {
        let name = b".text.";
        assert!(!OBJECT.windows(name.len()).any(|bytes| bytes == name), "functions are not all in .text");
    }
}

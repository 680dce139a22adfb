//! The sampling clock: one perf event per online CPU.

use std::{collections::BTreeMap, fmt, time::Duration};

use aya::{
    Ebpf,
    programs::{
        PerfEvent,
        perf_event::{HardwareEvent, PerfEventConfig, PerfEventLinkId, PerfEventScope, SamplePolicy, SoftwareEvent},
    },
};
use tracing::{debug, warn};

use super::{KernelError, cpus, program};

/// What drives the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockSource {
    /// The PMU's cycle counter: sees interrupts-off kernel code too.
    Cycles,
    /// The kernel's high-resolution timer, where there is no PMU (most virtual machines).
    CpuClock,
}

impl fmt::Display for ClockSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cycles => "cycles",
            Self::CpuClock => "cpu-clock",
        })
    }
}

impl ClockSource {
    fn event(self) -> PerfEventConfig {
        match self {
            Self::Cycles => PerfEventConfig::Hardware(HardwareEvent::CpuCycles),
            Self::CpuClock => PerfEventConfig::Software(SoftwareEvent::CpuClock),
        }
    }
}

/// The clock's events, by CPU.
pub struct Clock {
    program: &'static str,
    frequency: u64,
    source: Option<ClockSource>,
    links: BTreeMap<u32, PerfEventLinkId>,
    /// Events per CPU at the last look.
    fired: Vec<u64>,
    /// Time spent suspended, at the last look.
    suspended: Duration,
}

impl Clock {
    pub(super) fn new(program: &'static str, frequency: u64) -> Self {
        Self { program, frequency, source: None, links: BTreeMap::new(), fired: Vec::new(), suspended: suspended() }
    }

    /// What drives it; known once started.
    pub fn source(&self) -> Option<ClockSource> {
        self.source
    }

    /// How many CPUs are being sampled.
    pub fn cpus(&self) -> usize {
        self.links.len()
    }

    pub(super) fn start(&mut self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        let online = online()?;
        for &cpu in &online {
            match self.source {
                Some(source) => self.open(ebpf, cpu, source)?,
                None => {
                    let source = match self.open(ebpf, cpu, ClockSource::Cycles) {
                        Ok(()) => ClockSource::Cycles,
                        Err(error) => {
                            debug!("no cycle counter, using the CPU clock: {error}");
                            self.open(ebpf, cpu, ClockSource::CpuClock)?;
                            ClockSource::CpuClock
                        }
                    };
                    self.source = Some(source);
                }
            }
        }
        Ok(())
    }

    /// Makes sure that every online CPU is sampled. `fired` counts the events of each CPU so far.
    ///
    /// A CPU that goes offline loses its events for good (`perf_event_exit_cpu`, `kernel/events/core.c`), and
    /// may be back before anybody looks: after suspend, and where a timer has not fired since the last look,
    /// the event is made anew.
    pub(super) fn follow_hotplug(&mut self, ebpf: &mut Ebpf, fired: Vec<u64>) -> Result<(), KernelError> {
        let Some(source) = self.source else { return Ok(()) };
        let online = online()?;
        let suspended_now = suspended();
        let was_suspended = suspended_now > self.suspended + Duration::from_millis(100);
        let is_silent = |cpu: u32| {
            let now = fired.get(cpu as usize);
            source == ClockSource::CpuClock && now.is_some() && now == self.fired.get(cpu as usize)
        };
        let stale: Vec<u32> = self
            .links
            .keys()
            .copied()
            .filter(|&cpu| !online.contains(&cpu) || was_suspended || is_silent(cpu))
            .collect();
        for cpu in stale {
            debug!("CPU {cpu} is offline, or was");
            self.close(ebpf, cpu)?;
        }
        (self.fired, self.suspended) = (fired, suspended_now);
        for &cpu in &online {
            if !self.links.contains_key(&cpu) {
                // It may go offline again at any moment; the next look tells.
                match self.open(ebpf, cpu, source) {
                    Ok(()) => debug!("CPU {cpu} came online and is sampled"),
                    Err(error) => warn!("{error}"),
                }
            }
        }
        Ok(())
    }

    pub(super) fn stop(&mut self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        while let Some(&cpu) = self.links.keys().next() {
            self.close(ebpf, cpu)?;
        }
        Ok(())
    }

    fn open(&mut self, ebpf: &mut Ebpf, cpu: u32, source: ClockSource) -> Result<(), KernelError> {
        let program: &mut PerfEvent = program(ebpf, self.program)?;
        let link = program
            .attach(
                source.event(),
                PerfEventScope::AllProcessesOneCpu { cpu },
                SamplePolicy::Frequency(self.frequency),
                true,
            )
            .map_err(|error| KernelError::Clock { cpu, error })?;
        self.links.insert(cpu, link);
        Ok(())
    }

    fn close(&mut self, ebpf: &mut Ebpf, cpu: u32) -> Result<(), KernelError> {
        if let Some(link) = self.links.remove(&cpu) {
            let clock: &mut PerfEvent = program(ebpf, self.program)?;
            clock.detach(link).map_err(|error| KernelError::Program { program: self.program, error })?;
        }
        Ok(())
    }
}

/// How long this machine has been suspended since boot.
fn suspended() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    let read = |clock| clock_gettime(clock).map(Duration::from).unwrap_or_default();
    read(ClockId::CLOCK_BOOTTIME).saturating_sub(read(ClockId::CLOCK_MONOTONIC))
}

fn online() -> Result<std::collections::BTreeSet<u32>, KernelError> {
    cpus::online().map_err(|error| KernelError::System { what: "reading the list of online CPUs", error })
}

//! The sampling clock: one perf event per online CPU.

use std::{collections::BTreeMap, fmt};

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
}

impl Clock {
    pub(super) fn new(program: &'static str, frequency: u64) -> Self {
        Self { program, frequency, source: None, links: BTreeMap::new() }
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

    pub(super) fn follow_hotplug(&mut self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        let Some(source) = self.source else { return Ok(()) };
        let online = online()?;
        let gone: Vec<u32> = self.links.keys().filter(|cpu| !online.contains(cpu)).copied().collect();
        for cpu in gone {
            debug!("CPU {cpu} went offline");
            self.close(ebpf, cpu)?;
        }
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

fn online() -> Result<std::collections::BTreeSet<u32>, KernelError> {
    cpus::online().map_err(|error| KernelError::System { what: "reading the list of online CPUs", error })
}

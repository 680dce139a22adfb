//! The sampling clock: one perf event per online CPU.

use std::{fmt, time::Duration};

use aya::{
    Ebpf,
    programs::perf_event::{HardwareEvent, PerfEventConfig, SoftwareEvent},
};
use tracing::{debug, warn};

use super::{Attachments, KernelError, cpus};

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
    is_running: bool,
    attachments: Attachments,
    /// Events per CPU at the last look.
    fired: Vec<u64>,
    /// Time spent suspended, at the last look.
    suspended: Duration,
}

impl Clock {
    pub(super) fn new(program: &'static str, frequency: u64, attachments: Attachments) -> Self {
        Self {
            program,
            frequency,
            source: None,
            is_running: false,
            attachments,
            fired: Vec::new(),
            suspended: suspended(),
        }
    }

    /// Events per second and CPU, from the next start on. Returns whether they are others than before.
    pub(super) fn set_frequency(&mut self, frequency: u64) -> bool {
        std::mem::replace(&mut self.frequency, frequency) != frequency
    }

    /// What drives it; known once started.
    pub fn source(&self) -> Option<ClockSource> {
        self.source
    }

    /// How many CPUs are being sampled.
    pub fn cpus(&self) -> usize {
        self.attachments.clock_cpus().len()
    }

    pub(super) fn start(&mut self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        let online = online()?;
        self.is_running = true;
        for &cpu in &online {
            match self.source {
                Some(source) => self.start_on(ebpf, cpu, source)?,
                None => {
                    let source = match self.start_on(ebpf, cpu, ClockSource::Cycles) {
                        Ok(()) => ClockSource::Cycles,
                        Err(error) => {
                            debug!("no cycle counter, using the CPU clock: {error}");
                            self.start_on(ebpf, cpu, ClockSource::CpuClock)?;
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
        let Some(source) = self.source.filter(|_| self.is_running) else { return Ok(()) };
        let online = online()?;
        let suspended_now = suspended();
        let was_suspended = suspended_now > self.suspended + Duration::from_millis(100);
        let is_silent = |cpu: u32| {
            let now = fired.get(cpu as usize);
            source == ClockSource::CpuClock && now.is_some() && now == self.fired.get(cpu as usize)
        };
        let mut sampled = self.attachments.clock_cpus();
        sampled.retain(|&cpu| {
            let is_stale = !online.contains(&cpu) || was_suspended || is_silent(cpu);
            if is_stale {
                debug!("CPU {cpu} is offline, or was");
                self.attachments.remove_clock(cpu);
            }
            !is_stale
        });
        (self.fired, self.suspended) = (fired, suspended_now);
        for &cpu in &online {
            if !sampled.contains(&cpu) {
                // It may go offline again at any moment; the next look tells.
                match self.start_on(ebpf, cpu, source) {
                    Ok(()) => debug!("CPU {cpu} came online and is sampled"),
                    Err(error) => warn!("{error}"),
                }
            }
        }
        Ok(())
    }

    pub(super) fn stop(&mut self) {
        self.is_running = false;
        self.attachments.stop_clock();
    }

    fn start_on(&self, ebpf: &mut Ebpf, cpu: u32, source: ClockSource) -> Result<(), KernelError> {
        self.attachments.add_clock(ebpf, self.program, source.event(), cpu, self.frequency)
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

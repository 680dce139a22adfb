//! What makes programs run: every link between one of them and its event.
//!
//! They are kept apart from everything else, so that collection can be cut off at once by any thread, whatever the one
//! that collects is doing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    programs::{
        BtfTracePoint, PerfEvent,
        perf_event::{PerfEventConfig, PerfEventLink, PerfEventScope, SamplePolicy},
        tp_btf::BtfTracePointLink,
    },
};

use super::{KernelError, program};

/// The links of one set of programs. Clones are the same links.
#[derive(Clone, Debug, Default)]
pub struct Attachments(Arc<Mutex<Links>>);

#[derive(Debug, Default)]
struct Links {
    /// The sampling clock, by CPU.
    clock: BTreeMap<u32, PerfEventLink>,
    /// Tracepoints, by program.
    events: BTreeMap<&'static str, BtfTracePointLink>,
    is_cut: bool,
}

impl Attachments {
    /// Detaches everything, now and for good: what is attached later is detached at once.
    pub fn cut(&self) {
        let mut links = self.links();
        links.is_cut = true;
        links.clock.clear();
        links.events.clear();
    }

    /// Runs a program on each event of its tracepoint, from now on.
    pub(super) fn add_event(&self, ebpf: &mut Ebpf, name: &'static str) -> Result<(), KernelError> {
        let refused = |error| KernelError::Program { program: name, error };
        let program: &mut BtfTracePoint = program(ebpf, name)?;
        let id = program.attach().map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        let mut links = self.links();
        if !links.is_cut {
            links.events.insert(name, link);
        }
        Ok(())
    }

    /// Runs a program no more.
    pub(super) fn remove_event(&self, name: &str) {
        self.links().events.remove(name);
    }

    /// Runs a program on a CPU, so many times per second.
    pub(super) fn add_clock(
        &self,
        ebpf: &mut Ebpf,
        name: &'static str,
        event: PerfEventConfig,
        cpu: u32,
        frequency: u64,
    ) -> Result<(), KernelError> {
        let refused = |error| KernelError::Clock { cpu, error };
        let program: &mut PerfEvent = program(ebpf, name)?;
        let scope = PerfEventScope::AllProcessesOneCpu { cpu };
        let id = program.attach(event, scope, SamplePolicy::Frequency(frequency), true).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        let mut links = self.links();
        if !links.is_cut {
            links.clock.insert(cpu, link);
        }
        Ok(())
    }

    /// Stops the clock of a CPU.
    pub(super) fn remove_clock(&self, cpu: u32) {
        self.links().clock.remove(&cpu);
    }

    /// Stops the clock everywhere.
    pub(super) fn stop_clock(&self) {
        self.links().clock.clear();
    }

    /// CPUs on which the clock runs.
    pub(super) fn clock_cpus(&self) -> Vec<u32> {
        self.links().clock.keys().copied().collect()
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

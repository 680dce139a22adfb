//! The maps by which the kernel programs decide who is recorded.

use std::io;

use aya::Ebpf;
use profiler_common::abi::scope::{ScopeControl, ScopeMatch, state};
use zerocopy::{FromBytes, IntoBytes as _};

use super::{Kernel, KernelError, commands, tables::Records};
use crate::scope::ScopeMaps;

/// The maps of the scope.
pub struct KernelScope {
    control: Records,
    cgroups: Records,
    processes: Records,
}

impl Kernel {
    /// Keeps everything out of scope, and counts it, until rules are set. Call before [`Self::start`].
    pub fn withhold(&mut self) -> Result<(), KernelError> {
        let control = ScopeControl { state: state::CHANGING, has_gaps: 1, ..ScopeControl::default() };
        Records::in_place(&self.ebpf, "SCOPE", |map| commands::update(map, 0, control.as_bytes(), 1))?
            .map_err(|error| KernelError::System { what: "setting the scope", error })
    }

    /// The maps of the scope.
    pub fn take_scope(&mut self) -> Result<KernelScope, KernelError> {
        KernelScope::take(&mut self.ebpf)
    }
}

impl KernelScope {
    fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Ok(Self {
            control: Records::take(ebpf, "SCOPE")?,
            cgroups: Records::take(ebpf, "SCOPE_CGROUPS")?,
            processes: Records::take(ebpf, "SCOPE_PROCESSES")?,
        })
    }
}

impl ScopeMaps for KernelScope {
    fn set_control(&mut self, control: &ScopeControl) -> io::Result<()> {
        self.control.set(0, std::slice::from_ref(control))
    }

    fn set_cgroup(&mut self, id: u64, matched: &ScopeMatch) -> io::Result<()> {
        commands::insert(self.cgroups.fd(), id.as_bytes(), matched.as_bytes())
    }

    fn remove_cgroup(&mut self, id: u64) -> io::Result<()> {
        or_absent(commands::delete(self.cgroups.fd(), &id))
    }

    fn cgroups(&self) -> io::Result<Vec<u64>> {
        keys(&self.cgroups)
    }

    fn set_process(&mut self, tgid: u32, matched: &ScopeMatch) -> io::Result<()> {
        commands::insert(self.processes.fd(), tgid.as_bytes(), matched.as_bytes())
    }

    fn has_process(&self, tgid: u32) -> bool {
        commands::lookup(self.processes.fd(), &tgid, ScopeMatch::default().as_mut_bytes()).is_ok()
    }

    fn remove_process(&mut self, tgid: u32) -> io::Result<()> {
        or_absent(commands::delete(self.processes.fd(), &tgid))
    }

    fn processes(&self) -> io::Result<Vec<u32>> {
        keys(&self.processes)
    }
}

fn or_absent(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        outcome => outcome,
    }
}

/// Every key of a hash map.
fn keys<K: FromBytes>(map: &Records) -> io::Result<Vec<K>> {
    let mut keys = Vec::new();
    commands::read(map.fd(), size_of::<K>(), size_of::<ScopeMatch>(), |key, _| keys.extend(K::read_from_bytes(key)))?;
    Ok(keys)
}

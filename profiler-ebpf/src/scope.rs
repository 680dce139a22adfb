//! Which processes are recorded: everything, or the targets and their children.

use profiler_common::abi::settings::target;

use crate::{layout::loaded, maps::TARGETS};

/// Target flags of a process; zero when it is no target.
#[inline(always)]
pub fn target_flags(tgid: u32) -> u32 {
    match TARGETS.get_ptr(tgid) {
        // SAFETY: a value of this preallocated map stays readable while the program runs.
        Some(flags) => (unsafe { *flags }),
        None => 0,
    }
}

/// Whether the recording is limited to targets.
#[inline(always)]
pub fn is_limited() -> bool {
    loaded!(SETTINGS.targets_only) == 1
}

/// Whether samples of the process are kept and its notices sent.
#[inline(always)]
pub fn includes(tgid: u32) -> bool {
    !is_limited() || target_flags(tgid) & target::SAMPLE != 0
}

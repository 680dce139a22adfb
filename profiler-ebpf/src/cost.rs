//! What the programs themselves cost: they look at the clock, since the kernel's own books (`BPF_ENABLE_STATS`) take more
//! privileges than profiling does, and more time than a switch.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use profiler_common::abi::{
    counter::Counter,
    waits::{Ration, TIMED_SWITCHES},
};

use crate::maps;

/// The time, nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// Charges what has passed since `began`.
#[inline(always)]
pub fn charge(counter: Counter, began: u64) {
    maps::add(counter, now().wrapping_sub(began));
}

/// Runs what is done rarely, and charges it.
#[inline(always)]
pub fn of_notice(work: impl FnOnce()) {
    let began = now();
    work();
    charge(Counter::NoticesNs, began);
}

/// When a switch began that is timed; zero: it is not. Two looks at the clock take a quarter of what a switch does, so
/// that one stands for many.
#[inline(always)]
pub fn begin_switch(ration: &mut Ration) -> u64 {
    ration.switches = ration.switches.wrapping_add(1);
    if ration.switches % TIMED_SWITCHES == 0 { now() } else { 0 }
}

/// Charges a switch that was timed for all that it stands for.
#[inline(always)]
pub fn end_switch(began: u64) {
    if began != 0 {
        charge_switches(began);
    }
}

#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn charge_switches(began: u64) {
    let ended = now();
    // A look at the clock takes from 15 ns, on a processor, to 70 in some virtual machines: other switches have none.
    let look = now().wrapping_sub(ended);
    let spent = ended.wrapping_sub(began).saturating_sub(look);
    maps::add(Counter::Switches, TIMED_SWITCHES);
    maps::add(Counter::SwitchesNs, spent.wrapping_mul(TIMED_SWITCHES));
}

//! The kernel programs' entry points. Each hands over at once to the module that does the work.
//!
//! Which of them are loaded is the agent's choice, feature by feature: see `profiler-agent/src/kernel/`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(missing_docs, reason = "the public items are entry points and maps, named for the loader")]

mod aggregate;
mod capture;
mod cgroup;
mod cost;
mod layout;
mod lifecycle;
mod maps;
mod memory;
mod off_cpu;
mod on_cpu;
mod scope;
mod unwind;

use aya_ebpf::{
    macros::{btf_tracepoint, perf_event},
    programs::{BtfTracePointContext, PerfEventContext},
};

/// Sampling clock on kernels with `bpf_loop` (5.17 and later).
#[perf_event]
pub fn on_cpu_loop(ctx: PerfEventContext) -> u32 {
    on_cpu::sample(&ctx, |_, _| unwind::walk_with_helper::<{ maps::ON_CPU }>());
    0
}

/// Sampling clock on kernels without `bpf_loop`: the walk is split between programs.
#[perf_event]
pub fn on_cpu_in_parts(ctx: PerfEventContext) -> u32 {
    on_cpu::sample(&ctx, |ctx, _| unwind::walk_in_parts(ctx, unwind::advance_on_cpu, &maps::WALK_ON));
    0
}

/// The programs that follow [`on_cpu_in_parts`].
#[perf_event]
pub fn walk_on(ctx: PerfEventContext) -> u32 {
    on_cpu::walk_on(&ctx);
    0
}

/// Waits, on kernels with `bpf_loop`.
#[btf_tracepoint(function = "sched_switch")]
pub fn off_cpu_loop(ctx: BtfTracePointContext) -> i32 {
    off_cpu::switch(&ctx, |_, _| unwind::walk_with_helper::<{ maps::OFF_CPU }>());
    0
}

/// Waits, on kernels without `bpf_loop`.
#[btf_tracepoint(function = "sched_switch")]
pub fn off_cpu_in_parts(ctx: BtfTracePointContext) -> i32 {
    off_cpu::switch(&ctx, |ctx, _| unwind::walk_in_parts(ctx, unwind::advance_off_cpu, &maps::WAIT_WALK_ON));
    0
}

/// The programs that follow [`off_cpu_in_parts`].
#[btf_tracepoint(function = "sched_switch")]
pub fn wait_walk_on(ctx: BtfTracePointContext) -> i32 {
    off_cpu::walk_on(&ctx);
    0
}

/// The moment a thread could run again.
#[btf_tracepoint(function = "sched_wakeup")]
pub fn off_cpu_wake(ctx: BtfTracePointContext) -> i32 {
    off_cpu::wake(&ctx);
    0
}

#[btf_tracepoint(function = "sched_process_fork")]
pub fn process_fork(ctx: BtfTracePointContext) -> i32 {
    cost::of_notice(|| lifecycle::fork(&ctx));
    0
}

#[btf_tracepoint(function = "sched_process_exec")]
pub fn process_exec(ctx: BtfTracePointContext) -> i32 {
    cost::of_notice(|| lifecycle::exec(&ctx));
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
pub fn process_exit(ctx: BtfTracePointContext) -> i32 {
    cost::of_notice(|| lifecycle::exit(&ctx));
    0
}

#[btf_tracepoint(function = "cgroup_mkdir")]
pub fn cgroup_made(ctx: BtfTracePointContext) -> i32 {
    cost::of_notice(|| cgroup::made(&ctx));
    0
}

#[btf_tracepoint(function = "cgroup_rmdir")]
pub fn cgroup_removed(ctx: BtfTracePointContext) -> i32 {
    cost::of_notice(|| cgroup::removed(&ctx));
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing in these programs panics: the verifier would refuse a path that cannot return.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

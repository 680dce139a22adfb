//! Tells the agent about processes: fork, exec, exit, newly sampled places, and unwind tables that are missed.

use aya_ebpf::{helpers::generated, programs::BtfTracePointContext};
use aya_log_ebpf::debug;
use profiler_common::abi::{
    counter::Counter,
    notice::{ForkNotice, NoticeHeader, NoticeKind, PLACE_SHIFT, PLACES, PlaceNotice, TableNotice},
    process::ProcessKey,
    settings::target,
};

use crate::{
    aggregate::mix,
    layout::loaded,
    maps::{ANNOUNCED, NOTICES, PROCESSES, TARGETS, count},
    memory::kernel,
    scope,
};

/// Identity of the process `tgid` that `task` is a thread of; `leader` is its thread group leader.
#[inline(always)]
pub fn process_key(task: u64, leader: u64, tgid: u32) -> ProcessKey {
    ProcessKey {
        start_time_ns: kernel(leader, loaded!(LAYOUT.task_start_boottime)),
        tgid,
        exec_id: kernel(task, loaded!(LAYOUT.task_self_exec_id)),
    }
}

/// Announces that code was sampled in a place that is new to this image, so that the agent can learn what is
/// mapped there while the process lives.
#[inline(always)]
pub fn announce(process: &ProcessKey, address: u64) {
    let image = mix(process.start_time_ns, u64::from(process.tgid) << 32 | u64::from(process.exec_id));
    let tag = mix(image, address >> PLACE_SHIFT);
    let Some(slot) = ANNOUNCED.get_ptr_mut(tag as u32 & (PLACES as u32 - 1)) else { return };
    // SAFETY: an array's slots are always there; a torn or lost write only means one announcement more.
    let known = unsafe { slot.read_volatile() };
    if known != tag {
        // SAFETY: as above.
        unsafe { slot.write_volatile(tag) };
        send(PlaceNotice {
            header: NoticeHeader { kind: NoticeKind::NewPlace as u32, reserved: 0, process: *process },
            address,
        });
    }
}

/// Asks for an executable's unwind table. False: there was no room for the notice.
#[inline(always)]
pub fn want_table(process: &ProcessKey, executable: u32) -> bool {
    send(TableNotice {
        header: NoticeHeader { kind: NoticeKind::TableWanted as u32, reserved: 0, process: *process },
        executable,
        reserved: 0,
    })
}

/// `sched_process_fork(parent, child)`: called for every new thread; new processes are announced.
#[inline(always)]
pub fn fork(ctx: &BtfTracePointContext) {
    let child: u64 = ctx.arg(1);
    let task = current_task();
    let parent_tgid = scope::tgid(task);
    let child_tgid = scope::tgid(child);
    if child_tgid == parent_tgid || child_tgid == 0 {
        return;
    }
    if scope::is_limited() {
        if scope::target_flags(parent_tgid) & target::FOLLOW == 0 {
            // The PID may have belonged to a target before.
            let _absent_is_fine = TARGETS.remove(child_tgid);
            return;
        }
        if TARGETS.insert(child_tgid, target::SAMPLE | target::FOLLOW, 0).is_err() {
            count(Counter::TargetsFull);
        }
    }
    scope::forked(parent_tgid, child_tgid);
    debug!(ctx, "fork: {} -> {}", parent_tgid, child_tgid);
    let parent = current_process(task, parent_tgid);
    let child = process_key(child, kernel(child, loaded!(LAYOUT.task_group_leader)), child_tgid);
    let is_announced = send(ForkNotice {
        header: NoticeHeader { kind: NoticeKind::Fork as u32, reserved: 0, process: parent },
        child,
    });
    // The child has its parent's mappings. The agent counts who uses them, so it has to know.
    if is_announced && let Some(mappings) = PROCESSES.get_ptr(parent) {
        // SAFETY: a value of this preallocated map stays readable while the program runs.
        let mappings = unsafe { *mappings };
        // Without room the child is unknown until the agent has made some.
        let _full = PROCESSES.insert(child, mappings, 0);
    }
}

/// `sched_process_exec(task, old_pid, bprm)`: the new image is mapped and named.
#[inline(always)]
pub fn exec(ctx: &BtfTracePointContext) {
    let task = current_task();
    let tgid = scope::tgid(task);
    if !scope::includes(tgid) {
        return;
    }
    scope::executed(tgid);
    let process = current_process(task, tgid);
    debug!(ctx, "exec: {}", process.tgid);
    send(NoticeHeader { kind: NoticeKind::Exec as u32, reserved: 0, process });
}

/// `sched_process_exit(task)`: called for every thread; the end of the last one ends the process.
#[inline(always)]
pub fn exit(ctx: &BtfTracePointContext) {
    let task = current_task();
    let signal: u64 = kernel(task, loaded!(LAYOUT.task_signal));
    let live_threads: u32 = kernel(signal, loaded!(LAYOUT.signal_live));
    if live_threads != 0 {
        return;
    }
    let tgid = scope::tgid(task);
    if !scope::includes(tgid) {
        return;
    }
    let process = current_process(task, tgid);
    // A target stays one: tearing down its memory is still to come, and is its CPU time too. The agent removes
    // it when it forgets the process.
    debug!(ctx, "exit: {}", process.tgid);
    send(NoticeHeader { kind: NoticeKind::Exit as u32, reserved: 0, process });
}

#[inline(always)]
fn current_task() -> u64 {
    // SAFETY: the helper only returns the current task's address.
    unsafe { generated::bpf_get_current_task() }
}

#[inline(always)]
fn current_process(task: u64, tgid: u32) -> ProcessKey {
    process_key(task, kernel(task, loaded!(LAYOUT.task_group_leader)), tgid)
}

/// Sends one record; the agent is woken unless it is still busy with earlier ones. False: there was no room.
#[inline(always)]
fn send<T: 'static>(notice: T) -> bool {
    let is_sent = NOTICES.output_untyped::<T>(notice, 0).is_ok();
    if !is_sent {
        count(Counter::NoticesLost);
    }
    is_sent
}

//! Which cgroup a thread is in, and which cgroups there are.
//!
//! There is one hierarchy with the second version of cgroups, and with the first one many; the agent chooses the one
//! whose paths tell containers apart.

use core::{ptr::addr_of_mut, slice};

use aya_ebpf::{helpers::generated::bpf_probe_read_kernel_str, programs::BtfTracePointContext};
use profiler_common::abi::{
    cgroup::{CgroupChange, CgroupNotice, MAX_PATH},
    counter::Counter,
    settings::cgroups,
};

use crate::{
    layout::loaded,
    maps::{CGROUP_NOTICE, CGROUPS, count},
    memory::{kernel, opaque},
    scope,
};

/// Where a notice is put together: its path is too long for the stack.
#[repr(C)]
pub struct Scratch {
    notice: CgroupNotice,
    path: [u8; MAX_PATH],
}

/// The cgroup of a thread, as `kernfs_node::id`; zero where it is not asked for.
#[inline(always)]
pub fn of(task: u64) -> u64 {
    let hierarchies = loaded!(SETTINGS.cgroups);
    if hierarchies == cgroups::NONE {
        return 0;
    }
    let set: u64 = kernel(task, loaded!(LAYOUT.task_cgroups));
    let link: u64 = kernel(set, loaded!(LAYOUT.css_set_link));
    // In the first version a thread's set leads to a controller's state of the cgroup, in the second to the cgroup.
    let cgroup = if hierarchies == cgroups::BY_CONTROLLER { kernel(link, loaded!(LAYOUT.css_cgroup)) } else { link };
    id(cgroup)
}

/// `cgroup_mkdir(cgroup, path)`.
#[inline(always)]
pub fn made(ctx: &BtfTracePointContext) {
    let cgroup: u64 = ctx.arg(0);
    if !is_followed(cgroup) {
        return;
    }
    if loaded!(LAYOUT.css_parent) != 0 {
        let parent: u64 = kernel(cgroup + u64::from(loaded!(LAYOUT.cgroup_self)), loaded!(LAYOUT.css_parent));
        scope::cgroup_made(id(kernel(parent, loaded!(LAYOUT.css_cgroup))), id(cgroup));
    }
    tell(cgroup, ctx.arg(1), CgroupChange::Made);
}

/// `cgroup_rmdir(cgroup, path)`.
#[inline(always)]
pub fn removed(ctx: &BtfTracePointContext) {
    let cgroup: u64 = ctx.arg(0);
    if is_followed(cgroup) {
        tell(cgroup, 0, CgroupChange::Removed);
    }
}

/// Whether it is of the hierarchy that tells containers apart.
#[inline(always)]
fn is_followed(cgroup: u64) -> bool {
    let root: u64 = kernel(cgroup, loaded!(LAYOUT.cgroup_root));
    let hierarchy: u32 = kernel(root, loaded!(LAYOUT.cgroup_root_hierarchy_id));
    hierarchy == loaded!(SETTINGS.cgroup_hierarchy)
}

#[inline(always)]
fn tell(cgroup: u64, path: u64, change: CgroupChange) {
    let Some(scratch) = CGROUP_NOTICE.get_ptr_mut(0) else { return };
    let mut bytes = 0;
    if path != 0 {
        // SAFETY: the scratch holds as many bytes; the helper checks the source. (Tracepoints of this kind run with
        // the kernel's own lock around them, so nobody else uses this CPU's scratch.)
        let read = unsafe {
            bpf_probe_read_kernel_str(addr_of_mut!((*scratch).path).cast(), MAX_PATH as u32, path as *const _)
        };
        if read <= 1 {
            return;
        }
        bytes = opaque(read as u64 - 1) & (MAX_PATH as u64 - 1);
    }
    // SAFETY: the scratch is this CPU's, as above.
    unsafe {
        (*scratch).notice = CgroupNotice { id: id(cgroup), change: change as u32, path_len: bytes as u32 };
    }
    // SAFETY: the scratch is longer than what is sent, and what of it was not written is zero.
    let record: &[u8] = unsafe { slice::from_raw_parts(scratch.cast(), size_of::<CgroupNotice>() + bytes as usize) };
    if CGROUPS.output_untyped::<[u8]>(record, 0).is_err() {
        count(Counter::CgroupNoticesLost);
    }
}

/// `cgroup::kn->id`.
#[inline(always)]
fn id(cgroup: u64) -> u64 {
    let node: u64 = kernel(cgroup, loaded!(LAYOUT.cgroup_kn));
    kernel(node, loaded!(LAYOUT.kernfs_node_id))
}

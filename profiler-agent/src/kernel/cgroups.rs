//! Which cgroups tell containers apart on this machine, and how the kernel programs find a thread's.

use std::{fmt, fs};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use profiler_common::abi::settings::{KernelLayout, cgroups};

use super::btf::KernelTypes;

/// Controllers of the first version of cgroups whose paths tell containers apart, the best first: systemd puts every
/// service into its own cgroup of the first, container runtimes use all of them.
const CONTROLLERS: [&str; 5] = ["pids", "memory", "devices", "cpu", "freezer"];
/// Where cgroups are: the initial process may see more than we do, where we may look.
const MOUNTS: [&str; 2] = ["/proc/1/root/sys/fs/cgroup", "/sys/fs/cgroup"];

/// A hierarchy of cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupHierarchy {
    /// The only one of the second version.
    Unified,
    /// One of the first version's.
    Controller {
        /// A controller that is attached to it.
        name: &'static str,
        /// The kernel's number of it, as in `/proc/PID/cgroup`.
        id: u32,
    },
}

impl fmt::Display for CgroupHierarchy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unified => f.write_str("those of the second version"),
            Self::Controller { name, .. } => write!(f, "those of the first version, by the controller {name}"),
        }
    }
}

impl CgroupHierarchy {
    /// The one that container runtimes use here: the second version's where it is mounted in the usual place; elsewhere
    /// the first version's controllers, if there are any, also where systemd has the second version beside them.
    pub fn of_machine() -> Self {
        let mount = MOUNTS.iter().find_map(|mount| statfs(*mount).ok());
        let is_unified = mount.is_some_and(|mount| mount.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        if is_unified { Self::Unified } else { Self::first_controller(&own).unwrap_or(Self::Unified) }
    }

    /// The best controller in a `/proc/PID/cgroup` (format: `man 7 cgroups`).
    fn first_controller(of_process: &str) -> Option<Self> {
        let hierarchies: Vec<(u32, &str)> = of_process
            .lines()
            .filter_map(|line| {
                let (id, rest) = line.split_once(':')?;
                Some((id.parse().ok()?, rest.split_once(':')?.0))
            })
            .collect();
        CONTROLLERS.into_iter().find_map(|name| {
            let (id, _) = hierarchies.iter().find(|(_, list)| list.split(',').any(|controller| controller == name))?;
            Some(Self::Controller { name, id: *id })
        })
    }

    /// The controller that it is known by; `None`: it is the second version's.
    pub fn controller(&self) -> Option<&'static str> {
        match self {
            Self::Unified => None,
            Self::Controller { name, .. } => Some(name),
        }
    }

    /// The value of `Settings::cgroups`.
    pub(super) fn setting(&self) -> u32 {
        match self {
            Self::Unified => cgroups::UNIFIED,
            Self::Controller { .. } => cgroups::BY_CONTROLLER,
        }
    }

    /// The value of `Settings::cgroup_hierarchy`: the second version's is number zero.
    pub(super) fn number(&self) -> u32 {
        match self {
            Self::Unified => 0,
            Self::Controller { id, .. } => *id,
        }
    }

    /// Fills in where threads' cgroups are; `None` where this kernel does not have them.
    pub(super) fn lay_out(&self, types: &KernelTypes, layout: &mut KernelLayout) -> Option<()> {
        let link = match self {
            Self::Unified => types.offset("css_set", "dfl_cgrp")?,
            Self::Controller { name, .. } => {
                // `subsys` has a pointer for each controller that the kernel was built with.
                let index = types.enumerator(&format!("{name}_cgrp_id"))?;
                types.offset("css_set", "subsys")?.checked_add(index.checked_mul(8)?)?
            }
        };
        (layout.task_cgroups, layout.css_set_link) = (types.offset("task_struct", "cgroups")?, link);
        layout.css_cgroup = types.offset("cgroup_subsys_state", "cgroup")?;
        if let (Some(parent), Some(own)) =
            (types.offset("cgroup_subsys_state", "parent"), types.offset("cgroup", "self"))
        {
            (layout.css_parent, layout.cgroup_self) = (parent, own);
        }
        layout.cgroup_kn = types.offset("cgroup", "kn")?;
        layout.cgroup_root = types.offset("cgroup", "root")?;
        layout.cgroup_root_hierarchy_id = types.offset("cgroup_root", "hierarchy_id")?;
        layout.kernfs_node_id = types.offset("kernfs_node", "id")?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Named hierarchies and controllers that say nothing about containers are passed over.
    #[test]
    fn finds_the_best_controller() {
        let check = |text: &str, expect: Option<(&'static str, u32)>| {
            let expect = expect.map(|(name, id)| CgroupHierarchy::Controller { name, id });
            assert_eq!(CgroupHierarchy::first_controller(text), expect, "{text:?}");
        };
        check("0::/system.slice/x.service\n", None);
        check("3:cpu,cpuacct:/\n2:net_cls:/\n1:name=systemd:/init.scope\n0::/\n", Some(("cpu", 3)));
        check("12:memory:/a:b\n9:pids:/\n", Some(("pids", 9)));
        check("x:pids:/\nnonsense\n", None);
    }
}

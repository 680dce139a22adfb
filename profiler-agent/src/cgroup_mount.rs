//! Finds the folders where hierarchies of cgroups are mounted.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where mounts are looked up, with the root that they are seen from: those of the initial process, since in a container
/// with a cgroup namespace of its own our `/sys/fs/cgroup` is only our own cgroup; and ours, where we may not look there.
const MOUNTS: [(&str, &str); 2] = [("/proc/1/mountinfo", "/proc/1/root"), ("/proc/self/mountinfo", "/")];

/// The folder where a hierarchy is mounted: that of the first version which has the controller, or without one the second
/// version's. `None`: nowhere that we may look.
pub(crate) fn mount_of(controller: Option<&str>) -> Option<PathBuf> {
    MOUNTS.iter().find_map(|(mounts, root)| {
        let mounts = fs::read_to_string(mounts).ok()?;
        let mount = Path::new(root).join(find_mount(&mounts, controller)?.trim_start_matches('/'));
        fs::read_dir(&mount).is_ok().then_some(mount)
    })
}

/// The mount point of a hierarchy in a `/proc/PID/mountinfo` (format: `man 5 proc`).
fn find_mount<'a>(mounts: &'a str, controller: Option<&str>) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let (place, system) = line.split_once(" - ")?;
        let mut system = system.split(' ');
        let (kind, options) = (system.next()?, system.nth(1).unwrap_or_default());
        let is_wanted = match controller {
            None => kind == "cgroup2",
            Some(controller) => kind == "cgroup" && options.split(',').any(|option| option == controller),
        };
        // (Escaped characters are of no interest: cgroups are not mounted in such places.)
        place.split(' ').nth(4).filter(|mount| is_wanted && !mount.contains('\\'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first version's hierarchies are told apart by their controllers.
    #[test]
    fn finds_mounts() {
        let mounts = "24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      25 24 0:23 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw\n\
                      26 24 0:24 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      27 24 0:25 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        assert_eq!(find_mount(mounts, None), Some("/sys/fs/cgroup/unified"));
        assert_eq!(find_mount(mounts, Some("cpu")), Some("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(find_mount(mounts, Some("pids")), Some("/sys/fs/cgroup/pids"));
        assert_eq!(find_mount(mounts, Some("memory")), None);
        assert_eq!(find_mount("", None), None);
    }
}

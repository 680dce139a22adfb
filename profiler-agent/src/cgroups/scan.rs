//! Reads the cgroups that are there already: those that were made before the agent started, or while nobody could say so.

use std::{
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::profile::CgroupId;

/// Folders read at most.
const MAX_FOLDERS: usize = 16 << 10;
/// Levels below the root that are looked at: systemd in a container in a pod on a kind node has about fifteen.
const MAX_DEPTH: usize = 32;

/// Where mounts are looked up, with the root that they are seen from: those of the initial process, since in a container
/// with a cgroup namespace of its own our `/sys/fs/cgroup` is only our own cgroup; and ours, where we may not look there.
const MOUNTS: [(&str, &str); 2] = [("/proc/1/mountinfo", "/proc/1/root"), ("/proc/self/mountinfo", "/")];

/// The folder where a hierarchy is mounted; `controller`: that of the first version which has it. `None`: nowhere that we
/// may look.
pub(super) fn mount_of(controller: Option<&str>) -> Option<PathBuf> {
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

/// Calls `cgroup` with the ID and the path of every cgroup below a mount point, parents first. False: there are more.
pub(super) fn walk(mount: &Path, mut cgroup: impl FnMut(CgroupId, &str)) -> io::Result<bool> {
    cgroup(CgroupId(fs::metadata(mount)?.ino()), "/");
    let mut waiting = vec![(mount.to_owned(), String::new(), 0)];
    let mut folders = 0;
    let mut is_complete = true;
    while let Some((folder, path, depth)) = waiting.pop() {
        // What is removed while we look is not there.
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            folders += 1;
            if folders > MAX_FOLDERS {
                return Ok(false);
            }
            let path = format!("{path}/{}", entry.file_name().to_string_lossy());
            cgroup(CgroupId(entry.ino()), &path);
            if depth < MAX_DEPTH {
                waiting.push((entry.path(), path, depth + 1));
            } else {
                is_complete = false;
            }
        }
    }
    Ok(is_complete)
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

    /// Folders are cgroups, by their inodes; files are not.
    #[test]
    fn walks_folders() {
        let root = std::env::temp_dir().join(format!("cgroups-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).expect("folders");
        fs::write(root.join("a/cgroup.procs"), "1").expect("a file");
        let mut found = Vec::new();
        assert!(walk(&root, |id, path| found.push((path.to_owned(), id.0))).expect("a walk"));
        let inode = |path: &str| fs::metadata(root.join(path)).expect("a folder").ino();
        assert_eq!(
            found,
            [("/".to_owned(), inode("")), ("/a".to_owned(), inode("a")), ("/a/b".to_owned(), inode("a/b"))]
        );
        fs::remove_dir_all(&root).expect("no folder");
    }
}

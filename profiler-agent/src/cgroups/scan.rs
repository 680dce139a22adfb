//! Reads the cgroups that are there already: those that were made before the agent started, or while nobody could say so.

use std::{
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::Path,
};

use crate::profile::CgroupId;

/// Folders read at most.
const MAX_FOLDERS: usize = 16 << 10;
/// Levels below the root that are looked at: systemd in a container in a pod on a kind node has about fifteen.
const MAX_DEPTH: usize = 32;

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

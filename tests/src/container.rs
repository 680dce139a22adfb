//! Containers started by runc, in cgroups of any path.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{Background, run, scratch, stderr, workspace};

/// A root folder with one program, under any number of names, and a place for containers.
pub struct Runc {
    folder: PathBuf,
}

impl Runc {
    /// Compiles a program of `tests/workloads` for it: it is `/bin/NAME`, and so is each of `names`.
    pub fn new(test: &str, program: &str, names: &[String]) -> Self {
        let folder = scratch(test);
        let bin = folder.join("root/bin");
        for name in ["root/bin", "root/proc", "bundles", "state"] {
            fs::create_dir_all(folder.join(name)).expect("a folder");
        }
        let binary = bin.join(program);
        let source = workspace().join("tests/workloads").join(program).with_extension("c");
        let compiled = run(Command::new("gcc")
            .args(["-O1", "-g", "-fno-inline", "-fno-omit-frame-pointer", "-static", "-pthread", "-o"])
            .arg(&binary)
            .arg(source));
        assert!(compiled.status.success(), "{}", stderr(&compiled));
        for name in names {
            fs::hard_link(&binary, bin.join(name)).expect("a link");
        }
        Self { folder }
    }

    /// A container's ID of the usual form, that no other number has.
    pub fn id(number: u64) -> String {
        let digits = |seed: u64| {
            let mixed = (number + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            format!("{:016x}", mixed ^ mixed >> 29)
        };
        [1, 2, 3, 4].map(digits).concat()
    }

    /// How a container is started that runs `arguments` in the cgroup of this path, and ends with them.
    pub fn command(&self, id: &str, cgroup: &str, arguments: &[&str]) -> Command {
        self.limited(id, cgroup, arguments, "{}")
    }

    /// The same with limits: `resources` as in the runtime's specification.
    pub fn limited(&self, id: &str, cgroup: &str, arguments: &[&str], resources: &str) -> Command {
        let bundle = self.folder.join("bundles").join(id);
        fs::create_dir_all(&bundle).expect("a folder");
        let quoted: Vec<String> = arguments.iter().map(|argument| format!("{argument:?}")).collect();
        let config = format!(
            r#"{{"ociVersion": "1.0.2",
            "process": {{"user": {{"uid": 0, "gid": 0}}, "args": [{}], "env": ["PATH=/bin"], "cwd": "/",
                         "noNewPrivileges": true}},
            "root": {{"path": {:?}, "readonly": true}}, "hostname": "container",
            "mounts": [{{"destination": "/proc", "type": "proc", "source": "proc"}},
                       {{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}}],
            "linux": {{"cgroupsPath": {cgroup:?}, "resources": {resources},
                       "namespaces": [{{"type": "pid"}}, {{"type": "mount"}}, {{"type": "ipc"}}, {{"type": "uts"}}]}}}}"#,
            quoted.join(", "),
            self.folder.join("root"),
        );
        fs::write(bundle.join("config.json"), config).expect("a file");
        let mut command = self.runc();
        command.arg("run").arg("--bundle").arg(bundle).arg(id);
        command
    }

    /// Starts a container and leaves it running.
    pub fn start(&self, id: &str, cgroup: &str, arguments: &[&str]) -> Background {
        Background::start(&mut self.command(id, cgroup, arguments))
    }

    fn runc(&self) -> Command {
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(self.folder.join("state"));
        runc
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        // Those that have ended are gone; what is left belongs to a test that has failed.
        for entry in fs::read_dir(self.folder.join("state")).into_iter().flatten().flatten() {
            run(self.runc().args(["delete", "--force"]).arg(entry.file_name()));
        }
    }
}

/// Removes cgroups that a test's containers have left, in every hierarchy: folders of these names below the root, and all
/// that is in them.
pub fn remove_cgroups(names: &[&str]) {
    let mounts = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    for mount in mounts.chain([PathBuf::from("/sys/fs/cgroup")]) {
        for name in names {
            remove_cgroup(&mount.join(name));
        }
    }
}

/// Cgroups of a test, which are removed when it ends: see [`remove_cgroups`].
pub struct Cgroups<'a>(pub &'a [&'a str]);

impl Drop for Cgroups<'_> {
    fn drop(&mut self) {
        remove_cgroups(self.0);
    }
}

fn remove_cgroup(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // One that is still in use is somebody else's.
    let _ = fs::remove_dir(folder);
}

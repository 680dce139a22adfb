//! Processes in containers: names come from the container's files, whatever the host has at the same paths.
//!
//! containerd starts them with runc, their root is an overlay, and their C library is another suite's than this
//! machine's.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background,
    container::{Runc, remove_cgroups},
    eventually, kernel_is_usable, record,
    recorded::{Frame, Sample, samples},
    run, scratch, stderr, stdout, workspace,
};

const IMAGE: &str = "localhost/other-suite:test";
/// What begins the names of functions of the program that was compiled for the container, and of the one for the host.
const INSIDE: &str = "inside_";
const OUTSIDE: &str = "outside_";

/// The ID that a container's cgroup is called by. (kubelet's containers have such an ID for a name, too.)
fn container_id(name: &str) -> String {
    Runc::id(name.bytes().map(u64::from).sum())
}

/// containerd with all it keeps in a folder of its own.
struct Containerd {
    /// Sockets need short paths.
    folder: PathBuf,
    _daemon: Background,
}

impl Containerd {
    fn start() -> Self {
        let folder = PathBuf::from(format!("/run/profiler-tests-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let place = folder.display();
        let settings = format!(
            "version = 2\nroot = '{place}/root'\nstate = '{place}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri']\n[grpc]\naddress = '{place}/socket'\n"
        );
        fs::write(folder.join("config.toml"), settings).expect("settings");
        let log = fs::File::create(folder.join("log")).expect("a log");
        let mut command = Command::new("containerd");
        command.arg("--config").arg(folder.join("config.toml"));
        let daemon = command.stderr(log.try_clone().expect("a log")).stdout(log).spawn().expect("containerd");
        let containerd = Self { folder, _daemon: Background(daemon) };
        eventually("containerd", Duration::from_secs(20), || {
            run(containerd.ctr().arg("version")).status.success().then_some(())
        });
        containerd
    }

    fn ctr(&self) -> Command {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(self.folder.join("socket"));
        ctr
    }

    /// A container that runs a shell's script and is gone when the script has ended.
    fn container(&self, name: &str, script: &str) -> Command {
        let mut ctr = self.ctr();
        let cgroup = format!("/kubepods/besteffort/pod2d8a3c1e-0f4b-4c56-9d7e-8a9b0c1d2e3f/{}", container_id(name));
        ctr.args(["run", "--rm", "--cgroup", &cgroup, "--snapshotter", "overlayfs", IMAGE, name]);
        ctr.args(["/bin/busybox", "sh", "-c", script]);
        ctr
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Containers are gone: they were waited for, or their test has failed.
        for container in stdout(&run(self.ctr().args(["containers", "list", "--quiet"]))).lines() {
            run(self.ctr().args(["tasks", "kill", "--signal", "SIGKILL", container]));
            run(self.ctr().args(["tasks", "delete", "--force", container]));
            run(self.ctr().args(["containers", "delete", container]));
        }
        let _ = fs::remove_dir_all(&self.folder);
        remove_cgroups(&["kubepods"]);
    }
}

/// Compiles the program for one of both places.
fn job(place: &str, binary: &Path) {
    fs::create_dir_all(binary.parent().expect("a folder")).expect("a folder");
    let source = workspace().join("tests/workloads/job.c");
    let compiled = run(Command::new("gcc")
        .args(["-O1", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", &format!("-DPLACE={place}"), "-o"])
        .arg(binary)
        .arg(source));
    assert!(compiled.status.success(), "{}", stderr(&compiled));
}

/// Packs a root into an image, in the form of `docker save`.
fn image(folder: &Path, root: &Path) -> PathBuf {
    let tar = |archive: &str, from: &Path, what: &[&str]| {
        let packed = run(Command::new("tar").arg("-cf").arg(folder.join(archive)).arg("-C").arg(from).args(what));
        assert!(packed.status.success(), "{}", stderr(&packed));
    };
    tar("layer.tar", root, &["."]);
    let digest = stdout(&run(Command::new("sha256sum").arg(folder.join("layer.tar"))));
    let digest = digest.split_whitespace().next().expect("a digest");
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":["sha256:{digest}"]}}}}"#
    );
    fs::write(folder.join("config.json"), config).expect("a file");
    let manifest = format!(r#"[{{"Config":"config.json","RepoTags":["{IMAGE}"],"Layers":["layer.tar"]}}]"#);
    fs::write(folder.join("manifest.json"), manifest).expect("a file");
    tar("image.tar", folder, &["manifest.json", "config.json", "layer.tar"]);
    folder.join("image.tar")
}

/// The build ID of a file, as readelf tells it.
fn build_id(file: &Path) -> String {
    let notes = stdout(&run(Command::new("readelf").arg("-n").arg(file)));
    notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: ")).expect("a build ID").to_owned()
}

/// Functions of the dynamic symbol table: address, size, name without version.
fn dynamic_symbols(file: &Path) -> Vec<(u64, u64, String)> {
    let table = stdout(&run(Command::new("readelf").args(["-W", "--dyn-syms"]).arg(file)));
    let symbol = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let address = u64::from_str_radix(fields.get(1)?, 16).ok()?;
        let name = fields.get(7)?.split('@').next()?;
        Some((address, fields.get(2)?.parse().ok()?, name.to_owned()))
    };
    table.lines().filter_map(symbol).collect()
}

fn is_libc(frame: &Frame) -> bool {
    frame.file.ends_with("/libc.so.6")
}

fn count<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> u64 {
    samples.into_iter().map(|sample| sample.count).sum()
}

/// Samples of a program, by the place that its functions tell. Every one tells one place.
fn places(samples: &[Sample], process: &str) -> (u64, u64) {
    let of_place =
        |place: &str| {
            count(samples.iter().filter(|sample| {
                sample.process == process && sample.frames.iter().any(|frame| frame.is_named_like(place))
            }))
        };
    (of_place(INSIDE), of_place(OUTSIDE))
}

/// The same path is another program in the container and on the host, and so is the C library's. Programs in the
/// container are replaced and deleted while they run, others have ended, with their container, before anything is
/// drained.
#[test]
fn names_come_from_the_containers_files() {
    if !kernel_is_usable() {
        return;
    }
    let other = workspace().join("target/container/root");
    if !other.is_dir() {
        eprintln!("SKIPPED: there is no root of another suite (`cargo xtask setup` fetches it where it can)");
        return;
    }
    let folder = scratch("containers");
    // The image's root: the suite's C library, a shell, and the program at the path that it has on the host.
    let (root, binary) = (folder.join("root"), folder.join("bin/job"));
    assert!(run(Command::new("cp").arg("-a").arg(&other).arg(&root)).status.success());
    let shell = stdout(&run(Command::new("sh").args(["-c", "command -v busybox"])));
    fs::copy(shell.trim(), root.join("usr/bin/busybox")).expect("a static busybox");
    symlink("busybox", root.join("usr/bin/sh")).expect("a link");
    let inside = root.join(binary.strip_prefix("/").expect("an absolute path"));
    job("outside", &binary);
    job("inside", &inside);
    for name in ["replaced", "deleted"] {
        fs::copy(&inside, inside.with_file_name(name)).expect("a copy");
    }
    fs::copy(&binary, inside.with_file_name("replacement")).expect("a copy");

    let containerd = Containerd::start();
    let imported = run(containerd.ctr().args(["images", "import"]).arg(image(&folder, &root)));
    assert!(imported.status.success(), "{}", stderr(&imported));
    let path = binary.display();
    // One was there before the recording began.
    let mut earlier = Background::start(&mut containerd.container("earlier", &format!("echo ready; exec {path} 12")));
    earlier.wait_for_line("ready");
    let recording = folder.join("machine.otlp");
    let agent = Background::start(record(&["--frequency", "499", "--duration", "60s", "--output"]).arg(&recording));
    let host = Background::start(Command::new(&binary).arg("12"));
    std::thread::sleep(Duration::from_secs(2));
    let bin = binary.parent().expect("a folder").display();
    let script = format!(
        "cd {bin}; cp job upper; ./replaced 4 & ./deleted 4 & sleep 1; ./upper 3 & \
         mv replacement replaced; rm deleted; ./replaced 2 & wait"
    );
    let later = run(&mut containerd.container("later", &script));
    assert!(later.status.success(), "{}", stderr(&later));
    // One that ends, with its container, long before the next drain.
    let brief = run(&mut containerd.container("brief", &format!("cd {bin}; mv job brief; ./brief 0.7; rm brief")));
    assert!(brief.status.success(), "{}", stderr(&brief));
    agent.signal(Signal::SIGINT);
    let output = agent.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    for program in [earlier, host] {
        assert!(program.finish().status.success());
    }
    drop(containerd);

    let samples = samples(&fs::read(&recording).expect("the recording"));
    for (process, with_host) in
        [("job", true), ("upper", false), ("replaced", true), ("deleted", false), ("brief", false)]
    {
        let (inside, outside) = places(&samples, process);
        println!("{process:9} {inside:5} samples in the container's program, {outside:5} in the other");
        // (Programs share CPUs with whatever else the machine does.)
        assert!(inside > 5 && if with_host { outside > 5 } else { outside == 0 }, "{process}: {inside} {outside}");
    }
    let containers =
        [("job", "earlier"), ("upper", "later"), ("replaced", "later"), ("deleted", "later"), ("brief", "brief")];
    for sample in samples.iter().filter(|sample| sample.frames.iter().any(|frame| frame.is_named_like(INSIDE))) {
        let (_, container) = containers.iter().find(|(process, _)| *process == sample.process).expect("a program");
        assert_eq!(sample.resource.get("container.id"), Some(&container_id(container)), "{sample:?}");
    }
    let has = |sample: &Sample, place| sample.frames.iter().any(|frame| frame.is_named_like(place));
    assert!(!samples.iter().any(|sample| has(sample, INSIDE) && has(sample, OUTSIDE)));

    let libraries = [other.join("usr/lib/x86_64-linux-gnu/libc.so.6"), "/lib/x86_64-linux-gnu/libc.so.6".into()];
    let [theirs, ours] = libraries.each_ref().map(|file| build_id(file));
    assert_ne!(theirs, ours);
    let symbols = dynamic_symbols(&libraries[0]);
    let (mut named, mut nameless) = (0, 0);
    for sample in &samples {
        let is_inside = has(sample, INSIDE);
        if !is_inside && !has(sample, OUTSIDE) {
            continue;
        }
        for frame in sample.frames.iter().filter(|frame| is_libc(frame)) {
            // ("replaced" became the host's program in the container: it has the container's library too.)
            let is_theirs = is_inside || sample.process == "replaced";
            assert_eq!(frame.build_id, if is_theirs { &*theirs } else { &*ours }, "{sample:?}");
            if !is_theirs {
                continue;
            }
            let Some(name) = &frame.name else {
                nameless += sample.count;
                continue;
            };
            named += sample.count;
            let holds = |(start, size, known): &&(u64, u64, String)| {
                known == name && frame.address.checked_sub(*start).is_some_and(|inside| inside < *size)
            };
            assert!(symbols.iter().find(holds).is_some(), "{name} is not at {:#x} of the library", frame.address);
        }
    }
    println!("frames of the container's C library: {named} with its names, {nameless} without");
    assert!(named > 100);
}

//! Whose samples they are, by cgroups: real containers in the cgroups of every runtime and driver.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background,
    container::{Cgroups, Runc, remove_cgroups},
    kernel_is_usable, record,
    recorded::{Sample, samples},
    scratch, stderr, workload,
};

const UID: &str = "2d8a3c1e-0f4b-4c56-9d7e-8a9b0c1d2e3f";
/// Folders below the root that the layouts below begin with, and that nothing else uses on a machine for tests.
const ROOTS: [&str; 8] =
    ["kubepods", "kubepods.slice", "kubelet", "kubelet.slice", "docker", "libpod_parent", "machine.slice", "ecs"];

/// Paths of containers' cgroups: `ID` is the container, `OUTER` another around it.
const LAYOUTS: &[(&str, &str)] = &[
    ("cgroupfs", "/kubepods/burstable/podUID/ID"),
    ("guaranteed", "/kubepods/podUID/ID"),
    ("static-pod", "/kubepods/besteffort/pod0123456789abcdef0123456789abcdef/ID"),
    ("crio-fs", "/kubepods/burstable/podUID/crio-ID"),
    ("systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_I_D.slice/cri-containerd-ID.scope"),
    ("crio", "/kubepods.slice/kubepods-podU_I_D.slice/crio-ID.scope"),
    ("cri-dockerd", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_I_D.slice/docker-ID.scope"),
    ("unaware", "/kubepods/kubepods-burstable-podU_I_D.slice:cri-containerd:ID"),
    (
        "kind-systemd",
        "/docker/OUTER/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podU_I_D.slice/crio-ID.scope",
    ),
    ("kind", "/docker/OUTER/kubelet/kubepods/besteffort/podUID/ID"),
    ("docker", "/docker/ID"),
    ("in-docker", "/docker/OUTER/docker/ID"),
    ("podman", "/machine.slice/libpod-ID.scope/container"),
    ("podman-fs", "/libpod_parent/libpod-ID"),
];

fn read(recording: &Path, agent: Background) -> Vec<Sample> {
    agent.signal(Signal::SIGINT);
    let output = agent.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    samples(&fs::read(recording).expect("the recording"))
}

/// Samples of programs in containers, by what their labels say: the right container, none, another.
fn verdicts(samples: &[Sample], containers: &BTreeMap<String, String>) -> [u64; 3] {
    let mut counts = [0; 3];
    for sample in samples {
        let said = sample.resource.get("container.id");
        let verdict = match (containers.get(&sample.process), said) {
            (Some(container), Some(said)) => usize::from(container != said) * 2,
            (Some(_), None) => 1,
            // Starting a container is done in its cgroup, by runc.
            (None, Some(_)) if !sample.process.starts_with("runc") && sample.process != "exe" => 2,
            (None, _) => continue,
        };
        if verdict > 0 {
            println!("{} in {said:?}: {} samples", sample.process, sample.count);
        }
        counts[verdict] += sample.count;
    }
    counts
}

/// A container in a cgroup of every layout, some there before the recording and some not, by the first version's
/// hierarchies and by the second's: every sample of its program carries its ID.
#[test]
fn every_layout_is_read() {
    if !kernel_is_usable() {
        return;
    }
    let _cgroups = Cgroups(&ROOTS);
    let names: Vec<String> = LAYOUTS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let runc = Runc::new("layouts", "burner", &names);
    let layouts: Vec<(String, String, String)> = LAYOUTS
        .iter()
        .zip(0..)
        .map(|((name, path), number)| {
            let (id, uid) = (Runc::id(number), UID.replace('-', "_"));
            let path = path.replace("UID", UID).replace("U_I_D", &uid).replace("OUTER", &Runc::id(900 + number));
            ((*name).to_owned(), path.replace("ID", &id), id)
        })
        .collect();
    let containers: BTreeMap<String, String> = layouts.iter().map(|(name, _, id)| (name.clone(), id.clone())).collect();
    let start = |layouts: &[(String, String, String)]| -> Vec<Background> {
        let start =
            |(name, path, id): &(String, String, String)| runc.start(id, path, &[&format!("/bin/{name}"), "1", "12"]);
        layouts.iter().map(start).collect()
    };
    let (before, later) = layouts.split_at(layouts.len() / 2);
    let mut running = start(before);
    thread::sleep(Duration::from_secs(1));
    let recordings = [("as this machine has them", None), ("second version", Some("--unified-cgroups"))];
    let folder = scratch("layouts-recorded");
    let agents: Vec<_> = recordings
        .iter()
        .map(|(name, argument)| {
            let recording = folder.join(name).with_extension("otlp");
            let mut agent = record(&["--frequency", "199", "--duration", "60s"]);
            (recording.clone(), Background::start(agent.args(*argument).arg("--output").arg(recording)))
        })
        .collect();
    thread::sleep(Duration::from_secs(2));
    running.extend(start(later));
    for container in running {
        let output = container.finish();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    for ((recording, agent), (name, _)) in agents.into_iter().zip(recordings) {
        let samples = read(&recording, agent);
        for (program, id) in &containers {
            let of_program = samples.iter().filter(|sample| sample.process == *program);
            let (mut right, mut wrong) = (0, 0);
            for sample in of_program {
                let is_right = sample.resource.get("container.id") == Some(id);
                *(if is_right { &mut right } else { &mut wrong }) += sample.count;
            }
            println!("{name}: {program:13} {right:5} samples with its container, {wrong} without");
            assert!(right > 10 && wrong == 0);
        }
        assert_eq!(verdicts(&samples, &containers)[2], 0);
    }
}

/// A process in the cgroup of a systemd service is that service, whatever it is called itself.
#[test]
fn systemd_services_are_services() {
    if !kernel_is_usable() {
        return;
    }
    struct Removed(PathBuf);
    impl Drop for Removed {
        fn drop(&mut self) {
            // The program has been waited for, or its test has failed.
            let _ = fs::remove_dir(&self.0);
        }
    }
    let by_controller = Path::new("/sys/fs/cgroup/pids");
    let mount = if by_controller.is_dir() { by_controller } else { Path::new("/sys/fs/cgroup") };
    let cgroup = Removed(mount.join("system.slice/profiler-test.service"));
    fs::create_dir_all(&cgroup.0).expect("a cgroup");
    let burner = workload("burner");
    let script = format!("echo $$ >{}; exec {} 1 5", cgroup.0.join("cgroup.procs").display(), burner.display());
    let program = Background::start(Command::new("sh").args(["-c", &script]));
    let recording = scratch("services").join("machine.otlp");
    let agent = Background::start(record(&["--frequency", "199", "--duration", "60s", "--output"]).arg(&recording));
    let pid = i64::from(program.pid());
    assert!(program.finish().status.success());
    let samples = read(&recording, agent);
    // (The shell was not in the cgroup from the beginning.)
    let mut of_burner = samples.iter().filter(|sample| sample.pid == pid && sample.process == "burner").peekable();
    assert!(of_burner.peek().is_some());
    for sample in of_burner {
        let said = ["service.name", "systemd.unit"].map(|name| sample.resource.get(name).map(String::as_str));
        assert_eq!(said, [Some("profiler-test"), Some("profiler-test.service")], "{sample:?}");
    }
}

/// A hundred containers of a second each, ten at a time, while PIDs and the names of cgroups are used again at once.
#[test]
fn short_lived_containers_are_told_apart() {
    const CONTAINERS: u64 = 100;
    if !kernel_is_usable() {
        return;
    }
    let _cgroups = Cgroups(&ROOTS);
    let names: Vec<String> = (0..CONTAINERS).map(|number| format!("job-{number}")).collect();
    let runc = Runc::new("short-lived", "burner", &names);
    let containers: BTreeMap<String, String> = names.iter().cloned().zip((0..CONTAINERS).map(Runc::id)).collect();
    let recording = scratch("short-lived-recorded").join("machine.otlp");
    let agent = Background::start(record(&["--frequency", "499", "--duration", "300s", "--output"]).arg(&recording));
    thread::sleep(Duration::from_secs(1));

    let is_over = AtomicBool::new(false);
    let waiting = Mutex::new(names.iter());
    let pids = Mutex::new(Vec::new());
    // PIDs are given out from where the last one was: from the same place, again and again.
    let last_pid = "/proc/sys/kernel/ns_last_pid";
    let first = fs::read_to_string(last_pid).unwrap_or_default();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = fs::write(last_pid, first.trim());
                thread::sleep(Duration::from_millis(50));
            }
        });
        let workers: Vec<_> = (0..10)
            .map(|worker| {
                let (runc, containers, waiting, pids) = (&runc, &containers, &waiting, &pids);
                scope.spawn(move || {
                    loop {
                        let Some(name) = waiting.lock().expect("the names").next() else { return };
                        // Each worker's pod is made and removed with each of its containers.
                        let path = format!("/kubepods/burstable/pod2d8a3c1e-0f4b-4c56-9d7e-00000000000{worker}");
                        let id = &containers[name];
                        let program = format!("/bin/{name}");
                        let run = || {
                            let container = runc.start(id, &format!("{path}/{id}"), &[&program, "1", "1"]);
                            pids.lock().expect("the PIDs").push(container.pid());
                            container.finish()
                        };
                        let mut output = run();
                        if stderr(&output).contains("unable to start container process") {
                            // (Now and then runc's own processes lose each other, where PIDs are given out again.)
                            println!("{name} is started again: {}", stderr(&output).trim());
                            output = run();
                        }
                        assert!(output.status.success(), "{}", stderr(&output));
                        remove_cgroups(&[path.trim_start_matches('/')]);
                    }
                })
            })
            .collect();
        let failed = workers.into_iter().filter_map(|worker| worker.join().err()).count();
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(failed, 0, "containers that could not be run");
    });
    let samples = read(&recording, agent);
    let [right, without, wrong] = verdicts(&samples, &containers);
    let sampled = containers.keys().filter(|name| samples.iter().any(|sample| sample.process == **name)).count();
    let mut pids = pids.into_inner().expect("the PIDs");
    let started = pids.len();
    pids.sort_unstable();
    pids.dedup();
    println!(
        "{sampled} of {CONTAINERS} containers sampled: {right} samples with their container, {without} without, {wrong} \
         with another; {} of {started} PIDs of runc were used again",
        started - pids.len()
    );
    assert!(sampled > 90 && wrong == 0 && without * 99 <= right);
}

/// Containers that live for some milliseconds are known like any other.
#[test]
fn containers_of_milliseconds_are_known() {
    const CONTAINERS: u64 = 30;
    if !kernel_is_usable() {
        return;
    }
    let _cgroups = Cgroups(&ROOTS);
    let names: Vec<String> = (0..CONTAINERS).map(|number| format!("brief-{number}")).collect();
    let runc = Runc::new("brief", "shortlived", &names);
    let containers: BTreeMap<String, String> = names.iter().cloned().zip((300..).map(Runc::id)).collect();
    let recording = scratch("brief-recorded").join("machine.otlp");
    let agent = Background::start(record(&["--frequency", "999", "--duration", "120s", "--output"]).arg(&recording));
    thread::sleep(Duration::from_secs(1));
    for name in &names {
        let (id, program) = (&containers[name], format!("/bin/{name}"));
        let path = format!("/kubepods/besteffort/pod{UID}/{id}");
        let output = runc.start(id, &path, &[&program, "30"]).finish();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let samples = read(&recording, agent);
    let [right, without, wrong] = verdicts(&samples, &containers);
    println!("{right} samples with their container, {without} without, {wrong} with another");
    assert!(right > CONTAINERS * 10 && without == 0 && wrong == 0);
}

/// An agent in a PID namespace of its own (a kind node, say) sees what is in there by the PIDs that are used there, and
/// nothing else.
#[test]
fn a_nested_pid_namespace_is_a_machine_of_its_own() {
    if !kernel_is_usable() {
        return;
    }
    let (folder, burner) = (scratch("nested"), workload("burner"));
    let recording = folder.join("nested.otlp");
    let outside = Background::start(Command::new(&burner).args(["1", "10"]));
    let agent = record(&["--frequency", "199", "--duration", "4s", "--event", "both", "--output"]);
    let script = format!(
        "cp {burner} {inside}; {inside} 1 8 & {agent} {arguments} {recording}",
        burner = burner.display(),
        inside = folder.join("inside").display(),
        agent = agent.get_program().to_string_lossy(),
        arguments = agent.get_args().map(|argument| argument.to_string_lossy()).collect::<Vec<_>>().join(" "),
        recording = recording.display(),
    );
    let unshare = ["--pid", "--fork", "--mount-proc", "--cgroup", "--kill-child", "sh", "-c", &script];
    let output = Background::start(Command::new("unshare").args(unshare)).finish();
    assert!(output.status.success(), "{}", stderr(&output));
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    drop(outside);
    let samples = samples(&fs::read(recording).expect("the recording"));
    let is_named = |sample: &&&Sample| sample.frames.iter().any(|frame| frame.is_named_like("burn"));
    let own: Vec<&Sample> = samples.iter().filter(|sample| sample.process == "inside").collect();
    let on_cpu: Vec<&&Sample> = own.iter().filter(|sample| !sample.is_wait).collect();
    let inside: u64 = on_cpu.iter().map(|sample| sample.count).sum();
    let named: u64 = on_cpu.iter().copied().filter(is_named).map(|sample| sample.count).sum();
    let outside = samples.iter().filter(|sample| sample.process == "burner").count();
    println!("{inside} samples inside, {named} of them with names; {outside} outside");
    assert!(inside > 100 && named * 100 >= inside * 95 && outside == 0);
    assert!(own.iter().all(|sample| sample.pid < 100), "PIDs are not those of the namespace");
}

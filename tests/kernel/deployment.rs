//! The agent as `deploy/` runs it: in a container of the image's recipe, with the chart's capabilities and no others,
//! a root that is read-only, and the node's processes.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::sys::{signal::Signal, utsname::uname};
use profiler_tests::{
    Background, agent, eventually, free_port, http_get, kernel_is_usable,
    receiver::{Options, Receiver},
    record,
    recorded::{Frame, Sample, samples},
    run, scratch, stderr, stdout,
    stopped::Stopped,
    workload, workspace,
    yaml::{self, Value, texts},
};
use serde_json::json;

/// The user `nobody`.
const NOBODY: u32 = 65534;
/// A function of a script that only one of this test's processes has.
const SCRIPTED: &str = "spinInDeployment";

/// What the chart's values say about the container.
fn security_context() -> Value {
    yaml::file(&workspace().join("deploy/helm/profiler-agent/values.yaml"))["securityContext"].take()
}

/// The capabilities that it lists, as far as this machine can give them away.
fn capabilities(context: &Value) -> Vec<&str> {
    let mut capabilities = texts(&context["capabilities"]["add"]);
    if counts_no_locked_memory() && !holds_sys_resource() {
        eprintln!("SKIPPED: who runs this test has no CAP_SYS_RESOURCE to give away; the agent does without, too");
        capabilities.retain(|&capability| capability != "SYS_RESOURCE");
    }
    capabilities
}

/// The image's root, and what its containers share.
struct Image {
    folder: PathBuf,
}

impl Image {
    fn assemble(test: &str) -> Self {
        let folder = scratch(test);
        let recipe = workspace().join("deploy/container/assemble");
        let assembled = run(Command::new(recipe).arg(agent()).arg(folder.join("root")));
        assert!(assembled.status.success(), "{}", stderr(&assembled));
        fs::create_dir_all(folder.join("spool")).expect("a folder");
        Self { folder }
    }

    /// A container with these capabilities and a network of its own.
    fn container(&self, name: &str, capabilities: &[&str], arguments: &[&str]) -> Command {
        self.adapted(name, capabilities, arguments, |_| ())
    }

    /// A container as Kubernetes would have runc make it of the chart's values, with these capabilities, but for what is
    /// adapted. What the agent has for its spool, `/var/lib/profiler-agent`, is the folder `spool`.
    fn adapted(
        &self,
        name: &str,
        capabilities: &[&str],
        arguments: &[&str],
        adapt: impl FnOnce(&mut Value),
    ) -> Command {
        let bundle = self.folder.join(name);
        fs::create_dir_all(&bundle).expect("a folder");
        let written = run(Command::new("runc").args(["spec", "--bundle"]).arg(&bundle));
        assert!(written.status.success(), "{}", stderr(&written));
        let context = security_context();
        let capabilities: Vec<String> = capabilities.iter().map(|name| format!("CAP_{name}")).collect();
        let mut spec = yaml::file(&bundle.join("config.json"));
        spec["process"]["terminal"] = json!(false);
        spec["process"]["user"] = json!({"uid": context["runAsUser"], "gid": context["runAsGroup"]});
        spec["process"]["args"] = [&["/usr/bin/profiler-agent"], arguments].concat().into();
        spec["process"]["noNewPrivileges"] = json!(context["allowPrivilegeEscalation"] == false);
        // (As Kubernetes has it, no capability is ambient or inheritable.)
        spec["process"]["capabilities"] =
            json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
        spec["process"]["rlimits"] = json!([]);
        spec["root"] = json!({"path": self.folder.join("root"), "readonly": context["readOnlyRootFilesystem"]});
        let spool = json!({
            "destination": "/var/lib/profiler-agent", "type": "bind", "source": self.folder.join("spool"),
            "options": ["rbind", "rw"],
        });
        spec["mounts"].as_array_mut().expect("mounts").push(spool);
        // `hostPID`.
        spec["linux"]["namespaces"].as_array_mut().expect("namespaces").retain(|namespace| namespace["type"] != "pid");
        adapt(&mut spec);
        fs::write(bundle.join("config.json"), spec.to_string()).expect("a file");
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(self.folder.join("state")).args(["run", "--bundle"]).arg(&bundle);
        runc.arg(format!("profiler-{name}-{}", std::process::id()));
        runc
    }
}

/// Programs whose functions are named after themselves. They run until this is dropped.
pub(crate) struct Crowd {
    /// Other users can reach it.
    folder: PathBuf,
    programs: Vec<Background>,
}

impl Crowd {
    /// Names of the programs, and of what their functions' names begin with.
    pub(crate) const PROGRAMS: [&str; 4] = ["dpl_plain", "dpl_private", "dpl_deleted", "dpl_elsewhere"];

    pub(crate) fn start() -> Self {
        let folder = env::temp_dir().join(format!("profiler-tests-{}", std::process::id()));
        let (private, hidden) = (folder.join("private"), folder.join("hidden"));
        for folder in [&folder, &private, &hidden] {
            fs::create_dir_all(folder).expect("a folder");
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("our folder");
        }
        let mut crowd = Self { folder: folder.clone(), programs: Vec::new() };
        for name in Self::PROGRAMS {
            let compiled = run(Command::new("gcc")
                .args(["-O1", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", &format!("-DPLACE={name}"), "-o"])
                .arg(folder.join(name))
                .arg(workspace().join("tests/workloads/job.c")));
            assert!(compiled.status.success(), "{}", stderr(&compiled));
        }
        let [plain, private_name, deleted, elsewhere] = Self::PROGRAMS;
        crowd.add(Command::new(folder.join(plain)).arg("600"));
        // Nobody but `nobody` may look into the folder, or read the program.
        let program = private.join(private_name);
        fs::rename(folder.join(private_name), &program).expect("a program");
        for path in [&program, &private] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).expect("our file");
            chown(path, Some(NOBODY), Some(NOBODY)).expect("root may");
        }
        crowd.add(as_nobody().arg(&program).arg("600"));
        crowd.add(Command::new(folder.join(deleted)).arg("600"));
        fs::remove_file(folder.join(deleted)).expect("a program");
        // A file system that no other mount namespace has, and the program in no other.
        let script = format!(
            "mount -t tmpfs tmpfs {hidden} && mv {program} {hidden} && exec {hidden}/{elsewhere} 600",
            hidden = hidden.display(),
            program = folder.join(elsewhere).display(),
        );
        crowd.add(Command::new("unshare").args(["--mount", "sh", "-c", &script]));
        // Code made at run time, whose names only its user may read.
        let spin = format!(
            "umask 077; exec node --perf-basic-prof -e 'function {SCRIPTED}() {{ let n = 0; for (let i = 0; i < 1e5; i++) \
             n += i % 7; return n; }} const end = Date.now() + 600000; while (Date.now() < end) {SCRIPTED}();'"
        );
        crowd.add(as_nobody().args(["sh", "-c", &spin]));
        // Time in the kernel.
        crowd.add(Command::new("dd").args(["if=/dev/zero", "of=/dev/null", "bs=64k"]));
        let map = crowd.perf_map();
        eventually("node's perf map", Duration::from_secs(30), || {
            fs::read_to_string(&map).is_ok_and(|map| map.contains(SCRIPTED)).then_some(())
        });
        crowd
    }

    fn add(&mut self, command: &mut Command) {
        self.programs.push(Background::start(command));
    }

    fn perf_map(&self) -> PathBuf {
        PathBuf::from(format!("/tmp/perf-{}.map", self.programs[4].pid()))
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        let map = self.programs.get(4).map(|_| self.perf_map());
        self.programs.clear();
        // What is left is only in the way.
        if let Some(map) = map {
            let _ = fs::remove_file(map);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn as_nobody() -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.arg(format!("--reuid={NOBODY}")).arg(format!("--regid={NOBODY}")).args(["--clear-groups", "--"]);
    setpriv
}

/// How much of a recording has names, and how many of its stacks are whole. Shares are of one.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) samples: u64,
    /// By program of the crowd.
    pub(crate) programs: [f64; 4],
    pub(crate) scripted: u64,
    pub(crate) kernel: f64,
    /// Of the programs' stacks, where process and unwind table were known by then.
    pub(crate) rooted: f64,
}

impl Named {
    fn of(recording: &Path) -> Self {
        Self::among(&samples(&fs::read(recording).expect("a recording")))
    }

    /// What a recording's or several windows' samples tell.
    pub(crate) fn among(samples: &[Sample]) -> Self {
        let has = |sample: &Sample, matches: &dyn Fn(&Frame) -> bool| sample.frames.iter().any(|frame| matches(frame));
        let is_kernel = |frame: &Frame| frame.kind == "kernel";
        Self {
            samples: count(samples, |_| true),
            programs: Crowd::PROGRAMS.map(|program| {
                share(
                    samples,
                    |sample| sample.process == program,
                    |sample| has(sample, &|frame| frame.is_named_like(program)),
                )
            }),
            scripted: count(samples, |sample| {
                has(sample, &|frame| frame.name.as_ref().is_some_and(|name| name.contains(SCRIPTED)))
            }),
            kernel: share(
                samples,
                |sample| has(sample, &is_kernel),
                |sample| !has(sample, &|frame| is_kernel(frame) && frame.name.is_none()),
            ),
            rooted: share(
                samples,
                |sample| Crowd::PROGRAMS.contains(&&*sample.process) && !is_early(sample),
                |sample| !sample.frames.last().is_some_and(|frame| frame.is_named_like("[incomplete")),
            ),
        }
    }
}

/// Whether a sample was taken before its stack could be walked: how many are depends on how busy the machine is.
fn is_early(sample: &Sample) -> bool {
    let ends = ["[incomplete: table pending]", "[incomplete: unknown process]"];
    sample.frames.last().is_some_and(|frame| ends.iter().any(|end| frame.is_named_like(end)))
}

fn count(samples: &[Sample], is_meant: impl Fn(&Sample) -> bool) -> u64 {
    samples.iter().filter(|sample| is_meant(sample)).map(|sample| sample.count).sum()
}

fn share(samples: &[Sample], is_meant: impl Fn(&Sample) -> bool, is_good: impl Fn(&Sample) -> bool) -> f64 {
    let good = count(samples, |sample| is_meant(sample) && is_good(sample));
    good as f64 / count(samples, is_meant).max(1) as f64
}

/// Whether the kernel hides its symbols from who has no capability.
fn kernel_hides_symbols() -> bool {
    let setting = |name: &str| -> i32 {
        let text = fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    setting("kptr_restrict") > 0 || setting("perf_event_paranoid") > 1
}

/// With the chart's capabilities the agent sees all that it sees with every capability; without any one of them it misses
/// something, or does not work at all.
#[test]
fn the_charts_capabilities_are_enough_and_none_too_many() {
    if !kernel_is_usable() {
        return;
    }
    let context = security_context();
    let capabilities = capabilities(&context);
    let image = Image::assemble("deployment");
    let without = |left_out: &str| -> Vec<&str> {
        capabilities.iter().copied().filter(|&capability| capability != left_out).collect()
    };

    let whole = run(&mut image.container("check", &capabilities, &["check"]));
    println!("{}", stdout(&whole));
    assert!(whole.status.success(), "{}{}", stdout(&whole), stderr(&whole));
    assert!(!stdout(&whole).contains("degraded"), "{}", stdout(&whole));
    // What nothing works without says so; of the rest, what is recorded tells.
    let mut recorded = Vec::new();
    for &capability in &capabilities {
        match capability {
            "BPF" | "PERFMON" | "SYS_PTRACE" => {
                let name = capability.to_lowercase();
                let check = run(&mut image.container(&format!("check-{name}"), &without(capability), &["check"]));
                assert!(!check.status.success(), "{capability} is not needed");
                assert!(
                    stdout(&check).contains(&format!("missing privileges: CAP_{capability}")),
                    "{}",
                    stdout(&check)
                );
            }
            // Nothing of this kernel's needs it.
            "SYS_RESOURCE" if counts_no_locked_memory() => println!("SYS_RESOURCE: needed before Linux 5.11"),
            "SYS_RESOURCE" => {
                let mut check = Command::new("prlimit");
                let runc = image.container("check-memlock", &without(capability), &["check"]);
                check.arg("--memlock=65536:65536").arg(runc.get_program()).args(runc.get_args());
                assert!(!run(&mut check).status.success(), "{capability} is not needed");
            }
            "SYSLOG" if !kernel_hides_symbols() => println!("SYSLOG: this kernel shows its symbols to everybody"),
            "DAC_READ_SEARCH" | "SYSLOG" | "CHECKPOINT_RESTORE" => recorded.push(capability),
            other => panic!("what is {other} for?"),
        }
    }

    let crowd = Crowd::start();
    let arguments = ["--frequency", "199", "--duration", "10s", "--format", "otlp", "--output"];
    let in_container = |name: &str, capabilities: &[&str]| {
        let output = format!("/var/lib/profiler-agent/{name}");
        Background::start(&mut image.container(name, capabilities, &[&["record"], &arguments[..], &[&output]].concat()))
    };
    let everything = image.folder.join("spool/everything");
    let mut recordings = vec![
        ("everything", Background::start(record(&arguments).arg(&everything))),
        ("chart", in_container("chart", &capabilities)),
    ];
    recordings.extend(recorded.iter().map(|&left_out| (left_out, in_container(left_out, &without(left_out)))));
    let named: Vec<(&str, Named)> = recordings
        .into_iter()
        .map(|(name, recording)| {
            let output = recording.finish();
            assert!(output.status.success(), "{name}: {}", stderr(&output));
            (name, Named::of(&image.folder.join("spool").join(name)))
        })
        .collect();
    drop(crowd);
    println!("programs are {:?}", Crowd::PROGRAMS);
    for (name, named) in &named {
        println!("{name:18} {named:.3?}");
    }
    let [(_, everything), (_, chart), less @ ..] = &named[..] else { unreachable!("two at least") };
    for named in [everything, chart] {
        assert!(named.samples > 500 && named.programs.iter().all(|&share| share > 0.9), "{named:?}");
        assert!(named.scripted > 5 && named.kernel > 0.95, "{named:?}");
    }
    // (Both recorded the same seconds, but for some milliseconds.)
    let difference = chart.rooted - everything.rooted;
    assert!(chart.rooted > 0.97 && difference.abs() < 0.02, "{} {}", chart.rooted, everything.rooted);
    for (left_out, named) in less {
        let [plain, private, deleted, _] = named.programs;
        assert!(plain > 0.9, "{left_out}: {named:?}");
        match *left_out {
            "DAC_READ_SEARCH" => assert!(private < 0.1 && named.scripted == 0, "{left_out} is not needed: {named:?}"),
            "SYSLOG" => assert!(named.kernel < 0.1, "{left_out} is not needed: {named:?}"),
            _ => assert!(deleted < 0.1, "{left_out} is not needed: {named:?}"),
        }
    }
}

/// The daemon runs with the manifests' arguments, variables and configuration: it is ready, its samples arrive, its spool is
/// where the volume is, and it stops in order.
#[test]
fn the_manifests_daemon_delivers() {
    if !kernel_is_usable() {
        return;
    }
    let base = workspace().join("deploy/manifests/base");
    let pod = yaml::file(&base.join("daemonset.yaml"))["spec"]["template"]["spec"].take();
    let container = &pod["containers"][0];
    let context = security_context();
    assert_eq!(container["securityContext"], context, "the manifests' container is not the chart's");
    let image = Image::assemble("deployment-daemon");
    let receiver = Receiver::start(Options::grpc());
    let status = free_port();
    // The port is another, since what runs on this machine may have it.
    let config = fs::read_to_string(base.join("config.yaml")).expect("the configuration");
    assert!(config.contains("listen: 0.0.0.0:7081"), "{config}");
    fs::create_dir_all(image.folder.join("config")).expect("a folder");
    fs::write(image.folder.join("config/config.yaml"), config.replace("7081", &status.to_string())).expect("a file");

    let arguments = texts(&container["args"]);
    let mut runc = image.adapted("daemon", &capabilities(&context), &arguments, |spec| {
        spec["mounts"].as_array_mut().expect("mounts").push(json!({
            "destination": "/etc/profiler-agent", "type": "bind", "source": image.folder.join("config"),
            "options": ["rbind", "ro"],
        }));
        for variable in container["env"].as_array().expect("variables") {
            let name = variable["name"].as_str().expect("a name");
            let value = match name {
                "OTEL_EXPORTER_OTLP_ENDPOINT" => receiver.url(),
                _ => variable["value"].as_str().unwrap_or("node-1").to_owned(),
            };
            spec["process"]["env"].as_array_mut().expect("variables").push(format!("{name}={value}").into());
        }
        // The receiver is on this machine.
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "network");
    });
    let daemon = Background::start(&mut runc);
    let load = Background::start(Command::new(workload("burner")).args(["1", "600"]));
    for probe in ["livenessProbe", "readinessProbe"] {
        let path = container[probe]["httpGet"]["path"].as_str().expect("a path");
        eventually(path, Duration::from_secs(30), || {
            http_get(status, path).filter(|page| page.starts_with("HTTP/1.1 200"))
        });
    }
    // (A window is 15 s.)
    eventually("a profile", Duration::from_secs(60), || (!receiver.received().is_empty()).then_some(()));
    drop(load);
    // runc passes it on, as Kubernetes would have it.
    daemon.signal(Signal::SIGTERM);
    let output = daemon.finish();
    let said = stderr(&output);
    println!("{said}");
    assert!(output.status.success(), "{said}");
    let books = Stopped::of(&said);
    assert!(books.balances() && books.exported > 100 && books.spool == 0, "{books:?}");
    assert!(image.folder.join("spool/spool").is_dir(), "there is no spool");
}

/// Whether the kernel counts the memory of BPF's maps by control groups, as Linux does since 5.11, and not as locked
/// memory.
pub(crate) fn counts_no_locked_memory() -> bool {
    let release = uname().expect("a kernel").release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(5), Some(11))
}

/// Whether this process has `CAP_SYS_RESOURCE`, number 24: machines may be without, whoever is root there.
fn holds_sys_resource() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    held.is_some_and(|held| held >> 24 & 1 == 1)
}

//! What the agent may do while it runs: no more than it needs, in every thread of it, and what it sees is still everything.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::ExitStatusExt as _,
    },
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Uid};
use profiler_tests::{
    Background, agent,
    container::{Runc, remove_cgroups},
    eventually, free_port, http_get, kernel_is_usable, record,
    recorded::{Sample, samples},
    run, scratch, stderr, stdout,
    stopped::Stopped,
};

use crate::deployment::{Crowd, Named, counts_no_locked_memory};

/// The user `nobody`.
const NOBODY: u32 = 65534;
/// `CAP_BPF`, `CAP_PERFMON`, `CAP_SYS_PTRACE`, `CAP_SYSLOG`, `CAP_CHECKPOINT_RESTORE`, `CAP_DAC_READ_SEARCH`.
const DAEMON: u64 = 1 << 39 | 1 << 38 | 1 << 19 | 1 << 34 | 1 << 40 | 1 << 2;
/// `CAP_SYS_RESOURCE`, before Linux 5.11.
const LOCKED_MEMORY: u64 = 1 << 24;
/// `CAP_DAC_OVERRIDE` and `CAP_FOWNER`, for the recording's file, and `CAP_KILL` for its command.
const RECORDING: u64 = 1 << 1 | 1 << 3;
const COMMAND: u64 = 1 << 5;
/// `CAP_SETPCAP`: without it, programs' rights cannot be bounded.
const SETPCAP: u64 = 1 << 8;
const CGROUP: &str = "profiler-privileges";

/// What a thread may do.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rights {
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
    bounding: u64,
    no_new_privileges: bool,
}

impl Rights {
    fn of(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
        };
        let set = |name: &str| u64::from_str_radix(&field(name), 16).expect("a set of capabilities");
        Self {
            effective: set("CapEff:"),
            permitted: set("CapPrm:"),
            inheritable: set("CapInh:"),
            ambient: set("CapAmb:"),
            bounding: set("CapBnd:"),
            no_new_privileges: field("NoNewPrivs:") == "1",
        }
    }

    fn own() -> Self {
        Self::of(&fs::read_to_string("/proc/thread-self/status").expect("our own status"))
    }

    /// What is to be left where these capabilities are of use.
    fn reduced(useful: u64) -> Self {
        let own = Self::own();
        let useful = if counts_no_locked_memory() { useful } else { useful | LOCKED_MEMORY };
        let kept = own.permitted & useful;
        let bounding = if own.effective & SETPCAP == 0 { own.bounding } else { 0 };
        Self { effective: kept, permitted: kept, inheritable: 0, ambient: 0, bounding, no_new_privileges: true }
    }
}

/// The names of a process's threads, and all that any of them may do.
fn threads(pid: u32) -> (BTreeSet<String>, BTreeSet<Rights>) {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    statuses
        .map(|status| {
            let name = status.lines().next().and_then(|line| line.strip_prefix("Name:")).unwrap_or_default();
            (name.trim().to_owned(), Rights::of(&status))
        })
        .unzip()
}

/// All samples of the daemon's windows in a folder.
fn windows(folder: &Path) -> Vec<Sample> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let whole = files.filter(|path| path.extension().is_some_and(|extension| extension == "otlp"));
    whole.flat_map(|path| samples(&fs::read(path).expect("a window"))).collect()
}

/// Every thread of the daemon keeps what `check` says, can get nothing back, and what it sees is what root would: processes
/// of other users, in containers, of deleted files and other mount namespaces, code made at run time, and the kernel.
#[test]
fn the_daemon_keeps_what_it_needs() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("privileges-daemon");
    let crowd = Crowd::start();
    let runc = Runc::new("privileges-container", "job", &["contained".to_owned()]);
    let contained = runc.start(&Runc::id(1), &format!("/{CGROUP}/docker-{}.scope", Runc::id(1)), &["contained", "600"]);
    let status = free_port();
    let daemon = Background::start(
        Command::new(agent())
            .args(["run", "--window", "5s", "--frequency", "199", "--output-format", "otlp", "--output-folder"])
            .arg(folder.join("profiles"))
            .args(["--status-listen", &format!("127.0.0.1:{status}")]),
    );
    eventually("readiness", Duration::from_secs(60), || {
        http_get(status, "/readyz").filter(|page| page.starts_with("HTTP/1.1 200"))
    });
    // (A thread names itself, after it has begun.)
    let (names, rights) = eventually("its threads", Duration::from_secs(30), || {
        let (names, rights) = threads(daemon.pid());
        ["profiler-agent", "collector", "namer", "labeller"]
            .iter()
            .all(|&name| names.contains(name))
            .then_some((names, rights))
    });
    println!("{names:?}: {rights:x?}");
    assert_eq!(rights, BTreeSet::from([Rights::reduced(DAEMON)]));

    let named = eventually("three windows", Duration::from_secs(120), || {
        let files = fs::read_dir(folder.join("profiles")).into_iter().flatten().flatten();
        let whole = files.filter(|file| file.path().extension().is_some_and(|extension| extension == "otlp"));
        (whole.count() >= 3).then(|| windows(&folder.join("profiles")))
    });
    // Threads that were started since are no different.
    assert_eq!(threads(daemon.pid()).1, BTreeSet::from([Rights::reduced(DAEMON)]));
    daemon.signal(Signal::SIGTERM);
    let output = daemon.finish();
    println!("{}", stderr(&output));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(Stopped::of(&stderr(&output)).balances());
    drop((crowd, contained));
    remove_cgroups(&[CGROUP]);

    let seen = Named::among(&named);
    println!("{seen:.3?}");
    assert!(seen.samples > 500 && seen.programs.iter().all(|&share| share > 0.8), "{seen:?}");
    assert!(seen.scripted > 5 && seen.kernel > 0.9, "{seen:?}");
    let of_container: Vec<&Sample> = named.iter().filter(|sample| sample.process == "contained").collect();
    let has_name = |sample: &&&Sample| sample.frames.iter().any(|frame| frame.is_named_like("PLACE_"));
    assert!(of_container.iter().filter(has_name).count() * 10 > of_container.len() * 8, "{}", of_container.len());
    assert!(of_container.iter().any(|sample| sample.resource.get("container.id") == Some(&Runc::id(1))));
}

/// `check` says what the daemon keeps, and is right where root has more.
#[test]
fn check_tells_what_is_kept() {
    if !kernel_is_usable() {
        return;
    }
    let said = stdout(&run(Command::new(agent()).arg("check")));
    let line = said.lines().find(|line| line.contains("privileges:")).expect("a line about privileges");
    println!("{line}");
    assert!(line.contains("keeps CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE") && !line.contains("more"), "{line}");
}

/// There is no image of the daemon's memory on disk, whatever ends it: names of the whole machine, and tokens, are in it.
#[test]
fn the_daemon_dumps_no_core() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("privileges-core");
    let dumping = |program: &Path| {
        let mut command = Command::new("prlimit");
        command.args(["--core=unlimited:unlimited", "--"]).arg(program).current_dir(&folder);
        command
    };
    let control = run(dumping(Path::new("sh")).args(["-c", "kill -ABRT $$"]));
    if !control.status.core_dumped() {
        eprintln!("SKIPPED: nothing dumps core on this machine (kernel.core_pattern)");
        return;
    }
    let status = free_port();
    let daemon = Background::start(dumping(&agent()).args([
        "run",
        "--status-listen",
        &format!("127.0.0.1:{status}"),
        "--output-folder",
        "profiles",
    ]));
    eventually("readiness", Duration::from_secs(60), || {
        http_get(status, "/readyz").filter(|page| page.starts_with("HTTP/1.1 200"))
    });
    daemon.signal(Signal::SIGABRT);
    let output = daemon.finish();
    assert_eq!(output.status.signal(), Some(Signal::SIGABRT as i32));
    assert!(!output.status.core_dumped());
}

/// A command that is recorded has what its user has, the agent beside it what it needs; it is ended as whoever it runs, and
/// the recording is written where only another user may write.
#[test]
fn commands_keep_their_users_privileges() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("privileges-record");
    let theirs = folder.join("theirs");
    fs::create_dir_all(&theirs).expect("a folder");
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o755)).expect("our folder");
    chown(&theirs, Some(NOBODY), Some(NOBODY)).expect("root may");

    let output = run(record(&["--output"]).arg(theirs.join("own.svg")).args(["--", "cat", "/proc/self/status"]));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(theirs.join("own.svg").is_file());
    assert_eq!(Rights::of(&stdout(&output)), Rights::own());

    let started = Instant::now();
    let mut recording = record(&["--duration", "3s", "--output"]);
    recording.arg(theirs.join("nobody.svg")).args(["--", "setpriv", &format!("--reuid={NOBODY}")]);
    let recording = Background::start(recording.args(["--clear-groups", "sleep", "600"]));
    let expected = BTreeSet::from([Rights::reduced(DAEMON | RECORDING | COMMAND)]);
    eventually("fewer privileges", Duration::from_secs(30), || {
        let (names, rights) = threads(recording.pid());
        (names.contains("collector") && rights == expected).then_some(())
    });
    let output = recording.finish();
    assert!(output.status.success() && started.elapsed() < Duration::from_secs(60), "{}", stderr(&output));
    assert!(theirs.join("nobody.svg").is_file() && Uid::effective().is_root());
}

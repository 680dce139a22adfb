//! Who is recorded: programs that rules are about, beside others that are not.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, Native, agent,
    cluster::{Account, Cluster, objects},
    container::{Cgroups, Runc, remove_cgroups},
    eventually, free_port, http_get, kernel_is_usable, metric, native,
    programs::cpu_seconds,
    recorded::{Frame, Sample, samples},
    run, scratch, stderr, workload,
};
use serde_json::json;

/// A cgroup below the root that nothing else uses, in the hierarchy that the agent follows.
const ROOT: &str = "profiler-scope";
const FREQUENCY: u64 = 499;
/// How long it is watched that nothing is looked at; `PROFILER_SCOPE_SECONDS` makes it longer.
const QUIET: Duration = Duration::from_secs(6);

/// A daemon that writes profiles to a folder.
pub(crate) struct Daemon {
    agent: Background,
    config: PathBuf,
    status: u16,
    pub(crate) profiles: PathBuf,
}

impl Daemon {
    pub(crate) fn start(folder: &Path, event: &str, more: &str) -> Self {
        let (profiles, status) = (folder.join("profiles"), free_port());
        let config = folder.join("agent.yaml");
        fs::write(&config, configuration(&profiles, status, event, more)).expect("a file");
        let agent = Background::start(Command::new(agent()).args(["run", "--config"]).arg(&config));
        eventually("the daemon", Duration::from_secs(60), || {
            http_get(status, "/readyz").filter(|page| page.contains(" 200 "))
        });
        Self { agent, config, status, profiles }
    }

    /// Replaces the end of the configuration file, as a ConfigMap's is replaced: all at once.
    fn configure(&self, event: &str, more: &str) {
        let next = self.config.with_extension("next");
        let text = configuration(&self.profiles, self.status, event, more);
        fs::write(&next, text).and_then(|()| fs::rename(&next, &self.config)).expect("a configuration file");
    }

    pub(crate) fn metric(&self, name: &str) -> f64 {
        metric(self.status, &format!("profiler_agent_{name}")).expect("a metric")
    }

    /// Waits until a metric is as expected; returns how long that took.
    pub(crate) fn wait_for(&self, name: &str, is_as_expected: impl Fn(f64) -> bool) -> Duration {
        let since = Instant::now();
        eventually(name, Duration::from_secs(60), || is_as_expected(self.metric(name)).then_some(()));
        since.elapsed()
    }

    /// Ends it; what it has said.
    pub(crate) fn end(self) -> String {
        self.agent.signal(Signal::SIGTERM);
        let output = self.agent.finish();
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    }

    /// Ends it; every sample that it has written.
    fn finish(self) -> Vec<Sample> {
        let profiles = self.profiles.clone();
        let said = self.end();
        println!("{}", said.lines().filter(|line| line.contains("stopped")).collect::<Vec<_>>().join("\n"));
        let files = fs::read_dir(&profiles).expect("a folder").map(|entry| entry.expect("an entry").path());
        files.flat_map(|file| samples(&fs::read(file).expect("a profile"))).collect()
    }
}

/// Enough for all that is done here, whatever else the machine does.
fn configuration(profiles: &Path, status: u16, event: &str, more: &str) -> String {
    format!(
        "sampling: {{frequency: {FREQUENCY}, event: {event}}}\nbudget: {{cpu: 100%}}\n\
         export: {{window: 1s, destinations: [], files: {{folder: {}, format: otlp}}}}\n\
         status: {{listen: '127.0.0.1:{status}'}}\n{more}",
        profiles.display(),
    )
}

/// What each program was recorded with: samples, and waits.
fn totals(samples: &[Sample]) -> BTreeMap<&str, [u64; 2]> {
    let mut totals = BTreeMap::<&str, [u64; 2]>::new();
    for sample in samples {
        // What `execve` does until the new program is in place is still the old one's, and may have its name already; a wait
        // in there of which there is no stack cannot be told from others.
        let is_exec = |frame: &Arc<Frame>| frame.name.as_deref().is_some_and(|name| name.contains("execve"));
        // (Frames in brackets say what is missing, or that a CPU was waited for.)
        let has_stack = sample.frames.iter().any(|frame| !frame.is_named_like("["));
        if !sample.frames.iter().any(is_exec) && (has_stack || !sample.is_wait) {
            totals.entry(&sample.process).or_default()[usize::from(sample.is_wait)] += sample.count;
        }
    }
    totals
}

/// A program under another name.
fn named(program: &Path, folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    fs::copy(program, &path).expect("a copy");
    path
}

/// A cgroup that is removed when the test ends.
struct Cgroup;

impl Cgroup {
    /// Makes a cgroup below the root of all.
    fn make(path: &str) -> PathBuf {
        let folder = cgroup_folder(&format!("/{ROOT}/{path}"));
        fs::create_dir_all(&folder).expect("a cgroup");
        folder
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove_cgroups(&[ROOT]);
    }
}

/// A cgroup's folder in the hierarchy that the agent follows.
pub(crate) fn cgroup_folder(path: &str) -> PathBuf {
    let by_controller = Path::new("/sys/fs/cgroup/pids");
    let mount = if by_controller.is_dir() { by_controller } else { Path::new("/sys/fs/cgroup") };
    mount.join(&path[1..])
}

/// A program that runs in a cgroup from its first instruction on.
pub(crate) fn run_in(cgroup: &Path, program: &Path, arguments: &str) -> Background {
    let script = format!("echo $$ >{}; exec {} {arguments}", cgroup.join("cgroup.procs").display(), program.display());
    Background::start(Command::new("sh").args(["-c", &script]))
}

/// Whether any process is called so.
pub(crate) fn runs(name: &str) -> bool {
    let mut processes = fs::read_dir("/proc").expect("a folder").flatten();
    processes.any(|entry| fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name))
}

fn check_excluded(totals: &BTreeMap<&str, [u64; 2]>, names: &[&str]) {
    for name in names {
        assert_eq!(totals.get(name), None, "{name} was recorded");
    }
}

/// Programs that are excluded by their file, their cgroup or their PID leave no sample and no wait, however short they live
/// and whenever they and their cgroups were made; the kernel programs say how many times they looked away. Others are
/// recorded as ever.
#[test]
fn what_is_excluded_is_not_looked_at() {
    if !kernel_is_usable() {
        return;
    }
    let (folder, _cgroup) = (scratch("scope-excluded"), Cgroup);
    let (burner, waiter) = (workload("burner"), native(Native::Waits));
    let burner = |name: &str| named(&burner, &folder, name);
    let (seen, by_pid, by_file, by_cgroup) = (burner("seen"), burner("by-pid"), burner("by-file"), burner("by-cgroup"));
    let (waits_seen, waits_hidden) = (named(&waiter, &folder, "waits-seen"), named(&waiter, &folder, "by-file-waits"));
    let child = burner("by-pid-child");
    // Its child is excluded with it.
    let script = format!("{} 1 20 & exec {} 1 20", child.display(), by_pid.display());
    let program = Background::start(Command::new("sh").args(["-c", &script]));
    thread::sleep(Duration::from_millis(500));
    let scope = format!(
        "scope: {{exclude: [{{executables: ['{}/by-file*']}}, {{cgroups: [/{ROOT}/hidden]}}, {{pids: [{}]}}]}}\n",
        folder.display(),
        program.pid()
    );
    let hidden = Cgroup::make("hidden");
    let daemon = Daemon::start(&folder, "both", &scope);

    let started = Instant::now();
    let mut running = vec![
        Background::start(Command::new(&seen).args(["1", "8"])),
        Background::start(Command::new(&by_file).args(["1", "8"])),
        Background::start(Command::new(&waits_seen).arg("8")),
        Background::start(Command::new(&waits_hidden).arg("8")),
        run_in(&hidden, &by_cgroup, "1 8"),
        run_in(&Cgroup::make("shown"), &burner("in-cgroup"), "1 8"),
    ];
    // Short ones: new files' names, and cgroups that are there for nobody else.
    let (short_file, short_cgroup) = (burner("by-file-short"), burner("by-cgroup-short"));
    for number in 0..30 {
        running.push(run_in(&Cgroup::make(&format!("hidden/{number}")), &short_cgroup, "1 0.1"));
        run(Command::new(&short_file).args(["1", "0.1"]));
    }
    for program in running {
        assert!(program.finish().status.success());
    }
    let elapsed = started.elapsed();
    thread::sleep(Duration::from_millis(1500));
    let [out, undecided, seen] =
        ["out_of_scope", "undecided", "seen"].map(|name| daemon.metric(&format!("samples_{name}_total")));
    println!("in {elapsed:?}: {seen} samples seen, {out} out of scope, {undecided} undecided");
    println!("entries: {} processes, {} cgroups", daemon.metric("scope_processes"), daemon.metric("scope_cgroups"));
    drop(program);
    let samples = daemon.finish();
    let totals = totals(&samples);
    for (name, [cpu, waits]) in &totals {
        println!("{name:20} {cpu:6} samples, {waits:12} ns");
    }
    check_excluded(
        &totals,
        &["by-file", "by-cgroup", "by-file-short", "by-cgroup-short", "by-file-waits", "by-pid", "by-pid-child"],
    );
    assert!(totals["seen"][0] > 100 && totals["in-cgroup"][0] > 100 && totals["waits-seen"][1] > 1_000_000_000);
    // Most of the CPU time was theirs.
    assert!(out > seen / 4.0);
    let exported: u64 = samples.iter().filter(|sample| !sample.is_wait).map(|sample| sample.count).sum();
    assert!(exported as f64 >= seen, "{exported} exported of {seen}");
}

/// Where anything is included, nothing else is recorded; what is included may be excluded all the same.
#[test]
fn nothing_but_what_is_included_is_recorded() {
    if !kernel_is_usable() {
        return;
    }
    let (folder, _cgroup) = (scratch("scope-included"), Cgroup);
    let burner = workload("burner");
    let burner = |name: &str| named(&burner, &folder, name);
    let programs = ["chosen", "chosen-not", "other"].map(burner);
    let scope = format!(
        "scope: {{include: [{{executables: [chosen*]}}, {{cgroups: [/{ROOT}/all]}}], \
         exclude: [{{executables: [chosen-not]}}, {{executables: [other], cgroups: [/{ROOT}/all/but]}}]}}\n"
    );
    let (all, but) = (Cgroup::make("all"), Cgroup::make("all/but"));
    let daemon = Daemon::start(&folder, "on-cpu", &scope);
    let mut running: Vec<Background> =
        programs.iter().map(|program| Background::start(Command::new(program).args(["1", "5"]))).collect();
    running.push(run_in(&all, &burner("inside"), "1 5"));
    running.push(run_in(&but, &burner("inside-too"), "1 5"));
    running.push(run_in(&but, &programs[2], "1 5"));
    for program in running {
        assert!(program.finish().status.success());
    }
    let samples = daemon.finish();
    let totals = totals(&samples);
    println!("{totals:?}");
    for name in ["chosen", "inside", "inside-too"] {
        assert!(totals[name][0] > 50, "{name}");
    }
    check_excluded(&totals, &["chosen-not", "other"]);
    // (The shell is in the cgroup for a moment.)
    let strangers: Vec<_> =
        totals.keys().filter(|name| !["chosen", "inside", "inside-too", "sh", "dash"].contains(name)).collect();
    assert!(strangers.is_empty(), "{strangers:?}");
}

/// A configuration that is written while the agent runs changes the scope within moments, by the kernel programs' own counts: of
/// the only program that is included nothing is seen any more and no stack is taken, until another says otherwise.
#[test]
fn the_configuration_changes_the_scope() {
    const PROGRAM: &str = "reconfigured";
    if !kernel_is_usable() {
        return;
    }
    let quiet = std::env::var("PROFILER_SCOPE_SECONDS")
        .map_or(QUIET, |text| Duration::from_secs(text.parse().expect("seconds")));
    let folder = scratch("scope-configuration");
    let burner = named(&workload("burner"), &folder, PROGRAM);
    let included = format!("scope: {{include: [{{executables: [{PROGRAM}]}}]}}\n");
    let excluded =
        format!("scope: {{include: [{{executables: [{PROGRAM}]}}], exclude: [{{executables: [{PROGRAM}]}}]}}\n");
    let daemon = Daemon::start(&folder, "both", &included);
    let seen = || daemon.metric("samples_seen_total");
    let looks =
        || ["samples_seen_total", "waits_sampled_total", "samples_out_of_scope_total"].map(|name| daemon.metric(name));
    let program = Background::start(Command::new(&burner).args(["1", "600"]));
    daemon.wait_for("samples_seen_total", |seen| seen > 3.0 * FREQUENCY as f64);

    daemon.configure("both", &excluded);
    // All of its CPU time was seen so far, and after that as much as remains in the end.
    let used = cpu_seconds(program.pid());
    let mut last = seen();
    eventually("an end of samples", Duration::from_secs(60), || {
        // (Counts are read once a second.)
        thread::sleep(Duration::from_millis(1500));
        let before = std::mem::replace(&mut last, seen());
        (last == before).then_some(())
    });
    let later = last / FREQUENCY as f64 - used;
    println!("excluded: {last} samples seen, {later:+.3} s of CPU time after the configuration was written");
    assert!(later <= 2.0, "{later}");

    let (before, used) = (looks(), cpu_seconds(program.pid()));
    thread::sleep(quiet);
    let (after, used) = (looks(), cpu_seconds(program.pid()) - used);
    let [seen_since, stacks_since, out] = [0, 1, 2].map(|index| after[index] - before[index]);
    println!(
        "in {quiet:?} of which it used the CPU for {used:.1} s: {seen_since} samples seen, {stacks_since} stacks of waits \
         taken, {out} events out of scope"
    );
    assert_eq!([seen_since, stacks_since], [0.0, 0.0]);
    assert!(out > used * FREQUENCY as f64 / 2.0, "{out}");

    daemon.configure("both", &included);
    let returned = daemon.wait_for("samples_seen_total", |seen| seen > last);
    println!("included again, and counted {returned:?} after that was written (counts are read once a second)");
    drop(program);
    let samples = daemon.finish();
    let strangers: Vec<_> = samples.iter().map(|sample| &sample.process).filter(|name| *name != PROGRAM).collect();
    // (`sh` and the like have its name before their program's.)
    assert!(strangers.is_empty(), "{strangers:?}");
}

/// A cluster's node and namespace `shop`, and the account of an agent there.
pub(crate) fn cluster_with_account(cluster: &Cluster, node: &str) -> Account {
    cluster.create(&objects::node(node));
    cluster.create(&objects::namespace("shop"));
    let rbac = ["namespace.yaml", "serviceaccount.yaml", "rbac.yaml"];
    for file in rbac.map(|file| profiler_tests::workspace().join("deploy/manifests/base").join(file)) {
        cluster.apply(&fs::read_to_string(file).expect("a manifest"));
    }
    cluster.account("profiler-agent", "profiler-agent")
}

/// Whoever owns a pod takes it out of scope by an annotation, and back in, while it runs.
#[test]
fn annotations_are_followed() {
    const NODE: &str = "here";
    if !kernel_is_usable() {
        return;
    }
    let Some(cluster) = Cluster::start("scope") else { return };
    let (folder, _cgroups) = (scratch("scope-agent"), Cgroups(&["kubepods"]));
    let account = cluster_with_account(&cluster, NODE);
    let names = ["quiet", "loud", "private"].map(str::to_owned);
    let runc = Runc::new("scope-containers", "burner", &names);
    let pod = |name: &str| objects::pod("shop", name, NODE, &["main"]);
    let start = |number: u64, pod: serde_json::Value| {
        let (pod, id) = (cluster.create(&pod), Runc::id(number));
        let (name, uid) = (pod["metadata"]["name"].as_str().expect("a name"), &pod["metadata"]["uid"]);
        let path = format!("/kubepods/besteffort/pod{}/{id}", uid.as_str().expect("a UID"));
        let program = runc.start(&id, &path, &[&format!("/bin/{name}"), "1", "600"]);
        // One after the other: setting up a container writes into the root that they share.
        eventually(name, Duration::from_secs(60), || runs(name).then_some(()));
        cluster.set_pod_status("shop", name, &objects::running(&[("main", &format!("containerd://{id}"))]));
        program
    };
    let more = format!(
        "kubernetes: {{enabled: true, node: {NODE}, kubeconfig: {}}}\n\
         scope: {{exclude: [{{pod_labels: {{tier: 'priv*'}}}}]}}\n",
        account.kubeconfig.display()
    );
    let daemon = Daemon::start(&folder, "on-cpu", &more);
    daemon.wait_for("kubernetes_synced", |synced| synced == 1.0);
    let mut running = vec![start(0, pod("quiet")), start(1, pod("loud"))];
    daemon.wait_for("samples_labelled_total{owner=\"pod\"}", |samples| samples > 200.0);
    assert_eq!(daemon.metric("scope_cgroups"), 0.0);

    let annotate = |value: serde_json::Value| {
        cluster.change(&pod("quiet"), &json!({"metadata": {"annotations": {"profiler/enabled": value}}}));
    };
    annotate(json!("false"));
    let taken = daemon.wait_for("scope_cgroups", |cgroups| cgroups > 0.0);
    println!("out of scope {taken:?} after the annotation (counters are read once a second)");
    let before = daemon.metric("samples_out_of_scope_total");
    daemon.wait_for("samples_out_of_scope_total", |samples| samples > before + FREQUENCY as f64 / 2.0);
    annotate(json!(null));
    let returned = daemon.wait_for("scope_cgroups", |cgroups| cgroups == 0.0);
    println!("in scope again {returned:?} after it was taken away");
    // A pod that is private from the beginning was never recorded: its labels are known before it runs.
    running.push(start(2, objects::labelled(pod("private"), "tier", "private")));
    thread::sleep(Duration::from_secs(4));
    println!(
        "{} out of scope, {} undecided",
        daemon.metric("samples_out_of_scope_total"),
        daemon.metric("samples_undecided_total")
    );
    drop(running);
    let samples = daemon.finish();
    let totals = totals(&samples);
    println!("{totals:?}");
    assert!(totals["quiet"][0] > 100 && totals["loud"][0] > totals["quiet"][0]);
    check_excluded(&totals, &["private"]);
}

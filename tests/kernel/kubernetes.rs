//! A cluster of Kubernetes: the real API server, and what the agent makes of its objects.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent,
    cluster::{Cluster, LoadedPod, PodLoad, objects},
    container::{Cgroups, Runc},
    eventually, free_port, http_get, kernel_is_usable, metric, peak_memory,
    recorded::{duration, samples},
    scratch, stderr, stdout, workspace,
};
use serde_json::{Value, json};

/// Grants an account of namespace `profiler` to see pods.
const MAY_SEE_PODS: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: sees-pods}
rules: [{apiGroups: [''], resources: [pods], verbs: [get, list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: sees-pods}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: sees-pods}
subjects: [{kind: ServiceAccount, namespace: profiler, name: agent}]
";

/// The API server serves what it is given, also after it was started again, and refuses whom it was not told to serve.
#[test]
fn the_api_server_serves_and_refuses() {
    let begun = Instant::now();
    let Some(mut cluster) = Cluster::start("kubernetes") else { return };
    let started = begun.elapsed();
    for namespace in ["profiler", "shop"] {
        cluster.create(&objects::namespace(namespace));
    }
    cluster.create(&objects::node("here"));
    let mut owners = ["Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job", "CronJob"]
        .map(|kind| cluster.create(&objects::workload(kind, "shop", &format!("a-{}", kind.to_lowercase()))));
    let set = objects::owned_by(objects::workload("ReplicaSet", "shop", "web-6c1f"), &owners[0]);
    owners[1] = cluster.create(&set);
    let pod = objects::labelled(objects::pod("shop", "web-6c1f-1", "here", &["server"]), "app", "web");
    let id = format!("containerd://{:064x}", 7);
    let pod = cluster.run_pod(&objects::owned_by(pod, &owners[1]), &[("server", &id)]);
    assert_eq!(pod["status"]["containerStatuses"][0]["containerID"], json!(id));

    // Someone without rights, who is then given some.
    let account = cluster.service_account("profiler", "agent");
    let client = cluster.client(&account.token);
    let of_here = "/api/v1/pods?fieldSelector=spec.nodeName%3Dhere";
    let ask = || client.request("GET", of_here, None).expect("an answer");
    let refused = ask();
    assert_eq!(refused.status, 403, "{}", refused.body);
    assert_eq!(refused.body["reason"], json!("Forbidden"));
    cluster.apply(MAY_SEE_PODS);
    eventually("what was granted", Duration::from_secs(60), || (ask().status == 200).then_some(()));

    let before = cluster.request("GET", of_here, None).body;
    let begun = Instant::now();
    cluster.stop_server();
    let stopped = begun.elapsed();
    client.request("GET", of_here, None).expect_err("nobody is there");
    cluster.start_server();
    let again = begun.elapsed() - stopped;
    let after = ask();
    assert_eq!(after.status, 200, "{}", after.body);
    assert_eq!(after.body["items"], before["items"]);
    assert_eq!(after.body["items"][0]["metadata"]["ownerReferences"][0]["name"], json!("web-6c1f"));

    // What nobody remembers any more cannot be watched from there.
    cluster.forget_history();
    let old = &before["items"][0]["metadata"]["resourceVersion"].as_str().expect("a version");
    let watch = format!("/api/v1/pods?watch=1&timeoutSeconds=1&resourceVersion={old}");
    let gone = cluster.request("GET", &watch, None).body;
    assert_eq!(gone.pointer("/object/code").or(gone.get("code")), Some(&json!(410)), "{gone}");

    let asked = cluster.requests_of(&account.user);
    assert!(
        asked.iter().all(|asked| asked.verb == "list" && asked.resource == "pods" && asked.uri == of_here),
        "{asked:?}"
    );
    assert_eq!(asked.first().and_then(|asked| asked.status), Some(403));
    assert_eq!(asked.last().and_then(|asked| asked.status), Some(200));

    let slow = || cluster.client(&account.token).request("GET", "/readyz", None);
    cluster.suspend();
    thread::scope(|scope| {
        let waits = scope.spawn(slow);
        // Long enough for an answer, if there were one.
        thread::sleep(Duration::from_millis(500));
        assert!(!waits.is_finished(), "a stopped API server answers");
        cluster.resume();
        assert_eq!(waits.join().expect("a thread").expect("an answer").status, 200);
    });

    let output = cluster.kubectl(&["get", "pods", "--all-namespaces", "--no-headers"]);
    assert!(stdout(&output).contains("web-6c1f-1"), "{}", stderr(&output));
    println!(
        "started in {started:.1?}, stopped in {stopped:.1?}, started again in {again:.1?}; memory of the API server and etcd: {:?} MiB",
        cluster.pids().map(peak_memory)
    );
}

/// A busy node's pods are as large as those of other clusters, and change as often as they are told to.
#[test]
fn the_api_server_has_a_busy_node() {
    let Some(cluster) = Cluster::start("kubernetes-busy") else { return };
    let begun = Instant::now();
    let mut load = PodLoad::start(&cluster, "busy", 100);
    println!("100 pods made in {:.1?}, a list of {} KiB", begun.elapsed(), load.list_length() / 1024);
    let first = load.pods().next().cloned().expect("a pod");
    let changes = load.change(20, Duration::from_secs(3));
    println!("{changes:?}");
    assert!(changes.replaced > 0 && changes.labels > 0 && changes.statuses > 0, "{changes:?}");
    assert!(load.list_length() > 100 * 5000, "pods are larger than this");
    let gone = cluster.request("GET", &format!("/api/v1/namespaces/load/pods/{}", first.name), None);
    assert_eq!(gone.status, 404, "{}", gone.body);
    for pod in load.pods() {
        let there = cluster.ask("GET", &format!("/api/v1/namespaces/load/pods/{}", pod.name), None);
        assert_eq!(there["metadata"]["uid"], json!(pod.uid));
        assert_eq!(there["status"]["containerStatuses"][0]["containerID"], json!(pod.containers[0].1));
    }
}

/// A busy node, as large as Kubernetes supports and more restless than most.
const PODS: usize = 500;
const CHANGES_A_SECOND: u32 = 50;
/// How long that goes on, seconds, unless this variable says otherwise.
const SECONDS: u64 = 30;
const SECONDS_VARIABLE: &str = "PROFILER_POD_SECONDS";
/// The API server ends a watch after this time, and the next one goes on from there.
const WATCH_SECONDS: u64 = 290;
/// What a window lasts, and for how long its metadata is waited for.
const WINDOW_SECONDS: u64 = 2;
const WAIT_SECONDS: u64 = 5;
/// What may be spent on knowing the pods.
const BUDGET_KIB: i64 = 10 << 10;
/// Pods of the load of which a container is started in the end.
const CHECKED: usize = 8;
/// The program that keeps the CPUs busy, and its pod.
const BURNER: &str = "busy-burner";

/// A daemon on a busy node.
struct Daemon {
    agent: Background,
    status: u16,
    profiles: PathBuf,
}

/// What a daemon takes and does.
#[derive(Clone, Copy, Debug)]
struct Usage {
    /// Memory in KiB: the most so far, now, and how much of that is no file's.
    peak: i64,
    resident: i64,
    anonymous: i64,
    /// Seconds of CPU time.
    cpu: f64,
    windows: f64,
    postponed: f64,
    dropped: f64,
    /// Windows that waited for metadata.
    waited: f64,
    /// Windows in files.
    written: usize,
}

/// What a daemon has written: samples, and the time that they are of.
#[derive(Debug, Default)]
struct Written {
    samples: u64,
    seconds: f64,
    /// Samples of the burner by its pod's name.
    burned: BTreeMap<String, u64>,
}

impl Daemon {
    fn start(name: &str, kubernetes: &str) -> Self {
        let (folder, status) = (scratch(name), free_port());
        let (profiles, config) = (folder.join("profiles"), folder.join("agent.yaml"));
        let text = format!(
            "sampling: {{frequency: 499}}\n\
             export: {{window: {WINDOW_SECONDS}s, destinations: [], files: {{folder: {}, format: otlp}}}}\n\
             status: {{listen: '127.0.0.1:{status}'}}\n\
             kubernetes: {kubernetes}\n",
            profiles.display()
        );
        fs::write(&config, text).expect("a file");
        let agent =
            Background::start(Command::new(agent()).args(["run", "--budget-cpu", "100%", "--config"]).arg(&config));
        Self { agent, status, profiles }
    }

    /// Counts the most memory that it takes from now on.
    fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.agent.pid()), "5").expect("a process");
    }

    fn metric(&self, name: &str) -> f64 {
        let value = || metric(self.status, &format!("profiler_agent_{name}"));
        eventually(name, Duration::from_secs(30), value)
    }

    fn state(&self) -> Value {
        let page = http_get(self.status, "/debug/state").expect("a page");
        serde_json::from_str(page.split_once("\r\n\r\n").expect("a body").1).expect("JSON")
    }

    fn usage(&self) -> Usage {
        let of = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", self.agent.pid())).expect("a process");
        let (status, stat) = (of("status"), of("stat"));
        let kib = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"));
            line.and_then(|number| number.parse().ok()).expect("a size")
        };
        // Times in user and kernel mode are the twelfth and thirteenth after the name; a second has a hundred ticks.
        let times = stat.rsplit_once(')').expect("a name").1.split_whitespace().skip(11).take(2);
        let page = http_get(self.status, "/metrics").expect("a page");
        // Of one page, so that they belong together; of all that differ in labels only.
        let sum = |name: &str| {
            let named = page.lines().filter_map(|line| line.strip_prefix("profiler_agent_")?.strip_prefix(name));
            named.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
        };
        Usage {
            peak: kib("VmHWM:"),
            resident: kib("VmRSS:"),
            anonymous: kib("RssAnon:"),
            cpu: times.map(|ticks| ticks.parse::<f64>().expect("ticks")).sum::<f64>() / 100.0,
            windows: sum("windows_closed_total"),
            postponed: sum("drains_postponed_total"),
            dropped: sum("samples_dropped_total"),
            waited: sum("label_windows_waited_total"),
            written: fs::read_dir(&self.profiles).expect("a folder").count(),
        }
    }

    /// Ends it; what it has written.
    fn finish(self) -> Written {
        self.agent.signal(Signal::SIGTERM);
        let output = self.agent.finish();
        println!("{}", stderr(&output).lines().last().unwrap_or_default());
        assert!(output.status.success(), "{}", stderr(&output));
        let mut written = Written::default();
        for entry in fs::read_dir(&self.profiles).expect("a folder") {
            let profile = fs::read(entry.expect("an entry").path()).expect("a profile");
            written.seconds += duration(&profile).as_secs_f64();
            for sample in samples(&profile) {
                written.samples += sample.count;
                if sample.process == BURNER {
                    let pod = sample.resource.get("k8s.pod.name").map_or("", |pod| pod);
                    *written.burned.entry(pod.to_owned()).or_default() += sample.count;
                }
            }
        }
        written
    }
}

fn cgroup(uid: &str, id: &str) -> String {
    let uid = uid.replace('-', "_");
    format!("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice/cri-containerd-{id}.scope")
}

/// Two daemons at the same time, of which one follows the pods of a busy node: it asks for one list and one watch, takes no
/// more than its budget of memory for them, loses and delays nothing, and knows in the end what the API server knows.
#[test]
fn a_busy_node_is_cheap_to_follow() {
    if !kernel_is_usable() {
        return;
    }
    let Some(cluster) = Cluster::start("kubernetes-load") else { return };
    let seconds = std::env::var(SECONDS_VARIABLE).map_or(SECONDS, |text| text.parse().expect("seconds"));
    for file in ["namespace.yaml", "serviceaccount.yaml", "rbac.yaml"] {
        let manifest = workspace().join("deploy/manifests/base").join(file);
        cluster.apply(&fs::read_to_string(manifest).expect("a manifest"));
    }
    let account = cluster.account("profiler-agent", "profiler-agent");
    let begun = Instant::now();
    let mut load = PodLoad::start(&cluster, "busy", PODS);
    println!("{PODS} pods made in {:.1?}, a list of {} KiB", begun.elapsed(), load.list_length() / 1024);

    let _cgroups = Cgroups(&["kubepods", "kubepods.slice"]);
    let runc = Runc::new("kubernetes-load-containers", "burner", &[BURNER, "known"].map(str::to_owned));
    let id = Runc::id(0);
    let pod = objects::pod("load", BURNER, "busy", &[BURNER]);
    let pod = cluster.run_pod(&pod, &[(BURNER, &format!("containerd://{id}"))]);
    let place = cgroup(pod["metadata"]["uid"].as_str().expect("a UID"), &id);
    // As many threads as there are CPUs: they are never idle. Everything else comes first.
    let threads = thread::available_parallelism().map_or(1, usize::from).to_string();
    let burner = runc.command(&id, &place, &[&format!("/bin/{BURNER}"), &threads, &(seconds + 900).to_string()]);
    let nice = ["-n", "19"].map(OsStr::new).into_iter().chain([burner.get_program()]).chain(burner.get_args());
    let burner = Background::start(Command::new("nice").args(nice));

    // Pods that are gone are remembered for a minute, unless all of it takes less.
    let grace = Duration::from_secs((seconds / 2).min(60));
    let follow = format!(
        "{{enabled: true, node: busy, wait: {WAIT_SECONDS}s, grace: {}s, kubeconfig: {}}}",
        grace.as_secs(),
        account.kubeconfig.display()
    );
    let begun = Instant::now();
    let daemons =
        [Daemon::start("kubernetes-load-follows", &follow), Daemon::start("kubernetes-load-alone", "{enabled: false}")];
    for daemon in &daemons {
        eventually("a window", Duration::from_secs(60), || (daemon.metric("windows_closed_total") > 0.0).then_some(()));
    }
    daemons.iter().for_each(Daemon::forget_peak);
    cluster.resume();
    let follows = &daemons[0];
    eventually("the list", Duration::from_secs(60), || (follows.metric("kubernetes_synced") == 1.0).then_some(()));
    println!("a window, then the list in {:.1?}", begun.elapsed());
    thread::sleep(Duration::from_secs(4));
    let before = daemons.each_ref().map(Daemon::usage);
    let changes = load.change(CHANGES_A_SECOND, Duration::from_secs(seconds));
    let under_load = follows.state();
    let after = daemons.each_ref().map(Daemon::usage);
    println!("{changes:?} in {seconds} s; {}", under_load["kubernetes"]);

    // What is gone is forgotten, and nothing else.
    let (pods, ids) = (load.pods().count(), load.pods().map(|pod| pod.containers.len() + pod.restarts).sum::<usize>());
    eventually("pods that are gone", grace + Duration::from_secs(60), || {
        (follows.metric("kubernetes_pods") == (pods + 1) as f64).then_some(())
    });
    let settled = daemons.each_ref().map(Daemon::usage);
    let state = follows.state();
    println!("{}; the load has {pods} pods, {ids} containers with those before them", state["kubernetes"]);
    assert_eq!(state["kubernetes"]["containers"], json!(ids + 1));
    assert_eq!(
        (state["kubernetes"]["pods_refused"].as_u64(), state["kubernetes"]["pods_malformed"].as_u64()),
        (Some(0), Some(0))
    );
    are_known(follows, &runc, load.pods().step_by(PODS / CHECKED));
    let lasted = begun.elapsed();
    let asked = cluster.requests_of(&account.user);
    let written = daemons.map(Daemon::finish);
    drop((burner, runc));

    for (when, [with, without]) in [("before", before), ("after", after), ("settled", settled)] {
        println!("{when:8} with    {with:?}\n{when:8} without {without:?}");
    }
    let more = |of: fn(&Usage) -> i64| [before, after, settled].map(|[with, without]| of(&with) - of(&without));
    let (peak, resident, anonymous) =
        (more(|usage| usage.peak), more(|usage| usage.resident), more(|usage| usage.anonymous));
    println!(
        "KiB more with than without, before, after, settled: peak {peak:?}, resident {resident:?}, anonymous {anonymous:?}"
    );
    let meanwhile = |of: fn(&Usage) -> f64| [0, 1].map(|daemon| of(&after[daemon]) - of(&before[daemon]));
    let windows = meanwhile(|usage| usage.windows);
    println!("meanwhile: {windows:?} windows closed, {:.2?} s of CPU time", meanwhile(|usage| usage.cpu));
    let rates = written.each_ref().map(|written| written.samples as f64 / written.seconds);
    println!("samples a second {rates:.1?} of {written:?}");
    let verbs: Vec<&str> = asked.iter().map(|asked| asked.verb.as_str()).collect();
    println!("asked of the API server in {lasted:.0?}: {verbs:?}");

    assert!(peak[1] <= BUDGET_KIB && resident[2] <= BUDGET_KIB, "{peak:?} {resident:?}");
    assert_eq!(verbs[0], "list");
    assert!(verbs[1..].iter().all(|&verb| verb == "watch"), "{verbs:?}");
    let watches = 1 + lasted.as_secs() / WATCH_SECONDS;
    assert!((1..=watches).contains(&(verbs.len() as u64 - 1)), "{verbs:?}");
    // No CPU was idle.
    assert!((rates[0] / rates[1] - 1.0).abs() < 0.02, "{rates:?}");
    assert!((windows[0] - windows[1]).abs() <= 1.0, "{windows:?}");
    for usage in settled {
        assert!(usage.dropped == 0.0 && usage.postponed == 0.0, "{usage:?}");
    }
    // Nothing was waited for, unless there are pods on this machine that are none of this cluster's.
    let waited = settled[0].waited > before[0].waited;
    let behind = if waited { WAIT_SECONDS / WINDOW_SECONDS } else { 0 };
    for (usage, behind) in settled.iter().zip([behind, 0]) {
        assert!(usage.windows - usage.written as f64 <= (1 + behind) as f64, "{usage:?}");
    }
    let pods = written.each_ref().map(|written| written.burned.keys().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(pods, [[BURNER], [""]]);
}

/// Starts a container of each of these pods: the daemon knows every one by its ID.
fn are_known<'a>(daemon: &Daemon, runc: &Runc, pods: impl Iterator<Item = &'a LoadedPod>) {
    let started: Vec<_> = pods
        .map(|pod| {
            let (name, id) = &pod.containers[0];
            let id = id.strip_prefix("containerd://").expect("an ID of containerd");
            let running = runc.start(id, &cgroup(&pod.uid, id), &["/bin/known", "1", "600"]);
            (json!({"namespace": "load", "pod": pod.name, "pod_uid": pod.uid, "container": name}), id, running)
        })
        .collect();
    for (expected, id, _) in &started {
        let known = || {
            let state = daemon.state();
            let mut containers = state["containers"].as_array()?.iter();
            containers.find(|container| container["ids"] == json!([id])).cloned()
        };
        assert_eq!(eventually("a container", Duration::from_secs(60), known)["pod"], *expected);
    }
    println!("{} containers of the load are known by their IDs", started.len());
}

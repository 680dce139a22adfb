//! Whose samples they are, by the API server: real containers, the pods that a real API server knows, and an agent that
//! follows it with the rights that our manifests give it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent,
    cluster::{Account, Cluster, objects},
    container::{Cgroups, Runc},
    eventually, free_port, http_get, kernel_is_usable,
    recorded::{Sample, samples},
    scratch, stderr, workspace,
};
use serde_json::{Value, json};

const NODE: &str = "here";
/// What a service account of our manifests may do.
const RBAC: [&str; 3] = ["namespace.yaml", "serviceaccount.yaml", "rbac.yaml"];

/// A pod whose cgroup has the first pod's container in its path.
const FORGER: &str = "forger";

/// A daemon that follows a cluster and writes profiles to a folder.
struct Daemon {
    agent: Background,
    status: u16,
    profiles: PathBuf,
}

impl Daemon {
    fn start(folder: &Path, account: &Account, labels: &str) -> Self {
        let (profiles, status) = (folder.join("profiles"), free_port());
        let config = folder.join("agent.yaml");
        let text = format!(
            "sampling: {{frequency: 199}}\n\
             export: {{window: 2s, destinations: [], files: {{folder: {}, format: otlp}}}}\n\
             status: {{listen: '127.0.0.1:{status}'}}\n\
             kubernetes: {{enabled: true, node: {NODE}, kubeconfig: {}}}\n\
             labels: {labels}\n",
            profiles.display(),
            account.kubeconfig.display(),
        );
        fs::write(&config, text).expect("a file");
        let agent =
            Background::start(Command::new(agent()).args(["run", "--budget-cpu", "100%", "--config"]).arg(&config));
        let daemon = Self { agent, status, profiles };
        eventually("the daemon", Duration::from_secs(20), || {
            http_get(status, "/readyz").filter(|page| page.contains(" 200 "))
        });
        daemon
    }

    /// What it knows now.
    fn state(&self) -> Value {
        let page = http_get(self.status, "/debug/state").expect("a page");
        let (_, body) = page.split_once("\r\n\r\n").expect("a body");
        serde_json::from_str(body).expect("JSON")
    }

    fn wait_for(&self, what: &str, is_there: impl Fn(&Value) -> bool) {
        eventually(what, Duration::from_secs(90), || is_there(&self.state()).then_some(()));
    }

    /// Ends it; every sample that it has written, and what it said.
    fn finish(self) -> (Vec<Sample>, String) {
        self.agent.signal(Signal::SIGTERM);
        let output = self.agent.finish();
        let said = stderr(&output);
        assert!(output.status.success(), "{said}");
        let files = fs::read_dir(&self.profiles).expect("a folder").map(|entry| entry.expect("an entry").path());
        (files.flat_map(|file| samples(&fs::read(file).expect("a profile"))).collect(), said)
    }
}

/// The account of our manifests.
fn account(cluster: &Cluster) -> Account {
    for file in RBAC {
        let yaml = fs::read_to_string(workspace().join("deploy/manifests/base").join(file)).expect("a manifest");
        cluster.apply(&yaml);
    }
    cluster.account("profiler-agent", "profiler-agent")
}

/// A pod of one container that runs a program of the pod's name.
struct Job<'a> {
    cluster: &'a Cluster,
    runc: &'a Runc,
    namespace: &'a str,
}

impl Job<'_> {
    /// Makes the pod, then starts the container, then says that it runs: as a kubelet does, which is late with the last.
    fn start(&self, number: u64, pod: Value, seconds: &str, late: Duration) -> Background {
        let pod = self.cluster.create(&pod);
        let container = self.run(number, &pod, seconds);
        thread::sleep(late);
        self.say_running(number, &pod);
        container
    }

    fn run(&self, number: u64, pod: &Value, seconds: &str) -> Background {
        let (id, name) = (Runc::id(number), pod["metadata"]["name"].as_str().expect("a name"));
        // A static pod's cgroup is called by a hash of its manifest.
        let uid = pod.pointer("/metadata/annotations/kubernetes.io~1config.hash").unwrap_or(&pod["metadata"]["uid"]);
        let uid = uid.as_str().expect("a UID").replace('-', "_");
        let scope = format!(
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice/cri-containerd-{id}.scope"
        );
        // Whoever may make cgroups may call them as he likes: as the first container, in a pod of another's.
        let path =
            if name == FORGER { format!("{scope}/kubepods/pod{}/{}", "0".repeat(32), Runc::id(0)) } else { scope };
        self.runc.start(&id, &path, &[&format!("/bin/{name}"), "1", seconds])
    }

    fn say_running(&self, number: u64, pod: &Value) {
        let container = pod.pointer("/spec/containers/0/name").and_then(Value::as_str).expect("a container");
        let name = pod["metadata"]["name"].as_str().expect("a name");
        let status = objects::running(&[(container, &format!("containerd://{}", Runc::id(number)))]);
        self.cluster.set_pod_status(self.namespace, name, &status);
    }
}

/// Of each program: how many samples have which value of an attribute; none: an empty one.
fn values<'a>(samples: &'a [Sample], program: &str, attribute: &str) -> BTreeMap<&'a str, u64> {
    let mut values = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.process == program) {
        *values.entry(sample.resource.get(attribute).map_or("", |value| value)).or_default() += sample.count;
    }
    values
}

/// Pods of every kind of owner carry their names, however late the kubelet is; services are called as the conventions say.
#[test]
fn samples_carry_their_pods() {
    if !kernel_is_usable() {
        return;
    }
    let Some(cluster) = Cluster::start("labels") else { return };
    let account = account(&cluster);
    let _cgroups = Cgroups(&["kubepods", "kubepods.slice"]);
    cluster.create(&objects::node(NODE));
    cluster.create(&objects::namespace("shop"));
    let make = |kind: &str, name: &str| cluster.create(&objects::workload(kind, "shop", name));
    let deployment = make("Deployment", "checkout");
    let set = objects::workload("ReplicaSet", "shop", "checkout-6c1f9d");
    let set = cluster.create(&objects::owned_by(set, &deployment));
    let cron = make("CronJob", "report");
    let job = cluster.create(&objects::owned_by(objects::workload("Job", "shop", "report-29384756"), &cron));
    let (stateful, daemon_set) = (make("StatefulSet", "db"), make("DaemonSet", "proxy"));
    let pod = |name: &str| objects::pod("shop", name, NODE, &["main"]);
    let pods = [
        objects::labelled(objects::owned_by(pod("checkout-6c1f9d-x2x"), &set), "pod-template-hash", "6c1f9d"),
        objects::owned_by(pod("report-29384756-k"), &job),
        objects::owned_by(pod("db-0"), &stateful),
        objects::owned_by(pod("proxy-7"), &daemon_set),
        objects::annotated(pod("named"), "resource.opentelemetry.io/service.name", "billing"),
        objects::annotated(objects::labelled(pod("bare"), "tier", "one"), "example.com/owner", "team\u{1b}[31m a"),
        objects::annotated(pod("static-here"), "kubernetes.io/config.hash", "0123456789abcdef0123456789abcdef"),
        // (The API server takes 256 KiB.)
        objects::annotated(pod(FORGER), "example.com/huge", &"long ".repeat(40_000)),
    ];
    // What each program's samples have to say, besides namespace, pod and container.
    let expected: [(&str, &[(&str, &str)]); 8] = [
        (
            "checkout-6c1f9d-x2x",
            &[
                ("service.name", "checkout"),
                ("k8s.deployment.name", "checkout"),
                ("k8s.replicaset.name", "checkout-6c1f9d"),
                ("service.instance.id", "shop.checkout-6c1f9d-x2x.main"),
            ],
        ),
        (
            "report-29384756-k",
            &[("service.name", "report"), ("k8s.cronjob.name", "report"), ("k8s.job.name", "report-29384756")],
        ),
        ("db-0", &[("service.name", "db"), ("k8s.statefulset.name", "db")]),
        ("proxy-7", &[("service.name", "proxy"), ("k8s.daemonset.name", "proxy")]),
        ("named", &[("service.name", "billing")]),
        ("bare", &[("service.name", "bare"), ("k8s.pod.label.tier", "one")]),
        ("static-here", &[("service.name", "static-here")]),
        (FORGER, &[("service.name", FORGER)]),
    ];
    let names: Vec<String> = expected.iter().map(|(name, _)| (*name).to_owned()).collect();
    let runc = Runc::new("labels-containers", "burner", &names);
    let labels = "{pod_labels: ['tier'], pod_annotations: ['example.com/*'], extra: {k8s.cluster.name: test}}";
    let daemon = Daemon::start(&scratch("labels-agent"), &account, labels);
    daemon.wait_for("the first list", |state| state["kubernetes"]["state"] == "synced");

    let jobs = Job { cluster: &cluster, runc: &runc, namespace: "shop" };
    let containers: Vec<Background> =
        (0..).zip(pods).map(|(number, pod)| jobs.start(number, pod, "8", Duration::from_millis(700))).collect();
    daemon.wait_for("the containers", |state| {
        let known = state["containers"].as_array().expect("a list").iter();
        known.filter(|container| container["pod"]["namespace"] == "shop").count() >= names.len()
    });
    for container in containers {
        let output = container.finish();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let (samples, said) = daemon.finish();
    println!("{}", said.lines().last().unwrap_or_default());
    for ((name, attributes), number) in expected.iter().zip(0..) {
        let id = Runc::id(number);
        let all = [
            ("k8s.namespace.name", "shop"),
            ("k8s.pod.name", name),
            ("k8s.container.name", "main"),
            ("k8s.node.name", NODE),
            ("k8s.cluster.name", "test"),
            ("service.namespace", "shop"),
            ("service.version", "1"),
            ("container.id", &id),
            ("container.image.name", "registry.example/main"),
            ("container.image.tags", "1"),
            ("host.name", NODE),
        ];
        for (attribute, expected) in all.iter().chain(*attributes) {
            let found = values(&samples, name, attribute);
            println!("{name:20} {attribute:22} {found:?}");
            assert_eq!(found.len(), 1, "{name}: {attribute} is not always the same: {found:?}");
            assert!(found[expected] > 20, "{name}: {found:?}");
        }
    }
    // A hostile value is text and nothing else.
    let owners = values(&samples, "bare", "k8s.pod.annotation.example.com/owner");
    assert!(owners.keys().all(|owner| owner.starts_with("team") && !owner.contains('\u{1b}')), "{owners:?}");
    let huge = values(&samples, FORGER, "k8s.pod.annotation.example.com/huge");
    assert!(huge.keys().all(|huge| (100..=1024).contains(&huge.len())), "{huge:?}");
    // What is in no pod is in no pod.
    let is_stranger = |sample: &&Sample| !names.contains(&sample.process) && !sample.process.starts_with("runc");
    let stranger = samples.iter().filter(is_stranger).find(|sample| sample.resource.contains_key("k8s.pod.name"));
    assert!(stranger.is_none(), "{stranger:?}");
    let asked = cluster.requests_of(&account.user);
    let verbs: Vec<&str> = asked.iter().map(|asked| asked.verb.as_str()).collect();
    println!("asked of the API server: {verbs:?}");
    assert_eq!(verbs, ["list", "watch"]);
}

/// The API server is stopped, killed, suspended, and started again without its history, while objects are changed and
/// deleted: the agent goes on, no sample has a wrong label, and what is new then is known.
#[test]
fn the_api_server_may_come_and_go() {
    if !kernel_is_usable() {
        return;
    }
    let Some(mut cluster) = Cluster::start("comes-and-goes") else { return };
    let account = account(&cluster);
    let _cgroups = Cgroups(&["kubepods", "kubepods.slice"]);
    cluster.create(&objects::node(NODE));
    cluster.create(&objects::namespace("shop"));
    let names = ["first", "meanwhile", "suspended", "forgotten", "last"].map(str::to_owned);
    let runc = Runc::new("comes-and-goes-containers", "burner", &names);
    let daemon = Daemon::start(&scratch("comes-and-goes-agent"), &account, "{pod_labels: ['*']}");
    daemon.wait_for("the first list", |state| state["kubernetes"]["state"] == "synced");
    let pod = |name: &str| objects::labelled(objects::pod("shop", name, NODE, &["main"]), "version", "1");
    let knows = |state: &Value, pod: &str| {
        let mut containers = state["containers"].as_array().expect("a list").iter();
        containers.any(|container| container["pod"]["pod"] == pod)
    };
    let mut running = Vec::new();
    let start = |cluster: &Cluster, number: u64, name: &str| {
        let jobs = Job { cluster, runc: &runc, namespace: "shop" };
        jobs.start(number, pod(name), "600", Duration::ZERO)
    };
    running.push(start(&cluster, 0, "first"));
    daemon.wait_for("the first pod", |state| knows(state, "first"));

    // Killed: connections are reset. A container that appears now has no name yet.
    let meanwhile = cluster.create(&pod("meanwhile"));
    cluster.kill_server();
    daemon.wait_for("a failure", |state| state["kubernetes"]["state"] == "failing");
    running.push(Job { cluster: &cluster, runc: &runc, namespace: "shop" }.run(1, &meanwhile, "600"));
    thread::sleep(Duration::from_secs(4));
    assert!(knows(&daemon.state(), "first"), "what was known is forgotten");
    cluster.start_server();
    Job { cluster: &cluster, runc: &runc, namespace: "shop" }.say_running(1, &meanwhile);
    daemon.wait_for("the server again", |state| knows(state, "meanwhile"));

    // Suspended: nothing answers, nothing is reset.
    cluster.suspend();
    thread::sleep(Duration::from_secs(5));
    cluster.resume();
    running.push(start(&cluster, 2, "suspended"));
    daemon.wait_for("a pod after the pause", |state| knows(state, "suspended"));

    // Stopped, while the agent could not follow it, and nobody remembers what objects were like: they have to be listed
    // again. One pod is gone meanwhile and another is changed.
    daemon.agent.signal(Signal::SIGSTOP);
    cluster.kill_server();
    cluster.start_server();
    cluster.delete(&pod("first"));
    cluster.change(&pod("meanwhile"), &json!({"metadata": {"labels": {"version": "2"}}}));
    cluster.stop_server();
    cluster.forget_history();
    cluster.start_server();
    daemon.agent.signal(Signal::SIGCONT);
    running.push(start(&cluster, 3, "forgotten"));
    daemon.wait_for("a pod after the history was lost", |state| knows(state, "forgotten"));
    running.push(start(&cluster, 4, "last"));
    daemon.wait_for("the last pod", |state| knows(state, "last"));
    thread::sleep(Duration::from_secs(5));
    let state = daemon.state();
    println!("{}", state["kubernetes"]);
    drop(running);
    let (samples, said) = daemon.finish();
    println!(
        "{}",
        said.lines().filter(|line| line.contains("WARN") || line.contains("INFO")).collect::<Vec<_>>().join("\n")
    );
    for name in &names {
        let (pods, containers) = (values(&samples, name, "k8s.pod.name"), values(&samples, name, "container.id"));
        println!("{name:10} in pods {pods:?}, in {} containers", containers.len());
        assert!(pods.keys().all(|pod| pod == name || pod.is_empty()), "{name}: {pods:?}");
        assert!(pods[name.as_str()] > 100, "{name}: {pods:?}");
        assert_eq!(containers.len(), 1, "{name}: {containers:?}");
    }
    let versions = values(&samples, "meanwhile", "k8s.pod.label.version");
    println!("versions of a pod that was changed: {versions:?}");
    assert!(versions["2"] > 0 && versions["1"] > 0);
    let asked = cluster.requests_of(&account.user);
    let lists = asked.iter().filter(|asked| asked.verb == "list" && asked.status == Some(200)).count();
    println!("{lists} lists and {} watches", asked.len() - lists);
    assert!(lists >= 2, "nothing was listed again: {asked:?}");
    assert!(asked.iter().all(|asked| asked.verb == "list" || asked.verb == "watch"), "{asked:?}");
}

//! The pods of a busy node: as many, as large and as restless as a test asks for.

use std::{
    collections::VecDeque,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    Cluster,
    objects::{self, owned_by},
};

/// Where all of it is.
const NAMESPACE: &str = "load";
/// Workloads that the pods belong to, in turn.
const WORKLOADS: usize = 20;
/// Who changes what, as it is in a cluster: it decides on what objects say of their own history.
const CONTROLLER: &str = "fieldManager=kube-controller-manager";

/// The pods of one node.
pub struct PodLoad<'a> {
    cluster: &'a Cluster,
    node: String,
    /// ReplicaSets, each with a Deployment.
    owners: Vec<Value>,
    pods: VecDeque<LoadedPod>,
    /// Pods made so far, those that are gone included.
    made: usize,
}

/// A pod that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedPod {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its containers' names and IDs.
    pub containers: Vec<(String, String)>,
    /// How often its first container was replaced by another.
    pub restarts: usize,
    workload: usize,
}

/// What was done to pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Kubelets said something new of them.
    pub statuses: usize,
    /// Their labels changed.
    pub labels: usize,
    /// They were deleted, and others took their place.
    pub replaced: usize,
}

impl<'a> PodLoad<'a> {
    /// Makes a node with so many pods that run.
    pub fn start(cluster: &'a Cluster, node: &str, count: usize) -> Self {
        cluster.create(&objects::node(node));
        cluster.create(&objects::namespace(NAMESPACE));
        let owners = (0..WORKLOADS.min(count)).map(|workload| {
            let deployment =
                cluster.create(&objects::workload("Deployment", NAMESPACE, &format!("service-{workload}")));
            let set = objects::workload(
                "ReplicaSet",
                NAMESPACE,
                &format!("service-{workload}-{:08x}", mixed(workload) >> 32),
            );
            cluster.create(&owned_by(set, &deployment))
        });
        let owners = owners.collect();
        let mut load = Self { cluster, node: node.to_owned(), owners, pods: VecDeque::new(), made: 0 };
        for _ in 0..count {
            load.make();
        }
        load
    }

    /// The pods that run now, the oldest first.
    pub fn pods(&self) -> impl Iterator<Item = &LoadedPod> {
        self.pods.iter()
    }

    /// The length in bytes of the list that an agent of this node asks for.
    pub fn list_length(&self) -> usize {
        let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{}", self.node);
        let answer = self.cluster.request("GET", &path, None);
        assert_eq!(answer.body["items"].as_array().map(Vec::len), Some(self.pods.len()), "{}", answer.status);
        answer.length
    }

    /// Changes so many pods a second for that long: most get another status, every fifth a label, every fifth is replaced.
    pub fn change(&mut self, a_second: u32, duration: Duration) -> Changes {
        let (begun, mut changes) = (Instant::now(), Changes::default());
        let mut turn = 0;
        while begun.elapsed() < duration {
            match turn % 5 {
                0 => {
                    self.replace_oldest();
                    changes.replaced += 1;
                }
                1 => {
                    self.relabel(turn as usize);
                    changes.labels += 1;
                }
                _ => {
                    self.restart(turn as usize);
                    changes.statuses += 1;
                }
            }
            turn += 1;
            // A slow API server is caught up with.
            sleep((begun + Duration::from_secs(1) * turn / a_second).saturating_duration_since(Instant::now()));
        }
        changes
    }

    fn replace_oldest(&mut self) {
        if let Some(oldest) = self.pods.pop_front() {
            self.cluster.delete(&objects::pod(NAMESPACE, &oldest.name, "", &[]));
        }
        self.make();
    }

    fn relabel(&mut self, turn: usize) {
        let place = turn % self.pods.len();
        let pod = objects::pod(NAMESPACE, &self.pods[place].name, "", &[]);
        self.cluster.change(&pod, &json!({"metadata": {"labels": {"shop.example/turn": turn.to_string()}}}));
    }

    /// One of its containers ended, and there is another.
    fn restart(&mut self, turn: usize) {
        let place = turn % self.pods.len();
        let pod = &mut self.pods[place];
        pod.restarts += 1;
        pod.containers[0].1 = container_id(&pod.name, "server", pod.restarts);
        self.cluster.set_pod_status(NAMESPACE, &pod.name, &status(pod));
    }

    fn make(&mut self) {
        let workload = self.made % self.owners.len();
        let owner = &self.owners[workload];
        let name = format!("{}-{:05x}", owner["metadata"]["name"].as_str().unwrap_or_default(), self.made);
        let object = owned_by(pod(&name, &self.node, workload), owner);
        let made = self.cluster.ask("POST", &format!("{}?{CONTROLLER}", objects::place(&object).0), Some(&object));
        let containers = made["spec"]["containers"].as_array().into_iter().flatten();
        let containers = containers.filter_map(|container| container["name"].as_str());
        let pod = LoadedPod {
            uid: made["metadata"]["uid"].as_str().unwrap_or_default().to_owned(),
            containers: containers.map(|container| (container.to_owned(), container_id(&name, container, 0))).collect(),
            name,
            restarts: 0,
            workload,
        };
        self.cluster.set_pod_status(NAMESPACE, &pod.name, &status(&pod));
        self.pods.push_back(pod);
        self.made += 1;
    }
}

/// A pod as charts of today make them: a server, a proxy beside it, and in every third pod something that ships logs.
fn pod(name: &str, node: &str, workload: usize) -> Value {
    let app = format!("service-{workload}");
    let mut containers = vec![container("server", workload, 16), container("proxy", workload, 6)];
    if mixed(name.len() + workload).is_multiple_of(3) {
        containers.push(container("logs", workload, 4));
    }
    let digest =
        |of: usize| format!("{:016x}{:016x}{:016x}{:016x}", mixed(of), mixed(of + 1), mixed(of + 2), mixed(of + 3));
    let no_execute =
        |key: &str| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300});
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": NAMESPACE, "name": name,
            "labels": {
                "app.kubernetes.io/name": app, "app.kubernetes.io/instance": format!("{app}-production"),
                "app.kubernetes.io/version": "2.14.3", "app.kubernetes.io/component": "backend",
                "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/managed-by": "Helm",
                "helm.sh/chart": format!("{app}-2.14.3"), "pod-template-hash": format!("{:08x}", mixed(workload) >> 32),
                "shop.example/team": "checkout", "shop.example/cost-center": "4711",
            },
            "annotations": {
                "checksum/config": digest(workload), "checksum/secret": digest(workload + 7),
                "kubectl.kubernetes.io/default-container": "server",
                "kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z",
                "prometheus.io/scrape": "true", "prometheus.io/port": "9090", "prometheus.io/path": "/metrics",
                "resource.opentelemetry.io/service.version": "2.14.3",
                "k8s.v1.cni.cncf.io/network-status": "[{\n    \"name\": \"cbr0\",\n    \"interface\": \"eth0\",\n    \"ips\": [\n        \"10.244.1.17\"\n    ],\n    \"mac\": \"aa:5b:2f:11:0c:9e\",\n    \"default\": true,\n    \"dns\": {}\n}]",
            },
        },
        "spec": {
            "nodeName": node, "serviceAccountName": app, "priority": 0, "terminationGracePeriodSeconds": 60,
            "containers": containers,
            "securityContext": {"fsGroup": 65532, "runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "tolerations": [no_execute("node.kubernetes.io/not-ready"), no_execute("node.kubernetes.io/unreachable")],
            "topologySpreadConstraints": [{
                "maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/name": app}},
            }],
            "volumes": [
                {"name": "config", "configMap": {"name": format!("{app}-config")}},
                {"name": "tls", "secret": {"secretName": format!("{app}-tls")}},
                {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}},
                {"name": "kube-api-access", "projected": {"defaultMode": 420, "sources": [
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                    {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
                ]}},
            ],
        },
    })
}

fn container(name: &str, workload: usize, variables: usize) -> Value {
    let mut environment: Vec<Value> = (0..variables)
        .map(|number| {
            json!({
                "name": format!("SERVICE_{workload}_OPTION_{number}"),
                "value": format!("http://backend-{number}.shop.svc.cluster.local:{}/v1", 8000 + number),
            })
        })
        .collect();
    environment.push(json!({"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}));
    environment
        .push(json!({"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "database", "key": "password"}}}));
    let probe =
        |path: &str| json!({"httpGet": {"path": path, "port": "http"}, "periodSeconds": 10, "failureThreshold": 3});
    let mounts =
        ["config", "tls", "tmp"].map(|volume| json!({"name": volume, "mountPath": format!("/var/lib/{volume}")}));
    json!({
        "name": name, "image": format!("registry.shop.example/team/{name}:2.14.3"), "imagePullPolicy": "IfNotPresent",
        "command": [format!("/usr/bin/{name}")], "args": ["--config=/var/lib/config/settings.yaml", "--log-format=json"],
        "env": environment,
        "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}],
        "resources": {"requests": {"cpu": "250m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        "livenessProbe": probe("/healthz"), "readinessProbe": probe("/readyz"),
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true},
        "volumeMounts": mounts,
    })
}

/// What the kubelet says of a pod that runs.
fn status(pod: &LoadedPod) -> Value {
    let containers: Vec<(&str, &str)> = pod.containers.iter().map(|(name, id)| (name.as_str(), id.as_str())).collect();
    let mut status = objects::running(&containers);
    let address = format!("10.244.1.{}", pod.workload + 2);
    status["podIP"] = json!(address);
    status["podIPs"] = json!([{"ip": address}]);
    status["hostIP"] = json!("192.168.7.21");
    status["hostIPs"] = json!([{"ip": "192.168.7.21"}]);
    status["startTime"] = json!("2026-01-01T00:00:00Z");
    status["conditions"] = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
        .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}))
        .into_iter()
        .collect();
    status["containerStatuses"][0]["restartCount"] = json!(pod.restarts);
    status
}

/// An ID as containerd makes them.
fn container_id(pod: &str, container: &str, restarts: usize) -> String {
    let seed =
        pod.bytes().chain(container.bytes()).fold(restarts, |seed, byte| seed.wrapping_mul(31) + usize::from(byte));
    let words: Vec<String> =
        (0..4).map(|word| format!("{:016x}", mixed(seed.wrapping_mul(4).wrapping_add(word)))).collect();
    format!("containerd://{}", words.concat())
}

/// A number that looks like chance and is always the same (splitmix64).
fn mixed(number: usize) -> u64 {
    let mut mixed = (number as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

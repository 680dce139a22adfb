//! What the real API server says of the manifests and of what the chart renders: whether it takes them, and what they allow.

use std::{fs, time::Duration};

use profiler_tests::{
    cluster::{Cluster, objects},
    eventually, run, stderr, stdout, workspace,
};
use serde_json::{Value, json};

use crate::rendered::{Chart, KUBERNETES, kustomize};

/// A kind of object that Prometheus' operator brings, whose own definition is much longer.
const POD_MONITORS: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: podmonitors.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {kind: PodMonitor, listKind: PodMonitorList, plural: podmonitors, singular: podmonitor}
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";
/// The user that the agent is.
const ACCOUNT: &str = "--as=system:serviceaccount:profiler-agent:profiler-agent";
/// What an intruder in the agent would like to do, as `kubectl auth can-i` takes it.
const TEMPTING: [&str; 22] = [
    "get pods",
    "create pods",
    "delete pods",
    "patch pods",
    "get pods --subresource=log",
    "create pods --subresource=exec",
    "create pods --subresource=attach",
    "create pods --subresource=ephemeralcontainers",
    "get secrets",
    "list secrets",
    "list configmaps",
    "list services",
    "list nodes",
    "get nodes --subresource=proxy",
    "patch nodes",
    "patch daemonsets.apps",
    "create serviceaccounts --subresource=token",
    "impersonate users",
    "create clusterrolebindings.rbac.authorization.k8s.io",
    "escalate clusterroles.rbac.authorization.k8s.io",
    "get /metrics",
    "* *",
];

/// Applies for a trial, as the server would do it; what it warned of.
fn try_to_apply(cluster: &Cluster, name: &str, yaml: &str) -> Vec<String> {
    let file = cluster.folder().join(name).with_extension("yaml");
    fs::write(&file, yaml).expect("a file for kubectl");
    let arguments = ["apply", "--server-side", "--dry-run=server", "--filename"];
    let output = run(cluster.kubectl_command(&arguments).arg(file));
    let (said, done) = (stderr(&output), stdout(&output));
    assert!(output.status.success(), "{name}: {said}\n{yaml}");
    let warnings: Vec<String> =
        said.lines().map(|line| line.strip_prefix("Warning: ").unwrap_or(line).to_owned()).collect();
    println!("{name}: {} objects, warnings: {warnings:?}", done.lines().count());
    assert!(done.lines().all(|line| line.ends_with("serverside-applied (server dry run)")), "{name}: {done}");
    warnings
}

/// The API server takes everything that there is to apply. Its only warning is the one that `deploy/manifests/README.md`
/// announces.
#[test]
fn the_api_server_takes_all_of_it() {
    let Some(cluster) = Cluster::start("deploy-applied") else { return };
    let Some(chart) = Chart::open("deploy-applied-values") else { return };
    cluster.apply(POD_MONITORS);
    eventually("the new kind", Duration::from_secs(60), || {
        let list = cluster.request("GET", "/apis/monitoring.coreos.com/v1/podmonitors", None);
        (list.status == 200).then_some(())
    });
    // A trial makes no namespace for what is in it.
    for folder in ["base", "overlays/example"] {
        let objects = kustomize(folder).expect("there is a kubectl");
        cluster.create(objects.only("Namespace"));
        let all: Vec<String> = objects.0.iter().map(Value::to_string).collect();
        let warnings = try_to_apply(&cluster, &folder.replace('/', "-"), &all.join("\n---\n"));
        assert!(warnings.iter().all(|warning| warning.contains("deprecated since v1.30")), "{warnings:?}");
    }
    for (name, values) in [("chart", json!({})), ("chart-every-value", chart.every_value())] {
        let warnings = try_to_apply(&cluster, name, &chart.text(KUBERNETES, &values));
        assert!(warnings.is_empty(), "{warnings:?}");
    }
}

/// The agent's account may list and watch pods, and nothing else that not everybody may.
#[test]
fn the_account_may_list_and_watch_pods() {
    let Some(cluster) = Cluster::start("deploy-rights") else { return };
    for file in ["namespace.yaml", "serviceaccount.yaml", "rbac.yaml"] {
        let manifest = workspace().join("deploy/manifests/base").join(file);
        cluster.apply(&fs::read_to_string(manifest).expect("a manifest"));
    }
    let may = |what: &str| {
        let arguments = ["auth", "can-i", "--all-namespaces", ACCOUNT];
        let output = run(cluster.kubectl_command(&arguments).args(what.split(' ')));
        match stdout(&output).trim() {
            "yes" => true,
            "no" => false,
            answer => panic!("{what}: {answer} {}", stderr(&output)),
        }
    };
    eventually("what was granted", Duration::from_secs(60), || may("list pods").then_some(()));
    assert!(may("watch pods"));
    for what in TEMPTING {
        assert!(!may(what), "the agent may {what}");
    }
    // All of its rights, also those nobody thought of; everybody may ask who they are and what they may.
    for namespace in ["profiler-agent", "kube-system"] {
        let output = cluster.kubectl(&["auth", "can-i", "--list", "--no-headers", ACCOUNT, "--namespace", namespace]);
        let said = stdout(&output);
        let rights: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
        let own: Vec<_> = rights
            .iter()
            .filter(|right| !right[0].starts_with("self") && !right[0].starts_with('['))
            .map(|right| right.join(" "))
            .collect();
        println!("in {namespace}: {own:?}; like everybody: {}", rights.len() - own.len());
        assert_eq!(own, ["pods [] [] [list watch]"], "{said}");
    }
}

/// The agent's pod needs a namespace of level `privileged`, which the manifests' is: level `baseline` refuses it, and says
/// what for.
#[test]
fn pods_are_admitted_where_the_namespace_allows_them() {
    let Some(cluster) = Cluster::start("deploy-security") else { return };
    let Some(base) = kustomize("base") else { return };
    let template = &base.only("DaemonSet")["spec"]["template"];
    let create = |namespace: &str| {
        let mut pod =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]});
        pod["metadata"]["name"] = json!("profiler-agent-x2x");
        let path = format!("{}?dryRun=All", objects::collection("v1", "Pod", namespace));
        cluster.request("POST", &path, Some(&pod))
    };
    let namespace = base.only("Namespace");
    cluster.create(namespace);
    let admitted = create(namespace["metadata"]["name"].as_str().expect("a name"));
    assert_eq!(admitted.status, 201, "{}", admitted.body);
    for level in ["baseline", "restricted"] {
        let key = "pod-security.kubernetes.io/enforce";
        let mut namespace = objects::namespace(level);
        namespace["metadata"]["labels"] = json!({key: level});
        cluster.create(&namespace);
        let refused = create(level);
        let message = refused.body["message"].as_str().unwrap_or_default();
        println!("{level}: {message}");
        assert_eq!(refused.status, 403, "{}", refused.body);
        assert!(message.contains("hostPID=true") && message.contains("violates PodSecurity"), "{message}");
    }
}

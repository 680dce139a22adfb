//! A cluster of Kubernetes: the real API server, and what the agent makes of its objects.

use std::{
    thread,
    time::{Duration, Instant},
};

use profiler_tests::{
    cluster::{Cluster, PodLoad, objects},
    eventually, peak_memory, stderr, stdout,
};
use serde_json::json;

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

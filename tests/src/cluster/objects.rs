//! The objects of a cluster, as far as tests need them.

use serde_json::{Value, json};

/// Where objects of this kind are, without their names: `/apis/apps/v1/namespaces/shop/deployments`.
///
/// Those without a namespace are asked for with an empty one.
pub fn collection(api_version: &str, kind: &str, namespace: &str) -> String {
    let root = if api_version == "v1" { "/api/v1".to_owned() } else { format!("/apis/{api_version}") };
    let plural = format!("{}s", kind.to_lowercase());
    match namespace {
        "" => format!("{root}/{plural}"),
        namespace => format!("{root}/namespaces/{namespace}/{plural}"),
    }
}

/// Where an object is, or will be: its collection and its name.
pub fn place(object: &Value) -> (String, &str) {
    let text = |value: &'static str, object: &Value| {
        object.pointer(value).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let folder = collection(&text("/apiVersion", object), &text("/kind", object), &text("/metadata/namespace", object));
    (folder, object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default())
}

/// A node.
pub fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
}

/// A namespace.
pub fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// A Deployment, ReplicaSet, StatefulSet, DaemonSet, Job or CronJob without anything to do: there are no controllers, so
/// that its pods are made by the test, as `owned_by` it.
pub fn workload(kind: &str, namespace: &str, name: &str) -> Value {
    let template = json!({
        "metadata": {"labels": {"app": name}},
        "spec": {"containers": [{"name": "main", "image": "registry.example/main:1"}]},
    });
    let mut of_job = template.clone();
    of_job["spec"]["restartPolicy"] = json!("Never");
    let selector = json!({"matchLabels": {"app": name}});
    let (api_version, spec) = match kind {
        "StatefulSet" => ("apps/v1", json!({"serviceName": name, "selector": selector, "template": template})),
        "Job" => ("batch/v1", json!({"template": of_job})),
        "CronJob" => ("batch/v1", json!({"schedule": "0 3 * * *", "jobTemplate": {"spec": {"template": of_job}}})),
        _ => ("apps/v1", json!({"selector": selector, "template": template})),
    };
    json!({"apiVersion": api_version, "kind": kind, "metadata": {"namespace": namespace, "name": name}, "spec": spec})
}

/// The object with an owner, which has to be as the API server returned it.
pub fn owned_by(mut object: Value, owner: &Value) -> Value {
    object["metadata"]["ownerReferences"] = json!([{
        "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true,
    }]);
    object
}

/// The object with a label.
pub fn labelled(mut object: Value, key: &str, value: &str) -> Value {
    object["metadata"]["labels"][key] = json!(value);
    object
}

/// The object with an annotation.
pub fn annotated(mut object: Value, key: &str, value: &str) -> Value {
    object["metadata"]["annotations"][key] = json!(value);
    object
}

/// A pod on a node, with containers that are called so.
pub fn pod(namespace: &str, name: &str, node: &str, containers: &[&str]) -> Value {
    let containers: Vec<Value> =
        containers.iter().map(|name| json!({"name": name, "image": format!("registry.example/{name}:1")})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"nodeName": node, "containers": containers},
    })
}

/// The status that a kubelet writes of a pod that runs: each container's name and its ID, such as `containerd://6c1f…`.
pub fn running(containers: &[(&str, &str)]) -> Value {
    let statuses: Vec<Value> = containers
        .iter()
        .map(|(name, id)| {
            json!({
                "name": name, "containerID": id, "ready": true, "started": true, "restartCount": 0,
                "image": format!("registry.example/{name}:1"), "imageID": format!("registry.example/{name}@sha256:{:064}", 1),
                "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
            })
        })
        .collect();
    json!({"phase": "Running", "containerStatuses": statuses})
}

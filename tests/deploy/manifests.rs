//! The manifests for kustomize: the same as the chart's, without helm.

use std::collections::BTreeMap;

use profiler_tests::yaml::{self, Value};
use serde_json::json;

use crate::rendered::{Chart, Objects, kustomize};

/// Objects by kind, without what only one of the two ways has: who rendered them, and how pods are told of another
/// configuration (by a checksum, or by the ConfigMap's name).
fn comparable(objects: Objects) -> BTreeMap<String, Value> {
    let of_name = |name: &str| name.starts_with("profiler-agent-").then(|| json!("profiler-agent"));
    let mut comparable = BTreeMap::new();
    for mut object in objects.0 {
        let metadata = object["metadata"].as_object_mut().expect("metadata");
        if let Some(name) = metadata["name"].as_str().and_then(of_name) {
            metadata.insert("name".to_owned(), name);
        }
        let labels = metadata["labels"].as_object_mut().expect("labels");
        labels.remove("helm.sh/chart");
        labels.remove("app.kubernetes.io/managed-by");
        if object["kind"] == "ConfigMap" {
            let text = object["data"]["config.yaml"].as_str().expect("a configuration");
            object["data"]["config.yaml"] = yaml::documents(text).remove(0);
        }
        if object["kind"] == "DaemonSet" {
            let template = &mut object["spec"]["template"];
            template["metadata"]["annotations"].as_object_mut().expect("annotations").remove("checksum/config");
            for volume in template["spec"]["volumes"].as_array_mut().expect("volumes") {
                if let Some(name) = volume["configMap"]["name"].as_str().and_then(of_name) {
                    volume["configMap"]["name"] = name;
                }
            }
        }
        let kind = object["kind"].as_str().expect("a kind").to_owned();
        assert!(comparable.insert(kind.clone(), object).is_none(), "two of kind {kind}");
    }
    comparable
}

/// The base is what the chart renders by default, object by object. (For a version that knows AppArmor by its annotation,
/// which all versions take.)
#[test]
fn the_base_is_the_charts_default() {
    let Some(base) = kustomize("base") else { return };
    let Some(chart) = Chart::open("manifests") else { return };
    let mut base = comparable(base);
    let namespace = base.remove("Namespace").expect("a namespace");
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged");
    let rendered = comparable(chart.render("1.29", &json!({})));
    assert_eq!(base.keys().collect::<Vec<_>>(), rendered.keys().collect::<Vec<_>>());
    for (kind, object) in &base {
        assert_eq!(object, &rendered[kind], "{kind}");
    }
    println!("{} objects are the same", base.len());
}

/// The example builds, has its own image, receiver and configuration, and moves everything into its namespace.
#[test]
fn the_example_changes_what_it_says() {
    // (What came with kubectl before 1.21 does not know `patches`.)
    let Some(example) = kustomize("overlays/example") else { return };
    for object in &example.0 {
        let (kind, namespace) = (object["kind"].as_str().expect("a kind"), &object["metadata"]["namespace"]);
        let is_moved = match kind {
            "Namespace" => object["metadata"]["name"] == "observability",
            "ClusterRole" => namespace.is_null(),
            "ClusterRoleBinding" => object["subjects"][0]["namespace"] == "observability",
            _ => *namespace == "observability",
        };
        assert!(is_moved, "{object}");
    }
    let container = example.container();
    assert_eq!(container["image"], "registry.example.com/profiler-agent:0.1.0");
    let variables = container["env"].as_array().expect("variables");
    assert!(variables.iter().any(|variable| variable["value"] == "https://profiles.example.com:4317"));
    assert!(variables.iter().any(|variable| variable["name"] == "NODE_NAME"));
    let volumes = example.pod()["volumes"].as_array().expect("volumes");
    let name = example.only("ConfigMap")["metadata"]["name"].clone();
    assert!(volumes.iter().any(|volume| volume["configMap"]["name"] == name));
    assert!(volumes.iter().all(|volume| volume["name"] != "spool" || volume["emptyDir"].is_null()));
    assert!(example.configuration().contains("k8s.cluster.name: production"));
}

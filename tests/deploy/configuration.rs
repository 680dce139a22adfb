//! What the agent says of the configurations, arguments and variables that it is deployed with.

use std::{fs, path::Path, process::Command};

use profiler_tests::{
    agent, run, scratch, stderr,
    yaml::{Value, texts},
};
use serde_json::json;

use crate::rendered::{Chart, KUBERNETES, Objects, kustomize};

/// Starts the agent as a container would, but without any privilege: that is what it complains of first when all that it was
/// told is valid.
fn check_is_valid(name: &str, container: &Value, configuration: &str, folder: &Path) {
    let file = folder.join(format!("{name}.yaml"));
    fs::write(&file, configuration).expect("a file");
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"]).arg(agent());
    for argument in texts(&container["args"]) {
        setpriv.arg(argument.replace("/etc/profiler-agent/config.yaml", &file.display().to_string()));
    }
    for variable in container["env"].as_array().expect("variables") {
        let value = match &variable["valueFrom"] {
            Value::Null => variable["value"].as_str().expect("a text").replace("$(HOST_IP)", "192.0.2.1"),
            from if !from["secretKeyRef"].is_null() => "authorization=Basic%20abc".to_owned(),
            _ => "node-1".to_owned(),
        };
        setpriv.env(variable["name"].as_str().expect("a name"), value);
    }
    // Where pods have their service account, this stands for a way to the API server. (Nothing reads it yet.)
    setpriv.env("KUBECONFIG", folder.join("kubeconfig")).env_remove("KUBERNETES_SERVICE_HOST");
    let said = stderr(&run(&mut setpriv));
    assert!(said.contains("missing privileges"), "{name}: {said}");
}

/// The agent takes what the chart renders, by default and with every value, and what the manifests have.
#[test]
fn the_agent_takes_what_it_is_given() {
    let folder = scratch("configuration");
    let check = |name: &str, objects: &Objects| {
        check_is_valid(name, objects.container(), objects.configuration(), &folder);
    };
    for manifests in ["base", "overlays/example"] {
        if let Some(objects) = kustomize(manifests) {
            check(&manifests.replace('/', "-"), &objects);
        }
    }
    let Some(chart) = Chart::open("configuration-values") else { return };
    check("defaults", &chart.render(KUBERNETES, &json!({})));
    let mut every_value = chart.every_value();
    check("every-value", &chart.render(KUBERNETES, &every_value));
    every_value["spool"]["enabled"] = json!(true);
    check("every-value-spool", &chart.render(KUBERNETES, &every_value));
    let destinations = json!([
        {"name": "central", "endpoint": "https://profiles.example.com", "bearer_token_file": "/var/run/secrets/token"},
        {"name": "node", "endpoint": "http://192.0.2.1:4317"},
    ]);
    check("destinations", &chart.render(KUBERNETES, &json!({"config": {"export": {"destinations": destinations}}})));
}

//! The Helm chart: what it renders by default and with every value, and what it refuses.

use profiler_tests::{
    stderr, stdout, workspace,
    yaml::{Value, file, texts},
};
use serde_json::json;

use crate::rendered::{Chart, KUBERNETES, Objects};

/// All that the agent may do. (`tests/kernel/deployment.rs` shows that it needs each.)
const CAPABILITIES: [&str; 7] =
    ["BPF", "PERFMON", "SYS_PTRACE", "SYS_RESOURCE", "DAC_READ_SEARCH", "SYSLOG", "CHECKPOINT_RESTORE"];

/// What is on in every rendering that a single value is put to: values that mean nothing without.
fn enabled() -> Value {
    json!({
        "metrics": {"annotations": true, "podMonitor": {"enabled": true}},
        "otlp": {"secret": {"name": "profiler-otlp"}},
        "status": {"secret": {"name": "profiler-status", "certKey": "cert", "keyKey": "key"}},
        "config": {"symbolize": {"debuginfod": {"urls": ["https://debuginfod.example.com"]}}},
    })
}

/// The paths and values of everything that is no object, or an empty one.
fn leaves(value: &Value) -> Vec<(Vec<String>, &Value)> {
    match value.as_object() {
        Some(members) if !members.is_empty() => members
            .iter()
            .flat_map(|(name, member)| {
                leaves(member).into_iter().map(move |(path, leaf)| ([vec![name.clone()], path].concat(), leaf))
            })
            .collect(),
        _ => vec![(Vec::new(), value)],
    }
}

/// What is at a path.
fn at<'a>(value: &'a Value, path: &[String]) -> &'a Value {
    path.iter().fold(value, |value, name| &value[name])
}

/// Puts a value at a path.
fn put(into: &mut Value, path: &[String], value: &Value) {
    match path {
        [] => *into = value.clone(),
        [name, rest @ ..] => {
            if !into.is_object() {
                *into = json!({});
            }
            put(&mut into[name], rest, value);
        }
    }
}

fn put_into(mut values: Value, path: &[String], value: &Value) -> Value {
    put(&mut values, path, value);
    values
}

/// Nothing is privileged; the root is read-only; capabilities, API access and network are what is needed.
fn check_least_privilege(objects: &Objects) {
    let pod = objects.pod();
    assert_eq!((&pod["hostPID"], &pod["hostNetwork"]), (&json!(true), &json!(false)));
    assert!(pod["hostIPC"].is_null());
    let context = &objects.container()["securityContext"];
    assert_eq!(context["privileged"], json!(false));
    assert_eq!(context["allowPrivilegeEscalation"], json!(false));
    assert_eq!(context["readOnlyRootFilesystem"], json!(true));
    assert_eq!(context["runAsUser"], json!(0));
    assert_eq!(context["capabilities"], json!({"drop": ["ALL"], "add": CAPABILITIES}));
    assert_eq!(context["seccompProfile"]["type"], "Unconfined");
    // What is mounted is the agent's own: nothing of the node.
    for volume in pod["volumes"].as_array().expect("volumes") {
        assert!(volume["hostPath"].is_null(), "{volume}");
    }
    assert_eq!(
        objects.only("ClusterRole")["rules"],
        json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}])
    );
    assert_eq!(objects.only("NetworkPolicy")["spec"]["ingress"], json!([]));
}

/// The default is without a complaint of helm's, and keeps what README.md promises.
#[test]
fn defaults_are_of_least_privilege() {
    let Some(chart) = Chart::open("chart-defaults") else { return };
    let lint = chart.helm(&["lint", "--strict"], KUBERNETES, &json!({}));
    println!("{}", stdout(&lint));
    assert!(lint.status.success(), "{}{}", stdout(&lint), stderr(&lint));
    let objects = chart.render(KUBERNETES, &json!({}));
    let kinds = ["ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet", "NetworkPolicy", "ServiceAccount"];
    assert_eq!(objects.kinds(), kinds);
    check_least_privilege(&objects);

    let (pod, container) = (objects.pod(), objects.container());
    assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(pod["terminationGracePeriodSeconds"], json!(30));
    for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
        assert_eq!(container[probe]["httpGet"], json!({"path": path, "port": "status"}));
    }
    let node = container["env"].as_array().expect("variables").iter().find(|variable| variable["name"] == "NODE_NAME");
    assert_eq!(node.expect("NODE_NAME")["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName");
    for (kind, what) in [("requests", "cpu"), ("requests", "memory"), ("limits", "cpu"), ("limits", "memory")] {
        assert!(container["resources"][kind][what].is_string(), "{kind} {what}");
    }
    // Whoever is bound is who the pod is.
    let subject = &objects.only("ClusterRoleBinding")["subjects"][0];
    assert_eq!(subject["name"], pod["serviceAccountName"]);
    assert_eq!(subject["namespace"], objects.only("DaemonSet")["metadata"]["namespace"]);
    assert_eq!(subject["name"], objects.only("ServiceAccount")["metadata"]["name"]);
    // Every object is of the release, and the selectors find the pods.
    let labels = &objects.only("DaemonSet")["spec"]["template"]["metadata"]["labels"];
    for object in &objects.0 {
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/name"], "profiler-agent", "{object}");
    }
    for selector in [
        &objects.only("DaemonSet")["spec"]["selector"]["matchLabels"],
        &objects.only("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ] {
        let selector = selector.as_object().expect("labels");
        assert!(selector.len() == 2 && selector.iter().all(|(name, value)| &labels[name] == value), "{selector:?}");
    }
}

/// Every value of `values.yaml` is set to another in the chart's own test values, and each alone changes what is rendered.
#[test]
fn every_value_has_an_effect() {
    let Some(chart) = Chart::open("chart-values") else { return };
    let (defaults, others) = (chart.values(), chart.every_value());
    let lint = chart.helm(&["lint", "--strict"], KUBERNETES, &others);
    assert!(lint.status.success(), "{}{}", stdout(&lint), stderr(&lint));
    let bases = [json!({}), enabled()].map(|base| (chart.text(KUBERNETES, &base), base));
    let leaves = leaves(&defaults);
    for (path, default) in &leaves {
        let other = at(&others, path);
        let name = path.join(".");
        assert!(!other.is_null() && other != *default, "{name} is not set to something else");
        let changes = |(text, base): &(String, Value)| {
            let changed = chart.text(KUBERNETES, &put_into(base.clone(), path, other));
            changed != *text
        };
        assert!(bases.iter().any(changes), "{name}: {other} changes nothing");
    }
    println!("{} values, each with an effect", leaves.len());
    assert!(leaves.len() > 80);
    // All at once, and every object.
    let mut all = others.clone();
    for path in ["serviceAccount.create", "rbac.create", "spool.enabled", "networkPolicy.enabled"] {
        let path: Vec<String> = path.split('.').map(str::to_owned).collect();
        put(&mut all, &path, &json!(true));
    }
    assert_eq!(chart.render(KUBERNETES, &others).kinds(), ["ConfigMap", "DaemonSet", "PodMonitor"]);
    let objects = chart.render(KUBERNETES, &all);
    assert_eq!(objects.kinds().len(), 7);
    assert_eq!(objects.only("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"], "status");
}

/// Pods are replaced when the configuration that they read at their start has changed, and not when a label of the chart
/// has.
#[test]
fn pods_follow_their_configuration() {
    let Some(chart) = Chart::open("chart-checksum") else { return };
    let checksum = |values: Value| {
        let template = chart.render(KUBERNETES, &values).only("DaemonSet")["spec"]["template"].clone();
        template["metadata"]["annotations"]["checksum/config"].as_str().expect("a checksum").to_owned()
    };
    let before = checksum(json!({}));
    assert_eq!(before, checksum(json!({"podLabels": {"a": "b"}})));
    for values in [
        json!({"config": {"sampling": {"frequency": 19}}}),
        json!({"clusterName": "production"}),
        json!({"status": {"port": 9000}}),
        json!({"spool": {"mib": 64}}),
    ] {
        assert_ne!(before, checksum(values.clone()), "{values}");
    }
}

/// Kubernetes 1.25 to 1.36 are rendered for, older ones are refused; AppArmor is told by a field since 1.30, and by an
/// annotation before.
#[test]
fn renders_for_every_version() {
    let Some(chart) = Chart::open("chart-versions") else { return };
    for minor in 25..=36 {
        let objects = chart.render(&format!("1.{minor}"), &json!({}));
        let field = &objects.container()["securityContext"]["appArmorProfile"]["type"];
        let annotations = &objects.only("DaemonSet")["spec"]["template"]["metadata"]["annotations"];
        let annotation = &annotations["container.apparmor.security.beta.kubernetes.io/agent"];
        let expected = if minor < 30 { (Value::Null, json!("unconfined")) } else { (json!("Unconfined"), Value::Null) };
        assert_eq!((field, annotation), (&expected.0, &expected.1), "1.{minor}");
    }
    // As managed clusters call themselves.
    chart.render("v1.31.4-gke.1183000", &json!({}));
    let refused = chart.helm(&["template", "profiler-agent"], "1.24", &json!({}));
    assert!(!refused.status.success() && stderr(&refused).contains("kubeVersion"), "{}", stderr(&refused));
}

/// Mistakes are found before anything is installed, and say what to do.
#[test]
fn mistakes_are_refused() {
    let Some(chart) = Chart::open("chart-mistakes") else { return };
    let check = |values: Value, expect: &str| {
        let refusal = chart.refusal(&values);
        assert!(refusal.contains(expect), "{values}: {refusal:?} does not say {expect:?}");
    };
    check(json!({"endpoint": "http://collector:4317"}), "endpoint");
    check(json!({"otlp": {"endpont": "x"}}), "endpont");
    check(json!({"otlp": {"endpoint": ""}}), "otlp");
    check(json!({"image": {"digest": "latest"}}), "digest");
    check(json!({"spool": {"maxAge": "long"}}), "maxAge");
    check(json!({"status": {"port": 70000}}), "port");
    check(json!({"config": {"kubernetes": {"enabled": "sometimes"}}}), "enabled");
    check(json!({"config": {"scope": {"excludes": []}}}), "excludes");
    check(json!({"config": {"status": {"listen": "127.0.0.1:1"}}}), "set status.host and status.port");
    check(json!({"config": {"export": {"spool": {"mib": 1}}}}), "set spool");
    check(json!({"config": {"export": {"endpoint": "http://x"}}}), "otlp.endpoint would win");
}

/// The network policy lets the agent reach its receivers, wherever they are named, and the API server only where it
/// watches pods.
#[test]
fn the_network_policy_knows_the_receivers() {
    let Some(chart) = Chart::open("chart-network") else { return };
    let check = |values: Value, expect: &[u64]| {
        let objects = chart.render(KUBERNETES, &values);
        let rules = objects.only("NetworkPolicy")["spec"]["egress"].as_array().expect("rules");
        let ports = rules.iter().flat_map(|rule| rule["ports"].as_array().expect("ports"));
        let ports: Vec<u64> = ports.map(|port| port["port"].as_u64().expect("a port")).collect();
        assert_eq!(ports, [&[53, 53], expect].concat(), "{values}");
    };
    let endpoint = |url: &str| json!({"otlp": {"endpoint": url}});
    check(json!({}), &[4317, 443, 6443]);
    check(endpoint("https://profiles.example.com"), &[443, 443, 6443]);
    check(endpoint("http://profiles.example.com/v1"), &[80, 443, 6443]);
    check(endpoint("http://[fd00::1]/v1"), &[80, 443, 6443]);
    check(endpoint("http://$(HOST_IP):14317"), &[14317, 443, 6443]);
    check(json!({"networkPolicy": {"receiverPorts": [8443]}}), &[8443, 443, 6443]);
    check(json!({"networkPolicy": {"apiServerPorts": [16443]}}), &[4317, 16443]);
    check(json!({"config": {"kubernetes": {"enabled": false}}}), &[4317]);
    let destinations = json!([{"endpoint": "http://a:4318"}, {"endpoint": "https://b:8443/x"}]);
    check(json!({"config": {"export": {"destinations": destinations}}}), &[4318, 8443, 443, 6443]);
    let servers = json!({"debuginfod": {"urls": ["https://debuginfod.example.com/"]}});
    check(json!({"config": {"symbolize": servers}}), &[4317, 443, 443, 6443]);
}

/// Whoever does not watch pods has neither rules nor a token; whoever lists receivers has no variables about another.
#[test]
fn what_is_not_used_is_not_there() {
    let Some(chart) = Chart::open("chart-unused") else { return };
    let objects = chart.render(KUBERNETES, &json!({"config": {"kubernetes": {"enabled": false}}}));
    assert_eq!(objects.kinds(), ["ConfigMap", "DaemonSet", "NetworkPolicy", "ServiceAccount"]);
    assert_eq!(objects.pod()["automountServiceAccountToken"], json!(false));
    let destinations = json!([{"endpoint": "http://a:4317"}]);
    let objects = chart.render(KUBERNETES, &json!({"config": {"export": {"destinations": destinations}}}));
    assert!(!objects.container()["env"].to_string().contains("OTEL_"), "{}", objects.container()["env"]);
}

/// With a certificate, whoever asks for the status page does so over TLS, and with a token, Prometheus has it; the agent finds
/// both where the Secret is mounted.
#[test]
fn the_status_page_is_kept_from_others() {
    let Some(chart) = Chart::open("chart-status") else { return };
    let render = |secret: Value| {
        let metrics =
            json!({"annotations": true, "podMonitor": {"enabled": true, "tlsConfig": {"serverName": "agent"}}});
        chart.render(KUBERNETES, &json!({"status": {"secret": secret}, "metrics": metrics}))
    };
    let endpoint = |objects: &Objects| objects.only("PodMonitor")["spec"]["podMetricsEndpoints"][0].clone();
    let open = render(json!({}));
    assert!(open.container()["livenessProbe"]["httpGet"]["scheme"].is_null());
    assert!(endpoint(&open)["scheme"].is_null() && endpoint(&open)["tlsConfig"].is_null());

    let kept = render(json!({"name": "s", "certKey": "tls.crt", "keyKey": "tls.key", "tokenKey": "token"}));
    for probe in ["livenessProbe", "readinessProbe"] {
        assert_eq!(kept.container()[probe]["httpGet"]["scheme"], "HTTPS");
    }
    let annotations = &kept.only("DaemonSet")["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["prometheus.io/scheme"], "https");
    let scrape = endpoint(&kept);
    assert_eq!((&scrape["scheme"], &scrape["tlsConfig"]), (&json!("https"), &json!({"serverName": "agent"})));
    assert_eq!(scrape["authorization"]["credentials"], json!({"name": "s", "key": "token"}));
    let mounts = kept.container()["volumeMounts"].as_array().expect("mounts");
    let mount = mounts.iter().find(|mount| mount["name"] == "status").expect("a mount");
    let folder = mount["mountPath"].as_str().expect("a path");
    for file in ["cert_file", "key_file", "token_file"] {
        assert!(kept.configuration().contains(&format!("{file}: {folder}/")), "{}", kept.configuration());
    }
    let token_alone = render(json!({"name": "s", "tokenKey": "token"}));
    assert!(endpoint(&token_alone)["scheme"].is_null() && !token_alone.configuration().contains("cert_file"));
    let refusal = chart.refusal(&json!({"status": {"secret": {"name": "s", "certKey": "tls.crt"}}}));
    assert!(refusal.contains("certKey and keyKey go together"), "{refusal}");
}

/// Versions and capabilities are told in several places, and are the same in all of them.
#[test]
fn places_agree() {
    let chart = workspace().join("deploy/helm/profiler-agent");
    let version = file(&chart.join("Chart.yaml"))["appVersion"].as_str().expect("a version").to_owned();
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    let values = file(&chart.join("values.yaml"));
    assert_eq!(texts(&values["securityContext"]["capabilities"]["add"]), CAPABILITIES);
    let unit = std::fs::read_to_string(workspace().join("deploy/systemd/profiler-agent.service")).expect("the unit");
    for setting in ["CapabilityBoundingSet", "AmbientCapabilities"] {
        let line = unit.lines().find_map(|line| line.strip_prefix(setting)?.strip_prefix('=')).expect(setting);
        let expected: Vec<String> = CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect();
        assert_eq!(line.split(' ').collect::<Vec<_>>(), expected, "{setting}");
    }
    assert_eq!(values["securityContext"]["allowPrivilegeEscalation"], json!(false));
    assert!(unit.lines().any(|line| line == "NoNewPrivileges=yes"), "{unit}");
}

//! Runs helm and kustomize on what `deploy/` has.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use profiler_tests::{
    run, scratch, stderr, stdout, workspace,
    yaml::{self, Value},
};

/// What the chart renders for unless told otherwise.
pub const KUBERNETES: &str = "1.34";

/// The chart, and the program that renders it.
pub struct Chart {
    helm: PathBuf,
    folder: PathBuf,
    /// For files of values.
    scratch: PathBuf,
}

impl Chart {
    /// `None`, said loudly, where there is no helm.
    pub fn open(test: &str) -> Option<Self> {
        let Some(helm) = find("helm") else {
            eprintln!("SKIPPED: there is no helm, in PATH or in target/kubernetes");
            return None;
        };
        Some(Self { helm, folder: workspace().join("deploy/helm/profiler-agent"), scratch: scratch(test) })
    }

    /// The values that it has by default.
    pub fn values(&self) -> Value {
        yaml::file(&self.folder.join("values.yaml"))
    }

    /// Another value for every one of them.
    pub fn every_value(&self) -> Value {
        yaml::file(&self.folder.join("ci/every-value-values.yaml"))
    }

    /// Runs a command of helm's on the chart, with these values over the defaults.
    pub fn helm(&self, command: &[&str], kubernetes: &str, values: &Value) -> Output {
        let file = self.scratch.join("values.yaml");
        // (JSON is YAML.)
        fs::write(&file, values.to_string()).expect("a file");
        let mut helm = Command::new(&self.helm);
        helm.args(command).arg(&self.folder).arg("--values").arg(file);
        // A cluster that this machine may know is none of the tests' business.
        helm.args(["--namespace", "profiler-agent", "--kube-version", kubernetes]).env("KUBECONFIG", "/nonexistent");
        run(&mut helm)
    }

    fn template(&self, kubernetes: &str, values: &Value) -> Output {
        self.helm(&["template", "profiler-agent"], kubernetes, values)
    }

    /// What the chart renders, as text.
    pub fn text(&self, kubernetes: &str, values: &Value) -> String {
        let output = self.template(kubernetes, values);
        assert!(output.status.success(), "{values}: {}", stderr(&output));
        stdout(&output)
    }

    /// The objects that it renders.
    pub fn render(&self, kubernetes: &str, values: &Value) -> Objects {
        Objects::of(&self.text(kubernetes, values))
    }

    /// Why it renders nothing.
    pub fn refusal(&self, values: &Value) -> String {
        let output = self.template(KUBERNETES, values);
        assert!(!output.status.success(), "{values} is accepted");
        stderr(&output)
    }
}

/// The objects of a folder in `deploy/manifests`; `None`, said loudly, where nothing on this machine can build them.
pub fn kustomize(folder: &str) -> Option<Objects> {
    let mut builders: Vec<Command> = Vec::new();
    builders.extend(find("kustomize").map(|kustomize| {
        let mut command = Command::new(kustomize);
        command.arg("build");
        command
    }));
    builders.extend(find("kubectl").map(|kubectl| {
        let mut command = Command::new(kubectl);
        command.arg("kustomize");
        command
    }));
    let Some(mut builder) = builders.into_iter().next() else {
        eprintln!("SKIPPED: there is neither kustomize nor kubectl, in PATH or in target/kubernetes");
        return None;
    };
    let output = run(builder.arg(workspace().join("deploy/manifests").join(folder)));
    assert!(output.status.success(), "{builder:?}: {}", stderr(&output));
    Some(Objects::of(&stdout(&output)))
}

/// A program that the tests of Kubernetes have built, or that somebody has installed.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = [workspace().join("target/kubernetes")].into_iter().chain(std::env::split_paths(&path));
    folders.map(|folder| folder.join(program)).find(|program| program.is_file())
}

/// Objects of Kubernetes.
pub struct Objects(pub Vec<Value>);

impl Objects {
    fn of(text: &str) -> Self {
        Self(yaml::documents(text))
    }

    /// The kinds, sorted.
    pub fn kinds(&self) -> Vec<&str> {
        let mut kinds: Vec<&str> = self.0.iter().map(|object| object["kind"].as_str().expect("a kind")).collect();
        kinds.sort_unstable();
        kinds
    }

    /// The only object of a kind.
    pub fn only(&self, kind: &str) -> &Value {
        let mut objects = self.0.iter().filter(|object| object["kind"] == kind);
        let object = objects.next().unwrap_or_else(|| panic!("no {kind} in {:?}", self.kinds()));
        assert!(objects.next().is_none(), "more than one {kind}");
        object
    }

    /// The pod that the DaemonSet makes.
    pub fn pod(&self) -> &Value {
        &self.only("DaemonSet")["spec"]["template"]["spec"]
    }

    /// Its container.
    pub fn container(&self) -> &Value {
        let containers = self.pod()["containers"].as_array().expect("containers");
        assert_eq!(containers.len(), 1, "{containers:?}");
        &containers[0]
    }

    /// The agent's configuration.
    pub fn configuration(&self) -> &str {
        self.only("ConfigMap")["data"]["config.yaml"].as_str().expect("a configuration")
    }
}

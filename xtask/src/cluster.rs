//! The Kubernetes that tests talk to: its API server and the clients that people install things with, built from
//! `tests/kubernetes`.

use std::path::Path;

use crate::{Outcome, go::Module, process::output};

/// Builds what is missing or older than its sources.
pub(crate) fn build(workspace: &Path) -> Outcome {
    let kubernetes = Module {
        sources: workspace.join("tests/kubernetes"),
        folder: workspace.join("target/kubernetes"),
        packages: &[
            "k8s.io/kubernetes/cmd/kube-apiserver",
            "k8s.io/kubernetes/cmd/kubectl",
            "helm.sh/helm/v3/cmd/helm",
        ],
        variables,
    };
    kubernetes.build("no test talks to Kubernetes")
}

/// The version, which charts ask for: modules do not have their own.
fn variables(module: &Module) -> String {
    let version = output(module.go().args(["list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes"]));
    let version = version.unwrap_or_default().trim().to_owned();
    let mut numbers = version.trim_start_matches('v').split('.');
    let mut number = || numbers.next().unwrap_or_default();
    format!(
        "-X k8s.io/component-base/version.gitVersion={version} -X k8s.io/component-base/version.gitMajor={} \
         -X k8s.io/component-base/version.gitMinor={}",
        number(),
        number()
    )
}

//! Flags about whose samples are.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;

use crate::{
    config::{InCluster, Kubernetes, KubernetesOverrides, LabelOverrides, Labels, Surroundings},
    control::label_options,
    label,
    redact::Redaction,
    status::Stats,
};

/// Where pods' metadata comes from.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Kubernetes")]
pub(super) struct KubernetesOptions {
    /// Whether the API server is asked for pods. By default auto: in a cluster, or with a kubeconfig.
    #[arg(long, env = "PROFILER_KUBERNETES", value_enum, value_name = "WHETHER")]
    kubernetes: Option<InCluster>,
    /// The node whose pods are asked for. By default what NODE_NAME or K8S_NODE_NAME says.
    #[arg(long, env = "PROFILER_NODE", value_name = "NAME")]
    node: Option<String>,
    /// File that tells how the API server is reached, outside of a cluster. KUBECONFIG is read with --kubernetes true alone.
    #[arg(long, env = "PROFILER_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

/// Attributes of samples.
#[derive(Args, Debug)]
#[command(next_help_heading = "Labels")]
pub(super) struct LabelOptions {
    /// How long metadata of a container that has just appeared is waited for. By default 5s.
    #[arg(
        long,
        env = "PROFILER_KUBERNETES_WAIT",
        value_name = "DURATION",
        value_parser = humantime::parse_duration,
        help_heading = "Kubernetes"
    )]
    kubernetes_wait: Option<Duration>,
    /// How long pods that are gone are remembered. By default 60s.
    #[arg(
        long,
        env = "PROFILER_KUBERNETES_GRACE",
        value_name = "DURATION",
        value_parser = humantime::parse_duration,
        help_heading = "Kubernetes"
    )]
    kubernetes_grace: Option<Duration>,
    /// Attribute of every sample; may be given several times. What OTEL_RESOURCE_ATTRIBUTES says is added where nothing else
    /// says it.
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<String>,
    /// Labels of pods that become attributes (k8s.pod.label.…), `*` for any characters; may be given several times.
    #[arg(long = "pod-label", value_name = "PATTERN")]
    pod_labels: Vec<String>,
    /// Annotations of pods that become attributes (k8s.pod.annotation.…).
    #[arg(long = "pod-annotation", value_name = "PATTERN")]
    pod_annotations: Vec<String>,
    /// Name services by the labels app.kubernetes.io/instance and app.kubernetes.io/name.
    #[arg(
        long,
        env = "PROFILER_SERVICE_FROM_LABELS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    service_from_labels: Option<bool>,
}

impl KubernetesOptions {
    /// As the configuration has it, with what surrounds us.
    pub(super) fn overrides(self) -> KubernetesOverrides {
        KubernetesOverrides {
            enabled: self.kubernetes,
            node: self.node,
            kubeconfig: self.kubeconfig,
            wait: None,
            grace: None,
            surroundings: Surroundings::read(),
        }
    }
}

impl LabelOptions {
    /// As the configuration has it, with OpenTelemetry's variable.
    pub(super) fn overrides(
        self,
        kubernetes: KubernetesOptions,
    ) -> anyhow::Result<(KubernetesOverrides, LabelOverrides)> {
        let kubernetes =
            KubernetesOverrides { wait: self.kubernetes_wait, grace: self.kubernetes_grace, ..kubernetes.overrides() };
        let extra = self.labels.iter().map(|text| {
            let (name, value) = text.split_once('=').context("--label: it is not of the form NAME=VALUE")?;
            Ok((name.trim().to_owned(), value.trim().to_owned()))
        });
        let labels = LabelOverrides {
            extra: extra.collect::<anyhow::Result<_>>()?,
            pod_labels: self.pod_labels,
            pod_annotations: self.pod_annotations,
            service_from_labels: self.service_from_labels,
            resource_attributes: None,
        };
        Ok((kubernetes, labels.with_environment()))
    }
}

/// For a recording: nothing is redacted, since it stays here; pods where there is a cluster that tells which node this is, and
/// nothing is said where there is none.
pub(super) fn of_recording(stats: &Stats) -> label::Options {
    let surroundings = Surroundings::read();
    let kubernetes = if surroundings.is_in_cluster && surroundings.node.is_some() {
        let overrides = KubernetesOverrides { surroundings, ..KubernetesOverrides::default() };
        Kubernetes::of_environment(overrides).ok().flatten()
    } else {
        None
    };
    label_options(kubernetes, Labels::default(), Redaction::default(), None, stats).unwrap_or_default()
}

//! Where pods' metadata comes from: whether there is a cluster, which node this is, and how its API server is reached.

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use anyhow::{bail, ensure};
use clap::ValueEnum;
use serde::Deserialize;
use tracing::warn;

use super::export::{choice, duration, within};
use crate::label::kubernetes::Access;

const DEFAULT_WAIT: Duration = Duration::from_secs(5);
/// The labeller waits for so long at most while windows queue behind it.
const WAIT_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(60);
const DEFAULT_GRACE: Duration = Duration::from_secs(60);
const GRACE_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(3600);
/// Where Kubernetes puts a service account's token.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Variables that manifests set to the node's name.
const NODE_VARIABLES: [&str; 2] = ["NODE_NAME", "K8S_NODE_NAME"];

/// Whether pods are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum InCluster {
    /// In a cluster, or where a kubeconfig is named.
    #[default]
    Auto,
    /// Always; without what that takes, the agent does not start.
    True,
    /// Never.
    False,
}

/// Where pods' metadata comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubernetes {
    /// How the API server is reached.
    pub access: Access,
    /// The node whose pods they are.
    pub node: String,
    /// How long the metadata of a new container is waited for.
    pub wait: Duration,
    /// How long pods that are gone are remembered.
    pub grace: Duration,
}

/// What flags say.
#[derive(Clone, Debug, Default)]
pub struct KubernetesOverrides {
    /// Whether pods are asked for.
    pub enabled: Option<InCluster>,
    /// The node's name.
    pub node: Option<String>,
    /// How the API server is reached.
    pub kubeconfig: Option<PathBuf>,
    /// How long the metadata of a new container is waited for.
    pub wait: Option<Duration>,
    /// How long pods that are gone are remembered.
    pub grace: Option<Duration>,
    /// What the environment says.
    pub surroundings: Surroundings,
}

/// What tells whether we run in a cluster.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Kubernetes says where its API server is, and gave us a token.
    pub is_in_cluster: bool,
    /// The node's name, as manifests give it.
    pub node: Option<String>,
    /// `KUBECONFIG`, which only counts where somebody asks for Kubernetes: shells of administrators have it.
    pub kubeconfig: Option<PathBuf>,
}

impl KubernetesOverrides {
    /// Whether there is a cluster, or somebody says so.
    pub fn is_asked_for(&self) -> bool {
        let is_possible = self.kubeconfig.is_some() || self.surroundings.is_in_cluster;
        self.enabled
            .map_or(is_possible, |enabled| enabled == InCluster::True || enabled == InCluster::Auto && is_possible)
    }
}

impl Surroundings {
    /// Those of this process.
    pub fn read() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        Self {
            is_in_cluster: variable("KUBERNETES_SERVICE_HOST").is_some() && std::path::Path::new(TOKEN).exists(),
            node: NODE_VARIABLES.into_iter().find_map(variable),
            kubeconfig: variable("KUBECONFIG").map(PathBuf::from),
        }
    }
}

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    enabled: Option<Enabled>,
    node: Option<String>,
    kubeconfig: Option<PathBuf>,
    wait: Option<String>,
    grace: Option<String>,
}

/// YAML has words for yes and no.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Enabled {
    Flag(bool),
    Word(String),
}

impl Kubernetes {
    /// What flags and surroundings say, without a file.
    pub fn of_environment(flags: KubernetesOverrides) -> anyhow::Result<Option<Self>> {
        Self::merge(Section::default(), flags)
    }

    /// Puts flags over the file and over what surrounds us. `None`: pods are not asked for.
    pub(super) fn merge(file: Section, flags: KubernetesOverrides) -> anyhow::Result<Option<Self>> {
        let time = |key: &str, flag: Option<Duration>, text: &Option<String>, default, range: &RangeInclusive<_>| {
            let time = match (flag, text) {
                (Some(time), _) => time,
                (None, Some(text)) => duration(key, text, "5s or 1m")?,
                (None, None) => default,
            };
            within(key, time, range)?;
            anyhow::Ok(time)
        };
        let wait = time("kubernetes.wait", flags.wait, &file.wait, DEFAULT_WAIT, &WAIT_RANGE)?;
        let grace = time("kubernetes.grace", flags.grace, &file.grace, DEFAULT_GRACE, &GRACE_RANGE)?;
        let enabled = match (flags.enabled, file.enabled) {
            (Some(enabled), _) => enabled,
            (None, Some(Enabled::Flag(true))) => InCluster::True,
            (None, Some(Enabled::Flag(false))) => InCluster::False,
            (None, Some(Enabled::Word(word))) => choice("kubernetes.enabled", &word)?,
            (None, None) => InCluster::Auto,
        };
        let surroundings = flags.surroundings;
        let named = flags.kubeconfig.or(file.kubeconfig).filter(|path| !path.as_os_str().is_empty());
        let access = match named {
            Some(path) => Some(Access::Kubeconfig(path)),
            None if surroundings.is_in_cluster => Some(Access::InCluster),
            None if enabled == InCluster::True => surroundings.kubeconfig.map(Access::Kubeconfig),
            None => None,
        };
        let is_named = |node: &String| !node.trim().is_empty();
        let node = flags.node.filter(is_named).or(file.node.filter(is_named)).or(surroundings.node);
        if let Some(node) = &node {
            valid_node(node)?;
        }
        match (enabled, access, node) {
            (InCluster::False, ..) | (InCluster::Auto, None, _) => Ok(None),
            (_, Some(access), Some(node)) => Ok(Some(Self { access, node, wait, grace })),
            (InCluster::Auto, Some(_), None) => {
                warn!("pods are not known: {MISSING_NODE}");
                Ok(None)
            }
            (InCluster::True, _, None) => bail!("kubernetes.node: {MISSING_NODE}"),
            (InCluster::True, None, _) => bail!(
                "kubernetes.enabled: there is no way to an API server: run in a pod with a service account \
                 (automountServiceAccountToken), or name a file in kubernetes.kubeconfig"
            ),
        }
    }
}

/// What is missing, and the way out.
pub const MISSING_NODE: &str =
    "the node's name is not known: set NODE_NAME from the field spec.nodeName in the pod's manifest, or --node";

/// Node names are DNS names, and are put into requests.
fn valid_node(node: &str) -> anyhow::Result<()> {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    ensure!(
        (1..=253).contains(&node.len()) && node.bytes().all(is_allowed),
        "kubernetes.node: {node:?} is no name of a node: lower-case letters, digits, '-' and '.', 253 at most"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(node: Option<&str>) -> KubernetesOverrides {
        let surroundings =
            Surroundings { is_in_cluster: true, node: node.map(str::to_owned), kubeconfig: Some("/shell".into()) };
        KubernetesOverrides { surroundings, ..KubernetesOverrides::default() }
    }

    fn check(yaml: &str, flags: KubernetesOverrides, expect: Result<Option<(Access, &str)>, &str>) {
        let section = if yaml.is_empty() { Ok(Section::default()) } else { serde_saphyr::from_str(yaml) };
        let section = section.expect("a section");
        match (Kubernetes::merge(section, flags), expect) {
            (Ok(merged), Ok(expect)) => {
                let merged = merged.map(|kubernetes| (kubernetes.access, kubernetes.node));
                assert_eq!(merged, expect.map(|(access, node)| (access, node.to_owned())), "{yaml:?}");
            }
            (Err(error), Err(expected)) => {
                let text = format!("{error:#}");
                assert!(text.contains(expected), "{yaml:?}: {text:?} does not say {expected:?}");
            }
            (merged, expected) => panic!("{yaml:?}: {merged:?} instead of {expected:?}"),
        }
    }

    fn file(path: &str) -> Access {
        Access::Kubeconfig(path.into())
    }

    /// By default pods are asked for where there is a cluster, and who insists is told what is missing.
    #[test]
    fn kubernetes_is_found_out() {
        let outside = KubernetesOverrides::default;
        check("", outside(), Ok(None));
        check("", cluster(Some("n1")), Ok(Some((Access::InCluster, "n1"))));
        check("", cluster(None), Ok(None));
        check("enabled: false\n", cluster(Some("n1")), Ok(None));
        check("enabled: auto\nnode: n2\n", cluster(Some("n1")), Ok(Some((Access::InCluster, "n2"))));
        check("kubeconfig: /k\nnode: n2\n", outside(), Ok(Some((file("/k"), "n2"))));
        check("enabled: true\n", outside(), Err("NODE_NAME"));
        check("enabled: true\nnode: n\n", outside(), Err("service account"));
        let flags = KubernetesOverrides { enabled: Some(InCluster::False), ..cluster(Some("n")) };
        check("enabled: true\n", flags, Ok(None));
    }

    /// An administrator's KUBECONFIG is used where Kubernetes is asked for, and not by chance.
    #[test]
    fn kubeconfig_of_the_shell_has_to_be_asked_for() {
        let shell = || {
            let mut flags = cluster(Some("n"));
            flags.surroundings.is_in_cluster = false;
            flags
        };
        check("", shell(), Ok(None));
        check("enabled: true\n", shell(), Ok(Some((file("/shell"), "n"))));
    }

    /// Every refusal names the setting.
    #[test]
    fn refusals_name_the_setting() {
        check("enabled: perhaps\n", cluster(None), Err("kubernetes.enabled"));
        check("node: Not_A_Name\n", cluster(None), Err("kubernetes.node"));
        check("node: 'n,metadata.name=x'\n", cluster(None), Err("kubernetes.node"));
        check("wait: soon\n", cluster(None), Err("kubernetes.wait"));
        check("wait: 1h\n", cluster(None), Err("kubernetes.wait"));
        check("grace: 1d\n", cluster(None), Err("kubernetes.grace"));
    }
}

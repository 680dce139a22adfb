//! `/debug/state`: what the agent knows now, as JSON for people and scripts.

use std::sync::Arc;

use serde::Serialize;

use super::Stats;
use crate::{
    label::kubernetes::{ContainerNames, Pods, Snapshot},
    profile::Cgroup,
};

/// Cgroups that are listed at most, the youngest first.
const MAX_CGROUPS: usize = 2_000;

#[derive(Serialize)]
struct State<'a> {
    version: &'a str,
    sampling: bool,
    cpus: usize,
    processes: usize,
    /// The pods of this node; absent where there is no cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes: Option<Snapshot>,
    cgroups: usize,
    /// Cgroups of containers and pods.
    containers: Vec<Container<'a>>,
    #[serde(skip_serializing_if = "is_zero")]
    containers_left_out: usize,
}

/// A cgroup of a container or a pod.
#[derive(Serialize)]
struct Container<'a> {
    cgroup: &'a str,
    cgroup_id: u64,
    /// IDs of the containers that it is in, the outermost first.
    ids: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_uid: Option<&'a str>,
    /// Since when it is known, seconds.
    known_seconds: u64,
    /// What the API server says of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<ContainerNames>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// What is known, as JSON.
pub(super) fn render(stats: &Stats) -> String {
    let pods = stats.pods();
    let mut cgroups = stats.containers();
    cgroups.sort_by(|a, b| b.known_since.cmp(&a.known_since).then_with(|| a.path.cmp(&b.path)));
    let left_out = cgroups.len().saturating_sub(MAX_CGROUPS);
    cgroups.truncate(MAX_CGROUPS);
    let state = State {
        version: env!("CARGO_PKG_VERSION"),
        sampling: stats.is_ready(),
        cpus: stats.cpus(),
        processes: stats.table().processes,
        kubernetes: pods.as_ref().map(Pods::snapshot),
        cgroups: stats.cgroups().known,
        containers: cgroups.iter().map(|cgroup| container(cgroup, pods.as_ref())).collect(),
        containers_left_out: left_out,
    };
    // SANITY: text and numbers only.
    serde_json::to_string_pretty(&state).unwrap_or_default() + "\n"
}

fn container<'a>(cgroup: &'a Arc<Cgroup>, pods: Option<&Pods>) -> Container<'a> {
    Container {
        cgroup: &cgroup.path,
        cgroup_id: cgroup.id.0,
        ids: cgroup.containers.iter().map(|id| &**id).collect(),
        pod_uid: cgroup.pod_uid.as_deref(),
        known_seconds: cgroup.known_since.elapsed().as_secs(),
        pod: pods.and_then(|pods| cgroup.containers.iter().find_map(|id| pods.container(id))),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{cgroups::CgroupStats, profile::CgroupId};

    /// Containers are listed, the youngest first, and no more than a page of them.
    #[test]
    fn lists_containers() {
        let stats = Stats::default();
        let cgroup = |id: u64| {
            Arc::new(Cgroup {
                id: CgroupId(id),
                path: format!("/docker/{id}").into(),
                containers: [format!("{id}").into()].into(),
                pod_uid: None,
                unit: None,
                known_since: Instant::now(),
            })
        };
        let known = MAX_CGROUPS as u64 + 3;
        stats.set_cgroups(CgroupStats::default(), Some((0..known).map(cgroup).collect()));
        let state: serde_json::Value = serde_json::from_str(&render(&stats)).expect("JSON");
        assert_eq!(state["containers"].as_array().expect("a list").len(), MAX_CGROUPS);
        assert_eq!(state["containers_left_out"], 3);
        assert_eq!(state["containers"][0]["ids"][0], (known - 1).to_string());
        assert!(state.get("kubernetes").is_none());
    }
}

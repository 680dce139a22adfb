//! Pods as the API server writes them (JSON), and what is kept of one.
//!
//! Everything in it was written by others: the kubelet, controllers, and whoever made the pod. What is not asked for is
//! passed over while the text is read, `managedFields` among it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Deserialize;

use crate::{
    label::{image::Image, text},
    pattern::Pattern,
};

/// Annotations that say what attributes are, by the attributes' names
/// (<https://opentelemetry.io/docs/specs/semconv/non-normative/k8s-attributes/>).
const STATED: &str = "resource.opentelemetry.io/";
/// The annotation of a static pod's mirror that has the ID by which the pod's cgroup is called.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// The label by which a Deployment tells its ReplicaSets apart; their names end in it.
const TEMPLATE_HASH: &str = "pod-template-hash";
/// Attributes that annotations state, and attributes of chosen labels and annotations, of one pod.
const MAX_ATTRIBUTES: usize = 64;
/// IDs of containers that are taken from one pod's status.
const MAX_CONTAINERS: usize = 256;
/// Bytes of names and IDs: Kubernetes allows 253.
const MAX_ID: usize = 253;

/// What pods tell besides their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Labels that become attributes.
    pub labels: Vec<Pattern>,
    /// Annotations that become attributes.
    pub annotations: Vec<Pattern>,
    /// Whether services are named by the labels `app.kubernetes.io/…`.
    pub service_from_labels: bool,
    /// Labels that the scope asks about: kept whatever else there is, since captures by hand may ask about any.
    pub scope_labels: BTreeSet<String>,
    /// Annotations that the scope asks about.
    pub scope_annotations: BTreeSet<String>,
}

/// What is kept of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(super) namespace: Box<str>,
    pub(super) name: Box<str>,
    pub(super) uid: Box<str>,
    /// What a static pod is called in paths of cgroups.
    pub(super) config_hash: Option<Box<str>>,
    /// What runs it: attributes' names and values, from the ancestor to the descendant.
    pub(super) workload: Vec<(&'static str, Box<str>)>,
    /// The kind and the name of what it is a replica of: `Deployment/web`.
    pub(super) owner: Option<Box<str>>,
    /// Service and version as labels have them.
    pub(super) service: Option<Box<str>>,
    pub(super) version: Option<Box<str>>,
    /// Attributes as annotations state them.
    pub(super) stated: Vec<(Box<str>, Box<str>)>,
    /// Attributes of labels and annotations that were asked for.
    pub(super) chosen: Vec<(Box<str>, Box<str>)>,
    /// Labels, first of all those that the scope asks about, and annotations that it asks about.
    pub(super) scope_labels: Vec<(Box<str>, Box<str>)>,
    pub(super) scope_annotations: Vec<(Box<str>, Box<str>)>,
}

/// What is kept of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Container {
    pub(super) name: Box<str>,
    pub(super) image: Option<Box<str>>,
    pub(super) tag: Option<Box<str>>,
    /// What the image's name says of its version.
    pub(super) version: Option<Box<str>>,
    /// The image's name with its digest, as the runtime found it.
    pub(super) repo_digest: Option<Box<str>>,
    /// The image's ID, where the runtime knows nothing else.
    pub(super) image_id: Option<Box<str>>,
}

/// A pod and its containers' IDs, as one object states them.
#[derive(Debug, Default)]
pub(crate) struct Stated {
    pub(crate) pod: Pod,
    pub(crate) containers: Vec<(Arc<str>, Arc<Container>)>,
    /// What the API server counts with; empty: it does not say.
    pub(super) version: Box<str>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Object {
    metadata: Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: String,
    namespace: String,
    uid: String,
    resource_version: String,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<Owner>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Owner {
    api_version: String,
    kind: String,
    name: String,
    controller: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    containers: Option<Vec<ContainerSpec>>,
    init_containers: Option<Vec<ContainerSpec>>,
    ephemeral_containers: Option<Vec<ContainerSpec>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ContainerSpec {
    name: String,
    image: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    container_statuses: Option<Vec<ContainerStatus>>,
    init_container_statuses: Option<Vec<ContainerStatus>>,
    ephemeral_container_statuses: Option<Vec<ContainerStatus>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerStatus {
    name: String,
    #[serde(rename = "containerID")]
    container_id: Option<String>,
    image: String,
    #[serde(rename = "imageID")]
    image_id: String,
    state: Option<State>,
    last_state: Option<State>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct State {
    terminated: Option<Terminated>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Terminated {
    #[serde(rename = "containerID")]
    container_id: Option<String>,
}

/// An event about a pod.
#[derive(Deserialize)]
struct Event {
    object: Object,
}

/// Reads a pod. The error is one line.
pub(crate) fn parse(json: &[u8], wanted: &Wanted) -> Result<Stated, Box<str>> {
    checked(serde_json::from_slice(json), wanted)
}

/// Reads the pod that an event of a watch is about.
pub(super) fn parse_event(json: &[u8], wanted: &Wanted) -> Result<Stated, Box<str>> {
    checked(serde_json::from_slice(json).map(|event: Event| event.object), wanted)
}

fn checked(object: serde_json::Result<Object>, wanted: &Wanted) -> Result<Stated, Box<str>> {
    let object = object.map_err(|error| text::clean(&error.to_string(), 200))?;
    let mut metadata = object.metadata;
    let version = std::mem::take(&mut metadata.resource_version).into();
    if metadata.uid.is_empty() || metadata.uid.len() > MAX_ID {
        return Err("a pod has a UID".into());
    }
    let containers = containers(&object.spec.unwrap_or_default(), &object.status.unwrap_or_default());
    Ok(Stated { pod: pod(metadata, wanted), containers, version })
}

fn pod(metadata: Metadata, wanted: &Wanted) -> Pod {
    let labels = metadata.labels.unwrap_or_default();
    let annotations = metadata.annotations.unwrap_or_default();
    let label = |name: &str| labels.get(name).filter(|value| !value.is_empty());
    let well_known = |name: &str| label(name).filter(|_| wanted.service_from_labels).map(|value| text::value(value));
    let owners = metadata.owner_references.unwrap_or_default();
    let owner = owners.iter().find(|owner| owner.controller == Some(true)).or(owners.first());
    let stated = annotations.iter().filter_map(|(key, value)| Some((key.strip_prefix(STATED)?, value)));
    let chosen = |prefix: &'static str, patterns: &[Pattern], from: &BTreeMap<String, String>| {
        let chosen = from.iter().filter(|(key, _)| Pattern::any(patterns, key));
        chosen.map(|(key, value)| (text::name(&format!("{prefix}{key}")), text::value(value))).collect::<Vec<_>>()
    };
    let mut all_chosen = chosen("k8s.pod.label.", &wanted.labels, &labels);
    all_chosen.extend(chosen("k8s.pod.annotation.", &wanted.annotations, &annotations));
    all_chosen.truncate(MAX_ATTRIBUTES);
    all_chosen.shrink_to_fit();
    Pod {
        namespace: text::clean(&metadata.namespace, MAX_ID),
        name: text::clean(&metadata.name, MAX_ID),
        uid: text::clean(&metadata.uid, MAX_ID),
        config_hash: annotations.get(CONFIG_HASH).filter(|hash| !hash.is_empty()).map(|hash| text::clean(hash, MAX_ID)),
        workload: owner.map(|owner| workload(owner, label(TEMPLATE_HASH))).unwrap_or_default(),
        owner: owner.and_then(|owner| replica_of(owner, label(TEMPLATE_HASH))),
        service: well_known("app.kubernetes.io/instance").or_else(|| well_known("app.kubernetes.io/name")),
        version: well_known("app.kubernetes.io/version"),
        stated: stated
            .filter(|(name, value)| !name.is_empty() && !value.is_empty())
            .map(|(name, value)| (text::name(name), text::value(value)))
            .take(MAX_ATTRIBUTES)
            .collect(),
        chosen: all_chosen,
        scope_labels: labels_for_scopes(&wanted.scope_labels, &labels),
        scope_annotations: asked_for(&wanted.scope_annotations, &annotations),
    }
}

/// Values by name, of the names that somebody asks about.
fn asked_for(names: &BTreeSet<String>, from: &BTreeMap<String, String>) -> Vec<(Box<str>, Box<str>)> {
    names.iter().filter_map(|name| Some((name.as_str().into(), text::value(from.get(name)?)))).collect()
}

/// The kind and the name of what a pod is a replica of: its owner, or that one's owner where names tell. (A static pod's is
/// its node, which runs no two of the same.)
fn replica_of(owner: &Owner, template_hash: Option<&String>) -> Option<Box<str>> {
    let (kind, name) = match workload(owner, template_hash).first() {
        Some(("k8s.deployment.name", name)) => ("Deployment", name.clone()),
        Some(("k8s.cronjob.name", name)) => ("CronJob", name.clone()),
        _ => (owner.kind.as_str(), text::clean(&owner.name, MAX_ID)),
    };
    (kind != "Node" && !name.is_empty()).then(|| format!("{}/{name}", text::clean(kind, MAX_ID)).into())
}

/// Labels with their values: those that somebody asks about, and as many others as there is room for.
fn labels_for_scopes(names: &BTreeSet<String>, labels: &BTreeMap<String, String>) -> Vec<(Box<str>, Box<str>)> {
    let mut kept = asked_for(names, labels);
    let room = MAX_ATTRIBUTES.saturating_sub(kept.len());
    let others = labels.iter().filter(|(name, _)| !names.contains(*name)).take(room);
    kept.extend(others.map(|(name, value)| (text::name(name), text::value(value))));
    kept.shrink_to_fit();
    kept
}

/// What runs a pod, as far as its owner's name tells.
fn workload(owner: &Owner, template_hash: Option<&String>) -> Vec<(&'static str, Box<str>)> {
    let group = owner.api_version.split_once('/').map_or("", |(group, _)| group);
    let attribute = |name, value: &str| (name, text::clean(value, MAX_ID));
    let name = owner.name.as_str();
    let workload: Vec<_> = match (group, owner.kind.as_str()) {
        ("apps", "ReplicaSet") => {
            let hash = template_hash.and_then(|hash| name.strip_suffix(hash.as_str())?.strip_suffix('-'));
            let deployment = hash.filter(|name| !name.is_empty()).map(|name| attribute("k8s.deployment.name", name));
            deployment.into_iter().chain([attribute("k8s.replicaset.name", name)]).collect()
        }
        ("apps", "StatefulSet") => vec![attribute("k8s.statefulset.name", name)],
        ("apps", "DaemonSet") => vec![attribute("k8s.daemonset.name", name)],
        ("batch", "Job") => {
            let cron_job = cron_job(name).map(|name| attribute("k8s.cronjob.name", name));
            cron_job.into_iter().chain([attribute("k8s.job.name", name)]).collect()
        }
        ("", "ReplicationController") => vec![attribute("k8s.replicationcontroller.name", name)],
        _ => Vec::new(),
    };
    workload.into_iter().filter(|(_, name)| !name.is_empty()).collect()
}

/// A CronJob names its Jobs by the minute they are due (8 digits; before Kubernetes 1.21 the second, 10).
fn cron_job(job: &str) -> Option<&str> {
    let (name, time) = job.rsplit_once('-')?;
    let is_time = (8..=10).contains(&time.len()) && time.bytes().all(|digit| digit.is_ascii_digit());
    (is_time && !name.is_empty()).then_some(name)
}

/// Every container's IDs: the one that runs, and those that ran before, as long as the status has them.
fn containers(spec: &Spec, status: &Status) -> Vec<(Arc<str>, Arc<Container>)> {
    let specs = [&spec.containers, &spec.init_containers, &spec.ephemeral_containers];
    let statuses = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    let mut known = Vec::new();
    for status in statuses.into_iter().flatten().flatten() {
        let spec = specs.into_iter().flatten().flatten().find(|spec| spec.name == status.name);
        let terminated = |state: &Option<State>| state.as_ref()?.terminated.as_ref()?.container_id.clone();
        let ids = [status.container_id.clone(), terminated(&status.state), terminated(&status.last_state)];
        let mut ids: Vec<Arc<str>> = ids.iter().flatten().filter_map(|id| container_id(id)).collect();
        ids.dedup();
        if ids.is_empty() || known.len() + ids.len() > MAX_CONTAINERS {
            continue;
        }
        let container = Arc::new(container(status, spec));
        known.extend(ids.into_iter().map(|id| (id, Arc::clone(&container))));
    }
    known.shrink_to_fit();
    known
}

fn container(status: &ContainerStatus, spec: Option<&ContainerSpec>) -> Container {
    // What the user asked for; runtimes may write another name of the same image.
    let image = spec.and_then(|spec| Image::parse(&spec.image)).or_else(|| Image::parse(&status.image));
    // Docker's shim put a scheme before it.
    let id = status.image_id.split_once("://").map_or(status.image_id.as_str(), |(_, id)| id);
    let has_name = Image::parse(id).is_some_and(|image| image.digest.is_some());
    let id = Some(id).filter(|id| !id.is_empty()).map(text::value);
    Container {
        name: text::clean(&status.name, MAX_ID),
        image: image.map(|image| text::value(image.name)),
        tag: image.and_then(|image| image.tag).map(text::value),
        version: image.and_then(|image| image.version()).map(|version| text::value(&version)),
        repo_digest: id.clone().filter(|_| has_name),
        image_id: id.filter(|_| !has_name),
    }
}

/// The ID in `containerd://ID`.
fn container_id(text: &str) -> Option<Arc<str>> {
    let (_, id) = text.split_once("://")?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    ((1..=128).contains(&id.len()) && id.bytes().all(is_plain)).then(|| id.into())
}

impl Pod {
    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        let pairs = [&self.stated, &self.chosen, &self.scope_labels, &self.scope_annotations];
        let pairs = pairs.into_iter().flatten().map(|(name, value)| name.len() + value.len() + 32);
        let workload = self.workload.iter().map(|(_, value)| value.len() + 32);
        let texts = [&self.owner, &self.config_hash, &self.service, &self.version];
        size_of::<Self>()
            + self.namespace.len()
            + self.name.len()
            + self.uid.len()
            + pairs.sum::<usize>()
            + workload.sum::<usize>()
            + texts.into_iter().flatten().map(|text| text.len()).sum::<usize>()
    }
}

impl Container {
    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        let texts = [&self.image, &self.tag, &self.version, &self.repo_digest, &self.image_id];
        size_of::<Self>() + self.name.len() + texts.into_iter().flatten().map(|text| text.len()).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(api_version: &str, kind: &str, name: &str, hash: Option<&str>) -> Pod {
        let labels = hash.map(|hash| format!(r#","labels":{{"pod-template-hash":"{hash}"}}"#)).unwrap_or_default();
        let json = format!(
            r#"{{"metadata":{{"uid":"u","ownerReferences":[{{"apiVersion":"v1","kind":"Other","name":"x"}},
            {{"apiVersion":"{api_version}","kind":"{kind}","name":"{name}","controller":true}}]{labels}}}}}"#
        );
        parse(json.as_bytes(), &Wanted::default()).expect("a pod").pod
    }

    fn check_owner(owner: (&str, &str, &str, Option<&str>), expect: &[(&'static str, &str)]) {
        let expect: Vec<_> = expect.iter().map(|&(name, value)| (name, value.into())).collect();
        assert_eq!(owned(owner.0, owner.1, owner.2, owner.3).workload, expect, "{owner:?}");
    }

    /// What a pod is a replica of outlives it, and so is no ReplicaSet or Job where these have owners themselves.
    #[test]
    fn replicas_know_what_they_are_of() {
        for (owner, expect) in [
            (("apps/v1", "ReplicaSet", "web-5d4f8c", Some("5d4f8c")), Some("Deployment/web")),
            (("apps/v1", "ReplicaSet", "mine", Some("5d4f8c")), Some("ReplicaSet/mine")),
            (("batch/v1", "Job", "backup-29384710", None), Some("CronJob/backup")),
            (("batch/v1", "Job", "migrate-1", None), Some("Job/migrate-1")),
            (("example.org/v1", "Database", "a\\nb", None), Some("Database/a\u{fffd}b")),
            (("v1", "Node", "worker-1", None), None),
            (("apps/v1", "StatefulSet", "", None), None),
        ] {
            assert_eq!(owned(owner.0, owner.1, owner.2, owner.3).owner.as_deref(), expect, "{owner:?}");
        }
        let alone = parse(br#"{"metadata":{"uid":"u"}}"#, &Wanted::default()).expect("a pod").pod;
        assert_eq!(alone.owner, None);
    }

    /// What runs a pod is told from its owner's kind and name, and nothing is guessed.
    #[test]
    fn owners_tell_the_workload() {
        check_owner(
            ("apps/v1", "ReplicaSet", "web-5d4f8c", Some("5d4f8c")),
            &[("k8s.deployment.name", "web"), ("k8s.replicaset.name", "web-5d4f8c")],
        );
        check_owner(("apps/v1", "ReplicaSet", "web-5d4f8c", None), &[("k8s.replicaset.name", "web-5d4f8c")]);
        check_owner(("apps/v1", "ReplicaSet", "mine", Some("5d4f8c")), &[("k8s.replicaset.name", "mine")]);
        check_owner(("apps/v1", "StatefulSet", "db", None), &[("k8s.statefulset.name", "db")]);
        check_owner(("apps/v1", "DaemonSet", "agent", None), &[("k8s.daemonset.name", "agent")]);
        check_owner(("batch/v1", "Job", "migrate-1", None), &[("k8s.job.name", "migrate-1")]);
        check_owner(
            ("batch/v1", "Job", "backup-29384710", None),
            &[("k8s.cronjob.name", "backup"), ("k8s.job.name", "backup-29384710")],
        );
        check_owner(("v1", "ReplicationController", "old", None), &[("k8s.replicationcontroller.name", "old")]);
        check_owner(("v1", "Node", "worker-1", None), &[]);
        check_owner(("apps/v1", "StatefulSet", "", None), &[]);
        check_owner(("example.org/v1", "ReplicaSet", "x", None), &[]);
    }

    /// Containers of all kinds are known by every ID that their status has.
    #[test]
    fn containers_have_all_their_ids() {
        let json = br#"{"metadata":{"uid":"u","creationTimestamp":null,"managedFields":[{"f":{}}]},"spec":{
            "containers":[{"name":"app","image":"r:5000/app:1@sha256:aa"}],
            "initContainers":[{"name":"init","image":"busybox"}],
            "ephemeralContainers":[{"name":"debug","image":"tools:2"}]},
            "status":{"containerStatuses":[{"name":"app","containerID":"containerd://c3","image":"other",
                "imageID":"r:5000/app@sha256:aa","state":{"running":{}},
                "lastState":{"terminated":{"containerID":"containerd://c2"}}}],
            "initContainerStatuses":[{"name":"init","containerID":"containerd://c1",
                "imageID":"docker-pullable://busybox@sha256:bb",
                "state":{"terminated":{"containerID":"containerd://c1"}}}],
            "ephemeralContainerStatuses":[{"name":"debug","containerID":"cri-o://c4","imageID":"sha256:cc"},
                {"name":"waiting","state":{"waiting":{}}},{"name":"odd","containerID":"no scheme"},
                {"name":"odd","containerID":"x://a/b"}]}}"#;
        let stated = parse(json, &Wanted::default()).expect("a pod");
        let found: Vec<_> = stated.containers.iter().map(|(id, container)| (&**id, &*container.name)).collect();
        assert_eq!(found, [("c3", "app"), ("c2", "app"), ("c1", "init"), ("c4", "debug")]);
        let container = |index: usize| Container::clone(&stated.containers[index].1);
        let text = |text: &str| Some(text.into());
        assert_eq!(
            container(0),
            Container {
                name: "app".into(),
                image: text("r:5000/app"),
                tag: text("1"),
                version: text("1@sha256:aa"),
                repo_digest: text("r:5000/app@sha256:aa"),
                image_id: None,
            }
        );
        assert_eq!(container(2).repo_digest.as_deref(), Some("busybox@sha256:bb"));
        assert_eq!((container(3).repo_digest, container(3).image_id), (None, text("sha256:cc")));
    }

    /// Of labels and annotations, what was asked for is kept, cut to size.
    #[test]
    fn keeps_what_is_wanted() {
        let long = "x".repeat(5000);
        let json = format!(
            r#"{{"metadata":{{"uid":"u","name":"p","namespace":"n","labels":{{"team":"a\nb","app.kubernetes.io/name":"web",
            "app.kubernetes.io/version":"2","other":"x"}},"annotations":{{"kubernetes.io/config.hash":"h",
            "resource.opentelemetry.io/service.name":"shop","resource.opentelemetry.io/":"none",
            "notes/long":"{long}","secret":"s"}}}}}}"#
        );
        let wanted = Wanted { labels: vec!["te*".into()], annotations: vec!["notes/*".into()], ..Wanted::default() };
        let pod = parse(json.as_bytes(), &wanted).expect("a pod").pod;
        assert_eq!(pod.stated, [("service.name".into(), "shop".into())]);
        assert_eq!(pod.chosen[0], ("k8s.pod.label.team".into(), "a\u{fffd}b".into()));
        assert_eq!(
            (&*pod.chosen[1].0, pod.chosen[1].1.len(), pod.chosen.len()),
            ("k8s.pod.annotation.notes/long", 1024, 2)
        );
        assert_eq!((pod.config_hash.as_deref(), pod.service, pod.version), (Some("h"), None, None));
        let wanted = Wanted { service_from_labels: true, ..Wanted::default() };
        let pod = parse(json.as_bytes(), &wanted).expect("a pod").pod;
        assert_eq!((pod.service.as_deref(), pod.version.as_deref()), (Some("web"), Some("2")));
    }

    /// What the scope asks about is kept under its own name; of what it does not, labels are, since captures may ask.
    #[test]
    fn keeps_what_the_scope_asks_about() {
        let json =
            r#"{"metadata":{"uid":"u","labels":{"tier":"a\nb","team":"x"},"annotations":{"tier":"c","e/f":""}}}"#;
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let wanted = Wanted {
            scope_labels: names(&["tier", "absent"]),
            scope_annotations: names(&["e/f", "team"]),
            ..Wanted::default()
        };
        let pod = parse(json.as_bytes(), &wanted).expect("a pod").pod;
        assert_eq!(pod.scope_labels, [("tier".into(), "a\u{fffd}b".into()), ("team".into(), "x".into())]);
        assert_eq!((pod.scope_annotations, pod.chosen), (vec![("e/f".into(), "".into())], Vec::new()));
    }

    /// What is no pod is refused with one line.
    #[test]
    fn refuses_what_is_no_pod() {
        for json in ["", "[]", "{}", r#"{"metadata":{"uid":7}}"#, r#"{"metadata":{"uid":"u"},"spec":"none"}"#] {
            let refusal = parse(json.as_bytes(), &Wanted::default()).expect_err(json);
            assert!(!refusal.contains('\n') && refusal.len() <= 200);
        }
    }
}

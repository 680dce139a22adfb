//! Whose sample is it? Resource attributes by OpenTelemetry's semantic conventions.
//!
//! In: windows whose samples know their process and its cgroup. Out: the same with a resource each: the pod and container
//! as the cluster knows them, the container or the systemd service that the cgroup's path names, or else the process. What
//! nobody is to see is taken out first, and what the configuration says about attributes is applied last.

#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod host;
mod image;
pub mod kubernetes;
mod rules;
mod text;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

pub use self::rules::Rules;
use self::{
    kubernetes::{Found, Pods},
    rules::UNKNOWN_SERVICE,
};
use crate::{
    profile::{Cgroup, CgroupId, ProcessInfo, Profile, Resource, ResourceValue, Unlabelled},
    redact::Redaction,
    status::Count,
};

/// What samples are labelled with.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The pods of this node; `None`: there is no cluster.
    pub pods: Option<Pods>,
    /// How long the metadata of what has just appeared is waited for.
    pub wait: Duration,
    /// What is not shown to anybody.
    pub redact: Redaction,
    /// What the configuration says about attributes.
    pub rules: Rules,
    /// What is counted.
    pub stats: Arc<LabelStats>,
}

/// Whose samples were, and what that took.
#[derive(Debug, Default)]
pub struct LabelStats {
    samples: [Count; Owner::ALL.len()],
    /// Windows whose labels were waited for.
    pub waited: Count,
}

/// What a sample was found to belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A pod.
    Pod,
    /// A container of which nothing else is known.
    Container,
    /// A systemd service.
    Unit,
    /// The machine.
    Host,
}

impl Owner {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pod, Self::Container, Self::Unit, Self::Host];

    /// Its name in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Container => "container",
            Self::Unit => "systemd_unit",
            Self::Host => "host",
        }
    }
}

impl LabelStats {
    /// Samples by what they belong to.
    pub fn samples(&self) -> impl Iterator<Item = (Owner, u64)> {
        Owner::ALL.into_iter().zip(self.samples.iter().map(Count::get))
    }
}

/// Knows whose samples are.
pub struct Labeller {
    options: Options,
    /// What all samples of this machine have.
    host: Vec<(String, ResourceValue)>,
    /// Of the profile that is being labelled, by cgroup, and by the process's name where that names the service.
    resources: HashMap<(Option<CgroupId>, String), Arc<Resource>>,
    /// Of the profile that is being labelled.
    found: HashMap<CgroupId, Option<Found>>,
}

impl Labeller {
    /// Labels as `options` say.
    pub fn new(options: Options) -> Self {
        let host = host::attributes(options.pods.as_ref().map(Pods::node));
        Self { options, host, resources: HashMap::new(), found: HashMap::new() }
    }

    /// Labels a profile. What is not known yet but may be soon is waited for.
    pub fn label(&mut self, profile: Profile<Unlabelled>) -> Profile {
        self.resources.clear();
        self.found.clear();
        // First of all: services are named after processes.
        let profile = self.options.redact.apply(profile);
        if let Some(pods) = &self.options.pods
            && pods.wait_for(&in_pods(&profile), self.options.wait)
        {
            self.options.stats.waited.add(1);
        }
        for sample in &profile.samples {
            let owner = self.owner(&sample.process);
            self.options.stats.samples[owner as usize].add(sample.count);
        }
        profile.label(|process| self.resource(process))
    }

    fn owner(&mut self, process: &ProcessInfo) -> Owner {
        let Some(cgroup) = &process.cgroup else { return Owner::Host };
        match cgroup {
            cgroup if self.found(cgroup).is_some() => Owner::Pod,
            cgroup if !cgroup.containers.is_empty() => Owner::Container,
            cgroup if cgroup.unit.is_some() => Owner::Unit,
            _ => Owner::Host,
        }
    }

    /// The pod of a cgroup: one and the same for a whole profile.
    fn found(&mut self, cgroup: &Cgroup) -> Option<&Found> {
        let pods = self.options.pods.as_ref()?;
        self.found.entry(cgroup.id).or_insert_with(|| pods.find(cgroup)).as_ref()
    }

    fn resource(&mut self, process: &ProcessInfo) -> Arc<Resource> {
        let cgroup = process.cgroup.as_deref();
        let service = match self.owner(process) {
            Owner::Pod => None,
            Owner::Unit => cgroup.and_then(|cgroup| cgroup.unit.as_deref()).map(service_of_unit),
            Owner::Container | Owner::Host => Some(process.name.as_str()),
        };
        let key = (cgroup.map(|cgroup| cgroup.id), service.unwrap_or_default().to_owned());
        if let Some(resource) = self.resources.get(&key) {
            return Arc::clone(resource);
        }
        let found = cgroup.and_then(|cgroup| self.found(cgroup)).map(kubernetes::attributes);
        let mut attributes = found.unwrap_or_default();
        attributes.extend(self.host.iter().cloned());
        attributes.extend(cgroup.map(attributes_of_cgroup).unwrap_or_default());
        let service = service.filter(|service| !service.is_empty()).unwrap_or(UNKNOWN_SERVICE);
        attributes.push(("service.name".to_owned(), ResourceValue::Text(text::value(service))));
        let resource = Arc::new(Resource::new(self.options.rules.apply(attributes)));
        self.resources.insert(key, Arc::clone(&resource));
        resource
    }
}

/// Cgroups that are in pods, each once.
fn in_pods(profile: &Profile<Unlabelled>) -> Vec<Arc<Cgroup>> {
    let mut seen = HashSet::new();
    let cgroups = profile.samples.iter().filter_map(|sample| sample.process.cgroup.as_ref());
    cgroups.filter(|cgroup| cgroup.pod_uid.is_some() && seen.insert(cgroup.id)).cloned().collect()
}

/// What a cgroup's path tells, where nothing else is known.
fn attributes_of_cgroup(cgroup: &Cgroup) -> Vec<(String, ResourceValue)> {
    // The cgroup of a static pod is called by something that is no UID.
    let pod_uid = cgroup.pod_uid.as_deref().filter(|uid| uid.contains('-'));
    [
        ("container.id", cgroup.containers.last().map(|id| &**id)),
        ("k8s.pod.uid", pod_uid),
        ("systemd.unit", cgroup.unit.as_deref().filter(|_| cgroup.containers.is_empty())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), ResourceValue::Text(text::value(value?)))))
    .collect()
}

/// `nginx.service` is the service nginx.
fn service_of_unit(unit: &str) -> &str {
    unit.strip_suffix(".service").unwrap_or(unit)
}

#[cfg(test)]
mod tests {
    use std::time::{Instant, SystemTime};

    use profiler_common::abi::{
        process::ProcessKey,
        sample::{EventKind, StackEnd},
    };

    use super::*;
    use crate::profile::{Events, Sample};

    fn cgroup(id: u64, containers: &[&str], unit: Option<&str>) -> Arc<Cgroup> {
        Arc::new(Cgroup {
            id: CgroupId(id),
            path: "/".into(),
            containers: containers.iter().map(|&id| id.into()).collect(),
            pod_uid: None,
            unit: unit.map(Into::into),
            known_since: Instant::now(),
        })
    }

    fn profile(processes: &[(&str, Option<Arc<Cgroup>>)]) -> Profile<Unlabelled> {
        let sample = |(name, cgroup): &(&str, Option<Arc<Cgroup>>)| Sample {
            resource: Unlabelled,
            process: Arc::new(ProcessInfo {
                key: ProcessKey::default(),
                name: (*name).to_owned(),
                cgroup: cgroup.clone(),
            }),
            thread_name: "".into(),
            kind: EventKind::OnCpu,
            end: StackEnd::Root,
            frames: Vec::new(),
            count: 2,
            time_ns: 0,
        };
        Profile {
            events: Events::OnCpu,
            start: SystemTime::UNIX_EPOCH,
            duration: Duration::from_secs(1),
            period: Duration::from_millis(10),
            marks: Arc::default(),
            samples: processes.iter().map(sample).collect(),
        }
    }

    /// Without a cluster, services are systemd's, and otherwise processes; containers are known by their IDs.
    #[test]
    fn labels_by_cgroup_and_process() {
        let unit = cgroup(1, &[], Some("nginx.service"));
        let processes = [
            ("nginx", Some(Arc::clone(&unit))),
            ("worker", Some(unit)),
            ("app", Some(cgroup(2, &["outer", "inner"], None))),
            ("bash", Some(cgroup(3, &[], None))),
            ("", None),
        ];
        let options = Options::default();
        let stats = Arc::clone(&options.stats);
        let labelled = Labeller::new(options).label(profile(&processes));
        let told: Vec<_> = labelled
            .samples
            .iter()
            .map(|sample| ["service.name", "systemd.unit", "container.id"].map(|name| sample.resource.text(name)))
            .collect();
        let nginx = [Some("nginx"), Some("nginx.service"), None];
        assert_eq!(
            told,
            [
                nginx,
                nginx,
                [Some("app"), None, Some("inner")],
                [Some("bash"), None, None],
                [Some("unknown_service"), None, None]
            ]
        );
        assert!(Arc::ptr_eq(&labelled.samples[0].resource, &labelled.samples[1].resource));
        let counts: Vec<_> = stats.samples().map(|(owner, count)| (owner.label(), count)).collect();
        assert_eq!(counts, [("pod", 0), ("container", 2), ("systemd_unit", 4), ("host", 4)]);
        assert!(labelled.samples[0].resource.text("host.name").is_some());
    }

    /// The configuration has the last word.
    #[test]
    fn rules_come_last() {
        let rules = Rules {
            extra: [("host.name".to_owned(), "mine".to_owned())].into(),
            deny: vec!["os.*".into()],
            ..Rules::default()
        };
        let labelled = Labeller::new(Options { rules, ..Options::default() }).label(profile(&[("a", None)]));
        let resource = &labelled.samples[0].resource;
        assert_eq!((resource.text("host.name"), resource.text("os.type")), (Some("mine"), None));
    }
}

//! Whose sample is it? Resource attributes by OpenTelemetry's semantic conventions.
//!
//! So far the service is the process's name, and the resource says which host it ran on.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use crate::profile::{CgroupId, ProcessInfo, Profile, Resource, ResourceValue, Unlabelled};

/// What samples are labelled with.
#[derive(Clone, Debug, Default)]
pub struct Options {}

/// Knows whose samples are.
pub struct Labeller {
    /// Of the profile that is being labelled, by cgroup and name of the process.
    resources: HashMap<(Option<CgroupId>, String), Arc<Resource>>,
}

impl Labeller {
    /// Labels as `options` say.
    pub fn new(_options: Options) -> Self {
        Self { resources: HashMap::new() }
    }

    /// Labels a profile. What is not known yet but may be soon is waited for.
    pub fn label(&mut self, profile: Profile<Unlabelled>) -> Profile {
        self.resources.clear();
        profile.label(|process| self.resource(process))
    }

    fn resource(&mut self, process: &ProcessInfo) -> Arc<Resource> {
        let key = (process.cgroup.as_ref().map(|cgroup| cgroup.id), process.name.clone());
        let resource = self.resources.entry(key).or_insert_with(|| {
            let attribute = |(name, value): (&str, &str)| (name.to_owned(), ResourceValue::from(value));
            let service = if process.name.is_empty() { "unknown_service" } else { &process.name };
            let mut attributes: Vec<(String, ResourceValue)> = [
                ("service.name", service),
                ("host.name", host_name()),
                ("host.arch", host_arch()),
                ("os.type", "linux"),
            ]
            .map(attribute)
            .into();
            if let Some(cgroup) = &process.cgroup {
                attributes.extend(cgroup.containers.last().map(|id| attribute(("container.id", id))));
            }
            Arc::new(Resource::new(attributes))
        });
        Arc::clone(resource)
    }
}

fn host_name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        nix::unistd::gethostname().map_or_else(|_| "unknown".to_owned(), |name| name.to_string_lossy().into_owned())
    })
}

/// The architecture in the words of the semantic conventions.
fn host_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

//! Which pods run on this node, and which containers in them: told by the cluster's API server, which one watch follows.
//!
//! In: a node's name and how to reach the API server. Out: [`Pods`], whom anybody may ask whose a cgroup is. Where there
//! is no answer, it says since when and why; what was known stays known.

mod api;
mod attributes;
mod index;
mod list;
mod pod;
mod probe;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

#[cfg(not(fuzzing))]
use self::index::Index;
use self::{api::ApiError, pod::Stated, watch::Patience};
use crate::profile::{Cgroup, PodFacts};

pub(crate) use self::{attributes::attributes, index::Found};
#[cfg(fuzzing)]
pub(crate) use self::{index::Index, list::Items, pod::parse};
pub use self::{
    pod::Wanted,
    probe::{Probed, probe},
};

/// The same failure is said again when its words change, and not more often than this.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// How the API server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// As a pod's service account.
    InCluster,
    /// As a file says.
    Kubeconfig(PathBuf),
}

/// What is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How the API server is reached.
    pub access: Access,
    /// The node whose pods are followed.
    pub node: String,
    /// How long pods that are gone are remembered.
    pub grace: Duration,
    /// What pods tell besides their names.
    pub wanted: Wanted,
}

/// How following the pods goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchState {
    /// The first list is under way.
    Starting,
    /// Pods are known, and changes arrive.
    Synced,
    /// There is no answer, or no useful one.
    Failing,
}

/// What is known, for people.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// The node whose pods are followed.
    pub node: String,
    /// How following them goes.
    pub state: WatchState,
    /// For how long it has been going so, seconds.
    pub state_seconds: u64,
    /// The last failure, if there was any.
    pub last_error: Option<String>,
    /// Pods that are known, those included that are gone since a moment ago.
    pub pods: usize,
    /// IDs of containers that are known.
    pub containers: usize,
    /// Bytes that they take.
    pub bytes: usize,
    /// Pods that found no room.
    pub pods_refused: u64,
    /// Pods that could not be read.
    pub pods_malformed: u64,
    /// Lists that were asked for.
    pub lists: u64,
    /// Watches that were begun.
    pub watches: u64,
    /// Lists and watches that failed.
    pub errors: u64,
}

/// A container that is known, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContainerNames {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: String,
    /// The container's name in the pod.
    pub container: Option<String>,
}

/// The pods of a node. All clones are the same; the watch ends with the last of them.
#[derive(Clone, Debug)]
pub struct Pods {
    shared: Arc<Shared>,
    /// Dropped with the last clone, which ends the watch.
    _stop: Arc<oneshot::Sender<()>>,
}

/// What the watch's thread tells others.
#[derive(Debug)]
struct Shared {
    node: String,
    known: Mutex<Known>,
    /// Something became known, or how the watch goes has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct Known {
    index: Index,
    state: WatchState,
    since: Instant,
    last_error: Option<Box<str>>,
    said: Instant,
    malformed: u64,
    lists: u64,
    watches: u64,
    errors: u64,
}

impl Pods {
    /// Follows the pods of a node, in a thread of its own.
    pub fn start(settings: Settings) -> std::io::Result<Self> {
        Self::start_with(settings, Patience::default())
    }

    fn start_with(settings: Settings, patience: Patience) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared::new(settings.node.clone(), settings.grace));
        let (stop, stopped) = oneshot::channel();
        let watched = Arc::clone(&shared);
        std::thread::Builder::new().name("kubernetes".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = watch::follow(&settings, &patience, &watched) => {}
                    // (It only ever ends with an error: the sender was dropped.)
                    _ = stopped => {}
                }
            });
            // Nothing that may still be under way, such as looking up a name, is waited for.
            runtime.shutdown_background();
        })?;
        Ok(Self { shared, _stop: Arc::new(stop) })
    }

    /// The node whose pods they are.
    pub fn node(&self) -> &str {
        &self.shared.node
    }

    /// Whose a cgroup is.
    pub(crate) fn find(&self, cgroup: &Cgroup) -> Option<Found> {
        self.shared.known().index.find(cgroup)
    }

    /// What the scope may ask about a cgroup's pod; `None`: it is in none that is known.
    pub fn facts(&self, cgroup: &Cgroup) -> Option<PodFacts> {
        let found = self.find(cgroup)?;
        Some(PodFacts {
            namespace: found.pod.namespace.clone(),
            name: found.pod.name.clone(),
            workload: found.pod.owner.as_ref().map(|owner| format!("{}/{owner}", found.pod.namespace).into()),
            container: found.container.map(|(_, container)| container.name.clone()),
            labels: found.pod.scope_labels.clone(),
            annotations: found.pod.scope_annotations.clone(),
        })
    }

    /// A number that changes whenever other pods or containers are known, or others of their facts.
    pub fn version(&self) -> u64 {
        self.shared.known().index.version()
    }

    /// Waits until all of these cgroups are known, but for none longer than `wait` since it appeared, and only while the API
    /// server may still tell. Returns whether there was something to wait for.
    pub(crate) fn wait_for(&self, cgroups: &[Arc<Cgroup>], wait: Duration) -> bool {
        let mut known = self.shared.known();
        let mut has_waited = false;
        loop {
            let now = Instant::now();
            let missing = cgroups.iter().filter(|cgroup| !known.index.is_complete(cgroup));
            let deadline = missing.map(|cgroup| cgroup.known_since + wait).max();
            let deadline = match known.state {
                WatchState::Starting => deadline.map(|deadline| deadline.min(known.since + wait)),
                WatchState::Synced => deadline,
                WatchState::Failing => None,
            };
            let Some(left) =
                deadline.and_then(|deadline| deadline.checked_duration_since(now)).filter(|left| !left.is_zero())
            else {
                return has_waited;
            };
            has_waited = true;
            known = self.shared.changed.wait_timeout(known, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Which container has this ID.
    pub fn container(&self, id: &str) -> Option<ContainerNames> {
        let found = self.shared.known().index.container(id)?;
        Some(ContainerNames {
            namespace: found.pod.namespace.to_string(),
            pod: found.pod.name.to_string(),
            pod_uid: found.pod.uid.to_string(),
            container: found.container.map(|(_, container)| container.name.to_string()),
        })
    }

    /// What is known, and how following it goes.
    pub fn snapshot(&self) -> Snapshot {
        let mut known = self.shared.known();
        known.index.sweep(Instant::now());
        let (pods, containers, bytes, pods_refused) = known.index.sizes();
        Snapshot {
            node: self.shared.node.clone(),
            state: known.state,
            state_seconds: known.since.elapsed().as_secs(),
            last_error: known.last_error.as_ref().map(ToString::to_string),
            pods,
            containers,
            bytes,
            pods_refused,
            pods_malformed: known.malformed,
            lists: known.lists,
            watches: known.watches,
            errors: known.errors,
        }
    }
}

impl Shared {
    fn new(node: String, grace: Duration) -> Self {
        let now = Instant::now();
        let known = Known {
            index: Index::new(grace),
            state: WatchState::Starting,
            since: now,
            last_error: None,
            said: now,
            malformed: 0,
            lists: 0,
            watches: 0,
            errors: 0,
        };
        Self { node, known: Mutex::new(known), changed: Condvar::new() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known, and wakes whoever waits for it.
    fn update(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.known());
        self.changed.notify_all();
    }

    /// A pod as the API server wrote it, or why it cannot be read.
    fn put(&self, pod: Result<Stated, Box<str>>) {
        match pod {
            Ok(stated) => self.update(|known| known.index.put(stated, Instant::now())),
            Err(problem) => {
                debug!("a pod that cannot be read: {problem}");
                self.update(|known| known.malformed += 1);
            }
        }
    }

    /// There is an answer: changes arrive.
    fn synced(&self) {
        self.update(|known| {
            if known.enter(WatchState::Synced) {
                let (pods, ..) = known.index.sizes();
                info!("Kubernetes: following the pods of node {}: {pods} are known", self.node);
            }
        });
    }

    /// There is none.
    fn failed(&self, error: &ApiError) {
        self.update(|known| {
            known.errors += 1;
            let text: Box<str> = error.to_string().into();
            let is_new = known.last_error.as_ref() != Some(&text) && known.said.elapsed() >= SAY_AGAIN;
            if known.enter(WatchState::Failing) || is_new {
                known.said = Instant::now();
                warn!("Kubernetes: {text}; trying again, samples keep the labels that are known meanwhile");
            }
            known.last_error = Some(text);
        });
    }
}

impl Known {
    /// Whether that is something new.
    fn enter(&mut self, state: WatchState) -> bool {
        let is_new = self.state != state;
        if is_new {
            (self.state, self.since) = (state, Instant::now());
        }
        is_new
    }
}

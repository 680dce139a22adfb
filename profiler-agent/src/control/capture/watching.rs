//! Watches what containers use, on a thread of its own that sleeps most of the time.
//!
//! A look reads 5 files of a container at most: one about CPU time, one about throttling, two about memory, and one about time
//! in run queues, or, where the kernel does not tell that of a cgroup, one for each of its threads.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};
use tokio::sync::{mpsc, oneshot};
use tracing::error;

use super::{
    Settings,
    rules::{MAX_CONTAINERS, Watch},
    usage::{Hierarchies, Resource},
};
use crate::{control::demand::Demand, profile::Cgroup, status::Stats};

/// After a look there is rest for so many times the CPU time that it took: watching takes no more than 0.5 % of one CPU.
const REST: u32 = 200;

/// A thread that watches, until this is dropped.
#[derive(Debug)]
pub(in crate::control) struct Watching {
    _end: SyncSender<()>,
}

/// What the thread has.
struct Watcher {
    watch: Watch,
    interval: Duration,
    resources: Vec<Resource>,
    hierarchies: Hierarchies,
    stats: Arc<Stats>,
    demands: mpsc::Sender<Demand>,
}

impl Watching {
    /// Watches by these settings' rules; `None`: there are none.
    pub(in crate::control) fn start(
        settings: &Settings,
        stats: &Arc<Stats>,
        demands: &mpsc::Sender<Demand>,
    ) -> Option<Self> {
        if settings.rules.is_empty() {
            return None;
        }
        let (end, ended) = sync_channel(1);
        let mut watcher = Watcher {
            watch: Watch::new(settings.rules.clone(), settings.interval),
            interval: settings.interval,
            resources: settings.resources(),
            hierarchies: Hierarchies::of_machine(),
            stats: Arc::clone(stats),
            demands: demands.clone(),
        };
        match thread::Builder::new().name("watcher".to_owned()).spawn(move || watcher.run(&ended)) {
            Ok(_) => Some(Self { _end: end }),
            Err(error) => {
                error!("no rule starts a capture: the thread that watches containers could not be started: {error}");
                None
            }
        }
    }
}

impl Watcher {
    fn run(&mut self, ended: &Receiver<()>) {
        let mut pause = self.interval;
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(pause) {
            pause = self.interval;
            // What is stopped rests.
            if !self.stats.is_stopped() {
                let before = thread_time();
                self.look(ended);
                pause = pause.max(thread_time().saturating_sub(before).saturating_mul(REST));
            }
        }
    }

    /// Looks at every container, once.
    fn look(&mut self, ended: &Receiver<()>) {
        let cgroups = self.stats.containers();
        for (container, path) in containers(&cgroups) {
            let usage = self.hierarchies.usage(path, &self.resources);
            let Some(trigger) = self.watch.observe(Instant::now(), container, usage) else { continue };
            let (reply, answer) = oneshot::channel();
            let sent = self.demands.blocking_send(Demand::Trigger(trigger.clone(), reply));
            // (Where nobody takes it any more, the agent is about to end.)
            if sent.is_err() || !answer.blocking_recv().unwrap_or(false) {
                self.watch.refused(&trigger);
            }
            if !matches!(ended.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty)) {
                return;
            }
        }
        self.stats.captures.set_watched(self.watch.stats());
    }
}

/// Each container with the path of its own cgroup, which those are below that were made inside of it. In order, so that the
/// same ones are watched each time where there are too many.
fn containers(cgroups: &[Arc<Cgroup>]) -> Vec<(&Arc<str>, &str)> {
    let mut paths = HashMap::<&Arc<str>, &str>::new();
    for cgroup in cgroups {
        let Some(container) = cgroup.containers.last() else { continue };
        let path = paths.entry(container).or_insert(&cgroup.path);
        if cgroup.path.len() < path.len() {
            *path = &cgroup.path;
        }
    }
    let mut containers: Vec<_> = paths.into_iter().collect();
    containers.sort_unstable();
    // (One more is counted as not watched.)
    containers.truncate(MAX_CONTAINERS + 1);
    containers
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::CgroupId;

    /// A container is its outermost cgroup; one in another is watched by itself.
    #[test]
    fn containers_are_their_outermost_cgroups() {
        let cgroup = |id: u64, path: &str, containers: &[&str]| {
            Arc::new(Cgroup {
                id: CgroupId(id),
                path: path.into(),
                containers: containers.iter().map(|&id| id.into()).collect(),
                pod_uid: None,
                unit: None,
                known_since: Instant::now(),
            })
        };
        let cgroups = [
            cgroup(1, "/pods/a/init", &["a"]),
            cgroup(2, "/pods/a", &["a"]),
            cgroup(3, "/pods", &[]),
            cgroup(4, "/pods/a/docker/b/c", &["a", "b"]),
            cgroup(5, "/pods/a/docker/b", &["a", "b"]),
        ];
        let found = containers(&cgroups);
        assert_eq!(found, [(&Arc::from("a"), "/pods/a"), (&Arc::from("b"), "/pods/a/docker/b")]);
    }
}

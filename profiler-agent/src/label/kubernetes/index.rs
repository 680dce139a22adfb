//! Pods and containers that are known, within a budget: by container ID, by pod UID, and static pods by what their cgroups
//! are called.
//!
//! A pod that is gone is kept for a while, since its last samples are labelled after its end; so are the IDs of
//! containers that were restarted, as long as their pod is known.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::pod::{Container, Pod, Stated};
use crate::profile::Cgroup;

/// Bytes of all pods and containers.
const MAX_BYTES: usize = 8 << 20;
/// Bytes that an entry takes in the maps, besides what it says.
const PER_POD: usize = 256;
const PER_CONTAINER: usize = 192;
/// Containers' IDs that are remembered of a pod besides those that it states.
const MAX_EARLIER: usize = 16;
/// Time between two looks for pods that are gone for long enough.
const SWEEP: Duration = Duration::from_secs(1);

/// Pods of one node.
#[derive(Debug)]
pub(crate) struct Index {
    pods: HashMap<Arc<str>, Entry>,
    /// Pods' UIDs by their containers' IDs.
    containers: HashMap<Arc<str>, Arc<str>>,
    /// UIDs of static pods by what their cgroups are called.
    hashes: HashMap<Box<str>, Arc<str>>,
    bytes: usize,
    budget: usize,
    grace: Duration,
    /// The number of the list that is arriving, or arrived last.
    list: u64,
    swept: Instant,
    /// Pods that found no room.
    refused: u64,
    /// Raised whenever something else may be found.
    version: u64,
}

#[derive(Debug)]
struct Entry {
    pod: Arc<Pod>,
    /// The ones its status has, then those it had before.
    containers: Vec<(Arc<str>, Arc<Container>)>,
    /// Since when there is no such pod.
    gone: Option<Instant>,
    /// The last list that it was in, or that came before it.
    list: u64,
    bytes: usize,
}

/// A pod, and the container in it, if that is known.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Option<(Arc<str>, Arc<Container>)>,
}

impl Index {
    pub(crate) fn new(grace: Duration) -> Self {
        Self {
            pods: HashMap::new(),
            containers: HashMap::new(),
            hashes: HashMap::new(),
            bytes: 0,
            budget: MAX_BYTES,
            grace,
            list: 0,
            swept: Instant::now(),
            refused: 0,
            version: 0,
        }
    }

    /// A pod is there, or changed.
    pub(crate) fn put(&mut self, stated: Stated, now: Instant) {
        let Stated { pod, mut containers, .. } = stated;
        let before = self.remove(&pod.uid);
        let earlier = before.iter().flat_map(|entry| &entry.containers);
        let is_new = |id: &str| !containers.iter().any(|(other, _)| **other == *id);
        let earlier: Vec<_> = earlier.filter(|(id, _)| is_new(id)).take(MAX_EARLIER).cloned().collect();
        let running = containers.len();
        containers.extend(earlier);
        let mut bytes = bytes_of(&pod, &containers);
        self.make_room(bytes);
        if self.bytes + bytes > self.budget {
            containers.truncate(running);
            bytes = bytes_of(&pod, &containers);
        }
        let is_known = before
            .as_ref()
            .is_some_and(|before| *before.pod == pod && before.containers == containers && before.gone.is_none());
        self.version += u64::from(!is_known);
        let entry = Entry { pod: pod.into(), containers, gone: None, list: self.list, bytes };
        if self.bytes + bytes <= self.budget {
            self.insert(entry);
        } else {
            self.refused += 1;
            // What was known before is better than nothing.
            if let Some(before) = before {
                self.insert(Entry { gone: None, list: self.list, ..before });
            }
        }
        self.sweep(now);
    }

    /// A pod is gone.
    pub(crate) fn delete(&mut self, uid: &str, now: Instant) {
        if let Some(entry) = self.pods.get_mut(uid) {
            entry.gone.get_or_insert(now);
        }
        self.sweep(now);
    }

    /// A list of all pods begins.
    pub(crate) fn begin_list(&mut self) {
        self.list += 1;
    }

    /// It has ended: pods that were not in it are gone.
    pub(crate) fn end_list(&mut self, now: Instant) {
        for entry in self.pods.values_mut().filter(|entry| entry.list != self.list) {
            entry.gone.get_or_insert(now);
        }
        self.sweep(now);
    }

    /// Forgets pods that are gone for long enough.
    pub(crate) fn sweep(&mut self, now: Instant) {
        if now.saturating_duration_since(self.swept) < SWEEP.min(self.grace) {
            return;
        }
        self.swept = now;
        let grace = self.grace;
        let is_over = |entry: &Entry| entry.gone.is_some_and(|gone| now.saturating_duration_since(gone) >= grace);
        let over: Vec<_> =
            self.pods.iter().filter(|(_, entry)| is_over(entry)).map(|(uid, _)| Arc::clone(uid)).collect();
        self.version += u64::from(!over.is_empty());
        for uid in over {
            self.remove(&uid);
        }
    }

    /// Whose a cgroup is. The outermost container that is known decides: inner ones are made by who runs in it.
    pub(crate) fn find(&self, cgroup: &Cgroup) -> Option<Found> {
        let by_uid = cgroup.pod_uid.as_ref().and_then(|uid| self.pods.get(uid));
        let by_hash = cgroup.pod_uid.as_ref().and_then(|hash| self.pods.get(self.hashes.get(&**hash)?));
        let owners = cgroup.containers.iter().enumerate().filter_map(|(depth, id)| {
            let entry = self.pods.get(self.containers.get(id)?)?;
            let is = |pod: &Entry| pod.pod.uid == entry.pod.uid;
            let is_believed = match by_uid {
                // The cgroup's path says which pod it is in: no container in there is in another.
                Some(pod) => is(pod),
                // (Who makes a pod can write the hash of another into it, but no container's ID into its status.)
                None => cgroup.pod_uid.is_none() || depth == 0 || by_hash.is_some_and(is),
            };
            is_believed.then_some((entry, id))
        });
        let mut owners = owners;
        if let Some((entry, id)) = owners.next() {
            let container = entry.containers.iter().find(|(other, _)| other == id).cloned();
            return Some(Found { pod: Arc::clone(&entry.pod), container });
        }
        by_uid.or(by_hash).map(|entry| Found { pod: Arc::clone(&entry.pod), container: None })
    }

    /// Whether nothing more is to be expected about a cgroup.
    pub(crate) fn is_complete(&self, cgroup: &Cgroup) -> bool {
        self.find(cgroup).is_some_and(|found| found.container.is_some() || cgroup.containers.is_empty())
    }

    /// Which container has this ID.
    pub(crate) fn container(&self, id: &str) -> Option<Found> {
        let entry = self.pods.get(self.containers.get(id)?)?;
        let container = entry.containers.iter().find(|(other, _)| **other == *id).cloned();
        Some(Found { pod: Arc::clone(&entry.pod), container })
    }

    /// A number that changes whenever something else may be found.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Pods, containers, the bytes that they take, and pods that found no room.
    pub(crate) fn sizes(&self) -> (usize, usize, usize, u64) {
        (self.pods.len(), self.containers.len(), self.bytes, self.refused)
    }

    fn insert(&mut self, entry: Entry) {
        let uid: Arc<str> = (&*entry.pod.uid).into();
        self.bytes += entry.bytes;
        for (id, _) in &entry.containers {
            self.containers.insert(Arc::clone(id), Arc::clone(&uid));
        }
        if let Some(hash) = &entry.pod.config_hash {
            // Who had it first keeps it while it is there: the annotation is anybody's to write.
            let owner = self.hashes.get(hash).and_then(|owner| self.pods.get(owner));
            if owner.is_none_or(|owner| owner.gone.is_some()) {
                self.hashes.insert(hash.clone(), Arc::clone(&uid));
            }
        }
        self.pods.insert(uid, entry);
    }

    fn remove(&mut self, uid: &str) -> Option<Entry> {
        let entry = self.pods.remove(uid)?;
        self.bytes -= entry.bytes;
        for (id, _) in &entry.containers {
            // Another pod may have said since that it is its.
            if self.containers.get(id).is_some_and(|owner| **owner == *uid) {
                self.containers.remove(id);
            }
        }
        if let Some(hash) = &entry.pod.config_hash
            && self.hashes.get(hash).is_some_and(|owner| **owner == *uid)
        {
            self.hashes.remove(hash);
        }
        Some(entry)
    }

    /// Pods that are gone make room, those first that are gone for longest.
    fn make_room(&mut self, bytes: usize) {
        while self.bytes + bytes > self.budget {
            let gone = self.pods.iter().filter_map(|(uid, entry)| Some((entry.gone?, uid)));
            let Some((_, uid)) = gone.min() else { return };
            let uid = Arc::clone(uid);
            self.version += 1;
            self.remove(&uid);
        }
    }
}

fn bytes_of(pod: &Pod, containers: &[(Arc<str>, Arc<Container>)]) -> usize {
    let containers = containers.iter().map(|(id, container)| PER_CONTAINER + id.len() + container.bytes());
    PER_POD + pod.bytes() + containers.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{label::kubernetes::pod, profile::CgroupId};

    const GRACE: Duration = Duration::from_secs(60);

    fn stated(uid: &str, hash: Option<&str>, containers: &[(&str, &str)]) -> Stated {
        let annotation = hash.map(|hash| format!(r#","annotations":{{"kubernetes.io/config.hash":"{hash}"}}"#));
        let statuses = containers.iter().map(|(id, name)| format!(r#"{{"name":"{name}","containerID":"x://{id}"}}"#));
        let json = format!(
            r#"{{"metadata":{{"uid":"{uid}","name":"pod-{uid}"{}}},"status":{{"containerStatuses":[{}]}}}}"#,
            annotation.unwrap_or_default(),
            statuses.collect::<Vec<_>>().join(",")
        );
        pod::parse(json.as_bytes(), &pod::Wanted::default()).expect("a pod")
    }

    fn cgroup(containers: &[&str], pod_uid: Option<&str>) -> Cgroup {
        Cgroup {
            id: CgroupId(1),
            path: "/".into(),
            containers: containers.iter().map(|&id| id.into()).collect(),
            pod_uid: pod_uid.map(Into::into),
            unit: None,
            known_since: Instant::now(),
        }
    }

    fn check(index: &Index, containers: &[&str], pod_uid: Option<&str>, expect: Option<(&str, Option<&str>)>) {
        let found = index.find(&cgroup(containers, pod_uid));
        let names = found.map(|found| (found.pod.uid.clone(), found.container.map(|(id, _)| id)));
        let expect = expect.map(|(uid, id)| (uid.into(), id.map(Into::into)));
        assert_eq!(names, expect, "{containers:?} in {pod_uid:?}");
    }

    /// The container decides, the outermost one that is known; the pod's UID where none is; static pods have two names.
    #[test]
    fn finds_whose_a_cgroup_is() {
        let (mut index, now) = (Index::new(GRACE), Instant::now());
        index.put(stated("u1", None, &[("c1", "app"), ("c2", "side")]), now);
        index.put(stated("u2", Some("0f0f"), &[("c3", "etcd")]), now);
        check(&index, &["c1"], Some("u1"), Some(("u1", Some("c1"))));
        check(&index, &["c1", "c3"], Some("u1"), Some(("u1", Some("c1"))));
        check(&index, &["node", "c2"], None, Some(("u1", Some("c2"))));
        check(&index, &["sandbox"], Some("u1"), Some(("u1", None)));
        check(&index, &["c3"], Some("0f0f"), Some(("u2", Some("c3"))));
        check(&index, &[], Some("0f0f"), Some(("u2", None)));
        check(&index, &["c9"], Some("u9"), None);
        check(&index, &[], None, None);
    }

    /// Who makes cgroups in a pod can call them like containers of others, and is not believed.
    #[test]
    fn made_up_containers_are_not_believed() {
        let (mut index, now) = (Index::new(GRACE), Instant::now());
        index.put(stated("u1", None, &[("c1", "app")]), now);
        index.put(stated("u2", None, &[("c2", "app")]), now);
        check(&index, &["new", "c2"], Some("u1"), Some(("u1", None)));
        check(&index, &["new", "c2"], Some("u9"), None);
        // The same goes for who writes a static pod's hash into another pod.
        index.put(stated("static", Some("0f0f"), &[("c3", "etcd")]), now);
        index.put(stated("false", Some("0f0f"), &[("c4", "app")]), now);
        check(&index, &["c3"], Some("0f0f"), Some(("static", Some("c3"))));
        check(&index, &["sandbox"], Some("0f0f"), Some(("static", None)));
        index.put(stated("earlier", Some("1f1f"), &[("c5", "app")]), now);
        index.put(stated("late", Some("1f1f"), &[("c6", "etcd")]), now);
        check(&index, &["c6"], Some("1f1f"), Some(("late", Some("c6"))));
        index.delete("static", now);
        index.put(stated("again", Some("0f0f"), &[("c7", "etcd")]), now);
        check(&index, &["sandbox"], Some("0f0f"), Some(("again", None)));
    }

    /// Restarted containers and pods that are gone are known for a while, and not for ever.
    #[test]
    fn remembers_for_a_while() {
        let (mut index, now) = (Index::new(GRACE), Instant::now());
        index.put(stated("u1", None, &[("c1", "app")]), now);
        index.put(stated("u1", None, &[("c2", "app")]), now);
        check(&index, &["c1"], None, Some(("u1", Some("c1"))));
        check(&index, &["c2"], None, Some(("u1", Some("c2"))));
        index.delete("u1", now);
        index.sweep(now + GRACE / 2);
        check(&index, &["c2"], None, Some(("u1", Some("c2"))));
        index.sweep(now + GRACE);
        check(&index, &["c2"], None, None);
        assert_eq!(index.sizes(), (0, 0, 0, 0));
        assert!(index.hashes.is_empty());
    }

    /// A list is all there is: what it does not have is gone, what it has is there again.
    #[test]
    fn lists_are_complete() {
        let (mut index, now) = (Index::new(GRACE), Instant::now());
        for uid in ["u1", "u2"] {
            index.put(stated(uid, None, &[(uid, "app")]), now);
        }
        index.delete("u1", now);
        index.begin_list();
        index.put(stated("u1", None, &[("u1", "app")]), now);
        index.end_list(now);
        check(&index, &["u2"], None, Some(("u2", Some("u2"))));
        index.sweep(now + GRACE);
        check(&index, &["u2"], None, None);
        check(&index, &["u1"], None, Some(("u1", Some("u1"))));
    }

    /// What is over the budget is refused and counted; pods that are gone make room.
    #[test]
    fn is_bounded() {
        let (mut index, now) = (Index::new(GRACE), Instant::now());
        let one = stated("u0", Some("h"), &[("c0", "app")]);
        index.put(one, now);
        index.budget = 10 * index.bytes;
        for number in 1..100 {
            index.put(stated(&format!("u{number}"), None, &[(&format!("c{number}"), "app")]), now);
        }
        let (pods, _, bytes, refused) = index.sizes();
        assert!(
            bytes <= index.budget && (9..12).contains(&pods) && refused == 100 - pods as u64,
            "{:?}",
            index.sizes()
        );
        index.delete("u3", now);
        index.put(stated("new", None, &[("cn", "app")]), now);
        check(&index, &["cn"], None, Some(("new", Some("cn"))));
        check(&index, &["c3"], None, None);
        // A pod that grew too large keeps what was known of it.
        let ids: Vec<String> = (0..200).map(|number| format!("more{number}")).collect();
        let many: Vec<_> = ids.iter().map(|id| (id.as_str(), "app")).collect();
        index.put(stated("new", None, &many), now);
        check(&index, &["cn"], None, Some(("new", Some("cn"))));
    }

    /// Only what can be told apart is a change: kubelets write a pod's status again and again.
    #[test]
    fn versions_change_with_what_is_known() {
        let (mut index, now) = (Index::new(GRACE), Instant::now());
        let mut check = |uid: &str, container: &str, expect: u64| {
            index.put(stated(uid, None, &[(container, "app")]), now);
            assert_eq!(index.version(), expect, "{uid} {container}");
        };
        check("u1", "c1", 1);
        check("u1", "c1", 1);
        check("u1", "c2", 2);
        check("u2", "c3", 3);
        index.delete("u2", now);
        assert_eq!(index.version(), 3);
        index.sweep(now + GRACE);
        assert_eq!(index.version(), 4);
    }

    /// However often containers restart, so many are remembered.
    #[test]
    fn restarts_are_bounded() {
        let (mut index, now) = (Index::new(GRACE), Instant::now());
        for number in 0..1000 {
            index.put(stated("u", None, &[(&format!("c{number}"), "app")]), now);
        }
        assert_eq!(index.sizes().1, 1 + MAX_EARLIER);
        check(&index, &["c999"], None, Some(("u", Some("c999"))));
        check(&index, &["c0"], None, None);
    }
}

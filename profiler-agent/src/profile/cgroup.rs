//! The cgroup a sample was taken in, and what its path says.

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
    time::Instant,
};

/// The kernel's number of a cgroup (`kernfs_node::id`): that of its folder's inode, unique in its hierarchy until the
/// machine is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupId(pub u64);

/// A cgroup. Two are the same if their IDs are.
#[derive(Clone, Debug)]
pub struct Cgroup {
    /// Its number.
    pub id: CgroupId,
    /// Its path from the root of its hierarchy, without control characters.
    pub path: Box<str>,
    /// Containers that it is in, the outermost first: IDs as their runtimes write them. Those below the first may be up to
    /// who runs inside of it, but none is another cgroup's.
    pub containers: Box<[Arc<str>]>,
    /// The outermost Kubernetes pod that the path names: a UID with dashes, or the 32 digits that stand for a static pod.
    pub pod_uid: Option<Arc<str>>,
    /// The systemd service, `nginx.service`, where it is in no container.
    pub unit: Option<Box<str>>,
    /// Since when it is known: a young one's metadata may still arrive.
    pub known_since: Instant,
}

impl PartialEq for Cgroup {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Cgroup {}

impl Hash for Cgroup {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

//! The table of cgroups: what they are called, and which container, pod and service that makes them.
//!
//! In: notices of the kernel programs as cgroups come and go, and the file system's folders for what was there before.
//! Out: the [`Cgroup`] of a sample. A cgroup is known from its making on, before anything can run in it, so that a
//! container of a few milliseconds is known as well as any.
//!
//! Names below a container are up to who runs inside. A container ID that stands below another container is believed
//! unless it is another cgroup's already: IDs are random, so whoever knows one has not made it up.

#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod path;
mod scan;

use std::{
    collections::{HashMap, hash_map::Entry},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use profiler_common::abi::cgroup::{CgroupChange, CgroupNotice};
use tracing::{debug, warn};
use zerocopy::FromBytes as _;

use crate::{
    cgroup_mount::mount_of,
    profile::{Cgroup, CgroupId, printable},
};

/// Most cgroups remembered.
const MAX_CGROUPS: usize = 16 << 10;
/// Most bytes of what is remembered of them.
const MAX_BYTES: usize = 8 << 20;
/// What a cgroup takes besides its path, estimated: its entry, and container IDs of its own.
const ENTRY_BYTES: usize = 320;
/// How long a removed one is remembered: samples and metadata of it may still come.
const KEEP_REMOVED: Duration = Duration::from_secs(60);
/// Least time between two looks at all folders.
const RESCAN_AFTER: Duration = Duration::from_secs(5);

struct Known {
    cgroup: Arc<Cgroup>,
    bytes: usize,
    used: Instant,
    removed: Option<Instant>,
}

/// A container's ID, and where it was first.
struct Claim {
    /// The path of the container's own cgroup.
    at: Box<str>,
    /// Cgroups that are in the container.
    users: usize,
}

/// What came and went.
#[derive(Debug, Default)]
pub struct News {
    /// Cgroups that are known now.
    pub appeared: Vec<Arc<Cgroup>>,
    /// Those that were removed and are forgotten now.
    pub gone: Vec<CgroupId>,
}

/// Sizes and events, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct CgroupStats {
    /// Cgroups remembered.
    pub known: usize,
    /// Containers that they are of.
    pub containers: usize,
    /// Notices that could not be understood.
    pub notices_malformed: u64,
    /// Times that all folders were read.
    pub scans: u64,
    /// Cgroups forgotten while they were there, because there were too many.
    pub evicted: u64,
    /// Container IDs below a container that were another's already.
    pub claims_refused: u64,
    /// Samples whose cgroup is not known.
    pub samples_unknown: u64,
}

/// Every cgroup that samples may be of.
#[derive(Default)]
pub struct Cgroups {
    known: HashMap<CgroupId, Known>,
    claims: HashMap<Arc<str>, Claim>,
    bytes: usize,
    /// Where folders are; `None`: nowhere that we can see.
    mount: Option<PathBuf>,
    scanned: Option<Instant>,
    /// Whether something has changed since it was last asked.
    has_changed: bool,
    news: News,
    stats: CgroupStats,
}

impl Cgroups {
    /// Reads what is there of a hierarchy: the first version's with a controller, or the second version's. Call when
    /// notices are sent already.
    pub fn read(controller: Option<&str>) -> Self {
        let mount = mount_of(controller);
        if mount.is_none() {
            warn!("no cgroups are mounted that may be read: those made before the agent started are not known");
        }
        let mut cgroups = Self { mount, ..Self::default() };
        cgroups.scan();
        cgroups
    }

    /// Takes note of what the kernel announced.
    pub fn notice(&mut self, bytes: &[u8]) {
        if self.try_notice(bytes).is_none() {
            self.stats.notices_malformed += 1;
        }
    }

    fn try_notice(&mut self, bytes: &[u8]) -> Option<()> {
        let (notice, rest) = CgroupNotice::read_from_prefix(bytes).ok()?;
        let id = CgroupId(notice.id);
        match CgroupChange::try_from(notice.change).ok()? {
            CgroupChange::Made => {
                let path = rest.get(..usize::try_from(notice.path_len).ok()?)?;
                self.add(id, &String::from_utf8_lossy(path));
            }
            CgroupChange::Removed => {
                if let Some(known) = self.known.get_mut(&id) {
                    known.removed = Some(Instant::now());
                }
            }
        }
        Some(())
    }

    /// The cgroup of a sample; `None`: it has none, or nobody knows it.
    pub fn get(&mut self, id: CgroupId) -> Option<Arc<Cgroup>> {
        if id == CgroupId::default() {
            return None;
        }
        if !self.known.contains_key(&id) && self.scanned.is_none_or(|scanned| scanned.elapsed() >= RESCAN_AFTER) {
            self.scan();
        }
        let Some(known) = self.known.get_mut(&id) else {
            self.stats.samples_unknown += 1;
            return None;
        };
        known.used = Instant::now();
        Some(Arc::clone(&known.cgroup))
    }

    /// Reads all folders: notices may have been lost.
    pub fn scan(&mut self) {
        self.scanned = Some(Instant::now());
        let Some(mount) = self.mount.clone() else { return };
        self.stats.scans += 1;
        let mut found = Vec::new();
        match scan::walk(&mount, |id, path| found.push((id, path.to_owned()))) {
            Ok(true) => {}
            Ok(false) => debug!("not all cgroups were read: there are too many"),
            Err(error) => debug!("cgroups could not be read: {}: {error}", mount.display()),
        }
        for (id, path) in found {
            if !self.known.contains_key(&id) {
                self.add(id, &path);
            }
        }
    }

    /// Forgets what was removed a while ago.
    pub fn end_drain(&mut self) {
        let is_over = |known: &Known| known.removed.is_some_and(|removed| removed.elapsed() >= KEEP_REMOVED);
        let over: Vec<CgroupId> = self.known.iter().filter(|(_, known)| is_over(known)).map(|(id, _)| *id).collect();
        for id in over {
            self.forget(id);
        }
    }

    /// All that is known of containers, if something has changed since this was last asked.
    pub fn take_containers(&mut self) -> Option<Vec<Arc<Cgroup>>> {
        if !std::mem::take(&mut self.has_changed) {
            return None;
        }
        let in_containers = |known: &&Known| !known.cgroup.containers.is_empty() || known.cgroup.pod_uid.is_some();
        Some(self.known.values().filter(in_containers).map(|known| Arc::clone(&known.cgroup)).collect())
    }

    /// What came and went since this was last called.
    pub fn take_news(&mut self) -> News {
        std::mem::take(&mut self.news)
    }

    /// All that are known.
    pub fn iter(&self) -> impl Iterator<Item = Arc<Cgroup>> {
        self.known.values().map(|known| Arc::clone(&known.cgroup))
    }

    /// Sizes and events so far.
    pub fn stats(&self) -> CgroupStats {
        CgroupStats { known: self.known.len(), containers: self.claims.len(), ..self.stats }
    }

    fn add(&mut self, id: CgroupId, path: &str) {
        if id == CgroupId::default() {
            return;
        }
        self.forget(id);
        // The kernel hands out no more than `MAX_PATH`, a folder's path may be longer.
        let path = printable(&path[..path.floor_char_boundary(profiler_common::abi::cgroup::MAX_PATH)]);
        let bytes = path.len() * 2 + ENTRY_BYTES;
        if self.known.len() >= MAX_CGROUPS || self.bytes + bytes > MAX_BYTES {
            self.evict();
        }
        let said = path::parse(&path);
        let mut containers: Vec<Arc<str>> = Vec::new();
        for (id, at) in &said.containers {
            let claim = match self.claims.entry(Arc::from(*id)) {
                Entry::Occupied(claim) if *claim.get().at != **at && !containers.is_empty() => {
                    self.stats.claims_refused += 1;
                    continue;
                }
                claim => claim,
            };
            containers.push(Arc::clone(claim.key()));
            let claim = claim.or_insert_with(|| Claim { at: (*at).into(), users: 0 });
            claim.users += 1;
            if containers.len() == 1 {
                // Nobody inside of a container can have made this.
                claim.at = (*at).into();
            }
        }
        let now = Instant::now();
        let cgroup = Arc::new(Cgroup {
            id,
            containers: containers.into(),
            pod_uid: said.pod_uid.as_deref().map(Arc::from),
            unit: said.unit.map(Into::into),
            known_since: now,
            path: path.as_str().into(),
        });
        self.has_changed = true;
        self.bytes += bytes;
        self.news.appeared.push(Arc::clone(&cgroup));
        self.known.insert(id, Known { cgroup, bytes, used: now, removed: None });
    }

    fn forget(&mut self, id: CgroupId) {
        let Some(known) = self.known.remove(&id) else { return };
        self.has_changed = true;
        // One that was evicted is still there.
        self.news.gone.extend(known.removed.map(|_| id));
        self.bytes -= known.bytes;
        for container in &known.cgroup.containers {
            if let Some(claim) = self.claims.get_mut(container) {
                claim.users -= 1;
                if claim.users == 0 {
                    self.claims.remove(container);
                }
            }
        }
    }

    /// Makes room: an eighth of what is known, removed ones and those whose last sample is longest ago.
    fn evict(&mut self) {
        let mut by_use: Vec<(bool, Instant, CgroupId)> =
            self.known.iter().map(|(id, known)| (known.removed.is_none(), known.used, *id)).collect();
        by_use.sort_unstable();
        for (is_there, _, id) in by_use.iter().take(by_use.len() / 8 + 1) {
            self.stats.evicted += u64::from(*is_there);
            self.forget(*id);
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes as _;

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const OTHER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

    fn made(id: u64, path: &str) -> Vec<u8> {
        let notice = CgroupNotice { id, change: CgroupChange::Made as u32, path_len: path.len() as u32 };
        [notice.as_bytes(), path.as_bytes()].concat()
    }

    fn containers(cgroups: &mut Cgroups, id: u64) -> Vec<String> {
        let cgroup = cgroups.get(CgroupId(id)).expect("a known cgroup");
        cgroup.containers.iter().map(|container| container.to_string()).collect()
    }

    /// Nobody can put himself into another container by the names of his cgroups, whoever came first.
    #[test]
    fn claims_of_other_containers_are_refused() {
        let mut cgroups = Cgroups::default();
        cgroups.notice(&made(1, &format!("/kubepods/{ID}")));
        cgroups.notice(&made(2, &format!("/kubepods/{OTHER}")));
        cgroups.notice(&made(3, &format!("/kubepods/{OTHER}/docker/{ID}")));
        assert_eq!(containers(&mut cgroups, 3), [OTHER]);
        assert_eq!(cgroups.stats().claims_refused, 1);
        // One of his own making is fine, below it too; and the real one is not kept out by a false one.
        let own = "a".repeat(64);
        cgroups.notice(&made(4, &format!("/kubepods/{OTHER}/docker/{own}/init")));
        assert_eq!(containers(&mut cgroups, 4), [OTHER, &own]);
        cgroups.notice(&made(5, &format!("/kubepods/{own}")));
        assert_eq!(containers(&mut cgroups, 5), [&*own]);
        // Cgroups inside of a container are in the container.
        cgroups.notice(&made(6, &format!("/kubepods/{ID}/init.scope")));
        assert_eq!(containers(&mut cgroups, 6), [ID]);
    }

    /// However many there are, memory is bounded; what was removed goes first, and what is used stays.
    #[test]
    fn is_bounded() {
        let mut cgroups = Cgroups::default();
        cgroups.notice(&made(1, "/used"));
        for id in 2..2 * MAX_CGROUPS as u64 {
            cgroups.notice(&made(id, &format!("/{id}{}", "x".repeat(200))));
            if id % 1000 == 0 {
                assert!(cgroups.get(CgroupId(1)).is_some());
            }
        }
        assert!(cgroups.known.len() <= MAX_CGROUPS && cgroups.bytes <= MAX_BYTES);
        assert_eq!(cgroups.bytes, cgroups.known.values().map(|known| known.bytes).sum::<usize>());
        assert!(cgroups.get(CgroupId(1)).is_some());
        assert!(cgroups.stats().evicted > 0);
        for id in cgroups.known.keys().copied().collect::<Vec<_>>() {
            cgroups.forget(id);
        }
        assert!(cgroups.bytes == 0 && cgroups.claims.is_empty());
    }

    /// A removed cgroup is known for a while; a malformed notice is counted and changes nothing.
    #[test]
    fn removed_ones_are_remembered() {
        let mut cgroups = Cgroups::default();
        cgroups.notice(&made(1, "/system.slice/a.service"));
        let removed = CgroupNotice { id: 1, change: CgroupChange::Removed as u32, path_len: 0 };
        cgroups.notice(removed.as_bytes());
        cgroups.end_drain();
        assert_eq!(cgroups.get(CgroupId(1)).expect("it").unit.as_deref(), Some("a.service"));
        let whole = made(2, "/x");
        for len in 0..whole.len() {
            cgroups.notice(&whole[..len]);
        }
        assert_eq!((cgroups.stats().notices_malformed, cgroups.stats().known), (whole.len() as u64, 1));
        assert!(cgroups.get(CgroupId(2)).is_none());
        assert_eq!(cgroups.stats().samples_unknown, 1);
    }
}

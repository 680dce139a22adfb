//! Names of code that processes make at run time, by what they say about it in files, within a byte budget.
//!
//! The files belong to the processes: they grow, are cut and are written anew while they are read. Once a batch, what was
//! added to those that samples lie in is read, and no more than a part of it if there is much.

#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod jitdump;
mod perf_map;
mod ranges;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Weak},
};

use self::{jitdump::Jitdump, perf_map::PerfMap, ranges::RANGE_BYTES};
use super::SymbolSource;
use crate::profile::{LocatedSample, Location, Nameless, RuntimeCode, RuntimeFile, RuntimeFileKind};

/// Most bytes of all files that are read for one batch; the rest follows with the next ones.
const READ_PER_BATCH: u64 = 64 << 20;
/// Most ranges of one file, however large the budget.
const MAX_RANGES: usize = 1 << 20;
/// Longest name that is read, bytes.
const MAX_NAME: usize = 1024;

/// What reading on has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    /// Nothing new.
    Same,
    /// More of it.
    Added,
    /// Something else than before.
    Restarted,
}

/// A name as text without control characters; `None` where there is none.
fn text(name: &[u8]) -> Option<String> {
    let plain = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    let mut name: String = String::from_utf8_lossy(name).chars().map(plain).collect();
    name.truncate(name.floor_char_boundary(MAX_NAME));
    (!name.is_empty()).then_some(name)
}

#[derive(Debug)]
enum Names {
    PerfMap(PerfMap),
    Jitdump(Jitdump),
}

impl Names {
    fn of(kind: RuntimeFileKind) -> Self {
        match kind {
            RuntimeFileKind::PerfMap => Self::PerfMap(PerfMap::default()),
            RuntimeFileKind::Jitdump => Self::Jitdump(Jitdump::default()),
        }
    }

    fn read_on(&mut self, file: &File, allowance: &mut u64, most: usize) -> Progress {
        match self {
            Self::PerfMap(map) => map.read_on(file, allowance, most),
            Self::Jitdump(dump) => dump.read_on(file, allowance, most),
        }
    }

    fn name(&self, file: &File, address: u64) -> Option<(String, SymbolSource)> {
        match self {
            Self::PerfMap(map) => Some((map.name(file, address)?, SymbolSource::PerfMap)),
            Self::Jitdump(dump) => Some((dump.name(file, address)?, SymbolSource::Jitdump)),
        }
    }

    fn refused(&self) -> u64 {
        match self {
            Self::PerfMap(map) => map.refused(),
            Self::Jitdump(dump) => dump.refused(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::PerfMap(map) => map.bytes(),
            Self::Jitdump(dump) => dump.bytes(),
        }
    }
}

/// What one file says.
struct Held {
    names: Names,
    /// Gone when no process has the file any more.
    file: Weak<RuntimeFile>,
    bytes: usize,
    /// The batch for which it was last read on.
    used: u64,
    /// Unique to what it says: changes with it, and is never used again.
    version: u64,
}

/// What was read, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct RuntimeCodeStats {
    /// Bytes of memory that it takes.
    pub bytes: usize,
    /// Files that were found to be written anew, and read again.
    pub restarted: u64,
    /// Files of which what was read was dropped to keep the budget.
    pub evicted: u64,
    /// Pieces of code whose names were not kept because there were too many.
    pub refused: u64,
}

/// Names of code made at run time.
pub(super) struct RuntimeNames {
    files: HashMap<u64, Held>,
    budget: usize,
    batch: u64,
    versions: u64,
    stats: RuntimeCodeStats,
}

impl RuntimeNames {
    /// Keeps to another budget from the next batch on.
    pub(super) fn set_budget(&mut self, budget: usize) {
        self.budget = budget;
    }

    pub(super) fn new(budget: usize) -> Self {
        Self { files: HashMap::new(), budget, batch: 0, versions: 0, stats: RuntimeCodeStats::default() }
    }

    /// Reads what was added to the files of code that samples lie in, and gives that code a new version where something
    /// has changed.
    pub(super) fn refresh<'a>(&mut self, samples: &'a [LocatedSample]) {
        self.batch += 1;
        self.files.retain(|_, held| held.file.strong_count() > 0);
        let code_of = |location: &'a Location| match location {
            Location::Anonymous { code, .. } => Some((code.id, code)),
            _ => None,
        };
        // (A sample is of one process.)
        let codes: BTreeMap<u64, &Arc<RuntimeCode>> =
            samples.iter().filter_map(|sample| sample.locations.iter().find_map(code_of)).collect();
        let mut files: Vec<Arc<RuntimeFile>> = codes.values().flat_map(|code| code.files()).collect();
        // What was read longest ago comes first, so that nothing waits for ever where there is too much to read.
        files.sort_by_key(|file| (self.files.get(&file.id).map_or(0, |held| held.used), file.id));
        files.dedup_by_key(|file| file.id);
        let mut allowance = READ_PER_BATCH;
        for file in &files {
            self.read_on(file, &mut allowance);
        }
        self.keep_budget();
        for code in codes.values() {
            let mut hasher = DefaultHasher::new();
            for file in code.files() {
                (file.id, self.files.get(&file.id).map(|held| held.version)).hash(&mut hasher);
            }
            code.set_version(hasher.finish());
        }
        self.stats.bytes = self.files.values().map(|held| held.bytes).sum();
    }

    /// The name that its process gives to what is at an address, and in what form.
    pub(super) fn name(&self, code: &RuntimeCode, address: u64) -> Result<(String, SymbolSource), Nameless> {
        let files = code.files();
        if files.is_empty() {
            return Err(Nameless::NoCodeMap);
        }
        // A jitdump knows of code that moves: it is asked first.
        let of_kind = |kind| files.iter().filter(move |file| file.kind == kind);
        of_kind(RuntimeFileKind::Jitdump)
            .chain(of_kind(RuntimeFileKind::PerfMap))
            .find_map(|file| self.files.get(&file.id)?.names.name(&file.file, address))
            .ok_or(Nameless::NotInCodeMap)
    }

    pub(super) fn stats(&self) -> RuntimeCodeStats {
        self.stats
    }

    fn read_on(&mut self, file: &Arc<RuntimeFile>, allowance: &mut u64) {
        let held = self.files.entry(file.id).or_insert_with(|| Held {
            names: Names::of(file.kind),
            file: Arc::downgrade(file),
            bytes: 0,
            used: 0,
            version: 0,
        });
        if *allowance == 0 {
            return;
        }
        held.used = self.batch;
        let most = MAX_RANGES.min(self.budget / RANGE_BYTES);
        let refused = held.names.refused();
        let progress = held.names.read_on(&file.file, allowance, most);
        let before = if progress == Progress::Restarted { 0 } else { refused };
        self.stats.refused += held.names.refused().saturating_sub(before);
        if progress != Progress::Same {
            self.versions += 1;
            held.version = self.versions;
            self.stats.restarted += u64::from(progress == Progress::Restarted);
        }
        held.bytes = held.names.bytes();
    }

    /// Drops what was used least lately.
    fn keep_budget(&mut self) {
        let mut bytes: usize = self.files.values().map(|held| held.bytes).sum();
        while bytes > self.budget && self.files.len() > 1 {
            let oldest = self.files.iter().map(|(&id, held)| (held.used, id)).min();
            let Some((_, oldest)) = oldest else { return };
            bytes -= self.files.remove(&oldest).map_or(0, |held| held.bytes);
            self.stats.evicted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt as _, time::Duration};

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use profiler_common::abi::{
        process::ProcessKey,
        sample::{EventKind, StackEnd},
    };

    use super::*;
    use crate::{
        profile::ProcessInfo,
        symbolize::{FrameNamer, SourceOptions},
    };

    pub(super) fn file(contents: &[u8]) -> File {
        let file = File::from(memfd_create(c"names", MFdFlags::MFD_CLOEXEC).expect("a file"));
        file.write_all_at(contents, 0).expect("room");
        file
    }

    fn code(contents: &str) -> Arc<RuntimeCode> {
        let code = RuntimeCode::new(ProcessKey::default());
        code.add(RuntimeFile::new(RuntimeFileKind::PerfMap, file(contents.as_bytes()), (0, 0), Arc::default()));
        Arc::new(code)
    }

    /// A sample of each code.
    fn samples(codes: &[&Arc<RuntimeCode>]) -> Vec<LocatedSample> {
        let sample = |code: &Arc<RuntimeCode>| LocatedSample {
            process: Arc::new(ProcessInfo { key: ProcessKey::default(), name: String::new(), cgroup: None }),
            thread_name: "".into(),
            kind: EventKind::OnCpu,
            end: StackEnd::Root,
            locations: vec![Location::Anonymous { code: Arc::clone(code), address: 0 }],
            count: 1,
            time_ns: 0,
        };
        codes.iter().map(|code| sample(code)).collect()
    }

    /// Two processes' code at one address has two names; the version of a code changes with what is said of it, and with
    /// nothing else.
    #[test]
    fn names_belong_to_processes() {
        let (one, two, none) = (code("100 10 one\n"), code("100 10 two\n"), RuntimeCode::new(ProcessKey::default()));
        let mut names = RuntimeNames::new(1 << 20);
        names.refresh(&samples(&[&one, &two]));
        let name = |names: &RuntimeNames, code: &RuntimeCode, address| names.name(code, address).map(|(name, _)| name);
        assert_eq!(name(&names, &one, 0x100).as_deref(), Ok("one"));
        assert_eq!(name(&names, &two, 0x100).as_deref(), Ok("two"));
        assert_eq!(name(&names, &two, 0x110), Err(Nameless::NotInCodeMap));
        assert_eq!(name(&names, &none, 0x100), Err(Nameless::NoCodeMap));
        let versions = (one.version(), two.version());
        names.refresh(&samples(&[&one, &two]));
        assert_eq!((one.version(), two.version()), versions);
        one.files()[0].file.write_all_at(b"100 10 three\n", 11).expect("room");
        names.refresh(&samples(&[&one, &two]));
        assert!(one.version() != versions.0 && two.version() == versions.1);
        assert_eq!(name(&names, &one, 0x100).as_deref(), Ok("three"));
    }

    /// The same through the cache of frames: a name does not outlive what is at its address, nor does the lack of one.
    #[test]
    fn cached_frames_follow_the_files() {
        let (one, two) = (code("0 10 one\n"), code("500 10 later\n"));
        let mut namer = FrameNamer::new(1 << 20, None, SourceOptions::default(), Arc::default());
        let mut shown = || -> Vec<String> {
            let frames = namer.name(&samples(&[&one, &two]), Duration::ZERO);
            frames.iter().flatten().map(|frame| frame.display_name()).collect()
        };
        assert_eq!(shown(), ["one", "[anonymous code]"]);
        one.files()[0].file.write_all_at(b"0 8 other\n", 9).expect("room");
        two.files()[0].file.write_all_at(b"0 10 two\n", 13).expect("room");
        assert_eq!(shown(), ["other", "two"]);
        one.files()[0].file.set_len(0).expect("it can be cut");
        assert_eq!(shown(), ["[anonymous code]", "two"]);
        let stats = namer.stats();
        assert_eq!(stats.by_source[SymbolSource::PerfMap as usize], 3);
        assert_eq!(stats.by_reason[Nameless::NotInCodeMap as usize], 2);
        assert_eq!((stats.runtime_code.restarted, stats.frames_unnamed), (1, 2));
    }

    /// A child knows what its parent knew, and sees what changes even if the parent's samples came first.
    #[test]
    fn children_share_files() {
        let parent = code("100 10 one\n");
        let child = Arc::new(parent.of_child(ProcessKey { tgid: 1, ..ProcessKey::default() }));
        let mut names = RuntimeNames::new(1 << 20);
        names.refresh(&samples(&[&parent, &child]));
        let version = child.version();
        parent.files()[0].file.write_all_at(b"100 10 two\n", 11).expect("room");
        names.refresh(&samples(&[&parent]));
        names.refresh(&samples(&[&child]));
        assert!(child.version() != version && names.files.len() == 1);
        assert_eq!(names.name(&child, 0x100).map(|(name, _)| name).as_deref(), Ok("two"));
    }

    /// The budget holds: what was used last stays. What nobody has any more is forgotten.
    #[test]
    fn keeps_its_budget() {
        let lines: String = (1..1000).map(|index| format!("{:x} 8 name\n", index * 16)).collect();
        let codes: Vec<_> = (0..8).map(|_| code(&lines)).collect();
        let mut names = RuntimeNames::new(4 * 1000 * RANGE_BYTES);
        for code in &codes {
            names.refresh(&samples(&[code]));
            assert!(names.name(code, 16).is_ok() && names.stats().bytes <= names.budget);
        }
        assert!(names.stats().evicted >= 4);
        // Read again when it is needed again, as another version: what was cached is not believed.
        let version = codes[0].version();
        names.refresh(&samples(&[&codes[0]]));
        assert!(names.name(&codes[0], 16).is_ok() && codes[0].version() != version);
        drop(codes);
        names.refresh(&samples(&[]));
        assert!(names.files.is_empty() && names.stats().bytes == 0);
    }
}

//! Names frames: from a place in a file, or an address in the kernel, to a function.
//!
//! In: located samples. Out: the frames of each, shared through a cache with a byte budget. A miss is a
//! value with a reason, never an error. Runs on one thread, because blazesym's symbolizer is neither `Send`
//! nor `Sync`.

mod cache;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    os::fd::AsRawFd as _,
    path::PathBuf,
    sync::Arc,
};

use blazesym::{
    MaybeDefault,
    symbolize::{
        Input, Symbolized, Symbolizer,
        evict::{self, Evict},
        source::{Elf, Kernel, Source},
    },
};
use tracing::debug;

use self::cache::{FrameCache, FrameKey};
use crate::profile::{Executable, Frame, FrameName, FrameType, LocatedSample, Location};

/// Files whose symbol tables blazesym may keep; the least recently used one goes first.
const MAX_FILES: usize = 32;
/// Longest function name kept, bytes: a C++ template's can be endless.
const MAX_NAME: usize = 1024;

/// What was asked and found, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct SymbolizeStats {
    /// Frames named for the first time.
    pub frames_named: u64,
    /// Frames for which no name was found.
    pub frames_unnamed: u64,
    /// Bytes the frame cache holds, estimated.
    pub cache_bytes: usize,
    /// Times half of the frame cache was dropped to keep its budget.
    pub cache_evictions: u64,
}

/// Names frames and remembers them.
pub struct FrameNamer {
    symbolizer: Symbolizer,
    cache: FrameCache,
    /// Files whose symbols blazesym holds, least recently used first.
    files: VecDeque<PathBuf>,
    stats: SymbolizeStats,
}

impl FrameNamer {
    /// A namer whose cache holds about `budget` bytes.
    pub fn new(budget: usize) -> Self {
        let symbolizer =
            Symbolizer::builder().enable_code_info(false).enable_inlined_fns(false).enable_auto_reload(true).build();
        Self { symbolizer, cache: FrameCache::new(budget), files: VecDeque::new(), stats: SymbolizeStats::default() }
    }

    /// Names every frame of the samples. The result has one vector of frames per sample, leaf first.
    pub fn name(&mut self, samples: &[LocatedSample]) -> Vec<Vec<Arc<Frame>>> {
        self.resolve_missing(samples);
        samples.iter().map(|sample| sample.locations.iter().map(|location| self.frame(location)).collect()).collect()
    }

    /// Counts so far.
    pub fn stats(&self) -> SymbolizeStats {
        SymbolizeStats { cache_bytes: self.cache.bytes(), cache_evictions: self.cache.evictions(), ..self.stats }
    }

    /// Looks up everything that is not cached, one call per file.
    fn resolve_missing(&mut self, samples: &[LocatedSample]) {
        let mut kernel = BTreeSet::new();
        let mut files: HashMap<_, (Arc<Executable>, BTreeSet<u64>)> = HashMap::new();
        for location in samples.iter().flat_map(|sample| &sample.locations) {
            if self.cache.get(FrameKey::of(location)).is_some() {
                continue;
            }
            match location {
                Location::Kernel(address) => {
                    kernel.insert(*address);
                }
                Location::File { executable, offset } => {
                    let entry = files.entry(executable.id).or_insert_with(|| (Arc::clone(executable), BTreeSet::new()));
                    entry.1.insert(offset.0);
                }
                Location::Anonymous(_) | Location::Unmapped(_) => {}
            }
        }
        if !kernel.is_empty() {
            self.resolve_kernel(&kernel.into_iter().collect::<Vec<_>>());
        }
        for (executable, offsets) in files.into_values() {
            self.resolve_file(&executable, &offsets.into_iter().collect::<Vec<_>>());
        }
    }

    fn resolve_kernel(&mut self, addresses: &[u64]) {
        let source = Source::Kernel(Kernel { vmlinux: MaybeDefault::None, debug_syms: false, ..Kernel::default() });
        let names = names_of(self.symbolizer.symbolize(&source, Input::AbsAddr(addresses)), addresses.len());
        for (&address, name) in addresses.iter().zip(names) {
            self.add(
                FrameKey::Kernel(address),
                Frame { frame_type: FrameType::Kernel, name, executable: None, address },
            );
        }
    }

    fn resolve_file(&mut self, executable: &Arc<Executable>, offsets: &[u64]) {
        let names = match executable.file() {
            Some(file) => {
                let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                let mut elf = Elf::new(path.clone());
                elf.debug_syms = false;
                let names =
                    names_of(self.symbolizer.symbolize(&Source::Elf(elf), Input::FileOffset(offsets)), offsets.len());
                self.remember_file(path);
                names
            }
            None => vec![FrameName::Unnamed; offsets.len()],
        };
        for (&offset, name) in offsets.iter().zip(names) {
            let offset = crate::profile::FileOffset(offset);
            let address = executable.virtual_address(offset).map_or(offset.0, |address| address.0);
            self.add(
                FrameKey::File(executable.id, offset),
                Frame { frame_type: FrameType::Native, name, executable: Some(Arc::clone(executable)), address },
            );
        }
    }

    fn add(&mut self, key: FrameKey, frame: Frame) {
        match frame.name {
            FrameName::Function(_) => self.stats.frames_named += 1,
            _ => self.stats.frames_unnamed += 1,
        }
        self.cache.insert(key, Arc::new(frame));
    }

    fn frame(&mut self, location: &Location) -> Arc<Frame> {
        let key = FrameKey::of(location);
        if let Some(frame) = self.cache.get(key) {
            return frame;
        }
        let (name, address, executable) = match location {
            Location::Anonymous(address) => (FrameName::Anonymous, *address, None),
            Location::Unmapped(address) => (FrameName::Unmapped, *address, None),
            // Evicted between look-up and use: a batch larger than the cache.
            Location::Kernel(address) => {
                self.resolve_kernel(&[*address]);
                return self.cache.get(key).unwrap_or_else(|| unnamed(FrameType::Kernel, *address, None));
            }
            Location::File { executable, offset } => {
                self.resolve_file(executable, &[offset.0]);
                return self
                    .cache
                    .get(key)
                    .unwrap_or_else(|| unnamed(FrameType::Native, offset.0, Some(Arc::clone(executable))));
            }
        };
        self.stats.frames_unnamed += 1;
        let frame = Arc::new(Frame { frame_type: FrameType::Native, name, executable, address });
        self.cache.insert(key, Arc::clone(&frame));
        frame
    }

    /// Keeps the number of files bounded whose symbols blazesym holds: its own cache never shrinks by itself.
    fn remember_file(&mut self, path: PathBuf) {
        self.files.retain(|known| *known != path);
        self.files.push_back(path);
        while self.files.len() > MAX_FILES {
            if let Some(oldest) = self.files.pop_front()
                && let Err(error) = self.symbolizer.evict(&Evict::Elf(evict::Elf::new(oldest)))
            {
                debug!("symbols could not be evicted: {error}");
            }
        }
    }
}

fn unnamed(frame_type: FrameType, address: u64, executable: Option<Arc<Executable>>) -> Arc<Frame> {
    Arc::new(Frame { frame_type, name: FrameName::Unnamed, executable, address })
}

/// Names in the order of the request; a failed call names nothing.
fn names_of(result: blazesym::Result<Vec<Symbolized<'_>>>, len: usize) -> Vec<FrameName> {
    let symbolized = result.unwrap_or_else(|error| {
        debug!("no symbols: {error:#}");
        Vec::new()
    });
    let mut names: Vec<FrameName> = symbolized
        .into_iter()
        .map(|symbolized| match symbolized {
            Symbolized::Sym(symbol) => FrameName::Function(shorten(&symbol.name).into()),
            Symbolized::Unknown(_) => FrameName::Unnamed,
        })
        .collect();
    names.resize(len, FrameName::Unnamed);
    names
}

fn shorten(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_NAME)]
}

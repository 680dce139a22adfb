//! Names frames: from a place in a file, or an address in the kernel, to a function.
//!
//! In: located samples. Out: the frames of each, shared through a cache with a byte budget. A miss is a
//! value with a reason, never an error. Runs on one thread, because blazesym's symbolizer is neither `Send`
//! nor `Sync`.

mod cache;
mod demangle;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod resident;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
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

use self::{
    cache::{FrameCache, FrameKey},
    resident::FilePages,
};
use crate::profile::{Executable, Frame, FrameName, FrameType, LocatedSample, Location};

/// Files whose symbol tables blazesym may keep; the least recently used one goes first.
const MAX_FILES: usize = 32;
/// Look-ups after which the memory they took is looked at. Each may touch 64 KiB of names.
const LOOK_UPS: usize = 32;
/// Names of loaded kernel modules and their addresses: kernel symbols are read again when it changes.
const MODULES: &str = "/proc/modules";

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

/// A file whose symbols blazesym holds. Its path names a descriptor, and descriptors are used again.
struct HeldFile {
    path: PathBuf,
    executable: Arc<Executable>,
}

/// Names frames and remembers them.
pub struct FrameNamer {
    symbolizer: Symbolizer,
    cache: FrameCache,
    /// Files whose symbols blazesym holds, least recently used first.
    files: VecDeque<HeldFile>,
    file_pages: FilePages,
    /// What [`MODULES`] said when kernel symbols were read.
    modules: Vec<u8>,
    stats: SymbolizeStats,
}

impl FrameNamer {
    /// A namer whose cache holds about `budget` bytes.
    pub fn new(budget: usize) -> Self {
        Self {
            symbolizer: new_symbolizer(),
            cache: FrameCache::new(budget),
            files: VecDeque::new(),
            file_pages: FilePages::new(),
            modules: std::fs::read(MODULES).unwrap_or_default(),
            stats: SymbolizeStats::default(),
        }
    }

    /// Names every frame of the samples. The result has one vector of frames per sample, leaf first.
    pub fn name(&mut self, samples: &[LocatedSample]) -> Vec<Vec<Arc<Frame>>> {
        self.forget_stale();
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
        let reads_files = !files.is_empty();
        for (executable, offsets) in files.into_values() {
            self.resolve_file(&executable, &offsets.into_iter().collect::<Vec<_>>());
        }
        if reads_files {
            self.file_pages.release();
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
            Some(file) if executable.is_nameable => {
                let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                self.hold(&path, executable);
                let mut elf = Elf::new(path);
                elf.debug_syms = false;
                let source = Source::Elf(elf);
                let mut names = Vec::with_capacity(offsets.len());
                for part in offsets.chunks(LOOK_UPS) {
                    names.extend(names_of(self.symbolizer.symbolize(&source, Input::FileOffset(part)), part.len()));
                    self.file_pages.limit();
                }
                names
            }
            _ => vec![FrameName::Unnamed; offsets.len()],
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

    /// Lets go of files that were closed, and of kernel symbols when modules came or went.
    fn forget_stale(&mut self) {
        let closed: Vec<PathBuf> =
            self.files.iter().filter(|held| held.executable.file().is_none()).map(|held| held.path.clone()).collect();
        for path in closed {
            self.evict(&path);
        }
        let modules = std::fs::read(MODULES).unwrap_or_default();
        if modules != self.modules {
            debug!("kernel modules changed: symbols are read again");
            self.modules = modules;
            self.symbolizer = new_symbolizer();
            self.files.clear();
            self.cache.forget_kernel();
        }
    }

    /// Keeps what blazesym holds bounded, since its own cache never shrinks by itself, and makes sure that
    /// what it holds under `path` is this executable.
    fn hold(&mut self, path: &Path, executable: &Arc<Executable>) {
        if self.files.iter().any(|held| held.path == path && held.executable.id != executable.id) {
            self.evict(path);
        }
        self.files.retain(|held| held.path != path);
        self.files.push_back(HeldFile { path: path.to_owned(), executable: Arc::clone(executable) });
        while self.files.len() > MAX_FILES {
            if let Some(oldest) = self.files.front().map(|held| held.path.clone()) {
                self.evict(&oldest);
            }
        }
    }

    fn evict(&mut self, path: &Path) {
        self.files.retain(|held| held.path != path);
        if let Err(error) = self.symbolizer.evict(&Evict::Elf(evict::Elf::new(path))) {
            debug!("symbols could not be evicted: {error}");
        }
    }
}

fn new_symbolizer() -> Symbolizer {
    // Demangling is ours: see `demangle`.
    Symbolizer::builder()
        .enable_code_info(false)
        .enable_inlined_fns(false)
        .enable_auto_reload(true)
        .enable_demangling(false)
        .build()
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
            Symbolized::Sym(symbol) => FrameName::Function(demangle::readable(&symbol.name).into()),
            Symbolized::Unknown(_) => FrameName::Unnamed,
        })
        .collect();
    names.resize(len, FrameName::Unnamed);
    names
}

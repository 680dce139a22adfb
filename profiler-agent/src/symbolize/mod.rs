//! Names frames: from a place in a file, or an address in the kernel, to a function.
//!
//! In: located samples. Out: the frames of each, shared through a cache with a byte budget. A miss is a
//! value with a reason, never an error. Runs on one thread, because blazesym's symbolizer, which names the kernel's
//! functions, is neither `Send` nor `Sync`.

mod cache;
mod demangle;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod source;
mod symbols;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use blazesym::{
    MaybeDefault,
    symbolize::{
        Input, Symbolized, Symbolizer,
        source::{Kernel, Source},
    },
};
use tracing::debug;

use self::{
    cache::{FrameCache, FrameKey},
    source::SourceStore,
    symbols::SymbolStore,
};
pub use self::{
    source::{NoSource, SourceOptions, SourceStats},
    symbols::SymbolSource,
};
use crate::profile::{Executable, FileOffset, Frame, FrameName, FrameType, LocatedSample, Location, Nameless};

/// Names of loaded kernel modules and their addresses: kernel symbols are read again when it changes.
const MODULES: &str = "/proc/modules";

/// What was asked and found, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct SymbolizeStats {
    /// Frames named for the first time.
    pub frames_named: u64,
    /// The same by source, for code in files.
    pub by_source: [u64; SymbolSource::ALL.len()],
    /// Frames for which no name was found.
    pub frames_unnamed: u64,
    /// The same by reason, for code in files.
    pub by_reason: [u64; Nameless::ALL.len()],
    /// Bytes that symbols of files take.
    pub symbol_bytes: usize,
    /// Files whose symbols were read, and of how many they were dropped to keep the budget.
    pub symbols_read: u64,
    /// See [`Self::symbols_read`].
    pub symbols_evicted: u64,
    /// Source lines and inlined functions.
    pub source: SourceStats,
    /// Bytes the frame cache holds, estimated.
    pub cache_bytes: usize,
    /// Times half of the frame cache was dropped to keep its budget.
    pub cache_evictions: u64,
}

/// Names frames and remembers them.
pub struct FrameNamer {
    symbolizer: Symbolizer,
    cache: FrameCache,
    symbols: SymbolStore,
    /// `None` where neither source lines nor inlined functions are asked for.
    sources: Option<SourceStore>,
    /// What [`MODULES`] said when kernel symbols were read.
    modules: Vec<u8>,
    stats: SymbolizeStats,
}

impl FrameNamer {
    /// A namer whose frames and symbols take about `budget` bytes, half of them each; debug information comes on top.
    pub fn new(budget: usize, source: SourceOptions) -> Self {
        Self {
            symbolizer: kernel_symbolizer(),
            cache: FrameCache::new(budget / 2),
            symbols: SymbolStore::new(budget / 2),
            sources: SourceStore::new(source),
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

    /// What names a place, for people.
    pub fn source_of(&mut self, location: &Location) -> &'static str {
        let Location::File { executable, offset } = location else { return "kernel symbols" };
        let symbols = self.symbols.of(executable).zip(executable.virtual_address(*offset));
        let found = symbols.and_then(|(symbols, address)| Some(symbols.name(address.0).ok()?.1));
        found.unwrap_or(SymbolSource::DebugInfo).label()
    }

    /// Counts so far.
    pub fn stats(&self) -> SymbolizeStats {
        let (symbol_bytes, symbols_read, symbols_evicted) = self.symbols.stats();
        SymbolizeStats {
            cache_bytes: self.cache.bytes(),
            cache_evictions: self.cache.evictions(),
            symbol_bytes,
            symbols_read,
            symbols_evicted,
            source: self.sources.as_ref().map(SourceStore::stats).unwrap_or_default(),
            ..self.stats
        }
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
            self.add(FrameKey::Kernel(address), Frame::new(FrameType::Kernel, name, None, address));
        }
    }

    fn resolve_file(&mut self, executable: &Arc<Executable>, offsets: &[u64]) {
        let symbols = self.symbols.of(executable);
        for &offset in offsets {
            let offset = FileOffset(offset);
            let stated = executable.virtual_address(offset);
            let found = match (&symbols, stated) {
                (Some(symbols), Some(address)) => symbols.name(address.0),
                _ => Err(Nameless::Unreadable),
            };
            let sources = self.sources.as_mut().zip(stated);
            let source = sources.map(|(sources, address)| sources.at(executable, address.0)).unwrap_or_default();
            let name = match found {
                Ok((name, source)) => {
                    self.stats.by_source[source as usize] += 1;
                    FrameName::Function(demangle::function(name))
                }
                Err(reason) => match source.function {
                    Some(name) => {
                        self.stats.by_source[SymbolSource::DebugInfo as usize] += 1;
                        FrameName::Function(name)
                    }
                    None => {
                        self.stats.by_reason[reason as usize] += 1;
                        FrameName::Unnamed(reason)
                    }
                },
            };
            let address = stated.map_or(offset.0, |address| address.0);
            self.add(
                FrameKey::File(executable.id, offset),
                Frame {
                    place: source.place,
                    inlined: source.inlined,
                    ..Frame::new(FrameType::Native, name, Some(Arc::clone(executable)), address)
                },
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
        let frame = Arc::new(Frame::new(FrameType::Native, name, executable, address));
        self.cache.insert(key, Arc::clone(&frame));
        frame
    }

    /// Lets go of files that were closed, and of kernel symbols when modules came or went.
    fn forget_stale(&mut self) {
        self.symbols.forget_closed();
        if let Some(sources) = &mut self.sources {
            sources.forget_closed();
        }
        let modules = std::fs::read(MODULES).unwrap_or_default();
        if modules != self.modules {
            debug!("kernel modules changed: symbols are read again");
            self.modules = modules;
            self.symbolizer = kernel_symbolizer();
            self.cache.forget_kernel();
        }
    }
}

fn kernel_symbolizer() -> Symbolizer {
    Symbolizer::builder()
        .enable_code_info(false)
        .enable_inlined_fns(false)
        .enable_auto_reload(true)
        .enable_demangling(false)
        .build()
}

fn unnamed(frame_type: FrameType, address: u64, executable: Option<Arc<Executable>>) -> Arc<Frame> {
    Arc::new(Frame::new(frame_type, FrameName::Unnamed(Nameless::Unreadable), executable, address))
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
            Symbolized::Sym(symbol) => FrameName::Function(demangle::function(symbol.name.into_owned())),
            Symbolized::Unknown(_) => FrameName::Unnamed(Nameless::NotCovered),
        })
        .collect();
    names.resize(len, FrameName::Unnamed(Nameless::Unreadable));
    names
}

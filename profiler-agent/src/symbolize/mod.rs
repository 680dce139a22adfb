//! Names frames: from a place in a file, or an address in the kernel, to a function.
//!
//! In: located samples. Out: the frames of each, shared through a cache with a byte budget. A miss is a
//! value with a reason, never an error. Runs on one thread, because blazesym's symbolizer, which names the kernel's
//! functions, is neither `Send` nor `Sync`; files are read by threads of their own, and frames whose file is not read in
//! time are pending until [`FrameNamer::settle`].

mod cache;
pub mod debuginfod;
mod demangle;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod kernel;
mod runtime_code;
mod source;
mod symbols;
mod workers;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use self::{
    cache::{FrameCache, FrameKey},
    debuginfod::{Debuginfod, DebuginfodStats},
    kernel::KernelSymbols,
    runtime_code::RuntimeNames,
    source::{Source, SourceStore},
    symbols::{FileSymbols, SymbolStore},
};
pub use self::{
    runtime_code::RuntimeCodeStats,
    source::{NoSource, SourceOptions, SourceStats},
    symbols::SymbolSource,
};
use crate::{
    allowance::Allowance,
    profile::{
        Executable, ExecutableId, FileOffset, Frame, FrameName, FrameType, KernelChanges, KernelCode, LocatedSample,
        Location, Nameless, Profile, RuntimeCode, Unlabelled,
    },
};

/// What was asked and found, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct SymbolizeStats {
    /// Frames named for the first time.
    pub frames_named: u64,
    /// The same by source, for user code.
    pub by_source: [u64; SymbolSource::ALL.len()],
    /// Frames for which no name was found.
    pub frames_unnamed: u64,
    /// The same by reason, for user code.
    pub by_reason: [u64; Nameless::ALL.len()],
    /// Bytes that symbols of files take.
    pub symbol_bytes: usize,
    /// Files whose symbols were read.
    pub symbols_read: u64,
    /// Of those, the ones that had been read before and were dropped since.
    pub symbols_read_again: u64,
    /// Files that were equal to one that had been read.
    pub symbols_shared: u64,
    /// Files whose symbols were dropped to keep the budget.
    pub symbols_evicted: u64,
    /// Files that took too long to read.
    pub symbols_overdue: u64,
    /// Files that are being read, or will be.
    pub symbols_pending: usize,
    /// What became of debug files that this machine does not have.
    pub debuginfod: DebuginfodStats,
    /// How long naming took, with what was waited for.
    pub time: Duration,
    /// What processes say about code that they make.
    pub runtime_code: RuntimeCodeStats,
    /// Source lines and inlined functions.
    pub source: SourceStats,
    /// Bytes the frame cache holds, estimated.
    pub cache_bytes: usize,
    /// Times half of the frame cache was dropped to keep its budget.
    pub cache_evictions: u64,
}

/// Places to name, by the file they are in.
type Places = HashMap<ExecutableId, (Arc<Executable>, BTreeSet<FileOffset>)>;
impl fmt::Display for SymbolizeStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} frames named in {:.3} s", self.frames_named, self.time.as_secs_f64())?;
        for source in SymbolSource::ALL {
            write!(f, ", {} by {}", self.by_source[source as usize], source.label())?;
        }
        write!(f, "; {} unnamed", self.frames_unnamed)?;
        for reason in Nameless::ALL {
            write!(f, ", {} {}", self.by_reason[reason as usize], reason.label())?;
        }
        write!(
            f,
            "; symbols of {} files read, {} of them again; {} bytes of symbols, {} of frames",
            self.symbols_read, self.symbols_read_again, self.symbol_bytes, self.cache_bytes
        )
    }
}

/// Names frames and remembers them.
pub struct FrameNamer {
    kernel: KernelSymbols,
    cache: FrameCache,
    symbols: SymbolStore,
    servers: Option<Arc<Debuginfod>>,
    runtime: RuntimeNames,
    /// `None` where neither source lines nor inlined functions are asked for.
    sources: Option<SourceStore>,
    allowance: Arc<Allowance>,
    /// Frames in the cache whose files are not read yet: none of them outlives its batch there.
    pending: Vec<FrameKey>,
    stats: SymbolizeStats,
}

impl FrameNamer {
    /// A namer whose frames, symbols and names of code made at run time take about `budget` bytes: three, four and one
    /// eighth of it; debug information comes on top. `servers` are asked for debug files that this machine does not have.
    /// Files are read within an allowance.
    pub fn new(
        budget: usize,
        servers: Option<Arc<Debuginfod>>,
        source: SourceOptions,
        allowance: Arc<Allowance>,
    ) -> Self {
        Self {
            kernel: KernelSymbols::new(),
            cache: FrameCache::new(budget / 8 * 3),
            symbols: SymbolStore::new(budget / 2, servers.clone(), Arc::clone(&allowance)),
            servers,
            runtime: RuntimeNames::new(budget / 8),
            sources: SourceStore::new(source, Arc::clone(&allowance)),
            allowance,
            pending: Vec::new(),
            stats: SymbolizeStats::default(),
        }
    }

    /// Keeps to another budget from now on: see [`Self::new`].
    pub fn set_budget(&mut self, budget: usize) {
        self.cache.set_budget(budget / 8 * 3);
        self.symbols.set_budget(budget / 2);
        self.runtime.set_budget(budget / 8);
    }

    /// Looks for source lines and inlined functions as `options` say from now on; `None`: not at all.
    pub fn set_source(&mut self, options: Option<SourceOptions>) {
        let sources = options.and_then(|options| SourceStore::new(options, Arc::clone(&self.allowance)));
        if self.sources.is_some() != sources.is_some() {
            self.sources = sources;
            self.cache.forget_files();
        }
    }

    /// Takes note of code that came or went in the kernel.
    pub fn announce(&mut self, changes: &KernelChanges) {
        /// Changes for each of which it is worth looking at every frame.
        const FEW: usize = 64;
        let KernelChanges { code: changed, is_incomplete } = changes;
        if *is_incomplete {
            self.kernel.read_again();
            self.cache.forget_kernel(|_| true);
        }
        changed.iter().for_each(|code| self.kernel.announce(code));
        let is_in = |address: &u64, code: &KernelCode| (code.start..code.end).contains(address);
        match changed.len() {
            0 => {}
            1..FEW => self.cache.forget_kernel(|address| changed.iter().any(|code| is_in(&address, code))),
            _ => self.cache.forget_kernel(|_| true),
        }
    }

    /// Names every frame of the samples. The result has one vector of frames per sample, leaf first. Files that have not
    /// been read by the end of `patience` are read on; their frames are pending.
    pub fn name(&mut self, samples: &[LocatedSample], patience: Duration) -> Vec<Vec<Arc<Frame>>> {
        let begun = Instant::now();
        self.forget_stale();
        self.runtime.refresh(samples);
        self.resolve_missing(samples, patience);
        let frames = |sample: &LocatedSample| sample.locations.iter().map(|location| self.frame(location)).collect();
        let named = samples.iter().map(frames).collect();
        self.stats.time += begun.elapsed();
        named
    }

    /// Names the frames of a profile that were pending when they were asked for. Waits for their files, but not for
    /// longer than `patience`.
    pub fn settle(&mut self, profile: &mut Profile<Unlabelled>, patience: Duration) {
        self.forget_stale();
        let place_of = |frame: &Frame| {
            let is_pending = frame.name == FrameName::Unnamed(Nameless::Pending);
            let executable = frame.executable.as_ref().filter(|_| is_pending)?;
            Some((Arc::clone(executable), executable.file_offset(frame.address)?))
        };
        let mut files = Places::new();
        for (executable, offset) in
            profile.samples.iter().flat_map(|sample| &sample.frames).filter_map(|frame| place_of(frame))
        {
            files.entry(executable.id).or_insert_with(|| (executable, BTreeSet::new())).1.insert(offset);
        }
        if files.is_empty() {
            return;
        }
        let begun = Instant::now();
        self.resolve_files(files, patience, true);
        self.stats.time += begun.elapsed();
        for frame in profile.samples.iter_mut().flat_map(|sample| &mut sample.frames) {
            if let Some((executable, offset)) = place_of(frame)
                && let Some(settled) = self.cache.get(FrameKey::File(executable.id, offset))
            {
                *frame = settled;
            }
        }
    }

    /// What names a place, for people.
    pub fn source_of(&mut self, location: &Location) -> &'static str {
        let (executable, offset) = match location {
            Location::File { executable, offset } => (executable, offset),
            Location::Anonymous { code, address } => {
                return self.runtime.name(code, *address).map_or("code made at run time", |(_, source)| source.label());
            }
            Location::Kernel(_) | Location::Unmapped(_) => return "kernel symbols",
        };
        let symbols = self.symbols.of(executable).ok().zip(executable.virtual_address(*offset));
        let found = symbols.and_then(|(symbols, address)| Some(symbols.name(address.0).ok()?.1));
        found.unwrap_or(SymbolSource::DebugInfo).label()
    }

    /// Counts so far.
    pub fn stats(&self) -> SymbolizeStats {
        let symbols = self.symbols.stats();
        SymbolizeStats {
            cache_bytes: self.cache.bytes(),
            cache_evictions: self.cache.evictions(),
            symbol_bytes: symbols.bytes,
            symbols_read: symbols.read,
            symbols_read_again: symbols.read_again,
            symbols_shared: symbols.shared,
            symbols_evicted: symbols.evicted,
            symbols_overdue: symbols.overdue,
            symbols_pending: symbols.pending,
            debuginfod: self.servers.as_ref().map(|servers| servers.stats()).unwrap_or_default(),
            runtime_code: self.runtime.stats(),
            source: self.sources.as_ref().map(SourceStore::stats).unwrap_or_default(),
            ..self.stats
        }
    }

    /// Looks up everything that is not cached, one call per file.
    fn resolve_missing(&mut self, samples: &[LocatedSample], patience: Duration) {
        let mut kernel = BTreeSet::new();
        let mut files = Places::new();
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
                    entry.1.insert(*offset);
                }
                Location::Anonymous { .. } | Location::Unmapped(_) => {}
            }
        }
        if !kernel.is_empty() {
            self.resolve_kernel(&kernel.into_iter().collect::<Vec<_>>());
        }
        self.resolve_files(files, patience, false);
    }

    /// Names places in files, each file's as soon as it is read. Files that somebody has waited for in vain are only
    /// waited for again where that is asked for.
    fn resolve_files(&mut self, mut files: Places, patience: Duration, waits_again: bool) {
        let deadline = Instant::now() + patience;
        files.retain(|_, (executable, offsets)| !self.try_resolve(executable, offsets));
        while Instant::now() < deadline && files.keys().any(|&id| waits_again || !self.symbols.is_slow(id)) {
            if let Some(id) = self.next_ready(deadline)
                && let Some((executable, offsets)) = files.remove(&id)
                && !self.try_resolve(&executable, &offsets)
            {
                files.insert(id, (executable, offsets));
            }
        }
        for (id, (executable, offsets)) in files {
            self.symbols.set_slow(id, true);
            let known = if waits_again { self.known_so_far(&executable) } else { None };
            if waits_again && known.is_none() {
                self.stats.by_reason[Nameless::Pending as usize] += offsets.len() as u64;
            }
            // More may be known for the next window.
            self.pending.extend(offsets.iter().map(|&offset| FrameKey::File(id, offset)));
            let symbols = known.ok_or(Nameless::Pending);
            for offset in offsets {
                self.resolve_place(&executable, offset, &symbols, Source::default());
            }
        }
    }

    /// Names places in a file, unless its symbols or their source lines are pending. Returns whether it did.
    fn try_resolve(&mut self, executable: &Arc<Executable>, offsets: &BTreeSet<FileOffset>) -> bool {
        let symbols = self.symbols.of(executable);
        let mut sources = match (&mut self.sources, &symbols) {
            (_, Err(Nameless::Pending)) => return false,
            (Some(sources), Ok(symbols)) => {
                let addresses = offsets.iter().filter_map(|&offset| Some(executable.virtual_address(offset)?.0));
                match sources.of(executable, symbols.split_off(), addresses) {
                    Some(found) => found,
                    None => return false,
                }
            }
            _ => HashMap::new(),
        };
        self.symbols.set_slow(executable.id, false);
        for &offset in offsets {
            let stated = executable.virtual_address(offset);
            let source = stated.and_then(|address| sources.remove(&address.0)).unwrap_or_default();
            self.resolve_place(executable, offset, &symbols, source);
        }
        true
    }

    /// The next file of which more is known than before; `None`: none for a moment, or until `deadline`.
    fn next_ready(&mut self, deadline: Instant) -> Option<ExecutableId> {
        /// How long one of two queues is waited at before the other is looked at.
        const TURN: Duration = Duration::from_millis(10);
        let Some(sources) = &mut self.sources else { return self.symbols.next(deadline) };
        sources.next(Instant::now()).or_else(|| self.symbols.next(deadline.min(Instant::now() + TURN)))
    }

    /// What is known of a file's symbols where more is pending.
    fn known_so_far(&mut self, executable: &Arc<Executable>) -> Option<Arc<FileSymbols>> {
        self.symbols.so_far(executable.id).or_else(|| self.symbols.of(executable).ok())
    }

    fn resolve_kernel(&mut self, addresses: &[u64]) {
        let names = self.kernel.names(addresses);
        for (&address, name) in addresses.iter().zip(names) {
            self.add(FrameKey::Kernel(address), Frame::new(FrameType::Kernel, name, None, address));
        }
    }

    fn resolve_place(
        &mut self,
        executable: &Arc<Executable>,
        offset: FileOffset,
        symbols: &Result<Arc<FileSymbols>, Nameless>,
        source: Source,
    ) {
        let stated = executable.virtual_address(offset);
        let found = match (symbols, stated) {
            (Ok(symbols), Some(address)) => symbols.name(address.0),
            (_, None) => Err(Nameless::Unreadable),
            (Err(reason), Some(_)) => Err(*reason),
        };
        let key = FrameKey::File(executable.id, offset);
        let name = match (found, source.function) {
            (Ok((name, source)), _) => {
                self.stats.by_source[source as usize] += 1;
                FrameName::Function(demangle::function(name))
            }
            (Err(_), Some(name)) => {
                self.stats.by_source[SymbolSource::DebugInfo as usize] += 1;
                FrameName::Function(name)
            }
            (Err(reason), None) => {
                // (Counted when nobody waits for it any longer.)
                if reason == Nameless::Pending {
                    self.pending.push(key);
                } else {
                    self.stats.by_reason[reason as usize] += 1;
                }
                FrameName::Unnamed(reason)
            }
        };
        let address = stated.map_or(offset.0, |address| address.0);
        let frame = Frame::new(FrameType::Native, name, Some(Arc::clone(executable)), address);
        self.add(key, Frame { place: source.place, inlined: source.inlined, ..frame });
    }

    fn add(&mut self, key: FrameKey, frame: Frame) -> Arc<Frame> {
        match frame.name {
            FrameName::Function(_) => self.stats.frames_named += 1,
            FrameName::Unnamed(Nameless::Pending) => {}
            _ => self.stats.frames_unnamed += 1,
        }
        let frame = Arc::new(frame);
        self.cache.insert(key, Arc::clone(&frame));
        frame
    }

    fn frame(&mut self, location: &Location) -> Arc<Frame> {
        let key = FrameKey::of(location);
        if let Some(frame) = self.cache.get(key) {
            return frame;
        }
        let (name, address, executable) = match location {
            Location::Anonymous { code, address } => return self.runtime_frame(key, code, *address),
            Location::Unmapped(address) => (FrameName::Unmapped, *address, None),
            // Evicted between look-up and use: a batch larger than the cache.
            Location::Kernel(address) => {
                self.resolve_kernel(&[*address]);
                return self.cache.get(key).unwrap_or_else(|| unnamed(FrameType::Kernel, *address, None));
            }
            Location::File { executable, offset } => {
                let symbols = self.symbols.of(executable);
                self.resolve_place(executable, *offset, &symbols, Source::default());
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

    fn runtime_frame(&mut self, key: FrameKey, code: &RuntimeCode, address: u64) -> Arc<Frame> {
        let name = match self.runtime.name(code, address) {
            Ok((name, source)) => {
                self.stats.by_source[source as usize] += 1;
                FrameName::Function(demangle::function(name))
            }
            Err(reason) => {
                self.stats.by_reason[reason as usize] += 1;
                FrameName::Unnamed(reason)
            }
        };
        let frame = Frame::new(FrameType::Runtime, name, None, address);
        self.add(key, frame)
    }

    /// Lets go of files that were closed, of frames that were pending or whose files servers may have now, and of kernel
    /// symbols when modules came or went.
    fn forget_stale(&mut self) {
        self.symbols.forget_closed();
        if let Some(sources) = &mut self.sources {
            sources.forget_closed();
        }
        let again = self.symbols.ask_servers_again();
        if !again.is_empty() {
            self.cache.forget_nameless(&again);
        }
        for key in std::mem::take(&mut self.pending) {
            self.cache.forget(key);
        }
        if self.kernel.have_changed() {
            self.cache.forget_kernel(|_| true);
        }
    }
}

fn unnamed(frame_type: FrameType, address: u64, executable: Option<Arc<Executable>>) -> Arc<Frame> {
    Arc::new(Frame::new(frame_type, FrameName::Unnamed(Nameless::Unreadable), executable, address))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs::File, sync::Mutex, time::SystemTime};

    use profiler_common::abi::{
        process::ProcessKey,
        sample::{EventKind, StackEnd},
    };

    use super::*;
    use crate::{
        elf,
        profile::{Events, ProcessInfo, Sample},
    };

    /// This very program, as if it were another file.
    pub(crate) fn own(id: u32, build_id: &[u8]) -> Arc<Executable> {
        let file = File::open("/proc/self/exe").expect("own executable");
        let summary = elf::summarize(&file).expect("an ELF file");
        Arc::new(Executable {
            id: ExecutableId(id),
            table: 1,
            path: "/own".to_owned(),
            build_id: Some(build_id.into()),
            identity: crate::profile::FileIdentity::default(),
            segments: summary.segments.into(),
            file: Mutex::new(Some(Arc::new(file))),
            debug: Mutex::default(),
        })
    }

    /// What nobody has waited for is pending, is not remembered as that, and has its name when the window closes.
    #[test]
    fn pending_frames_are_settled() {
        let executable = own(0, &[1]);
        let address = elf::functions(&executable.file().expect("own executable")).pop_first().expect("a function");
        let offset = executable.file_offset(address).expect("code");
        let process = Arc::new(ProcessInfo { key: ProcessKey::default(), name: String::new(), cgroup: None });
        let sample = LocatedSample {
            process: Arc::clone(&process),
            thread_name: "".into(),
            kind: EventKind::OnCpu,
            end: StackEnd::Root,
            locations: vec![Location::File { executable, offset }, Location::Unmapped(7)],
            count: 1,
            time_ns: 0,
        };
        let mut namer = FrameNamer::new(1 << 30, None, SourceOptions::default(), Arc::default());
        let frames = namer.name(&[sample], Duration::ZERO).pop().expect("a stack");
        assert_eq!(frames[0].name, FrameName::Unnamed(Nameless::Pending));
        assert_eq!(namer.stats().frames_unnamed, 1, "what is pending is not lost yet");
        let (kind, end) = (EventKind::OnCpu, StackEnd::Root);
        let row =
            Sample { resource: Unlabelled, process, thread_name: "".into(), kind, end, frames, count: 1, time_ns: 0 };
        let mut profile = Profile {
            events: Events::OnCpu,
            start: SystemTime::UNIX_EPOCH,
            duration: Duration::ZERO,
            period: Duration::ZERO,
            marks: Arc::default(),
            samples: vec![row],
        };
        namer.settle(&mut profile, Duration::from_secs(60));
        let frames = &profile.samples[0].frames;
        assert!(matches!(frames[0].name, FrameName::Function(_)), "{:?}", frames[0].name);
        assert_eq!(frames[1].name, FrameName::Unmapped);
    }
}

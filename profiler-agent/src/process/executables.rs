//! The files that processes run code from, each opened and read once however many processes map it.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
    sync::{Arc, Mutex},
};

use ring::digest;
use tracing::debug;

use profiler_common::abi::tables::MAX_EXECUTABLES;

use super::{
    proc_fs::{self, MapsLine},
    split_debug,
};
use crate::{
    elf::{self, ElfSummary},
    profile::{Executable, ExecutableId, FileIdentity, SplitDebug},
    regular_file::{self, Stamp},
};

/// Most files kept open. Further ones are known by name only, and opened when there is room.
const MAX_OPEN: usize = 1024;
/// Most files known at all. Code of further ones counts as anonymous.
const MAX_KNOWN: usize = 4096;
/// Drains after which a file that no process maps any more is closed.
const CLOSE_AFTER: u64 = 12;
/// Drains after which a file that could not be opened is tried again.
const RETRY_AFTER: u64 = 12;
/// The kernel's name of its shared library in every process.
const VDSO: &str = "[vdso]";

/// Identity of an open file, as `/proc/PID/maps` and the kernel's notices give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileKey {
    pub(super) device: u32,
    pub(super) inode: u64,
}

/// An executable that processes map. Only mappings hold it, so its reference count tells whether any does.
#[derive(Debug)]
pub(super) struct MappedFile(pub(super) Arc<Executable>);

struct Entry {
    file: Arc<MappedFile>,
    /// What the file looked like when it was opened; `None` where it could not be.
    stamp: Option<Stamp>,
    /// The drain in which opening it was tried.
    tried: u64,
    /// The drain in which a process was last seen to map it.
    last_mapped: u64,
}

impl Entry {
    /// Whether the file is open and has not been rewritten since.
    fn is_current(&self) -> bool {
        self.stamp.is_some() && self.file.0.file().and_then(|file| Stamp::of(&file)) == self.stamp
    }
}

/// Every executable file that is mapped somewhere, or was a moment ago.
pub(super) struct Executables {
    entries: HashMap<FileKey, Entry>,
    vdso: Option<Arc<MappedFile>>,
    next_id: u32,
    /// Numbers of unwind tables that nobody has. The one that was given back longest ago is used first.
    free_tables: VecDeque<u32>,
    /// Files by the number of their unwind table.
    by_table: HashMap<u32, Arc<Executable>>,
    /// Numbers that were given back, or to another file, since this was last asked for.
    vacated: Vec<u32>,
}

impl Default for Executables {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            vdso: None,
            next_id: 0,
            // Number 0 is for code without a table.
            free_tables: (1..MAX_EXECUTABLES as u32).collect(),
            by_table: HashMap::new(),
            vacated: Vec::new(),
        }
    }
}

impl Executables {
    /// The file whose unwind table has this number.
    pub(super) fn by_table(&self, table: u32) -> Option<Arc<Executable>> {
        self.by_table.get(&table).cloned()
    }

    /// Numbers of unwind tables that belong to another file now, or to none.
    pub(super) fn take_vacated(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.vacated)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The file with this identity, if it is known.
    pub(super) fn known(&self, key: FileKey) -> Option<Arc<MappedFile>> {
        self.entries.get(&key).map(|entry| Arc::clone(&entry.file))
    }

    /// The file behind a mapping of a living process; `None` for memory that no file backs.
    pub(super) fn of_mapping(&mut self, tgid: u32, line: &MapsLine, generation: u64) -> Option<Arc<MappedFile>> {
        if line.path == VDSO {
            return self.vdso();
        }
        if line.inode == 0 {
            return None;
        }
        let key = FileKey { device: line.device, inode: line.inode };
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.last_mapped = generation;
            let is_untimely = entry.stamp.is_none() && generation.saturating_sub(entry.tried) < RETRY_AFTER;
            if entry.is_current() || is_untimely {
                return Some(Arc::clone(&entry.file));
            }
            // Rewritten in place since, or never opened: it is read anew, under an identity of its own.
            let file = Arc::clone(&entry.file.0);
            self.entries.remove(&key);
            self.close(&file);
        }
        if self.entries.len() >= MAX_KNOWN {
            return None;
        }
        let is_room = self.entries.values().filter(|entry| entry.stamp.is_some()).count() < MAX_OPEN;
        let file = if is_room { open(tgid, line) } else { None };
        let stamp = file.as_ref().and_then(Stamp::of);
        let summary = file.as_ref().and_then(elf::summarize).unwrap_or_default();
        let debug =
            file.as_ref().and_then(|file| split_debug::find(tgid, &line.path, file, summary.build_id.as_deref()));
        let file = self.add(line.path.clone(), summary, file, debug)?;
        self.entries.insert(key, Entry { file: Arc::clone(&file), stamp, tried: generation, last_mapped: generation });
        Some(file)
    }

    /// Closes files that no process has mapped for a while.
    pub(super) fn sweep(&mut self, generation: u64) {
        let mut unused = Vec::new();
        self.entries.retain(|_, entry| {
            if Arc::strong_count(&entry.file) > 1 {
                entry.last_mapped = generation;
            }
            let keep = generation.saturating_sub(entry.last_mapped) < CLOSE_AFTER;
            if !keep {
                unused.push(Arc::clone(&entry.file.0));
            }
            keep
        });
        for file in unused {
            self.close(&file);
        }
    }

    /// Lets go of a file and of the number of its unwind table.
    fn close(&mut self, file: &Executable) {
        file.close();
        self.by_table.remove(&file.table);
        self.free_tables.push_back(file.table);
        self.vacated.push(file.table);
    }

    /// `None`: there are too many already.
    fn add(
        &mut self,
        path: String,
        summary: ElfSummary,
        file: Option<File>,
        debug: Option<SplitDebug>,
    ) -> Option<Arc<MappedFile>> {
        let id = ExecutableId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        let table = self.free_tables.pop_front()?;
        let file = Arc::new(Executable {
            id,
            table,
            path,
            identity: FileIdentity {
                go_build_id: summary.go_build_id,
                hash: file.as_ref().and_then(|file| hash_of_ends(file).ok()),
            },
            build_id: summary.build_id,
            segments: summary.segments.into(),
            file: Mutex::new(file.map(Arc::new)),
            debug: Mutex::new(debug.map(Arc::new)),
        });
        self.by_table.insert(table, Arc::clone(&file));
        // A late sample in the number's last file may have asked for a table that nobody made.
        self.vacated.push(table);
        Some(Arc::new(MappedFile(file)))
    }

    /// The vDSO is the same in every 64-bit process of a running kernel: ours is copied to a file once.
    fn vdso(&mut self) -> Option<Arc<MappedFile>> {
        if self.vdso.is_none() {
            let file = copy_own_vdso();
            let summary = file.as_ref().and_then(elf::summarize).unwrap_or_default();
            self.vdso = self.add(VDSO.to_owned(), summary, file, None);
        }
        self.vdso.clone()
    }
}

/// An executable file that nothing has to map; `None` where it is none that is understood.
pub fn open_executable(path: &Path) -> io::Result<Option<Arc<Executable>>> {
    let file = regular_file::open(path)?;
    let whole_path = fs::canonicalize(path)?;
    let executable = elf::summarize(&file).map(|summary| {
        let build_id = summary.build_id;
        let debug = split_debug::find(std::process::id(), &whole_path.to_string_lossy(), &file, build_id.as_deref());
        Executable {
            id: ExecutableId(0),
            table: 0,
            path: path.to_string_lossy().into_owned(),
            build_id,
            identity: FileIdentity { go_build_id: summary.go_build_id, hash: hash_of_ends(&file).ok() },
            segments: summary.segments.into(),
            file: Mutex::new(Some(Arc::new(file))),
            debug: Mutex::new(debug.map(Arc::new)),
        }
    });
    Ok(executable.map(Arc::new))
}

/// Opens the file behind a mapping. The kernel's link to it is exact even when its path was deleted,
/// replaced or is in another mount namespace; the path inside the process's root is the fallback where that
/// link needs more privileges than we have.
pub(super) fn open(tgid: u32, line: &MapsLine) -> Option<File> {
    let link = format!("/proc/{tgid}/map_files/{:x}-{:x}", line.start, line.end);
    let by_path = || {
        let file = regular_file::open(format!("/proc/{tgid}/root{}", line.path)).ok()?;
        (file.metadata().ok()?.ino() == line.inode).then_some(file)
    };
    let file = regular_file::open(link).ok().or_else(by_path);
    if file.is_none() {
        debug!("{} cannot be opened; its frames stay unnamed", line.path);
    }
    file
}

/// What OpenTelemetry calls `htlhash`: the first 16 bytes of the SHA-256 of a file's first 4 KiB, its last 4 KiB and its
/// length (semantic conventions 1.37, `process.executable.build_id.htlhash`).
fn hash_of_ends(file: &File) -> io::Result<[u8; 16]> {
    const END: u64 = 4096;
    let length = file.metadata()?.len();
    let mut end = vec![0; length.min(END) as usize];
    let mut context = digest::Context::new(&digest::SHA256);
    for offset in [0, length.saturating_sub(END)] {
        file.read_exact_at(&mut end, offset)?;
        context.update(&end);
    }
    context.update(&length.to_be_bytes());
    let mut hash = [0; 16];
    hash.copy_from_slice(&context.finish().as_ref()[..16]);
    Ok(hash)
}

fn copy_own_vdso() -> Option<File> {
    let lines = proc_fs::executable_maps(std::process::id()).ok()?;
    let vdso = lines.into_iter().find(|line| line.path == VDSO)?;
    let mut image = vec![0; usize::try_from(vdso.end - vdso.start).ok().filter(|&size| size <= 1 << 20)?];
    let mut memory = File::open("/proc/self/mem").ok()?;
    memory.seek(SeekFrom::Start(vdso.start)).ok()?;
    memory.read_exact(&mut image).ok()?;
    let descriptor = nix::sys::memfd::memfd_create(c"vdso", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).ok()?;
    let mut file = File::from(descriptor);
    file.write_all(&image).ok()?;
    Some(file)
}

/// The executable's own file name, from the kernel's link to it.
pub(super) fn executable_name(tgid: u32) -> Option<String> {
    let target = fs::read_link(format!("/proc/{tgid}/exe")).ok()?;
    let name = target.file_name()?.to_string_lossy();
    Some(name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hash is what `(head -c 4096 F; tail -c 4096 F; LENGTH) | sha256sum` says, also where both ends are the same bytes.
    #[test]
    fn hashes_the_ends_of_a_file() {
        let check = |bytes: &[u8], expect: [u8; 4]| {
            let mut file = tempfile().expect("a file");
            file.write_all(bytes).expect("written");
            assert_eq!(hash_of_ends(&file).expect("a hash")[..4], expect);
        };
        check(b"abc", [167, 231, 158, 138]);
        check(&[7; 10_000], [56, 61, 36, 138]);
    }

    fn tempfile() -> io::Result<File> {
        Ok(nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?.into())
    }
}

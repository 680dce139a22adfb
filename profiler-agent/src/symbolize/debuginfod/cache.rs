//! Debug files on disk: one folder, files named by build ID, the least recently used ones evicted.
//!
//! In: a build ID, or a file that is arriving. Out: an open file that states the build ID. The folder may be used by
//! several agents at a time, so it is looked at when it matters and no index of it is kept. Whatever is found in it is
//! checked when it is opened.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use tracing::debug;

use super::BuildId;
use crate::{elf, regular_file::open_unlinked, whole_file::WholeFile};

/// What names of files begin with that are still arriving; no build ID does.
const INCOMING: &str = "incoming-";

/// A folder of debug files.
#[derive(Debug)]
pub(super) struct DiskCache {
    folder: PathBuf,
    /// Most bytes of all files; one that is arriving comes on top.
    limit: u64,
}

/// A file that is arriving; removed where it is not kept.
pub(super) struct Incoming {
    /// Locked while it arrives, which tells it from one that an agent left when it was killed.
    whole: WholeFile,
    bytes: u64,
}

/// One file of the folder.
struct Entry {
    path: PathBuf,
    used: SystemTime,
    bytes: u64,
}

impl DiskCache {
    /// Makes the folder where there is none, and checks that it is ours alone. An error names it.
    pub(super) fn open(folder: &Path, limit: u64) -> io::Result<Self> {
        let explain = |error: io::Error| {
            io::Error::new(error.kind(), format!("{} cannot keep debug files: {error}", folder.display()))
        };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(explain)?;
        let metadata = fs::metadata(folder).map_err(explain)?;
        let is_ours = metadata.uid() == nix::unistd::geteuid().as_raw();
        if !is_ours || metadata.mode() & 0o077 != 0 {
            let refusal = "others may use it; it has to be a folder of the agent's own user, with mode 0700";
            return Err(explain(io::Error::new(io::ErrorKind::PermissionDenied, refusal)));
        }
        let cache = Self { folder: folder.to_owned(), limit };
        cache.remove_leftovers().map_err(explain)?;
        // Whether files can be made there: full or read-only file systems are known at start.
        cache.receive().map_err(explain)?;
        Ok(cache)
    }

    /// The file that states this build ID, marked as used now. What is there and states something else is removed.
    pub(super) fn find(&self, build_id: &BuildId) -> Option<File> {
        let path = self.path(build_id);
        let file = match open_unlinked(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                debug!("{} is removed: {error}", path.display());
                // It may be gone, or be a folder that somebody made there: then it stays a miss.
                let _ = fs::remove_file(&path);
                return None;
            }
        };
        if !states(&file, build_id) {
            debug!("{} is removed: it is not the file that its name says", path.display());
            // It may be gone already.
            let _ = fs::remove_file(&path);
            return None;
        }
        // At worst, it is evicted earlier than others.
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    /// A place for a file that arrives.
    pub(super) fn receive(&self) -> io::Result<Incoming> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(format!("{INCOMING}{}-{number}", std::process::id()));
        // What a killed agent with the same PID left, and another agent has not removed.
        let _ = fs::remove_file(&path);
        let whole = WholeFile::create(path, 0o600)?;
        whole.file.try_lock()?;
        Ok(Incoming { whole, bytes: 0 })
    }

    /// Keeps a file that states this build ID, in the place of others that were used less recently. The result is how
    /// many of those there were; `None`: it states something else, and is not kept.
    pub(super) fn keep(&self, incoming: Incoming, build_id: &BuildId) -> io::Result<Option<u64>> {
        if !states(&incoming.whole.file, build_id) {
            return Ok(None);
        }
        let evicted = self.make_room(incoming.bytes)?;
        incoming.whole.keep(&self.path(build_id))?;
        Ok(Some(evicted))
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.entries().map_or(0, |entries| entries.iter().map(|entry| entry.bytes).sum())
    }

    fn make_room(&self, bytes: u64) -> io::Result<u64> {
        let mut entries = self.entries()?;
        let mut held: u64 = entries.iter().map(|entry| entry.bytes).sum();
        entries.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.used));
        let mut evicted = 0;
        while held.saturating_add(bytes) > self.limit {
            let Some(oldest) = entries.pop() else { break };
            match fs::remove_file(&oldest.path) {
                Ok(()) => evicted += 1,
                // Another agent was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            held -= oldest.bytes;
        }
        Ok(evicted)
    }

    /// The folder's files, but for what is arriving. Whatever else somebody put there is let alone.
    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.folder)?.flatten() {
            let name = entry.file_name();
            let is_build_id = name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit);
            // Files may vanish while they are listed.
            let Ok(metadata) = entry.metadata() else { continue };
            if is_build_id && metadata.is_file() {
                let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                // Small files take whole blocks.
                let bytes = metadata.len().max(metadata.blocks().saturating_mul(512));
                entries.push(Entry { path: entry.path(), used, bytes });
            }
        }
        Ok(entries)
    }

    /// Removes what agents were receiving when they were killed; what one is receiving now is locked.
    fn remove_leftovers(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)?.flatten() {
            if !entry.file_name().as_encoded_bytes().starts_with(INCOMING.as_bytes()) {
                continue;
            }
            let is_left = match open_unlinked(&entry.path()) {
                Ok(file) => file.try_lock().is_ok(),
                Err(_) => true,
            };
            if is_left {
                // It may be gone already.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    fn path(&self, build_id: &BuildId) -> PathBuf {
        self.folder.join(build_id.hex())
    }
}

impl Incoming {
    /// Adds what arrived.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.whole.file.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Bytes that arrived.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Whether it is an ELF file that states the build ID.
fn states(file: &File, build_id: &BuildId) -> bool {
    elf::summarize(file).and_then(|summary| summary.build_id).as_deref() == Some(build_id.bytes())
}

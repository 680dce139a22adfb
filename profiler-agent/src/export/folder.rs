//! A folder in which one agent keeps files, oldest first, within a number of bytes and an age.
//!
//! In: whole files. Out: the oldest, and what had to make room. Files become visible whole, and are on the disk when
//! they are said to be kept. The folder is listed once, when it is opened; what happens to its files behind the agent's
//! back is found out when they are used.

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use thiserror::Error;
use tracing::debug;

use crate::{regular_file, whole_file::WholeFile};

/// Most files that are kept: what is known of them takes 3 MiB then.
const MAX_FILES: usize = 65_536;
/// Most names that are listed: what a folder of ours cannot hold is not read to its end.
const MAX_NAMES: usize = 2 * MAX_FILES;
/// Name of the file that is being written. No kept file has it.
const TEMPORARY: &str = ".incoming";
/// What files take on disk is a multiple of this, almost everywhere.
const BLOCK: u64 = 4096;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes on disk, whole blocks counted.
    pub bytes: u64,
    /// What is older is removed, if there is a limit.
    pub age: Option<Duration>,
}

/// Why a folder cannot be used, or a file not be kept.
#[derive(Debug, Error)]
pub enum FolderError {
    /// Two agents would remove each other's files.
    #[error("{} is in use by another agent", .0.display())]
    InUse(PathBuf),
    /// Not a folder that can be trusted.
    #[error("{} may be written by others; it has to be a folder of the agent's own user that nobody else can write to", .0.display())]
    NotOurs(PathBuf),
    /// A folder of ours does not hold that much.
    #[error("{} holds more than {MAX_NAMES} files", .0.display())]
    Crowded(PathBuf),
    /// It would not fit if everything else were removed.
    #[error("{needed} bytes do not fit into the {limit} that {} may take", .folder.display())]
    TooLarge {
        /// Where it was to be kept.
        folder: PathBuf,
        /// What it takes on disk.
        needed: u64,
        /// What there is for it at most.
        limit: u64,
    },
    /// The system's answer: the disk is full, read-only or broken, or the folder is gone.
    #[error("{}: {source}", .path.display())]
    Io {
        /// What was used.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a file was removed that nobody asked to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Excess {
    Age,
    Space,
}

/// Tells a file from the folder's others.
pub(super) trait FileName {
    fn file_name(&self) -> String;
}

/// A file that is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept<F> {
    pub(super) file: F,
    /// When its age began.
    pub(super) since: SystemTime,
    /// What it takes on disk.
    pub(super) bytes: u64,
}

/// A file that is to be kept.
pub(super) struct NewFile<'a, F> {
    pub(super) file: F,
    /// When its age began.
    pub(super) since: SystemTime,
    pub(super) mode: u32,
    /// What it holds, one after the other.
    pub(super) parts: &'a [&'a [u8]],
}

/// A folder and what it holds.
#[derive(Debug)]
pub(super) struct Folder<F> {
    path: PathBuf,
    /// The folder itself, locked as long as it is open.
    handle: File,
    limits: Limits,
    /// Oldest first.
    files: VecDeque<Kept<F>>,
    bytes: u64,
    /// Files that were to be removed and could not be, with what they take on disk.
    unremoved: VecDeque<(PathBuf, u64)>,
    unremoved_bytes: u64,
}

impl<F: FileName> Folder<F> {
    /// Makes the folder where there is none, and removes what a killed agent was writing.
    pub(super) fn open(path: &Path, mode: u32, limits: Limits) -> Result<Self, FolderError> {
        let explain = |source| FolderError::Io { path: path.to_owned(), source };
        if !path.is_dir() {
            DirBuilder::new().recursive(true).mode(mode).create(path).map_err(explain)?;
        }
        // Relative names would lead elsewhere if the agent's working directory changed.
        let path = fs::canonicalize(path).map_err(explain)?;
        let handle = File::open(&path).map_err(explain)?;
        lock(&handle, &path)?;
        // The folder's own name is to be on the disk, too. That it cannot be is no reason to refuse the folder.
        if let Some(Ok(parent)) = path.parent().map(File::open) {
            let _ = parent.sync_all();
        }
        // There is none most of the time, and if it cannot be removed now, the next write says so.
        let _ = fs::remove_file(path.join(TEMPORARY));
        let (files, unremoved) = (VecDeque::new(), VecDeque::new());
        Ok(Self { path, handle, limits, files, bytes: 0, unremoved, unremoved_bytes: 0 })
    }

    /// Refuses a folder whose files others may have made.
    pub(super) fn require_ours(&self) -> Result<(), FolderError> {
        let metadata = self.handle.metadata().map_err(|error| self.explain(error))?;
        let is_ours = metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
        if is_ours { Ok(()) } else { Err(FolderError::NotOurs(self.path.clone())) }
    }

    /// The names in it that stand for files to keep, in any order.
    pub(super) fn find(&self, parse: impl Fn(&str) -> Option<F>) -> Result<Vec<F>, FolderError> {
        let mut found = Vec::new();
        let names = fs::read_dir(&self.path).map_err(|error| self.explain(error))?;
        for (index, entry) in names.enumerate() {
            if index == MAX_NAMES {
                return Err(FolderError::Crowded(self.path.clone()));
            }
            let entry = entry.map_err(|error| self.explain(error))?;
            found.extend(entry.file_name().to_str().and_then(&parse));
        }
        Ok(found)
    }

    /// Keeps a file that is there already as the newest. What does not fit beside it is removed.
    pub(super) fn adopt(&mut self, kept: Kept<F>, now: SystemTime, removed: impl FnMut(Excess, F)) {
        if let Err(error) = self.make_room(kept.bytes, now, removed) {
            debug!("{error}");
        }
        self.add(kept);
    }

    /// Writes a file of these parts and keeps it as the newest; what has to make room is removed first, so that the
    /// folder never takes more than it may. An error leaves nothing of the file behind. The result is what it takes.
    pub(super) fn write(
        &mut self,
        file: NewFile<F>,
        now: SystemTime,
        removed: impl FnMut(Excess, F),
    ) -> Result<u64, FolderError> {
        let NewFile { file, since, mode, parts } = file;
        let len = parts.iter().map(|part| part.len() as u64).sum::<u64>();
        let needed = len.div_ceil(BLOCK).saturating_mul(BLOCK);
        self.remove_again();
        let limit = self.limits.bytes.saturating_sub(self.unremoved_bytes);
        if needed > limit {
            return Err(FolderError::TooLarge { folder: self.path.clone(), needed, limit });
        }
        self.make_room(needed, now, removed)?;
        let path = self.path_of(&file);
        let bytes = self.write_durably(&path, mode, parts).map_err(|source| FolderError::Io { path, source })?;
        self.add(Kept { file, since, bytes });
        Ok(bytes)
    }

    /// Removes what is too old, and what has to go for so many bytes to come. Where nothing can be removed (the disk is
    /// read-only), what is too old is forgotten all the same, and the rest stays.
    pub(super) fn make_room(
        &mut self,
        coming: u64,
        now: SystemTime,
        mut removed: impl FnMut(Excess, F),
    ) -> Result<(), FolderError> {
        while let (Some(excess), Some(oldest)) = (self.excess(coming, now), self.oldest()) {
            if excess == Excess::Space {
                let path = self.path_of(&oldest.file);
                remove(&path).map_err(|source| FolderError::Io { path, source })?;
            }
            if let Some(oldest) = self.remove_oldest() {
                removed(excess, oldest.file);
            }
        }
        Ok(())
    }

    pub(super) fn oldest(&self) -> Option<&Kept<F>> {
        self.files.front()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Kept<F>> {
        self.files.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    /// What the files take, with those that could not be removed.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.saturating_add(self.unremoved_bytes)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn path_of(&self, file: &F) -> PathBuf {
        self.path.join(file.file_name())
    }

    /// Opens a file to read it: ours, and no link that was put into its place.
    pub(super) fn open_file(&self, file: &F) -> io::Result<File> {
        let file = regular_file::open_unlinked(&self.path_of(file))?;
        if file.metadata()?.uid() != nix::unistd::geteuid().as_raw() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is another user's"));
        }
        Ok(file)
    }

    /// Forgets the oldest file and removes it from the disk; where that fails, it is tried again with the next one.
    pub(super) fn remove_oldest(&mut self) -> Option<Kept<F>> {
        let oldest = self.files.pop_front()?;
        self.bytes = self.bytes.saturating_sub(oldest.bytes);
        self.remove(&oldest.file, oldest.bytes);
        Some(oldest)
    }

    /// Removes a file that is not kept.
    pub(super) fn remove(&mut self, file: &F, bytes: u64) {
        self.remove_again();
        let path = self.path_of(file);
        if let Err(error) = remove(&path) {
            debug!("{} cannot be removed: {error}", path.display());
            self.unremoved.push_back((path, bytes));
            self.unremoved_bytes = self.unremoved_bytes.saturating_add(bytes);
        }
    }

    /// Tries again to remove what could not be, until one still cannot: each call is one vain attempt at most.
    fn remove_again(&mut self) {
        while let Some((path, bytes)) = self.unremoved.pop_front() {
            if remove(&path).is_err() {
                self.unremoved.push_back((path, bytes));
                return;
            }
            self.unremoved_bytes = self.unremoved_bytes.saturating_sub(bytes);
        }
    }

    fn add(&mut self, kept: Kept<F>) {
        self.bytes = self.bytes.saturating_add(kept.bytes);
        self.files.push_back(kept);
    }

    /// Why the oldest file cannot stay if so many bytes come, if it cannot.
    fn excess(&self, coming: u64, now: SystemTime) -> Option<Excess> {
        let oldest = self.files.front()?;
        // Where the clock was set back, what is from the future is new.
        let age = now.duration_since(oldest.since).unwrap_or_default();
        let files = self.files.len() + usize::from(coming > 0);
        if self.limits.age.is_some_and(|limit| age > limit) {
            Some(Excess::Age)
        } else if self.bytes().saturating_add(coming) > self.limits.bytes || files > MAX_FILES {
            Some(Excess::Space)
        } else {
            None
        }
    }

    fn write_durably(&self, path: &Path, mode: u32, parts: &[&[u8]]) -> io::Result<u64> {
        let temporary = self.path.join(TEMPORARY);
        // Nobody else writes here; there is one where removing it failed.
        remove(&temporary)?;
        let mut whole = WholeFile::create(temporary, mode)?;
        parts.iter().try_for_each(|part| whole.file.write_all(part))?;
        whole.keep(path)?;
        // The name is on the disk when the folder is. File systems that cannot do this do it in their own time.
        let synced = match self.handle.sync_all() {
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => Err(error),
            _ => fs::symlink_metadata(path),
        };
        match synced {
            Ok(metadata) => Ok(on_disk(&metadata)),
            Err(error) => {
                // What was not kept must not be found again; if this fails too, it may be.
                let _ = remove(path);
                Err(error)
            }
        }
    }

    fn explain(&self, source: io::Error) -> FolderError {
        FolderError::Io { path: self.path.clone(), source }
    }
}

/// Locks the folder. An agent that was just killed, or a process that is just being started by one, may hold it for a
/// moment longer.
fn lock(handle: &File, path: &Path) -> Result<(), FolderError> {
    const ATTEMPTS: u32 = 20;
    for attempt in 1.. {
        match handle.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if attempt < ATTEMPTS => thread::sleep(Duration::from_millis(50)),
            Err(TryLockError::WouldBlock) => return Err(FolderError::InUse(path.to_owned())),
            Err(TryLockError::Error(source)) => return Err(FolderError::Io { path: path.to_owned(), source }),
        }
    }
    Ok(())
}

/// What a file takes: small ones take whole blocks.
pub(super) fn on_disk(metadata: &fs::Metadata) -> u64 {
    metadata.len().max(metadata.blocks().saturating_mul(512))
}

/// Removes a file; that it is gone already is as good.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

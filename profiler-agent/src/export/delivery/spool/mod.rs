//! Requests that wait on disk for one destination.
//!
//! In: requests. Out: the oldest, until its delivery was acknowledged; and what had to be dropped, by reason. Each is a
//! file of its own, which appears when it is whole and vanishes when it was acknowledged: whatever moment an agent is
//! killed at, the next one finds whole requests and at most one unfinished file, which it removes. A request may be
//! delivered twice (when the agent ends between the acknowledgement and the removal), but none is lost. Knows nothing of
//! receivers.

mod record;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    time::SystemTime,
};

use thiserror::Error;
use tracing::{debug, warn};
use zerocopy::IntoBytes as _;

#[cfg(fuzzing)]
pub(crate) use self::record::fuzzing;
use self::record::{Damage, HEADER, Header, MAX_BODY, MAX_FILE};
use crate::{
    export::{
        folder::{Excess, FileName, Folder, FolderError, Kept, Limits, NewFile, on_disk},
        otlp::Request,
    },
    profile::Tally,
};

/// What names of stored requests end with, behind their number.
const SUFFIX: &str = ".request";
/// Numbers of requests are smaller: from there, no agent gets to where they end.
const NUMBERS_END: u64 = 1 << 63;

/// Why a request is not stored, or the spool cannot be used.
#[derive(Debug, Error)]
pub enum SpoolError {
    /// The folder's fault.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Longer than any request.
    #[error("a request of {0} bytes is not stored; {MAX_BODY} is the most")]
    TooLong(usize),
    /// A request is there and cannot be read now: there are too many open files or too little memory.
    #[error("a stored request cannot be read: {0}")]
    Unreadable(io::Error),
}

/// Why a stored request was dropped before it was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// It waited for longer than it may.
    Age,
    /// Newer ones needed its room.
    Space,
    /// It is not what was written.
    Damaged,
}

/// What was dropped for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Why.
    pub reason: DropReason,
    /// How many requests.
    pub requests: u64,
    /// What they stood for, as far as that is known: a request of an earlier run whose header is damaged does not tell.
    pub tally: Tally,
}

/// Tells a stored request from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number(u64);

/// A request that is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// What to tell the spool when it was delivered.
    pub number: Number,
    /// What to deliver.
    pub request: Request,
}

/// What is known of a stored request without its file.
#[derive(Clone, Copy, Debug)]
struct Entry {
    number: u64,
    tally: Tally,
}

/// The queue of one destination.
#[derive(Debug)]
pub struct Spool {
    folder: Folder<Entry>,
    next: u64,
    dropped: Vec<Dropped>,
}

impl FileName for Entry {
    fn file_name(&self) -> String {
        format!("{:020}{SUFFIX}", self.number)
    }
}

impl Entry {
    fn parse(name: &str) -> Option<Self> {
        let number = name.strip_suffix(SUFFIX)?.parse().ok().filter(|&number| number < NUMBERS_END)?;
        let entry = Self { number, tally: Tally::default() };
        (entry.file_name() == name).then_some(entry)
    }
}

impl Spool {
    /// Makes the folder where there is none, keeps other agents out of it, and finds what an earlier run left.
    pub fn open(folder: &Path, limits: Limits, now: SystemTime) -> Result<Self, SpoolError> {
        let folder: Folder<Entry> = Folder::open(folder, 0o700, limits)?;
        folder.require_ours()?;
        let mut found = folder.find(Entry::parse)?;
        found.sort_unstable_by_key(|entry| entry.number);
        let next = found.last().map_or(0, |last| last.number + 1);
        let mut spool = Self { folder, next, dropped: Vec::new() };
        for entry in found {
            spool.adopt(entry, now)?;
        }
        spool.make_room(now);
        Ok(spool)
    }

    /// Stores a request behind the others. It is on the disk when this returns; an error leaves nothing of it behind.
    pub fn push(&mut self, request: &Request, now: SystemTime) -> Result<(), SpoolError> {
        let too_long = SpoolError::TooLong(request.body.len());
        let (header, compressed) = record::encode(request).map_err(SpoolError::Unreadable)?.ok_or(too_long)?;
        let entry = Entry { number: self.next, tally: request.tally };
        // Another number for each attempt: whatever there is under a name that failed, it does not fail again.
        self.next += 1;
        let parts = [header.as_bytes(), &compressed];
        let file = NewFile { file: entry, since: header.closed(), mode: 0o600, parts: &parts };
        self.folder.write(file, now, counting(&mut self.dropped))?;
        Ok(())
    }

    /// The oldest request. What is too old or damaged is dropped before.
    pub fn front(&mut self, now: SystemTime) -> Result<Option<Stored>, SpoolError> {
        loop {
            self.make_room(now);
            let Some(oldest) = self.folder.oldest() else { return Ok(None) };
            let entry = oldest.file;
            match self.read(&entry)? {
                Ok(request) => return Ok(Some(Stored { number: Number(entry.number), request })),
                Err(reason) => {
                    warn!("{} is dropped: {reason}", self.folder.path_of(&entry).display());
                    self.folder.remove_oldest();
                    count(&mut self.dropped, DropReason::Damaged, entry.tally);
                }
            }
        }
    }

    /// Removes the oldest request, which was delivered or given up. The result is false if it is not there any more: it
    /// was dropped since it was asked for, and counted.
    pub fn pop(&mut self, number: Number) -> bool {
        let is_there = self.folder.oldest().is_some_and(|oldest| oldest.file.number == number.0);
        if is_there {
            self.folder.remove_oldest();
        }
        is_there
    }

    /// How many requests there are.
    pub fn len(&self) -> usize {
        self.folder.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What they take on disk.
    pub fn bytes(&self) -> u64 {
        self.folder.bytes()
    }

    /// What they stand for.
    pub fn tally(&self) -> Tally {
        self.folder.iter().map(|kept| kept.file.tally).sum()
    }

    /// When the window of the oldest was closed.
    pub fn oldest(&self) -> Option<SystemTime> {
        self.folder.oldest().map(|oldest| oldest.since)
    }

    /// What was dropped since this was last asked, at most one for each reason.
    pub fn take_dropped(&mut self) -> Vec<Dropped> {
        std::mem::take(&mut self.dropped)
    }

    /// Takes over a request of an earlier run, or drops it where its header says at once that it is damaged.
    fn adopt(&mut self, entry: Entry, now: SystemTime) -> Result<(), SpoolError> {
        let (reason, tally, bytes) = match self.folder.open_file(&entry) {
            Ok(mut file) => match read_header(&mut file)? {
                (Ok(header), metadata) if metadata.len() == header.file_len() => {
                    let file = Entry { tally: header.tally(), ..entry };
                    let kept = Kept { file, since: header.closed(), bytes: on_disk(&metadata) };
                    self.folder.adopt(kept, now, counting(&mut self.dropped));
                    return Ok(());
                }
                (Ok(header), metadata) => (Damage::Length.to_string(), header.tally(), on_disk(&metadata)),
                (Err(damage), metadata) => (damage.to_string(), Tally::default(), on_disk(&metadata)),
            },
            Err(error) if is_passing(&error) => return Err(SpoolError::Unreadable(error)),
            Err(error) => (error.to_string(), Tally::default(), 0),
        };
        warn!("{} is dropped: {reason}", self.folder.path_of(&entry).display());
        self.folder.remove(&entry, bytes);
        count(&mut self.dropped, DropReason::Damaged, tally);
        Ok(())
    }

    fn make_room(&mut self, now: SystemTime) {
        // What cannot be removed can still be delivered.
        if let Err(error) = self.folder.make_room(0, now, counting(&mut self.dropped)) {
            debug!("{error}");
        }
    }

    /// The request of a file, or what is wrong with it.
    fn read(&self, entry: &Entry) -> Result<Result<Request, String>, SpoolError> {
        let read = || -> io::Result<Vec<u8>> {
            let file = self.folder.open_file(entry)?;
            let len = file.metadata()?.len().min(MAX_FILE + 1);
            let mut bytes = Vec::with_capacity(len as usize);
            file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => Ok(record::decode(&bytes).map_err(|damage| damage.to_string())),
            Err(error) if is_passing(&error) => Err(SpoolError::Unreadable(error)),
            Err(error) => Ok(Err(error.to_string())),
        }
    }
}

impl From<Excess> for DropReason {
    fn from(excess: Excess) -> Self {
        match excess {
            Excess::Age => Self::Age,
            Excess::Space => Self::Space,
        }
    }
}

/// Counts what the folder removes by itself.
fn counting(dropped: &mut Vec<Dropped>) -> impl FnMut(Excess, Entry) {
    |excess, entry| count(dropped, excess.into(), entry.tally)
}

fn count(dropped: &mut Vec<Dropped>, reason: DropReason, tally: Tally) {
    debug!("a stored request of {tally} is dropped: {reason:?}");
    match dropped.iter_mut().find(|dropped| dropped.reason == reason) {
        Some(dropped) => {
            dropped.requests += 1;
            dropped.tally += tally;
        }
        None => dropped.push(Dropped { reason, requests: 1, tally }),
    }
}

/// What the file says of itself, and what the file system says of it.
fn read_header(file: &mut File) -> Result<(Result<Header, Damage>, std::fs::Metadata), SpoolError> {
    let metadata = file.metadata().map_err(SpoolError::Unreadable)?;
    let mut bytes = Vec::with_capacity(HEADER);
    let header = match file.take(HEADER as u64).read_to_end(&mut bytes) {
        Ok(_) => Header::parse(&bytes),
        Err(_) => Err(Damage::Header),
    };
    Ok((header, metadata))
}

/// Whether an error says nothing about the file, but that the agent has no means to read it now.
fn is_passing(error: &io::Error) -> bool {
    use nix::libc::{EACCES, EINTR, EMFILE, ENFILE, ENOMEM, EPERM};
    matches!(error.raw_os_error(), Some(EACCES | EINTR | EMFILE | ENFILE | ENOMEM | EPERM))
}

//! Where the configuration comes from, and when it changes.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::config::{Config, Overrides};

/// What tells two states of a file apart. A ConfigMap's file is another one with every change: it is a link to a folder's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    len: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            file: (metadata.dev(), metadata.ino()),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// The configuration's sources: a file, which may change, and what flags and environment set, which does not.
pub(super) struct Source {
    path: Option<PathBuf>,
    overrides: Overrides,
    seen: Option<Stamp>,
}

impl Source {
    /// What was read just now from `path`.
    pub(super) fn new(path: Option<PathBuf>, overrides: Overrides) -> Self {
        let seen = path.as_deref().and_then(Stamp::of);
        Self { path, overrides, seen }
    }

    /// The configuration, if its file has changed since it was read last, or `always`. A file that is gone for a moment has
    /// not changed.
    pub(super) fn read(&mut self, always: bool) -> Option<anyhow::Result<Config>> {
        let now = self.path.as_deref().and_then(Stamp::of);
        let has_changed = now.is_some() && now != self.seen;
        if !has_changed && !always {
            return None;
        }
        self.seen = now.or(self.seen);
        Some(Config::load(self.path.as_deref(), self.overrides.clone()))
    }
}

//! Flags about debug files that this machine does not have.

use std::path::PathBuf;

use clap::Args;

use crate::config::Debuginfod;

#[derive(Args)]
pub(super) struct DebuginfodOptions {
    /// debuginfod server that is asked for the symbols of stripped programs, by their build IDs; may be given several
    /// times. No server is asked by default.
    #[arg(long = "debuginfod-url", value_name = "URL")]
    urls: Vec<String>,
    /// Folder in which what servers sent is kept. By default /var/cache/profiler-agent/debuginfod.
    #[arg(long = "debuginfod-cache", value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Most MiB of that folder's files; what was not used for longest is evicted. By default 1024.
    #[arg(long = "debuginfod-cache-mib", value_name = "MIB")]
    cache_mib: Option<u64>,
}

impl DebuginfodOptions {
    /// As the configuration has it.
    pub(super) fn settings(self) -> Debuginfod {
        Debuginfod { urls: self.urls, cache: self.cache, cache_mib: self.cache_mib }
    }
}

/// URLs may hold passwords.
impl std::fmt::Debug for DebuginfodOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} servers", self.urls.len())
    }
}

//! Ring buffers that wake the agent, as descriptors to wait for and records to read.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

/// Records from the kernel programs, in the order in which they were reserved.
pub struct Ring(pub(super) RingBuf<MapData>);

impl Ring {
    /// Calls `record` with every record that is waiting.
    pub fn read(&mut self, mut record: impl FnMut(&[u8])) {
        while let Some(item) = self.0.next() {
            record(&item);
        }
    }

    /// Registers it with the current event loop, to be awaited.
    pub fn watch(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the ring owns its descriptor and neither replaces nor closes it while it lives.
        Ok(unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?)
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The programs' debug log, on its way to the agent's.
pub struct DebugLog(pub(super) EbpfLogger<&'static dyn log::Log>);

impl DebugLog {
    /// Passes on what is waiting.
    pub fn flush(&mut self) {
        self.0.flush();
    }

    /// Registers it with the current event loop, to be awaited.
    pub fn watch(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the log owns its descriptor and neither replaces nor closes it while it lives.
        Ok(unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?)
    }
}

impl AsRawFd for DebugLog {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

//! Signals that the daemon heeds.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// One stream for each.
pub(super) struct Signals {
    pub(super) interrupt: Signal,
    pub(super) terminate: Signal,
    pub(super) hangup: Signal,
    pub(super) stop: Signal,
    pub(super) resume: Signal,
}

impl Signals {
    pub(super) fn catch() -> anyhow::Result<Self> {
        let catch = |kind, name| signal(kind).with_context(|| format!("{name} cannot be caught"));
        Ok(Self {
            interrupt: catch(SignalKind::interrupt(), "SIGINT")?,
            terminate: catch(SignalKind::terminate(), "SIGTERM")?,
            hangup: catch(SignalKind::hangup(), "SIGHUP")?,
            stop: catch(SignalKind::user_defined1(), "SIGUSR1")?,
            resume: catch(SignalKind::user_defined2(), "SIGUSR2")?,
        })
    }
}

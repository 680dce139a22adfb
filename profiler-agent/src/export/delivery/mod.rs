//! Delivery: what leaves the pipeline reaches every destination, or is counted under the reason why it did not.
//!
//! ```text
//! exporter thread                     a thread for each destination
//! profiles ─► encode, once ─► inbox ─► spool ─► send, in order, until accepted
//!                         └─► inbox ─► files
//! ```
//!
//! Nothing waits for a destination: each has an inbox of its own with a bound, and a disk or a receiver that does not
//! answer keeps only its own thread.

mod backoff;
mod destination;
mod inbox;
mod spool;
mod stats;

#[cfg(fuzzing)]
pub(crate) use self::spool::fuzzing;
pub use self::stats::{DestinationStats, DropReason, LATENCY_BUCKETS, Waiting};

use std::{
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use self::{destination::Destination, inbox::Inbox, spool::Spool};
use super::{
    files::{self, FileExporter},
    folder::Limits,
    otlp::{
        self,
        client::{self, Client},
    },
};
use crate::{profile::Profile, status::Stats};

/// Windows that may wait for being written to files.
const FILES_QUEUE: usize = 4;

/// Where profiles go, and what may wait for that.
#[derive(Debug)]
pub struct Options {
    /// Receivers.
    pub destinations: Vec<client::Settings>,
    /// The folder of what waits for them, if it may wait on disk.
    pub spool: Option<SpoolOptions>,
    /// Most bytes that may wait for a receiver in memory.
    pub queue_bytes: usize,
    /// A folder of files, one a window.
    pub files: Option<files::Settings>,
    /// How requests are encoded.
    pub encoding: otlp::Options,
}

/// What may wait on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpoolOptions {
    /// The folder; each receiver has one in it.
    pub folder: PathBuf,
    /// What each receiver's may hold.
    pub limits: Limits,
}

/// What waits only in memory is given up after this.
const MAX_AGE_IN_MEMORY: Duration = Duration::from_secs(24 * 60 * 60);

/// Delivery under way.
pub struct Delivery {
    outlets: Outlets,
    threads: Vec<JoinHandle<()>>,
    deadline: watch::Sender<Option<Instant>>,
}

impl Delivery {
    /// Checks the options and starts a thread for each destination, which begins with what its spool holds.
    pub fn open(options: Options, stats: &Arc<Stats>) -> anyhow::Result<Self> {
        let (deadline, _) = watch::channel(None);
        let max_age = options.spool.as_ref().and_then(|spool| spool.limits.age).unwrap_or(MAX_AGE_IN_MEMORY);
        let mut outlets =
            Outlets { inboxes: Vec::new(), files: None, encoding: options.encoding, stats: Arc::clone(stats) };
        let mut threads = Vec::new();
        for settings in options.destinations {
            let stats = Arc::new(DestinationStats::new(settings.name.clone()));
            let inbox = Arc::new(Inbox::new(options.queue_bytes));
            let spool = options.spool.as_ref().and_then(|spool| open_spool(spool, &settings.name));
            let name = settings.name.clone();
            let client = Client::new(settings).with_context(|| format!("the destination {name:?} cannot be used"))?;
            let destination = Destination::new(client, Arc::clone(&inbox), spool, max_age, Arc::clone(&stats));
            threads.push(start_destination(destination, deadline.subscribe())?);
            outlets.inboxes.push((inbox, stats));
        }
        if let Some(settings) = options.files {
            let stats = Arc::new(DestinationStats::new("files".to_owned()));
            let exporter = FileExporter::open(&settings, SystemTime::now()).context("files cannot be written")?;
            let (sender, profiles) = sync_channel(FILES_QUEUE);
            let written = Arc::clone(&stats);
            let thread = start_thread("files", move || write_files(exporter, &profiles, &written))?;
            threads.push(thread);
            outlets.files = Some((sender, stats));
        }
        stats.set_destinations(outlets.destinations());
        Ok(Self { outlets, threads, deadline })
    }

    /// Delivers what comes until the queue is closed.
    pub fn start(self, profiles: mpsc::Receiver<Profile>) -> anyhow::Result<Delivering> {
        let Self { outlets, mut threads, deadline } = self;
        let (report_end, ended) = oneshot::channel();
        let exporter = start_thread("exporter", move || {
            outlets.export(profiles);
            // An error means that nobody waits for it.
            let _ = report_end.send(());
        })?;
        threads.insert(0, exporter);
        Ok(Delivering { ended, threads, deadline })
    }
}

/// Delivery of what comes from a pipeline.
pub struct Delivering {
    /// Resolves when the queue of profiles is closed and every destination was handed what it held.
    pub ended: oneshot::Receiver<()>,
    threads: Vec<JoinHandle<()>>,
    deadline: watch::Sender<Option<Instant>>,
}

impl Delivering {
    /// Waits until everything is delivered, at most for `patience`; what is not stays in its spool, or is counted. Call when
    /// the queue of profiles is closed, or about to be.
    pub fn finish(self, patience: Duration) {
        // An error means that all destinations have ended.
        let _ = self.deadline.send(Some(Instant::now() + patience));
        for thread in self.threads {
            if thread.join().is_err() {
                error!("a thread of the exporters' panicked");
            }
        }
    }
}

/// A spool that cannot be used is no reason not to deliver.
fn open_spool(options: &SpoolOptions, name: &str) -> Option<Spool> {
    // (Names have no slashes.)
    let folder = options.folder.join(name);
    match Spool::open(&folder, options.limits, SystemTime::now()) {
        Ok(spool) => {
            if !spool.is_empty() {
                info!("{name}: {} requests of an earlier run are sent first ({})", spool.len(), spool.tally());
            }
            Some(spool)
        }
        Err(error) => {
            warn!("{name}: {error}; what cannot be delivered at once waits in memory only");
            None
        }
    }
}

/// Runs a destination on a thread with an event loop of its own.
fn start_destination(
    destination: Destination,
    deadline: watch::Receiver<Option<Instant>>,
) -> anyhow::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("a destination's event loop could not be started")?;
    start_thread("destination", move || runtime.block_on(destination.run(deadline)))
}

fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.with_context(|| format!("the thread {name:?} could not be started"))
}

/// What the exporter thread hands profiles to.
struct Outlets {
    inboxes: Vec<(Arc<Inbox>, Arc<DestinationStats>)>,
    files: Option<(SyncSender<Arc<Profile>>, Arc<DestinationStats>)>,
    encoding: otlp::Options,
    stats: Arc<Stats>,
}

impl Outlets {
    /// What is counted about each.
    fn destinations(&self) -> Vec<Arc<DestinationStats>> {
        let inboxes = self.inboxes.iter().map(|(_, stats)| stats);
        inboxes.chain(self.files.iter().map(|(_, stats)| stats)).cloned().collect()
    }

    /// Encodes what comes once and hands it to every destination.
    fn export(self, mut profiles: mpsc::Receiver<Profile>) {
        while let Some(profile) = profiles.blocking_recv() {
            let profile = Arc::new(profile);
            if let Some((files, stats)) = &self.files
                && let Err(TrySendError::Full(profile) | TrySendError::Disconnected(profile)) =
                    files.try_send(Arc::clone(&profile))
            {
                stats.lose(DropReason::QueueFull, profile.total());
            }
            if self.inboxes.is_empty() {
                continue;
            }
            let encoded = otlp::requests(&profile, &self.encoding);
            self.stats.rows_encoded.add(encoded.rows);
            for request in encoded.requests {
                for (inbox, stats) in &self.inboxes {
                    let dropped = inbox.put(request.clone());
                    stats.lose(DropReason::QueueFull, dropped);
                }
            }
        }
        for (inbox, _) in &self.inboxes {
            inbox.close();
        }
    }
}

/// Writes every profile that comes.
fn write_files(mut exporter: FileExporter, profiles: &Receiver<Arc<Profile>>, stats: &DestinationStats) {
    let mut failed = false;
    while let Ok(profile) = profiles.recv() {
        match exporter.write(&profile, SystemTime::now()) {
            Ok(written) => {
                stats.exported.add(profile.total());
                stats.requests.add(1);
                stats.bytes.add(written.bytes);
                stats.wire_bytes.add(written.bytes);
                if std::mem::take(&mut failed) {
                    info!("files are written again");
                }
            }
            Err(error) => {
                stats.lose(DropReason::NotWritten, profile.total());
                if !std::mem::replace(&mut failed, true) {
                    warn!("{} were dropped: {error}", profile.total());
                }
            }
        }
    }
}

//! What is logged, and how.

use std::{
    io::{self, Write},
    sync::{PoisonError, RwLock},
};

use clap::{Args, ValueEnum};
use tracing::{Level, level_filters::LevelFilter};
use tracing_subscriber::{Layer as _, filter::filter_fn, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::redact::Redaction;

/// What the log does not tell: known when the configuration is.
static REDACTION: RwLock<Redaction> = RwLock::new(Redaction::NONE);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Human,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, Args)]
pub(super) struct LogOptions {
    /// How much to log, to standard error. `trace` includes the kernel programs' own debug log.
    #[arg(long, global = true, value_enum, env = "PROFILER_LOG_LEVEL", default_value = "info")]
    log_level: LogLevel,
    /// Form of the log.
    #[arg(long, global = true, value_enum, env = "PROFILER_LOG_FORMAT", default_value = "human")]
    log_format: LogFormat,
}

/// What the rest of the program needs to know about logging.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logging {
    /// The kernel programs should log.
    pub(super) kernel_debug: bool,
}

impl LogOptions {
    pub(super) fn start(&self) -> Logging {
        let level = match self.log_level {
            LogLevel::Off => LevelFilter::OFF,
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Trace => LevelFilter::TRACE,
        };
        // Libraries only speak up when something is wrong; what they trace is theirs, not our users'.
        let ours = filter_fn(move |metadata| {
            let target = metadata.target();
            // (What fails between us and the API server we say ourselves, once.)
            let is_loud = *metadata.level() <= Level::WARN && !target.starts_with("kube_client");
            *metadata.level() <= level && (is_loud || target.starts_with("profiler"))
        });
        let layer = tracing_subscriber::fmt::layer().with_writer(|| Log);
        let layer = match self.log_format {
            LogFormat::Human => {
                use std::io::IsTerminal as _;
                layer.with_ansi(std::io::stderr().is_terminal()).with_target(false).boxed()
            }
            LogFormat::Json => layer.json().boxed(),
        };
        tracing_subscriber::registry().with(layer.with_filter(ours)).init();
        Logging { kernel_debug: self.log_level == LogLevel::Trace }
    }
}

/// Takes out of the log what `redaction` hides, from now on.
pub(super) fn redact(redaction: &Redaction) {
    *REDACTION.write().unwrap_or_else(PoisonError::into_inner) = redaction.clone();
}

/// Standard error, without what is redacted. A message is written at once.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = str::from_utf8(bytes).ok();
        let redaction = REDACTION.read().unwrap_or_else(PoisonError::into_inner);
        match text.and_then(|text| redaction.text(text)) {
            Some(redacted) => io::stderr().write_all(redacted.as_bytes()).map(|()| bytes.len()),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

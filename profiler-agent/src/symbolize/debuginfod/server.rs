//! One debuginfod server: where it is, how it is asked, and whether it deserves to be asked now.
//!
//! In: a build ID. Out: the bytes that the server sends for it, unchecked, or why there are none. What a URL may hold
//! besides scheme and host (credentials) is never shown.

use std::{
    fmt,
    io::Read as _,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::warn;
use ureq::{
    Agent, Error,
    http::{StatusCode, Uri},
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::{Absence, BuildId, cache::Incoming};
use crate::system_certificates;

/// How long a connection may take to be there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that answers may send us to another so many times.
const MAX_REDIRECTS: u32 = 3;
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;
/// Failures in a row after which a server is left alone for a while.
const MAX_FAILURES: u32 = 3;
/// How long it is left alone first; twice as long after each failure that follows.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// Longest time it is left alone.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// Where a server is. It is shown without what may be secret.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerUrl(Uri);

impl FromStr for ServerUrl {
    type Err = String;

    /// The error does not repeat the text, which may hold a password.
    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected for example https://debuginfod.debian.net";
        let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| format!("this is not a URL; {expected}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(format!("this URL does not begin with http:// or https://; {expected}"));
        }
        if uri.host().is_none_or(str::is_empty) || uri.query().is_some() || text.contains('#') {
            return Err(format!("this URL is more or less than a server and a folder; {expected}"));
        }
        Ok(Self(uri))
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme_str().unwrap_or_default(), self.0.host().unwrap_or_default())?;
        self.0.port().map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl ServerUrl {
    fn is_encrypted(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    fn is_on_this_machine(&self) -> bool {
        matches!(self.0.host(), Some("localhost" | "127.0.0.1" | "[::1]"))
    }
}

/// A server and how it has behaved lately.
pub(super) struct Server {
    url: ServerUrl,
    agent: Agent,
    max_bytes: u64,
    failures_in_row: u32,
    left_alone_until: Option<Instant>,
}

impl Server {
    /// Does not connect yet. An answer of more than `max_bytes`, or one that takes longer than `timeout` from the first
    /// byte asked to the last one received, is given up.
    pub(super) fn new(url: ServerUrl, max_bytes: u64, timeout: Duration) -> Result<Self, String> {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT.min(timeout)))
            .timeout_global(Some(timeout))
            .max_redirects(MAX_REDIRECTS)
            // Who asked for encryption is not redirected away from it.
            .https_only(url.is_encrypted())
            .max_idle_connections(1)
            .user_agent(concat!("profiler-agent/", env!("CARGO_PKG_VERSION")));
        if url.is_on_this_machine() {
            config = config.proxy(None);
        }
        // An unencrypted server may redirect to an encrypted one: without certificates that is an error then.
        let certificates: Vec<_> =
            system_certificates::read().iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        if url.is_encrypted() && certificates.is_empty() {
            return Err(format!("{url}: no trusted certificates in {}", system_certificates::PLACES));
        }
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::from(certificates))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let agent = config.tls_config(tls.build()).build().new_agent();
        Ok(Self { url, agent, max_bytes, failures_in_row: 0, left_alone_until: None })
    }

    /// Whether it is worth asking now.
    pub(super) fn is_left_alone(&self) -> bool {
        self.left_alone_until.is_some_and(|until| Instant::now() < until)
    }

    /// Asks for the debug file of a build ID, and hands on what the server says is that.
    pub(super) fn fetch(
        &self,
        build_id: &BuildId,
        incoming: &mut Incoming,
        is_wanted: impl Fn() -> bool,
    ) -> Result<(), Absence> {
        let response = self
            .agent
            .get(format!("{}/buildid/{}/debuginfo", self.url.0.to_string().trim_end_matches('/'), build_id.hex()))
            // A word of elfutils' servers: they need not look for what would be refused.
            .header("X-DEBUGINFOD-MAXSIZE", self.max_bytes)
            .call()
            .map_err(|error| absence(&error))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND | StatusCode::GONE => return Err(Absence::NotFound),
            StatusCode::NOT_ACCEPTABLE | StatusCode::PAYLOAD_TOO_LARGE => return Err(Absence::TooLarge),
            _ => return Err(Absence::ServerError),
        }
        let body = response.into_body();
        if body.content_length().is_some_and(|len| len > self.max_bytes) {
            return Err(Absence::TooLarge);
        }
        let mut body = body.into_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let len = match body.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(absence(&Error::from(error))),
            };
            if incoming.bytes() + len as u64 > self.max_bytes {
                return Err(Absence::TooLarge);
            }
            incoming.write(&chunk[..len]).map_err(|_| Absence::NotStored)?;
            if !is_wanted() {
                return Err(Absence::TimedOut);
            }
        }
    }

    /// Remembers how it behaved: whether what it sent, or did not, was its fault.
    pub(super) fn judge(&mut self, outcome: Result<(), Absence>) {
        match outcome {
            Ok(()) | Err(Absence::NotFound | Absence::TooLarge) => {
                self.failures_in_row = 0;
                self.left_alone_until = None;
            }
            // That was the disk's fault.
            Err(Absence::NotStored) => {}
            Err(fault) => {
                self.failures_in_row = self.failures_in_row.saturating_add(1);
                let Some(more) = self.failures_in_row.checked_sub(MAX_FAILURES) else { return };
                let pause = FIRST_PAUSE.saturating_mul(1 << more.min(10)).min(LONGEST_PAUSE);
                self.left_alone_until = Some(Instant::now() + pause);
                warn!(
                    "the debuginfod server {} is left alone for {}: {} failures in a row, the last one: {}",
                    self.url,
                    humantime::format_duration(pause),
                    self.failures_in_row,
                    fault.label(),
                );
            }
        }
    }
}

/// What an error means. Its own words are not repeated: they may hold the URL.
fn absence(error: &Error) -> Absence {
    match error {
        Error::Timeout(_) => Absence::TimedOut,
        Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => Absence::TimedOut,
        Error::Io(_) | Error::HostNotFound | Error::ConnectionFailed | Error::Tls(_) | Error::Rustls(_) => {
            Absence::Unreachable
        }
        _ => Absence::ServerError,
    }
}

//! Why a receiver cannot be used, and why it did not take a request. Nothing that is said here holds a secret.

use std::{fmt, time::Duration};

use thiserror::Error;

/// Characters of a receiver's own words that are repeated.
const MAX_WORDS: usize = 256;

/// A setting that cannot work, found without connecting. The text does not repeat values that may be secret.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("{setting}: {problem}")]
pub struct ClientError {
    /// The setting, as the configuration file calls it inside a destination.
    pub setting: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl ClientError {
    pub(super) fn new(setting: &'static str, problem: impl Into<String>) -> Self {
        Self { setting, problem: problem.into() }
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of failure.
    pub reason: Reason,
    /// How long the receiver asks to be left alone, bounded.
    pub retry_after: Option<Duration>,
    /// One sentence for people, with the way out where there is one.
    pub message: String,
}

impl Failure {
    pub(super) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, retry_after: None, message: message.into() }
    }

    /// Whether the same request may be sent again.
    pub fn is_retryable(&self) -> bool {
        self.reason.is_retryable()
    }
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// There was no connection, or it broke before there was an answer.
    Unreachable,
    /// Both sides did not agree on TLS: certificates, or whether to use it at all.
    TlsFailed,
    /// There was no answer in time, or the receiver says that itself ran out of time.
    Timeout,
    /// The receiver says that it cannot take requests now.
    Unavailable,
    /// The receiver says that requests come too fast, and will take them later.
    Throttled,
    /// A file with credentials cannot be read now.
    NoCredentials,
    /// The receiver does not accept the credentials, or wants some.
    Unauthorized,
    /// The request is larger than the receiver accepts.
    TooLarge,
    /// The receiver has no room for the request, and does not say that it ever will.
    Exhausted,
    /// The receiver does not know profiles, or not at this path or by this protocol.
    NotFound,
    /// The receiver finds something else wrong with the request.
    Refused,
    /// The receiver failed, and did not say that trying again would help.
    ReceiverFailed,
    /// What answered is no OTLP receiver.
    Garbage,
}

impl Reason {
    /// Every reason, in the order of the counters.
    pub const ALL: [Self; 13] = [
        Self::Unreachable,
        Self::TlsFailed,
        Self::Timeout,
        Self::Unavailable,
        Self::Throttled,
        Self::NoCredentials,
        Self::Unauthorized,
        Self::TooLarge,
        Self::Exhausted,
        Self::NotFound,
        Self::Refused,
        Self::ReceiverFailed,
        Self::Garbage,
    ];

    /// Name in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::TlsFailed => "tls_failed",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Throttled => "throttled",
            Self::NoCredentials => "no_credentials",
            Self::Unauthorized => "unauthorized",
            Self::TooLarge => "too_large",
            Self::Exhausted => "exhausted",
            Self::NotFound => "not_found",
            Self::Refused => "refused",
            Self::ReceiverFailed => "receiver_failed",
            Self::Garbage => "garbage",
        }
    }

    /// Whether the OTLP specification allows sending the same request again
    /// (<https://opentelemetry.io/docs/specs/otlp/#failures>). It does not know failures to read our own files: there,
    /// nothing was sent.
    pub fn is_retryable(self) -> bool {
        match self {
            Self::Unreachable
            | Self::TlsFailed
            | Self::Timeout
            | Self::Unavailable
            | Self::Throttled
            | Self::NoCredentials => true,
            Self::Unauthorized
            | Self::TooLarge
            | Self::Exhausted
            | Self::NotFound
            | Self::Refused
            | Self::ReceiverFailed
            | Self::Garbage => false,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// What a receiver says, on one line, without control characters, and not too long.
pub(super) fn printable(text: &str) -> String {
    let mut words = String::new();
    // (Words are looked at one by one, so that a long text is not gone through to its end.)
    for (count, character) in text.trim().chars().enumerate() {
        if count == MAX_WORDS {
            words.push('…');
            break;
        }
        let is_plain = !character.is_control() && !is_invisible(character);
        words.push(if is_plain { character } else { ' ' });
    }
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Characters that change how a terminal shows others: marks of direction and of width zero.
fn is_invisible(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

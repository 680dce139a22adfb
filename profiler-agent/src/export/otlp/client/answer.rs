//! What an answer means: statuses of HTTP and gRPC, what they say about coming again, and partial success.

use std::{
    io::Read as _,
    time::{Duration, SystemTime},
};

use flate2::read::GzDecoder;
use hyper::{
    StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderName, LOCATION, RETRY_AFTER},
    http::response::Parts,
};
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceResponse;
use prost::Message;
use tonic::{Code, Status};

use super::{
    Failure, Reason,
    connection::{Answer, MAX_ANSWER},
    failure::printable,
};

/// Longest time a receiver is left alone on its word.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// What a body is that was not read to its end.
const ENDLESS: &str = "more than any answer has";
const NO_MESSAGE: &str = "gRPC without one whole message";
const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// Bytes before a message of gRPC: whether it is compressed, and its length.
pub(super) const GRPC_PREFIX: usize = 5;

/// What a receiver took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// How many of the request's profiles it did not take, for good.
    pub rejected_profiles: u64,
    /// Why, or what else it wants to be known; usually empty.
    pub message: String,
}

/// What we sent that nobody else may see. Receivers may repeat what they were sent.
#[derive(Default)]
pub(super) struct Secrets<'a>(Vec<&'a str>);

impl<'a> Secrets<'a> {
    /// Shorter secrets are not looked for: they would be found in any text.
    const MIN_LEN: usize = 4;

    pub(super) fn new(secrets: impl Iterator<Item = &'a str>) -> Self {
        Self(secrets.filter(|secret| secret.len() >= Self::MIN_LEN).collect())
    }

    /// A receiver's words, without secrets and in a form that can be printed.
    fn blanked(&self, words: &str) -> String {
        let mut words = std::borrow::Cow::Borrowed(words);
        for secret in &self.0 {
            if words.contains(secret) {
                words = words.replace(secret, "***").into();
            }
        }
        printable(&words)
    }
}

/// What an answer over HTTP means.
pub(super) fn of_http(answer: &Answer, secrets: &Secrets<'_>) -> Result<Accepted, Failure> {
    let status = answer.parts.status;
    if !status.is_success() {
        return Err(http_failure(answer, secrets));
    }
    // Some answer nothing, and no receiver that took nothing says that it did.
    if answer.body.is_empty() {
        return Ok(Accepted::default());
    }
    if answer.is_cut {
        return Err(garbage(ENDLESS));
    }
    let content_type = content_type(&answer.parts);
    let is_protobuf = matches!(content_type, "" | "application/x-protobuf" | "application/protobuf");
    if !is_protobuf || answer.parts.headers.contains_key(CONTENT_ENCODING) {
        return Err(garbage(&format!("HTTP {} and {}", status.as_u16(), described(content_type))));
    }
    accepted(&answer.body, secrets)
}

/// What an answer over gRPC means.
pub(super) fn of_grpc(answer: &Answer, secrets: &Secrets<'_>) -> Result<Accepted, Failure> {
    if answer.parts.status != StatusCode::OK {
        return Err(http_failure(answer, secrets));
    }
    let content_type = content_type(&answer.parts);
    if !content_type.starts_with("application/grpc") {
        return Err(garbage(&format!("{} instead of gRPC", described(content_type))));
    }
    if answer.is_cut {
        return Err(garbage(ENDLESS));
    }
    let trailers = answer.trailers.as_ref().and_then(Status::from_header_map);
    let Some(status) = trailers.or_else(|| Status::from_header_map(&answer.parts.headers)) else {
        return Err(garbage("gRPC without a status"));
    };
    if status.code() != Code::Ok {
        return Err(grpc_failure(&status, secrets));
    }
    let [flag, a, b, c, d, message @ ..] = &answer.body[..] else {
        return if answer.body.is_empty() { Ok(Accepted::default()) } else { Err(garbage(NO_MESSAGE)) };
    };
    let is_whole = u32::from_be_bytes([*a, *b, *c, *d]) as usize == message.len();
    match flag {
        0 if is_whole => accepted(message, secrets),
        // Go's servers compress the answer as the request was, whatever we say that we understand (grpc-go 1.76,
        // `Server.processUnaryRPC`).
        1 if is_whole && answer.parts.headers.get(GRPC_ENCODING).is_some_and(|encoding| encoding == "gzip") => {
            let message = decompressed(message).ok_or_else(|| garbage("what gzip does not understand"))?;
            accepted(&message, secrets)
        }
        _ => Err(garbage(NO_MESSAGE)),
    }
}

/// What gzip made of at most as many bytes as are read of an answer.
fn decompressed(compressed: &[u8]) -> Option<Vec<u8>> {
    let mut message = Vec::new();
    GzDecoder::new(compressed).take(MAX_ANSWER as u64 + 1).read_to_end(&mut message).ok()?;
    (message.len() <= MAX_ANSWER).then_some(message)
}

/// The answer's own words, after it took the request.
fn accepted(message: &[u8], secrets: &Secrets<'_>) -> Result<Accepted, Failure> {
    let response = ExportProfilesServiceResponse::decode(message).map_err(|_| garbage("something else than OTLP"))?;
    let partial = response.partial_success.unwrap_or_default();
    Ok(Accepted {
        rejected_profiles: u64::try_from(partial.rejected_profiles).unwrap_or_default(),
        message: secrets.blanked(&partial.error_message),
    })
}

fn garbage(what: &str) -> Failure {
    Failure::new(
        Reason::Garbage,
        format!("what answers is no OTLP receiver, since it sends {what}: check host, port and protocol"),
    )
}

fn http_failure(answer: &Answer, secrets: &Secrets<'_>) -> Failure {
    let parts = &answer.parts;
    let code = parts.status.as_u16();
    let words = words(answer, secrets);
    let (reason, message) = match code {
        300..=399 => {
            let target = if parts.headers.contains_key(LOCATION) { "another URL" } else { "elsewhere" };
            (Reason::Refused, format!("the receiver sends us to {target}, which is not followed: set the URL it stands for"))
        }
        401 | 403 | 407 => (Reason::Unauthorized, unauthorized().to_owned()),
        404 | 405 => (
            Reason::NotFound,
            "the receiver does not take profiles at this URL: check its path and the protocol, and that the receiver has \
             profiles enabled"
                .to_owned(),
        ),
        413 => (Reason::TooLarge, "the request is larger than the receiver accepts: raise its limit".to_owned()),
        429 => (Reason::Throttled, "the receiver gets more requests than it takes".to_owned()),
        502..=504 => (Reason::Unavailable, "the receiver is not available now".to_owned()),
        500..=599 => (Reason::ReceiverFailed, "the receiver failed".to_owned()),
        _ => (Reason::Refused, "the receiver refuses the request".to_owned()),
    };
    let retry_after = if reason.is_retryable() { retry_after(parts, SystemTime::now()) } else { None };
    Failure { reason, retry_after, message: format!("{message} (HTTP {code}{words})") }
}

fn unauthorized() -> &'static str {
    "the receiver does not accept our credentials, or wants some: check headers, bearer_token_file and the client \
     certificate"
}

fn grpc_failure(status: &Status, secrets: &Secrets<'_>) -> Failure {
    let code = status.code();
    let asked = asked_pause(status.details());
    let reason = match code {
        Code::Unavailable | Code::Cancelled | Code::Aborted | Code::OutOfRange | Code::DataLoss => Reason::Unavailable,
        Code::DeadlineExceeded => Reason::Timeout,
        Code::ResourceExhausted if asked.is_some() => Reason::Throttled,
        Code::ResourceExhausted => Reason::Exhausted,
        Code::Unauthenticated | Code::PermissionDenied => Reason::Unauthorized,
        Code::Unimplemented | Code::NotFound => Reason::NotFound,
        Code::InvalidArgument | Code::AlreadyExists | Code::FailedPrecondition => Reason::Refused,
        Code::Ok | Code::Unknown | Code::Internal => Reason::ReceiverFailed,
    };
    let message = match reason {
        Reason::Unavailable => "the receiver is not available now",
        Reason::Timeout => "the receiver ran out of time",
        Reason::Throttled => "the receiver gets more requests than it takes",
        Reason::Exhausted => {
            "the receiver has no room for the request, or it is larger than the receiver accepts: raise its limits"
        }
        Reason::Unauthorized => unauthorized(),
        Reason::NotFound => {
            "the receiver does not know OTLP profiles as of opentelemetry-proto v1.10: update it, or enable them there"
        }
        Reason::Refused => "the receiver refuses the request",
        _ => "the receiver failed",
    };
    let words = secrets.blanked(status.message());
    let words = if words.is_empty() { words } else { format!(", \"{words}\"") };
    let retry_after = if reason.is_retryable() { asked } else { None };
    Failure { reason, retry_after, message: format!("{message} (gRPC {code:?}{words})") }
}

/// What a body says about an error, in parentheses behind the status; nothing, if it is for browsers.
fn words(answer: &Answer, secrets: &Secrets<'_>) -> String {
    let text = match content_type(&answer.parts) {
        "application/x-protobuf" | "application/protobuf" => {
            RpcStatus::decode(&answer.body[..]).map(|status| status.message).unwrap_or_default()
        }
        "text/plain" | "application/json" => String::from_utf8_lossy(&answer.body).into_owned(),
        _ => String::new(),
    };
    let text = secrets.blanked(&text);
    if text.is_empty() { text } else { format!(", \"{text}\"") }
}

/// What kind of body it is, without parameters; empty where it is not said.
fn content_type(parts: &Parts) -> &str {
    let value = parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

fn described(content_type: &str) -> String {
    if content_type.is_empty() { "a body without type".to_owned() } else { printable(content_type) }
}

/// How long HTTP asks us to wait: seconds, or a time of day (<https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3>).
fn retry_after(parts: &Parts, now: SystemTime) -> Option<Duration> {
    let text = parts.headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let pause = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More than a number can hold is very long.
        text.parse().map_or(LONGEST_PAUSE, Duration::from_secs)
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()
    };
    Some(pause.min(LONGEST_PAUSE))
}

/// How long gRPC asks us to wait: `google.rpc.RetryInfo` among the details of a status.
fn asked_pause(details: &[u8]) -> Option<Duration> {
    let status = RpcStatus::decode(details).ok()?;
    let info =
        status.details.iter().find(|detail| detail.type_url.rsplit('/').next() == Some("google.rpc.RetryInfo"))?;
    let delay = RetryInfo::decode(&info.value[..]).ok()?.retry_delay.unwrap_or_default();
    let seconds = u64::try_from(delay.seconds).unwrap_or_default();
    let nanos = u32::try_from(delay.nanos).unwrap_or_default().min(999_999_999);
    Some(Duration::new(seconds, nanos).min(LONGEST_PAUSE))
}

/// `google.rpc.Status` (<https://github.com/googleapis/googleapis/blob/master/google/rpc/status.proto>).
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: bytes::Bytes,
}

/// `google.rpc.RetryInfo`.
#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<ProtoDuration>,
}

/// `google.protobuf.Duration`.
#[derive(Clone, PartialEq, Message)]
struct ProtoDuration {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds and dates are both understood; what is hostile is bounded, what is past is now.
    #[test]
    fn bounds_pauses() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").expect("a date");
        let check = |text: &str, expect: Option<u64>| {
            let response = hyper::Response::builder().header(RETRY_AFTER, text).body(()).expect("a response");
            assert_eq!(retry_after(&response.into_parts().0, now), expect.map(Duration::from_secs), "{text:?}");
        };
        check("7", Some(7));
        check("0", Some(0));
        check("86400", Some(300));
        check("99999999999999999999999999", Some(300));
        check("Sun, 06 Nov 1994 08:50:07 GMT", Some(30));
        check("Sun, 06 Nov 1994 08:00:00 GMT", Some(0));
        check("Fri, 31 Dec 9999 23:59:59 GMT", Some(300));
        check("-1", None);
        check("soon", None);
        check("", None);
        let pause = |seconds, nanos| {
            let info = RetryInfo { retry_delay: Some(ProtoDuration { seconds, nanos }) };
            let detail = Any {
                type_url: "type.googleapis.com/google.rpc.RetryInfo".to_owned(),
                value: info.encode_to_vec().into(),
            };
            asked_pause(&RpcStatus { message: String::new(), details: vec![detail] }.encode_to_vec())
        };
        assert_eq!(pause(1, 500_000_000), Some(Duration::from_millis(1500)));
        assert_eq!(pause(i64::MAX, i32::MAX), Some(LONGEST_PAUSE));
        assert_eq!(pause(i64::MIN, i32::MIN), Some(Duration::ZERO));
        assert_eq!(asked_pause(b"\xff\xff"), None);
        assert_eq!(asked_pause(b""), None);
    }

    /// What a receiver says is one line of bounded length without anything that controls a terminal.
    #[test]
    fn words_are_harmless() {
        assert_eq!(printable(" a\x1b[31m\r\nb\u{202e}c\0 "), "a [31m b c");
        assert_eq!(printable(&"x".repeat(10_000)).chars().count(), 257);
    }
}

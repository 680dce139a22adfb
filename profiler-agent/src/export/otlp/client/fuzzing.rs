//! What the fuzz target of receivers' answers calls.

use bytes::Bytes;
use hyper::{
    HeaderMap, Response,
    header::{HeaderName, HeaderValue},
};

use super::{Accepted, Failure, answer, connection::Answer};
use crate::fuzzing::Input;

/// Headers that mean something.
const HEADERS: [&str; 7] = [
    "content-type",
    "content-encoding",
    "retry-after",
    "grpc-status",
    "grpc-message",
    "grpc-status-details-bin",
    "grpc-encoding",
];

/// An answer over HTTP or gRPC: what is said about it is short and plain, and nobody is left alone for long.
pub fn otlp_answer(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (kind, status) = (input.byte(), input.half());
    let headers = headers(&mut input);
    let trailers = (kind & 2 != 0).then(|| self::headers(&mut input));
    let Ok(mut response) = Response::builder().status((status % 1000) as u16).body(()) else { return };
    *response.headers_mut() = headers;
    let answer = Answer {
        parts: response.into_parts().0,
        body: Bytes::copy_from_slice(input.0),
        is_cut: kind & 4 != 0,
        trailers,
    };
    let secrets = answer::Secrets::default();
    let outcome = if kind & 1 != 0 { answer::of_grpc(&answer, &secrets) } else { answer::of_http(&answer, &secrets) };
    let message = match outcome {
        Ok(Accepted { rejected_profiles, message }) => {
            assert!(i64::try_from(rejected_profiles).is_ok());
            message
        }
        Err(Failure { reason, retry_after, message }) => {
            assert!(retry_after.is_none_or(|pause| pause <= answer::LONGEST_PAUSE && reason.is_retryable()));
            assert!(!message.is_empty());
            message
        }
    };
    assert!(!message.chars().any(char::is_control) && message.chars().count() < 1000);
}

fn headers(input: &mut Input<'_>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in HEADERS {
        let len = usize::from(input.byte());
        if let Ok(value) = HeaderValue::from_bytes(input.piece(len)) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    headers
}

//! The client against real sockets: a receiver that behaves well, and everything else that may listen.

mod credentials;

use std::time::{Duration, SystemTime};

use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use profiler_tests::receiver::{Answer, Options, Receiver};
use prost::Message as _;

use super::{
    Accepted, Client, Compression, Endpoint, Failure, Protocol, Reason, Request, Secret, Settings, Tls, UrlPath,
    settings::{GRPC_PATH, HTTP_PATH},
};
use crate::export::{otlp, testing};

/// Long enough for any machine; what is expected to time out has another.
const PATIENCE: Duration = Duration::from_secs(60);
const BOTH: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];

fn options(protocol: Protocol) -> Options {
    match protocol {
        Protocol::Grpc => Options::grpc(),
        Protocol::HttpProtobuf => Options::http(),
    }
}

fn settings(url: &str, protocol: Protocol) -> Settings {
    Settings {
        name: "test".to_owned(),
        endpoint: Endpoint::parse(url, protocol, UrlPath::OrStandard).expect("a URL"),
        protocol,
        compression: Compression::Gzip,
        timeout: PATIENCE,
        headers: vec![("x-scope-orgid".to_owned(), Secret::new("hunter2"))],
        bearer_token_file: None,
        tls: Tls::default(),
    }
}

fn request() -> Request {
    otlp::requests(&testing::profile(), &otlp::Options::default()).requests.remove(0)
}

/// Runs on a runtime like the one of a destination, so that a connection outlives one request.
fn on_runtime<T>(work: impl AsyncFnOnce() -> T) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work())
}

fn send(settings: Settings) -> Result<Accepted, Failure> {
    let mut client = Client::new(settings).expect("valid settings");
    on_runtime(async || client.send(&request()).await)
}

/// What one request ends in, with an answer of the receiver's.
fn answered(protocol: Protocol, answer: Answer) -> Result<Accepted, Failure> {
    let receiver = Receiver::start(options(protocol));
    receiver.answer(answer);
    send(settings(&receiver.url(), protocol))
}

/// A failure of this kind, whose sentence says these words, and no secrets.
fn check_failed(outcome: Result<Accepted, Failure>, reason: Reason, words: &[&str]) -> Failure {
    let failure = outcome.expect_err("refused");
    println!("{:15} {failure}", failure.reason);
    assert_eq!(failure.reason, reason, "{failure}");
    for word in words {
        assert!(failure.message.contains(word), "{failure} does not say {word:?}");
    }
    assert!(!failure.message.contains("hunter2"), "{failure}");
    assert!(!failure.message.contains('\n') && failure.message.len() < 1000, "{failure}");
    failure
}

fn http(status: u16, headers: &[(&'static str, &str)], body: &str) -> Answer {
    let headers = headers.iter().map(|&(name, value)| (name, value.to_owned())).collect();
    Answer::Http { status, headers, body: body.into() }
}

fn grpc(code: i32, details: &[u8]) -> Answer {
    Answer::Grpc { code, message: "it says: hunter2\u{1b}[31m\n".to_owned(), details: details.to_vec() }
}

/// `google.rpc.Status` with `google.rpc.RetryInfo` of so many seconds, written by hand.
fn retry_info(seconds: u8) -> Vec<u8> {
    let url = b"type.googleapis.com/google.rpc.RetryInfo";
    let info = [0x0a, 2, 0x08, seconds];
    let mut any = vec![0x0a, u8::try_from(url.len()).expect("short")];
    any.extend_from_slice(url);
    any.extend_from_slice(&[0x12, 4]);
    any.extend_from_slice(&info);
    let mut status = vec![0x1a, u8::try_from(any.len()).expect("short")];
    status.extend_from_slice(&any);
    status
}

/// What arrives is what was encoded, with its headers, at its path, on one connection.
#[test]
fn delivers() {
    for protocol in BOTH {
        for compression in [Compression::Gzip, Compression::None] {
            let receiver = Receiver::start(options(protocol));
            let settings = Settings { compression, ..settings(&receiver.url(), protocol) };
            let mut client = Client::new(settings).expect("valid settings");
            let request = request();
            on_runtime(async || {
                for _ in 0..3 {
                    assert_eq!(client.send(&request).await, Ok(Accepted::default()));
                }
            });
            let received = receiver.received();
            assert_eq!(received.len(), 3);
            for received in received {
                assert_eq!(received.body, request.body);
                ExportProfilesServiceRequest::decode(received.body).expect("a request");
                assert_eq!(received.path, if protocol == Protocol::Grpc { GRPC_PATH } else { HTTP_PATH });
                assert_eq!(received.headers["x-scope-orgid"], "hunter2");
                assert_eq!(received.connection, 1);
            }
        }
    }
}

/// A request of several megabytes goes through every window and buffer between.
#[test]
fn delivers_large_requests() {
    // Noise, which compression does not make small.
    let mut state = 1u64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let body: bytes::Bytes = (0..4 << 20).map(|_| noise()).collect();
    let large = Request { body, ..request() };
    for protocol in BOTH {
        let receiver = Receiver::start(options(protocol));
        let mut client = Client::new(settings(&receiver.url(), protocol)).expect("valid settings");
        on_runtime(async || assert_eq!(client.send(&large).await, Ok(Accepted::default())));
        assert!(receiver.received()[0].body == large.body);
    }
}

/// A receiver that was away and is back is found again, whether its connection was in use or not.
#[test]
fn reconnects() {
    for protocol in BOTH {
        let receiver = Receiver::start(options(protocol));
        let address = receiver.address();
        let mut client = Client::new(settings(&receiver.url(), protocol)).expect("valid settings");
        on_runtime(async || {
            assert_eq!(client.send(&request()).await, Ok(Accepted::default()));
            drop(receiver);
            let failure = check_failed(client.send(&request()).await, Reason::Unreachable, &["127.0.0.1", "refused"]);
            assert!(failure.is_retryable());
            let receiver = Receiver::start_at(address, options(protocol));
            assert_eq!(client.send(&request()).await, Ok(Accepted::default()));
            // One that was away between two requests was never missed.
            drop(receiver);
            let receiver = Receiver::start_at(address, options(protocol));
            assert_eq!(client.send(&request()).await, Ok(Accepted::default()));
            assert_eq!(receiver.received().len(), 1);
        });
    }
}

/// What a receiver did not take of a request is told, and is no failure.
#[test]
fn tells_partial_success() {
    for protocol in BOTH {
        let partial = |rejected, message: &str| Answer::Partial { rejected, message: message.to_owned() };
        let accepted = |rejected_profiles, message: &str| Accepted { rejected_profiles, message: message.to_owned() };
        assert_eq!(answered(protocol, partial(2, "too\nold\u{1b}[1m")), Ok(accepted(2, "too old [1m")));
        assert_eq!(answered(protocol, partial(0, "a word")), Ok(accepted(0, "a word")));
        assert_eq!(answered(protocol, partial(-1, "")), Ok(accepted(0, "")));
    }
    let nothing = http(200, &[], "");
    assert_eq!(answered(Protocol::HttpProtobuf, nothing), Ok(Accepted::default()));
}

/// Statuses of HTTP mean what the OTLP specification says, also where gRPC is expected: proxies answer like that.
#[test]
fn understands_http_statuses() {
    for protocol in BOTH {
        let check = |status, reason, words: &[&str], retryable| {
            let answer = http(status, &[("content-type", "text/plain"), ("retry-after", "7")], "it says: hunter2");
            let failure = check_failed(answered(protocol, answer), reason, words);
            assert!(failure.message.contains(&format!("HTTP {status}, \"it says: ***\"")), "{failure}");
            assert_eq!((failure.is_retryable(), failure.retry_after.is_some()), (retryable, retryable), "{failure}");
        };
        check(401, Reason::Unauthorized, &["bearer_token_file"], false);
        check(403, Reason::Unauthorized, &["credentials"], false);
        check(404, Reason::NotFound, &["path", "protocol"], false);
        check(400, Reason::Refused, &[], false);
        check(413, Reason::TooLarge, &["raise its limit"], false);
        check(429, Reason::Throttled, &[], true);
        check(500, Reason::ReceiverFailed, &[], false);
        check(501, Reason::ReceiverFailed, &[], false);
        check(502, Reason::Unavailable, &[], true);
        check(503, Reason::Unavailable, &[], true);
        check(504, Reason::Unavailable, &[], true);
    }
    let redirect = http(302, &[("location", "https://elsewhere/hunter2")], "");
    check_failed(answered(Protocol::HttpProtobuf, redirect), Reason::Refused, &["another URL", "not followed"]);
    let page = http(503, &[("content-type", "text/html")], "<html>");
    assert!(!check_failed(answered(Protocol::HttpProtobuf, page), Reason::Unavailable, &[]).message.contains("html"));
    // `google.rpc.Status` of code 3.
    let status = http(400, &[("content-type", "application/x-protobuf")], "\x08\x03\x12\x07too bad");
    check_failed(answered(Protocol::HttpProtobuf, status), Reason::Refused, &["\"too bad\""]);
}

/// A secret is blanked out before a receiver's words are cut, so that no part of it is left.
#[test]
fn blanks_secrets_out() {
    let secret = "hunter2\"of\\".repeat(20);
    for protocol in BOTH {
        let receiver = Receiver::start(options(protocol));
        receiver.answer(http(400, &[("content-type", "text/plain")], &format!("{} {secret}", "x".repeat(200))));
        let headers = vec![("x-key".to_owned(), Secret::new(format!("Basic {secret}")))];
        let failure =
            check_failed(send(Settings { headers, ..settings(&receiver.url(), protocol) }), Reason::Refused, &[]);
        assert!(failure.message.contains("x ***\""), "{failure}");
    }
}

/// Both forms of `Retry-After` are understood, and bounded.
#[test]
fn honours_retry_after() {
    let pause = |text: &str| {
        let answer = http(503, &[("retry-after", text)], "");
        check_failed(answered(Protocol::HttpProtobuf, answer), Reason::Unavailable, &[]).retry_after
    };
    assert_eq!(pause("7"), Some(Duration::from_secs(7)));
    assert_eq!(pause("31536000"), Some(Duration::from_secs(300)));
    let date = pause(&httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(200))).expect("a pause");
    assert!(date > Duration::ZERO && date <= Duration::from_secs(200), "{date:?}");
    assert_eq!(pause("Fri, 31 Dec 9999 23:59:59 GMT"), Some(Duration::from_secs(300)));
    assert_eq!(pause("tomorrow"), None);
}

/// Statuses of gRPC mean what the OTLP specification says.
#[test]
fn understands_grpc_statuses() {
    let check = |code, details: &[u8], reason, retryable, pause: Option<u64>| {
        let failure = check_failed(answered(Protocol::Grpc, grpc(code, details)), reason, &["it says: *** [31m"]);
        assert_eq!(failure.is_retryable(), retryable, "{failure}");
        assert_eq!(failure.retry_after, pause.map(Duration::from_secs), "{failure}");
    };
    check(1, b"", Reason::Unavailable, true, None);
    check(2, b"", Reason::ReceiverFailed, false, None);
    check(3, b"", Reason::Refused, false, None);
    check(4, b"", Reason::Timeout, true, None);
    check(5, b"", Reason::NotFound, false, None);
    check(6, b"", Reason::Refused, false, None);
    check(7, b"", Reason::Unauthorized, false, None);
    check(8, b"", Reason::Exhausted, false, None);
    check(8, &retry_info(9), Reason::Throttled, true, Some(9));
    check(8, b"\xff\xff\xff", Reason::Exhausted, false, None);
    check(9, b"", Reason::Refused, false, None);
    check(10, b"", Reason::Unavailable, true, None);
    check(11, b"", Reason::Unavailable, true, None);
    check(12, b"", Reason::NotFound, false, None);
    check(13, &retry_info(9), Reason::ReceiverFailed, false, None);
    check(14, b"", Reason::Unavailable, true, None);
    check(14, &retry_info(3), Reason::Unavailable, true, Some(3));
    check(15, b"", Reason::Unavailable, true, None);
    check(16, b"", Reason::Unauthorized, false, None);
    check(99, b"", Reason::ReceiverFailed, false, None);
}

/// A receiver that does not answer, and one whose answer has no end, hold nobody up.
#[test]
fn bounds_what_does_not_end() {
    for protocol in BOTH {
        let receiver = Receiver::start(options(protocol));
        receiver.answer(Answer::Stall);
        let hasty = Settings { timeout: Duration::from_millis(300), ..settings(&receiver.url(), protocol) };
        assert!(check_failed(send(hasty), Reason::Timeout, &["within 300ms"]).is_retryable());
        check_failed(answered(protocol, Answer::Endless), Reason::Garbage, &["more than any answer has"]);
        // (That is a stream that was reset, to HTTP/2.)
        let reason = if protocol == Protocol::Grpc { Reason::Unreachable } else { Reason::Garbage };
        check_failed(answered(protocol, Answer::HugeHeaders(128 << 10)), reason, &[]);
        assert_eq!(answered(protocol, Answer::HugeHeaders(16 << 10)), Ok(Accepted::default()));
    }
}

/// A receiver that has seen enough of a request says so, and reads no further.
#[test]
fn hears_early_refusals() {
    let receiver = Receiver::start(Options::http());
    receiver.answer(Answer::Raw(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".to_vec()));
    let settings = Settings { compression: Compression::None, ..settings(&receiver.url(), Protocol::HttpProtobuf) };
    let mut client = Client::new(settings).expect("valid settings");
    let large = Request { body: vec![1; 16 << 20].into(), ..request() };
    check_failed(on_runtime(async || client.send(&large).await), Reason::TooLarge, &["HTTP 413"]);
}

/// A connection that breaks is one to be made again.
#[test]
fn retries_what_breaks() {
    for protocol in BOTH {
        for bytes in [0, 100] {
            assert!(
                check_failed(answered(protocol, Answer::ResetAfter(bytes)), Reason::Unreachable, &[]).is_retryable()
            );
        }
        // Nobody listens on a port that was free a moment ago.
        let url = Receiver::start(options(protocol)).url();
        check_failed(send(settings(&url, protocol)), Reason::Unreachable, &["no connection to 127.0.0.1, port"]);
        let unknown = settings("http://name.invalid:4317", protocol);
        check_failed(send(unknown), Reason::Unreachable, &["the host name.invalid is not found"]);
        check_failed(answered(protocol, Answer::Raw(Vec::new())), Reason::Unreachable, &["https://"]);
    }
}

/// What listens may be anything.
#[test]
fn tells_what_is_no_receiver() {
    let html = || http(200, &[("content-type", "text/html; charset=utf-8")], "<html>login</html>");
    for protocol in BOTH {
        check_failed(answered(protocol, html()), Reason::Garbage, &["text/html", "no OTLP receiver"]);
        check_failed(
            answered(protocol, Answer::Raw(b"220 mail.example ESMTP\r\n".to_vec())),
            Reason::Garbage,
            &["HTTP"],
        );
        check_failed(answered(protocol, Answer::Raw(vec![0xff; 4096])), Reason::Garbage, &["HTTP"]);
        check_failed(answered(protocol, Answer::Raw(vec![0; 4096])), Reason::Garbage, &["HTTP"]);
    }
    let noise = http(200, &[("content-type", "application/x-protobuf")], "\u{1f4a9}\u{1f4a9}");
    check_failed(answered(Protocol::HttpProtobuf, noise), Reason::Garbage, &["something else than OTLP"]);
    let unframed = http(200, &[("content-type", "application/grpc")], "x");
    check_failed(answered(Protocol::Grpc, unframed), Reason::Garbage, &["without a status"]);
    let cut = http(200, &[("content-type", "application/grpc"), ("grpc-status", "0")], "\0\0\0\0\x09x");
    check_failed(answered(Protocol::Grpc, cut), Reason::Garbage, &["without one whole message"]);
    // The other protocol's port.
    let (http, grpc) = (Receiver::start(Options::http()), Receiver::start(Options::grpc()));
    let at = |receiver: &Receiver, protocol| send(settings(&receiver.url(), protocol));
    check_failed(at(&http, Protocol::Grpc), Reason::Unreachable, &["gRPC port (usually 4317)"]);
    let refusal = b"HTTP/1.1 505 HTTP Version Not Supported\r\nConnection: close\r\n\r\n".to_vec();
    check_failed(answered(Protocol::Grpc, Answer::Raw(refusal)), Reason::Garbage, &["http/protobuf", "4318"]);
    check_failed(at(&grpc, Protocol::HttpProtobuf), Reason::Garbage, &["protocol grpc", "4317"]);
}

//! A connection to a receiver: how it is made, one request and its answer, and why there was none.

use std::{
    error::Error as StdError,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Request,
    body::Incoming,
    client::conn::{http1, http2},
    http::response::Parts,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, lookup_host},
    task::AbortHandle,
};
use tokio_rustls::TlsConnector;

use super::{Endpoint, Failure, Protocol, Reason, failure::printable, tls::Tls};

/// Bytes of an answer that are looked at.
pub(super) const MAX_ANSWER: usize = 64 << 10;
/// Bytes of an answer's headers.
const MAX_HEADERS: u32 = 64 << 10;
/// Bytes a receiver begins with that are remembered: the header of an HTTP/2 frame.
const BEGINNING: usize = 9;

/// A connection that is made.
pub(super) struct Connection {
    sender: Sender,
    /// Reads and writes for as long as there is the connection.
    driver: AbortHandle,
    seen: Arc<Mutex<Seen>>,
    is_encrypted: bool,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// What a receiver answered: not more of it than anybody needs.
pub(super) struct Answer {
    /// Status and headers.
    pub(super) parts: Parts,
    /// The body, or its first bytes.
    pub(super) body: Bytes,
    /// Whether there was more of the body.
    pub(super) is_cut: bool,
    /// What came behind the body.
    pub(super) trailers: Option<HeaderMap>,
}

impl Connection {
    /// Connects. Takes as long as it takes.
    pub(super) async fn open(
        endpoint: &Endpoint,
        protocol: Protocol,
        tls: Option<&Tls>,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let stream = connect(endpoint, timeout).await?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(stream),
            Some(tls) => {
                let handshake = TlsConnector::from(tls.config()).connect(tls.server_name(), stream).await;
                Box::new(handshake.map_err(|error| handshake_failure(&error, tls))?)
            }
        };
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stream = TokioIo::new(Watched { stream, seen: Arc::clone(&seen), write_error: None });
        // Neither waits for the receiver: what is wrong shows with the first request.
        let broken = |error: hyper::Error| Failure::new(Reason::Unreachable, format!("no connection: {error}"));
        let (sender, driver) = match protocol {
            Protocol::HttpProtobuf => {
                let (sender, connection) = http1::Builder::new()
                    .max_header_size(MAX_HEADERS as usize)
                    .handshake(stream)
                    .await
                    .map_err(broken)?;
                // How a connection ends shows with the request that needed it.
                (Sender::Http1(sender), tokio::spawn(async move { drop(connection.await) }))
            }
            Protocol::Grpc => {
                let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                    .max_header_list_size(MAX_HEADERS)
                    .handshake(stream)
                    .await
                    .map_err(broken)?;
                (Sender::Http2(sender), tokio::spawn(async move { drop(connection.await) }))
            }
        };
        Ok(Self { sender, driver: driver.abort_handle(), seen, is_encrypted: tls.is_some() })
    }

    /// Whether a request can be sent on it, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        match &self.sender {
            Sender::Http1(sender) => !sender.is_closed(),
            Sender::Http2(sender) => !sender.is_closed(),
        }
    }

    /// Sends a request and reads what is answered, within bounds.
    pub(super) async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
        tls: Option<&Tls>,
    ) -> Result<Answer, Failure> {
        let answer = async {
            let response = match &mut self.sender {
                Sender::Http1(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await?
                }
                Sender::Http2(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await?
                }
            };
            read(response).await
        };
        let answer = answer.await;
        answer.map_err(|error| self.failure(&error, tls))
    }

    /// What a broken connection means for who set it up.
    fn failure(&self, error: &hyper::Error, tls: Option<&Tls>) -> Failure {
        let seen = seen(&self.seen);
        if let (Some(error), Some(tls)) = (&seen.tls_error, tls) {
            return tls.failure(error);
        }
        let cause = printable(&root_cause(error).to_string());
        let is_http1 = matches!(self.sender, Sender::Http1(_));
        match &seen.beginning[..] {
            [] => {
                let port = if is_http1 { "HTTP port (usually 4318)" } else { "gRPC port (usually 4317)" };
                let tls = if self.is_encrypted { "" } else { "; if that expects TLS, use https://" };
                let hint = format!("check that this is the receiver's {port}{tls}");
                Failure::new(Reason::Unreachable, format!("the connection ended without an answer ({cause}): {hint}"))
            }
            // A TLS alert: <https://www.rfc-editor.org/rfc/rfc8446#section-5.1>.
            [0x15, 3, ..] if !self.is_encrypted => {
                Failure::new(Reason::TlsFailed, "the receiver expects TLS: use https:// or its port without TLS")
            }
            beginning if !is_http1 && beginning.starts_with(b"HTTP/1") => Failure::new(
                Reason::Garbage,
                "the receiver speaks HTTP/1 and no gRPC: set the protocol http/protobuf (usually port 4318), or use its \
                 gRPC port (usually 4317)",
            ),
            beginning if is_http1 && is_http2_settings(beginning) => Failure::new(
                Reason::Garbage,
                "the receiver speaks HTTP/2 only, as gRPC does: set the protocol grpc (usually port 4317), or use its \
                 HTTP port (usually 4318)",
            ),
            beginning
                if is_http1 && beginning.starts_with(b"HTTP/1") && !error.is_parse()
                    || !is_http1 && is_http2_settings(beginning) =>
            {
                Failure::new(Reason::Unreachable, format!("the connection broke before there was an answer: {cause}"))
            }
            _ => Failure::new(
                Reason::Garbage,
                format!("what answers does not speak HTTP: is this the receiver's port? ({cause})"),
            ),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// The frame that an HTTP/2 server begins with: <https://www.rfc-editor.org/rfc/rfc9113#section-3.4>.
fn is_http2_settings(beginning: &[u8]) -> bool {
    matches!(beginning, [0, _, _, 4, _, 0, 0, 0, 0])
}

/// Tries every address of a receiver; each has its share of the time.
async fn connect(endpoint: &Endpoint, timeout: Duration) -> Result<TcpStream, Failure> {
    let unreachable = |problem: String| Failure::new(Reason::Unreachable, problem);
    let (host, port) = (endpoint.host(), endpoint.port());
    let addresses: Vec<_> = lookup_host((host, port))
        .await
        .map_err(|error| unreachable(format!("the host {host} is not found: {}", printable(&error.to_string()))))?
        .collect();
    let mut problem = "it has no address".to_owned();
    let mut is_late = false;
    let share = timeout / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
    for address in addresses {
        match tokio::time::timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Requests are written at once; an error changes nothing that matters.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => (problem, is_late) = (error.to_string(), false),
            Err(_) => (problem, is_late) = ("no answer in time".to_owned(), true),
        }
    }
    let reason = if is_late { Reason::Timeout } else { Reason::Unreachable };
    Err(Failure::new(reason, format!("no connection to {host}, port {port}: {problem}")))
}

fn handshake_failure(error: &io::Error, tls: &Tls) -> Failure {
    match rustls_error(error) {
        Some(error) => tls.failure(error),
        None => Failure::new(
            Reason::TlsFailed,
            format!(
                "the connection ended while TLS was set up ({}): if the receiver does not speak TLS, use http://",
                printable(&error.to_string())
            ),
        ),
    }
}

fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn root_cause<'a>(error: &'a (dyn StdError + 'static)) -> &'a (dyn StdError + 'static) {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause
}

/// Reads a body as far as anybody needs it.
async fn read(response: hyper::Response<Incoming>) -> hyper::Result<Answer> {
    let (parts, mut incoming) = response.into_parts();
    let mut answer = Answer { parts, body: Bytes::new(), is_cut: false, trailers: None };
    let mut body = BytesMut::new();
    while let Some(frame) = incoming.frame().await.transpose()? {
        match frame.into_data() {
            Ok(data) => {
                let room = MAX_ANSWER - body.len();
                answer.is_cut = data.len() > room;
                body.extend_from_slice(data.get(..room).unwrap_or(&data));
                if answer.is_cut {
                    break;
                }
            }
            Err(frame) => answer.trailers = frame.into_trailers().ok(),
        }
    }
    answer.body = body.freeze();
    Ok(answer)
}

/// What carries bytes both ways.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// What came from a receiver, for its diagnosis: HTTP's own errors do not tell who answered instead.
#[derive(Default)]
struct Seen {
    beginning: Vec<u8>,
    tls_error: Option<rustls::Error>,
}

fn seen(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A stream that is watched as it is read.
struct Watched {
    stream: Box<dyn Stream>,
    seen: Arc<Mutex<Seen>>,
    /// Why nothing can be written any more, while what the receiver said before is waited for.
    write_error: Option<io::Error>,
}

impl Watched {
    fn note(&self, read: &[u8], outcome: &Poll<io::Result<()>>) {
        let mut seen = seen(&self.seen);
        let missing = BEGINNING - seen.beginning.len();
        seen.beginning.extend_from_slice(&read[..read.len().min(missing)]);
        if let Poll::Ready(Err(error)) = outcome
            && let Some(error) = rustls_error(error)
        {
            seen.tls_error = Some(error.clone());
        }
    }

    /// Who cannot be written to any more may have said why before, and HTTP/2 does not look: an error of writing is not told
    /// before something was read. (The socket is dead then, so that does not take long.)
    fn poll_written<T>(&mut self, context: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let error = match outcome {
            Poll::Ready(Err(error)) => error,
            outcome => return outcome,
        };
        let mut words = [0; BEGINNING];
        let mut buffer = ReadBuf::new(&mut words);
        let read = Pin::new(&mut self.stream).poll_read(context, &mut buffer);
        self.note(buffer.filled(), &read);
        if read.is_pending() {
            self.write_error = Some(error);
            return Poll::Pending;
        }
        Poll::Ready(Err(error))
    }

    /// Writes, unless that has failed already.
    fn write<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut Box<dyn Stream>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let outcome = match self.write_error.take() {
            Some(error) => Poll::Ready(Err(error)),
            None => write(Pin::new(&mut self.stream), context),
        };
        self.poll_written(context, outcome)
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.note(buffer.filled().get(before..).unwrap_or_default(), &outcome);
        outcome
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(context, |stream, context| stream.poll_write_vectored(context, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(context, |stream, context| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

//! A receiver of OTLP profiles that behaves as badly as a test needs: over real sockets, with real TLS.
//!
//! `Receiver::start(Options::http())` listens on a free port of 127.0.0.1 and takes everything; `answer` says what it does
//! from then on, `received` what came. It stops when it is dropped, and `start_at` begins again on the same port.

mod certificates;

pub use self::certificates::{Authority, Identity, Validity};

use std::{
    convert::Infallible,
    io::{self, Read as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    thread::JoinHandle,
};

use bytes::{Bytes, BytesMut};
use flate2::read::MultiGzDecoder;
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Request, Response,
    body::{Body, Frame, Incoming},
    header::{HeaderName, HeaderValue},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::profiles::v1development::{
    ExportProfilesPartialSuccess, ExportProfilesServiceResponse,
};
use prost::Message as _;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
};
use tokio_rustls::TlsAcceptor;

/// Largest body that is kept, decompressed.
const MAX_BODY: u64 = 64 << 20;

/// What a receiver speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1.
    Http,
    /// gRPC, over HTTP/2.
    Grpc,
}

/// What a receiver is.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it speaks.
    pub speaks: Speaks,
    /// Its certificate; `None`: no TLS.
    pub identity: Option<Identity>,
    /// The authority that clients have to have a certificate of; `None`: they need none.
    pub client_authority: Option<PathBuf>,
}

impl Options {
    /// HTTP without TLS.
    pub fn http() -> Self {
        Self { speaks: Speaks::Http, identity: None, client_authority: None }
    }

    /// gRPC without TLS.
    pub fn grpc() -> Self {
        Self { speaks: Speaks::Grpc, ..Self::http() }
    }

    /// With TLS.
    pub fn with_tls(self, identity: &Identity) -> Self {
        Self { identity: Some(identity.clone()), ..self }
    }

    /// With a certificate of this authority, or not at all.
    pub fn requiring_clients_of(self, authority: &Authority) -> Self {
        Self { client_authority: Some(authority.file()), ..self }
    }
}

/// What a receiver does with a request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Takes it.
    Accept,
    /// Takes it but for some profiles.
    Partial {
        /// How many.
        rejected: i64,
        /// Why.
        message: String,
    },
    /// Answers by HTTP, whatever it speaks.
    Http {
        /// Status.
        status: u16,
        /// Headers.
        headers: Vec<(&'static str, String)>,
        /// Body.
        body: Vec<u8>,
    },
    /// Answers by gRPC with a status.
    Grpc {
        /// Status.
        code: i32,
        /// In plain text.
        message: String,
        /// `google.rpc.Status`, binary.
        details: Vec<u8>,
    },
    /// Never answers.
    Stall,
    /// Resets the connection after so many bytes of the request's body.
    ResetAfter(usize),
    /// Takes it, with a body that never ends.
    Endless,
    /// Takes it, with that many bytes of headers.
    HugeHeaders(usize),
    /// Speaks no HTTP: writes these bytes as soon as anything comes, and closes the connection.
    Raw(Vec<u8>),
}

/// What a receiver got.
#[derive(Clone, Debug)]
pub struct Received {
    /// The request's path, with its query.
    pub path: String,
    /// The request's headers.
    pub headers: HeaderMap,
    /// The message, decompressed, without gRPC's framing.
    pub body: Bytes,
    /// Connections are counted from 1.
    pub connection: usize,
    /// Whether it was told that it was taken.
    pub is_accepted: bool,
}

/// A receiver that runs, on a thread of its own.
pub struct Receiver {
    address: SocketAddr,
    is_encrypted: bool,
    state: Arc<State>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct State {
    answer: Mutex<Answer>,
    received: Mutex<Vec<Received>>,
    connections: Mutex<usize>,
    speaks: Speaks,
}

impl Receiver {
    /// Starts on a free port.
    pub fn start(options: Options) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), options)
    }

    /// Starts at an address.
    pub fn start_at(address: SocketAddr, options: Options) -> Self {
        let state = Arc::new(State {
            answer: Mutex::new(Answer::Accept),
            received: Mutex::default(),
            connections: Mutex::default(),
            speaks: options.speaks,
        });
        let listener = std::net::TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        listener.set_nonblocking(true).expect("a listener that does not block");
        let address = listener.local_addr().expect("a listener's address");
        let acceptor = options.identity.as_ref().map(|identity| acceptor(identity, &options));
        let is_encrypted = acceptor.is_some();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn({
            let state = Arc::clone(&state);
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    let listener = TcpListener::from_std(listener).expect("a listener");
                    tokio::select! {
                        () = accept(&listener, acceptor, &state) => {}
                        // Dropped or told: connections end with the runtime.
                        _ = stopped => {}
                    }
                });
            }
        });
        Self { address, is_encrypted, state, stop: Some(stop), thread: Some(thread) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, as senders are told.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.is_encrypted { "https" } else { "http" }, self.address)
    }

    /// Does this from now on, with new requests. (Of `Raw` and `ResetAfter`: with new connections.)
    pub fn answer(&self, answer: Answer) {
        *lock(&self.state.answer) = answer;
    }

    /// Everything that came whole, in order.
    pub fn received(&self) -> Vec<Received> {
        lock(&self.state.received).clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // What it panicked of was printed.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pem(path: &Path) -> Vec<CertificateDer<'static>> {
    let certificates =
        CertificateDer::pem_file_iter(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    certificates.collect::<Result<_, _>>().expect("certificates")
}

fn acceptor(identity: &Identity, options: &Options) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder.with_safe_default_protocol_versions().expect("versions of TLS");
    let builder = match &options.client_authority {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            pem(path).into_iter().for_each(|certificate| roots.add(certificate).expect("an authority"));
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.expect("a verifier"))
        }
        None => builder.with_no_client_auth(),
    };
    let key = PrivateKeyDer::from_pem_file(&identity.key_file).expect("a key");
    let mut config = builder.with_single_cert(pem(&identity.cert_file), key).expect("a certificate");
    config.alpn_protocols = vec![match options.speaks {
        Speaks::Http => b"http/1.1".to_vec(),
        Speaks::Grpc => b"h2".to_vec(),
    }];
    TlsAcceptor::from(Arc::new(config))
}

async fn accept(listener: &TcpListener, acceptor: Option<TlsAcceptor>, state: &Arc<State>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, state) = (acceptor.clone(), Arc::clone(state));
        let connection = {
            let mut connections = lock(&state.connections);
            *connections += 1;
            *connections
        };
        // Senders break connections too.
        tokio::spawn(async move { drop(serve(stream, acceptor, connection, state).await) });
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

async fn serve(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    connection: usize,
    state: Arc<State>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let plan = lock(&state.answer).clone();
    if matches!(plan, Answer::ResetAfter(_)) {
        stream.set_zero_linger()?;
    }
    let mut stream: Box<dyn Stream> = match acceptor {
        Some(acceptor) => Box::new(acceptor.accept(stream).await?),
        None => Box::new(stream),
    };
    if let Answer::Raw(bytes) = plan {
        let mut ignored = [0; 4096];
        let _ = stream.read(&mut ignored).await?;
        stream.write_all(&bytes).await?;
        stream.shutdown().await?;
        // What comes is read to its end: closing now would reset the connection, and lose what was written.
        while stream.read(&mut ignored).await? > 0 {}
        return Ok(());
    }
    let cut = Arc::new(Notify::new());
    let service = service_fn(|request| {
        let (state, cut) = (Arc::clone(&state), Arc::clone(&cut));
        async move { Ok::<_, Infallible>(respond(request, connection, &state, &cut).await) }
    });
    let io = TokioIo::new(stream);
    let served = async {
        match state.speaks {
            Speaks::Http => http1::Builder::new().serve_connection(io, service).await,
            Speaks::Grpc => {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder.max_header_list_size(1 << 20).serve_connection(io, service).await
            }
        }
    };
    tokio::select! {
        served = served => Ok(served?),
        () = cut.notified() => Ok(()),
    }
}

type AnyBody = UnsyncBoxBody<Bytes, Infallible>;

async fn respond(mut request: Request<Incoming>, connection: usize, state: &State, cut: &Notify) -> Response<AnyBody> {
    let answer = lock(&state.answer).clone();
    let mut body = BytesMut::new();
    let limit = if let Answer::ResetAfter(limit) = answer { limit } else { usize::MAX };
    while body.len() < limit {
        match request.body_mut().frame().await {
            Some(Ok(frame)) => body.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..])),
            Some(Err(_)) => return forever().await,
            None => break,
        }
    }
    if matches!(answer, Answer::ResetAfter(_)) {
        cut.notify_one();
        return forever().await;
    }
    lock(&state.received).push(Received {
        path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
        headers: request.headers().clone(),
        body: message(&body, request.headers(), state.speaks).unwrap_or_else(|error| panic!("a request: {error}")),
        connection,
        is_accepted: matches!(answer, Answer::Accept | Answer::Partial { .. }),
    });
    let partial = |rejected, message: &str| ExportProfilesServiceResponse {
        partial_success: Some(ExportProfilesPartialSuccess {
            rejected_profiles: rejected,
            error_message: message.to_owned(),
        }),
    };
    let is_grpc = state.speaks == Speaks::Grpc;
    match answer {
        Answer::Accept => accepted(ExportProfilesServiceResponse::default(), is_grpc),
        Answer::Partial { rejected, message } => accepted(partial(rejected, &message), is_grpc),
        Answer::Http { status, headers, body } => {
            let mut response = Response::new(Full::new(body.into()).boxed_unsync());
            *response.status_mut() = status.try_into().expect("a status");
            for (name, value) in headers {
                let value = HeaderValue::try_from(value).expect("a header's value");
                response.headers_mut().append(HeaderName::from_static(name), value);
            }
            response
        }
        Answer::Grpc { code, message, details } => {
            let status = tonic::Status::with_details(tonic::Code::from(code), message, details.into());
            let mut response = accepted(ExportProfilesServiceResponse::default(), true);
            *response.body_mut() = Full::default().boxed_unsync();
            status.add_header(response.headers_mut()).expect("a status in headers");
            response
        }
        Answer::Endless => {
            let mut response = accepted(ExportProfilesServiceResponse::default(), is_grpc);
            *response.body_mut() = EndlessBody.boxed_unsync();
            response
        }
        Answer::HugeHeaders(bytes) => {
            let mut response = accepted(ExportProfilesServiceResponse::default(), is_grpc);
            for _ in 0..bytes / 1024 {
                let value = HeaderValue::try_from("x".repeat(1000)).expect("a header's value");
                response.headers_mut().append(HeaderName::from_static("x-huge"), value);
            }
            response
        }
        Answer::Stall | Answer::ResetAfter(_) | Answer::Raw(_) => forever().await,
    }
}

async fn forever<T>() -> T {
    std::future::pending().await
}

/// The answer that says that a request was taken.
fn accepted(message: ExportProfilesServiceResponse, is_grpc: bool) -> Response<AnyBody> {
    let message = message.encode_to_vec();
    let content_type = if is_grpc { "application/grpc" } else { "application/x-protobuf" };
    let body = if is_grpc {
        let mut framed = vec![0];
        framed.extend_from_slice(&u32::try_from(message.len()).expect("a small message").to_be_bytes());
        framed.extend_from_slice(&message);
        let trailers = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
        Full::new(Bytes::from(framed)).with_trailers(std::future::ready(Some(Ok(trailers)))).boxed_unsync()
    } else {
        Full::new(message.into()).boxed_unsync()
    };
    let response = Response::builder().header("content-type", content_type).body(body);
    response.expect("a response")
}

/// A request's message.
fn message(body: &[u8], headers: &HeaderMap, speaks: Speaks) -> io::Result<Bytes> {
    let (is_compressed, message) = match speaks {
        Speaks::Http => (headers.get("content-encoding").is_some_and(|value| value == "gzip"), body),
        Speaks::Grpc => {
            let (prefix, message) = body.split_at_checked(5).ok_or_else(|| io::Error::other("no gRPC message"))?;
            assert_eq!(prefix[1..], u32::try_from(message.len()).expect("a length").to_be_bytes());
            (prefix[0] == 1, message)
        }
    };
    if !is_compressed {
        return Ok(Bytes::copy_from_slice(message));
    }
    let mut decompressed = Vec::new();
    MultiGzDecoder::new(message).take(MAX_BODY).read_to_end(&mut decompressed)?;
    Ok(decompressed.into())
}

/// Data as fast as it is read.
struct EndlessBody;

impl Body for EndlessBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[0; 4096])))))
    }
}

//! The control socket: commands for a daemon that runs, as HTTP over a Unix socket that only its user may open.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
};
use tracing::{debug, warn};

use super::{
    capture::limits::Refusal,
    demand::{CaptureState, Declined, Demand},
};
use crate::config;

/// Connections served at once; further ones wait.
const MAX_CONNECTIONS: usize = 8;
/// How long a client may take to send its request's head, and how long for the rest of it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest request for a capture, bytes.
const MAX_BODY: usize = 8 << 10;
/// Where captures are asked for.
pub(super) const TRIGGER: &str = "/trigger";
/// Only its user may use the socket.
const MODE: u32 = 0o600;

/// What a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing but the state.
    State,
    /// Collect nothing.
    Stop,
    /// Collect again.
    Resume,
    /// Read the configuration again.
    Reload,
}

impl Command {
    /// The command's method and path.
    pub fn request(self) -> (Method, &'static str) {
        match self {
            Self::State => (Method::GET, "/state"),
            Self::Stop => (Method::POST, "/stop"),
            Self::Resume => (Method::POST, "/resume"),
            Self::Reload => (Method::POST, "/reload"),
        }
    }

    fn of(method: &Method, path: &str) -> Option<Self> {
        let commands = [Self::State, Self::Stop, Self::Resume, Self::Reload];
        commands.into_iter().find(|command| command.request() == (method.clone(), path))
    }
}

/// How things are after a command.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct State {
    /// Whether something is collected.
    pub collecting: bool,
    /// Who says that nothing is to be collected.
    pub stopped_by: Vec<String>,
    /// Samples per second and CPU.
    pub frequency: u64,
    /// Captures that run beside.
    #[serde(default)]
    pub captures: Vec<CaptureState>,
}

/// A socket that commands come from, as long as this is not ended.
pub(super) struct Listening {
    path: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl Listening {
    /// Takes no more commands.
    pub(super) fn end(self) {
        if let Some(server) = self.server {
            server.abort();
            // (Whoever removed it has done our work.)
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens for commands. Where that is not possible the daemon does without them.
pub(super) fn listen(path: &Path, commands: mpsc::Sender<Demand>) -> Listening {
    let server = match bind(path) {
        Ok(listener) => Some(tokio::spawn(serve(listener, commands))),
        Err(error) => {
            warn!(
                "no commands are taken from {}: {error}; signals, the stop file and the configuration work all the same",
                path.display()
            );
            None
        }
    };
    Listening { path: path.to_owned(), server }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    if path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket()) {
        // Somebody's who is there, or left by one who was killed.
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent listens there"));
        }
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
    Ok(listener)
}

async fn serve(listener: UnixListener, commands: mpsc::Sender<Demand>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // SANITY: the semaphore is never closed.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) if is_ours(&stream) => stream,
            Ok(_) => continue,
            Err(error) => {
                debug!("a control connection was not accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let commands = commands.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, commands.clone()));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                debug!("a control connection ended: {error}");
            }
            drop(permit);
        });
    }
}

/// Whether our own user, or root, has connected. (The socket's mode is set after it is made.)
fn is_ours(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

async fn answer(
    request: Request<Incoming>,
    demands: mpsc::Sender<Demand>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if *request.method() == Method::POST && request.uri().path() == TRIGGER {
        return Ok(capture(request, &demands).await.unwrap_or_else(|| response(ENDING.0, ENDING.1.to_owned())));
    }
    let Some(command) = Command::of(request.method(), request.uri().path()) else {
        return Ok(response(
            StatusCode::NOT_FOUND,
            format!("try GET /state, POST /stop, /resume, /reload or {TRIGGER}\n"),
        ));
    };
    let (reply, answer) = oneshot::channel();
    let sent = demands.send(Demand::Command(command, reply)).await;
    Ok(match (sent, answer.await) {
        (Ok(()), Ok(state)) => json(&state),
        _ => response(ENDING.0, ENDING.1.to_owned()),
    })
}

/// What clients are told while nobody takes anything any more.
const ENDING: (StatusCode, &str) = (StatusCode::SERVICE_UNAVAILABLE, "the agent is about to end\n");

/// Asks for a capture; `None`: the agent is about to end.
async fn capture(request: Request<Incoming>, demands: &mpsc::Sender<Demand>) -> Option<Response<Full<Bytes>>> {
    let refused = |status, reason: String| Some(response(status, reason + "\n"));
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    let body = match tokio::time::timeout(HEAD_TIMEOUT, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return refused(StatusCode::PAYLOAD_TOO_LARGE, format!("a request has {MAX_BODY} bytes at most"));
        }
        Ok(Err(error)) => return refused(StatusCode::BAD_REQUEST, error.to_string()),
        Err(_) => return refused(StatusCode::REQUEST_TIMEOUT, "the request took too long".to_owned()),
    };
    // Nothing said: the whole machine, as usual.
    let wanted = if body.is_empty() { Ok(config::Request::default()) } else { serde_json::from_slice(&body) };
    let wanted = match wanted {
        Ok(wanted) => Box::new(wanted),
        Err(error) => return refused(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let (reply, answer) = oneshot::channel();
    demands.send(Demand::Capture(wanted, reply)).await.ok()?;
    match answer.await.ok()? {
        Ok(running) => Some(json(&running)),
        Err(Declined::Invalid(reason)) => refused(StatusCode::BAD_REQUEST, reason),
        Err(Declined::Refused(Refusal::Stopped, reason)) => refused(StatusCode::SERVICE_UNAVAILABLE, reason),
        Err(Declined::Refused(_, reason)) => refused(StatusCode::TOO_MANY_REQUESTS, reason),
        Err(Declined::Failed(reason)) => refused(StatusCode::INTERNAL_SERVER_ERROR, reason),
    }
}

fn json(answer: &impl Serialize) -> Response<Full<Bytes>> {
    // SANITY: text and numbers only.
    response(StatusCode::OK, serde_json::to_string(answer).unwrap_or_default() + "\n")
}

fn response(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}

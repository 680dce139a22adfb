//! Asks a daemon that runs on this machine for something.

use std::{io, path::Path, time::Duration};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use super::{
    demand::CaptureState,
    socket::{Command, State, TRIGGER},
};
use crate::config;

/// How long the daemon may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The same where it has to load kernel programs first.
const LOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest answer, bytes.
const MAX_ANSWER: usize = 64 << 10;

/// Why the daemon did not do what it was asked for.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent takes commands at {0}")]
    Absent(String),
    /// The socket is not ours to use.
    #[error("{path} cannot be opened: {error}")]
    Refused {
        /// The socket.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// It does not do that, and says why.
    #[error("{0}")]
    Declined(String),
    /// Something answered that was not understood.
    #[error("the agent at {path} did not answer as expected: {reason}")]
    Answer {
        /// The socket.
        path: String,
        /// What was wrong.
        reason: String,
    },
}

/// Gives the daemon a command and returns how things are then.
pub fn ask(socket: &Path, command: Command) -> Result<State, ClientError> {
    let (method, path) = command.request();
    send(socket, method, path, String::new(), TIMEOUT)
}

/// Asks for a capture and returns what runs.
pub fn trigger(socket: &Path, request: &config::Request) -> Result<CaptureState, ClientError> {
    // SANITY: text and numbers only.
    send(socket, Method::POST, TRIGGER, serde_json::to_string(request).unwrap_or_default(), LOAD_TIMEOUT)
}

fn send<A: DeserializeOwned>(
    socket: &Path,
    method: Method,
    target: &str,
    body: String,
    timeout: Duration,
) -> Result<A, ClientError> {
    let path = socket.display().to_string();
    let wrong = |reason: String| ClientError::Answer { path: path.clone(), reason };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| wrong(error.to_string()))?;
    runtime.block_on(async {
        let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::Absent(path.clone()),
            _ => ClientError::Refused { path: path.clone(), error },
        })?;
        let (status, body) = tokio::time::timeout(timeout, exchange(stream, method, target, body))
            .await
            .map_err(|_| wrong(format!("nothing came within {} s", timeout.as_secs())))?
            .map_err(wrong)?;
        match status {
            StatusCode::OK => serde_json::from_slice(&body).map_err(|error| wrong(error.to_string())),
            // In these cases it says why, for people.
            StatusCode::BAD_REQUEST | StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Err(ClientError::Declined(String::from_utf8_lossy(&body).trim().to_owned()))
            }
            status => Err(wrong(format!("{status}: {}", String::from_utf8_lossy(&body).trim()))),
        }
    })
}

async fn exchange(stream: UnixStream, method: Method, path: &str, body: String) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "agent").body(Full::<Bytes>::from(body));
    let response =
        sender.send_request(request.map_err(|error| error.to_string())?).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| error.to_string())?;
    connection.abort();
    Ok((status, body.to_bytes()))
}

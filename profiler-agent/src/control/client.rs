//! Asks a daemon that runs on this machine for something.

use std::{io, path::Path, time::Duration};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;

use super::socket::{Command, State};

/// How long the daemon may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
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
    let path = socket.display().to_string();
    let wrong = |reason: String| ClientError::Answer { path: path.clone(), reason };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| wrong(error.to_string()))?;
    runtime.block_on(async {
        let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::Absent(path.clone()),
            _ => ClientError::Refused { path: path.clone(), error },
        })?;
        tokio::time::timeout(TIMEOUT, exchange(stream, command))
            .await
            .map_err(|_| wrong(format!("nothing came within {} s", TIMEOUT.as_secs())))?
            .map_err(wrong)
    })
}

async fn exchange(stream: UnixStream, command: Command) -> Result<State, String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let (method, path) = command.request();
    let request = Request::builder().method(method).uri(path).header("host", "agent").body(Empty::<Bytes>::new());
    let response =
        sender.send_request(request.map_err(|error| error.to_string())?).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| error.to_string())?;
    connection.abort();
    let body = body.to_bytes();
    if status != StatusCode::OK {
        return Err(format!("{status}: {}", String::from_utf8_lossy(&body).trim()));
    }
    serde_json::from_slice(&body).map_err(|error| error.to_string())
}

//! Sends encoded requests to one receiver, over gRPC or HTTP.
//!
//! In: a request as it is stored. Out: what the receiver took, or why it did not. One attempt is one attempt: whether and
//! when there is another is for delivery to say. Everything a receiver sends is bounded in time and memory, and nothing
//! that is said about it holds a secret.

mod answer;
mod connection;
mod failure;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod settings;
#[cfg(test)]
mod tests;
mod tls;

pub use self::{
    answer::Accepted,
    failure::{ClientError, Failure, Reason},
    settings::{Compression, Endpoint, Protocol, Secret, Settings, Tls, UrlPath},
};

use std::{
    fmt,
    io::{self, Write as _},
    path::Path,
};

use bytes::Bytes;
use flate2::write::GzEncoder;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method,
    header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HOST, HeaderName, HeaderValue, TE, USER_AGENT},
};

use self::{
    answer::{GRPC_PREFIX, Secrets},
    connection::Connection,
};
use super::Request;
use crate::credentials;

const OUR_NAME: HeaderValue = HeaderValue::from_static(concat!("profiler-agent/", env!("CARGO_PKG_VERSION")));

/// A receiver, connected to when it is first needed and again when the connection broke. Used on one tokio runtime.
pub struct Client {
    settings: Settings,
    /// Sent with every request, with those of the settings.
    headers: HeaderMap,
    tls: Option<tls::Tls>,
    connection: Option<Connection>,
    sent_bytes: u64,
}

impl Client {
    /// Checks everything that can be checked without connecting.
    pub fn new(settings: Settings) -> Result<Self, ClientError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &settings.headers {
            let (name, value) = settings::header(name, value)?;
            headers.append(name, value);
        }
        if let Some(path) = &settings.bearer_token_file {
            if headers.contains_key(AUTHORIZATION) {
                let problem = "the header \"authorization\" is set too: leave one of them out";
                return Err(ClientError::new("bearer_token_file", problem));
            }
            bearer_token(path).map_err(|problem| ClientError::new("bearer_token_file", problem))?;
        }
        headers.insert(USER_AGENT, OUR_NAME);
        match settings.protocol {
            Protocol::Grpc => {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
                headers.insert(TE, HeaderValue::from_static("trailers"));
            }
            Protocol::HttpProtobuf => {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
                let authority = settings.endpoint.uri().authority().map_or("", |authority| authority.as_str());
                let host = HeaderValue::try_from(authority)
                    .map_err(|_| ClientError::new("endpoint", "this host is not one that HTTP can name"))?;
                headers.insert(HOST, host);
            }
        }
        if settings.compression == Compression::Gzip {
            let name = match settings.protocol {
                Protocol::Grpc => HeaderName::from_static("grpc-encoding"),
                Protocol::HttpProtobuf => CONTENT_ENCODING,
            };
            headers.insert(name, HeaderValue::from_static("gzip"));
        }
        let tls = settings.endpoint.is_encrypted().then(|| tls::Tls::new(&settings)).transpose()?;
        Ok(Self { settings, headers, tls, connection: None, sent_bytes: 0 })
    }

    /// Where requests go, and how.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Bytes of the last request's body, as it was sent.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Sends one request, once, in the time that the settings allow. May be dropped at any time: the request may have
    /// arrived then.
    pub async fn send(&mut self, request: &Request) -> Result<Accepted, Failure> {
        let authorization = match &self.settings.bearer_token_file {
            Some(path) => Some(bearer_token(path).map_err(|problem| Failure::new(Reason::NoCredentials, problem))?),
            None => None,
        };
        match tokio::time::timeout(self.settings.timeout, self.attempt(request, authorization.as_ref())).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let waited = humantime::format_duration(self.settings.timeout);
                Err(Failure::new(Reason::Timeout, format!("there was no answer within {waited}")))
            }
        }
    }

    async fn attempt(&mut self, request: &Request, authorization: Option<&HeaderValue>) -> Result<Accepted, Failure> {
        if self.tls.as_mut().is_some_and(tls::Tls::refresh) {
            self.connection = None;
        }
        // Taken, and only put back when all went well: a connection with half a request on it is of no use. One that was idle
        // may have ended meanwhile, which the next request shows.
        if let Some(connection) = self.connection.take().filter(Connection::is_open) {
            match self.exchange(connection, request, authorization).await {
                Err(failure) if failure.reason == Reason::Unreachable => {}
                outcome => return outcome,
            }
        }
        let Settings { endpoint, protocol, timeout, .. } = &self.settings;
        let connection = Connection::open(endpoint, *protocol, self.tls.as_ref(), *timeout).await?;
        self.exchange(connection, request, authorization).await
    }

    async fn exchange(
        &mut self,
        mut connection: Connection,
        request: &Request,
        authorization: Option<&HeaderValue>,
    ) -> Result<Accepted, Failure> {
        let body = body(&self.settings, &request.body).map_err(|error| impossible(&error))?;
        self.sent_bytes = body.len() as u64;
        let answer = connection.exchange(self.http_request(body, authorization)?, self.tls.as_ref()).await?;
        if !answer.is_cut {
            self.connection = Some(connection);
        }
        let secrets = self.secrets(authorization);
        match self.settings.protocol {
            Protocol::Grpc => answer::of_grpc(&answer, &secrets),
            Protocol::HttpProtobuf => answer::of_http(&answer, &secrets),
        }
    }

    fn http_request(
        &self,
        body: Bytes,
        authorization: Option<&HeaderValue>,
    ) -> Result<hyper::Request<Full<Bytes>>, Failure> {
        // A proxy is not asked, so HTTP/1.1 has the path alone.
        let uri = match self.settings.protocol {
            Protocol::Grpc => self.settings.endpoint.uri().to_string(),
            Protocol::HttpProtobuf => {
                self.settings.endpoint.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned()
            }
        };
        let mut request = hyper::Request::builder()
            .method(Method::POST)
            .uri(uri)
            .body(Full::new(body))
            .map_err(|error| impossible(&error))?;
        *request.headers_mut() = self.headers.clone();
        if let Some(authorization) = authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }

    fn secrets<'a>(&'a self, authorization: Option<&'a HeaderValue>) -> Secrets<'a> {
        let values = self.headers.values().chain(authorization).filter(|value| value.is_sensitive());
        let values = values.filter_map(|value| value.to_str().ok());
        // Of `Bearer` and `Basic`, what comes after these words.
        let secrets = values.map(|value| value.split_once(' ').map_or(value, |(_, secret)| secret.trim()));
        Secrets::new(secrets.chain(self.settings.endpoint.uri().query()))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.fmt(f)
    }
}

fn impossible(problem: &dyn fmt::Display) -> Failure {
    Failure::new(Reason::Refused, format!("the request cannot be made: {problem}"))
}

/// A request's body as the protocol has it.
fn body(settings: &Settings, message: &Bytes) -> io::Result<Bytes> {
    let prefix = if settings.protocol == Protocol::Grpc { GRPC_PREFIX } else { 0 };
    let is_compressed = settings.compression == Compression::Gzip;
    if prefix == 0 && !is_compressed {
        return Ok(message.clone());
    }
    let mut body = vec![0; prefix];
    if is_compressed {
        let mut encoder = GzEncoder::new(&mut body, flate2::Compression::default());
        encoder.write_all(message)?;
        encoder.finish()?;
    } else {
        body.extend_from_slice(message);
    }
    // <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#requests>
    let len = u32::try_from(body.len() - prefix).map_err(io::Error::other)?;
    if let Some((flag, length)) = body[..prefix].split_first_mut() {
        *flag = u8::from(is_compressed);
        length.copy_from_slice(&len.to_be_bytes());
    }
    Ok(body.into())
}

/// The header that a token makes. The error does not repeat what is in the file.
fn bearer_token(path: &Path) -> Result<HeaderValue, String> {
    let token = credentials::token(path)?;
    let mut value =
        HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| format!("{} holds no token", path.display()))?;
    value.set_sensitive(true);
    Ok(value)
}

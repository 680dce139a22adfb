//! A client of the API server for one user: requests and answers in JSON.

use std::{fs, path::Path, sync::Arc, time::Duration};

use serde_json::Value;
use ureq::{
    Agent,
    http::Request,
    tls::{Certificate, RootCerts, TlsConfig},
};

/// Longer than an API server takes for anything, also one that is under load.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What the API server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP's status.
    pub status: u16,
    /// The object, or a `Status` that says why not; a string where it is no JSON.
    pub body: Value,
    /// The answer's length, bytes.
    pub length: usize,
}

/// A user's connections to the API server.
pub struct Client {
    agent: Agent,
    /// Where requests go, `https://127.0.0.1:PORT`.
    server: String,
    token: String,
}

impl Client {
    /// A client that trusts the authority in this file and is known by this token.
    pub fn new(port: u16, authority: &Path, token: &str) -> Self {
        let pem = fs::read(authority).unwrap_or_else(|error| panic!("{}: {error}", authority.display()));
        let certificate = Certificate::from_pem(&pem).expect("a certificate");
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::from(vec![certificate]))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let config = Agent::config_builder()
            .tls_config(tls.build())
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .proxy(None);
        Self { agent: config.build().new_agent(), server: format!("https://127.0.0.1:{port}"), token: token.to_owned() }
    }

    /// Makes a request; an error where there was no answer. `PATCH` is a strategic merge patch.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer, ureq::Error> {
        let kind = if method == "PATCH" { "application/strategic-merge-patch+json" } else { "application/json" };
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.server))
            .header("Authorization", format!("Bearer {}", self.token));
        let mut response = match body {
            Some(body) => self.agent.run(request.header("Content-Type", kind).body(body.to_string())?)?,
            None => self.agent.run(request.body(())?)?,
        };
        let text = response.body_mut().with_config().limit(256 << 20).read_to_string()?;
        Ok(Answer {
            status: response.status().as_u16(),
            length: text.len(),
            body: serde_json::from_str(&text).unwrap_or(Value::String(text)),
        })
    }
}

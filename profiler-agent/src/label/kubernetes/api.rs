//! Requests to the API server about the pods of one node, and what can be wrong with its answers.

use std::{error::Error, time::Duration};

use http_body_util::BodyExt as _;
use hyper::{Response, StatusCode};
use kube::{
    Client, Config,
    api::{ListParams, WatchParams},
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::Deserialize;
use thiserror::Error;

use super::{Access, list::Items};
use crate::label::text;

const PODS: &str = "/api/v1/pods";
/// The API server ends watches after this time.
const WATCH_SECONDS: u32 = 290;
/// Bytes that are read of an answer that refuses something.
const MAX_REFUSAL: usize = 64 << 10;
/// Bytes of what is said about an error.
const MAX_ERROR: usize = 300;

/// Why there is no answer, or no useful one. One line each, without secrets.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(super) enum ApiError {
    #[error("how to reach the API server is not known: {0}")]
    Unconfigured(Box<str>),
    #[error("the API server cannot be reached: {0}")]
    Unreachable(Box<str>),
    #[error("the API server has not answered for {} s", .0.as_secs())]
    Silent(Duration),
    #[error(
        "the API server does not accept our credentials (401): {0}; check the service account's token, or the kubeconfig"
    )]
    Unauthorized(Box<str>),
    #[error(
        "pods may not be read (403): {0}; bind a ClusterRole that allows `list` and `watch` of `pods` to the agent's service \
         account"
    )]
    Forbidden(Box<str>),
    #[error("what changed since the last watch is not known any more")]
    Expired,
    #[error("the API server refuses ({0}): {1}")]
    Refused(u16, Box<str>),
    #[error("the API server's answer cannot be read: {0}")]
    Malformed(Box<str>),
}

/// The API server, as one node's pods are asked for.
pub(super) struct Api {
    client: Client,
    selector: String,
    /// How long an answer, and each part of it, may take.
    patience: Duration,
}

/// `metav1.Status`, as far as it is needed.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) code: u16,
    message: String,
}

#[derive(Deserialize)]
struct Shell {
    metadata: ListMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    resource_version: String,
}

impl Api {
    /// Reads credentials; the first request connects.
    pub(super) async fn new(access: &Access, node: &str, patience: Duration) -> Result<Self, ApiError> {
        let unconfigured = |error: &dyn Error| ApiError::Unconfigured(causes(error));
        let mut config = match access {
            Access::InCluster => Config::incluster().map_err(|error| unconfigured(&error))?,
            Access::Kubeconfig(path) => {
                let kubeconfig = Kubeconfig::read_from(path).map_err(|error| unconfigured(&error))?;
                let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
                config.map_err(|error| unconfigured(&error))?
            }
        };
        // When there is another attempt is decided in one place.
        config.default_retry = false;
        config.connect_timeout = Some(patience);
        let client = Client::try_from(config).map_err(|error| unconfigured(&error))?;
        Ok(Self { client, selector: format!("spec.nodeName={node}"), patience })
    }

    /// Hands on every pod, and tells the version of the list. What the API server has at hand is good enough: asking for
    /// the newest would make it read every pod of the cluster.
    pub(super) async fn list(&self, mut take: impl FnMut(&[u8])) -> Result<(String, u64), ApiError> {
        let parameters = ListParams::default().fields(&self.selector).match_any();
        let request = kube::core::Request::new(PODS).list(&parameters);
        let mut body = self.send(request).await?.into_body();
        let mut items = Items::default();
        while let Some(bytes) = next(&mut body, self.patience).await? {
            items.push(&bytes, &mut take).map_err(|problem| ApiError::Malformed(problem.into()))?;
        }
        let (shell, refused) = items.finish();
        let shell: Shell = serde_json::from_slice(&shell).map_err(|error| ApiError::Malformed(causes(&error)))?;
        Ok((shell.metadata.resource_version, refused))
    }

    /// Begins to watch. What follows is one object a line.
    pub(super) async fn watch(&self, version: &str, seconds: Option<u32>) -> Result<Body, ApiError> {
        let parameters = WatchParams {
            field_selector: Some(self.selector.clone()),
            timeout: seconds.or(Some(WATCH_SECONDS)),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = kube::core::Request::new(PODS).watch(&parameters, version);
        Ok(self.send(request).await?.into_body())
    }

    async fn send(
        &self,
        request: Result<hyper::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<Response<Body>, ApiError> {
        let request = request.map_err(|error| ApiError::Unconfigured(causes(&error)))?;
        let answer = tokio::time::timeout(self.patience, self.client.send(request.map(Body::from)));
        let response = answer.await.map_err(|_| ApiError::Silent(self.patience))?.map_err(|error| match error {
            kube::Error::Auth(error) => ApiError::Unconfigured(causes(&error)),
            error => ApiError::Unreachable(causes(&error)),
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let mut body = response.into_body();
        let mut said = Vec::new();
        while said.len() < MAX_REFUSAL
            && let Ok(Some(bytes)) = next(&mut body, self.patience).await
        {
            said.extend_from_slice(&bytes[..bytes.len().min(MAX_REFUSAL - said.len())]);
        }
        // Something between us and the API server may answer in its own words.
        let said: Status = serde_json::from_slice(&said).unwrap_or_default();
        Err(Status { code: status.as_u16(), ..said }.into())
    }
}

/// The part of an answer that comes next; `None`: it has ended.
pub(super) async fn next(body: &mut Body, patience: Duration) -> Result<Option<hyper::body::Bytes>, ApiError> {
    loop {
        let frame = tokio::time::timeout(patience, body.frame()).await.map_err(|_| ApiError::Silent(patience))?;
        let Some(frame) = frame else { return Ok(None) };
        let frame = frame.map_err(|error| ApiError::Unreachable(causes(&error)))?;
        if let Ok(bytes) = frame.into_data() {
            return Ok(Some(bytes));
        }
    }
}

impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        let message = text::clean(&status.message, MAX_ERROR);
        match StatusCode::from_u16(status.code) {
            Ok(StatusCode::UNAUTHORIZED) => Self::Unauthorized(message),
            Ok(StatusCode::FORBIDDEN) => Self::Forbidden(message),
            Ok(StatusCode::GONE) => Self::Expired,
            _ => Self::Refused(status.code, message),
        }
    }
}

/// An error and what caused it, on one line.
pub(super) fn causes(error: &dyn Error) -> Box<str> {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some errors repeat their causes.
        if !said.contains(&text) {
            said += &format!(": {text}");
        }
        cause = error.source();
    }
    text::clean(&said, MAX_ERROR)
}

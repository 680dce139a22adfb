//! Sends export requests over gRPC.

use std::time::Duration;

use opentelemetry_proto::tonic::collector::profiles::v1development::{
    ExportProfilesServiceRequest, profiles_service_client::ProfilesServiceClient,
};
use prost::Message as _;
use thiserror::Error;
use tonic::{
    Code,
    codec::CompressionEncoding,
    transport::{Channel, Endpoint},
};

use super::Request;

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why an endpoint cannot be used or a request was not accepted.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Not an address that can be connected to.
    #[error("{endpoint:?} is not an OTLP endpoint: {reason}; expected for example http://127.0.0.1:4317")]
    Endpoint {
        /// What was configured.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The receiver refused the request, or could not be reached.
    #[error("the receiver answered {code:?}: {message}")]
    Refused {
        /// gRPC status code.
        code: Code,
        /// The receiver's or transport's words.
        message: String,
    },
}

impl ClientError {
    /// Whether the OTLP specification allows sending the same request again.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Endpoint { .. } => false,
            Self::Refused { code, .. } => matches!(
                code,
                Code::Cancelled
                    | Code::DeadlineExceeded
                    | Code::Aborted
                    | Code::OutOfRange
                    | Code::Unavailable
                    | Code::DataLoss
            ),
        }
    }
}

/// A connection to one receiver, made when it is first needed and remade when it breaks.
#[derive(Clone)]
pub struct Client {
    inner: ProfilesServiceClient<Channel>,
    endpoint: String,
}

impl Client {
    /// Checks the endpoint; does not connect yet.
    pub fn new(endpoint: &str) -> Result<Self, ClientError> {
        let refuse = |reason: &str| ClientError::Endpoint { endpoint: endpoint.to_owned(), reason: reason.to_owned() };
        if endpoint.starts_with("https://") {
            return Err(refuse("TLS is not supported by this version"));
        }
        if !endpoint.starts_with("http://") {
            return Err(refuse("it does not start with http://"));
        }
        let channel = Endpoint::from_shared(endpoint.to_owned())
            .map_err(|error| refuse(&error.to_string()))?
            .connect_timeout(TIMEOUT)
            .timeout(TIMEOUT)
            .connect_lazy();
        let inner = ProfilesServiceClient::new(channel).send_compressed(CompressionEncoding::Gzip);
        Ok(Self { inner, endpoint: endpoint.to_owned() })
    }

    /// Where requests go.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Sends one request. The result is how many of its profiles the receiver rejected while accepting the rest.
    pub async fn send(&mut self, request: &Request) -> Result<i64, ClientError> {
        let request = ExportProfilesServiceRequest::decode(request.body.clone())
            .map_err(|error| ClientError::Refused { code: Code::InvalidArgument, message: error.to_string() })?;
        match self.inner.export(request).await {
            Ok(response) => Ok(response.into_inner().partial_success.map_or(0, |partial| partial.rejected_profiles)),
            Err(status) => Err(ClientError::Refused { code: status.code(), message: status.message().to_owned() }),
        }
    }
}

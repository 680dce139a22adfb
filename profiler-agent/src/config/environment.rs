//! OpenTelemetry's environment variables about where profiles go
//! (<https://opentelemetry.io/docs/specs/otel/protocol/exporter/>).

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, anyhow};
use percent_encoding::percent_decode_str;
use tracing::warn;

use super::export::choice;
use crate::export::otlp::client::{Compression, Endpoint, Protocol, Secret, Tls, UrlPath};

/// The variables that are read: the one about profiles, before the one about every signal.
const VARIABLES: [[&str; 2]; 9] = [
    ENDPOINT,
    ["OTEL_EXPORTER_OTLP_PROFILES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"],
    ["OTEL_EXPORTER_OTLP_PROFILES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"],
    ["OTEL_EXPORTER_OTLP_PROFILES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"],
    ["OTEL_EXPORTER_OTLP_PROFILES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"],
    ["OTEL_EXPORTER_OTLP_PROFILES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"],
    ["OTEL_EXPORTER_OTLP_PROFILES_CLIENT_KEY", "OTEL_EXPORTER_OTLP_CLIENT_KEY"],
    ["OTEL_EXPORTER_OTLP_PROFILES_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"],
    ["OTEL_EXPORTER_OTLP_PROFILES_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE"],
];
const ENDPOINT: [&str; 2] = ["OTEL_EXPORTER_OTLP_PROFILES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// A variable that is set. Any of them may be secret.
#[derive(Clone, Debug)]
pub struct Variable {
    /// What it is called.
    pub name: &'static str,
    value: Secret,
}

impl Variable {
    /// What the path of the URL in it means.
    pub(super) fn url_path(&self) -> UrlPath {
        if self.name == ENDPOINT[0] { UrlPath::Exact } else { UrlPath::Base }
    }
}

/// The variables that are set.
#[derive(Clone, Debug, Default)]
pub struct Environment(Vec<Variable>);

impl Environment {
    /// Those of this process.
    pub fn read() -> Self {
        Self::from(|name| std::env::var(name).ok())
    }

    /// An empty variable is none.
    pub(super) fn from(value: impl Fn(&str) -> Option<String>) -> Self {
        let set = |names: [&'static str; 2]| {
            names.into_iter().find_map(|name| {
                let value = value(name).filter(|value| !value.trim().is_empty())?;
                Some(Variable { name, value: Secret::new(value.trim()) })
            })
        };
        Self(VARIABLES.into_iter().filter_map(set).collect())
    }

    fn find(&self, suffix: &str) -> Option<&Variable> {
        let is_meant = |name: &str| {
            let rest = name.strip_prefix("OTEL_EXPORTER_OTLP_").unwrap_or_default();
            rest.strip_prefix("PROFILES_").unwrap_or(rest) == suffix
        };
        self.0.iter().find(|variable| is_meant(variable.name))
    }

    pub(super) fn endpoint(&self) -> Option<&Variable> {
        self.find("ENDPOINT")
    }

    /// The endpoint's URL. gRPC's may be host and port alone, and another variable says then whether TLS is used.
    pub(super) fn with_scheme(&self, endpoint: &Variable, protocol: Option<Protocol>) -> Secret {
        let text = endpoint.value.reveal();
        let protocol = protocol.unwrap_or_else(|| Protocol::of_port(Endpoint::port_of(text)));
        if text.contains("://") || protocol != Protocol::Grpc {
            return endpoint.value.clone();
        }
        let insecure = self.find("INSECURE").is_some_and(|value| value.value.reveal().eq_ignore_ascii_case("true"));
        Secret::new(format!("{}://{text}", if insecure { "http" } else { "https" }))
    }

    pub(super) fn protocol(&self) -> anyhow::Result<Option<Protocol>> {
        self.find("PROTOCOL").map(|variable| choice(variable.name, variable.value.reveal())).transpose()
    }

    pub(super) fn compression(&self) -> anyhow::Result<Option<Compression>> {
        self.find("COMPRESSION").map(|variable| choice(variable.name, variable.value.reveal())).transpose()
    }

    /// Milliseconds.
    pub(super) fn timeout(&self) -> anyhow::Result<Option<(&Variable, Duration)>> {
        let Some(variable) = self.find("TIMEOUT") else { return Ok(None) };
        let text = variable.value.reveal();
        let milliseconds =
            text.parse().with_context(|| format!("{}: {text:?} is no number of milliseconds", variable.name))?;
        Ok(Some((variable, Duration::from_millis(milliseconds))))
    }

    /// `name=value,name=value`, values with `%` for what would mean something else. Errors repeat no values.
    pub(super) fn headers(&self) -> anyhow::Result<Vec<(String, Secret)>> {
        let Some(variable) = self.find("HEADERS") else { return Ok(Vec::new()) };
        let pairs = variable.value.reveal().split(',').map(str::trim).filter(|pair| !pair.is_empty());
        pairs
            .map(|pair| {
                let (name, value) = pair
                    .split_once('=')
                    .ok_or_else(|| anyhow!("{}: it is not of the form name=value,name=value", variable.name))?;
                let value = percent_decode_str(value.trim())
                    .decode_utf8()
                    .map_err(|_| anyhow!("{}: the value of {:?} is not text", variable.name, name.trim()))?;
                Ok((name.trim().to_owned(), Secret::new(value)))
            })
            .collect()
    }

    /// What is not set there is what is set here.
    pub(super) fn tls_under(&self, tls: Tls) -> Tls {
        let path = |suffix| self.find(suffix).map(|variable| PathBuf::from(variable.value.reveal()));
        Tls {
            ca_file: tls.ca_file.or_else(|| path("CERTIFICATE")),
            cert_file: tls.cert_file.or_else(|| path("CLIENT_CERTIFICATE")),
            key_file: tls.key_file.or_else(|| path("CLIENT_KEY")),
            server_name: tls.server_name,
        }
    }

    /// Says once that the variables are about a destination that there is not.
    pub(super) fn warn_of_ignored(&self) {
        let names: Vec<_> = self.0.iter().map(|variable| variable.name).collect();
        if !names.is_empty() {
            warn!("ignored, because the configuration file lists destinations: {}", names.join(", "));
        }
    }
}

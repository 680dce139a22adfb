//! Whose sample is it? Resource attributes by OpenTelemetry's semantic conventions.
//!
//! So far the service is the process's name, and the resource says which host it ran on.

use std::sync::OnceLock;

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value},
    resource::v1::Resource,
};

use crate::profile::ProcessInfo;

/// The service a process belongs to.
pub fn service_name(process: &ProcessInfo) -> &str {
    if process.name.is_empty() { "unknown_service" } else { &process.name }
}

/// The resource that stands for a service on this host.
pub fn resource(service: &str) -> Resource {
    let attributes =
        [("service.name", service), ("host.name", host_name()), ("host.arch", host_arch()), ("os.type", "linux")];
    Resource {
        attributes: attributes.into_iter().map(|(key, value)| attribute(key, value)).collect(),
        ..Resource::default()
    }
}

fn attribute(key: &str, value: &str) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(Value::StringValue(value.to_owned())) }),
        ..KeyValue::default()
    }
}

fn host_name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        nix::unistd::gethostname().map_or_else(|_| "unknown".to_owned(), |name| name.to_string_lossy().into_owned())
    })
}

/// The architecture in the words of the semantic conventions.
fn host_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

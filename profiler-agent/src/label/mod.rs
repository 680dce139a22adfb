//! Whose sample is it? Resource attributes by OpenTelemetry's semantic conventions.
//!
//! So far the service is the process's name, and the resource says which host it ran on.

use std::sync::OnceLock;

use crate::profile::ProcessInfo;

/// The service a process belongs to.
pub fn service_name(process: &ProcessInfo) -> &str {
    if process.name.is_empty() { "unknown_service" } else { &process.name }
}

/// What tells a service on this host apart, by the names of the semantic conventions.
pub fn attributes(service: &str) -> [(&'static str, &str); 4] {
    [("service.name", service), ("host.name", host_name()), ("host.arch", host_arch()), ("os.type", "linux")]
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

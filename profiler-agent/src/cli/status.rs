//! Flags about the status endpoint.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use crate::config::StatusOverrides;

/// Where the daemon tells how it is, and to whom.
#[derive(Args, Debug)]
#[command(next_help_heading = "Status")]
pub(super) struct StatusOptions {
    /// Address of /metrics, /healthz, /readyz and /debug/state.
    #[arg(long, env = "PROFILER_STATUS_LISTEN", value_name = "ADDRESS")]
    status_listen: Option<SocketAddr>,
    /// Certificate (PEM) by which the status endpoint speaks TLS; read again when it changes.
    #[arg(long, env = "PROFILER_STATUS_TLS_CERT_FILE", value_name = "FILE")]
    status_tls_cert_file: Option<PathBuf>,
    /// Private key (PEM) of that certificate.
    #[arg(long, env = "PROFILER_STATUS_TLS_KEY_FILE", value_name = "FILE")]
    status_tls_key_file: Option<PathBuf>,
    /// File with a token that whoever asks for anything but /healthz and /readyz has to send (`authorization: Bearer TOKEN`);
    /// read again when it changes.
    #[arg(long, env = "PROFILER_STATUS_TOKEN_FILE", value_name = "FILE")]
    status_token_file: Option<PathBuf>,
}

impl StatusOptions {
    /// As the configuration has it.
    pub(super) fn overrides(self) -> StatusOverrides {
        StatusOverrides {
            listen: self.status_listen,
            cert_file: self.status_tls_cert_file,
            key_file: self.status_tls_key_file,
            token_file: self.status_token_file,
        }
    }
}

//! Flags about where profiles go.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;

use crate::{
    config::{Environment, ExportOverrides, FileFormat},
    export::otlp::client::{Compression, Protocol, Secret, Tls},
};

#[derive(Args, Debug)]
#[command(next_help_heading = "Sending profiles")]
pub(super) struct ExportOptions {
    /// How long samples are aggregated before they are exported.
    #[arg(long, env = "PROFILER_WINDOW", value_name = "DURATION", value_parser = humantime::parse_duration)]
    window: Option<Duration>,
    /// Where profiles are sent to by OTLP, in place of the file's destinations. OTEL_EXPORTER_OTLP_PROFILES_ENDPOINT or
    /// OTEL_EXPORTER_OTLP_ENDPOINT is used where this is not set, and so on for the flags that follow.
    #[arg(long, value_name = "URL", value_parser = secret)]
    endpoint: Option<Secret>,
    /// By default grpc, and http/protobuf on port 4318.
    #[arg(long, value_enum, value_name = "PROTOCOL")]
    protocol: Option<Protocol>,
    /// How requests are compressed. By default gzip.
    #[arg(long, value_enum, value_name = "HOW")]
    compression: Option<Compression>,
    /// How long one attempt to send a request may take. By default 10s.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Header that is sent with every request; may be given several times. Other users of this machine see it: a secret
    /// belongs into the file, or into --bearer-token-file.
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = secret)]
    headers: Vec<Secret>,
    /// File whose text is sent as `authorization: Bearer TEXT`; read again for each request.
    #[arg(long, value_name = "FILE")]
    bearer_token_file: Option<PathBuf>,
    /// Authorities that the receiver's certificate may come from (PEM). By default those that the system trusts.
    #[arg(long, value_name = "FILE")]
    tls_ca_file: Option<PathBuf>,
    /// Certificate to be known by (PEM).
    #[arg(long, value_name = "FILE")]
    tls_cert_file: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE")]
    tls_key_file: Option<PathBuf>,
    /// Name in the receiver's certificate, where it is not the URL's.
    #[arg(long, value_name = "NAME")]
    tls_server_name: Option<String>,
    /// Most MiB of requests that wait in memory, for each destination. By default 16.
    #[arg(long, env = "PROFILER_QUEUE_MIB", value_name = "MIB")]
    queue_mib: Option<u64>,
    /// Folder in which requests are kept until they are delivered. By default they are kept in memory alone.
    #[arg(long, env = "PROFILER_SPOOL", value_name = "FOLDER")]
    spool: Option<PathBuf>,
    /// Most MiB of that folder's files, for each destination. By default 512.
    #[arg(long, env = "PROFILER_SPOOL_MIB", value_name = "MIB")]
    spool_mib: Option<u64>,
    /// What is not delivered after this time is given up. By default 24h.
    #[arg(long, env = "PROFILER_SPOOL_MAX_AGE", value_name = "DURATION", value_parser = humantime::parse_duration)]
    spool_max_age: Option<Duration>,
    /// Folder to which every window is written too.
    #[arg(long, env = "PROFILER_OUTPUT_FOLDER", value_name = "FOLDER")]
    output_folder: Option<PathBuf>,
    /// What these files are. By default pprof.
    #[arg(long, env = "PROFILER_OUTPUT_FORMAT", value_enum, value_name = "FORMAT")]
    output_format: Option<FileFormat>,
    /// Most MiB of these files; the oldest are removed. By default 1024.
    #[arg(long, env = "PROFILER_OUTPUT_MIB", value_name = "MIB")]
    output_mib: Option<u64>,
    /// Put the profile into requests as pprof, too. Few receivers read it, and requests grow.
    #[arg(long, env = "PROFILER_ORIGINAL_PAYLOAD", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    original_payload: Option<bool>,
}

impl ExportOptions {
    /// As the configuration has it, with OpenTelemetry's variables.
    pub(super) fn overrides(self) -> anyhow::Result<ExportOverrides> {
        Ok(ExportOverrides {
            window: self.window,
            endpoint: self.endpoint,
            protocol: self.protocol,
            compression: self.compression,
            timeout: self.timeout,
            headers: self.headers.iter().map(header).collect::<Result<_, _>>()?,
            bearer_token_file: self.bearer_token_file,
            tls: Tls {
                ca_file: self.tls_ca_file,
                cert_file: self.tls_cert_file,
                key_file: self.tls_key_file,
                server_name: self.tls_server_name,
            },
            spool: self.spool,
            spool_mib: self.spool_mib,
            spool_max_age: self.spool_max_age,
            files: self.output_folder,
            files_format: self.output_format,
            files_mib: self.output_mib,
            queue_mib: self.queue_mib,
            original_payload: self.original_payload,
            environment: Environment::read(),
        })
    }
}

fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text))
}

/// (clap would repeat the whole text in an error of its own.)
fn header(text: &Secret) -> anyhow::Result<(String, Secret)> {
    let (name, value) = text.reveal().split_once('=').context("--header: it is not of the form NAME=VALUE")?;
    Ok((name.trim().to_owned(), Secret::new(value.trim())))
}

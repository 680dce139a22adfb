//! Certificates and keys, read from files and read again when they change, and what it means when TLS fails.

use std::{path::Path, sync::Arc};

use rustls::{AlertDescription, CertificateError, ClientConfig, Error, RootCertStore, pki_types::ServerName};
use tracing::warn;

use super::{ClientError, Failure, Protocol, Reason, Settings, failure::printable, settings::Tls as TlsSettings};
use crate::{
    credentials,
    regular_file::{self, Stamp},
    system_certificates,
};

/// Names in a receiver's certificate that are repeated.
const MAX_NAMES: usize = 4;

/// What TLS connections are made with.
pub(super) struct Tls {
    settings: TlsSettings,
    protocol: Protocol,
    server_name: ServerName<'static>,
    config: Arc<ClientConfig>,
    /// What the files were when they were read, in the order of [`files`](Self::files).
    stamps: [Option<Stamp>; 3],
    /// Why they could not be read again, so that it is said once.
    complaint: Option<String>,
}

impl Tls {
    pub(super) fn new(settings: &Settings) -> Result<Self, ClientError> {
        let tls = &settings.tls;
        let (setting, name) = match &tls.server_name {
            Some(name) => ("tls.server_name", name.as_str()),
            None => ("endpoint", settings.endpoint.host()),
        };
        let server_name = ServerName::try_from(name.to_owned())
            .map_err(|_| ClientError::new(setting, format!("{name:?} is neither a DNS name nor an IP address")))?;
        // (Stamps come before contents: what changes in between is read once more.)
        let stamps = stamps(tls);
        let config = Arc::new(config(tls, settings.protocol)?);
        Ok(Self { settings: tls.clone(), protocol: settings.protocol, server_name, config, stamps, complaint: None })
    }

    /// Reads files that were replaced. Whether there were any: connections that began before have what is old then.
    /// A certificate whose key does not come with it yet is read again the next time, and what there was stays.
    pub(super) fn refresh(&mut self) -> bool {
        let stamps = stamps(&self.settings);
        if stamps == self.stamps {
            return false;
        }
        match config(&self.settings, self.protocol) {
            Ok(config) => {
                self.config = Arc::new(config);
                self.stamps = stamps;
                self.complaint = None;
                true
            }
            Err(error) => {
                let complaint = error.to_string();
                if self.complaint.as_ref() != Some(&complaint) {
                    warn!("certificates stay as they were read before: {complaint}");
                    self.complaint = Some(complaint);
                }
                false
            }
        }
    }

    pub(super) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    pub(super) fn server_name(&self) -> ServerName<'static> {
        self.server_name.clone()
    }

    /// What an error of TLS means for who set it up.
    pub(super) fn failure(&self, error: &Error) -> Failure {
        use CertificateError as Certificate;
        let name = self.server_name.to_str();
        let way_to_certificate = "set tls.cert_file and tls.key_file";
        let message = match error {
            Error::InvalidCertificate(Certificate::Expired | Certificate::ExpiredContext { .. }) => {
                "the receiver's certificate has expired: renew it (or set this machine's clock)".to_owned()
            }
            Error::InvalidCertificate(Certificate::NotValidYet | Certificate::NotValidYetContext { .. }) => {
                "the receiver's certificate is not valid yet: is this machine's clock right?".to_owned()
            }
            Error::InvalidCertificate(Certificate::NotValidForName) => {
                format!("the receiver's certificate is not for {name:?}: set tls.server_name to a name that is in it")
            }
            Error::InvalidCertificate(Certificate::NotValidForNameContext { presented, .. }) => {
                let names: Vec<String> = presented.iter().take(MAX_NAMES).map(|name| printable(name)).collect();
                format!(
                    "the receiver's certificate is not for {name:?} but for {}: use such a name in the URL, or set \
                     tls.server_name to it",
                    if names.is_empty() { "no name at all".to_owned() } else { printable(&names.join(", ")) },
                )
            }
            Error::InvalidCertificate(Certificate::UnknownIssuer | Certificate::BadSignature) => {
                let trusted = self.settings.ca_file.as_ref().map_or_else(
                    || "the authorities that this system trusts".to_owned(),
                    |path| format!("the authorities in {}", path.display()),
                );
                format!(
                    "the receiver's certificate comes from none of {trusted}: set tls.ca_file to the certificate of its \
                     authority"
                )
            }
            // (The cause is another crate's type, of which only the text can be seen.)
            Error::InvalidCertificate(other) if format!("{other:?}").contains("CaUsedAsEndEntity") => {
                "the receiver's certificate is one of an authority (CA:TRUE), as `openssl req -x509` makes them unless it is \
                 told otherwise: give the receiver one with basicConstraints=CA:FALSE"
                    .to_owned()
            }
            Error::InvalidCertificate(other) => {
                format!("the receiver's certificate cannot be used: {}", printable(&other.to_string()))
            }
            Error::InvalidMessage(_) => "the receiver does not speak TLS: use http:// or its TLS port".to_owned(),
            Error::AlertReceived(AlertDescription::NoApplicationProtocol) => match self.protocol {
                Protocol::Grpc => {
                    "the receiver's TLS port does not offer HTTP/2, which gRPC needs: use its gRPC port, or \
                                   the protocol http/protobuf"
                        .to_owned()
                }
                Protocol::HttpProtobuf => {
                    "the receiver's TLS port does not offer HTTP/1.1: use its HTTP port, or the protocol grpc"
                        .to_owned()
                }
            },
            Error::AlertReceived(AlertDescription::CertificateRequired) => {
                format!("the receiver asks for a client certificate: {way_to_certificate}")
            }
            Error::AlertReceived(
                alert @ (AlertDescription::HandshakeFailure
                | AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied),
            ) => match &self.settings.cert_file {
                Some(path) => format!(
                    "the receiver does not accept the client certificate in {} (alert {alert:?}): set tls.cert_file and \
                     tls.key_file to one of an authority that it trusts",
                    path.display()
                ),
                None => format!(
                    "the receiver refuses the TLS connection (alert {alert:?}): if it asks for a client certificate, \
                     {way_to_certificate}"
                ),
            },
            other => format!("TLS failed: {}", printable(&other.to_string())),
        };
        Failure::new(Reason::TlsFailed, message)
    }
}

fn stamps(settings: &TlsSettings) -> [Option<Stamp>; 3] {
    let stamp = |path: &Option<_>| path.as_ref().and_then(|path| Stamp::of(&regular_file::open(path).ok()?));
    [stamp(&settings.ca_file), stamp(&settings.cert_file), stamp(&settings.key_file)]
}

fn config(settings: &TlsSettings, protocol: Protocol) -> Result<ClientConfig, ClientError> {
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| ClientError::new("tls", error.to_string()))?
        .with_root_certificates(authorities(settings.ca_file.as_deref())?);
    let mut config = match (&settings.cert_file, &settings.key_file) {
        (Some(cert_file), Some(key_file)) => {
            let chain =
                credentials::certificates(cert_file).map_err(|problem| ClientError::new("tls.cert_file", problem))?;
            let key =
                credentials::private_key(key_file).map_err(|problem| ClientError::new("tls.key_file", problem))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| ClientError::new("tls.key_file", credentials::mismatch(cert_file, key_file, error)))?
        }
        (None, None) => builder.with_no_client_auth(),
        (Some(_), None) => return Err(ClientError::new("tls.key_file", "tls.cert_file needs its private key")),
        (None, Some(_)) => return Err(ClientError::new("tls.cert_file", "tls.key_file needs its certificate")),
    };
    config.alpn_protocols = vec![match protocol {
        Protocol::Grpc => b"h2".to_vec(),
        Protocol::HttpProtobuf => b"http/1.1".to_vec(),
    }];
    Ok(config)
}

fn authorities(file: Option<&Path>) -> Result<RootCertStore, ClientError> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(path) => {
            let certificates = credentials::certificates(path);
            for certificate in certificates.map_err(|problem| ClientError::new("tls.ca_file", problem))? {
                roots.add(certificate).map_err(|error| {
                    ClientError::new(
                        "tls.ca_file",
                        format!("{}: a certificate cannot be used: {error}", path.display()),
                    )
                })?;
            }
        }
        // Systems list authorities that we need not understand all.
        None => {
            let _ = roots.add_parsable_certificates(system_certificates::read());
            if roots.is_empty() {
                let problem = format!("the system trusts nobody: no certificates in {}", system_certificates::PLACES);
                return Err(ClientError::new("tls.ca_file", problem));
            }
        }
    }
    Ok(roots)
}

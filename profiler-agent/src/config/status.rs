//! The status endpoint: where it listens, and who may ask.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::status::{AccessFiles, TlsFiles};

const DEFAULT_LISTEN: &str = "127.0.0.1:7081";

/// The status endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its address.
    pub listen: SocketAddr,
    /// Who may ask.
    pub access: AccessFiles,
}

/// What flags and environment say.
#[derive(Clone, Debug, Default)]
pub struct StatusOverrides {
    /// Its address.
    pub listen: Option<SocketAddr>,
    /// The file of its certificate.
    pub cert_file: Option<PathBuf>,
    /// The file of that one's key.
    pub key_file: Option<PathBuf>,
    /// The file of the token that is asked for.
    pub token_file: Option<PathBuf>,
}

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    listen: Option<String>,
    tls: Tls,
    token_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tls {
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
}

impl Status {
    /// Puts flags over the file.
    pub(super) fn merge(file: Section, flags: StatusOverrides) -> anyhow::Result<Self> {
        let text = file.listen.as_deref().unwrap_or(DEFAULT_LISTEN);
        let listen = match flags.listen {
            Some(address) => address,
            None => text
                .parse()
                .with_context(|| format!("status.listen: {text:?} is not an address such as {DEFAULT_LISTEN}"))?,
        };
        let tls = match (flags.cert_file.or(file.tls.cert_file), flags.key_file.or(file.tls.key_file)) {
            (Some(cert_file), Some(key_file)) => Some(TlsFiles { cert_file, key_file }),
            (None, None) => None,
            (Some(_), None) => bail!("status.tls.key_file: status.tls.cert_file needs its private key"),
            (None, Some(_)) => bail!("status.tls.cert_file: status.tls.key_file needs its certificate"),
        };
        Ok(Self { listen, access: AccessFiles { tls, token_file: flags.token_file.or(file.token_file) } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(yaml: &str, flags: StatusOverrides) -> anyhow::Result<Status> {
        let section =
            if yaml.is_empty() { Section::default() } else { serde_saphyr::from_str(yaml).expect("a section") };
        Status::merge(section, flags)
    }

    /// By default it is on the loopback interface, open to who is there; flags come over the file.
    #[test]
    fn flags_come_over_the_file() {
        let default = merge("", StatusOverrides::default()).expect("valid");
        assert_eq!(default, Status { listen: "127.0.0.1:7081".parse().expect("one"), access: AccessFiles::default() });
        let yaml = "listen: '[::]:1'\ntls: {cert_file: a.crt, key_file: a.key}\ntoken_file: a.token\n";
        let flags = StatusOverrides { key_file: Some("b.key".into()), ..StatusOverrides::default() };
        let merged = merge(yaml, flags).expect("valid");
        let tls = TlsFiles { cert_file: "a.crt".into(), key_file: "b.key".into() };
        assert_eq!(merged.access, AccessFiles { tls: Some(tls), token_file: Some("a.token".into()) });
        assert!(merged.listen.is_ipv6() && merged.listen.port() == 1);
    }

    /// Half of a pair is nothing.
    #[test]
    fn refusals_name_the_setting() {
        for (yaml, expected) in [
            ("listen: here\n", "status.listen"),
            ("tls: {cert_file: x}\n", "status.tls.key_file"),
            ("tls: {key_file: x}\n", "status.tls.cert_file"),
        ] {
            let error = format!("{:#}", merge(yaml, StatusOverrides::default()).expect_err(yaml));
            assert!(error.contains(expected), "{yaml:?}: {error:?}");
        }
    }
}

//! Who may ask the status endpoint: whoever has the token, where there is one, over TLS, where there is a certificate. Both
//! are in files that are read again when they change.

use std::{path::PathBuf, sync::Arc};

use hyper::{HeaderMap, header::AUTHORIZATION};
use rustls::ServerConfig;
use subtle::ConstantTimeEq as _;

use crate::credentials::{self, Watched};

/// Files that say who may ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessFiles {
    /// What TLS needs; `None`: without it.
    pub tls: Option<TlsFiles>,
    /// The token that is asked for; `None`: none is.
    pub token_file: Option<PathBuf>,
}

/// A certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, with what is between it and its authority.
    pub cert_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// What is in the files.
pub struct Access {
    tls: Option<Watched<TlsFiles, ServerConfig>>,
    token: Option<Watched<PathBuf, Token>>,
}

impl Access {
    /// Reads the files. An error names the setting.
    pub fn open(files: AccessFiles) -> Result<Self, String> {
        let tls = files.tls.map(|tls| {
            let watched = vec![tls.cert_file.clone(), tls.key_file.clone()];
            Watched::new(tls, watched, server_config).map_err(|problem| format!("status.tls: {problem}"))
        });
        let token = files.token_file.map(|path| {
            let read = |path: &PathBuf| credentials::token(path).map(Token);
            Watched::new(path.clone(), vec![path], read).map_err(|problem| format!("status.token_file: {problem}"))
        });
        Ok(Self { tls: tls.transpose()?, token: token.transpose()? })
    }

    /// Whether a token is asked for and can be read on its way.
    pub(super) fn has_bare_token(&self) -> bool {
        self.token.is_some() && self.tls.is_none()
    }

    /// What TLS is spoken with now.
    pub(super) fn tls(&mut self) -> Option<Arc<ServerConfig>> {
        self.tls.as_mut().map(Watched::current)
    }

    /// The token that is asked for now.
    pub(super) fn token(&mut self) -> Option<Arc<Token>> {
        self.token.as_mut().map(Watched::current)
    }
}

/// What whoever asks has to know.
pub(super) struct Token(String);

impl Token {
    #[cfg(test)]
    pub(super) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Whether a request brings it. How long that takes tells nothing but its length.
    pub(super) fn is_in(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some((scheme, token)) = given.and_then(|given| given.split_once(' ')) else { return false };
        scheme.eq_ignore_ascii_case("bearer") && bool::from(token.trim().as_bytes().ct_eq(self.0.as_bytes()))
    }
}

fn server_config(files: &TlsFiles) -> Result<ServerConfig, String> {
    let chain = credentials::certificates(&files.cert_file)?;
    let key = credentials::private_key(&files.key_file)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| credentials::mismatch(&files.cert_file, &files.key_file, error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    /// The token alone opens, in the form that HTTP has for it; nothing that is near it does.
    #[test]
    fn the_token_alone_opens() {
        let token = Token::new("s3cret");
        let asks = |value: Option<&'static str>| {
            let value = value.map(|value| (AUTHORIZATION, HeaderValue::from_static(value)));
            token.is_in(&value.into_iter().collect())
        };
        assert!(asks(Some("Bearer s3cret")) && asks(Some("bearer s3cret")));
        for wrong in ["Bearer s3cre", "Bearer s3crett", "Bearer S3cret", "Bearer ", "Basic s3cret", "s3cret", ""] {
            assert!(!asks(Some(wrong)), "{wrong}");
        }
        assert!(!asks(None));
    }
}

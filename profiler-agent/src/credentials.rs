//! Certificates, keys and tokens, read from files, and read again when they change. Errors do not repeat what is in a file.

use std::{
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tracing::warn;

use crate::regular_file::{self, Stamp};

/// Bytes of a file with certificates, a key or a token. Systems' own lists of authorities take 200 to 300 KiB.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A small file's contents.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    regular_file::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other("it is larger than such a file ever is"));
    }
    Ok(text)
}

/// The certificates in a file: at least one.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("{} is not valid PEM: {error}", path.display()))?;
    if certificates.is_empty() {
        return Err(format!("{} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)", path.display()));
    }
    Ok(certificates)
}

/// The private key in a file.
pub(crate) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let text = read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
        let problem = "holds no private key in PEM form (-----BEGIN PRIVATE KEY-----), or an encrypted one";
        format!("{} {problem}", path.display())
    })
}

/// Why a certificate and a key do not go together.
pub(crate) fn mismatch(cert_file: &Path, key_file: &Path, error: rustls::Error) -> String {
    let files = format!("{} and {}", cert_file.display(), key_file.display());
    match error {
        rustls::Error::InconsistentKeys(_) => format!("{files}: the key is not the certificate's"),
        error => format!("{files} cannot be used: {error}"),
    }
}

/// The token in a file, which is all that it holds.
pub(crate) fn token(path: &Path) -> Result<String, String> {
    let text = read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    let text = String::from_utf8(text).unwrap_or_default();
    let token = text.trim();
    if token.is_empty() || token.bytes().any(|byte| !byte.is_ascii_graphic()) {
        return Err(format!("{} does not hold one token of printable characters", path.display()));
    }
    Ok(token.to_owned())
}

/// What was read from files, and is read again when they change. What cannot be read then, or does not fit together yet, is
/// tried again the next time, and what there was stays.
pub(crate) struct Watched<S, T> {
    source: S,
    files: Vec<PathBuf>,
    read: fn(&S) -> Result<T, String>,
    value: Arc<T>,
    /// What the files were when they were read.
    stamps: Vec<Option<Stamp>>,
    /// Why they could not be read again, so that it is said once.
    complaint: Option<String>,
}

impl<S, T> Watched<S, T> {
    /// Reads `files` by `read`, which has nothing to go by but `source`.
    pub(crate) fn new(source: S, files: Vec<PathBuf>, read: fn(&S) -> Result<T, String>) -> Result<Self, String> {
        // (Stamps come before contents: what changes in between is read once more.)
        let stamps = stamps(&files);
        let value = Arc::new(read(&source)?);
        Ok(Self { source, files, read, value, stamps, complaint: None })
    }

    /// What the files say.
    pub(crate) fn current(&mut self) -> Arc<T> {
        let stamps = stamps(&self.files);
        if stamps != self.stamps {
            match (self.read)(&self.source) {
                Ok(value) => {
                    (self.value, self.stamps, self.complaint) = (Arc::new(value), stamps, None);
                }
                Err(complaint) if self.complaint.as_ref() != Some(&complaint) => {
                    warn!("what was read before stays in use: {complaint}");
                    self.complaint = Some(complaint);
                }
                Err(_) => {}
            }
        }
        Arc::clone(&self.value)
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Option<Stamp>> {
    files.iter().map(|path| Stamp::of(&regular_file::open(path).ok()?)).collect()
}

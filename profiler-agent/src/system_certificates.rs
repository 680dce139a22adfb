//! The certificates of the authorities that this system trusts: a site's own authority counts, and no list of them is
//! compiled in.

use std::{fs, path::PathBuf};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};

/// Names another file of trusted certificates, as OpenSSL has it.
const VARIABLE: &str = "SSL_CERT_FILE";
/// Where systems keep the certificates they trust: Debian and its like, Fedora, openSUSE.
const FILES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];
/// The places that are looked at, for people.
pub(crate) const PLACES: &str = "SSL_CERT_FILE or /etc/ssl/certs/ca-certificates.crt or \
                                 /etc/pki/tls/certs/ca-bundle.crt or /etc/ssl/ca-bundle.pem";

/// What the system trusts; nothing where that cannot be found.
pub(crate) fn read() -> Vec<CertificateDer<'static>> {
    let chosen = std::env::var_os(VARIABLE).map(PathBuf::from);
    let mut files = chosen.into_iter().chain(FILES.map(PathBuf::from));
    let Some(text) = files.find_map(|path| fs::read(path).ok()) else { return Vec::new() };
    CertificateDer::pem_slice_iter(&text).filter_map(Result::ok).collect()
}

//! Authorities and certificates, made by `openssl`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{run, stderr};

/// Kind of keys: quick to make.
const KEYS: [&str; 4] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];

/// What `openssl ca` wants to be told: where it keeps its books, and that any name will do.
const BOOKS: &str = "\
[ca]
default_ca = books
[books]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
unique_subject = no
policy = any
[any]
commonName = supplied
";

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// Now.
    Now,
    /// Long ago.
    Expired,
}

/// A certificate and its key, in files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub cert_file: PathBuf,
    /// The private key.
    pub key_file: PathBuf,
}

/// Who signs certificates.
pub struct Authority {
    folder: PathBuf,
    name: String,
}

impl Authority {
    /// Makes an authority; its files are in a folder that is there.
    pub fn new(folder: &Path, name: &str) -> Self {
        let authority = Self { folder: folder.to_owned(), name: name.to_owned() };
        authority.openssl(|command| {
            command.args(["req", "-x509", "-nodes", "-days", "30", "-subj", &format!("/CN={name}")]).args(KEYS);
            command.args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.pem")]);
        });
        authority
    }

    /// The file that those who trust it need.
    pub fn file(&self) -> PathBuf {
        self.folder.join(&self.name).with_extension("pem")
    }

    /// Its own certificate and key.
    pub fn itself(&self) -> Identity {
        Identity { cert_file: self.file(), key_file: self.folder.join(&self.name).with_extension("key") }
    }

    /// Signs a certificate for names such as `DNS:localhost,IP:127.0.0.1`. One of this authority that is called the same is
    /// replaced.
    pub fn sign(&self, name: &str, alternative_names: &str, validity: Validity) -> Identity {
        let extensions = format!("basicConstraints=CA:FALSE\nsubjectAltName={alternative_names}\n");
        let write = |name: &str, text: &str| fs::write(self.folder.join(name), text).expect("a file for openssl");
        write(&format!("{name}.ext"), &extensions);
        write("books", BOOKS);
        write("index", "");
        write("serial", "01");
        let (csr, key, pem) = (format!("{name}.csr"), format!("{name}.key"), format!("{name}.pem"));
        self.openssl(|command| {
            command.args(["req", "-nodes", "-subj", &format!("/CN={name}"), "-keyout", &key, "-out", &csr]).args(KEYS);
        });
        self.openssl(|command| {
            command.args(["ca", "-batch", "-notext", "-config", "books", "-in", &csr, "-out", &pem]);
            command.args(["-cert", &format!("{}.pem", self.name), "-keyfile", &format!("{}.key", self.name)]);
            command.args(["-extfile", &format!("{name}.ext")]);
            match validity {
                Validity::Now => command.args(["-days", "30"]),
                Validity::Expired => command.args(["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"]),
            };
        });
        Identity { cert_file: self.folder.join(pem), key_file: self.folder.join(key) }
    }

    fn openssl(&self, arguments: impl FnOnce(&mut Command)) {
        let mut command = Command::new("openssl");
        arguments(&mut command);
        let output = run(command.current_dir(&self.folder));
        assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    }
}

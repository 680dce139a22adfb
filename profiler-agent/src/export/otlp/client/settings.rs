//! Where requests go, and how: checked as far as that is possible without connecting.

use std::{fmt, path::PathBuf, time::Duration};

use hyper::{
    Uri,
    header::{HeaderName, HeaderValue},
};
use serde::Deserialize;

use super::ClientError;

/// Where receivers take profiles over HTTP.
pub(super) const HTTP_PATH: &str = "/v1development/profiles";
/// Where receivers take profiles over gRPC.
pub(super) const GRPC_PATH: &str = "/opentelemetry.proto.collector.profiles.v1development.ProfilesService/Export";
/// Headers that say how a request is to be read.
const OUR_HEADERS: [&str; 9] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// One receiver. Cloning it does not read its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What logs and metrics call it.
    pub name: String,
    /// Where it is.
    pub endpoint: Endpoint,
    /// How it is spoken to.
    pub protocol: Protocol,
    /// How bodies are compressed.
    pub compression: Compression,
    /// How long one attempt may take, from the first byte to the last one, with making the connection.
    pub timeout: Duration,
    /// Sent with every request.
    pub headers: Vec<(String, Secret)>,
    /// A file whose text is sent as `authorization: Bearer TEXT`, read again for each request.
    pub bearer_token_file: Option<PathBuf>,
    /// How it and we are known to each other.
    pub tls: Tls,
}

/// What TLS needs; ignored without it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// Authorities that the receiver's certificate may come from, and no others; the system's where it is not set.
    pub ca_file: Option<PathBuf>,
    /// Our certificate, with what is between it and its authority.
    pub cert_file: Option<PathBuf>,
    /// The private key of our certificate.
    pub key_file: Option<PathBuf>,
    /// The name in the receiver's certificate, where it is not the one in the URL.
    pub server_name: Option<String>,
}

impl Tls {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How a receiver is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    /// gRPC, usually on port 4317.
    Grpc,
    /// Protobuf over HTTP/1.1, usually on port 4318.
    #[value(name = "http/protobuf")]
    HttpProtobuf,
}

impl Protocol {
    /// The port that means HTTP where no protocol is set.
    const HTTP_PORT: u16 = 4318;

    /// What an endpoint's port suggests.
    pub fn of_port(port: Option<u16>) -> Self {
        if port == Some(Self::HTTP_PORT) { Self::HttpProtobuf } else { Self::Grpc }
    }

    /// Name in settings.
    pub fn label(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::HttpProtobuf => "http/protobuf",
        }
    }
}

/// How bodies are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// By gzip.
    Gzip,
    /// Not at all.
    None,
}

/// What the path of a URL means for HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UrlPath {
    /// Where there is none, the standard one is meant.
    OrStandard,
    /// The standard one comes after it.
    Base,
    /// It is the path of profiles, as it is.
    Exact,
}

/// Where a receiver is. It is shown without what may be secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint(Uri);

impl Endpoint {
    /// Reads a URL. The error does not repeat it: it may hold a password.
    pub fn parse(text: &str, protocol: Protocol, path: UrlPath) -> Result<Self, ClientError> {
        let refuse = |problem: &str| {
            ClientError::new("endpoint", format!("{problem}; expected for example http://127.0.0.1:4317"))
        };
        let uri: Uri = text.trim().parse().map_err(|_| refuse("this is not a URL"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(refuse("this URL does not begin with http:// or https://"));
        }
        let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        if authority.contains('@') {
            return Err(refuse(
                "this URL holds a user name or password, which belong into the header \"authorization\" (headers, or \
                 bearer_token_file)",
            ));
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err(refuse("this URL names no host"));
        }
        if uri.port_u16() == Some(0) || authority.ends_with(':') || authority.contains(':') && port(&uri).is_none() {
            return Err(refuse("this URL's port is not a number from 1 to 65535"));
        }
        if text.contains('#') {
            return Err(refuse("this URL has a fragment (#), which means nothing here"));
        }
        let given = uri.path().trim_end_matches('/');
        let path_and_query = match (protocol, path) {
            (Protocol::Grpc, _) if given.is_empty() && uri.query().is_none() => GRPC_PATH.to_owned(),
            // The same variable may stand for other signals' receivers too, and says where their HTTP paths begin.
            (Protocol::Grpc, UrlPath::Base) if uri.query().is_none() => GRPC_PATH.to_owned(),
            (Protocol::Grpc, _) => {
                return Err(refuse("gRPC has no path: leave it out of this URL, or set the protocol http/protobuf"));
            }
            (Protocol::HttpProtobuf, UrlPath::Exact) => {
                uri.path_and_query().map_or("/", |path| path.as_str()).to_owned()
            }
            (Protocol::HttpProtobuf, path) => {
                let path = if path == UrlPath::Base || given.is_empty() {
                    format!("{given}{HTTP_PATH}")
                } else {
                    uri.path().to_owned()
                };
                uri.query().map_or_else(|| path.clone(), |query| format!("{path}?{query}"))
            }
        };
        let mut parts = uri.into_parts();
        parts.path_and_query = Some(path_and_query.parse().map_err(|_| refuse("this URL's path is not valid"))?);
        Uri::from_parts(parts).map(Self).map_err(|_| refuse("this is not a URL"))
    }

    /// The port of a text that may be a URL, before it is known what protocol it is for.
    pub fn port_of(text: &str) -> Option<u16> {
        port(&text.trim().parse().ok()?)
    }

    /// Host and port: what a receiver is called that has no other name.
    pub fn host_and_port(&self) -> String {
        format!("{}:{}", self.0.host().unwrap_or_default(), self.port())
    }

    /// Whether TLS is used.
    pub fn is_encrypted(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    pub(super) fn uri(&self) -> &Uri {
        &self.0
    }

    /// The host as it is looked up: IPv6 addresses without brackets.
    pub(super) fn host(&self) -> &str {
        self.0.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
    }

    pub(super) fn port(&self) -> u16 {
        port(&self.0).unwrap_or(if self.is_encrypted() { 443 } else { 80 })
    }
}

/// The port that a URL states. (`Uri` accepts any text behind the colon.)
fn port(uri: &Uri) -> Option<u16> {
    uri.port_u16()
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme_str().unwrap_or_default(), self.0.authority().map_or("", |a| a.as_str()))?;
        // (What is between slashes may be a secret too, as some vendors have it, but ours says nothing.)
        let path = self.0.path();
        if path == GRPC_PATH || path == HTTP_PATH { Ok(()) } else { f.write_str("/…") }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for those who need it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Checks a header that is to be sent with every request. The error does not repeat its value.
pub(super) fn header(name: &str, value: &Secret) -> Result<(HeaderName, HeaderValue), ClientError> {
    let refuse = |problem: &str| ClientError::new("headers", format!("{name:?} {problem}"));
    let header = HeaderName::try_from(name.trim())
        .map_err(|_| ClientError::new("headers", "a name is not a header's: letters, digits and - are"))?;
    if OUR_HEADERS.contains(&header.as_str()) || header.as_str().starts_with("grpc-") {
        return Err(refuse("says how a request is to be read, and cannot be set"));
    }
    let mut value = HeaderValue::try_from(value.reveal().trim())
        .map_err(|_| refuse("has a value that no header can have: it holds control characters"))?;
    if value.to_str().is_err() {
        return Err(refuse("has a value that is not plain text (ASCII)"));
    }
    value.set_sensitive(true);
    Ok((header, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, protocol: Protocol, path: UrlPath, expect: Result<&str, &str>) {
        match (Endpoint::parse(text, protocol, path), expect) {
            (Ok(endpoint), Ok(expected)) => assert_eq!(endpoint.uri().to_string(), expected, "{text:?}"),
            (Err(error), Err(expected)) => {
                let error = error.to_string();
                assert!(error.contains(expected) && error.starts_with("endpoint: "), "{text:?}: {error}");
                assert!(!error.contains("hunter2"), "{error}");
            }
            (result, expected) => panic!("{text:?}: {result:?} instead of {expected:?}"),
        }
    }

    /// Paths are appended as the OTLP exporter specification has it.
    #[test]
    fn appends_the_path() {
        use Protocol::{Grpc, HttpProtobuf};
        use UrlPath::{Base, Exact, OrStandard};
        let standard = format!("http://c:4318{HTTP_PATH}");
        check("http://c:4318", HttpProtobuf, OrStandard, Ok(&standard));
        check("http://c:4318/", HttpProtobuf, OrStandard, Ok(&standard));
        check("http://c:4318/own?key=x", HttpProtobuf, OrStandard, Ok("http://c:4318/own?key=x"));
        check("http://c:4318", HttpProtobuf, Base, Ok(&standard));
        check("http://c:4318/base/", HttpProtobuf, Base, Ok(&format!("http://c:4318/base{HTTP_PATH}")));
        check("http://c:4318", HttpProtobuf, Exact, Ok("http://c:4318/"));
        check("http://c:4318/own/", HttpProtobuf, Exact, Ok("http://c:4318/own/"));
        check("https://c", Grpc, OrStandard, Ok(&format!("https://c{GRPC_PATH}")));
        check("http://[::1]:4317/", Grpc, Exact, Ok(&format!("http://[::1]:4317{GRPC_PATH}")));
        check("http://c:4317/v1", Grpc, Base, Ok(&format!("http://c:4317{GRPC_PATH}")));
    }

    /// Every refusal says why, and nothing of the URL.
    #[test]
    fn refuses_what_is_no_endpoint() {
        use Protocol::{Grpc, HttpProtobuf};
        for (text, expect) in [
            ("", "not a URL"),
            ("c:4317", "http://"),
            ("grpc://hunter2:4317", "begin with http:// or https://"),
            ("/hunter2", "begin with http:// or https://"),
            ("http://user:hunter2@c:4317", "authorization"),
            ("http://:4317", ""),
            ("http://c:hunter2", ""),
            ("http://c:0", "1 to 65535"),
            ("http://c:65536", "1 to 65535"),
            ("http://c:", "1 to 65535"),
            ("http://c/#hunter2", "fragment"),
            ("http://c/hunter2", "gRPC has no path"),
            ("http://c?hunter2", "gRPC has no path"),
        ] {
            check(text, Grpc, UrlPath::OrStandard, Err(expect));
        }
        check("http://a b", HttpProtobuf, UrlPath::Exact, Err("not a URL"));
    }

    /// What may be secret is not shown.
    #[test]
    fn shows_no_secrets() {
        let endpoint = |text| Endpoint::parse(text, Protocol::HttpProtobuf, UrlPath::OrStandard).expect("a URL");
        assert_eq!(format!("{:?}", endpoint("http://c:4318")), "http://c:4318");
        assert_eq!(format!("{}", endpoint("https://c/hunter2?hunter2")), "https://c/…");
        assert_eq!(endpoint("https://c").host_and_port(), "c:443");
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "***");
        for (name, value) in [("a b", "x"), ("Host", "x"), ("grpc-timeout", "x"), ("x", "hunter2\nx"), ("x", "hünter2")]
        {
            let error = header(name, &Secret::new(value)).expect_err(name).to_string();
            assert!(error.starts_with("headers: ") && !error.contains("nter2"), "{error}");
        }
        let (_, value) = header("x", &Secret::new(" hunter2 ")).expect("a header");
        assert!(value.is_sensitive() && value == "hunter2");
    }
}

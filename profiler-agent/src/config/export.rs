//! Where profiles go: the destinations, what waits for them, and files.
//!
//! Flags come before OpenTelemetry's environment variables, those before the file, that before the defaults. An endpoint
//! of flags or environment replaces the file's destinations; everything else that they say is about that destination.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use clap::ValueEnum;
use serde::Deserialize;

use super::environment::Environment;
use crate::export::otlp::client::{Compression, Endpoint, Protocol, Secret, Settings, Tls, UrlPath};

/// Where a local Collector or profiler-server listens.
const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:4317";
const DEFAULT_WINDOW: Duration = Duration::from_secs(15);
/// Shorter windows would swap buffers all the time, longer ones hold too much back.
pub(super) const WINDOW_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);
/// As the OpenTelemetry specification has it.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const TIMEOUT_RANGE: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);
/// Destinations at most: each has a thread, a queue and a spool.
const MAX_DESTINATIONS: usize = 8;
const DEFAULT_QUEUE_MIB: u64 = 16;
/// Less than this would not hold two requests of the largest size.
const QUEUE_MIB_RANGE: RangeInclusive<u64> = 8..=4096;
const DEFAULT_SPOOL_MIB: u64 = 512;
const DEFAULT_FILES_MIB: u64 = 1024;
const DISK_MIB_RANGE: RangeInclusive<u64> = 16..=1 << 20;
const DEFAULT_MAX_AGE: Duration = Duration::from_secs(24 * 3600);
const MAX_AGE_RANGE: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(30 * 24 * 3600);
/// Characters of a destination's name.
const MAX_NAME: usize = 100;

/// Where profiles go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// How long samples are aggregated before they are exported.
    pub window: Duration,
    /// OTLP receivers; at least one, unless there are files. Their names differ.
    pub destinations: Vec<Settings>,
    /// What is kept on disk until it is delivered; `None`: nothing.
    pub spool: Option<Spool>,
    /// Profiles that are written to files; `None`: none.
    pub files: Option<Files>,
    /// Most memory for requests that wait for one destination.
    pub queue_bytes: usize,
    /// Whether requests hold the profile as pprof too.
    pub original_payload: bool,
}

/// What is kept on disk until it is delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spool {
    /// Has a folder of each destination's name.
    pub folder: PathBuf,
    /// Most bytes of one destination.
    pub bytes: u64,
    /// What is older is given up.
    pub max_age: Duration,
}

/// Files of profiles, the oldest of which are replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Where they are.
    pub folder: PathBuf,
    /// What is in them.
    pub format: FileFormat,
    /// Most bytes of all of them.
    pub bytes: u64,
}

/// What is in a file of profiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileFormat {
    /// pprof, compressed by gzip.
    Pprof,
    /// `ExportProfilesServiceRequest`.
    Otlp,
}

/// What flags say.
#[derive(Clone, Debug, Default)]
pub struct ExportOverrides {
    /// Length of a window.
    pub window: Option<Duration>,
    /// Where the destination is. May be secret.
    pub endpoint: Option<Secret>,
    /// How it is spoken to.
    pub protocol: Option<Protocol>,
    /// How bodies are compressed.
    pub compression: Option<Compression>,
    /// How long an attempt may take.
    pub timeout: Option<Duration>,
    /// What is sent with every request.
    pub headers: Vec<(String, Secret)>,
    /// A file with a token.
    pub bearer_token_file: Option<PathBuf>,
    /// Certificates and keys.
    pub tls: Tls,
    /// The spool's folder.
    pub spool: Option<PathBuf>,
    /// Most MiB of a destination's spool.
    pub spool_mib: Option<u64>,
    /// What is older is given up.
    pub spool_max_age: Option<Duration>,
    /// The folder of files.
    pub files: Option<PathBuf>,
    /// What is in them.
    pub files_format: Option<FileFormat>,
    /// Most MiB of all of them.
    pub files_mib: Option<u64>,
    /// Most MiB of requests that wait in memory.
    pub queue_mib: Option<u64>,
    /// Whether requests hold the profile as pprof too.
    pub original_payload: Option<bool>,
    /// OpenTelemetry's variables.
    pub environment: Environment,
}

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    window: Option<String>,
    endpoint: Option<Secret>,
    destinations: Vec<DestinationSection>,
    spool: SpoolSection,
    files: FilesSection,
    queue_mib: Option<u64>,
    original_payload: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DestinationSection {
    name: Option<String>,
    endpoint: Option<Secret>,
    protocol: Option<String>,
    compression: Option<String>,
    timeout: Option<String>,
    headers: BTreeMap<String, Secret>,
    bearer_token_file: Option<PathBuf>,
    tls: TlsSection,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TlsSection {
    ca_file: Option<PathBuf>,
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    server_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SpoolSection {
    folder: Option<PathBuf>,
    mib: Option<u64>,
    max_age: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FilesSection {
    folder: Option<PathBuf>,
    format: Option<String>,
    mib: Option<u64>,
}

impl Export {
    /// Puts flags and environment over the file.
    pub(super) fn merge(file: Section, flags: ExportOverrides) -> anyhow::Result<Self> {
        let window = match (flags.window, &file.window) {
            (Some(window), _) => window,
            (None, Some(text)) => duration("export.window", text, "15s or 1m")?,
            (None, None) => DEFAULT_WINDOW,
        };
        within("export.window", window, &WINDOW_RANGE)?;
        let queue_mib = flags.queue_mib.or(file.queue_mib).unwrap_or(DEFAULT_QUEUE_MIB);
        let queue_bytes = bytes("export.queue_mib", queue_mib, &QUEUE_MIB_RANGE)?;
        Ok(Self {
            window,
            spool: Self::spool(&file.spool, &flags)?,
            files: Self::files(&file.files, &flags)?,
            queue_bytes: usize::try_from(queue_bytes).unwrap_or(usize::MAX),
            original_payload: flags.original_payload.or(file.original_payload).unwrap_or(false),
            destinations: Self::destinations(file, flags)?,
        })
    }

    fn destinations(file: Section, flags: ExportOverrides) -> anyhow::Result<Vec<Settings>> {
        if file.endpoint.is_some() && !file.destinations.is_empty() {
            bail!("export.endpoint: it stands for one destination, and export.destinations lists them: leave one out");
        }
        if file.destinations.len() > MAX_DESTINATIONS {
            bail!("export.destinations: {} are more than {MAX_DESTINATIONS}", file.destinations.len());
        }
        // Who names a folder of files and no receiver has none.
        let is_named = flags.endpoint.is_some() || flags.environment.endpoint().is_some() || file.endpoint.is_some();
        let has_files = flags.files.is_some() || file.files.folder.is_some();
        if has_files && !is_named && file.destinations.is_empty() {
            return Ok(Vec::new());
        }
        if flags.endpoint.is_some() || flags.environment.endpoint().is_some() || file.destinations.is_empty() {
            return Ok(vec![described(file.endpoint, flags)?]);
        }
        if let Some(flag) = flags.of_destination() {
            bail!(
                "{flag} is about the destination of --endpoint, but the configuration file lists destinations: give \
                 --endpoint too, or set it there"
            );
        }
        flags.environment.warn_of_ignored();
        let mut names = BTreeSet::new();
        let mut destinations = Vec::new();
        for (index, section) in file.destinations.into_iter().enumerate() {
            let place = match &section.name {
                Some(name) => format!("export.destinations, number {} ({name:?})", index + 1),
                None => format!("export.destinations, number {}", index + 1),
            };
            let settings = section.validate().with_context(|| place.clone())?;
            if !names.insert(settings.name.clone()) {
                bail!("{place}: name: another destination is called {:?}, too", settings.name);
            }
            destinations.push(settings);
        }
        Ok(destinations)
    }

    fn spool(file: &SpoolSection, flags: &ExportOverrides) -> anyhow::Result<Option<Spool>> {
        let mib = flags.spool_mib.or(file.mib);
        let max_age = match (flags.spool_max_age, &file.max_age) {
            (None, Some(text)) => Some(duration("export.spool.max_age", text, "24h or 7d")?),
            (flag, _) => flag,
        };
        let Some(folder) = folder("export.spool.folder", flags.spool.as_ref().or(file.folder.as_ref()))? else {
            if mib.is_some() || max_age.is_some() {
                bail!(
                    "export.spool.folder: without a folder nothing is spooled: set it, or leave out what else is set"
                );
            }
            return Ok(None);
        };
        let max_age = max_age.unwrap_or(DEFAULT_MAX_AGE);
        within("export.spool.max_age", max_age, &MAX_AGE_RANGE)?;
        Ok(Some(Spool {
            folder,
            bytes: bytes("export.spool.mib", mib.unwrap_or(DEFAULT_SPOOL_MIB), &DISK_MIB_RANGE)?,
            max_age,
        }))
    }

    fn files(file: &FilesSection, flags: &ExportOverrides) -> anyhow::Result<Option<Files>> {
        let mib = flags.files_mib.or(file.mib);
        let format = match (flags.files_format, &file.format) {
            (None, Some(text)) => Some(choice("export.files.format", text)?),
            (flag, _) => flag,
        };
        let Some(folder) = folder("export.files.folder", flags.files.as_ref().or(file.folder.as_ref()))? else {
            if mib.is_some() || format.is_some() {
                bail!(
                    "export.files.folder: without a folder no files are written: set it, or leave out what else is set"
                );
            }
            return Ok(None);
        };
        Ok(Some(Files {
            folder,
            format: format.unwrap_or(FileFormat::Pprof),
            bytes: bytes("export.files.mib", mib.unwrap_or(DEFAULT_FILES_MIB), &DISK_MIB_RANGE)?,
        }))
    }
}

impl ExportOverrides {
    /// A flag that is about one destination.
    fn of_destination(&self) -> Option<&'static str> {
        [
            (self.protocol.is_some(), "--protocol"),
            (self.compression.is_some(), "--compression"),
            (self.timeout.is_some(), "--timeout"),
            (!self.headers.is_empty(), "--header"),
            (self.bearer_token_file.is_some(), "--bearer-token-file"),
            (!self.tls.is_empty(), "--tls-..."),
        ]
        .into_iter()
        .find_map(|(is_set, name)| is_set.then_some(name))
    }
}

/// The one destination that flags and environment describe, where they do.
fn described(file: Option<Secret>, flags: ExportOverrides) -> anyhow::Result<Settings> {
    let environment = &flags.environment;
    let protocol = match flags.protocol {
        Some(protocol) => Some(protocol),
        None => environment.protocol()?,
    };
    let (setting, text, path) = match (&flags.endpoint, environment.endpoint(), &file) {
        (Some(text), _, _) => ("--endpoint", text.clone(), UrlPath::OrStandard),
        (None, Some(variable), _) => (variable.name, environment.with_scheme(variable, protocol), variable.url_path()),
        (None, None, Some(text)) => ("export.endpoint", text.clone(), UrlPath::OrStandard),
        (None, None, None) => ("export.endpoint", Secret::new(DEFAULT_ENDPOINT), UrlPath::OrStandard),
    };
    let protocol = protocol.unwrap_or_else(|| Protocol::of_port(Endpoint::port_of(text.reveal())));
    let endpoint =
        Endpoint::parse(text.reveal(), protocol, path).map_err(|error| anyhow!("{setting}: {}", error.problem))?;
    let compression = match flags.compression {
        Some(compression) => Some(compression),
        None => environment.compression()?,
    };
    let timeout = match flags.timeout {
        Some(timeout) => {
            within("--timeout", timeout, &TIMEOUT_RANGE)?;
            timeout
        }
        None => match environment.timeout()? {
            Some((variable, timeout)) => {
                within(variable.name, timeout, &TIMEOUT_RANGE)?;
                timeout
            }
            None => DEFAULT_TIMEOUT,
        },
    };
    if !endpoint.is_encrypted() && !flags.tls.is_empty() {
        bail!("--tls-...: {setting} begins with http://, which has no TLS: use https://");
    }
    // (Variables may be meant for other programs too.)
    let tls = if endpoint.is_encrypted() { environment.tls_under(flags.tls.clone()) } else { Tls::default() };
    Ok(Settings {
        name: endpoint.host_and_port(),
        endpoint,
        protocol,
        compression: compression.unwrap_or(Compression::Gzip),
        timeout,
        headers: if flags.headers.is_empty() { environment.headers()? } else { flags.headers },
        bearer_token_file: flags.bearer_token_file,
        tls,
    })
}

impl DestinationSection {
    fn validate(self) -> anyhow::Result<Settings> {
        let text = self.endpoint.ok_or_else(|| anyhow!("endpoint: it is missing; for example {DEFAULT_ENDPOINT}"))?;
        let protocol = match &self.protocol {
            Some(text) => choice("protocol", text)?,
            None => Protocol::of_port(Endpoint::port_of(text.reveal())),
        };
        let endpoint = Endpoint::parse(text.reveal(), protocol, UrlPath::OrStandard)?;
        let name = match self.name {
            Some(name) => valid_name(name)?,
            None => endpoint.host_and_port(),
        };
        let timeout = match &self.timeout {
            Some(text) => duration("timeout", text, "10s")?,
            None => DEFAULT_TIMEOUT,
        };
        within("timeout", timeout, &TIMEOUT_RANGE)?;
        let TlsSection { ca_file, cert_file, key_file, server_name } = self.tls;
        let tls = Tls { ca_file, cert_file, key_file, server_name };
        if !endpoint.is_encrypted() && !tls.is_empty() {
            bail!("tls: the endpoint begins with http://, which has no TLS: use https://");
        }
        Ok(Settings {
            name,
            endpoint,
            protocol,
            compression: self.compression.map_or(Ok(Compression::Gzip), |text| choice("compression", &text))?,
            timeout,
            headers: self.headers.into_iter().collect(),
            bearer_token_file: self.bearer_token_file,
            tls,
        })
    }
}

/// Names are labels of metrics and names of folders.
fn valid_name(name: String) -> anyhow::Result<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:[]".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(is_plain) {
        bail!(
            "name: {name:?} is not 1 to {MAX_NAME} letters, digits and characters of \"-_.:[]\" that do not begin with a \
             dot"
        );
    }
    if name == "files" {
        bail!("name: {name:?} is what the files of profiles are called in metrics and logs: choose another");
    }
    Ok(name)
}

/// One of a setting's words.
pub(super) fn choice<T: ValueEnum>(setting: &str, text: &str) -> anyhow::Result<T> {
    T::from_str(text, true).map_err(|_| {
        let words =
            T::value_variants().iter().filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()));
        anyhow!("{setting}: {text:?} is none of {}", words.collect::<Vec<_>>().join(", "))
    })
}

pub(super) fn duration(setting: &str, text: &str, example: &str) -> anyhow::Result<Duration> {
    humantime::parse_duration(text).with_context(|| format!("{setting}: {text:?} is not a duration such as {example}"))
}

pub(super) fn within(setting: &str, duration: Duration, range: &RangeInclusive<Duration>) -> anyhow::Result<()> {
    if !range.contains(&duration) {
        let text = humantime::format_duration;
        bail!("{setting}: {} is outside of {} to {}", text(duration), text(*range.start()), text(*range.end()));
    }
    Ok(())
}

fn bytes(setting: &str, mib: u64, range: &RangeInclusive<u64>) -> anyhow::Result<u64> {
    if !range.contains(&mib) {
        bail!("{setting}: {mib} is outside of {} to {} MiB", range.start(), range.end());
    }
    Ok(mib << 20)
}

fn folder(setting: &str, folder: Option<&PathBuf>) -> anyhow::Result<Option<PathBuf>> {
    match folder {
        Some(folder) if folder.as_os_str().is_empty() => bail!("{setting}: a folder has a name"),
        folder => Ok(folder.cloned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(yaml: &str, flags: ExportOverrides) -> anyhow::Result<Export> {
        // The section alone is the whole document here.
        let section =
            if yaml.is_empty() { Section::default() } else { serde_saphyr::from_str(yaml).expect("a section") };
        Export::merge(section, flags)
    }

    fn variables(variables: &[(&str, &str)]) -> ExportOverrides {
        let find =
            |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned());
        ExportOverrides { environment: Environment::from(find), ..ExportOverrides::default() }
    }

    fn endpoint(url: &str) -> ExportOverrides {
        ExportOverrides { endpoint: Some(Secret::new(url)), ..ExportOverrides::default() }
    }

    fn settings(url: &str, protocol: Protocol, path: UrlPath) -> Settings {
        let endpoint = Endpoint::parse(url, protocol, path).expect("a URL");
        Settings {
            name: endpoint.host_and_port(),
            endpoint,
            protocol,
            compression: Compression::Gzip,
            timeout: DEFAULT_TIMEOUT,
            headers: Vec::new(),
            bearer_token_file: None,
            tls: Tls::default(),
        }
    }

    fn check(yaml: &str, flags: ExportOverrides, expect: &[Settings]) {
        assert_eq!(merge(yaml, flags).expect("valid").destinations, expect, "{yaml}");
    }

    fn check_refused(yaml: &str, flags: ExportOverrides, expect: &str) {
        let error = format!("{:#}", merge(yaml, flags).expect_err(expect));
        assert!(error.contains(expect) && !error.contains("hunter2"), "{error:?} does not say {expect:?}");
    }

    /// Flags come before the environment, that before the file, that before the default.
    #[test]
    fn one_destination_is_described_by_everybody() {
        use Protocol::{Grpc, HttpProtobuf};
        let plain = |url, protocol| settings(url, protocol, UrlPath::OrStandard);
        check("", ExportOverrides::default(), &[plain(DEFAULT_ENDPOINT, Grpc)]);
        check("endpoint: http://file:4318\n", ExportOverrides::default(), &[plain("http://file:4318", HttpProtobuf)]);
        let generic = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://env:4318/base");
        let own = ("OTEL_EXPORTER_OTLP_PROFILES_ENDPOINT", "http://own:4318/path");
        let expected = settings(generic.1, HttpProtobuf, UrlPath::Base);
        check("endpoint: http://file:4317\n", variables(&[generic]), &[expected]);
        check("", variables(&[generic, own]), &[settings(own.1, HttpProtobuf, UrlPath::Exact)]);
        check("", variables(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]), &[plain(DEFAULT_ENDPOINT, Grpc)]);
        let flags = ExportOverrides { protocol: Some(Grpc), ..endpoint("https://flag:4318") };
        let flags = ExportOverrides { environment: variables(&[generic]).environment, ..flags };
        check("", flags, &[plain("https://flag:4318", Grpc)]);
        let several = "destinations: [{endpoint: 'http://one:4317'}, {endpoint: 'http://two:4317', name: second}]\n";
        let second = Settings { name: "second".to_owned(), ..plain("http://two:4317", Grpc) };
        check(several, ExportOverrides::default(), &[plain("http://one:4317", Grpc), second.clone()]);
        check(several, endpoint("http://flag:4317"), &[plain("http://flag:4317", Grpc)]);
        let timeout = variables(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "5")]);
        check(several, timeout, &[plain("http://one:4317", Grpc), second]);
    }

    /// Every standard variable means what the specification says; the one about profiles comes first.
    #[test]
    fn reads_the_standard_variables() {
        let all = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://c:4318"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1, b=x%20%3Dy,,c = z "),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_PROFILES_COMPRESSION", "none"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/key"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/cert"),
        ];
        let header = |name: &str, value: &str| (name.to_owned(), Secret::new(value));
        let expected = Settings {
            headers: vec![header("a", "1"), header("b", "x =y"), header("c", "z")],
            compression: Compression::None,
            timeout: Duration::from_millis(2500),
            tls: Tls {
                ca_file: Some("/ca".into()),
                cert_file: Some("/cert".into()),
                key_file: Some("/key".into()),
                server_name: None,
            },
            ..settings("https://c:4318", Protocol::Grpc, UrlPath::Base)
        };
        check("", variables(&all), std::slice::from_ref(&expected));
        let flags = ExportOverrides {
            headers: vec![header("own", "1")],
            compression: Some(Compression::Gzip),
            tls: Tls { ca_file: Some("/own".into()), ..Tls::default() },
            ..variables(&all)
        };
        let own = Settings {
            headers: vec![header("own", "1")],
            compression: Compression::Gzip,
            tls: Tls { ca_file: Some("/own".into()), ..expected.tls.clone() },
            ..expected
        };
        check("", flags, &[own]);
        // Certificates are for TLS, and may be meant for other programs.
        let plain = variables(&[("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca")]);
        check("", plain, &[settings(DEFAULT_ENDPOINT, Protocol::Grpc, UrlPath::OrStandard)]);
        // gRPC's endpoint may have no scheme.
        let bare = ("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4317");
        check("", variables(&[bare]), &[settings("https://c:4317", Protocol::Grpc, UrlPath::Base)]);
        let insecure = variables(&[bare, ("OTEL_EXPORTER_OTLP_INSECURE", "True")]);
        check("", insecure, &[settings("http://c:4317", Protocol::Grpc, UrlPath::Base)]);
    }

    /// Everything that a file may say about a destination.
    #[test]
    fn reads_the_file() {
        let yaml = "
destinations:
  - name: central
    endpoint: https://collector:4317
    protocol: http/protobuf
    compression: none
    timeout: 3s
    headers: {x-scope-orgid: team}
    bearer_token_file: /token
    tls: {ca_file: /ca, cert_file: , key_file: , server_name: name}
spool: {folder: /spool, mib: 100, max_age: 1h}
files: {folder: /files, format: otlp, mib: 200}
queue_mib: 8
original_payload: true
window: 1m
";
        let destination = Settings {
            name: "central".to_owned(),
            compression: Compression::None,
            timeout: Duration::from_secs(3),
            headers: vec![("x-scope-orgid".to_owned(), Secret::new("team"))],
            bearer_token_file: Some("/token".into()),
            tls: Tls { ca_file: Some("/ca".into()), server_name: Some("name".to_owned()), ..Tls::default() },
            ..settings("https://collector:4317", Protocol::HttpProtobuf, UrlPath::OrStandard)
        };
        let expected = Export {
            window: Duration::from_secs(60),
            destinations: vec![destination],
            spool: Some(Spool { folder: "/spool".into(), bytes: 100 << 20, max_age: Duration::from_secs(3600) }),
            files: Some(Files { folder: "/files".into(), format: FileFormat::Otlp, bytes: 200 << 20 }),
            queue_bytes: 8 << 20,
            original_payload: true,
        };
        assert_eq!(merge(yaml, ExportOverrides::default()).expect("valid"), expected);
        let flags = ExportOverrides {
            spool_mib: Some(50),
            files_format: Some(FileFormat::Pprof),
            files: Some("/other".into()),
            original_payload: Some(false),
            ..ExportOverrides::default()
        };
        let spool = expected.spool.clone().map(|spool| Spool { bytes: 50 << 20, ..spool });
        let files = Some(Files { folder: "/other".into(), format: FileFormat::Pprof, bytes: 200 << 20 });
        let expected = Export { spool, files, original_payload: false, ..expected };
        assert_eq!(merge(yaml, flags).expect("valid"), expected);
        assert!(
            !format!("{:?}", merge(&yaml.replace("team", "hunter2"), ExportOverrides::default())).contains("hunter2")
        );
    }

    /// Every refusal names the setting, and nothing that may be secret.
    #[test]
    fn refusals_name_the_setting() {
        let no_flags = ExportOverrides::default;
        check_refused("window: 1ms\n", no_flags(), "export.window: 1ms is outside of 1s to 10m");
        check_refused("queue_mib: 1\n", no_flags(), "export.queue_mib: 1 is outside of 8");
        check_refused("spool: {mib: 100}\n", no_flags(), "export.spool.folder");
        check_refused("spool: {folder: ''}\n", no_flags(), "export.spool.folder: a folder has a name");
        check_refused("spool: {folder: /x, mib: 1}\n", no_flags(), "export.spool.mib");
        check_refused("spool: {folder: /x, max_age: 1s}\n", no_flags(), "export.spool.max_age");
        check_refused("spool: {folder: /x, max_age: old}\n", no_flags(), "export.spool.max_age");
        check_refused("files: {format: pprof}\n", no_flags(), "export.files.folder");
        check_refused(
            "files: {folder: /x, format: svg}\n",
            no_flags(),
            "export.files.format: \"svg\" is none of pprof, otlp",
        );
        check_refused("endpoint: hunter2\n", no_flags(), "export.endpoint: this URL does not begin with http://");
        let destination = |text: &str| format!("destinations:\n  - {{endpoint: 'http://c:4317', {text}}}\n");
        for (text, expect) in [
            ("protocol: http", "protocol: \"http\" is none of grpc, http/protobuf"),
            ("compression: zstd", "compression: \"zstd\" is none of gzip, none"),
            ("timeout: 1ms", "timeout: 1ms is outside"),
            ("timeout: soon", "timeout: \"soon\""),
            ("name: ''", "name"),
            ("name: ../x", "name"),
            ("tls: {ca_file: /ca}", "use https://"),
        ] {
            check_refused(&destination(text), no_flags(), expect);
            check_refused(&destination(text), no_flags(), "export.destinations, number 1");
        }
        check_refused(&destination("name: files"), no_flags(), "choose another");
        check_refused("destinations: [{}]\n", no_flags(), "number 1: endpoint: it is missing");
        let same = "destinations: [{endpoint: 'http://c:1'}, {endpoint: 'https://c:1'}]\n";
        check_refused(same, no_flags(), "number 2: name: another destination is called \"c:1\"");
        check_refused("endpoint: http://a\ndestinations: [{endpoint: http://b}]\n", no_flags(), "leave one out");
        check_refused(&destination(""), ExportOverrides { protocol: Some(Protocol::Grpc), ..no_flags() }, "--protocol");
        let headers = variables(&[("OTEL_EXPORTER_OTLP_HEADERS", "a=1,hunter2")]);
        check_refused("", headers, "OTEL_EXPORTER_OTLP_HEADERS");
        let text = variables(&[("OTEL_EXPORTER_OTLP_HEADERS", "a=hunter2%ff")]);
        check_refused("", text, "OTEL_EXPORTER_OTLP_HEADERS: the value of \"a\" is not text");
        check_refused(
            "",
            variables(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "1")]),
            "OTEL_EXPORTER_OTLP_TIMEOUT: 1ms is outside",
        );
    }
}

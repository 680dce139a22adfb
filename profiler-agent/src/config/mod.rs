//! The daemon's configuration: flags over environment over file over defaults, validated once.

mod bounds;
mod capture;
mod environment;
mod export;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod kubernetes;
mod labels;
mod place;
mod redact;
mod schedule;
mod scope;
mod status;

pub use self::{
    bounds::{Budget, Control, ControlOverrides},
    capture::{CaptureSection, Request},
    environment::Environment,
    export::{Export, ExportOverrides, FileFormat, Files, Spool},
    kubernetes::{InCluster, Kubernetes, KubernetesOverrides, MISSING_NODE, Surroundings},
    labels::{LabelOverrides, Labels},
    scope::Entry,
    status::{Status, StatusOverrides},
};

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::{
    control,
    kernel::WaitOptions,
    profile::Events,
    redact::Redaction,
    scope::Rules,
    symbolize::{SourceOptions, debuginfod},
    unwind_info::DEFAULT_TABLE_BYTES,
};

/// Samples per second and CPU. Off the round hundred, so that sampling does not keep step with timers.
pub const DEFAULT_FREQUENCY: u64 = 99;
/// How waits are sampled: 50 stacks a second and CPU take less than 0.1 % of it, and are enough for the right totals.
pub const DEFAULT_WAITS: WaitOptions = WaitOptions { stacks_per_second: 50, min_duration: Duration::ZERO };

/// Less than this would not hold the tables of one large program; more than this the kernel programs cannot address.
const TABLE_MIB_RANGE: std::ops::RangeInclusive<u32> = 2..=(DEFAULT_TABLE_BYTES >> 20) as u32;

/// Memory for named frames, symbols of files and what processes say of code they make.
const DEFAULT_NAMES_MIB: u32 = 32;
/// With less, a large program's symbols would be read again and again.
const NAMES_MIB_RANGE: std::ops::RangeInclusive<u32> = 8..=4096;
/// Where files from debuginfod servers are kept.
const DEFAULT_DEBUGINFOD_CACHE: &str = "/var/cache/profiler-agent/debuginfod";
const DEFAULT_DEBUGINFOD_CACHE_MIB: u64 = 1024;
/// Less than this would not hold one large program's debug file and another.
const DEBUGINFOD_CACHE_MIB_RANGE: std::ops::RangeInclusive<u64> = 16..=1 << 20;
/// How long a debug file may take to arrive: half a gigabyte at a few megabytes a second.
const DEBUGINFOD_TIMEOUT: Duration = Duration::from_secs(120);
/// Less would not hold the debug information of one small program; more than this is not bounded well.
const DWARF_MIB_RANGE: std::ops::RangeInclusive<u32> = 16..=8192;

/// The configuration file. Everything is optional.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    sampling: Sampling,
    schedule: schedule::Section,
    capture: capture::Section,
    unwind: Unwind,
    symbolize: Symbolize,
    kubernetes: kubernetes::Section,
    labels: labels::Section,
    redact: redact::Section,
    scope: scope::Section,
    export: export::Section,
    status: status::Section,
    budget: bounds::BudgetSection,
    control: bounds::ControlSection,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sampling {
    frequency: Option<u64>,
    event: Option<Events>,
    wait_stacks: Option<u32>,
    min_wait: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Unwind {
    table_mib: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Symbolize {
    lines: Option<bool>,
    inlines: Option<bool>,
    dwarf_mib: Option<u32>,
    names_mib: Option<u32>,
    debuginfod: Debuginfod,
}

/// Where debug files come from that this machine does not have.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Debuginfod {
    /// Servers, in the order in which they are asked; none: it is off. They may hold passwords.
    pub urls: Vec<String>,
    /// The folder of files that were fetched.
    pub cache: Option<PathBuf>,
    /// Most MiB of its files.
    pub cache_mib: Option<u64>,
}

impl std::fmt::Debug for Debuginfod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} servers, {:?}, {:?} MiB", self.urls.len(), self.cache, self.cache_mib)
    }
}

/// What flags and environment set.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Samples per second and CPU.
    pub frequency: Option<u64>,
    /// What is recorded.
    pub events: Option<Events>,
    /// Stacks of waits per second and CPU.
    pub wait_stacks: Option<u32>,
    /// Waits that are shorter are left out.
    pub min_wait: Option<Duration>,
    /// Most kernel memory for rows of unwind tables, MiB.
    pub table_mib: Option<u32>,
    /// Where debug files come from.
    pub debuginfod: Debuginfod,
    /// Whether source lines are looked for.
    pub lines: Option<bool>,
    /// Whether inlined functions are looked for.
    pub inlines: Option<bool>,
    /// Most memory for debug information, MiB.
    pub dwarf_mib: Option<u32>,
    /// Most memory for names, MiB.
    pub names_mib: Option<u32>,
    /// Where pods' metadata comes from.
    pub kubernetes: KubernetesOverrides,
    /// What samples are labelled with.
    pub labels: LabelOverrides,
    /// Where profiles go.
    pub export: ExportOverrides,
    /// The status endpoint.
    pub status: StatusOverrides,
    /// What keeps the agent in bounds.
    pub control: ControlOverrides,
}

/// A valid configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Samples per second and CPU.
    pub frequency: u64,
    /// What is recorded.
    pub events: Events,
    /// How waits are sampled.
    pub waits: WaitOptions,
    /// When agents collect.
    pub schedule: crate::schedule::Settings,
    /// What is captured in more detail.
    pub capture: control::capture::Settings,
    /// Most kernel memory for rows of unwind tables, bytes.
    pub table_bytes: usize,
    /// Where debug files come from that this machine does not have; `None`: from nowhere.
    pub debuginfod: Option<debuginfod::Settings>,
    /// Whether source lines and inlined functions are looked for.
    pub source: SourceOptions,
    /// Most memory for names, bytes.
    pub names_bytes: usize,
    /// Where pods' metadata comes from; `None`: from nowhere.
    pub kubernetes: Option<Kubernetes>,
    /// What samples are labelled with.
    pub labels: Labels,
    /// What is not shown to anybody.
    pub redact: Redaction,
    /// Who is recorded.
    pub scope: Rules,
    /// Where profiles go.
    pub export: Export,
    /// The status endpoint.
    pub status: Status,
    /// What the agent may take of the machine.
    pub budget: Budget,
    /// How it is stopped.
    pub control: Control,
}

impl Config {
    /// Reads the file, if there is one, and puts the overrides on top.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> anyhow::Result<Self> {
        let Some(path) = path else { return Self::merge(File::default(), overrides) };
        let shown = path.display();
        let text =
            fs::read_to_string(path).with_context(|| format!("the configuration file {shown} cannot be read"))?;
        let file = parse(&text).with_context(|| format!("the configuration file {shown} is not valid"))?;
        Self::merge(file, overrides).map_err(|error| {
            let message = error.to_string();
            match place::line_of(&text, place::setting_of(&message)) {
                Some(line) => error.context(format!("the configuration file {shown} is not valid, line {line}")),
                None => error,
            }
        })
    }

    fn merge(file: File, overrides: Overrides) -> anyhow::Result<Self> {
        let table_mib = overrides.table_mib.or(file.unwind.table_mib).unwrap_or(*TABLE_MIB_RANGE.end());
        if !TABLE_MIB_RANGE.contains(&table_mib) {
            bail!(
                "unwind.table_mib: {table_mib} is outside of {} to {} MiB",
                TABLE_MIB_RANGE.start(),
                TABLE_MIB_RANGE.end()
            );
        }
        let min_wait = match (overrides.min_wait, file.sampling.min_wait) {
            (Some(min_wait), _) => min_wait,
            (None, Some(text)) => humantime::parse_duration(&text)
                .with_context(|| format!("sampling.min_wait: {text:?} is not a duration such as 100us or 1ms"))?,
            (None, None) => DEFAULT_WAITS.min_duration,
        };
        let source = SourceOptions {
            lines: overrides.lines.or(file.symbolize.lines).unwrap_or(false),
            inlines: overrides.inlines.or(file.symbolize.inlines).unwrap_or(false),
            bytes: dwarf_bytes(overrides.dwarf_mib.or(file.symbolize.dwarf_mib))?,
        };
        let details = if source.lines || source.inlines { source.bytes } else { 0 };
        let kubernetes = Kubernetes::merge(file.kubernetes, overrides.kubernetes)?;
        let scope = file.scope.validate(kubernetes.is_some())?;
        let mut labels = Labels::merge(file.labels, overrides.labels)?;
        (labels.wanted.scope_labels, labels.wanted.scope_annotations) = (scope.label_names(), scope.annotation_names());
        Ok(Self {
            budget: Budget::merge(file.budget, &overrides.control, details)?,
            control: Control::merge(file.control, overrides.control)?,
            events: overrides.events.or(file.sampling.event).unwrap_or(Events::OnCpu),
            waits: WaitOptions {
                stacks_per_second: overrides
                    .wait_stacks
                    .or(file.sampling.wait_stacks)
                    .unwrap_or(DEFAULT_WAITS.stacks_per_second),
                min_duration: min_wait,
            },
            schedule: crate::schedule::Settings::merge(file.schedule)?,
            capture: control::capture::Settings::merge(file.capture)?,
            table_bytes: (table_mib as usize) << 20,
            debuginfod: overrides.debuginfod.over(file.symbolize.debuginfod).validate()?,
            source,
            names_bytes: names_bytes(overrides.names_mib.or(file.symbolize.names_mib))?,
            frequency: valid_frequency(overrides.frequency.or(file.sampling.frequency).unwrap_or(DEFAULT_FREQUENCY))
                .context("sampling.frequency")?,
            kubernetes,
            labels,
            redact: file.redact.validate()?,
            scope,
            export: Export::merge(file.export, overrides.export)?,
            status: Status::merge(file.status, overrides.status)?,
        })
    }
}

impl Debuginfod {
    /// What is set here, and where nothing is, what is set there.
    fn over(self, other: Self) -> Self {
        Self {
            urls: if self.urls.is_empty() { other.urls } else { self.urls },
            cache: self.cache.or(other.cache),
            cache_mib: self.cache_mib.or(other.cache_mib),
        }
    }

    /// What the client needs; `None` without servers. Errors do not repeat URLs.
    pub fn validate(self) -> anyhow::Result<Option<debuginfod::Settings>> {
        let cache_mib = self.cache_mib.unwrap_or(DEFAULT_DEBUGINFOD_CACHE_MIB);
        if !DEBUGINFOD_CACHE_MIB_RANGE.contains(&cache_mib) {
            bail!(
                "symbolize.debuginfod.cache_mib: {cache_mib} is outside of {} to {} MiB",
                DEBUGINFOD_CACHE_MIB_RANGE.start(),
                DEBUGINFOD_CACHE_MIB_RANGE.end()
            );
        }
        let cache_folder = self.cache.unwrap_or_else(|| PathBuf::from(DEFAULT_DEBUGINFOD_CACHE));
        if cache_folder.as_os_str().is_empty() {
            bail!("symbolize.debuginfod.cache: a folder has a name, such as {DEFAULT_DEBUGINFOD_CACHE}");
        }
        let mut urls = Vec::new();
        for (index, url) in self.urls.iter().enumerate() {
            let valid = url.parse().map_err(|problem: String| anyhow::anyhow!(problem));
            urls.push(valid.with_context(|| format!("symbolize.debuginfod.urls, number {}", index + 1))?);
        }
        let cache_bytes = cache_mib << 20;
        Ok((!urls.is_empty()).then(|| debuginfod::Settings {
            urls,
            cache_folder,
            cache_bytes,
            // One file does not evict everything else.
            max_file_bytes: cache_bytes / 2,
            timeout: DEBUGINFOD_TIMEOUT,
        }))
    }
}

fn parse(text: &str) -> anyhow::Result<File> {
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(File::default());
    }
    // The error would repeat lines of the file, and some of them are secret.
    serde_saphyr::from_str(text).map_err(|error| anyhow::anyhow!("{}", error.without_snippet()))
}

fn names_bytes(mib: Option<u32>) -> anyhow::Result<usize> {
    let mib = mib.unwrap_or(DEFAULT_NAMES_MIB);
    if !NAMES_MIB_RANGE.contains(&mib) {
        bail!("symbolize.names_mib: {mib} is outside of {} to {} MiB", NAMES_MIB_RANGE.start(), NAMES_MIB_RANGE.end());
    }
    Ok((mib as usize) << 20)
}

/// Checks the most memory for debug information, MiB.
pub fn dwarf_bytes(mib: Option<u32>) -> anyhow::Result<usize> {
    let Some(mib) = mib else { return Ok(SourceOptions::DEFAULT_BYTES) };
    if !DWARF_MIB_RANGE.contains(&mib) {
        bail!("symbolize.dwarf_mib: {mib} is outside of {} to {} MiB", DWARF_MIB_RANGE.start(), DWARF_MIB_RANGE.end());
    }
    Ok((mib as usize) << 20)
}

/// Checks a sampling frequency against what is sensible and what the kernel allows.
pub fn valid_frequency(frequency: u64) -> anyhow::Result<u64> {
    const KERNEL_LIMIT: &str = "/proc/sys/kernel/perf_event_max_sample_rate";
    if frequency == 0 {
        bail!("the sampling frequency must be at least 1 per second; {DEFAULT_FREQUENCY} is the default");
    }
    let allowed = fs::read_to_string(KERNEL_LIMIT).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(10_000);
    if frequency > allowed {
        bail!(
            "the sampling frequency {frequency} is above the kernel's limit of {allowed} per second; \
             lower it, or raise {KERNEL_LIMIT}"
        );
    }
    Ok(frequency)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::label::kubernetes::Wanted;

    fn check(yaml: &str, overrides: Overrides, expect: Result<Config, &str>) {
        let result = parse(yaml).and_then(|file| Config::merge(file, overrides));
        match (result, expect) {
            (Ok(config), Ok(expected)) => assert_eq!(config, expected, "{yaml:?}"),
            (Err(error), Err(expected)) => {
                let text = format!("{error:#}");
                assert!(text.contains(expected), "{yaml:?}: {text:?} does not say {expected:?}");
            }
            (result, expected) => panic!("{yaml:?}: {result:?} instead of {expected:?}"),
        }
    }

    fn default() -> Config {
        Config {
            frequency: 99,
            events: Events::OnCpu,
            waits: DEFAULT_WAITS,
            schedule: crate::schedule::Settings::default(),
            capture: control::capture::Settings::merge(capture::Section::default()).expect("a default"),
            table_bytes: 64 << 20,
            debuginfod: None,
            source: SourceOptions::default(),
            names_bytes: 32 << 20,
            kubernetes: None,
            labels: Labels {
                wanted: Wanted { scope_annotations: ["profiler/enabled".to_owned()].into(), ..Wanted::default() },
                ..Labels::default()
            },
            redact: Redaction::default(),
            scope: Rules { honor_annotation: true, ..Rules::default() },
            export: Export::merge(export::Section::default(), ExportOverrides::default()).expect("a default"),
            status: Status::merge(status::Section::default(), StatusOverrides::default()).expect("a default"),
            budget: Budget { cpu: 0.01, memory: 256 << 20 },
            control: Control::default(),
        }
    }

    /// Nothing set is valid; the file overrides defaults; flags override the file.
    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        check("", Overrides::default(), Ok(default()));
        check("# only a comment\n", Overrides::default(), Ok(default()));
        check("sampling:\n  frequency: 49\n", Overrides::default(), Ok(Config { frequency: 49, ..default() }));
        check(
            "sampling:\n  event: both\n  min_wait: 1ms\n",
            Overrides { wait_stacks: Some(0), ..Overrides::default() },
            Ok(Config {
                events: Events::Both,
                waits: WaitOptions { stacks_per_second: 0, min_duration: Duration::from_millis(1) },
                ..default()
            }),
        );
        check(
            "symbolize:\n  lines: true\n  dwarf_mib: 32\n",
            Overrides { inlines: Some(true), ..Overrides::default() },
            Ok(Config {
                source: SourceOptions { lines: true, inlines: true, bytes: 32 << 20 },
                budget: Budget { memory: 288 << 20, ..default().budget },
                ..default()
            }),
        );
        check(
            "sampling:\n  frequency: 49\nexport:\n  window: 1m\n",
            Overrides { frequency: Some(19), ..Overrides::default() },
            Ok(Config {
                frequency: 19,
                export: Export { window: Duration::from_secs(60), ..default().export },
                ..default()
            }),
        );
    }

    /// Debug files come from nowhere but the servers that are named; flags replace the file's.
    #[test]
    fn debuginfod_is_off_without_servers() {
        let settings = |url: &str, folder: &str, mib: u64| debuginfod::Settings {
            urls: vec![url.parse().expect("a URL")],
            cache_folder: folder.into(),
            cache_bytes: mib << 20,
            max_file_bytes: mib << 19,
            timeout: DEBUGINFOD_TIMEOUT,
        };
        let yaml = "symbolize:\n  debuginfod:\n    urls: [https://one]\n    cache: /folder\n    cache_mib: 100\n";
        check("symbolize:\n  debuginfod:\n    cache_mib: 100\n", Overrides::default(), Ok(default()));
        check(
            "symbolize:\n  debuginfod:\n    urls: [https://one]\n",
            Overrides::default(),
            Ok(Config { debuginfod: Some(settings("https://one", DEFAULT_DEBUGINFOD_CACHE, 1024)), ..default() }),
        );
        let flags = Debuginfod { urls: vec!["http://two/".to_owned()], cache: Some("/flag".into()), cache_mib: None };
        check(
            yaml,
            Overrides { debuginfod: flags, ..Overrides::default() },
            Ok(Config { debuginfod: Some(settings("http://two", "/flag", 100)), ..default() }),
        );
    }

    /// What is wrong with a server's URL is said without it: it may hold a password.
    #[test]
    fn refusals_keep_secrets() {
        let yaml = "symbolize:\n  debuginfod:\n    urls: [https://one, 'ftp://user:hunter2@two']\n";
        check(yaml, Overrides::default(), Err("symbolize.debuginfod.urls, number 2"));
        let error = parse(yaml).and_then(|file| Config::merge(file, Overrides::default())).expect_err("refused");
        assert!(!format!("{error:#}").contains("hunter2"));
    }

    /// Every refusal names the setting and what would be accepted.
    #[test]
    fn refusals_name_the_setting() {
        check("sampling:\n  frequncy: 49\n", Overrides::default(), Err("frequncy"));
        check("sampling:\n  event: sometimes\n", Overrides::default(), Err("sometimes"));
        check("sampling:\n  min_wait: short\n", Overrides::default(), Err("sampling.min_wait"));
        check("export:\n  window: soon\n", Overrides::default(), Err("export.window"));
        check("export:\n  window: 1ms\n", Overrides::default(), Err("1s to 10m"));
        check("unwind:\n  table_mib: 1000\n", Overrides::default(), Err("unwind.table_mib"));
        check("symbolize:\n  debuginfo: {}\n", Overrides::default(), Err("debuginfo"));
        check("symbolize:\n  debuginfod:\n    url: x\n", Overrides::default(), Err("url"));
        check(
            "symbolize:\n  debuginfod:\n    cache_mib: 1\n",
            Overrides::default(),
            Err("symbolize.debuginfod.cache_mib: 1 is outside of 16"),
        );
        check("symbolize:\n  debuginfod:\n    cache: ''\n", Overrides::default(), Err("symbolize.debuginfod.cache"));
        check("symbolize:\n  dwarf_mib: 1\n", Overrides::default(), Err("symbolize.dwarf_mib"));
        check("symbolize:\n  names_mib: 7\n", Overrides::default(), Err("symbolize.names_mib: 7 is outside of 8"));
        check("schedule:\n  every: often\n", Overrides::default(), Err("schedule.every"));
        check("capture:\n  rules: [{name: a}]\n", Overrides::default(), Err("capture.rules, \"a\""));
        check("status:\n  listen: nowhere\n", Overrides::default(), Err("status.listen"));
        check("", Overrides { frequency: Some(0), ..Overrides::default() }, Err("at least 1"));
    }
}

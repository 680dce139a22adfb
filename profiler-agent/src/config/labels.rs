//! Attributes of samples: which are added, left out, and called otherwise, and what of pods' metadata becomes some.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail, ensure};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tracing::warn;

use crate::{
    label::{Rules, kubernetes::Wanted},
    pattern::Pattern,
};

/// OpenTelemetry's variable (<https://opentelemetry.io/docs/specs/otel/resource/sdk/>).
const VARIABLE: &str = "OTEL_RESOURCE_ATTRIBUTES";
/// Entries of each list.
pub(super) const MAX_ENTRIES: usize = 64;
/// Bytes of a name or a pattern.
const MAX_NAME: usize = 256;
/// Bytes of a value.
const MAX_VALUE: usize = 1024;

/// What samples are labelled with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// What is done with all attributes.
    pub rules: Rules,
    /// What pods tell besides their names.
    pub wanted: Wanted,
}

/// What flags and environment say.
#[derive(Clone, Debug, Default)]
pub struct LabelOverrides {
    /// Attributes that are added.
    pub extra: Vec<(String, String)>,
    /// Patterns of pods' labels.
    pub pod_labels: Vec<String>,
    /// Patterns of pods' annotations.
    pub pod_annotations: Vec<String>,
    /// Whether services are named by labels.
    pub service_from_labels: Option<bool>,
    /// OpenTelemetry's variable.
    pub resource_attributes: Option<String>,
}

impl LabelOverrides {
    /// With what OpenTelemetry's variable says.
    pub fn with_environment(self) -> Self {
        Self { resource_attributes: std::env::var(VARIABLE).ok(), ..self }
    }
}

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    extra: BTreeMap<String, String>,
    pod_labels: Vec<String>,
    pod_annotations: Vec<String>,
    service_from_labels: Option<bool>,
    allow: Vec<String>,
    deny: Vec<String>,
    rename: BTreeMap<String, String>,
}

impl Labels {
    /// Puts flags over the file.
    pub(super) fn merge(file: Section, flags: LabelOverrides) -> anyhow::Result<Self> {
        let or_file = |flag: Vec<String>, file| if flag.is_empty() { file } else { flag };
        let mut extra = file.extra;
        extra.extend(flags.extra);
        ensure!(extra.len() <= MAX_ENTRIES, "labels.extra: {} are more than {MAX_ENTRIES}", extra.len());
        for (name, value) in &extra {
            valid_name("labels.extra", name)?;
            valid_value("labels.extra", name, value)?;
        }
        ensure!(file.rename.len() <= MAX_ENTRIES, "labels.rename: {} are more than {MAX_ENTRIES}", file.rename.len());
        let mut renamed = BTreeSet::new();
        for (old, new) in &file.rename {
            valid_name("labels.rename", old)?;
            valid_name("labels.rename", new)?;
            ensure!(renamed.insert(new), "labels.rename: two attributes would be called {new:?}");
        }
        Ok(Self {
            rules: Rules {
                defaults: flags.resource_attributes.map(|text| of_variable(&text)).unwrap_or_default(),
                extra,
                allow: patterns("labels.allow", &file.allow)?,
                deny: patterns("labels.deny", &file.deny)?,
                rename: file.rename,
            },
            wanted: Wanted {
                labels: patterns("labels.pod_labels", &or_file(flags.pod_labels, file.pod_labels))?,
                annotations: patterns("labels.pod_annotations", &or_file(flags.pod_annotations, file.pod_annotations))?,
                service_from_labels: flags.service_from_labels.or(file.service_from_labels).unwrap_or(false),
                ..Wanted::default()
            },
        })
    }
}

fn patterns(key: &str, texts: &[String]) -> anyhow::Result<Vec<Pattern>> {
    ensure!(texts.len() <= MAX_ENTRIES, "{key}: {} are more than {MAX_ENTRIES}", texts.len());
    let pattern = |text: &String| valid_name(key, text).map(|()| Pattern::from(text.as_str()));
    texts.iter().map(pattern).collect()
}

pub(super) fn valid_name(key: &str, name: &str) -> anyhow::Result<()> {
    let is_valid =
        (1..=MAX_NAME).contains(&name.len()) && !name.contains(|c: char| c.is_control() || c.is_whitespace());
    ensure!(is_valid, "{key}: {name:?} is no name such as service.name, of {MAX_NAME} bytes at most");
    Ok(())
}

fn valid_value(key: &str, name: &str, value: &str) -> anyhow::Result<()> {
    let is_valid = value.len() <= MAX_VALUE && !value.contains(char::is_control);
    ensure!(is_valid, "{key}: the value of {name:?} is no text of one line and {MAX_VALUE} bytes at most");
    Ok(())
}

/// What the variable says. As the specification has it, all of it is ignored if any of it is wrong.
fn of_variable(text: &str) -> BTreeMap<String, String> {
    let mut attributes = match parse_variable(text) {
        Ok(attributes) => attributes,
        Err(error) => {
            warn!("{VARIABLE} is ignored: {error:#}");
            return BTreeMap::new();
        }
    };
    // The agent's own, for whoever takes it for one more service; it would be every process's.
    let ignored: Vec<_> = attributes.extract_if(.., |name, _| is_of_one_process(name)).map(|(name, _)| name).collect();
    if !ignored.is_empty() {
        warn!("ignored in {VARIABLE}, since they are about one process: {}", ignored.join(", "));
    }
    attributes
}

fn is_of_one_process(name: &str) -> bool {
    let is_kubernetes = name.starts_with("k8s.") && !name.starts_with("k8s.cluster.") && !name.starts_with("k8s.node.");
    is_kubernetes || ["service.", "container.", "process.", "telemetry."].iter().any(|prefix| name.starts_with(prefix))
}

/// `name=value,name=value`, with `%` for what would mean something else.
fn parse_variable(text: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let mut attributes = BTreeMap::new();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let Some((name, value)) = pair.split_once('=') else { bail!("{pair:?} is not of the form name=value") };
        let decoded = |text: &str| anyhow::Ok(percent_decode_str(text.trim()).decode_utf8()?.into_owned());
        let name = decoded(name).context("a name is not text")?;
        let value = decoded(value).with_context(|| format!("the value of {name:?} is not text"))?;
        valid_name("a name", &name)?;
        valid_value("a value", &name, &value)?;
        attributes.insert(name, value);
    }
    ensure!(attributes.len() <= MAX_ENTRIES, "{} are more than {MAX_ENTRIES}", attributes.len());
    Ok(attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(yaml: &str, flags: LabelOverrides) -> anyhow::Result<Labels> {
        let section =
            if yaml.is_empty() { Section::default() } else { serde_saphyr::from_str(yaml).expect("a section") };
        Labels::merge(section, flags)
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Flags add to the file's attributes, and take the place of its patterns.
    #[test]
    fn flags_come_over_the_file() {
        let yaml = "extra: {env: prod, zone: a}\npod_labels: [app, 'team*']\nallow: ['k8s.*']\nrename: {a: b}\n";
        let labels = merge(yaml, LabelOverrides::default()).expect("valid");
        assert_eq!(labels.rules.extra, map(&[("env", "prod"), ("zone", "a")]));
        assert_eq!(labels.wanted.labels, ["app".into(), "team*".into()]);
        assert_eq!((labels.rules.allow, labels.rules.rename), (vec!["k8s.*".into()], map(&[("a", "b")])));
        let flags = LabelOverrides {
            extra: vec![("zone".to_owned(), "b".to_owned())],
            pod_labels: vec!["x".to_owned()],
            service_from_labels: Some(true),
            ..LabelOverrides::default()
        };
        let labels = merge(yaml, flags).expect("valid");
        assert_eq!(labels.rules.extra, map(&[("env", "prod"), ("zone", "b")]));
        assert_eq!((labels.wanted.labels, labels.wanted.service_from_labels), (vec!["x".into()], true));
    }

    /// OpenTelemetry's variable fills in what nothing else says, and names no service.
    #[test]
    fn the_variable_comes_last() {
        let defaults = |text: &str| {
            let flags = LabelOverrides { resource_attributes: Some(text.to_owned()), ..LabelOverrides::default() };
            merge("", flags).expect("never an error").rules.defaults
        };
        assert_eq!(defaults("a=1, b=x%2Cy%3D ,"), map(&[("a", "1"), ("b", "x,y=")]));
        assert_eq!(
            defaults("service.name=agent,k8s.pod.name=p,k8s.cluster.name=c,env=prod"),
            map(&[("env", "prod"), ("k8s.cluster.name", "c")])
        );
        assert_eq!(defaults("a=1,b"), map(&[]));
        assert_eq!(defaults("a=%ff"), map(&[]));
        assert_eq!(defaults(""), map(&[]));
    }

    /// Every refusal names the setting.
    #[test]
    fn refusals_name_the_setting() {
        let many: Vec<String> = (0..65).map(|number| number.to_string()).collect();
        for (yaml, expected) in [
            ("extra: {'': x}\n".to_owned(), "labels.extra"),
            ("extra: {a: \"x\\ny\"}\n".to_owned(), "labels.extra"),
            ("rename: {a: ''}\n".to_owned(), "labels.rename"),
            ("rename: {a: c, b: c}\n".to_owned(), "labels.rename: two"),
            ("allow: ['']\n".to_owned(), "labels.allow"),
            (format!("deny: ['{}']\n", many.join("','")), "labels.deny: 65"),
            ("pod_labels: ['a b']\n".to_owned(), "labels.pod_labels"),
            ("pod_annotations: ['']\n".to_owned(), "labels.pod_annotations"),
        ] {
            let error = format!("{:#}", merge(&yaml, LabelOverrides::default()).expect_err(&yaml));
            assert!(error.contains(expected), "{yaml:?}: {error:?}");
        }
    }
}

//! Who is recorded: which processes, cgroups and pods are included and excluded.

use std::collections::BTreeMap;

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

use super::labels::{MAX_ENTRIES, valid_name};
use crate::{
    pattern::Pattern,
    scope::{MAX_CONFIGURED, Matcher, Rules},
};

/// Bytes of a pattern: of a path, mostly.
const MAX_PATTERN: usize = 1024;

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    honor_annotation: Option<bool>,
    include: Vec<Entry>,
    exclude: Vec<Entry>,
}

/// One matcher: see [`Matcher`].
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Entry {
    /// Processes, with their children.
    pub pids: Vec<u32>,
    /// Patterns of executable files.
    pub executables: Vec<String>,
    /// Patterns of cgroups' paths.
    pub cgroups: Vec<String>,
    /// Patterns of containers' IDs and names.
    pub containers: Vec<String>,
    /// Patterns of pods' namespaces.
    pub namespaces: Vec<String>,
    /// Patterns of pods' labels.
    pub pod_labels: BTreeMap<String, String>,
    /// Patterns of pods' annotations.
    pub pod_annotations: BTreeMap<String, String>,
}

impl Section {
    /// `knows_pods`: whether there is a cluster that knows pods.
    pub(super) fn validate(self, knows_pods: bool) -> anyhow::Result<Rules> {
        let count = self.include.len() + self.exclude.len();
        ensure!(count <= MAX_CONFIGURED, "scope: {count} entries are more than {MAX_CONFIGURED}");
        let list = |name: &str, entries: Vec<Entry>| -> anyhow::Result<Vec<Matcher>> {
            let numbered = (1..).zip(entries);
            numbered
                .map(|(number, entry)| entry.validate(&format!("scope.{name}, number {number}"), knows_pods))
                .collect()
        };
        Ok(Rules {
            include: list("include", self.include)?,
            exclude: list("exclude", self.exclude)?,
            within: Vec::new(),
            honor_annotation: self.honor_annotation.unwrap_or(true),
        })
    }
}

impl Entry {
    pub(super) fn validate(self, key: &str, knows_pods: bool) -> anyhow::Result<Matcher> {
        let list = |field: &str, values: &[String]| patterns(&format!("{key}: {field}"), values);
        let pairs = |field: &str, values: BTreeMap<String, String>| -> anyhow::Result<BTreeMap<String, Pattern>> {
            let key = format!("{key}: {field}");
            ensure!(values.len() <= MAX_ENTRIES, "{key}: {} are more than {MAX_ENTRIES}", values.len());
            let pair = |(name, value): (String, String)| {
                valid_name(&key, &name)?;
                // (Labels may be empty.)
                ensure!(!value.contains(char::is_control), "{key}: the value of {name:?} is no text of one line");
                Ok((name, Pattern::from(value.as_str())))
            };
            values.into_iter().map(pair).collect()
        };
        let strange = self.cgroups.iter().find(|path| !path.starts_with(['/', '*']));
        if let Some(path) = strange {
            bail!("{key}: cgroups: {path:?} is no path such as /system.slice/nginx.service");
        }
        ensure!(!self.pids.contains(&0), "{key}: pids: there is no process 0");
        ensure!(self.pids.len() <= MAX_ENTRIES, "{key}: pids: {} are more than {MAX_ENTRIES}", self.pids.len());
        let matcher = Matcher {
            executables: list("executables", &self.executables)?,
            cgroups: list("cgroups", &self.cgroups)?,
            containers: list("containers", &self.containers)?,
            namespaces: list("namespaces", &self.namespaces)?,
            pod_labels: pairs("pod_labels", self.pod_labels)?,
            pod_annotations: pairs("pod_annotations", self.pod_annotations)?,
            pids: self.pids,
        };
        ensure!(
            !matcher.is_empty(),
            "{key}: it matches nothing in particular: say which pids, executables, cgroups, containers, namespaces, \
             pod_labels or pod_annotations are meant"
        );
        ensure!(
            knows_pods || !matcher.asks_about_pods(),
            "{key}: it asks about pods, which only a cluster's API server knows: see kubernetes.enabled"
        );
        Ok(matcher)
    }
}

fn patterns(key: &str, texts: &[String]) -> anyhow::Result<Vec<Pattern>> {
    ensure!(texts.len() <= MAX_ENTRIES, "{key}: {} are more than {MAX_ENTRIES}", texts.len());
    let pattern = |text: &String| {
        let is_valid = (1..=MAX_PATTERN).contains(&text.len()) && !text.contains(char::is_control);
        ensure!(is_valid, "{key}: {text:?} is no text of one line and {MAX_PATTERN} bytes at most");
        Ok(Pattern::from(text.as_str()))
    };
    texts.iter().map(pattern).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validate(yaml: &str, knows_pods: bool) -> anyhow::Result<Rules> {
        let section: Section = serde_saphyr::from_str(yaml)?;
        section.validate(knows_pods)
    }

    /// Every field is taken as it is written.
    #[test]
    fn fields_are_read() {
        let yaml = "honor_annotation: false\n\
                    include:\n\
                    - {namespaces: [shop, 'web-*'], pod_labels: {tier: 'f*'}, pod_annotations: {a/b: ''}}\n\
                    - {containers: [app]}\n\
                    exclude:\n\
                    - {pids: [1, 2], executables: [nginx, '/opt/my programs/*'], cgroups: [/system.slice]}\n";
        let pair = |name: &str, value: &str| [(name.to_owned(), value.into())].into();
        let expected = Rules {
            include: vec![
                Matcher {
                    namespaces: vec!["shop".into(), "web-*".into()],
                    pod_labels: pair("tier", "f*"),
                    pod_annotations: pair("a/b", ""),
                    ..Matcher::default()
                },
                Matcher { containers: vec!["app".into()], ..Matcher::default() },
            ],
            exclude: vec![Matcher {
                pids: vec![1, 2],
                executables: vec!["nginx".into(), "/opt/my programs/*".into()],
                cgroups: vec!["/system.slice".into()],
                ..Matcher::default()
            }],
            within: Vec::new(),
            honor_annotation: false,
        };
        assert_eq!(validate(yaml, true).expect("valid"), expected);
        let default = Rules { honor_annotation: true, ..Rules::default() };
        assert_eq!(validate("include: []\n", false).expect("valid"), default);
    }

    /// Every refusal names the entry and what is wrong with it.
    #[test]
    fn refusals_name_the_entry() {
        let many = "- {pids: [1]}\n".repeat(63);
        for (yaml, expected) in [
            ("exclude: [{}]\n", "scope.exclude, number 1: it matches nothing"),
            ("exclude: [{pids: []}]\n", "scope.exclude, number 1: it matches nothing"),
            ("include: [{pids: [1]}, {namespaces: [a]}]\n", "scope.include, number 2: it asks about pods"),
            ("include: [{pod_labels: {a: b}}]\n", "it asks about pods"),
            ("exclude: [{executable: [a]}]\n", "executable"),
            ("exclude: [{executables: ['']}]\n", "scope.exclude, number 1: executables"),
            ("exclude: [{cgroups: [system.slice]}]\n", "no path"),
            ("exclude: [{pids: [0]}]\n", "no process 0"),
            ("exclude: [{pids: [a]}]\n", "a"),
            (&format!("exclude:\n{many}"), "63 entries are more than 62"),
        ] {
            let error = format!("{:#}", validate(yaml, false).expect_err(yaml));
            assert!(error.contains(expected), "{yaml:?}: {error:?} does not say {expected:?}");
        }
        let error = validate("include: [{pod_labels: {'a b': c}}]\n", true).expect_err("a bad name");
        assert!(error.to_string().contains("pod_labels"), "{error}");
    }
}

//! What is not shown to anybody.

use anyhow::ensure;
use serde::Deserialize;

use crate::{pattern::Pattern, redact::Redaction};

/// Entries of each list.
const MAX_ENTRIES: usize = 64;
/// Bytes of a pattern.
const MAX_PATTERN: usize = 1024;

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    paths: Vec<String>,
    processes: Vec<String>,
    functions: Option<bool>,
}

impl Section {
    /// The rules.
    pub(super) fn validate(self) -> anyhow::Result<Redaction> {
        Ok(Redaction {
            paths: patterns("redact.paths", &self.paths)?,
            processes: patterns("redact.processes", &self.processes)?,
            functions: self.functions.unwrap_or(Redaction::default().functions),
        })
    }
}

fn patterns(key: &str, texts: &[String]) -> anyhow::Result<Vec<Pattern>> {
    ensure!(texts.len() <= MAX_ENTRIES, "{key}: {} are more than {MAX_ENTRIES}", texts.len());
    let pattern = |text: &String| {
        let is_valid = (1..=MAX_PATTERN).contains(&text.len()) && !text.contains(char::is_control);
        ensure!(is_valid, "{key}: {text:?} is no pattern such as /opt/secret/*, of {MAX_PATTERN} bytes at most");
        Ok(Pattern::from(text.as_str()))
    };
    texts.iter().map(pattern).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validate(yaml: &str) -> anyhow::Result<Redaction> {
        serde_saphyr::from_str::<Section>(yaml).expect("a section").validate()
    }

    /// Lists of patterns; functions are hidden unless told otherwise; refusals name the setting.
    #[test]
    fn reads_patterns() {
        let rules = validate("paths: ['/opt/my secret/*']\nprocesses: [vault]\n").expect("valid");
        assert_eq!((rules.paths, rules.processes), (vec!["/opt/my secret/*".into()], vec!["vault".into()]));
        assert!(rules.functions && !validate("functions: false\n").expect("valid").functions);
        let many: Vec<String> = (0..65).map(|number| number.to_string()).collect();
        for (yaml, expected) in [
            ("paths: ['']\n".to_owned(), "redact.paths"),
            ("processes: [\"a\\nb\"]\n".to_owned(), "redact.processes"),
            (format!("paths: ['{}']\n", many.join("','")), "redact.paths: 65"),
        ] {
            let error = validate(&yaml).expect_err(&yaml).to_string();
            assert!(error.contains(expected), "{yaml:?}: {error:?}");
        }
    }
}

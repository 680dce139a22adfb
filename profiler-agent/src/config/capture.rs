//! Which containers are captured when, and how much of it is admitted.

use std::{collections::BTreeSet, ops::RangeInclusive, sync::Arc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    export::{duration, within},
    scope::Entry,
    valid_frequency,
};
use crate::{
    control::capture::{
        BY_HAND, Capture, Order, Settings, limits,
        rules::{Rule, Threshold},
    },
    profile::Events,
};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);
/// Each look reads some files of every container.
const INTERVAL_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(300);
const DEFAULT_MAX_RUNNING: usize = 1;
const MAX_RUNNING_RANGE: RangeInclusive<usize> = 1..=16;
const DEFAULT_PER_HOUR: usize = 6;
const PER_HOUR_RANGE: RangeInclusive<usize> = 1..=360;
const DEFAULT_COOLDOWN: Duration = Duration::from_secs(600);
const COOLDOWN_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(24 * 3600);
/// Rules at most: each is judged for each container.
const MAX_RULES: usize = 16;
/// Bytes of a rule's name.
const MAX_NAME: usize = 64;
const DEFAULT_FOR: Duration = Duration::from_secs(10);
const FOR_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
const DEFAULT_DURATION: Duration = Duration::from_secs(30);
/// More than this is no capture but another configuration.
const LONGEST: Duration = Duration::from_secs(300);
const DURATION_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=LONGEST;
/// Bytes of what somebody says about a capture by hand.
const MAX_REASON: usize = 256;

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    interval: Option<String>,
    max_running: Option<usize>,
    per_hour: Option<usize>,
    cooldown: Option<String>,
    rules: Vec<RuleSection>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RuleSection {
    name: String,
    cpu: Option<f64>,
    throttled: Option<f64>,
    memory_growth: Option<f64>,
    run_queue_delay: Option<f64>,
    #[serde(rename = "for")]
    lasts: Option<String>,
    capture: CaptureSection,
}

/// What is captured. What is not said is as in the daemon's own profiles.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureSection {
    /// How long.
    pub duration: Option<String>,
    /// Samples per second and CPU.
    pub frequency: Option<u64>,
    /// CPU time, waits, or both.
    pub event: Option<Events>,
    /// Whether source lines are looked for.
    pub lines: Option<bool>,
    /// Whether inlined functions are looked for.
    pub inlines: Option<bool>,
}

/// A capture that somebody asks for by hand, as it is sent.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Request {
    /// Whom; nobody in particular: the whole machine.
    pub scope: Option<Entry>,
    /// What.
    pub capture: CaptureSection,
    /// Why, in somebody's own words.
    pub reason: String,
}

impl Request {
    /// Checks it as the configuration is checked. `knows_pods`: whether there is a cluster that knows pods.
    pub fn validate(self, knows_pods: bool) -> anyhow::Result<Order> {
        let scope = self.scope.map(|scope| scope.validate("scope", knows_pods)).transpose()?;
        let asks_for_annotations = scope.as_ref().is_some_and(|scope| !scope.pod_annotations.is_empty());
        // (Of annotations nothing is kept but what the configuration asks about.)
        ensure!(!asks_for_annotations, "scope: pod_annotations: captures by hand ask for pod_labels instead");
        let reason = self.reason.trim();
        ensure!(
            reason.len() <= MAX_REASON && !reason.contains(char::is_control),
            "reason: it is no text of one line and {MAX_REASON} bytes at most"
        );
        let reason = if reason.is_empty() { "asked for by hand" } else { reason };
        Ok(Order { rule: BY_HAND.into(), scope, capture: self.capture.validate()?, reason: reason.into() })
    }
}

impl Settings {
    /// Checks what the file says.
    pub(super) fn merge(file: Section) -> anyhow::Result<Self> {
        let interval = time("capture.interval", file.interval.as_deref(), DEFAULT_INTERVAL, &INTERVAL_RANGE)?;
        let limits = limits::Settings {
            max_running: number("capture.max_running", file.max_running, DEFAULT_MAX_RUNNING, &MAX_RUNNING_RANGE)?,
            per_hour: number("capture.per_hour", file.per_hour, DEFAULT_PER_HOUR, &PER_HOUR_RANGE)?,
            cooldown: time("capture.cooldown", file.cooldown.as_deref(), DEFAULT_COOLDOWN, &COOLDOWN_RANGE)?,
            longest: LONGEST,
        };
        ensure!(file.rules.len() <= MAX_RULES, "capture.rules: {} are more than {MAX_RULES}", file.rules.len());
        let mut names = BTreeSet::new();
        let mut rules = Vec::new();
        for (index, rule) in file.rules.into_iter().enumerate() {
            let name = rule.name.clone();
            valid_name(&name).with_context(|| format!("capture.rules, number {}", index + 1))?;
            let rule = rule.validate().with_context(|| format!("capture.rules, {name:?}"))?;
            ensure!(names.insert(name), "capture.rules: two are called {:?}", rule.name);
            rules.push(Arc::new(rule));
        }
        Ok(Self { interval, limits, rules })
    }
}

impl RuleSection {
    fn validate(self) -> anyhow::Result<Rule> {
        let threshold = self.threshold()?;
        let lasts = time("for", self.lasts.as_deref(), DEFAULT_FOR, &FOR_RANGE)?;
        Ok(Rule { name: self.name.into(), threshold, lasts, capture: self.capture.validate()? })
    }

    fn threshold(&self) -> anyhow::Result<Threshold> {
        const SHARE: RangeInclusive<f64> = 0.001..=1.0;
        let checked = |key: &str, value: Option<f64>, range: RangeInclusive<f64>, threshold: fn(f64) -> Threshold| {
            let Some(value) = value else { return Ok(None) };
            ensure!(range.contains(&value), "{key}: {value} is outside of {} to {}", range.start(), range.end());
            Ok(Some(threshold(value)))
        };
        let mut thresholds = [
            checked("cpu", self.cpu, 0.001..=65_536.0, Threshold::Cpu)?,
            checked("throttled", self.throttled, SHARE, Threshold::Throttled)?,
            checked("memory_growth", self.memory_growth, 0.001..=1_048_576.0, Threshold::MemoryGrowth)?,
            checked("run_queue_delay", self.run_queue_delay, SHARE, Threshold::RunQueueDelay)?,
        ]
        .into_iter()
        .flatten();
        match (thresholds.next(), thresholds.next()) {
            (Some(threshold), None) => Ok(threshold),
            (None, _) => bail!("one of cpu, throttled, memory_growth and run_queue_delay says what triggers it"),
            (Some(_), Some(_)) => {
                bail!("only one of cpu, throttled, memory_growth and run_queue_delay can trigger it: make it two rules")
            }
        }
    }
}

impl CaptureSection {
    fn validate(self) -> anyhow::Result<Capture> {
        let duration = time("capture.duration", self.duration.as_deref(), DEFAULT_DURATION, &DURATION_RANGE)?;
        let frequency = self.frequency.map(valid_frequency).transpose().context("capture.frequency")?;
        Ok(Capture { duration, frequency, events: self.event, lines: self.lines, inlines: self.inlines })
    }
}

fn time(
    key: &str,
    text: Option<&str>,
    default: Duration,
    range: &RangeInclusive<Duration>,
) -> anyhow::Result<Duration> {
    let time = text.map_or(Ok(default), |text| duration(key, text, "30s or 5m"))?;
    within(key, time, range)?;
    Ok(time)
}

fn number(key: &str, number: Option<usize>, default: usize, range: &RangeInclusive<usize>) -> anyhow::Result<usize> {
    let number = number.unwrap_or(default);
    ensure!(range.contains(&number), "{key}: {number} is outside of {} to {}", range.start(), range.end());
    Ok(number)
}

/// Names are labels of metrics, and attributes of what is captured.
fn valid_name(name: &str) -> anyhow::Result<()> {
    ensure!(name != BY_HAND, "name: {name:?} is what captures by hand are called");
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    ensure!(
        (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_allowed),
        "name: {name:?} is no name of letters, digits, '-', '_' and '.', {MAX_NAME} at most"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(yaml: &str) -> anyhow::Result<Settings> {
        let section = if yaml.is_empty() { Section::default() } else { serde_saphyr::from_str(yaml)? };
        Settings::merge(section)
    }

    /// Nothing is captured by default; a rule has a threshold and says what is captured.
    #[test]
    fn reads_the_file() {
        let seconds = Duration::from_secs;
        let limits = limits::Settings { max_running: 1, per_hour: 6, cooldown: seconds(600), longest: seconds(300) };
        let default = merge("").expect("a default");
        assert_eq!(default, Settings { interval: seconds(5), limits, rules: Vec::new() });
        assert!(default.resources().is_empty());
        let yaml = "interval: 10s\nmax_running: 2\nper_hour: 12\ncooldown: 0s\nrules:\n\
                    - {name: leak, memory_growth: 64, for: 30s, capture: {duration: 1m, frequency: 199, event: both}}\n\
                    - {name: busy, cpu: 1.5, capture: {lines: true, inlines: true}}\n";
        let as_usual = Capture { duration: seconds(30), frequency: None, events: None, lines: None, inlines: None };
        let rule = |name: &str, threshold, lasts, capture| {
            Arc::new(Rule { name: name.into(), threshold, lasts: seconds(lasts), capture })
        };
        let leak =
            Capture { duration: seconds(60), frequency: Some(199), events: Some(Events::Both), ..as_usual.clone() };
        let busy = Capture { lines: Some(true), inlines: Some(true), ..as_usual };
        let settings = merge(yaml).expect("valid");
        assert_eq!(settings.resources().len(), 2);
        let expected = Settings {
            interval: seconds(10),
            limits: limits::Settings { max_running: 2, per_hour: 12, cooldown: Duration::ZERO, ..limits },
            rules: vec![
                rule("leak", Threshold::MemoryGrowth(64.0), 30, leak),
                rule("busy", Threshold::Cpu(1.5), 10, busy),
            ],
        };
        assert_eq!(settings, expected);
    }

    /// Every refusal names the setting, and the rule if it is about one.
    #[test]
    fn refusals_name_the_setting() {
        let many = "  - {name: a, cpu: 1}\n".repeat(17);
        for (yaml, expected) in [
            ("intervall: 1s\n", "intervall"),
            ("interval: 1ms\n", "capture.interval: 1ms is outside of 1s to 5m"),
            ("max_running: 0\n", "capture.max_running: 0 is outside of 1 to 16"),
            ("per_hour: 1000\n", "capture.per_hour"),
            ("cooldown: never\n", "capture.cooldown"),
            ("rules: [{cpu: 1}]\n", "capture.rules, number 1: name"),
            ("rules: [{name: trigger, cpu: 1}]\n", "capture.rules, number 1: name"),
            ("rules: [{name: 'a b', cpu: 1}]\n", "capture.rules, number 1: name"),
            ("rules: [{name: a}]\n", "capture.rules, \"a\": one of"),
            ("rules: [{name: a, cpu: 1, throttled: 0.5}]\n", "capture.rules, \"a\": only one of"),
            ("rules: [{name: a, cpu: 1}, {name: a, cpu: 2}]\n", "capture.rules: two are called \"a\""),
            ("rules: [{name: a, cpu: 0}]\n", "capture.rules, \"a\": cpu: 0 is outside"),
            ("rules: [{name: a, cpu: .nan}]\n", "capture.rules, \"a\": cpu"),
            ("rules: [{name: a, throttled: 50}]\n", "throttled: 50 is outside of 0.001 to 1"),
            ("rules: [{name: a, run_queue_delay: -1}]\n", "run_queue_delay"),
            ("rules: [{name: a, cpu: 1, for: 2h}]\n", "capture.rules, \"a\": for: 2h is outside of 1s to 1h"),
            ("rules: [{name: a, cpu: 1, capture: {duration: 6m}}]\n", "capture.duration: 6m is outside of 1s to 5m"),
            ("rules: [{name: a, cpu: 1, capture: {frequency: 0}}]\n", "capture.frequency"),
            ("rules: [{name: a, cpu: 1, capture: {event: all}}]\n", "all"),
            (&format!("rules:\n{many}"), "capture.rules: 17 are more than 16"),
        ] {
            let error = format!("{:#}", merge(yaml).expect_err(yaml));
            assert!(error.contains(expected), "{yaml:?}: {error:?} does not say {expected:?}");
        }
    }

    fn request(json: &str) -> anyhow::Result<Order> {
        serde_json::from_str::<Request>(json)?.validate(false)
    }

    /// What is asked for by hand is what a rule would ask for, of whomever it names.
    #[test]
    fn reads_requests() {
        let order = request("{}").expect("the whole machine, as usual");
        assert_eq!((&*order.rule, &order.scope, &*order.reason), ("trigger", &None, "asked for by hand"));
        assert_eq!(order.capture.duration, DEFAULT_DURATION);
        let json = r#"{"scope": {"pids": [7], "executables": ["java"]}, "reason": " slow logins ",
                       "capture": {"duration": "10s", "frequency": 499, "event": "both", "lines": true}}"#;
        let order = request(json).expect("valid");
        assert_eq!((&*order.subject(), &*order.reason), ("process 7, executable java", "slow logins"));
        let Capture { duration, frequency, events, lines, inlines } = order.capture;
        assert_eq!((duration.as_secs(), frequency, events), (10, Some(499), Some(Events::Both)));
        assert_eq!((lines, inlines), (Some(true), None));
        // What is sent is what is read.
        let sent = Request { scope: Some(Entry { pids: vec![7], ..Entry::default() }), ..Request::default() };
        let sent = serde_json::to_string(&sent).expect("JSON");
        assert_eq!(&*request(&sent).expect("valid").subject(), "process 7");
    }

    /// Every refusal names what is wrong.
    #[test]
    fn refuses_requests() {
        let long = format!(r#"{{"reason": "{}"}}"#, "x".repeat(257));
        for (json, expected) in [
            ("", "EOF"),
            ("7", "invalid type"),
            (r#"{"scop": {}}"#, "scop"),
            (r#"{"scope": {}}"#, "scope: it matches nothing"),
            (r#"{"scope": {"pids": [0]}}"#, "scope: pids"),
            (r#"{"scope": {"pids": [-1]}}"#, "-1"),
            (r#"{"scope": {"namespaces": ["a"]}}"#, "scope: it asks about pods"),
            (r#"{"capture": {"duration": "6m"}}"#, "capture.duration: 6m is outside"),
            (r#"{"capture": {"frequency": 0}}"#, "capture.frequency"),
            (r#"{"capture": {"event": "all"}}"#, "all"),
            (r#"{"reason": "a\nb"}"#, "reason"),
            (&long, "reason"),
        ] {
            let error = format!("{:#}", request(json).expect_err(json));
            assert!(error.contains(expected), "{json:?}: {error:?} does not say {expected:?}");
        }
        let annotated = r#"{"scope": {"pod_annotations": {"a": "b"}}}"#;
        let annotated = serde_json::from_str::<Request>(annotated).expect("JSON").validate(true);
        assert!(annotated.is_err_and(|error| error.to_string().contains("pod_annotations")));
    }
}

//! When agents collect: how much of each slot of time, and who takes turns with whom.

use std::{collections::BTreeSet, ops::RangeInclusive, time::Duration};

use anyhow::{bail, ensure};
use serde::Deserialize;

use super::export::{duration, within};
use crate::schedule::{Rotation, Settings, Turns};

/// Shorter slots would be spent on starting and stopping; in longer ones, clocks and nodes change.
const EVERY_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
/// Less is hardly begun when it ends.
const MIN_COLLECT: Duration = Duration::from_secs(1);
/// Turns in a cycle: with more, one comes every few weeks.
const OF_RANGE: RangeInclusive<u32> = 1..=1000;
/// Bytes of a member's name.
const MAX_NAME: usize = 253;
/// Less is as good as never.
const MIN_PROBABILITY: f64 = 1e-6;

/// The file's section.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Section {
    every: Option<String>,
    collect: Option<String>,
    nodes: Option<Nodes>,
    replicas: Option<Replicas>,
    probability: Option<f64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Nodes {
    of: Option<u32>,
    members: Option<Vec<Name>>,
    member: Option<Name>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replicas {
    of: u32,
}

/// YAML takes what consists of digits for a number.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Name {
    Number(u64),
    Text(String),
}

impl Settings {
    /// Checks what the file says.
    pub(super) fn merge(file: Section) -> anyhow::Result<Self> {
        let time = |key, text: &Option<String>, default, range: &RangeInclusive<_>| {
            let time = text.as_deref().map_or(Ok(default), |text| duration(key, text, "10s or 1m"))?;
            within(key, time, range)?;
            anyhow::Ok(time)
        };
        let every = time("schedule.every", &file.every, Self::default().every, &EVERY_RANGE)?;
        let collect = time("schedule.collect", &file.collect, every, &(MIN_COLLECT..=every))?;
        let probability = file.probability.unwrap_or(1.0);
        ensure!(
            (MIN_PROBABILITY..=1.0).contains(&probability),
            "schedule.probability: {probability} is outside of {MIN_PROBABILITY} to 1"
        );
        let replicas = file.replicas.map(|replicas| turns("schedule.replicas.of", replicas.of)).transpose()?;
        Ok(Self { every, collect, nodes: file.nodes.map(Nodes::validate).transpose()?, replicas, probability })
    }
}

impl Nodes {
    fn validate(self) -> anyhow::Result<Rotation> {
        let turns = match (self.of, self.members) {
            (Some(of), None) => Turns::Groups(turns("schedule.nodes.of", of)?),
            (None, Some(members)) => Turns::Members(valid_members(members)?),
            (Some(_), Some(_)) => {
                bail!("schedule.nodes: either `of` or `members` says how many turns there are, not both")
            }
            (None, None) => {
                bail!("schedule.nodes: `of` (a number of groups) or `members` (all of their names) is needed")
            }
        };
        let member = self.member.map(Name::into_text).filter(|name| !name.is_empty());
        if let Some(name) = &member {
            valid_name("schedule.nodes.member", name)?;
        }
        Ok(Rotation { member, turns })
    }
}

impl Name {
    fn into_text(self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text,
        }
    }
}

fn turns(key: &str, of: u32) -> anyhow::Result<u32> {
    ensure!(OF_RANGE.contains(&of), "{key}: {of} is outside of {} to {}", OF_RANGE.start(), OF_RANGE.end());
    Ok(of)
}

fn valid_members(members: Vec<Name>) -> anyhow::Result<Vec<String>> {
    const KEY: &str = "schedule.nodes.members";
    turns(KEY, u32::try_from(members.len()).unwrap_or(u32::MAX))?;
    let mut names = BTreeSet::new();
    for name in members.into_iter().map(Name::into_text) {
        valid_name(KEY, &name)?;
        ensure!(!names.contains(&name), "{KEY}: {name:?} is there twice");
        names.insert(name);
    }
    Ok(names.into_iter().collect())
}

fn valid_name(key: &str, name: &str) -> anyhow::Result<()> {
    let is_valid =
        (1..=MAX_NAME).contains(&name.len()) && !name.contains(|c: char| c.is_control() || c.is_whitespace());
    ensure!(is_valid, "{key}: {name:?} is no name of a node, of {MAX_NAME} bytes at most");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str, expect: Result<Settings, &str>) {
        let section = if yaml.is_empty() { Ok(Section::default()) } else { serde_saphyr::from_str(yaml) };
        match (section.map_err(anyhow::Error::from).and_then(Settings::merge), expect) {
            (Ok(settings), Ok(expected)) => assert_eq!(settings, expected, "{yaml:?}"),
            (Err(error), Err(expected)) => {
                let text = format!("{error:#}");
                assert!(text.contains(expected), "{yaml:?}: {text:?} does not say {expected:?}");
            }
            (settings, expected) => panic!("{yaml:?}: {settings:?} instead of {expected:?}"),
        }
    }

    fn nodes(turns: Turns, member: Option<&str>) -> Settings {
        let nodes = Some(Rotation { member: member.map(str::to_owned), turns });
        Settings { nodes, ..Settings::default() }
    }

    /// Everything is optional, and nothing of it changes what is collected.
    #[test]
    fn reads_the_file() {
        let seconds = Duration::from_secs;
        check("", Ok(Settings::default()));
        check(
            "every: 5m\ncollect: 10s\nreplicas: {of: 20}\nprobability: 0.1\n",
            Ok(Settings {
                every: seconds(300),
                collect: seconds(10),
                nodes: None,
                replicas: Some(20),
                probability: 0.1,
            }),
        );
        check("every: 5m\n", Ok(Settings { every: seconds(300), collect: seconds(300), ..Settings::default() }));
        check("probability: 1\n", Ok(Settings::default()));
        check("nodes: {of: 20}\n", Ok(nodes(Turns::Groups(20), None)));
        check("nodes: {of: 20, member: ''}\n", Ok(nodes(Turns::Groups(20), None)));
        check("nodes: {of: 20, member: 3}\n", Ok(nodes(Turns::Groups(20), Some("3"))));
        let members = ["7", "a", "b"].map(str::to_owned).to_vec();
        check("nodes: {members: [b, a, 7], member: b}\n", Ok(nodes(Turns::Members(members), Some("b"))));
    }

    /// Every refusal names the setting.
    #[test]
    fn refusals_name_the_setting() {
        for (yaml, expected) in [
            ("evry: 1m\n", "evry"),
            ("every: often\n", "schedule.every: \"often\""),
            ("every: 10ms\n", "schedule.every: 10ms is outside of 1s to 1day"),
            ("collect: 2m\n", "schedule.collect: 2m is outside of 1s to 1m"),
            ("collect: 0s\n", "schedule.collect"),
            ("probability: 0\n", "schedule.probability"),
            ("probability: 1.1\n", "schedule.probability"),
            ("probability: .nan\n", "schedule.probability"),
            ("nodes: {}\n", "schedule.nodes: `of`"),
            ("nodes: {of: 2, members: [a]}\n", "schedule.nodes: either"),
            ("nodes: {of: 0}\n", "schedule.nodes.of: 0 is outside of 1 to 1000"),
            ("nodes: {members: []}\n", "schedule.nodes.members: 0"),
            ("nodes: {members: [a, a]}\n", "schedule.nodes.members: \"a\" is there twice"),
            ("nodes: {members: ['']}\n", "schedule.nodes.members"),
            ("nodes: {of: 2, member: 'a b'}\n", "schedule.nodes.member"),
            ("replicas: {of: 1001}\n", "schedule.replicas.of"),
            ("replicas: {}\n", "of"),
        ] {
            check(yaml, Err(expected));
        }
    }
}

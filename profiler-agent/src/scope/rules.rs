//! What the configuration says about who is recorded, and which of it a process or a cgroup meets.

use std::collections::{BTreeMap, BTreeSet};

use profiler_common::abi::scope::{MAX_RULES, ScopeControl, ScopeMatch, state};

use crate::{
    pattern::Pattern,
    profile::{Cgroup, PodFacts},
};

/// Most matchers of all lists: one rule more is about pods by themselves.
pub const MAX_MATCHERS: usize = MAX_RULES - 1;
/// Most matchers of the configuration's: one is left for what a capture is about.
pub const MAX_CONFIGURED: usize = MAX_MATCHERS - 1;
/// The annotation by which whoever owns a pod takes it out of scope, and its value.
const ANNOTATION: (&str, &str) = ("profiler/enabled", "false");
/// Least characters of a container's ID that are taken for its beginning: runtimes show as many.
const MIN_ID: usize = 12;

/// Who is recorded: whoever one of `include` is about, or all if there is none, and none of `exclude`; of these, whoever one of
/// `within` is about, or all if there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Of these one has to match, if there is any.
    pub include: Vec<Matcher>,
    /// Of these none may match.
    pub exclude: Vec<Matcher>,
    /// Of these one has to match besides, if there is any: a part of what the other lists leave.
    pub within: Vec<Matcher>,
    /// Whether pods are left out whose annotation says so.
    pub honor_annotation: bool,
}

/// Matches what all of its fields match. A field with several values matches what one of them does, and an empty one asks
/// nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matcher {
    /// Processes, and their children.
    pub pids: Vec<u32>,
    /// Executable files, by their path or, without a slash, by their name.
    pub executables: Vec<Pattern>,
    /// Paths of cgroups, with everything below.
    pub cgroups: Vec<Pattern>,
    /// Containers, by their ID (the first 12 characters are enough) or their name in the pod.
    pub containers: Vec<Pattern>,
    /// Namespaces of pods.
    pub namespaces: Vec<Pattern>,
    /// Values of pods' labels.
    pub pod_labels: BTreeMap<String, Pattern>,
    /// Values of pods' annotations.
    pub pod_annotations: BTreeMap<String, Pattern>,
}

/// What a rule says of somebody. Of several that all have to match the least counts, of alternatives the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Answer {
    No,
    Unknown,
    Yes,
}

impl From<bool> for Answer {
    fn from(is_so: bool) -> Self {
        if is_so { Self::Yes } else { Self::No }
    }
}

/// A process's executable file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Executable {
    /// Its path, as its mount namespace has it.
    Path(String),
    /// A thread of the kernel's has none.
    None,
    /// It may not be read.
    Unknown,
}

/// What is known of a cgroup's pod.
#[derive(Clone, Copy, Debug)]
pub(super) enum PodOf<'a> {
    /// It is in none.
    None,
    /// It is in one that nobody knows yet.
    Unknown,
    /// This one.
    Known(&'a PodFacts),
}

impl Rules {
    /// Whether there are rules that have to be applied before anything is recorded. (An annotation can only be honoured
    /// once it is known.)
    pub fn are_strict(&self) -> bool {
        !self.include.is_empty() || !self.exclude.is_empty() || !self.within.is_empty()
    }

    /// Labels of pods that are asked about.
    pub fn label_names(&self) -> BTreeSet<String> {
        self.matchers().flat_map(|matcher| matcher.pod_labels.keys().cloned()).collect()
    }

    /// Annotations of pods that are asked about.
    pub fn annotation_names(&self) -> BTreeSet<String> {
        let own = self.honor_annotation.then(|| ANNOTATION.0.to_owned());
        self.matchers().flat_map(|matcher| matcher.pod_annotations.keys().cloned()).chain(own).collect()
    }

    /// Whether anything is asked about pods.
    pub fn asks_about_pods(&self) -> bool {
        self.honor_annotation || self.matchers().any(Matcher::asks_about_pods)
    }

    /// PIDs that are asked about.
    pub(super) fn pids(&self) -> BTreeSet<u32> {
        self.matchers().flat_map(|matcher| matcher.pids.iter().copied()).collect()
    }

    /// The rules as the kernel programs have them.
    pub(super) fn control(&self) -> ScopeControl {
        let include = self.include.len();
        let both = include + self.exclude.len();
        let mut control = ScopeControl {
            state: state::LIMITED,
            include: low_bits(include),
            exclude: low_bits(both) & !low_bits(include),
            within: low_bits(both + self.within.len()) & !low_bits(both),
            ..ScopeControl::default()
        };
        for (matcher, bit) in self.numbered() {
            if !matcher.asks_about_processes() {
                control.any_process |= bit;
            }
            if !matcher.executables.is_empty() {
                control.unknown_after_exec |= bit;
            }
            if matcher.asks_about_cgroups() {
                control.unknown_when_made |= bit;
            } else {
                control.any_cgroup |= bit;
            }
        }
        if self.honor_annotation {
            control.exclude |= POD_BIT;
            control.any_process |= POD_BIT;
        }
        control
    }

    /// The rules that a cgroup meets.
    pub(super) fn of_cgroup(&self, cgroup: &Cgroup, pod: PodOf<'_>) -> ScopeMatch {
        let mut matched = ScopeMatch::default();
        for (matcher, bit) in self.numbered().filter(|(matcher, _)| matcher.asks_about_cgroups()) {
            add(&mut matched, bit, matcher.of_cgroup(cgroup, pod));
        }
        if self.honor_annotation
            && let PodOf::Known(pod) = pod
        {
            add(&mut matched, POD_BIT, value(&pod.annotations, ANNOTATION.0).is_some_and(|v| v == ANNOTATION.1).into());
        }
        matched
    }

    /// The rules that a process meets. `lineage` are those of [`Self::pids`] that it is, or descends from.
    pub(super) fn of_process(&self, lineage: &[u32], executable: &Executable) -> ScopeMatch {
        let mut matched = ScopeMatch::default();
        for (matcher, bit) in self.numbered().filter(|(matcher, _)| matcher.asks_about_processes()) {
            add(&mut matched, bit, matcher.of_process(lineage, executable));
        }
        matched
    }

    fn matchers(&self) -> impl Iterator<Item = &Matcher> {
        self.include.iter().chain(&self.exclude).chain(&self.within)
    }

    /// Matchers and their bits. (What is more than the configuration allows has none.)
    fn numbered(&self) -> impl Iterator<Item = (&Matcher, u64)> {
        self.matchers().take(MAX_MATCHERS).enumerate().map(|(index, matcher)| (matcher, 1 << index))
    }
}

/// The rule that is no matcher: pods that are left out by their annotation, or because it is another's turn.
pub(super) const POD_BIT: u64 = 1 << MAX_MATCHERS;

fn low_bits(count: usize) -> u64 {
    (1 << count.min(MAX_MATCHERS)) - 1
}

fn add(matched: &mut ScopeMatch, bit: u64, answer: Answer) {
    if answer == Answer::Yes {
        matched.met |= bit;
    }
    if answer != Answer::No {
        matched.possible |= bit;
    }
}

fn value<'a>(of: &'a [(Box<str>, Box<str>)], name: &str) -> Option<&'a str> {
    of.iter().find(|(other, _)| **other == *name).map(|(_, value)| &**value)
}

impl Matcher {
    /// Whether it asks nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it asks about pods, which only a cluster knows.
    pub fn asks_about_pods(&self) -> bool {
        !self.namespaces.is_empty() || !self.pod_labels.is_empty() || !self.pod_annotations.is_empty()
    }

    fn asks_about_processes(&self) -> bool {
        !self.pids.is_empty() || !self.executables.is_empty()
    }

    fn asks_about_cgroups(&self) -> bool {
        !self.cgroups.is_empty() || !self.containers.is_empty() || self.asks_about_pods()
    }

    fn of_process(&self, lineage: &[u32], executable: &Executable) -> Answer {
        let by_pid = self.pids.is_empty() || self.pids.iter().any(|pid| lineage.contains(pid));
        let by_executable = match executable {
            _ if self.executables.is_empty() => Answer::Yes,
            Executable::Path(path) => self.executables.iter().any(|pattern| is_file(pattern, path)).into(),
            Executable::None => Answer::No,
            Executable::Unknown => Answer::Unknown,
        };
        by_executable.min(by_pid.into())
    }

    fn of_cgroup(&self, cgroup: &Cgroup, pod: PodOf<'_>) -> Answer {
        let by_path = self.cgroups.is_empty() || self.cgroups.iter().any(|pattern| is_below(pattern, &cgroup.path));
        let by_container = if self.containers.is_empty() { Answer::Yes } else { self.of_containers(cgroup, pod) };
        let by_pod = match pod {
            _ if !self.asks_about_pods() => Answer::Yes,
            PodOf::None => Answer::No,
            PodOf::Unknown => Answer::Unknown,
            PodOf::Known(pod) => self.of_pod(pod).into(),
        };
        by_container.min(by_pod).min(by_path.into())
    }

    fn of_containers(&self, cgroup: &Cgroup, pod: PodOf<'_>) -> Answer {
        let is_id = |pattern: &Pattern, id: &str| {
            let text = pattern.as_str();
            pattern.matches(id) || text.len() >= MIN_ID && id.starts_with(text)
        };
        let has_id = |id: &str| self.containers.iter().any(|pattern| is_id(pattern, id));
        if cgroup.containers.iter().any(|id| has_id(id)) {
            return Answer::Yes;
        }
        match pod {
            _ if cgroup.containers.is_empty() => Answer::No,
            PodOf::None => Answer::No,
            PodOf::Unknown => Answer::Unknown,
            PodOf::Known(pod) => {
                // Its name is known once the kubelet has said that it runs.
                pod.container.as_ref().map_or(Answer::Unknown, |name| Pattern::any(&self.containers, name).into())
            }
        }
    }

    fn of_pod(&self, pod: &PodFacts) -> bool {
        let has = |of: &[(Box<str>, Box<str>)], name: &str, pattern: &Pattern| {
            value(of, name).is_some_and(|value| pattern.matches(value))
        };
        (self.namespaces.is_empty() || Pattern::any(&self.namespaces, &pod.namespace))
            && self.pod_labels.iter().all(|(name, pattern)| has(&pod.labels, name, pattern))
            && self.pod_annotations.iter().all(|(name, pattern)| has(&pod.annotations, name, pattern))
    }
}

/// Whether a pattern is that of a file: of its name, unless it has a slash.
fn is_file(pattern: &Pattern, path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    pattern.matches(if pattern.as_str().contains('/') { path } else { name })
}

/// Whether a pattern is that of a cgroup or of one above it.
fn is_below(pattern: &Pattern, path: &str) -> bool {
    let above = path.match_indices('/').map(|(end, _)| if end == 0 { "/" } else { &path[..end] });
    pattern.matches(path) || above.into_iter().any(|above| pattern.matches(above))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use profiler_common::abi::scope::Verdict;

    use super::*;
    use crate::profile::CgroupId;

    fn matcher(field: &str, values: &[&str]) -> Matcher {
        let patterns = || values.iter().map(|&value| Pattern::from(value)).collect();
        let pairs =
            || values.iter().filter_map(|value| value.split_once('=')).map(|(n, v)| (n.to_owned(), v.into())).collect();
        let mut matcher = Matcher::default();
        match field {
            "pids" => matcher.pids = values.iter().map(|pid| pid.parse().expect("a PID")).collect(),
            "executables" => matcher.executables = patterns(),
            "cgroups" => matcher.cgroups = patterns(),
            "containers" => matcher.containers = patterns(),
            "namespaces" => matcher.namespaces = patterns(),
            "labels" => matcher.pod_labels = pairs(),
            "annotations" => matcher.pod_annotations = pairs(),
            other => panic!("{other}"),
        }
        matcher
    }

    fn cgroup(path: &str, containers: &[&str]) -> Cgroup {
        Cgroup {
            id: CgroupId(1),
            path: path.into(),
            containers: containers.iter().map(|&id| id.into()).collect(),
            pod_uid: None,
            unit: None,
            known_since: Instant::now(),
        }
    }

    fn pod() -> PodFacts {
        PodFacts {
            namespace: "shop".into(),
            name: "web-0".into(),
            workload: None,
            container: Some("app".into()),
            labels: vec![("tier".into(), "front".into()), ("team".into(), "a".into())],
            annotations: vec![("profiler/enabled".into(), "false".into())],
        }
    }

    const ID: &str = "0123456789abcdef0123456789abcdef";

    /// Each field that asks about cgroups, with what it matches, what it does not, and what is not known yet.
    #[test]
    fn cgroups_are_matched() {
        let (facts, nameless) = (pod(), PodFacts { container: None, ..pod() });
        let check = |field: &str, values: &[&str], expect: [Answer; 4]| {
            let inside = cgroup("/kubepods/pod1/c/inner", &[ID]);
            let matcher = matcher(field, values);
            let pods = [PodOf::Known(&facts), PodOf::Known(&nameless), PodOf::Unknown, PodOf::None];
            let answers = pods.map(|pod| matcher.of_cgroup(&inside, pod));
            assert_eq!(answers, expect, "{field} {values:?}");
        };
        use Answer::{No, Unknown, Yes};
        check("cgroups", &["/kubepods"], [Yes; 4]);
        check("cgroups", &["/kubepods/pod1/c/inner"], [Yes; 4]);
        check("cgroups", &["/other", "/kube*"], [Yes; 4]);
        check("cgroups", &["/"], [Yes; 4]);
        check("cgroups", &["/kube"], [No; 4]);
        check("cgroups", &["/kubepods/pod1/c/inner/more"], [No; 4]);
        check("containers", &["0123456789ab"], [Yes; 4]);
        check("containers", &["0123456789a", "123456789abcdef"], [No, Unknown, Unknown, No]);
        check("containers", &["a*"], [Yes, Unknown, Unknown, No]);
        check("namespaces", &["shop", "x"], [Yes, Yes, Unknown, No]);
        check("namespaces", &["sho"], [No, No, Unknown, No]);
        check("labels", &["tier=f*", "team=a"], [Yes, Yes, Unknown, No]);
        check("labels", &["tier=f*", "team=b"], [No, No, Unknown, No]);
        check("labels", &["absent=*"], [No, No, Unknown, No]);
        check("annotations", &["profiler/enabled=*"], [Yes, Yes, Unknown, No]);
    }

    /// Executables are known by path or name, PIDs with their children; what cannot be read is not known.
    #[test]
    fn processes_are_matched() {
        let path = |path: &str| Executable::Path(path.to_owned());
        let check = |field: &str, values: &[&str], lineage: &[u32], executable: Executable, expect: Answer| {
            let answer = matcher(field, values).of_process(lineage, &executable);
            assert_eq!(answer, expect, "{field} {values:?} of {lineage:?} {executable:?}");
        };
        use Answer::{No, Unknown, Yes};
        check("executables", &["nginx"], &[], path("/usr/sbin/nginx"), Yes);
        check("executables", &["/usr/*/nginx"], &[], path("/usr/sbin/nginx"), Yes);
        check("executables", &["ngin", "/nginx", "sbin/nginx"], &[], path("/usr/sbin/nginx"), No);
        check("executables", &["*"], &[], Executable::None, No);
        check("executables", &["*"], &[], Executable::Unknown, Unknown);
        check("pids", &["7"], &[7], Executable::Unknown, Yes);
        check("pids", &["7", "8"], &[9], path("/7"), No);
        let both = Matcher { pids: vec![7], ..matcher("executables", &["sh"]) };
        assert_eq!(both.of_process(&[7], &path("/bin/sh")), Yes);
        assert_eq!(both.of_process(&[], &path("/bin/sh")), No);
        assert_eq!(both.of_process(&[], &Executable::Unknown), No);
    }

    /// Rules of all kinds together, as the kernel programs decide by them.
    #[test]
    fn rules_work_together() {
        let facts = pod();
        let check = |rules: &Rules, executable: &str, path: &str, pod: PodOf<'_>, expect: Verdict| {
            let process = rules.of_process(&[], &Executable::Path(executable.to_owned()));
            let verdict = rules.control().decide(process, rules.of_cgroup(&cgroup(path, &[]), pod));
            assert_eq!(verdict, expect, "{executable} in {path} {pod:?}: {rules:?}");
        };
        use Verdict::{InScope, OutOfScope, Undecided};
        let mixed = Rules {
            include: vec![matcher("executables", &["nginx"]), matcher("namespaces", &["shop"])],
            exclude: vec![matcher("cgroups", &["/secret"])],
            ..Rules::default()
        };
        check(&mixed, "/nginx", "/", PodOf::None, InScope);
        check(&mixed, "/nginx", "/pods/x", PodOf::Unknown, InScope);
        check(&mixed, "/nginx", "/secret/x", PodOf::Known(&facts), OutOfScope);
        check(&mixed, "/sh", "/pods/x", PodOf::Known(&facts), InScope);
        check(&mixed, "/sh", "/pods/x", PodOf::Unknown, Undecided);
        check(&mixed, "/sh", "/", PodOf::None, OutOfScope);
        let both = Matcher { executables: vec!["java".into()], ..matcher("namespaces", &["shop"]) };
        let one = Rules { exclude: vec![both], ..Rules::default() };
        check(&one, "/java", "/pods/x", PodOf::Known(&facts), OutOfScope);
        check(&one, "/java", "/pods/x", PodOf::Unknown, Undecided);
        check(&one, "/java", "/", PodOf::None, InScope);
        check(&one, "/sh", "/pods/x", PodOf::Known(&facts), InScope);
        // An annotation holds once it is known, and keeps nobody out before.
        let annotated = Rules { honor_annotation: true, ..Rules::default() };
        check(&annotated, "/sh", "/pods/x", PodOf::Known(&facts), OutOfScope);
        check(&annotated, "/sh", "/pods/x", PodOf::Unknown, InScope);
        check(&annotated, "/sh", "/", PodOf::None, InScope);
        let enabled = PodFacts { annotations: vec![("profiler/enabled".into(), "true".into())], ..pod() };
        check(&annotated, "/sh", "/pods/x", PodOf::Known(&enabled), InScope);
        check(&Rules::default(), "/sh", "/pods/x", PodOf::Known(&facts), InScope);
    }

    /// A part of the scope is no more than the scope, whatever it asks for.
    #[test]
    fn a_part_stays_in_scope() {
        use Verdict::{InScope, OutOfScope, Undecided};
        let facts = pod();
        let part = |rules: Rules, within: Matcher| Rules { within: vec![within], ..rules };
        let check = |rules: &Rules, pod: PodOf<'_>, expect: Verdict| {
            let process = rules.of_process(&[7], &Executable::Path("/bin/app".to_owned()));
            let verdict = rules.control().decide(process, rules.of_cgroup(&cgroup("/pods/x", &[ID]), pod));
            assert_eq!(verdict, expect, "{pod:?}: {rules:?}");
        };
        let all = Rules { honor_annotation: true, ..Rules::default() };
        let one = |field, values: &[&str]| Rules { include: vec![matcher(field, values)], ..Rules::default() };
        let none = |field, values: &[&str]| Rules { exclude: vec![matcher(field, values)], ..Rules::default() };
        check(&part(all.clone(), matcher("containers", &[ID])), PodOf::None, InScope);
        check(&part(all.clone(), matcher("containers", &["fedcba98765432"])), PodOf::None, OutOfScope);
        check(&part(all.clone(), matcher("containers", &[ID])), PodOf::Known(&facts), OutOfScope);
        check(&part(all.clone(), matcher("pids", &["7"])), PodOf::Known(&facts), OutOfScope);
        check(&part(all, matcher("namespaces", &["shop"])), PodOf::Unknown, Undecided);
        check(&part(none("pids", &["7"]), matcher("containers", &[ID])), PodOf::None, OutOfScope);
        check(&part(none("pids", &["8"]), matcher("containers", &[ID])), PodOf::None, InScope);
        check(&part(none("namespaces", &["shop"]), matcher("pids", &["7"])), PodOf::Unknown, Undecided);
        check(&part(one("executables", &["app"]), matcher("pids", &["7"])), PodOf::None, InScope);
        check(&part(one("executables", &["other"]), matcher("pids", &["7"])), PodOf::None, OutOfScope);
        check(&part(one("executables", &["app"]), matcher("pids", &["8"])), PodOf::None, OutOfScope);
    }

    /// What nobody knows of what is new is asked of the agent first.
    #[test]
    fn new_ones_are_undecided() {
        let rules = Rules {
            include: vec![matcher("executables", &["a"]), matcher("pids", &["1"])],
            exclude: vec![matcher("namespaces", &["b"])],
            within: vec![matcher("containers", &["c"])],
            honor_annotation: true,
        };
        let control = rules.control();
        assert_eq!((control.include, control.exclude, control.within), (0b011, 0b100 | POD_BIT, 0b1000));
        assert_eq!((control.unknown_after_exec, control.unknown_when_made), (0b001, 0b1100));
        assert_eq!((control.any_process, control.any_cgroup), (0b1100 | POD_BIT, 0b011));
    }
}

//! What the kernel's maps are told.

use std::{
    collections::BTreeMap,
    process::{Child, Command},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, UNIX_EPOCH},
};

use profiler_common::abi::process::ProcessKey;
use zerocopy::IntoBytes as _;

use super::*;
use crate::{
    pattern::Pattern,
    schedule::{Schedule, Settings},
};

/// Maps with room for so many entries each.
struct Maps {
    room: usize,
    control: ScopeControl,
    states: Vec<u32>,
    cgroups: BTreeMap<u64, ScopeMatch>,
    processes: BTreeMap<u32, ScopeMatch>,
}

impl Default for Maps {
    fn default() -> Self {
        Self {
            room: 10_000,
            control: ScopeControl::default(),
            states: Vec::new(),
            cgroups: BTreeMap::new(),
            processes: BTreeMap::new(),
        }
    }
}

fn set<K: Ord>(room: usize, map: &mut BTreeMap<K, ScopeMatch>, key: K, matched: ScopeMatch) -> io::Result<()> {
    if map.len() >= room && !map.contains_key(&key) {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    map.insert(key, matched);
    Ok(())
}

impl ScopeMaps for Maps {
    fn set_control(&mut self, control: &ScopeControl) -> io::Result<()> {
        self.control = *control;
        self.states.push(control.state);
        Ok(())
    }

    fn set_cgroup(&mut self, id: u64, matched: &ScopeMatch) -> io::Result<()> {
        set(self.room, &mut self.cgroups, id, *matched)
    }

    fn remove_cgroup(&mut self, id: u64) -> io::Result<()> {
        self.cgroups.remove(&id);
        Ok(())
    }

    fn cgroups(&self) -> io::Result<Vec<u64>> {
        Ok(self.cgroups.keys().copied().collect())
    }

    fn set_process(&mut self, tgid: u32, matched: &ScopeMatch) -> io::Result<()> {
        set(self.room, &mut self.processes, tgid, *matched)
    }

    fn has_process(&self, tgid: u32) -> bool {
        self.processes.contains_key(&tgid)
    }

    fn remove_process(&mut self, tgid: u32) -> io::Result<()> {
        self.processes.remove(&tgid);
        Ok(())
    }

    fn processes(&self) -> io::Result<Vec<u32>> {
        Ok(self.processes.keys().copied().collect())
    }
}

/// Pods by the UIDs of their cgroups.
#[derive(Default)]
struct Known {
    version: AtomicU64,
    pods: Mutex<BTreeMap<String, PodFacts>>,
}

impl Known {
    fn put(&self, uid: &str, facts: PodFacts) {
        self.pods.lock().expect("a lock").insert(uid.to_owned(), facts);
        self.version.fetch_add(1, Ordering::Relaxed);
    }
}

impl Pods for Arc<Known> {
    fn version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    fn of(&self, cgroup: &Cgroup) -> Option<PodFacts> {
        self.pods.lock().expect("a lock").get(&**cgroup.pod_uid.as_ref()?).cloned()
    }
}

fn cgroup(id: u64, path: &str, pod_uid: Option<&str>) -> Arc<Cgroup> {
    Arc::new(Cgroup {
        id: CgroupId(id),
        path: path.into(),
        containers: Box::default(),
        pod_uid: pod_uid.map(Into::into),
        unit: None,
        known_since: Instant::now(),
    })
}

fn patterns(texts: &[&str]) -> Vec<Pattern> {
    texts.iter().map(|&text| text.into()).collect()
}

fn below(path: &str) -> Matcher {
    Matcher { cgroups: patterns(&[path]), ..Matcher::default() }
}

fn excluding(exclude: Vec<Matcher>) -> Rules {
    Rules { exclude, ..Rules::default() }
}

impl Scope<Maps> {
    fn verdict(&self, process: ScopeMatch, cgroup: u64) -> Verdict {
        self.maps.control.decide(process, self.maps.cgroups.get(&cgroup).copied().unwrap_or_default())
    }

    fn verdict_of(&self, tgid: u32) -> Verdict {
        self.maps.control.decide(self.maps.processes.get(&tgid).copied().unwrap_or_default(), ScopeMatch::default())
    }
}

/// Rules are changed while nothing is decided, and what they do not need is not there: without any, the programs do not even
/// look.
#[test]
fn rules_are_changed_in_order() {
    let mut scope = Scope::new(Maps::default(), Rules::default(), None);
    let all = [cgroup(1, "/a", None), cgroup(2, "/b/c", None)];
    scope.apply(Rules::default(), all.iter().cloned());
    assert!(scope.maps.states.is_empty());
    let check = |scope: &mut Scope<Maps>, rules: Rules, expect: [Verdict; 2]| {
        scope.maps.states.clear();
        scope.apply(rules, all.iter().cloned());
        assert_eq!([1, 2].map(|id| scope.verdict(ScopeMatch::default(), id)), expect, "{:?}", scope.rules);
        let last = scope.maps.states.pop();
        assert!(scope.maps.states.iter().all(|&state| state == state::CHANGING), "{:?}", scope.maps.states);
        last
    };
    use Verdict::{InScope, OutOfScope};
    assert_eq!(check(&mut scope, excluding(vec![below("/b")]), [InScope, OutOfScope]), Some(state::LIMITED));
    let include = Rules { include: vec![below("/b")], ..Rules::default() };
    assert_eq!(check(&mut scope, include, [OutOfScope, InScope]), Some(state::LIMITED));
    let both = excluding(vec![below("/x"), below("/a")]);
    assert_eq!(check(&mut scope, both, [OutOfScope, InScope]), Some(state::LIMITED));
    assert_eq!(scope.maps.cgroups.len(), 1);
    assert_eq!(check(&mut scope, Rules::default(), [InScope, InScope]), Some(state::OPEN));
    assert!(scope.maps.cgroups.is_empty());
    // Threads have run unseen meanwhile.
    assert_eq!(scope.maps.control.has_gaps, 1);
}

/// Cgroups come and go, also those for which the kernel programs have made an entry.
#[test]
fn cgroups_are_followed() {
    let mut scope = Scope::new(Maps::default(), Rules::default(), None);
    scope.apply(excluding(vec![below("/b")]), [].into_iter());
    let undecided = ScopeMatch::default().with_unknown(1);
    for id in [1, 2, 3] {
        scope.maps.set_cgroup(id, &undecided).expect("room");
    }
    assert_eq!(scope.verdict(ScopeMatch::default(), 1), Verdict::Undecided);
    let all = [cgroup(1, "/a", None), cgroup(2, "/b/c", None)];
    scope.cgroups_changed(&all, &[]);
    assert_eq!(scope.verdict(ScopeMatch::default(), 1), Verdict::InScope);
    assert_eq!(scope.verdict(ScopeMatch::default(), 2), Verdict::OutOfScope);
    // The notice of the third was lost.
    scope.look_at_cgroups(all.iter().cloned());
    assert_eq!(scope.maps.cgroups().expect("keys"), [2]);
    scope.cgroups_changed(&[], &[CgroupId(2)]);
    assert!(scope.maps.cgroups.is_empty() && scope.cgroups.is_empty());
}

/// Pods are looked at again when they change, and only then. Without a rule, an annotation is all that counts.
#[test]
fn pods_are_followed() {
    let known = Arc::new(Known::default());
    let rules = Rules { honor_annotation: true, ..Rules::default() };
    let mut scope = Scope::new(Maps::default(), rules.clone(), Some(Box::new(Arc::clone(&known))));
    let all = [cgroup(1, "/kubepods/pod1", Some("u1")), cgroup(2, "/kubepods/pod2", Some("u2"))];
    scope.apply(rules, all.iter().cloned());
    assert!(scope.follows_pods() && !scope.is_limited() && scope.maps.control.has_gaps == 0);
    let annotated =
        |value: &str| PodFacts { annotations: vec![("profiler/enabled".into(), value.into())], ..PodFacts::default() };
    let mut check = |uid: &str, facts: PodFacts, expect: [bool; 2]| {
        known.put(uid, facts);
        scope.follow_pods(all.iter().cloned());
        assert_eq!([1, 2].map(|id| scope.includes(7, Some(CgroupId(id)))), expect, "{uid}");
        assert_eq!(scope.is_limited(), expect.contains(&false));
    };
    check("u1", annotated("true"), [true, true]);
    check("u2", annotated("false"), [true, false]);
    check("u1", annotated("false"), [false, false]);
    check("u2", PodFacts::default(), [false, true]);
    check("u1", PodFacts::default(), [true, true]);

    // Where a rule asks, a pod is kept out until it is known.
    let namespace = |name: &str| Matcher { namespaces: patterns(&[name]), ..Matcher::default() };
    scope.apply(excluding(vec![namespace("private")]), all.iter().cloned());
    scope.cgroups_changed(&[cgroup(3, "/kubepods/pod3", Some("u3")), cgroup(4, "/system.slice", None)], &[]);
    let verdicts = |scope: &Scope<Maps>| [1, 3, 4].map(|id| scope.verdict(ScopeMatch::default(), id));
    assert_eq!(verdicts(&scope), [Verdict::InScope, Verdict::Undecided, Verdict::InScope]);
    scope.apply(Rules { include: vec![namespace("shop")], ..Rules::default() }, all.iter().cloned());
    scope.cgroups_changed(&[cgroup(3, "/kubepods/pod3", Some("u3")), cgroup(4, "/system.slice", None)], &[]);
    assert_eq!(verdicts(&scope), [Verdict::OutOfScope, Verdict::Undecided, Verdict::OutOfScope]);
}

fn replica(workload: Option<&str>, name: &str) -> PodFacts {
    PodFacts { name: name.into(), workload: workload.map(Into::into), ..PodFacts::default() }
}

/// A node with pods, and its agent.
struct Node {
    schedule: Schedule,
    scope: Scope<Maps>,
    cgroups: Vec<Arc<Cgroup>>,
}

impl Node {
    fn new(name: &str, settings: &Settings, pods: Vec<(u64, PodFacts)>, now: SystemTime) -> Self {
        let schedule = Schedule::new(settings, name).expect("no list of members");
        let (known, uid) = (Arc::new(Known::default()), |id: &u64| format!("u{id}"));
        let cgroups: Vec<_> =
            pods.iter().map(|(id, _)| cgroup(*id, &format!("/kubepods/{id}"), Some(&uid(id)))).collect();
        for (id, facts) in pods {
            known.put(&uid(&id), facts);
        }
        let mut scope = Scope::new(Maps::default(), Rules::default(), Some(Box::new(known)));
        scope.set_turns(schedule.replicas(), now);
        scope.apply(Rules::default(), cgroups.iter().cloned());
        Self { schedule, scope, cgroups }
    }

    /// What a sample of a cgroup stands for, if one is taken.
    fn weight(&mut self, now: SystemTime, id: u64) -> Option<f64> {
        if self.scope.turns_left(now) == Some(Duration::ZERO) {
            self.scope.change_turns(now, self.cgroups.iter().cloned());
        }
        let phase = self.schedule.at(now);
        let is_collected = phase.collects && self.scope.verdict(ScopeMatch::default(), id) == Verdict::InScope;
        is_collected.then(|| phase.scale * self.scope.weight(CgroupId(id)) as f64)
    }
}

/// Twenty replicas on five nodes, one at a time for 10 s of a minute: in an hour each is collected for its share of the time,
/// and scaled they used what they used.
#[test]
fn replicas_take_turns() {
    const FAIR: f64 = 3600.0 / 20.0 * 10.0 / 60.0;
    let settings = Settings { collect: Duration::from_secs(10), replicas: Some(20), ..Settings::default() };
    // (A whole number of hours since 1970, so that cycles of 20 minutes begin with it.)
    let begin = UNIX_EPOCH + Duration::from_secs(472_222 * 3600);
    // (A Deployment's pods have names that say nothing, and groups of any size; a StatefulSet's are numbered.)
    for (workload, of_pod) in [("shop/StatefulSet/web", "web-"), ("shop/Deployment/web", "web-6c1f9-x")] {
        let of_node = |node: u64| (0..4).map(move |pod| node * 4 + pod);
        let pods = |node| of_node(node).map(|id| (id, replica(Some(workload), &format!("{of_pod}{id}")))).collect();
        let mut nodes: Vec<Node> =
            (0..5).map(|node| Node::new(&format!("n{node}.example"), &settings, pods(node), begin)).collect();
        let (mut seconds, mut used, mut scaled, mut at_once) = ([0.0; 20], [0.0; 20], [0.0; 20], 0);
        for second in 0..3600 {
            let now = begin + Duration::from_secs(second);
            let mut collected = 0;
            for id in 0..20 {
                // CPUs: each uses another amount, which goes up and down.
                let phase = second as f64 / (60.0 * (7 + id % 5) as f64) * std::f64::consts::TAU;
                let cpus = (0.2 + 0.15 * id as f64) * (1.0 + 0.2 * (phase + id as f64).sin());
                let index = id as usize;
                used[index] += cpus;
                if let Some(weight) = nodes[index / 4].weight(now, id) {
                    seconds[index] += 1.0;
                    scaled[index] += weight * cpus;
                    collected += 1;
                }
            }
            at_once = at_once.max(collected);
        }
        let (all_used, all_scaled) = (used.iter().sum::<f64>(), scaled.iter().sum::<f64>());
        println!("{workload}: {seconds:?} s each, {at_once} at once; used {all_used:.0} s, scaled {all_scaled:.0}");
        assert!(seconds.iter().all(|seconds| (seconds / FAIR - 1.0).abs() <= 0.05), "{seconds:?}");
        assert!((all_scaled / all_used - 1.0).abs() <= 0.05, "{all_scaled} of {all_used}");
        assert!(of_pod != "web-" || at_once == 1, "{at_once}");
    }
}

/// What is no replica is always collected and counts once; a pod that is not known yet is kept out until it is. What a
/// cgroup was stays so until it is gone.
#[test]
fn only_replicas_take_turns() {
    let settings = Settings { every: Duration::from_secs(5), replicas: Some(2), ..Settings::default() };
    let begin = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let pods = vec![(1, replica(None, "alone")), (2, replica(Some("shop/Deployment/web"), "web-0"))];
    let mut node = Node::new("n", &settings, pods, begin);
    let new = [cgroup(3, "/system.slice", None), cgroup(4, "/kubepods/pod4", Some("u4"))];
    node.scope.cgroups_changed(&new, &[]);
    node.cgroups.extend(new);
    assert_eq!(node.scope.maps.control.unknown_when_made, rules::POD_BIT);
    let mut turns = Vec::new();
    for slot in 0..20 {
        let now = begin + Duration::from_secs(5 * slot + 1);
        assert_eq!([1, 3, 4].map(|id| node.weight(now, id)), [Some(1.0), Some(1.0), None]);
        assert_eq!(node.scope.verdict(ScopeMatch::default(), 4), Verdict::Undecided);
        turns.push(node.weight(now, 2));
        assert_eq!(node.scope.turns_left(now), Some(Duration::from_secs(4)));
    }
    // (The first slot's number is even: a cycle begins.)
    assert!(turns.chunks(2).all(|cycle| cycle.contains(&Some(2.0)) && cycle.contains(&None)), "{turns:?}");
    assert_eq!(node.scope.weight(CgroupId(2)), 2);
    node.scope.cgroups_changed(&[], &[CgroupId(2)]);
    assert_eq!(node.scope.weight(CgroupId(2)), 1);

    // Without turns everything is as if there had never been any.
    node.scope.set_turns(None, begin);
    node.scope.apply(Rules::default(), node.cgroups.iter().cloned());
    assert_eq!([1, 2, 3, 4].map(|id| node.weight(begin, id)), [Some(1.0); 4]);
    assert!(node.scope.maps.cgroups.is_empty() && !node.scope.is_limited() && node.scope.turns_left(begin).is_none());
}

/// A program that runs until it is dropped.
struct Sleep(Child);

impl Sleep {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().expect("a program"))
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        // It has not ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn notice(kind: NoticeKind, tgid: u32) -> Vec<u8> {
    let process = ProcessKey { start_time_ns: 1, tgid, exec_id: 1 };
    NoticeHeader { kind: kind as u32, reserved: 0, process }.as_bytes().to_vec()
}

fn fork(parent: u32, child: u32) -> Vec<u8> {
    let key = |tgid| ProcessKey { start_time_ns: 1, tgid, exec_id: 1 };
    let header = NoticeHeader { kind: NoticeKind::Fork as u32, reserved: 0, process: key(parent) };
    ForkNotice { header, child: key(child) }.as_bytes().to_vec()
}

/// Real processes: those that are there, those that come, those that execute another program, and those that end.
#[test]
fn processes_are_followed() {
    let program = Sleep::start();
    let (own, tgid) = (std::process::id(), program.0.id());
    let mut scope = Scope::new(Maps::default(), Rules::default(), None);
    let executables = Matcher { executables: patterns(&["sleep"]), ..Matcher::default() };
    // (The child may not have executed its program yet.)
    let deadline = Instant::now() + Duration::from_secs(60);
    while proc_fs::executable(tgid) == proc_fs::executable(own) && Instant::now() < deadline {
        std::thread::yield_now();
    }
    scope.apply(excluding(vec![executables.clone()]), [].into_iter());
    assert_eq!([own, tgid].map(|tgid| scope.verdict_of(tgid)), [Verdict::InScope, Verdict::OutOfScope]);
    assert!(!scope.includes(tgid, None) && scope.includes(own, None));

    // As the kernel programs do at `execve`; a notice of each kind leads to the same.
    let undecided = ScopeMatch::default().with_unknown(1);
    for (notice, tgid, expect) in [
        (notice(NoticeKind::Exec, own), own, Verdict::InScope),
        (notice(NoticeKind::Exec, tgid), tgid, Verdict::OutOfScope),
        (fork(own, tgid), tgid, Verdict::OutOfScope),
        (fork(1, own), own, Verdict::InScope),
    ] {
        scope.maps.set_process(tgid, &undecided).expect("room");
        assert_eq!(scope.verdict_of(tgid), Verdict::Undecided);
        scope.notice(&notice);
        assert_eq!(scope.verdict_of(tgid), expect);
    }
    // Nonsense changes nothing.
    scope.notice(&[]);
    scope.notice(&fork(own, tgid)[..30]);

    // One that is gone already stays what the kernel programs made of it, until its last samples have been read.
    let absent = u32::MAX - 1;
    scope.maps.set_process(absent, &undecided).expect("room");
    scope.notice(&notice(NoticeKind::Exec, absent));
    assert_eq!(scope.verdict_of(absent), Verdict::Undecided);
    scope.notice(&notice(NoticeKind::Exit, absent));
    scope.notice(&notice(NoticeKind::Exit, tgid));
    scope.end_drain();
    assert_eq!([absent, tgid].map(|tgid| scope.verdict_of(tgid)), [Verdict::Undecided, Verdict::OutOfScope]);
    scope.end_drain();
    assert!(!scope.maps.processes.contains_key(&absent) && !scope.maps.processes.contains_key(&tgid));

    // By PID, with children; another rule's bits do not remain.
    let pids = Matcher { pids: vec![own], ..Matcher::default() };
    scope.apply(excluding(vec![executables, pids]), [].into_iter());
    let child = Sleep::start();
    scope.notice(&fork(own, child.0.id()));
    let of_pid = |scope: &Scope<Maps>, tgid| scope.maps.processes[&tgid].met & 0b10 != 0;
    assert!([own, tgid, child.0.id()].iter().all(|&tgid| of_pid(&scope, tgid)));
    scope.apply(Rules::default(), [].into_iter());
    assert!(scope.maps.processes.is_empty() && scope.processes.is_empty());
}

/// What finds no room is counted, and the rest holds.
#[test]
fn full_maps_are_counted() {
    let mut scope = Scope::new(Maps { room: 2, ..Maps::default() }, Rules::default(), None);
    let all: Vec<_> = (1..=5).map(|id| cgroup(id, &format!("/b/{id}"), None)).collect();
    scope.apply(excluding(vec![below("/b")]), all.iter().cloned());
    assert_eq!(scope.stats(), ScopeStats { cgroups: 2, processes: 0, refused: 3 });
    let out = all.iter().filter(|cgroup| !scope.includes(1, Some(cgroup.id))).count();
    assert_eq!(out, 2);
}

//! Following pods, against a server that misbehaves as no real one can be made to at will: it answers each connection with
//! the next part of a script.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use super::*;
use crate::profile::CgroupId;

/// A hang guard, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the server does with a request.
enum Answer {
    /// Status and body; the connection ends behind it.
    Whole(u16, String),
    /// Status and body, and nothing more until the test is over.
    Open(u16, String),
}

struct Server {
    answers: Sender<Answer>,
    /// The requests' first lines.
    requests: Receiver<String>,
    kubeconfig: PathBuf,
}

impl Server {
    fn start(name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let kubeconfig = std::env::temp_dir().join(format!("profiler-kubeconfig-{name}-{}", std::process::id()));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \
             'http://127.0.0.1:{port}'}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, \
             user: {{token: hunter2}}}}]\n"
        );
        std::fs::write(&kubeconfig, text).expect("a file");
        let (answers, script) = channel();
        let (request_sender, requests) = channel();
        thread::spawn(move || serve(&listener, &script, &request_sender));
        Self { answers, requests, kubeconfig }
    }

    fn will(&self, answer: Answer) {
        self.answers.send(answer).expect("the server runs");
    }

    fn request(&self) -> String {
        self.requests.recv_timeout(PATIENCE).expect("a request")
    }

    fn pods(&self, patience: Patience) -> Pods {
        let settings = Settings {
            access: Access::Kubeconfig(self.kubeconfig.clone()),
            node: "n1".to_owned(),
            grace: Duration::from_secs(600),
            wanted: Wanted::default(),
        };
        Pods::start_with(settings, patience).expect("a thread")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it is gone already.
        let _ = std::fs::remove_file(&self.kubeconfig);
    }
}

fn serve(listener: &TcpListener, script: &Receiver<Answer>, requests: &Sender<String>) {
    let mut open = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while reader.read_line(&mut head).is_ok_and(|len| len > 2) {}
        if head.is_empty() || requests.send(head.lines().next().unwrap_or_default().to_owned()).is_err() {
            continue;
        }
        let Ok(answer) = script.recv() else { return };
        let mut stream: TcpStream = reader.into_inner();
        let (Answer::Whole(status, body) | Answer::Open(status, body)) = &answer;
        let head = format!("HTTP/1.1 {status} x\r\nconnection: close\r\n\r\n");
        // An error means that the client has left.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
        if matches!(answer, Answer::Open(..)) {
            open.push(stream);
        }
    }
}

fn pod(uid: &str, container: &str, version: u32) -> String {
    format!(
        r#"{{"metadata":{{"name":"pod-{uid}","namespace":"ns","uid":"{uid}","resourceVersion":"{version}"}},
        "status":{{"containerStatuses":[{{"name":"app","containerID":"containerd://{container}"}}]}}}}"#
    )
    .replace('\n', "")
}

fn list(version: u32, pods: &[String]) -> String {
    let pods = pods.join(",");
    format!(r#"{{"kind":"PodList","metadata":{{"resourceVersion":"{version}"}},"items":[{pods}]}}"#)
}

fn event(kind: &str, object: &str) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

fn status(code: u16, message: &str) -> String {
    format!(r#"{{"kind":"Status","status":"Failure","code":{code},"message":"{message}"}}"#)
}

fn short() -> Patience {
    Patience {
        answer: Duration::from_millis(500),
        silence: Duration::from_millis(500),
        pause: [Duration::from_millis(10), Duration::from_millis(50)],
    }
}

/// Waits until it is so.
fn until(pods: &Pods, what: &str, is_so: impl Fn(&Snapshot) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so(&pods.snapshot()) {
        assert!(Instant::now() < deadline, "{what}: {:?}", pods.snapshot());
        thread::sleep(Duration::from_millis(5));
    }
}

/// One list of what the server has at hand, for this node alone; then one watch from there, and the next from where it ended.
#[test]
fn one_list_then_watches() {
    let server = Server::start("watches");
    let pods = server.pods(Patience { pause: [Duration::ZERO; 2], ..Patience::default() });
    server.will(Answer::Whole(200, list(5, &[pod("u1", "c1", 3)])));
    let bookmark = event("BOOKMARK", r#"{"kind":"Pod","metadata":{"resourceVersion":"9","uid":""}}"#);
    let events = [event("ADDED", &pod("u2", "c2", 7)), event("DELETED", &pod("u1", "c1", 8)), bookmark];
    server.will(Answer::Whole(200, events.concat()));
    server.will(Answer::Open(200, event("SOMETHING", r#"{"metadata":{}}"#) + &event("MODIFIED", &pod("u2", "c3", 10))));
    let first = server.request();
    assert!(first.starts_with("GET /api/v1/pods?"), "{first}");
    assert!(first.contains("fieldSelector=spec.nodeName%3Dn1") && first.contains("resourceVersion=0"), "{first}");
    assert!(!first.contains("limit=") && !first.contains("watch="), "{first}");
    let second = server.request();
    assert!(second.contains("watch=true") && second.contains("resourceVersion=5"), "{second}");
    assert!(
        second.contains("allowWatchBookmarks=true") && second.contains("fieldSelector=spec.nodeName%3Dn1"),
        "{second}"
    );
    let third = server.request();
    assert!(third.contains("watch=true") && third.contains("resourceVersion=9"), "{third}");
    until(&pods, "the last event", |known| known.containers == 3);
    let snapshot = pods.snapshot();
    assert_eq!((snapshot.state, snapshot.lists, snapshot.watches, snapshot.errors), (WatchState::Synced, 1, 2, 0));
    let names = pods.container("c3").expect("a container that is known");
    assert_eq!((names.pod.as_str(), names.container.as_deref()), ("pod-u2", Some("app")));
    assert!(pods.container("c1").is_some(), "a pod that has just gone");
}

/// Where the server has forgotten what changed, there is another list, and nothing is forgotten here.
#[test]
fn lists_again_when_the_watch_has_expired() {
    let server = Server::start("expired");
    let pods = server.pods(short());
    server.will(Answer::Whole(200, list(5, &[pod("u1", "c1", 3)])));
    server.will(Answer::Whole(200, event("ERROR", &status(410, "too old resource version"))));
    server.will(Answer::Whole(200, list(50, &[pod("u2", "c2", 40)])));
    server.will(Answer::Whole(410, status(410, "Expired")));
    server.will(Answer::Whole(200, list(60, &[pod("u2", "c2", 40)])));
    server.will(Answer::Open(200, String::new()));
    let versions: Vec<_> = (0..6).map(|_| server.request().contains("watch=true")).collect();
    assert_eq!(versions, [false, true, false, true, false, true]);
    until(&pods, "the third list", |known| known.watches == 3);
    assert!(pods.container("c1").is_some() && pods.container("c2").is_some());
    assert_eq!((pods.snapshot().errors, pods.snapshot().lists), (0, 3));
}

/// What is refused is said with the way out, and never with secrets; labels that are known stay known.
#[test]
fn failures_say_what_to_do() {
    let server = Server::start("failures");
    let pods = server.pods(short());
    let check = |answer: Answer, expected: &str| {
        server.will(answer);
        until(&pods, expected, |known| known.last_error.as_ref().is_some_and(|error| error.contains(expected)));
        let snapshot = pods.snapshot();
        assert_eq!(snapshot.state, WatchState::Failing);
        assert!(!snapshot.last_error.expect("an error").contains("hunter2"));
    };
    check(Answer::Whole(403, status(403, "pods is forbidden: User x cannot list")), "`list` and `watch` of `pods`");
    check(Answer::Whole(401, status(401, "Unauthorized")), "credentials (401)");
    check(Answer::Whole(503, "no JSON".to_owned()), "refuses (503)");
    check(Answer::Whole(200, "<html>".to_owned()), "cannot be read");
    check(Answer::Whole(200, r#"{"items":[{"metadata""#.to_owned()), "cannot be read");
    check(Answer::Open(200, r#"{"items":["#.to_owned()), "has not answered");
    server.will(Answer::Whole(200, list(5, &[pod("u1", "c1", 3), "{}".to_owned()])));
    server.will(Answer::Whole(200, "no event\n".to_owned()));
    until(&pods, "what came through", |known| known.pods == 1 && known.pods_malformed == 1);
    drop(server);
    until(&pods, "the end", |known| known.state == WatchState::Failing);
    assert!(pods.container("c1").is_some());
}

/// A watch in which nothing happens is given up, and the next one goes on from there.
#[test]
fn silent_watches_are_replaced() {
    let server = Server::start("silent");
    let pods = server.pods(short());
    server.will(Answer::Whole(200, list(5, &[])));
    server.will(Answer::Open(200, String::new()));
    server.will(Answer::Open(200, event("ADDED", &pod("u1", "c1", 7))));
    server.will(Answer::Open(200, String::new()));
    let requests: Vec<_> = (0..4).map(|_| server.request()).collect();
    assert!(requests[2].contains("resourceVersion=5") && requests[3].contains("resourceVersion=7"), "{requests:?}");
    assert_eq!((pods.snapshot().lists, pods.snapshot().errors), (1, 0));
}

fn cgroup(container: &str, known_since: Instant) -> Arc<Cgroup> {
    Arc::new(Cgroup {
        id: CgroupId(1),
        path: "/".into(),
        containers: [container.into()].into(),
        pod_uid: Some("u1".into()),
        unit: None,
        known_since,
    })
}

/// New containers are waited for until they are known, and not where that cannot help.
#[test]
fn waits_for_what_may_come() {
    let now = Instant::now();
    let shared = Arc::new(Shared::new("n1".to_owned(), Duration::ZERO));
    let (stop, _stopped) = oneshot::channel();
    let pods = Pods { shared: Arc::clone(&shared), _stop: Arc::new(stop) };
    let new = cgroup("c1", now);
    shared.synced();
    assert!(pods.wait_for(&[cgroup("c9", now)], Duration::from_millis(20)), "until it is not new any more");
    assert!(!pods.wait_for(&[], PATIENCE), "nothing is missing");
    assert!(!pods.wait_for(&[Arc::clone(&new)], Duration::ZERO), "nothing is waited for");
    thread::scope(|scope| {
        scope.spawn(|| {
            shared.put(pod::parse(pod("u1", "c0", 1).as_bytes(), &Wanted::default()));
            thread::sleep(Duration::from_millis(50));
            shared.put(pod::parse(pod("u1", "c1", 2).as_bytes(), &Wanted::default()));
        });
        pods.wait_for(&[Arc::clone(&new)], PATIENCE);
        assert!(pods.find(&new).is_some_and(|found| found.container.is_some()));
    });
    shared.failed(&ApiError::Expired);
    assert!(!pods.wait_for(&[cgroup("c2", Instant::now())], PATIENCE), "the server does not answer");
}

/// A list of 500 pods as large as real ones: what is held while it arrives, and kept of it, is a fraction of it.
#[test]
fn five_hundred_pods_take_little() {
    let padding = "x".repeat(8000);
    let items: Vec<String> = (0..500)
        .map(|number| {
            format!(
                r#"{{"metadata":{{"name":"web-7d4b9c6f5d-{number:05}","namespace":"team-{}","uid":"{number:036}",
                "labels":{{"app.kubernetes.io/name":"web","pod-template-hash":"7d4b9c6f5d"}},
                "annotations":{{"kubectl.kubernetes.io/last-applied-configuration":"{padding}"}},
                "ownerReferences":[{{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"web-7d4b9c6f5d","controller":true}}],
                "managedFields":[{{"manager":"kubelet","fieldsV1":{{"f:status":{{"f:x":"{}"}}}}}}]}},
                "spec":{{"containers":[{{"name":"app","image":"registry.example/team/web:1.{number}"}},
                {{"name":"proxy","image":"registry.example/mesh/proxy:2"}}]}},
                "status":{{"containerStatuses":[
                {{"name":"app","containerID":"containerd://{number:064x}","imageID":"registry.example/team/web@sha256:{number:064x}"}},
                {{"name":"proxy","containerID":"containerd://a{number:063x}","imageID":"registry.example/mesh/proxy@sha256:{:064x}"}}]}}}}"#,
                number % 20, &padding[..1500], 7
            )
        })
        .collect();
    let text = list(1, &items);
    assert!(text.len() > 5_000_000);
    let shared = Shared::new("n1".to_owned(), Duration::from_secs(60));
    let mut list = list::Items::default();
    for piece in text.as_bytes().chunks(16 << 10) {
        list.push(piece, |object| shared.put(pod::parse(object, &Wanted::default()))).expect("a list");
    }
    let known = shared.known();
    let (pods, containers, bytes, refused) = known.index.sizes();
    println!("{pods} pods of {} bytes in all: {bytes} bytes are kept", text.len());
    assert_eq!((pods, containers, refused), (500, 1000, 0));
    assert!(bytes < 2 << 20, "{bytes}");
}

//! A Kubernetes cluster of one program: the real API server, and etcd behind it, on free ports of 127.0.0.1.
//!
//! There are no controllers and no kubelets: tests make objects and their status themselves, and nothing else changes
//! them. It ends when it is dropped.

mod audit;
mod client;
mod load;
pub mod objects;

pub use self::{
    audit::Asked,
    client::{Answer, Client},
    load::{Changes, LoadedPod, PodLoad},
};

use std::{
    fs::{self, OpenOptions},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    Background, ask_within, eventually, free_port,
    receiver::{Authority, Identity, Validity},
    run, scratch, stderr, workspace,
};

/// Longer than anything here takes.
const GUARD: Duration = Duration::from_secs(180);
/// The token of who may do everything.
const ADMIN: &str = "the-tests-own";
/// What is left out: it would ask for a service account that nothing here makes, for each pod.
const WITHOUT_ADMISSION: &str = "ServiceAccount";

/// A cluster that runs.
pub struct Cluster {
    folder: PathBuf,
    /// Where the API server listens.
    port: u16,
    etcd_port: u16,
    authority: Authority,
    own: Identity,
    /// Signs the tokens of service accounts.
    service_accounts: Identity,
    admin: Client,
    etcd: Option<Background>,
    server: Option<Background>,
}

/// A service account, and what a process needs to be it.
#[derive(Clone, Debug)]
pub struct Account {
    /// Its user, as RBAC and the audit log have it.
    pub user: String,
    /// Its token.
    pub token: String,
    /// A file with the token, as a pod has it.
    pub token_file: PathBuf,
    /// A file with the API server's authority, as a pod has it.
    pub ca_file: PathBuf,
    /// A file for `kubectl --kubeconfig`, with the namespace as its default.
    pub kubeconfig: PathBuf,
}

impl Cluster {
    /// Starts one with its files in a test's scratch folder; `None` where it could not be built.
    pub fn start(test: &str) -> Option<Self> {
        if !program("kube-apiserver").is_file() {
            eprintln!(
                "SKIPPED: there is no API server of Kubernetes (`cargo xtask setup` builds it where Go is new enough)"
            );
            return None;
        }
        let folder = scratch(test);
        let authority = Authority::new(&folder, "cluster");
        let own = authority.sign("kube-apiserver", "DNS:localhost,IP:127.0.0.1", Validity::Now);
        let service_accounts = authority.sign("service-accounts", "DNS:service-accounts", Validity::Now);
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).expect("a file for the API server");
        write("audit-policy.yaml", audit::POLICY);
        write("tokens.csv", &format!("{ADMIN},admin,admin,system:masters\n"));
        let port = free_port();
        let admin = Client::new(port, &authority.file(), ADMIN);
        let mut cluster = Self {
            folder,
            port,
            etcd_port: free_port(),
            authority,
            own,
            service_accounts,
            admin,
            etcd: None,
            server: None,
        };
        cluster.kubeconfig("admin", ADMIN, "default");
        cluster.start_etcd();
        cluster.start_server();
        Some(cluster)
    }

    /// Where the API server is, `https://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The API server's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The file of the authority that the API server's certificate is of.
    pub fn ca_file(&self) -> PathBuf {
        self.authority.file()
    }

    /// The API server's and etcd's PIDs; 0 for what does not run.
    pub fn pids(&self) -> [u32; 2] {
        [&self.server, &self.etcd].map(|process| process.as_ref().map_or(0, Background::pid))
    }

    /// Starts the API server that `stop_server` stopped: on the same port, with the same data.
    pub fn start_server(&mut self) {
        let mut command = Command::new(program("kube-apiserver"));
        command
            .args(["--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1"])
            // It would say where it is to pods.
            .args(["--endpoint-reconciler-type", "none", "--service-cluster-ip-range", "10.0.0.0/24"])
            .args(["--secure-port", &self.port.to_string()])
            .args(["--etcd-servers", &format!("http://127.0.0.1:{}", self.etcd_port)])
            .args(["--authorization-mode", "Node,RBAC", "--disable-admission-plugins", WITHOUT_ADMISSION])
            .arg("--allow-privileged=true")
            .args(["--service-account-issuer", "https://kubernetes.default.svc"])
            // So long it waits at its end for clients that watch.
            .arg("--request-timeout=10s")
            .args(["--profiling=false", "--audit-log-mode", "blocking"]);
        for (flag, file) in [
            ("--cert-dir", self.folder.join("certificates")),
            ("--tls-cert-file", self.own.cert_file.clone()),
            ("--tls-private-key-file", self.own.key_file.clone()),
            ("--service-account-key-file", self.service_accounts.cert_file.clone()),
            ("--service-account-signing-key-file", self.service_accounts.key_file.clone()),
            ("--token-auth-file", self.folder.join("tokens.csv")),
            ("--audit-policy-file", self.folder.join("audit-policy.yaml")),
            ("--audit-log-path", self.audit_log()),
        ] {
            command.arg(flag).arg(file);
        }
        let mut server = self.spawn(&mut command, "kube-apiserver");
        // Whether it is ready, once there is nothing more to wait for.
        let is_ready = ask_within(GUARD, || {
            let answer = self.admin.request("GET", "/readyz", None);
            let has_ended = server.0.try_wait().expect("a child").is_some();
            answer.is_ok_and(|answer| answer.status == 200).then_some(true).or(has_ended.then_some(false))
        });
        if is_ready != Some(true) {
            let log = fs::read_to_string(self.folder.join("kube-apiserver.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            panic!(
                "the API server is not ready; it says last:\n{}",
                lines[lines.len().saturating_sub(20)..].join("\n")
            );
        }
        self.server = Some(server);
    }

    /// Stops the API server, as an upgrade does; what it knows stays in etcd.
    pub fn stop_server(&mut self) {
        if let Some(server) = self.server.take() {
            server.signal(Signal::SIGTERM);
            let _ = server.finish();
        }
    }

    /// Kills the API server: its connections are reset.
    pub fn kill_server(&mut self) {
        self.server = None;
    }

    /// Stops the API server where it is: connections stay, and nothing is answered.
    pub fn suspend(&self) {
        self.server().signal(Signal::SIGSTOP);
    }

    /// Goes on after `suspend`.
    pub fn resume(&self) {
        self.server().signal(Signal::SIGCONT);
    }

    /// Makes etcd forget what objects were like before now: a watch that wants to know is answered `410 Gone`, once the API
    /// server has been started anew and does not remember it either.
    pub fn forget_history(&self) {
        let ask = |path: &str, body: Value| -> Value {
            let url = format!("http://127.0.0.1:{}{path}", self.etcd_port);
            let text = ureq::post(url).send(body.to_string()).and_then(|mut answer| answer.body_mut().read_to_string());
            serde_json::from_str(&text.expect("etcd's answer")).expect("JSON")
        };
        let now = ask("/v3/kv/range", json!({"key": "AA=="}));
        ask("/v3/kv/compaction", json!({"revision": now["header"]["revision"], "physical": true}));
    }

    /// Its files, and any that a test gives to `kubectl`.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A client with another token than the administrator's.
    pub fn client(&self, token: &str) -> Client {
        Client::new(self.port, &self.ca_file(), token)
    }

    /// Asks as the administrator; panics where there is no answer.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.admin.request(method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// The same, where a refusal is a failure. Returns the object.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let answer = self.request(method, path, body);
        assert!(answer.status < 300, "{method} {path}: {} {}", answer.status, answer.body);
        answer.body
    }

    /// Makes an object; returns it as it was made, with its UID.
    pub fn create(&self, object: &Value) -> Value {
        self.ask("POST", &objects::place(object).0, Some(object))
    }

    /// Changes an object, by what is different in it.
    pub fn change(&self, object: &Value, difference: &Value) -> Value {
        let (folder, name) = objects::place(object);
        self.ask("PATCH", &format!("{folder}/{name}"), Some(difference))
    }

    /// Deletes an object, at once.
    pub fn delete(&self, object: &Value) {
        let (folder, name) = objects::place(object);
        self.ask("DELETE", &format!("{folder}/{name}?gracePeriodSeconds=0"), None);
    }

    /// Says what a pod's kubelet would say; `objects::running` makes such a status.
    pub fn set_pod_status(&self, namespace: &str, name: &str, status: &Value) -> Value {
        let path = format!("{}/{name}/status?fieldManager=kubelet", objects::collection("v1", "Pod", namespace));
        self.ask("PATCH", &path, Some(&json!({"status": status})))
    }

    /// Makes a pod that runs: these containers, each with its ID.
    pub fn run_pod(&self, pod: &Value, containers: &[(&str, &str)]) -> Value {
        let pod = self.create(pod);
        let word = |name: &str| pod["metadata"][name].as_str().unwrap_or_default();
        self.set_pod_status(word("namespace"), word("name"), &objects::running(containers))
    }

    /// Makes a service account, which may do what RBAC grants it: nothing yet.
    pub fn service_account(&self, namespace: &str, name: &str) -> Account {
        let folder = objects::collection("v1", "ServiceAccount", namespace);
        self.create(&json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"namespace": namespace, "name": name},
        }));
        self.token(&folder, namespace, name)
    }

    /// What a process needs to be a service account that is there already, with a new token.
    pub fn account(&self, namespace: &str, name: &str) -> Account {
        self.token(&objects::collection("v1", "ServiceAccount", namespace), namespace, name)
    }

    fn token(&self, folder: &str, namespace: &str, name: &str) -> Account {
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
        let answer = self.ask("POST", &format!("{folder}/{name}/token"), Some(&request));
        let token = answer["status"]["token"].as_str().expect("a token").to_owned();
        let token_file = self.folder.join(format!("{namespace}-{name}.token"));
        fs::write(&token_file, &token).expect("a token file");
        Account {
            user: format!("system:serviceaccount:{namespace}:{name}"),
            token_file,
            ca_file: self.ca_file(),
            kubeconfig: self.kubeconfig(&format!("{namespace}-{name}"), &token, namespace),
            token,
        }
    }

    /// Runs `kubectl` as the administrator.
    pub fn kubectl(&self, arguments: &[&str]) -> Output {
        run(&mut self.kubectl_command(arguments))
    }

    /// `kubectl` as the administrator, for whoever wants to say more.
    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        self.command("kubectl", arguments)
    }

    /// `helm` as the administrator.
    pub fn helm_command(&self, arguments: &[&str]) -> Command {
        self.command("helm", arguments)
    }

    /// Applies objects in YAML as the administrator.
    pub fn apply(&self, yaml: &str) {
        let file = self.folder.join("applied.yaml");
        fs::write(&file, yaml).expect("a file for kubectl");
        let output = run(self.kubectl_command(&["apply", "--filename"]).arg(&file));
        assert!(output.status.success(), "{}\n{yaml}", stderr(&output));
    }

    /// What a user asked the API server for, in order; also of one that was stopped.
    pub fn requests_of(&self, user: &str) -> Vec<Asked> {
        audit::requests_of(&self.audit_log(), user)
    }

    fn audit_log(&self) -> PathBuf {
        self.folder.join("audit.log")
    }

    fn server(&self) -> &Background {
        self.server.as_ref().expect("the API server runs")
    }

    fn start_etcd(&mut self) {
        let (client, peer) = (self.etcd_port, free_port());
        let [client, peer] = [client, peer].map(|port| format!("http://127.0.0.1:{port}"));
        let mut command = Command::new("etcd");
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}"), "--logger", "zap"]);
        command.arg("--data-dir").arg(self.folder.join("etcd"));
        self.etcd = Some(self.spawn(&mut command, "etcd"));
        eventually("etcd", GUARD, || TcpStream::connect(("127.0.0.1", self.etcd_port)).ok());
    }

    /// Starts a program that writes to a log of its name.
    fn spawn(&self, command: &mut Command, name: &str) -> Background {
        let path = self.folder.join(name).with_extension("log");
        let log = OpenOptions::new().create(true).append(true).open(&path).expect("a log");
        let child = command.stdout(log.try_clone().expect("a log")).stderr(log).spawn();
        Background(child.unwrap_or_else(|error| panic!("{name}: {error}")))
    }

    /// Writes the file by which clients are this user.
    fn kubeconfig(&self, name: &str, token: &str, namespace: &str) -> PathBuf {
        let file = self.folder.join(format!("{name}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url(), "certificate-authority": self.ca_file()}}],
            "users": [{"name": "test", "user": {"token": token}}],
        });
        // JSON is YAML.
        fs::write(&file, config.to_string()).expect("a kubeconfig");
        file
    }

    fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program(name));
        command.args(arguments).env("KUBECONFIG", self.folder.join("admin.kubeconfig"));
        // They keep what they learn about servers in the home folder.
        command.env("HOME", &self.folder).env_remove("XDG_CACHE_HOME");
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // etcd last, so that the API server has nothing to complain about.
        self.server = None;
        self.etcd = None;
    }
}

/// A program that `cargo xtask setup` built.
fn program(name: &str) -> PathBuf {
    workspace().join("target/kubernetes").join(name)
}

//! The status endpoint for who is not on the machine: TLS, a token, and what is told without it.

use std::{
    fs,
    net::TcpStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent,
    cluster::Client,
    eventually, free_port, kernel_is_usable,
    receiver::{Authority, Identity, Validity},
    scratch, stderr,
};
use serde_json::Value;

/// More connections than are served at once.
const SILENT: usize = 40;

/// The daemon with these files; it sends to nobody.
fn daemon(port: u16, identity: &Identity, token: &Path, folder: &Path) -> Background {
    Background::start(
        Command::new(agent())
            .args(["run", "--status-listen", &format!("0.0.0.0:{port}"), "--output-folder"])
            .arg(folder.join("profiles"))
            .arg("--status-tls-cert-file")
            .arg(&identity.cert_file)
            .arg("--status-tls-key-file")
            .arg(&identity.key_file)
            .env("PROFILER_STATUS_TOKEN_FILE", token),
    )
}

/// The status of a page; `None`: TLS failed, or nobody answered.
fn ask(port: u16, authority: &Authority, token: &str, path: &str) -> Option<u16> {
    Client::new(port, &authority.file(), token).request("GET", path, None).ok().map(|answer| answer.status)
}

/// Who trusts the authority and has the token is told everything; certificate and token follow their files; who connects and
/// says nothing keeps nobody out.
#[test]
fn tells_who_has_the_token() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("status-tls");
    let (first, second) = (Authority::new(&folder, "first"), Authority::new(&folder, "second"));
    let names = "DNS:localhost,IP:127.0.0.1";
    let identity = first.sign("status", names, Validity::Now);
    let token = folder.join("token");
    fs::write(&token, "one\n").expect("a token");
    let port = free_port();
    let daemon = daemon(port, &identity, &token, &folder);
    eventually("readiness", Duration::from_secs(60), || (ask(port, &first, "none", "/readyz")? == 200).then_some(()));

    for (path, with, without) in [
        ("/healthz", 200, 200),
        ("/readyz", 200, 200),
        ("/metrics", 200, 401),
        ("/debug/state", 200, 401),
        ("/nothing", 404, 401),
    ] {
        assert_eq!(ask(port, &first, "one", path), Some(with), "{path}");
        assert_eq!(ask(port, &first, "two", path), Some(without), "{path}");
    }
    let page = Client::new(port, &first.file(), "one").request("GET", "/metrics", None).expect("the page").body;
    assert!(matches!(&page, Value::String(text) if text.contains("profiler_agent_samples_seen_total")), "{page}");
    assert_eq!(ask(port, &second, "one", "/healthz"), None, "a certificate of nobody that is trusted");
    // Who does not speak TLS is told nothing.
    assert!(profiler_tests::http_get(port, "/metrics").is_none_or(|page| !page.contains("profiler_agent")));

    fs::write(&token, "two\n").expect("a token");
    eventually("the new token", Duration::from_secs(30), || {
        (ask(port, &first, "two", "/metrics")? == 200).then_some(())
    });
    assert_eq!(ask(port, &first, "one", "/metrics"), Some(401));
    // Half a pair is left until the other half is there.
    let renewed = second.sign("renewed", names, Validity::Now);
    fs::copy(&renewed.cert_file, &identity.cert_file).expect("a certificate");
    assert_eq!(ask(port, &first, "two", "/metrics"), Some(200));
    fs::copy(&renewed.key_file, &identity.key_file).expect("a key");
    eventually("the new certificate", Duration::from_secs(30), || {
        (ask(port, &second, "two", "/metrics")? == 200).then_some(())
    });
    assert_eq!(ask(port, &first, "two", "/metrics"), None);

    let silent: Vec<TcpStream> =
        (0..SILENT).map(|_| TcpStream::connect(("127.0.0.1", port)).expect("a connection")).collect();
    let started = Instant::now();
    eventually("an answer", Duration::from_secs(60), || (ask(port, &second, "two", "/healthz")? == 200).then_some(()));
    println!("answered {:?} after {} connections that say nothing", started.elapsed(), silent.len());

    daemon.signal(Signal::SIGTERM);
    let output = daemon.finish();
    let said = stderr(&output);
    println!("{said}");
    assert!(output.status.success() && !said.contains("plain text"), "{said}");
    assert!(said.contains("stays in use"), "{said}");
}

//! What the configuration wants nobody to see is nowhere outside of the agent.

use std::{fs, io::Read as _, process::Command, time::Duration};

use flate2::read::GzDecoder;
use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent, eventually, free_port, http_get, kernel_is_usable,
    receiver::{Options, Receiver},
    run, scratch, stderr, workspace,
};

/// A word that is in every name and path that is secret, and nowhere else.
const SECRET: &str = "zanzibar";

/// Programs whose processes, threads, paths, source files and functions are secret: neither what is sent, nor files, nor the
/// log, nor the status endpoint tells of them. What they cost is told, and by which build ID.
#[test]
fn secrets_stay_on_the_machine() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("redaction");
    // The scratch folder's own name is no secret.
    let secret = folder.join(format!("{SECRET}-project"));
    fs::create_dir_all(&secret).expect("a folder");
    let (source, program) = (secret.join("job.c"), secret.join(format!("{SECRET}d")));
    for name in ["job.c", "monotonic.h"] {
        fs::copy(workspace().join("tests/workloads").join(name), secret.join(name)).expect("a copy");
    }
    let compiled = run(Command::new("gcc")
        .args(["-O1", "-g", "-Wl,--build-id", &format!("-DPLACE={SECRET}"), "-o"])
        .arg(&program)
        .arg(&source));
    assert!(compiled.status.success(), "{}", stderr(&compiled));
    let script = secret.join("spin.js");
    let spin = "function spin() { let n = 0; for (let i = 0; i < 1e5; i++) n += i % 7; return n; } \
                const end = Date.now() + 600000; while (Date.now() < end) spin();";
    fs::write(&script, spin).expect("a script");
    let config = folder.join("agent.yaml");
    let rules = format!("redact:\n  paths: ['*/{SECRET}*']\n  processes: ['{SECRET}*']\n");
    fs::write(&config, rules).expect("a configuration");

    let load = [
        Background::start(Command::new(&program).arg("600")),
        Background::start(Command::new("node").arg("--perf-basic-prof").arg(&script).current_dir(&folder)),
    ];
    let (receiver, status) = (Receiver::start(Options::http()), free_port());
    let daemon = Background::start(
        Command::new(agent())
            .args(["--log-level", "debug", "run", "--lines", "--inlines", "--window", "3s", "--config"])
            .arg(&config)
            .args(["--endpoint", &receiver.url(), "--protocol", "http/protobuf", "--original-payload"])
            .arg("--output-folder")
            .arg(folder.join("profiles"))
            .args(["--status-listen", &format!("127.0.0.1:{status}")]),
    );
    eventually("four windows", Duration::from_secs(120), || (receiver.received().len() >= 4).then_some(()));
    let pages = ["/debug/state", "/metrics"].map(|path| http_get(status, path).expect("a page"));
    daemon.signal(Signal::SIGTERM);
    let output = daemon.finish();
    // What node leaves behind.
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", load[1].pid()));
    drop(load);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");

    let mut seen: Vec<(String, Vec<u8>)> = pages.map(|page| ("the status endpoint".to_owned(), page.into())).into();
    seen.push(("the log".to_owned(), said.clone().into()));
    seen.extend(receiver.received().into_iter().map(|received| ("a request".to_owned(), received.body.to_vec())));
    for entry in fs::read_dir(folder.join("profiles")).expect("the folder").flatten() {
        let mut unpacked = Vec::new();
        let file = fs::read(entry.path()).expect("a profile");
        GzDecoder::new(&file[..]).read_to_end(&mut unpacked).expect("a whole profile");
        seen.push((entry.path().display().to_string(), unpacked));
    }
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    for (what, bytes) in &seen {
        assert!(!has(bytes, SECRET), "{what}: {}", String::from_utf8_lossy(bytes));
    }
    println!("{} places without the secret", seen.len());
    let elf = run(Command::new("readelf").arg("-n").arg(&program));
    let notes = String::from_utf8_lossy(&elf.stdout).into_owned();
    let build_id = notes.lines().find_map(|line| line.split_once("Build ID: ")).expect("a build ID").1.trim();
    let told = |text: &str| seen.iter().filter(|(what, bytes)| what == "a request" && has(bytes, text)).count();
    println!("of the requests, {} say [redacted] and {} have the build ID", told("[redacted]"), told(build_id));
    assert!(told("[redacted]") > 0 && told(build_id) > 0 && told("qsort") > 0);
}

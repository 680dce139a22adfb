//! Bad input gets one clear sentence and a non-zero exit code; nothing here needs privileges to sample.

mod symbolize;

use std::process::{Command, Output};

use profiler_tests::{agent, record, run, scratch, stderr, stdout};

/// One line on standard error that says every word of `expect`, and a failure.
fn check_refused(output: &Output, expect: &[&str]) {
    let text = stderr(output);
    assert!(!output.status.success(), "accepted: {text}");
    for word in expect {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    let lines = text.lines().filter(|line| line.contains("error")).count();
    assert_eq!(lines, 1, "not one sentence: {text}");
    assert!(!text.contains("panicked") && !text.contains("stack backtrace"), "{text}");
}

/// A PID that names no process.
#[test]
fn unknown_pid() {
    check_refused(&run(&mut record(&["--pid", "4194304", "--output", "-"])), &["no process with PID 4194304"]);
}

/// A thread is not a process; the message says which process it belongs to.
#[test]
fn thread_instead_of_process() {
    // A thread that lives while the agent looks.
    let (announce, announced) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        announce.send(nix::unistd::gettid()).expect("a listener");
        // The other end hangs up when the test is done.
        let _ = ended.recv();
    });
    let tid = announced.recv().expect("a thread ID").to_string();
    let output = run(&mut record(&["--pid", &tid, "--output", "-"]));
    drop(end);
    thread.join().expect("the thread ends");
    check_refused(&output, &["is a thread of process", &std::process::id().to_string()]);
}

/// Captures are the daemon's: where there is none, that is said.
#[test]
fn trigger_without_an_agent() {
    let mut trigger = Command::new(agent());
    trigger.args(["trigger", "--control-socket", "/nonexistent/agent.sock"]);
    check_refused(&run(&mut trigger), &["no agent takes commands at /nonexistent/agent.sock"]);
    check_refused(&run(trigger.args(["--pod-label", "app"])), &["app", "NAME=VALUE"]);
}

/// A zero frequency, and one above the kernel's limit.
#[test]
fn impossible_frequency() {
    check_refused(&run(&mut record(&["--frequency", "0", "--output", "-"])), &["frequency", "at least 1"]);
    check_refused(&run(&mut record(&["--frequency", "99999999", "--output", "-"])), &["frequency", "limit"]);
}

/// Output that cannot be written is refused before anything is recorded, and leaves nothing behind.
#[test]
fn unwritable_output() {
    let folder = scratch("unwritable_output");
    check_refused(&run(&mut record(&["--output", "/nonexistent/x.svg"])), &["/nonexistent/x.svg", "cannot be written"]);
    check_refused(&run(&mut record(&["--output", "/proc/x.svg"])), &["/proc/x.svg", "cannot be written"]);
    let output = run(record(&["--format", "svg", "--output"]).arg(&folder));
    check_refused(&output, &["is a directory"]);
    assert_eq!(std::fs::read_dir(&folder).expect("the folder").count(), 0);
}

/// A file name that says no format.
#[test]
fn unknown_format() {
    check_refused(&run(&mut record(&["--output", "machine.xyz"])), &["machine.xyz", "--format"]);
}

/// A kernel without type information, and a file that is none.
#[test]
fn kernel_without_btf() {
    let folder = scratch("kernel_without_btf");
    let broken = folder.join("vmlinux");
    std::fs::write(&broken, b"\x9f\xeb\x01\x00 and then nothing").expect("a file");
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root gets as far as reading type information");
        return;
    }
    let missing = run(&mut record(&["--btf", "/nonexistent/vmlinux", "--output", "-"]));
    check_refused(&missing, &["no type information", "CONFIG_DEBUG_INFO_BTF"]);
    let output = run(record(&["--output", "-", "--btf"]).arg(&broken));
    check_refused(&output, &["not valid", "BTF"]);
}

/// Without privileges, recording and the daemon say which are missing; `check` lists them and fails.
#[test]
fn missing_privileges() {
    let unprivileged = |arguments: &[&str]| {
        if nix::unistd::geteuid().is_root() {
            // A copy that everybody may execute, wherever the workspace is.
            let copy = std::env::temp_dir().join(format!("profiler-agent-{}", std::process::id()));
            std::fs::copy(agent(), &copy).expect("a copy of the agent");
            let output = run(Command::new("setpriv")
                .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all"])
                .arg(&copy)
                .args(arguments)
                .current_dir("/"));
            std::fs::remove_file(&copy).expect("the copy");
            output
        } else {
            run(Command::new(agent()).args(arguments))
        }
    };
    check_refused(&unprivileged(&["record", "--output", "-"]), &["CAP_BPF", "CAP_PERFMON", "root"]);
    check_refused(&unprivileged(&["run"]), &["CAP_BPF", "root"]);
    let check = unprivileged(&["check"]);
    assert_eq!(check.status.code(), Some(1));
    assert!(stdout(&check).contains("Sampling is impossible"), "{}", stdout(&check));
}

/// A configuration file that is missing, not YAML, or has a misspelt key.
#[test]
fn bad_configuration() {
    let folder = scratch("bad_configuration");
    let check = |text: &str, expect: &[&str]| {
        let path = folder.join("agent.yaml");
        std::fs::write(&path, text).expect("a file");
        check_refused(&run(Command::new(agent()).args(["run", "--config"]).arg(&path)), expect);
    };
    check("sampling:\n  frequncy: 1\n", &["agent.yaml", "frequncy"]);
    check("sampling: [", &["agent.yaml"]);
    check("export:\n  window: never\n", &["export.window", "never"]);
    check_refused(&run(Command::new(agent()).args(["run", "--config", "/nonexistent.yaml"])), &["/nonexistent.yaml"]);
}

/// A status endpoint that half a certificate or no token is there for.
#[test]
fn bad_status_access() {
    let folder = scratch("bad_status_access");
    let check = |flags: &[&str], expect: &[&str]| {
        let output = run(Command::new(agent()).args(["run", "--status-listen", "127.0.0.1:0"]).args(flags));
        check_refused(&output, expect);
        assert!(!stderr(&output).contains("hunter2"), "{}", stderr(&output));
    };
    check(&["--status-tls-cert-file", "x"], &["status.tls.key_file"]);
    check(&["--status-tls-key-file", "x"], &["status.tls.cert_file"]);
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root gets as far as reading these files");
        return;
    }
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let (empty, words) = (file("empty", "\n"), file("words", "hunter2 and more"));
    check(&["--status-token-file", "/nonexistent"], &["status.token_file", "/nonexistent", "cannot be read"]);
    check(&["--status-token-file", &empty], &["status.token_file", "one token"]);
    check(&["--status-token-file", &words], &["status.token_file", "one token"]);
    check(&["--status-tls-cert-file", &words, "--status-tls-key-file", &words], &["status.tls", "no certificate"]);
}

/// Rules that would hide nothing, or that nothing can be.
#[test]
fn bad_redaction() {
    let check = |yaml: &str, expect: &[&str]| check_refused(&run(&mut daemon_with("bad_redaction", yaml)), expect);
    check("redact:\n  paths: ['']\n", &["redact.paths", "/opt/secret/*"]);
    check("redact:\n  processes: vault\n", &["not valid", "line 2"]);
    check("redact:\n  path: [x]\n", &["not valid", "path"]);
}

/// Debug files from where there are none, and for where they cannot be kept; passwords are not repeated.
#[test]
fn bad_debuginfod() {
    let folder = scratch("bad_debuginfod");
    let (output, cache) = (folder.join("machine.svg"), folder.join("file"));
    std::fs::write(&cache, "").expect("a file");
    for command in ["record", "run"] {
        let refused = run(Command::new(agent()).args([command, "--debuginfod-url", "ftp://user:hunter2@host"]));
        check_refused(&refused, &["debuginfod", "https://"]);
        assert!(!stderr(&refused).contains("hunter2"), "{}", stderr(&refused));
        let small = run(Command::new(agent()).args([command, "--debuginfod-cache-mib", "1"]));
        check_refused(&small, &["cache_mib", "16"]);
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root gets as far as making folders");
        return;
    }
    let mut command = record(&["--debuginfod-url", "http://localhost", "--debuginfod-cache"]);
    check_refused(&run(command.arg(&cache).arg("--output").arg(&output)), &[&cache.to_string_lossy(), "debug files"]);
    assert!(!output.exists());
}

/// A command that cannot be started.
#[test]
fn unknown_command() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root gets as far as starting commands");
        return;
    }
    check_refused(&run(&mut record(&["--output", "-", "--", "/nonexistent/program"])), &["/nonexistent/program"]);
}

/// The daemon with a configuration file of this text.
fn daemon_with(test: &str, text: &str) -> Command {
    let path = scratch(test).join("agent.yaml");
    std::fs::write(&path, text).expect("a configuration file");
    let mut command = Command::new(agent());
    command.args(["run", "--config"]).arg(path);
    command
}

/// Destinations that cannot work; what may be secret in them is not repeated.
#[test]
fn impossible_destinations() {
    let check = |yaml: &str, flags: &[&str], variables: &[(&str, &str)], expect: &[&str]| {
        let mut daemon = daemon_with("impossible_destinations", yaml);
        let output = run(daemon.args(flags).envs(variables.iter().copied()));
        check_refused(&output, expect);
        assert!(!stderr(&output).contains("hunter2"), "{}", stderr(&output));
    };
    let secret = "http://user:hunter2@127.0.0.1:4317";
    check("", &["--endpoint", "collector:4317"], &[], &["--endpoint", "http://"]);
    check("", &["--endpoint", "http://collector:none"], &[], &["--endpoint"]);
    check("", &["--endpoint", secret], &[], &["--endpoint", "authorization"]);
    check("", &[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", secret)], &["OTEL_EXPORTER_OTLP_ENDPOINT", "authorization"]);
    check("", &["--header", "hunter2"], &[], &["--header", "NAME=VALUE"]);
    check("", &["--timeout", "0s"], &[], &["--timeout", "100ms"]);
    check("", &["--tls-ca-file", "x"], &[], &["http://", "https://"]);
    check("", &[], &[("OTEL_EXPORTER_OTLP_HEADERS", "hunter2")], &["OTEL_EXPORTER_OTLP_HEADERS", "name=value"]);
    check("", &[], &[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")], &["OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"]);
    check("", &[], &[("OTEL_EXPORTER_OTLP_TIMEOUT", "10s")], &["OTEL_EXPORTER_OTLP_TIMEOUT", "milliseconds"]);
    check("", &["--spool-mib", "100"], &[], &["export.spool.folder"]);
    check("", &["--output-format", "otlp"], &[], &["export.files.folder"]);
    let yaml = "export:\n  destinations:\n    - endpoint: http://c:4317\n      headers: ";
    check(&format!("{yaml}'x=hunter2'\n"), &[], &[], &["not valid", "line 4"]);
    check(&format!("{yaml}{{x: [hunter2]}}\n"), &[], &[], &["not valid", "line 4"]);
    check(&format!("{yaml}{{x: hunter2}}\n      name: a/b\n"), &[], &[], &["number 1", "name", "a/b"]);
    check(&format!("{yaml}{{}}\n"), &["--protocol", "grpc"], &[], &["--protocol", "--endpoint"]);
    if nix::unistd::geteuid().is_root() {
        check(&format!("{yaml}{{host: hunter2}}\n"), &[], &[], &["headers", "host"]);
        check("", &["--bearer-token-file", "/nonexistent"], &[], &["bearer_token_file", "/nonexistent"]);
        let flags = ["--endpoint", "https://c:4317", "--tls-ca-file", "/nonexistent"];
        check("", &flags, &[], &["tls.ca_file", "/nonexistent"]);
    }
}

/// What variables hold is not shown by the help.
#[test]
fn help_keeps_secrets() {
    let variables =
        ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROFILES_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"];
    let output = run(Command::new(agent()).args(["run", "--help"]).envs(variables.map(|name| (name, "hunter2"))));
    assert!(output.status.success() && !stdout(&output).contains("hunter2"));
}

/// Every command explains itself, with examples.
#[test]
fn help_has_examples() {
    for arguments in
        [&["--help"][..], &["record", "--help"], &["run", "--help"], &["check", "--help"], &["symbolize", "--help"]]
    {
        let output = run(Command::new(agent()).args(arguments));
        assert!(output.status.success());
        assert!(stdout(&output).contains("Examples:"), "{arguments:?}");
    }
}

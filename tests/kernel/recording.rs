//! Recordings of the whole machine, in every format, to their end and interrupted.

use std::{process::Command, time::Duration};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, books, folded, kernel_is_usable, record, run, scratch, stderr, stdout, total, workload,
};

/// A compiler kept busy: compiles a large source again and again.
fn compiler(folder: &std::path::Path) -> Background {
    let mut source = String::new();
    for function in 0..4000 {
        source.push_str(&format!(
            "int f{function}(int *p, int n) {{ int s = {function}; for (int i = 0; i < n; i++) s += p[i] * {function}; return s; }}\n"
        ));
    }
    std::fs::write(folder.join("big.c"), source).expect("a source file");
    Background::start(
        Command::new("bash").args(["-c", "while :; do gcc -O2 -c big.c -o big.o; done"]).current_dir(folder),
    )
}

const PYTHON: &str = "
def busy(n):
    return sum(i * i for i in range(n))
while True:
    busy(1000)
";

/// While a compiler and a Python program run, the flame graph shows both, named, with kernel frames; and
/// `go tool pprof` reads the same in its format.
#[test]
fn the_whole_machine() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("the_whole_machine");
    let compiler = compiler(&folder);
    let python = Background::start(Command::new("python3").args(["-c", PYTHON]));

    let svg = folder.join("machine.svg");
    let output = run(record(&["--duration", "10s", "--output"]).arg(&svg));
    assert!(output.status.success(), "{}", stderr(&output));
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    let text = std::fs::read_to_string(&svg).expect("the flame graph");
    for name in ["cc1", "python3", "_PyEval_EvalFrameDefault", "_[k]"] {
        assert!(text.contains(name), "the flame graph does not show {name}");
    }
    assert!(text.contains("<svg") && text.trim_end().ends_with("</svg>"));
    let books = books(&output);
    assert_eq!(books.seen, books.exported + books.lost);

    let pprof = folder.join("machine.pb.gz");
    let output = run(record(&["--duration", "4s", "--output"]).arg(&pprof));
    assert!(output.status.success(), "{}", stderr(&output));
    let top = run(Command::new("go").args(["tool", "pprof", "-top", "-nodecount=20"]).arg(&pprof));
    assert!(top.status.success(), "{}", stderr(&top));
    println!("{}", stdout(&top));
    assert!(stdout(&top).contains("Type: cpu") && stdout(&top).contains("_PyEval_EvalFrameDefault"));
    drop((compiler, python));
}

/// Ctrl-C ends a recording early; what was recorded is written, and the command it started is ended.
#[test]
fn interrupted_recordings_are_written() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("interrupted");
    let file = folder.join("partial.folded");
    let recording = Background::start(
        record(&["--duration", "600s", "--output"]).arg(&file).arg("--").arg(workload("burner")).args(["1", "600"]),
    );
    std::thread::sleep(Duration::from_secs(3));
    assert!(!file.exists(), "an unfinished recording must not look like one");
    recording.signal(Signal::SIGINT);
    let output = recording.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
    let stacks = folded(&std::fs::read_to_string(&file).expect("the partial recording"));
    assert!(total(&stacks, |stack| stack.frames.iter().any(|frame| frame == "burn")) > 100);
    let left = std::fs::read_dir(&folder).expect("the folder").count();
    assert_eq!(left, 1, "only the recording is left");
    let burners = run(Command::new("pgrep").args(["-x", "burner"]));
    assert_eq!(stdout(&burners), "", "the command was left running");
}

/// No progress bar where standard error is no terminal; one where it is.
#[test]
fn progress_only_on_a_terminal() {
    if !kernel_is_usable() {
        return;
    }
    let piped = run(&mut record(&["--duration", "1s", "--output", "/dev/null", "--format", "folded"]));
    assert!(!stderr(&piped).contains('\r') && !stderr(&piped).contains('\u{1b}'), "{}", stderr(&piped));
    let command =
        format!("{} record --duration 1s --output /dev/null --format folded", profiler_tests::agent().display());
    let terminal = run(Command::new("script").args(["-qec", &command, "/dev/null"]).env("TERM", "xterm"));
    assert!(stdout(&terminal).contains("recording"), "{:?}", stdout(&terminal));
}

/// A recording in OTLP's format holds an export request.
#[test]
fn otlp_recordings_decode() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("otlp_recordings");
    let file = folder.join("burn.otlp");
    let output = run(record(&["--output"]).arg(&file).arg("--").arg(workload("burner")).args(["1", "2"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let script = "
import sys
from opentelemetry.proto.collector.profiles.v1development import profiles_service_pb2 as service
request = service.ExportProfilesServiceRequest.FromString(open(sys.argv[1], 'rb').read())
print(sum(sum(s.values) for r in request.resource_profiles for c in r.scope_profiles for p in c.profiles for s in p.samples))
";
    let python = profiler_tests::workspace().join("target/venv/bin/python");
    let decoded = run(Command::new(python).args(["-c", script]).arg(&file));
    assert!(decoded.status.success(), "{}", stderr(&decoded));
    assert_eq!(stdout(&decoded).trim().parse::<u64>().ok(), Some(books(&output).exported));
}

/// The kernel programs' debug log reaches the agent's, as JSON when asked for, and only at level `trace`.
#[test]
fn logs_in_json_with_the_kernels_own() {
    if !kernel_is_usable() {
        return;
    }
    let with_level = |level: &str| {
        let arguments = ["--log-level", level, "--log-format", "json", "record", "--output", "/dev/null"];
        let output = run(Command::new(profiler_tests::agent()).args(arguments).args([
            "--format",
            "folded",
            "--",
            "bash",
            "-c",
            "/bin/true; sleep 1; /bin/true",
        ]));
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let traced = with_level("trace");
    let (json, summary): (Vec<&str>, Vec<&str>) = traced.lines().partition(|line| line.starts_with('{'));
    assert_eq!(summary.len(), 1, "{traced}");
    assert!(json.iter().all(|line| line.ends_with('}') && line.contains("\"level\"")), "{traced}");
    assert!(json.iter().any(|line| line.contains("fork: ")), "{traced}");
    assert!(!with_level("debug").contains("fork: "));
}

/// A link is written through to what it names, never replaced.
#[test]
fn output_through_a_link_keeps_the_link() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("output_through_a_link");
    let (link, file) = (folder.join("link.folded"), folder.join("file.folded"));
    std::fs::write(&file, "before").expect("a file");
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    let burner = workload("burner");
    let output = run(record(&["--output"]).arg(&link).arg("--").arg(&burner).args(["1", "1"]));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(std::fs::symlink_metadata(&link).expect("the link").is_symlink());
    assert!(std::fs::read_to_string(&file).expect("the file").starts_with("burner;"));
    let redirected = std::fs::File::create(folder.join("redirected")).expect("a file");
    let status = record(&["--format", "folded", "--output", "/dev/stdout", "--"])
        .arg(&burner)
        .args(["1", "1"])
        .stdout(redirected)
        .status();
    assert!(status.expect("the agent").success());
    assert!(std::fs::symlink_metadata("/dev/stdout").expect("/dev/stdout").is_symlink());
    let text = std::fs::read_to_string(folder.join("redirected")).expect("a file");
    assert!(text.contains("burner;"), "{text}");
}

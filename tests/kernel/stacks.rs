//! Are counts and stacks right?

use std::{
    process::Command,
    time::{Duration, Instant},
};

use profiler_tests::{books, folded, kernel_is_usable, record, run, stderr, stdout, total, workload};

/// Samples of two busy threads are 99 for each CPU second that `getrusage` reports, within 3 %, and the
/// kernel's books balance exactly.
#[test]
fn samples_agree_with_cpu_time() {
    if !kernel_is_usable() {
        return;
    }
    let output = run(record(&["--frequency", "99", "--format", "folded", "--output", "/dev/stderr", "--"])
        .arg(workload("burner"))
        .args(["2", "10"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let cpu_seconds: f64 = stdout(&output).trim().parse().expect("the burner prints its CPU seconds");
    let books = books(&output);
    let ratio = books.exported as f64 / (99.0 * cpu_seconds);
    println!("{books:?}, {cpu_seconds} CPU seconds, {:.4} of the expected samples", ratio);
    assert!((0.97..=1.03).contains(&ratio), "{ratio} of the expected samples");
    assert_eq!(books.seen, books.exported + books.lost);
    assert_eq!(books.lost, 0);
}

/// A chain of 30 functions with frame pointers comes out exactly, in at least 99 % of the samples taken in
/// user mode.
#[test]
fn a_known_chain_comes_out_exactly() {
    check_chain(&["--output", "-"]);
}

/// The same as the walk is done on kernels without `bpf_loop`.
#[test]
fn a_known_chain_comes_out_on_older_kernels() {
    check_chain(&["--walk-in-parts", "--output", "-"]);
}

fn check_chain(arguments: &[&str]) {
    if !kernel_is_usable() {
        return;
    }
    let output = run(record(arguments).arg("--").arg(workload("chain")).arg("8"));
    assert!(output.status.success(), "{}", stderr(&output));
    let expected: Vec<String> =
        std::iter::once("main".to_owned()).chain((1..=30).map(|level| format!("level_{level:02}"))).collect();
    let stacks = folded(&stdout(&output));
    let in_user_mode =
        |frames: &[String]| frames[0] == "chain" && frames.last().is_some_and(|leaf| !leaf.ends_with("_[k]"));
    let user = total(&stacks, |stack| in_user_mode(&stack.frames));
    let exact = total(&stacks, |stack| in_user_mode(&stack.frames) && stack.frames.ends_with(&expected));
    println!("{exact} of {user} samples in user mode show exactly the chain");
    assert!(user > 500);
    assert!(exact as f64 >= 0.99 * user as f64);
}

/// 2,000 processes of 20 ms, one after another: at least 95 % of the samples that their CPU time stands for
/// are exported under the right name, with named frames.
#[test]
fn short_lived_processes_are_kept() {
    if !kernel_is_usable() {
        return;
    }
    const PROCESSES: u32 = 2_000;
    let program = workload("shortlived");
    let script = format!("for i in $(seq {PROCESSES}); do {} 20; done; times", program.display());
    let output =
        run(record(&["--format", "folded", "--output", "/dev/stderr", "--", "bash", "-c", &script]).env("LC_ALL", "C"));
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    let stacks: Vec<_> = text.lines().filter(|line| line.starts_with("shortlived;")).collect::<Vec<_>>();
    let stacks = folded(&stacks.join("\n"));
    // `times` prints the shell's own times, then its children's: user and system.
    let printed = stdout(&output);
    let children = printed.lines().last().expect("times");
    let cpu_seconds: f64 = children.split_whitespace().map(seconds).sum();
    let expected = 99.0 * cpu_seconds;
    let named = total(&stacks, |_| true);
    let with_function = total(&stacks, |stack| stack.frames.iter().any(|frame| frame == "spin" || frame == "main"));
    println!(
        "{PROCESSES} processes used {cpu_seconds} s: {named} samples under their name of {expected:.0} expected \
         ({:.1} %), {with_function} with their functions named",
        100.0 * named as f64 / expected
    );
    let books = books(&output);
    assert_eq!(books.seen, books.exported + books.lost);
    assert!(named as f64 >= 0.95 * expected);
    assert!(with_function as f64 >= 0.90 * named as f64);
}

/// Parses bash's `0m1.234s`.
fn seconds(text: &str) -> f64 {
    let (minutes, seconds) = text.trim_end_matches('s').split_once('m').expect("minutes and seconds");
    minutes.parse::<f64>().expect("minutes") * 60.0 + seconds.parse::<f64>().expect("seconds")
}

/// A child that was forked and never ran another program has its parent's code, named.
#[test]
fn forked_children_are_followed_and_named() {
    if !kernel_is_usable() {
        return;
    }
    let output = run(record(&["--output", "-", "--"]).arg(workload("forks")).arg("2"));
    let stacks = folded(&stdout(&output));
    let child = total(&stacks, |stack| {
        stack.frames.iter().any(|frame| frame == "in_child") && stack.frames.iter().any(|frame| frame == "main")
    });
    println!("{child} samples in the child's function");
    assert!(child as f64 >= 0.9 * 2.0 * 99.0, "{}", stdout(&output));
}

/// `--pid` records the named processes and nothing else; several can be named.
#[test]
fn only_named_processes_are_recorded() {
    if !kernel_is_usable() {
        return;
    }
    let burner = workload("burner");
    let chain = workload("chain");
    let start = |program, arguments: &[&str]| profiler_tests::Background::start(Command::new(program).args(arguments));
    let first = start(&burner, &["1", "20"]);
    let second = start(&chain, &["20"]);
    let third = start(&burner, &["1", "20"]);
    let output = run(&mut record(&[
        "--pid",
        &first.pid().to_string(),
        "--pid",
        &second.pid().to_string(),
        "--duration",
        "3s",
        "--format",
        "pprof",
        "--output",
        "/dev/stdout",
    ]));
    assert!(output.status.success(), "{}", stderr(&output));
    let folder = profiler_tests::scratch("only_named_processes");
    let file = folder.join("x.pb.gz");
    std::fs::write(&file, &output.stdout).expect("a file");
    let tags = run(Command::new("go").args(["tool", "pprof", "-tags"]).arg(&file));
    let tags = stdout(&tags);
    println!("{tags}");
    assert!(tags.contains(&first.pid().to_string()) && tags.contains(&second.pid().to_string()), "{tags}");
    assert!(!tags.contains(&third.pid().to_string()), "{tags}");
    for key in ["thread_name", "service.name", "host.name"] {
        assert!(tags.contains(key), "{tags}");
    }
}

/// A recording of processes that have all ended ends with them.
#[test]
fn ends_with_the_recorded_process() {
    if !kernel_is_usable() {
        return;
    }
    let burner = profiler_tests::Background::start(Command::new(workload("burner")).args(["1", "2"]));
    let started = Instant::now();
    let output = run(&mut record(&["--pid", &burner.pid().to_string(), "--duration", "60s", "--output", "-"]));
    assert!(output.status.success());
    assert!(stderr(&output).contains("the recorded processes ended"), "{}", stderr(&output));
    assert!(started.elapsed() < Duration::from_secs(30));
}

/// More distinct stacks than the buffers hold: they overflow into the ring, which wakes the agent, and the
/// books still balance.
#[test]
fn overflowing_buffers_lose_nothing_silently() {
    if !kernel_is_usable() {
        return;
    }
    let output = run(record(&["--frequency", "9999", "--format", "folded", "--output", "/dev/null", "--"])
        .arg(workload("maze"))
        .args(["2", "6"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let books = books(&output);
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    assert!(books.seen > 50_000, "{books:?}");
    assert_eq!(books.seen, books.exported + books.lost);
    assert!(books.lost * 100 < books.seen, "{books:?}");
}

/// A library that a program loads late is known by the time the program is gone, however short the recording.
#[test]
fn libraries_loaded_late_are_named() {
    if !kernel_is_usable() {
        return;
    }
    let script = "
import time
end = time.time() + 0.5
while time.time() < end: sum(range(1000))
import zlib
data = bytes(range(256)) * 4000
end = time.time() + 1.5
while time.time() < end: zlib.compress(data)
";
    let output = run(&mut record(&["--output", "-", "--", "python3", "-c", script]));
    let stacks = folded(&stdout(&output));
    let all = total(&stacks, |_| true);
    let in_zlib = total(&stacks, |stack| {
        stack
            .frames
            .iter()
            .any(|frame| frame.contains("deflate") || frame.contains("libz.so") || frame.contains("zlib."))
    });
    let unmapped = total(&stacks, |stack| stack.frames.iter().any(|frame| frame == "[unmapped]"));
    println!("{in_zlib} of {all} samples in zlib, {unmapped} in unknown places");
    assert!(in_zlib > 100, "{}", stdout(&output));
    assert!(unmapped * 50 < all, "{}", stdout(&output));
}

//! Does code that is made at run time have names? Each program runs in a root and a PID namespace of its own: what names
//! its code is nowhere but there, under a PID that is not the host's.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use profiler_tests::{
    Background, Folded, eventually, folded, kernel_is_usable, record, run, scratch, stderr, stdout, total, workspace,
};

/// A program of a runtime, which the tests cannot do without.
fn needs(program: &str, package: &str) {
    let question = if program == "jcmd" { "-h" } else { "--version" };
    assert!(
        Command::new(program).arg(question).output().is_ok_and(|output| output.status.success()),
        "{program} is missing: `cargo xtask setup` or `apt-get install {package}` installs it"
    );
}

fn workloads() -> PathBuf {
    workspace().join("tests/workloads/runtime")
}

/// A command that will run as PID 1 of a root of its own. What it finds in `/work` is in `work`.
fn inside(root: &Path, work: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "sh"]).arg(workloads().join("inside.sh"));
    command.arg(root).arg(work);
    command
}

/// The host's PID of what was started by `inside`.
fn host_pid(outside: u32) -> u32 {
    let children = format!("/proc/{outside}/task/{outside}/children");
    eventually("the command's PID", Duration::from_secs(20), || {
        fs::read_to_string(&children).ok()?.split_ascii_whitespace().next()?.parse().ok()
    })
}

fn record_outside(arguments: &[&str]) -> Vec<Folded> {
    let outcome = run(&mut record(&[&["--frequency", "499", "--output", "-"], arguments].concat()));
    assert!(outcome.status.success(), "{}", stderr(&outcome));
    println!("{}", stderr(&outcome).lines().last().unwrap_or_default());
    folded(&stdout(&outcome))
}

/// Names in a perf map, as they are printed in folded stacks.
fn names_in(map: &str) -> HashSet<String> {
    map.lines().filter_map(|line| line.splitn(3, ' ').nth(2)).map(|name| name.replace(';', ":")).collect()
}

/// How many samples' frames of code made at run time have names, and how many have none.
fn check_named(what: &str, stacks: &[Folded], is_named: impl Fn(&str) -> bool) {
    let count = |matches: &dyn Fn(&str) -> bool| -> u64 {
        stacks
            .iter()
            .map(|stack| stack.count * stack.frames[1..].iter().filter(|frame| matches(frame)).count() as u64)
            .sum()
    };
    let (named, nameless) = (count(&is_named), count(&|frame| frame == "[anonymous code]"));
    let percent = 100.0 * named as f64 / (named + nameless).max(1) as f64;
    println!("{what:24} {named} frames made at run time with names, {nameless} without: {percent:.2} % named");
    assert!(named > 200 && percent >= 95.0, "{what}: {percent:.2} % of {} frames are named", named + nameless);
}

fn check_hot(what: &str, stacks: &[Folded], hot: &str, at_least: f64) {
    let all = total(stacks, |_| true);
    let in_it = total(stacks, |stack| stack.frames.iter().any(|frame| frame.contains(hot)));
    let percent = 100.0 * in_it as f64 / all.max(1) as f64;
    println!("{what:24} {in_it} of {all} samples ({percent:.1} %) in {hot}");
    assert!(percent >= at_least, "{what}: {percent:.1} % of the samples are in {hot}");
}

/// Two Node processes, both PID 1 where they run, so that both have the same map at the same path: each has its own names.
#[test]
fn node_perf_maps_name_functions() {
    if !kernel_is_usable() {
        return;
    }
    needs("node", "nodejs");
    let folder = scratch("runtime-node");
    let mut programs: Vec<Background> = ["alpha", "beta"]
        .iter()
        .map(|name| {
            let root = folder.join(name);
            fs::create_dir(&root).expect("a folder");
            Background::start(inside(&root, &workloads()).args([
                "node",
                "--perf-basic-prof",
                "/work/hot.js",
                name,
                "120",
            ]))
        })
        .collect();
    let mut names = HashSet::new();
    let mut arguments = vec!["--duration".to_owned(), "6s".to_owned()];
    let mut hosts = Vec::new();
    for program in &mut programs {
        program.wait_for_line("warm");
        hosts.push(host_pid(program.pid()));
        arguments.extend(["--pid".to_owned(), program.pid().to_string()]);
    }
    let stacks = record_outside(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    for host in hosts {
        assert!(!Path::new(&format!("/tmp/perf-{host}.map")).exists(), "the map is visible outside");
        let map = fs::read(format!("/proc/{host}/root/tmp/perf-1.map")).expect("node writes a map in its root");
        names.extend(names_in(&String::from_utf8_lossy(&map)));
    }
    check_named("node, perf map", &stacks, |frame| names.contains(frame));
    check_hot("node, perf map", &stacks, "JS:*alpha", 30.0);
    check_hot("node, perf map", &stacks, "JS:*beta", 30.0);
    let mixed = total(&stacks, |stack| {
        let has = |name: &str| stack.frames.iter().any(|frame| frame.contains(name));
        has("alpha") && has("beta")
    });
    assert_eq!(mixed, 0, "stacks with both processes' functions");
}

/// A process that has ended before its samples are named, and its root with it.
#[test]
fn ended_processes_are_named() {
    if !kernel_is_usable() {
        return;
    }
    needs("node", "nodejs");
    for (what, flags) in
        [("node, perf map, ended", &["--perf-basic-prof"][..]), ("node, jitdump, ended", &["--perf-prof"][..])]
    {
        let folder = scratch("runtime-ended");
        let (root, output) = (folder.join("root"), folder.join("ended.folded"));
        fs::create_dir(&root).expect("a folder");
        let mut command = record(&["--frequency", "499", "--output"]);
        let container = inside(&root, &workloads());
        command.arg(&output).arg("--").arg(container.get_program()).args(container.get_args());
        let outcome = run(command.arg("node").args(flags).args(["/work/hot.js", "gamma", "3"]));
        assert!(outcome.status.success(), "{}", stderr(&outcome));
        let mut stacks = folded(&fs::read_to_string(&output).expect("a recording"));
        stacks.retain(|stack| stack.frames[0] == "node");
        // V8 begins names with what they are: `JS:*gammaOuter`, `Builtin:ArrayMap`. (It compiles one into the other.)
        let is_named = |frame: &str| {
            let kind = frame.split_once(':').map_or("", |(kind, _)| kind);
            ["JS", "Eval", "Script", "Function", "LazyCompile", "Builtin", "BytecodeHandler", "RegExp"].contains(&kind)
        };
        check_named(what, &stacks, is_named);
        check_hot(what, &stacks, "JS:*gamma", 40.0);
    }
}

/// A JVM that is asked for its map while it runs.
#[test]
fn java_perf_maps_name_methods() {
    if !kernel_is_usable() {
        return;
    }
    for program in ["java", "javac", "jcmd"] {
        needs(program, "default-jdk-headless");
    }
    let folder = scratch("runtime-java");
    let (root, work) = (folder.join("root"), folder.join("work"));
    for folder in [&root, &work] {
        fs::create_dir(folder).expect("a folder");
    }
    let compiled = run(Command::new("javac").arg("-d").arg(&work).arg(workloads().join("Hot.java")));
    assert!(compiled.status.success(), "{}", stderr(&compiled));
    let mut program = Background::start(inside(&root, &work).args([
        "java",
        "-XX:+PreserveFramePointer",
        "-cp",
        "/work",
        "Hot",
        "240",
    ]));
    program.wait_for_line("warm");
    let host = host_pid(program.pid());
    let ask = || {
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &host.to_string(), "--mount", "--pid", "--root", "--wd"]);
        let asked = run(enter.args(["jcmd", "1", "Compiler.perfmap"]));
        assert!(asked.status.success(), "{} {}", stdout(&asked), stderr(&asked));
    };
    let pid = program.pid().to_string();
    let before = record_outside(&["--duration", "2s", "--pid", &pid]);
    let nameless = total(&before, |stack| stack.frames.iter().any(|frame| frame == "[anonymous code]"));
    println!("{:24} {nameless} of {} samples without names before there is a map", "java", total(&before, |_| true));
    assert!(nameless * 10 > total(&before, |_| true) * 9, "code has names before there is a map");
    // What was sampled, found to have no name and remembered has one when there is a map.
    let recording =
        Background::start(&mut record(&["--frequency", "499", "--output", "-", "--duration", "16s", "--pid", &pid]));
    std::thread::sleep(Duration::from_secs(7));
    ask();
    let stacks = folded(&stdout(&recording.finish()));
    let has = |name: &str| total(&stacks, |stack| stack.frames.iter().any(|frame| frame == name));
    println!(
        "{:24} {} samples without names, then {} with",
        "java",
        has("[anonymous code]"),
        has("int Hot.outer(int)")
    );
    check_hot("java, map comes later", &stacks, "int Hot.outer(int)", 30.0);
    let stacks = record_outside(&["--duration", "6s", "--pid", &pid]);
    assert!(!Path::new(&format!("/tmp/perf-{host}.map")).exists(), "the map is visible outside");
    let map = fs::read(format!("/proc/{host}/root/tmp/perf-1.map")).expect("the JVM writes a map in its root");
    let names = names_in(&String::from_utf8_lossy(&map));
    check_named("java, perf map", &stacks, |frame| names.contains(frame));
    check_hot("java, perf map", &stacks, "int Hot.outer(int)", 70.0);
}

//! `cargo xtask test`: every test this machine can run.
//!
//! Tests that need the kernel run wherever `profiler-agent check` says that sampling is possible; there, one
//! that does not run is a failure. Elsewhere they are skipped loudly, and counted.

use std::{fs, path::Path, process::Command, thread};

use crate::{
    Outcome, kernels,
    process::{cargo, find, is_root, run},
    setup, tidy,
};

const GROUPS: &[&str] = &["tidy", "unit", "cli", "deploy", "kernel", "kernels"];
/// The oldest and the newest of the kernels that `cargo xtask kernels` knows.
const KERNELS: [&str; 2] = ["5.10", "7.2"];

pub(crate) fn main(workspace: &Path, arguments: &[String]) -> Outcome {
    let only = match arguments {
        [] => None,
        [flag, group] if flag == "--only" && GROUPS.contains(&group.as_str()) => Some(group.as_str()),
        _ => return Err(format!("usage: cargo xtask test [--only {}]", GROUPS.join("|"))),
    };
    let wanted = |group: &str| only.is_none_or(|only| only == group);
    let needs_programs = ["deploy", "kernel"].into_iter().any(wanted);
    thread::scope(|scope| {
        let build = || scope.spawn(|| if needs_programs { setup::programs(workspace) } else { Ok(()) });
        // While packages are installed and programs are linked, there is a CPU for Go: the sooner it begins, the better.
        let begun = find("go").map(|_| build());
        setup::for_build(workspace)?;
        setup::for_tests(workspace)?;
        let programs = begun.unwrap_or_else(build);
        by_themselves(workspace, wanted)?;
        programs.join().map_err(|_| "building the tests' programs ended in a panic")??;
        with_programs(workspace, wanted)
    })
}

/// The groups that need nothing but what cargo builds.
fn by_themselves(workspace: &Path, wanted: impl Fn(&str) -> bool) -> Outcome {
    if wanted("tidy") {
        tidy::main(workspace)?;
    }
    if wanted("unit") {
        run(cargo(workspace).args([
            "test",
            "--release",
            "--workspace",
            "--exclude",
            "profiler-ebpf",
            "--exclude",
            "profiler-tests",
        ]))?;
    }
    if ["cli", "deploy", "kernel", "kernels"].into_iter().any(&wanted) {
        run(cargo(workspace).args(["build", "--release", "--package", "profiler-agent"]))?;
    }
    if ["deploy", "kernel"].into_iter().any(&wanted) {
        let mut compile = cargo(workspace);
        compile.args(["test", "--release", "--package", "profiler-tests", "--no-run"]);
        run(compile.args(["--test", "cli", "--test", "deploy", "--test", "kernel"]))?;
    }
    if wanted("cli") { run(&mut tests(workspace, "cli")) } else { Ok(()) }
}

/// The groups that talk to programs of others' making, and those that are disturbed by what else is being built.
fn with_programs(workspace: &Path, wanted: impl Fn(&str) -> bool) -> Outcome {
    if wanted("deploy") {
        run(&mut tests(workspace, "deploy"))?;
    }
    if wanted("kernel") {
        if machine_can_sample() {
            // An agent that says otherwise is a failure, not a reason to skip.
            run(Command::new(workspace.join("target/release/profiler-agent")).arg("check"))?;
            run(tests(workspace, "kernel").env("PROFILER_REQUIRE_KERNEL", "1"))?;
        } else {
            eprintln!("xtask: SKIPPED: this machine cannot sample; no test of group `kernel` runs");
        }
    }
    if wanted("kernels") {
        match kernels::obstacle() {
            None => kernels::main(workspace, &KERNELS.map(str::to_owned))?,
            Some(obstacle) => eprintln!("xtask: SKIPPED: {obstacle}; no other kernel is tried"),
        }
    }
    Ok(())
}

/// Runs tests of the crate `profiler-tests`, one after another.
fn tests(workspace: &Path, target: &str) -> Command {
    let mut tests = cargo(workspace);
    tests.args(["test", "--release", "--package", "profiler-tests", "--test", target]);
    tests.args(["--", "--test-threads=1", "--nocapture"]);
    tests
}

/// Whether this machine can run the kernel programs, found out without asking the agent under test: root with
/// `CAP_BPF` and `CAP_PERFMON` (bits 39 and 38), and a kernel with type information.
fn machine_can_sample() -> bool {
    const NEEDED: u64 = 1 << 39 | 1 << 38;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    is_root() && held & NEEDED == NEEDED && Path::new("/sys/kernel/btf/vmlinux").is_file()
}

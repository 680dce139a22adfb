//! `cargo xtask test`: every test this machine can run.
//!
//! Tests that need the kernel run wherever `profiler-agent check` says that sampling is possible; there, one
//! that does not run is a failure. Elsewhere they are skipped loudly, and counted.

use std::{path::Path, process::Command};

use crate::{
    Outcome,
    process::{cargo, is_root, run},
    setup, tidy,
};

const GROUPS: &[&str] = &["tidy", "unit", "cli", "kernel"];

pub(crate) fn main(workspace: &Path, arguments: &[String]) -> Outcome {
    let only = match arguments {
        [] => None,
        [flag, group] if flag == "--only" && GROUPS.contains(&group.as_str()) => Some(group.as_str()),
        _ => return Err(format!("usage: cargo xtask test [--only {}]", GROUPS.join("|"))),
    };
    let wanted = |group: &str| only.is_none_or(|only| only == group);
    setup::for_build(workspace)?;
    setup::for_tests(workspace)?;
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
    if !wanted("cli") && !wanted("kernel") {
        return Ok(());
    }
    run(cargo(workspace).args(["build", "--release", "--package", "profiler-agent"]))?;
    let tests = |target: &str| {
        let mut tests = cargo(workspace);
        tests.args([
            "test",
            "--release",
            "--package",
            "profiler-tests",
            "--test",
            target,
            "--",
            "--test-threads=1",
            "--nocapture",
        ]);
        tests
    };
    if wanted("cli") {
        run(&mut tests("cli"))?;
    }
    if wanted("kernel") {
        let can_sample =
            is_root() && run(Command::new(workspace.join("target/release/profiler-agent")).arg("check")).is_ok();
        if can_sample {
            run(tests("kernel").env("PROFILER_REQUIRE_KERNEL", "1"))?;
        } else {
            eprintln!("xtask: SKIPPED: this machine cannot sample; no test of group `kernel` runs");
        }
    }
    Ok(())
}

//! `cargo xtask COMMAND`: set-up, build, run, test and checks. One file per command; std only, so that it
//! compiles in a moment on a fresh machine.

mod bench;
mod build;
mod cluster;
mod fuzz;
mod go;
mod kernels;
mod process;
mod receivers;
mod run;
mod setup;
mod suite;
mod test;
mod tidy;
#[path = "../../profiler-ebpf/toolchain.rs"]
mod toolchain;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

/// A failure, as a sentence for people.
type Outcome = Result<(), String>;

const HELP: &str = "\
Usage: cargo xtask COMMAND

Commands:
  setup   install what building and testing need (Debian/Ubuntu as root), or say what to install
  build   build agent and kernel programs in release mode
  run     set up, build, and profile this machine: starts the agent and a receiver that prints what arrives
  test    set up, build, and run every test this machine can run
  bench   measure what profiling costs: a fixed set of programs, and waits [programs|waits] (as root)
  fuzz    feed every parser of untrusted bytes with what a fuzzer makes; 10 million inputs each, or --executions N
  kernels record known programs on other kernels, in VMs; kernels are chosen by version, all by default
  tidy    check format, lints and layout rules

Examples:
  cargo xtask run
  cargo xtask test
  cargo xtask test --only kernel";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("--help", &[][..]),
    };
    let workspace = workspace();
    let outcome = match command {
        "setup" => setup::main(&workspace, rest),
        "build" => build::main(&workspace),
        "run" => run::main(&workspace),
        "test" => test::main(&workspace, rest),
        "bench" => bench::main(&workspace, rest),
        "fuzz" => fuzz::main(&workspace, rest),
        "kernels" => kernels::main(&workspace, rest),
        "tidy" => tidy::main(&workspace),
        "--help" | "-h" | "help" => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        other => Err(format!("there is no command {other:?}; try `cargo xtask --help`")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder: the parent of this crate's.
fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

//! The command line.

mod check;
mod debuginfod;
mod export;
mod labels;
mod logging;
mod output;
mod record;
mod run;
mod status;
mod stop;
mod symbolize;
mod trigger;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::logging::LogOptions;
use crate::kernel::share_free_memory;

/// More descriptors than the agent ever holds.
const MAX_DESCRIPTORS: u64 = 16_384;
/// Exit code for bad input and failures.
const FAILURE: u8 = 1;

/// System-wide CPU profiler: samples every process on this machine, with no changes to any of them.
#[derive(Debug, Parser)]
#[command(name = "profiler-agent", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Arguments {
    #[command(flatten)]
    log: LogOptions,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  profiler-agent record --output machine.svg              10 s of the whole machine as a flame graph
  profiler-agent record --pid 1234 --output app.pb.gz     one process and its children, for go tool pprof
  profiler-agent record --output build.svg -- make        a command from start to end
  profiler-agent run                                      the daemon: OTLP to http://127.0.0.1:4317
  profiler-agent stop                                     stop the daemon's collection at once, and resume it
  profiler-agent trigger --pid 1234 --frequency 499       more detail from the daemon, for 30 s
  profiler-agent check                                    what this machine allows
  profiler-agent symbolize --file app --lines 0x1f40      what is at a place in a file or process";

#[derive(Debug, Subcommand)]
enum Command {
    Record(record::Arguments),
    Run(Box<run::Arguments>),
    Check(check::Arguments),
    Stop(stop::StopArguments),
    Resume(stop::ResumeArguments),
    Trigger(trigger::Arguments),
    Symbolize(symbolize::Arguments),
}

/// Runs the command line's command. Errors are one sentence on standard error.
pub fn main() -> ExitCode {
    share_free_memory();
    let arguments = Arguments::parse();
    let logging = arguments.log.start();
    raise_file_limit();
    let outcome = match arguments.command {
        Command::Record(record) => record::main(record, logging),
        Command::Run(run) => run::main(*run, logging),
        Command::Check(check) => check::main(&check),
        Command::Stop(stop) => stop::stop(stop),
        Command::Resume(resume) => stop::resume(resume),
        Command::Trigger(trigger) => trigger::main(trigger),
        Command::Symbolize(symbolize) => symbolize::main(symbolize),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("profiler-agent: error: {}", one_line(&error));
            ExitCode::from(FAILURE)
        }
    }
}

/// Every executable that is sampled stays open, and shells start programs with 1,024 descriptors.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard.min(MAX_DESCRIPTORS), hard));
    if let Err(error) = raised {
        tracing::debug!("the limit of open files stays as it is: {error}");
    }
}

/// An error and its causes, each said once, on one line.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string().replace('\n', " ");
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

//! `profiler-agent trigger`: a capture by hand.

use std::{path::PathBuf, process::ExitCode, thread};

use clap::Args;

use crate::{
    config::{CaptureSection, Control, Entry, Request},
    control::{
        Command,
        client::{ask, trigger},
    },
    profile::Events,
};

/// Capture more detail for a short time: the daemon of this machine profiles what you name, beside what it does all the time,
/// and sends one profile that is marked as a capture. Whoever is excluded from the daemon's scope is not captured.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// A process, and its children. May be repeated.
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<u32>,
    /// Processes that run this file: a path, or a name, in which * stands for any characters. May be repeated.
    #[arg(long = "executable", value_name = "PATTERN")]
    executables: Vec<String>,
    /// A container, by its ID (12 characters are enough) or its name in the pod. May be repeated.
    #[arg(long = "container", value_name = "CONTAINER")]
    containers: Vec<String>,
    /// Pods of this namespace. May be repeated.
    #[arg(long = "namespace", value_name = "NAME")]
    namespaces: Vec<String>,
    /// Pods that have this label. May be repeated: they have to have all of them.
    #[arg(long = "pod-label", value_name = "NAME=VALUE", value_parser = pair)]
    pod_labels: Vec<(String, String)>,
    /// How long, 5m at most.
    #[arg(long, default_value = "30s")]
    duration: String,
    /// Samples per second and CPU, if not as many as the daemon takes.
    #[arg(long)]
    frequency: Option<u64>,
    /// What to record, if not what the daemon records.
    #[arg(long, value_enum)]
    event: Option<Events>,
    /// Look for source files and lines.
    #[arg(long)]
    lines: bool,
    /// Show functions that the compiler inlined as frames of their own.
    #[arg(long)]
    inlines: bool,
    /// Why: the profile says so.
    #[arg(long, default_value = "", value_name = "TEXT")]
    reason: String,
    /// Return when the capture is over and its profile is on its way.
    #[arg(long)]
    wait: bool,
    /// The daemon's control socket, if it is not the usual one.
    #[arg(long, env = "PROFILER_CONTROL_SOCKET", value_name = "FILE")]
    control_socket: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  profiler-agent trigger --pid 1234 --frequency 499
  profiler-agent trigger --namespace shop --pod-label app=cart --event both --lines --duration 1m
  profiler-agent trigger --reason 'slow since 14:00'          the whole machine

What several options name has to hold together, and one value of each: --namespace shop --container app is the containers
called app of that namespace.";

/// Time between two looks at whether a capture is over.
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(200);

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it is no NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(super) fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let socket = arguments.control_socket.unwrap_or_else(|| Control::default().socket);
    let scope = Entry {
        pids: arguments.pids,
        executables: arguments.executables,
        containers: arguments.containers,
        namespaces: arguments.namespaces,
        pod_labels: arguments.pod_labels.into_iter().collect(),
        ..Entry::default()
    };
    let request = Request {
        scope: (scope != Entry::default()).then_some(scope),
        capture: CaptureSection {
            duration: Some(arguments.duration),
            frequency: arguments.frequency,
            event: arguments.event,
            lines: arguments.lines.then_some(true),
            inlines: arguments.inlines.then_some(true),
        },
        reason: arguments.reason,
    };
    let running = trigger(&socket, &request)?;
    println!(
        "capturing {} at {} Hz until {}; the profile goes to {}",
        running.scope,
        running.frequency,
        running.until,
        running.destinations.join(", ")
    );
    while arguments.wait && ask(&socket, Command::State)?.captures.iter().any(|other| other.is(&running)) {
        thread::sleep(LOOK_AGAIN);
    }
    Ok(ExitCode::SUCCESS)
}

//! `cargo xtask run`: profiles this machine, with a receiver that prints what arrives.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command},
    thread,
    time::Duration,
};

use crate::{
    Outcome,
    process::{cargo, find, is_root, run},
    setup,
};

/// OTLP's port. Where something listens on it already, that is the receiver.
const RECEIVER: &str = "127.0.0.1:4317";

pub(crate) fn main(workspace: &Path) -> Outcome {
    setup::for_build(workspace)?;
    // One after the other: built together, the agent would get the receiver's features of shared crates.
    run(cargo(workspace).args(["build", "--release", "--package", "profiler-agent"]))?;
    run(cargo(workspace).args(["build", "--release", "--package", "profiler-tests", "--bins"]))?;
    let binaries = workspace.join("target/release");
    let mut sink = if TcpListener::bind(RECEIVER).is_ok() {
        let mut command = Command::new(binaries.join("otlp-sink"));
        command.args(["--listen", RECEIVER]);
        Some(start(&mut command)?)
    } else {
        eprintln!("xtask: something listens on {RECEIVER} already: profiles go there");
        None
    };
    let agent_path = binaries.join("profiler-agent");
    let mut command = if is_root() {
        Command::new(&agent_path)
    } else if find("sudo").is_some() {
        eprintln!("xtask: the agent needs root and is started through sudo");
        let mut sudo = Command::new("sudo");
        sudo.arg(&agent_path);
        sudo
    } else {
        return Err("the agent needs root: run this command as root".to_owned());
    };
    command.args(["run", "--endpoint", &format!("http://{RECEIVER}")]);
    let mut agent = match start(&mut command) {
        Ok(agent) => agent,
        Err(message) => {
            if let Some(sink) = &mut sink {
                // It was only started for the agent.
                let _ = sink.kill();
            }
            return Err(message);
        }
    };
    eprintln!(
        "xtask: profiling this machine; the hottest functions are printed every 15 s\n\
         xtask: receiver http://{RECEIVER} (OTLP gRPC), agent's metrics http://127.0.0.1:7081/metrics\n\
         xtask: Ctrl-C stops"
    );
    // Ctrl-C reaches all of us: the agent exports its last window, the receiver waits for it, and we for both.
    ignore_interrupts();
    let status = agent.wait().map_err(|error| format!("the agent cannot be waited for: {error}"))?;
    if let Some(sink) = &mut sink {
        thread::sleep(Duration::from_millis(200));
        // It may have ended by the same Ctrl-C.
        let _ = sink.kill();
        let _ = sink.wait();
    }
    if status.success() { Ok(()) } else { Err(format!("the agent ended with {status}")) }
}

/// Children that are started already keep reacting to Ctrl-C as they please.
fn ignore_interrupts() {
    unsafe extern "C" {
        fn signal(number: i32, action: usize) -> usize;
    }
    const SIGINT: i32 = 2;
    const SIG_IGN: usize = 1;
    // SAFETY: ignoring a signal installs no code of ours; the C library that std links has this function.
    unsafe {
        signal(SIGINT, SIG_IGN);
    }
}

fn start(command: &mut Command) -> Result<Child, String> {
    command.spawn().map_err(|error| format!("{} cannot be started: {error}", command.get_program().to_string_lossy()))
}

//! `profiler-agent stop` and `resume`: the kill switch by hand.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::{
    config::Control,
    control::{
        Command, State,
        client::{ClientError, ask},
    },
};

/// How long the daemon may take to see the stop file.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Stop all collection on this machine at once: every kernel program is detached. It stays stopped, also when the agent
/// or the machine is started again, until it is resumed. (Many systems empty /run when they start.)
#[derive(Debug, Args)]
#[command(after_help = STOP_EXAMPLES)]
pub(super) struct StopArguments {
    #[command(flatten)]
    places: Places,
}

/// Resume collection that was stopped by a file, a signal or a command.
#[derive(Debug, Args)]
#[command(after_help = RESUME_EXAMPLES)]
pub(super) struct ResumeArguments {
    #[command(flatten)]
    places: Places,
}

/// Where the daemon looks and listens.
#[derive(Debug, Args)]
struct Places {
    /// The daemon's stop file, if it is not the usual one.
    #[arg(long, env = "PROFILER_STOP_FILE", value_name = "FILE")]
    stop_file: Option<PathBuf>,
    /// The daemon's control socket, if it is not the usual one.
    #[arg(long, env = "PROFILER_CONTROL_SOCKET", value_name = "FILE")]
    control_socket: Option<PathBuf>,
}

const STOP_EXAMPLES: &str = "\
Examples:
  profiler-agent stop
  kubectl exec --namespace profiler-agent profiler-agent-x7k2p -- profiler-agent stop
  touch /run/profiler/stop          the same by hand";

const RESUME_EXAMPLES: &str = "\
Examples:
  profiler-agent resume
  rm /run/profiler/stop             the same by hand";

impl Places {
    fn resolve(self) -> Control {
        let usual = Control::default();
        Control {
            stop_file: self.stop_file.unwrap_or(usual.stop_file),
            socket: self.control_socket.unwrap_or(usual.socket),
            ..usual
        }
    }
}

pub(super) fn stop(arguments: StopArguments) -> anyhow::Result<ExitCode> {
    let Control { stop_file, socket, .. } = arguments.places.resolve();
    create(&stop_file).with_context(|| format!("the stop file {} cannot be created", stop_file.display()))?;
    let Some(state) = ask_until(&socket, |state| !state.collecting)? else {
        println!(
            "no agent takes commands at {}; none that is given this stop file collects anything while {} exists",
            socket.display(),
            stop_file.display()
        );
        return Ok(ExitCode::SUCCESS);
    };
    if state.collecting {
        bail!("the agent at {} still collects: its stop file is not {}", socket.display(), stop_file.display());
    }
    println!("stopped: nothing is collected while {} exists", stop_file.display());
    Ok(ExitCode::SUCCESS)
}

pub(super) fn resume(arguments: ResumeArguments) -> anyhow::Result<ExitCode> {
    let Control { stop_file, socket, .. } = arguments.places.resolve();
    match fs::remove_file(&stop_file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("the stop file {} cannot be removed", stop_file.display()));
        }
        _ => {}
    }
    match ask(&socket, Command::Resume) {
        Err(ClientError::Absent(_)) => {
            println!("no agent takes commands at {}; the next one will collect", socket.display());
            return Ok(ExitCode::SUCCESS);
        }
        answer => answer?,
    };
    let state = ask_until(&socket, |state| state.collecting)?.context("the agent has just ended")?;
    if !state.collecting {
        bail!("the agent collects nothing yet: it is stopped by {}", state.stopped_by.join(" and "));
    }
    println!("resumed: sampling at {} Hz", state.frequency);
    Ok(ExitCode::SUCCESS)
}

/// Asks how things are until they are as wanted, or for a few seconds; `None`: there is no agent.
fn ask_until(socket: &Path, is_wanted: impl Fn(&State) -> bool) -> anyhow::Result<Option<State>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(socket, Command::State) {
            Ok(state) if is_wanted(&state) || Instant::now() >= deadline => return Ok(Some(state)),
            Ok(_) => thread::sleep(LOOK_AGAIN),
            Err(ClientError::Absent(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Makes an empty file, unless it is there.
fn create(path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::OpenOptions::new().create(true).append(true).open(path).map(drop)
}

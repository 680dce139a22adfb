//! What profiles cost on the wire: bytes a sample, as the receiver gets them, by length of a window.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use super::{Daemon, Workload, metrics, waits, workloads};
use crate::{Outcome, process::find, setup::install_packages};

/// Lengths of a window, seconds.
const WINDOWS: [u64; 2] = [10, 30];
/// Windows that are measured, behind one that is not: names are learned in it.
const MEASURED: u32 = 2;
/// The default, as users run it.
const FREQUENCY: &str = "99";
/// Of the set of programs, those that are steady.
const STEADY: [&str; 2] = ["c, 28 frames", "python3"];

/// Measures steady programs and servers.
pub(super) fn measure(workspace: &Path) -> Outcome {
    if find("redis-server").is_none() || find("redis-benchmark").is_none() {
        install_packages(&["redis-server", "redis-tools"])?;
    }
    let folder = workspace.join("target/workloads/bench");
    println!("\n| service | window, s | samples | rows | samples a row | bytes, gzip | bytes a sample |");
    println!("|---|---|---|---|---|---|---|");
    let seconds = WINDOWS.iter().sum::<u64>() * (u64::from(MEASURED) + 1) + 60;
    for workload in workloads(workspace, seconds)?.iter().filter(|workload| STEADY.contains(&workload.name)) {
        let _running = Running::start(workload)?;
        windows(workspace, workload.name)?;
    }
    let _redis = waits::Redis::start(&folder)?;
    windows(workspace, "redis-server and redis-benchmark")
}

/// A program on every CPU, until this is dropped.
struct Running(Vec<Child>);

impl Running {
    fn start(workload: &Workload) -> Result<Self, String> {
        let (program, arguments) = workload.command.split_first().ok_or("a workload without a command")?;
        let mut running = Self(Vec::new());
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            let mut command = Command::new(program);
            let child = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
            running.0.push(child.map_err(|error| format!("{program} cannot be started: {error}"))?);
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It has usually not ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn windows(workspace: &Path, service: &str) -> Outcome {
    for window in WINDOWS {
        let daemon = Daemon::start(workspace, &["--frequency", FREQUENCY, "--window", &format!("{window}s")])?;
        let windows = Duration::from_secs(window);
        // In the middle of windows, so that a late one does not matter.
        thread::sleep(windows * 3 / 2);
        let before = metrics()?;
        thread::sleep(windows * MEASURED);
        let after = metrics()?;
        let difference = |name: &str| {
            let value = |page: &std::collections::BTreeMap<String, f64>| -> f64 {
                page.iter().filter(|(key, _)| key.split('{').next() == Some(name)).map(|(_, value)| value).sum()
            };
            value(&after) - value(&before)
        };
        let (samples, rows) = (difference("samples_exported_total"), difference("rows_encoded_total"));
        let bytes = difference("export_wire_bytes_total");
        println!(
            "| {service} | {window} | {samples} | {rows} | {:.1} | {bytes} | {:.2} |",
            samples / rows,
            bytes / samples
        );
        drop(daemon);
    }
    Ok(())
}

//! What keeps the agent in bounds: its budget, and how it is stopped.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde::Deserialize;

/// Share of the machine's CPU time, unless the operator says otherwise.
const DEFAULT_CPU: &str = "1%";
/// What the agent needs for a large machine, besides debug information.
const DEFAULT_MEMORY_MIB: u32 = 256;
/// With less, there would be nothing left to give up.
const MEMORY_MIB_RANGE: std::ops::RangeInclusive<u32> = 64..=65_536;
const DEFAULT_STOP_FILE: &str = "/run/profiler/stop";
const DEFAULT_SOCKET: &str = "/run/profiler/agent.sock";

/// The section `budget` of the file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BudgetSection {
    cpu: Option<String>,
    memory_mib: Option<u32>,
}

/// The section `control` of the file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ControlSection {
    stopped: Option<bool>,
    stop_file: Option<PathBuf>,
    socket: Option<PathBuf>,
}

/// What flags and environment set.
#[derive(Clone, Debug, Default)]
pub struct ControlOverrides {
    /// Share of the machine's CPU time, such as `1%`.
    pub cpu: Option<String>,
    /// Most memory, MiB.
    pub memory_mib: Option<u32>,
    /// The file that stops collection.
    pub stop_file: Option<PathBuf>,
    /// The control socket.
    pub socket: Option<PathBuf>,
}

/// What the agent may take of the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// CPU time, its own and that of the kernel programs, as a share of what the machine has: 0.01 is 1 %.
    pub cpu: f64,
    /// Memory, bytes.
    pub memory: usize,
}

impl Eq for Budget {}

/// How collection is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// Whether it is.
    pub stopped: bool,
    /// While this file exists, nothing is collected.
    pub stop_file: PathBuf,
    /// Where commands come from.
    pub socket: PathBuf,
}

impl Budget {
    /// `details`: bytes for debug information that was asked for, which are on top unless there is a figure for all.
    pub(super) fn merge(file: BudgetSection, overrides: &ControlOverrides, details: usize) -> anyhow::Result<Self> {
        let cpu = overrides.cpu.clone().or(file.cpu);
        let cpu = cpu.as_deref().unwrap_or(DEFAULT_CPU);
        let percent: f64 = cpu
            .trim()
            .strip_suffix('%')
            .and_then(|number| number.trim().parse().ok())
            .with_context(|| format!("budget.cpu: {cpu:?} is not a share of the machine such as {DEFAULT_CPU}"))?;
        if !(0.01..=100.0).contains(&percent) {
            bail!("budget.cpu: {cpu} is outside of 0.01% to 100%");
        }
        let memory = match overrides.memory_mib.or(file.memory_mib) {
            None => ((DEFAULT_MEMORY_MIB as usize) << 20) + details,
            Some(mib) if MEMORY_MIB_RANGE.contains(&mib) => (mib as usize) << 20,
            Some(mib) => bail!(
                "budget.memory_mib: {mib} is outside of {} to {} MiB",
                MEMORY_MIB_RANGE.start(),
                MEMORY_MIB_RANGE.end()
            ),
        };
        Ok(Self { cpu: percent / 100.0, memory })
    }
}

impl Control {
    pub(super) fn merge(file: ControlSection, overrides: ControlOverrides) -> anyhow::Result<Self> {
        let path = |name: &str, flag: Option<PathBuf>, file: Option<PathBuf>, default: &str| {
            let path = flag.or(file).unwrap_or_else(|| default.into());
            if !path.is_absolute() {
                bail!("{name}: {} is not an absolute path", path.display());
            }
            Ok(path)
        };
        Ok(Self {
            stopped: file.stopped.unwrap_or(false),
            stop_file: path("control.stop_file", overrides.stop_file, file.stop_file, DEFAULT_STOP_FILE)?,
            socket: path("control.socket", overrides.socket, file.socket, DEFAULT_SOCKET)?,
        })
    }
}

impl Default for Control {
    fn default() -> Self {
        Self { stopped: false, stop_file: DEFAULT_STOP_FILE.into(), socket: DEFAULT_SOCKET.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cpu: &str, memory_mib: Option<u32>, expect: Result<(f64, usize), &str>) {
        let file = BudgetSection { cpu: Some(cpu.to_owned()), memory_mib };
        match (Budget::merge(file, &ControlOverrides::default(), 1), expect) {
            (Ok(budget), Ok((share, memory))) => {
                assert!((budget.cpu - share).abs() < 1e-9, "{cpu}: {budget:?}");
                assert_eq!(budget.memory, memory);
            }
            (Err(error), Err(expected)) => {
                let text = format!("{error:#}");
                assert!(text.contains(expected), "{cpu}: {text:?} does not say {expected:?}");
            }
            (result, expected) => panic!("{cpu}: {result:?} instead of {expected:?}"),
        }
    }

    /// Shares are in percent, and say so; details come on top of the default alone.
    #[test]
    fn budgets_are_shares_of_the_machine() {
        check("1%", None, Ok((0.01, (256 << 20) + 1)));
        check(" 0.5 % ", Some(128), Ok((0.005, 128 << 20)));
        check("0.01", None, Err("budget.cpu: \"0.01\" is not a share of the machine such as 1%"));
        check("0%", None, Err("budget.cpu: 0% is outside of 0.01% to 100%"));
        check("NaN%", None, Err("outside of"));
        check("1%", Some(1), Err("budget.memory_mib: 1 is outside of 64"));
    }

    /// A relative path would mean another file wherever the agent is started.
    #[test]
    fn paths_are_absolute() {
        let file = ControlSection { stop_file: Some("stop".into()), ..ControlSection::default() };
        let error = Control::merge(file, ControlOverrides::default()).expect_err("refused");
        assert!(error.to_string().contains("control.stop_file: stop is not an absolute path"));
    }
}

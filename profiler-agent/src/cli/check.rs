//! `profiler-agent check`: what this kernel and these privileges allow.

use std::{fs, path::PathBuf, process::ExitCode};

use clap::Args;

use super::labels::KubernetesOptions;
use crate::{
    config::{DEFAULT_WAITS, Kubernetes, MISSING_NODE},
    kernel::{
        self, BufferRows, Clock, Kernel,
        privileges::{self, Holder},
    },
    label::kubernetes,
    profile::Events,
};

/// Tell what this kernel and these privileges allow, and the way out where something is missing.
///
/// Exits with 1 if sampling is impossible.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  profiler-agent check\n  sudo profiler-agent check")]
pub(super) struct Arguments {
    /// The kernel's type information, where it is not in its usual place.
    #[arg(long, value_name = "FILE", default_value = kernel::DEFAULT_BTF, hide = true)]
    btf: PathBuf,
    #[command(flatten)]
    kubernetes: KubernetesOptions,
}

/// How one item turned out.
enum Verdict {
    Good(String),
    /// Sampling works, but something is missing.
    Degraded(String),
    Impossible(String),
}

pub(super) fn main(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut items =
        vec![("kernel", kernel_release()), ("privileges", privileges_held()), ("PID namespace", pid_namespace())];
    items.extend(sampling(arguments));
    items.push(("kernel symbols", kernel_symbols()));
    items.push(("mapped files", mapped_files()));
    items.extend(pods(arguments).map(|verdict| ("kubernetes", verdict)));

    let mut possible = true;
    for (name, verdict) in items {
        let (mark, text) = match verdict {
            Verdict::Good(text) => ("ok      ", text),
            Verdict::Degraded(text) => ("degraded", text),
            Verdict::Impossible(text) => {
                possible = false;
                ("missing ", text)
            }
        };
        println!("{mark}  {name}: {text}");
    }
    println!("{}", if possible { "Sampling is possible." } else { "Sampling is impossible." });
    Ok(if possible { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn kernel_release() -> Verdict {
    let release = nix::sys::utsname::uname()
        .map_or_else(|_| "unknown".to_owned(), |name| name.release().to_string_lossy().into_owned());
    match kernel::kernel_version() {
        Some(version) if version < (5, 10) => Verdict::Impossible(format!("Linux {release}; 5.10 or later is needed")),
        _ => Verdict::Good(format!("Linux {release}")),
    }
}

fn privileges_held() -> Verdict {
    match privileges::check() {
        Ok(()) => Verdict::Good(format!("all held; of them the daemon keeps {}", privileges::kept(Holder::Daemon))),
        Err(missing) => Verdict::Impossible(missing.to_string()),
    }
}

fn pid_namespace() -> Verdict {
    match kernel::pid_namespace() {
        None => Verdict::Good("the machine's".to_owned()),
        // The first process of a namespace that was made for us alone, or for little more.
        Some(_) if std::process::id() == 1 => {
            Verdict::Degraded("this container's own: nothing else is seen; share the host's (hostPID: true)".to_owned())
        }
        Some(number) => Verdict::Good(format!("a nested one ({number}): only what runs in it is seen")),
    }
}

/// Loads and starts the real programs, for a moment.
fn sampling(arguments: &Arguments) -> Vec<(&'static str, Verdict)> {
    let options = kernel::Options {
        btf: &arguments.btf,
        events: Events::Both,
        frequency: 1,
        waits: DEFAULT_WAITS,
        targets_only: true,
        rows: BufferRows::for_rate(1, 1, 1),
        cgroups: kernel::CgroupHierarchy::of_machine(),
        debug_log: false,
        walk_in_parts: false,
        watch_wakeups: false,
        attachments: kernel::Attachments::default(),
    };
    let mut kernel = match Kernel::load(&options) {
        Ok(kernel) => kernel,
        Err(error) => return vec![("kernel programs", Verdict::Impossible(error.to_string()))],
    };
    let features = kernel.features();
    let optional = |present: bool, good: &str, missing: &str| {
        if present { Verdict::Good(good.to_owned()) } else { Verdict::Degraded(missing.to_owned()) }
    };
    let mut items = vec![
        ("kernel programs", Verdict::Good("accepted".to_owned())),
        (
            "waits",
            match kernel.waits_refused() {
                None => Verdict::Good("off-CPU time can be recorded".to_owned()),
                Some(error) => Verdict::Degraded(format!("off-CPU time cannot be recorded: {error}")),
            },
        ),
        (
            "stack walk",
            optional(features.bpf_loop, "1,024 frames in one go", "1,024 frames in parts (before Linux 5.17)"),
        ),
        (
            "user registers",
            optional(features.task_pt_regs, "from the kernel's helper", "from the stack's layout (before Linux 5.15)"),
        ),
    ];
    items.push(match kernel.side_band() {
        Ok(_) => ("mapping notices", Verdict::Good("new mappings are announced".to_owned())),
        Err(error) => {
            ("mapping notices", Verdict::Degraded(format!("{error}; new mappings are read when samples hit them")))
        }
    });
    items.push(match kernel.attach_notices() {
        Ok(()) => ("process notices", Verdict::Good("fork, exec and exit are announced".to_owned())),
        Err(error) => ("process notices", Verdict::Impossible(error.to_string())),
    });
    items.push(match kernel.attach_cgroups() {
        Ok(_) => ("cgroups", Verdict::Good(format!("{}; new ones are announced", kernel.cgroups()))),
        Err(error) => {
            ("cgroups", Verdict::Degraded(format!("{}, but new ones are not announced: {error}", kernel.cgroups())))
        }
    });
    items.push(match kernel.start() {
        Ok(()) => (
            "sampling clock",
            match kernel.clock().and_then(Clock::source) {
                Some(kernel::ClockSource::CpuClock) => Verdict::Good("cpu-clock (this machine has no PMU)".to_owned()),
                Some(source) => Verdict::Good(source.to_string()),
                None => Verdict::Impossible("no CPU is online".to_owned()),
            },
        ),
        Err(error) => ("sampling clock", Verdict::Impossible(error.to_string())),
    });
    items
}

fn kernel_symbols() -> Verdict {
    use std::io::BufRead as _;
    // On some kernels the first symbols are per-CPU data, whose addresses are small or zero.
    const ENOUGH: usize = 10_000;
    let has_address = |line: String| line.split(' ').next().is_some_and(|address| address.starts_with("ffff"));
    let is_readable = fs::File::open("/proc/kallsyms")
        .is_ok_and(|file| std::io::BufReader::new(file).lines().map_while(Result::ok).take(ENOUGH).any(has_address));
    if is_readable {
        Verdict::Good("readable".to_owned())
    } else {
        Verdict::Degraded("hidden; kernel frames stay unnamed without CAP_SYSLOG (kernel.kptr_restrict)".to_owned())
    }
}

fn mapped_files() -> Verdict {
    let readable = fs::read_dir("/proc/self/map_files")
        .ok()
        .and_then(|mut files| files.next()?.ok())
        .is_some_and(|file| fs::metadata(file.path()).is_ok());
    if readable {
        Verdict::Good("readable, deleted and replaced ones too".to_owned())
    } else {
        Verdict::Degraded(
            "only by path; frames of deleted files stay unnamed without CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN"
                .to_owned(),
        )
    }
}

/// Whether this node's pods may be read, in a cluster or where one is named.
fn pods(arguments: &Arguments) -> Option<Verdict> {
    let overrides = arguments.kubernetes.clone().overrides();
    let is_asked_for = overrides.is_asked_for();
    let verdict = match Kubernetes::of_environment(overrides) {
        Ok(Some(settings)) => match kubernetes::probe(&settings.access, &settings.node) {
            Ok(probed) => Verdict::Good(format!("{} pods of node {} can be followed", probed.pods, settings.node)),
            Err(error) => Verdict::Degraded(format!("node {}: {error}", settings.node)),
        },
        Ok(None) if is_asked_for => Verdict::Degraded(MISSING_NODE.to_owned()),
        Ok(None) => return None,
        Err(error) => Verdict::Degraded(format!("{error:#}")),
    };
    Some(verdict)
}

//! `cargo xtask kernels [VERSION...]`: does the agent work on other kernels, and are its stacks right there?
//!
//! Boots Debian kernels in a VM that holds nothing but the agent and programs whose stacks are known, records them
//! there, and checks on the host what the VM printed.

mod machine;
mod package;
mod verdict;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use crate::{
    Outcome, build,
    process::{find, run},
    suite,
};
use verdict::{Row, Run};

/// Kernels by the version they had when they were chosen, and the Debian suites that have them.
const KERNELS: &[(&str, &str)] = &[("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie"), ("7.2", "sid")];
/// Programs of the host, and the packages that bring them.
const PROGRAMS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("gcc", "gcc"),
    ("apt-get", "apt"),
    ("dpkg", "dpkg"),
];
/// Chooses another agent than the one built from these sources.
const AGENT: &str = "PROFILER_AGENT";

pub(crate) fn main(workspace: &Path, arguments: &[String]) -> Outcome {
    let chosen = choose(arguments)?;
    let missing: Vec<&str> =
        PROGRAMS.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        return Err(format!("missing: {0}; `apt-get install {0}` installs it", missing.join(" ")));
    }
    let agent = match std::env::var_os(AGENT) {
        Some(path) => PathBuf::from(path),
        None => {
            build::main(workspace)?;
            workspace.join("target/release/profiler-agent")
        }
    };
    let folder = workspace.join("target/kernels");
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let runs = verdict::runs();
    let disk = machine::Disk::new(&folder, &agent, &workloads(workspace, &folder)?, &runs)?;
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for (version, suite) in chosen {
        match check(&folder, version, suite, &disk, &runs) {
            Ok(checked) => rows.extend(checked),
            Err(failure) => failures.push(format!("kernel {version} ({suite}): {failure}")),
        }
    }
    println!("{}", Row::HEADER);
    for row in &rows {
        println!("{row}");
    }
    failures.extend(rows.iter().filter_map(Row::failure));
    if failures.is_empty() {
        eprintln!("xtask: the agent works on all of these kernels");
        Ok(())
    } else {
        Err(format!("not every kernel passed; logs are in {}\n  {}", folder.display(), failures.join("\n  ")))
    }
}

/// Why kernels cannot be fetched on this machine, if so.
pub(crate) fn obstacle() -> Option<String> {
    suite::mirror().err()
}

/// The kernels that arguments name by version or suite; without any, all.
fn choose(arguments: &[String]) -> Result<Vec<(&'static str, &'static str)>, String> {
    let named = |argument: &String| {
        KERNELS.iter().copied().find(|(version, suite)| argument == version || argument == suite).ok_or_else(|| {
            let versions: Vec<&str> = KERNELS.iter().map(|(version, _)| *version).collect();
            format!("there is no kernel {argument:?} here; there are {}", versions.join(", "))
        })
    };
    if arguments.is_empty() { Ok(KERNELS.to_vec()) } else { arguments.iter().map(named).collect() }
}

/// Boots one kernel and judges what it printed.
fn check(folder: &Path, version: &str, suite: &str, disk: &machine::Disk, runs: &[Run]) -> Result<Vec<Row>, String> {
    let kernel = package::kernel(folder, suite)?;
    let begin = Instant::now();
    let log = folder.join(format!("{suite}.log"));
    eprintln!("xtask: booting kernel {version} ({suite}); its console is {}", log.display());
    let console = disk.boot(&kernel, &log)?;
    eprintln!("xtask: kernel {version} took {} s", begin.elapsed().as_secs());
    verdict::judge(&console, runs)
}

/// Compiles the programs to record: without frame pointers, once with and once without shared libraries.
fn workloads(workspace: &Path, folder: &Path) -> Result<Vec<PathBuf>, String> {
    let sources = workspace.join("tests/workloads/native");
    let compile = |name: &str, source: &str, flags: &[&str]| {
        let binary = folder.join(name);
        run(Command::new("gcc")
            .args(["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-pthread"])
            // A plugin is loaded by none of the modes that are used here.
            .args(["-w", "-o"])
            .arg(&binary)
            .arg(sources.join(source))
            .args(flags))
        .map(|()| binary)
    };
    // Linked statically, dlopen makes the linker warn; it is not called.
    Ok(vec![
        compile("shapes", "shapes.c", &["-static", "-Wl,--no-warnings"])?,
        compile("shapes-shared", "shapes.c", &["-ldl"])?,
        compile("waits", "waits.c", &["-static"])?,
    ])
}

//! `cargo xtask fuzz [TARGET...] [--executions N]`: every parser of untrusted bytes, fed with what a fuzzer makes of
//! real ones.
//!
//! cargo-fuzz builds the targets of `fuzz/`; each starts from seeds made of this machine's files, and runs as often as
//! asked or until it finds something.

mod seeds;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use crate::{
    Outcome,
    process::{cargo, find, run},
    setup,
};

/// How often each target runs unless told otherwise.
const EXECUTIONS: u64 = 10_000_000;
/// An input that takes longer than this many seconds, or more memory than this many MiB, is a finding.
const LIMITS: [&str; 2] = ["-timeout=5", "-rss_limit_mb=1024"];
/// A target's name, and the longest input that it is given.
type Target = (&'static str, u32);
/// Targets, and the longest input that each is given: long enough for what it parses to have every part, short enough
/// to be parsed in some microseconds.
const TARGETS: &[Target] = &[
    ("btf", 256),
    ("capture_request", 256),
    ("cgroup_usage", 512),
    ("cgroups", 512),
    ("config", 192),
    ("debug_frame", 512),
    ("debug_info", 4096),
    ("demangle", 128),
    ("eh_frame", 512),
    ("elf", 1536),
    ("executable", 1536),
    ("go_lines", 512),
    ("go_table", 512),
    ("guessed_code", 96),
    ("jitdump", 384),
    ("mappings", 96),
    ("mmap_record", 64),
    ("notices", 256),
    ("otlp_answer", 256),
    ("perf_map", 256),
    ("pod", 2048),
    ("proc_text", 256),
    ("raw_sample", 256),
    ("redact", 256),
    ("scope", 256),
    ("sections", 384),
    ("spool", 384),
    ("symbols", 1536),
    ("table", 512),
    ("unwind_step", 512),
];

/// What a target did.
struct Verdict {
    target: &'static str,
    executions: u64,
    per_second: f64,
    /// The input that was found, if any.
    finding: Option<PathBuf>,
}

pub(crate) fn main(workspace: &Path, arguments: &[String]) -> Outcome {
    let (targets, executions) = choose(arguments)?;
    setup::for_build(workspace)?;
    let tools = workspace.join("target/tools");
    if find("cargo-fuzz").is_none() && !tools.join("bin/cargo-fuzz").is_file() {
        run(cargo(workspace).args(["install", "cargo-fuzz", "--locked", "--root"]).arg(&tools))?;
    }
    build(workspace, &tools)?;
    let folder = workspace.join("target/fuzz");
    seeds::make(&folder)?;
    let mut verdicts = Vec::new();
    for (target, max_len) in targets {
        let verdict = fuzz(&folder, target, max_len, executions)?;
        println!("{}", row(&verdict));
        verdicts.push(verdict);
    }
    println!("\n| target | executions | executions a second | findings |\n|---|---|---|---|");
    for verdict in &verdicts {
        println!("{}", row(verdict));
    }
    let findings: Vec<_> = verdicts.iter().filter_map(|verdict| verdict.finding.as_ref()).collect();
    if findings.is_empty() {
        Ok(())
    } else {
        let findings: Vec<_> = findings.iter().map(|finding| finding.display().to_string()).collect();
        Err(format!("inputs that break something:\n  {}", findings.join("\n  ")))
    }
}

fn choose(arguments: &[String]) -> Result<(Vec<Target>, u64), String> {
    let mut targets = Vec::new();
    let mut executions = EXECUTIONS;
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--executions" {
            let number = words.next().and_then(|number| number.parse().ok());
            executions = number.ok_or("--executions needs a number")?;
        } else {
            let known = TARGETS.iter().find(|(target, _)| target == word).ok_or_else(|| {
                let names: Vec<&str> = TARGETS.iter().map(|(target, _)| *target).collect();
                format!("there is no target {word:?}; there are {}", names.join(", "))
            })?;
            targets.push(*known);
        }
    }
    if targets.is_empty() {
        targets = TARGETS.to_vec();
    }
    Ok((targets, executions))
}

/// Builds every target, with checks for overflow and without sanitizers, which find what safe code cannot do, at half
/// the speed, and need a nightly compiler. Comparisons are not watched either: seeds have the magic numbers.
fn build(workspace: &Path, tools: &Path) -> Outcome {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = [tools.join("bin")].into_iter().chain(env::split_paths(&path));
    let path = env::join_paths(folders).map_err(|error| format!("PATH: {error}"))?;
    run(cargo(workspace)
        .args([
            "fuzz",
            "build",
            "--sanitizer",
            "none",
            "--no-trace-compares",
            "--fuzz-dir",
            "fuzz",
            "--target-dir",
            "target/fuzz/build",
        ])
        .env("PATH", path))
}

/// Runs one target until it is done or finds something.
fn fuzz(folder: &Path, target: &'static str, max_len: u32, executions: u64) -> Result<Verdict, String> {
    let corpus = folder.join("corpus").join(target);
    let findings = folder.join("findings").join(target);
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let binary = folder.join("build/x86_64-unknown-linux-gnu/release").join(target);
    let log = folder.join(format!("{target}.log"));
    let output = fs::File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    eprintln!("xtask: {target}: {executions} executions; what it says goes to {}", log.display());
    let started = Instant::now();
    let status = Command::new(&binary)
        .args([&format!("-runs={executions}"), &format!("-max_len={max_len}"), "-print_final_stats=1"])
        .args(LIMITS)
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .arg(&corpus)
        .arg(folder.join("seeds").join(target))
        .stderr(output)
        .status()
        .map_err(|error| format!("{} cannot be started: {error}", binary.display()))?;
    let seconds = started.elapsed().as_secs_f64();
    let said = fs::read(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    let said = String::from_utf8_lossy(&said);
    let executions = said.lines().rev().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let executions = executions.and_then(|number| number.trim().parse().ok()).unwrap_or_default();
    let finding = said.lines().rev().find_map(|line| line.split_once("Test unit written to ").map(|(_, path)| path));
    if !status.success() && finding.is_none() {
        return Err(format!("{target} ended with {status}: see {}", log.display()));
    }
    Ok(Verdict { target, executions, per_second: executions as f64 / seconds, finding: finding.map(PathBuf::from) })
}

fn row(verdict: &Verdict) -> String {
    let finding = verdict.finding.as_ref().map_or("none".to_owned(), |finding| finding.display().to_string());
    format!("| {} | {} | {:.0} | {finding} |", verdict.target, verdict.executions, verdict.per_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(arguments: &[&str], expect: Result<(usize, u64), &str>) {
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        match (choose(&arguments), expect) {
            (Ok((targets, executions)), Ok(expected)) => assert_eq!((targets.len(), executions), expected),
            (Err(error), Err(expected)) => assert!(error.contains(expected), "{error:?} does not say {expected:?}"),
            (chosen, expected) => panic!("{arguments:?}: {chosen:?} instead of {expected:?}"),
        }
    }

    /// Every target by default; unknown ones and numbers that are none are refused.
    #[test]
    fn chooses_targets() {
        check(&[], Ok((TARGETS.len(), EXECUTIONS)));
        check(&["elf", "--executions", "5", "btf"], Ok((2, 5)));
        check(&["efl"], Err("there is no target"));
        check(&["--executions", "many"], Err("needs a number"));
    }

    /// Every target of `fuzz/` is known here, and the other way round.
    #[test]
    fn knows_every_target() {
        let folder = crate::workspace().join("fuzz/fuzz_targets");
        let files = fs::read_dir(folder).expect("the folder of targets").flatten();
        let mut names: Vec<String> =
            files.filter_map(|file| Some(file.path().file_stem()?.to_str()?.to_owned())).collect();
        names.sort_unstable();
        assert_eq!(names, TARGETS.iter().map(|(target, _)| *target).collect::<Vec<_>>());
    }
}

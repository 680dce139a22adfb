//! `cargo xtask tidy`: format, lints, and the rules that no linter knows.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    Outcome,
    process::{cargo, run},
};

/// Longest source file, in lines before its tests.
const MAX_LINES: usize = 500;

pub(crate) fn main(workspace: &Path) -> Outcome {
    run(cargo(workspace).args(["fmt", "--all", "--check"]))?;
    run(cargo(workspace).args(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))?;
    run(cargo(workspace).args([
        "clippy",
        "--release",
        "--workspace",
        "--exclude",
        "profiler-ebpf",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]))?;
    // What is only there for the fuzz targets.
    run(cargo(workspace).args([
        "clippy",
        "--release",
        "--package",
        "profiler-agent",
        "--lib",
        "--",
        "--cfg",
        "fuzzing",
        "--deny",
        "warnings",
    ]))?;
    let mut sources = Vec::new();
    for folder in ["profiler-common", "profiler-ebpf", "profiler-agent", "fuzz", "tests", "xtask"] {
        collect_sources(&workspace.join(folder), &mut sources)?;
    }
    let mut complaints = Vec::new();
    for path in &sources {
        let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let shown = path.strip_prefix(workspace).unwrap_or(path).display();
        complaints.extend(complaints_about(&text).into_iter().map(|complaint| format!("{shown}: {complaint}")));
    }
    if complaints.is_empty() {
        eprintln!("xtask: tidy: {} source files follow the rules", sources.len());
        Ok(())
    } else {
        Err(format!("tidy found:\n  {}", complaints.join("\n  ")))
    }
}

/// What is wrong with one source file.
fn complaints_about(text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if !text.starts_with("//!") {
        complaints.push("the file does not begin with a `//!` that says what it is for".to_owned());
    }
    let lines = text.lines().take_while(|line| line.trim() != "#[cfg(test)]").count();
    if lines > MAX_LINES {
        complaints.push(format!("{lines} lines before its tests; {MAX_LINES} are allowed"));
    }
    for (number, line) in text.lines().enumerate() {
        let ignored_test = concat!("#[", "ignore");
        if line.trim_start().starts_with(ignored_test) {
            complaints.push(format!("line {}: an ignored test", number + 1));
        }
    }
    complaints
}

fn collect_sources(folder: &Path, sources: &mut Vec<PathBuf>) -> Outcome {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect_sources(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &[&str]) {
        let complaints = complaints_about(text);
        assert_eq!(complaints.len(), expect.len(), "{complaints:?}");
        for (complaint, expected) in complaints.iter().zip(expect) {
            assert!(complaint.contains(expected), "{complaint:?} does not say {expected:?}");
        }
    }

    /// Each rule finds its breach, and nothing else does.
    #[test]
    fn finds_breaches() {
        check("//! Purpose.\nfn x() {}\n", &[]);
        check("fn x() {}\n", &["does not begin"]);
        check(&format!("//! Purpose.\n{}", "\n".repeat(MAX_LINES)), &["501 lines"]);
        check(concat!("//! Purpose.\n#[", "ignore]\nfn x() {}\n"), &["line 2"]);
    }
}

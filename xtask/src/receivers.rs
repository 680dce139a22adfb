//! The receivers of other people's making that tests export to, built from `tests/receivers`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    Outcome,
    process::{find, output, run},
};

/// Programs in Go, each a folder of `tests/receivers`.
const BUILT: &[&str] = &["collector"];
/// Programs that tests use where somebody has installed them, and what is not tested where nobody has.
const FOUND: &[(&str, &str)] = &[
    ("profcheck", "nothing but our own rules says whether requests are valid"),
    ("pyroscope", "no profile is stored in it and queried"),
];

/// Builds what is missing or older than its sources, and says what is not there.
pub(crate) fn build(workspace: &Path) -> Outcome {
    for name in BUILT {
        build_one(workspace, name)?;
    }
    for (name, consequence) in FOUND.iter().filter(|(name, _)| find(name).is_none()) {
        eprintln!("xtask: SKIPPED: there is no program `{name}` on this machine: {consequence}");
    }
    Ok(())
}

fn build_one(workspace: &Path, name: &str) -> Outcome {
    let sources = workspace.join("tests/receivers").join(name);
    let folder = workspace.join("target/receivers");
    let (binary, stamp) = (folder.join(name), folder.join(name).with_extension("sources"));
    let wanted = concatenated(&sources)?;
    if binary.is_file() && fs::read(&stamp).is_ok_and(|built| built == wanted) {
        return Ok(());
    }
    let go = |arguments: &[&str]| {
        let mut go = Command::new("go");
        go.current_dir(&sources).args(arguments).env("CGO_ENABLED", "0");
        go
    };
    // Go refuses a module that needs a newer Go than it is and can get; a build that fails is a failure.
    if output(&mut go(&["list", "-m"])).is_none() {
        eprintln!("xtask: SKIPPED: this machine's Go is too old for {}; nothing is sent to it", sources.display());
        return Ok(());
    }
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(&folder).map_err(failed)?;
    run(go(&["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o"]).arg(&binary))?;
    fs::write(&stamp, wanted).map_err(failed)
}

/// All that a program is made of, its dependencies' checksums included.
fn concatenated(folder: &Path) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let entries = fs::read_dir(folder).map_err(failed)?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let mut bytes = Vec::new();
    for file in files {
        bytes.extend(fs::read(file).map_err(failed)?);
    }
    Ok(bytes)
}

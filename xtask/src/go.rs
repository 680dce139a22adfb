//! Programs of other people's making that tests use, built in Go from a module of `tests/` that names their versions.

use std::{fs, path::PathBuf, process::Command};

use crate::{
    Outcome,
    process::{output, run},
};

/// A module, and what is built of it.
pub(crate) struct Module {
    /// The folder of `go.mod`.
    pub(crate) sources: PathBuf,
    /// Where the programs go.
    pub(crate) folder: PathBuf,
    /// The programs' packages; they are called as the last part of these.
    pub(crate) packages: &'static [&'static str],
    /// Variables to set, for programs that are told their version by the linker.
    pub(crate) variables: fn(&Module) -> String,
}

impl Module {
    /// Builds what is missing or older than its sources; where Go is too old, says what is not tested without it.
    pub(crate) fn build(&self, consequence: &str) -> Outcome {
        let name = self.sources.file_name().unwrap_or_default();
        let stamp = self.folder.join(name).with_extension("sources");
        let wanted = self.concatenated()?;
        let is_built = |package: &&str| self.folder.join(package.rsplit('/').next().unwrap_or(package)).exists();
        if self.packages.iter().all(is_built) && fs::read(&stamp).is_ok_and(|built| built == wanted) {
            return Ok(());
        }
        // Go refuses a module that needs a newer Go than it is and can get; a build that fails is a failure.
        if output(self.go().args(["list", "-m"])).is_none() {
            eprintln!("xtask: SKIPPED: this machine's Go is too old for {}; {consequence}", self.sources.display());
            return Ok(());
        }
        let failed = |error: std::io::Error| format!("{}: {error}", self.folder.display());
        fs::create_dir_all(&self.folder).map_err(failed)?;
        let flags = format!("-ldflags=-s -w {}", (self.variables)(self));
        run(self
            .go()
            .args(["build", "-trimpath", "-buildvcs=false", &flags, "-o"])
            .arg(&self.folder)
            .args(self.packages))?;
        fs::write(&stamp, wanted).map_err(failed)
    }

    /// Go, where the module is. C would be one more thing that a program depends on.
    pub(crate) fn go(&self) -> Command {
        let mut go = Command::new("go");
        go.current_dir(&self.sources).env("CGO_ENABLED", "0");
        go
    }

    /// All that the programs are made of, their dependencies' checksums included.
    fn concatenated(&self) -> Result<Vec<u8>, String> {
        let failed = |error: std::io::Error| format!("{}: {error}", self.sources.display());
        let entries = fs::read_dir(&self.sources).map_err(failed)?;
        let mut files: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
        files.sort();
        let mut bytes = self.packages.join(" ").into_bytes();
        for file in files {
            bytes.extend(fs::read(file).map_err(failed)?);
        }
        Ok(bytes)
    }
}

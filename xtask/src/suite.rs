//! Packages of another Debian suite than this machine's, by the mirror that its apt uses. The machine's own sources
//! and lists are left alone.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::process::{is_root, output, run};

/// Where Debian's packages come from, and the keys that sign them.
pub(crate) struct Mirror {
    address: String,
    /// As an option in a list of sources; empty for apt's own keys.
    keys: String,
}

/// A suite's lists of packages, which are ten times the size of most of them: they go when it does.
pub(crate) struct Suite {
    root: PathBuf,
    name: String,
}

impl Suite {
    /// Fetches the lists of the suite with this name into a folder of their own.
    pub(crate) fn open(root: PathBuf, name: &str) -> Result<Self, String> {
        let mirror = mirror()?;
        let suite = Self { root, name: name.to_owned() };
        for state in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(suite.root.join(state)).map_err(|error| suite.failed(&error))?;
        }
        let source = format!("deb {}{} {name} main\n", mirror.keys, mirror.address);
        fs::write(suite.root.join("sources.list"), source).map_err(|error| suite.failed(&error))?;
        run(apt(&suite.root, "apt-get").args(["-qq", "update"]))?;
        Ok(suite)
    }

    /// What `apt-cache show` says about a package, the newest version first.
    pub(crate) fn about(&self, package: &str) -> Result<String, String> {
        output(apt(&self.root, "apt-cache").args(["show", package]))
            .ok_or_else(|| format!("suite {} has no package {package}", self.name))
    }

    /// Fetches a package and unpacks its files into a folder.
    pub(crate) fn unpack(&self, package: &str, folder: &Path) -> Result<(), String> {
        run(apt(&self.root, "apt-get").args(["-qq", "download", package]))?;
        let archive = files(&self.root)?.into_iter().find(|path| path.extension().is_some_and(|end| end == "deb"));
        let archive = archive.ok_or_else(|| format!("apt-get downloaded no package {package}"))?;
        run(Command::new("dpkg").arg("-x").arg(&archive).arg(folder))?;
        fs::remove_file(&archive).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &std::io::Error) -> String {
        format!("{}: {error}", self.root.display())
    }
}

impl Drop for Suite {
    fn drop(&mut self) {
        // What cannot be removed only takes room.
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// What this machine's apt uses for Debian itself.
pub(crate) fn mirror() -> Result<Mirror, String> {
    let ask = || {
        output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(SOURCESENTRY)",
            "Created-By: Packages",
            "Origin: Debian",
            "Label: Debian",
        ]))
        .and_then(|targets| targets.lines().next().map(str::to_owned))
    };
    let target = match ask() {
        // Without lists, apt does not know whose packages its sources have.
        None if is_root() => {
            run(Command::new("apt-get").args(["update", "-qq"]))?;
            ask()
        }
        known => known,
    };
    let target = target.ok_or("this machine's apt has no source of Debian packages, or no lists (`apt-get update`)")?;
    let (address, entry) = target.split_once(' ').unwrap_or((&target, ""));
    // The entry is a file and a number in it.
    let file = entry.rsplit_once(':').map_or(entry, |(file, _)| file);
    let keys = signed_by(&fs::read_to_string(file).unwrap_or_default());
    Ok(Mirror { address: address.to_owned(), keys })
}

/// The keys that a file of sources names, in either of its forms, as an option.
fn signed_by(sources: &str) -> String {
    let lower = sources.to_ascii_lowercase();
    let file = lower.find("signed-by").and_then(|at| {
        let value = sources[at + "signed-by".len()..].trim_start_matches([':', '=', ' ']);
        value.split(|end: char| end.is_whitespace() || end == ']').next()
    });
    // Keys may also be in the sources themselves; apt's own are used then.
    file.filter(|file| file.starts_with('/')).map(|file| format!("[signed-by={file}] ")).unwrap_or_default()
}

/// An apt program that knows nothing but one suite, and leaves the machine's own state alone.
fn apt(root: &Path, program: &str) -> Command {
    let mut apt = Command::new(program);
    for (option, place) in [
        ("Dir::State", "state"),
        ("Dir::Cache", "cache"),
        ("Dir::Etc::sourcelist", "sources.list"),
        ("Dir::Etc::sourceparts", "none"),
    ] {
        apt.arg("-o").arg(format!("{option}={}", root.join(place).display()));
    }
    for option in [
        "Dir::State::status=/dev/null",
        "Acquire::Languages=none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        // The user apt drops to cannot write here.
        "APT::Sandbox::User=root",
    ] {
        apt.args(["-o", option]);
    }
    apt.current_dir(root);
    apt
}

/// What is in a folder.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys are found in both forms of a file of sources.
    #[test]
    fn finds_keys() {
        let check = |sources: &str, expect: &str| assert_eq!(signed_by(sources), expect);
        check("Types: deb\nSigned-By: /keys/a.gpg\n", "[signed-by=/keys/a.gpg] ");
        check("deb [arch=amd64 signed-by=/keys/b.gpg] x y z\n", "[signed-by=/keys/b.gpg] ");
        check("Signed-By:\n -----BEGIN PGP\n", "");
        check("deb x y z\n", "");
    }
}

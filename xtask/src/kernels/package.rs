//! Fetches a suite's kernel through the mirror that this machine's apt uses, once.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::process::{is_root, output, run};

/// Depends on a suite's newest kernel for VMs.
const ENTRY: &str = "linux-image-cloud-amd64";
/// What begins the names of packages that have the kernel or depend on the one that has it.
const CARRIERS: &[&str] = &["linux-image-", "linux-binary-"];
/// Packages to open in search of a kernel.
const MAX_PACKAGES: usize = 4;

/// Where Debian's packages come from, and the keys that sign them.
pub(super) struct Mirror {
    address: String,
    /// As an option in a list of sources; empty for apt's own keys.
    keys: String,
}

/// The suite's kernel image, from the folder or the mirror.
pub(super) fn kernel(folder: &Path, suite: &str) -> Result<PathBuf, String> {
    let image = folder.join(suite).join("vmlinuz");
    if image.is_file() {
        return Ok(image);
    }
    let root = folder.join(suite).join("apt");
    let fetched = fetch(&root, suite, &image).map_err(|error| format!("the kernel cannot be fetched: {error}"));
    // Lists and packages are ten times the size of the image.
    let _ = fs::remove_dir_all(&root);
    fetched.map(|()| image)
}

/// Finds the package with the kernel, from dependency to dependency, and keeps its image.
fn fetch(root: &Path, suite: &str, image: &Path) -> Result<(), String> {
    let mirror = mirror()?;
    let failed = |error: std::io::Error| format!("{}: {error}", root.display());
    for state in ["state/lists/partial", "cache/archives/partial", "files"] {
        fs::create_dir_all(root.join(state)).map_err(failed)?;
    }
    let source = format!("deb {}{} {suite} main\n", mirror.keys, mirror.address);
    fs::write(root.join("sources.list"), source).map_err(failed)?;
    run(apt(root, "apt-get").args(["-qq", "update"]))?;
    let mut package = ENTRY.to_owned();
    for _ in 0..MAX_PACKAGES {
        let about = output(apt(root, "apt-cache").args(["show", &package]))
            .ok_or_else(|| format!("suite {suite} has no package {package}"))?;
        let carrier = carrier(&about);
        if package != ENTRY {
            run(apt(root, "apt-get").args(["-qq", "download", &package]))?;
            let archive = files(root)?.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "deb"));
            let archive = archive.ok_or_else(|| format!("apt-get downloaded no package {package}"))?;
            run(Command::new("dpkg").arg("-x").arg(&archive).arg(root.join("files")))?;
            fs::remove_file(&archive).map_err(failed)?;
            if let Some(found) = image_in(&root.join("files")) {
                return fs::rename(found, image).map_err(failed);
            }
        }
        package = carrier.ok_or_else(|| format!("package {package} of suite {suite} leads to no kernel"))?;
    }
    Err(format!("{MAX_PACKAGES} packages of suite {suite} have no kernel"))
}

/// The kernel image in the folder of an unpacked package. It moved when `/boot` became the installation's affair.
fn image_in(unpacked: &Path) -> Option<PathBuf> {
    let releases = files(&unpacked.join("usr/lib/modules")).unwrap_or_default();
    let mut candidates = files(&unpacked.join("boot")).unwrap_or_default();
    candidates.extend(releases.iter().map(|release| release.join("vmlinuz")));
    let is_image = |path: &PathBuf| {
        path.is_file() && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    };
    candidates.into_iter().find(is_image)
}

/// The package to look into next, from what `apt-cache show` says about one; versions are listed newest first.
fn carrier(about: &str) -> Option<String> {
    let depends = about.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let names = depends.split([',', '|']).filter_map(|dependency| dependency.split_whitespace().next());
    // The name goes on with the version.
    let carries = |name: &&str| {
        CARRIERS.iter().any(|start| {
            name.strip_prefix(start).is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        })
    };
    names.into_iter().find(carries).map(str::to_owned)
}

/// What this machine's apt uses for Debian itself.
pub(super) fn mirror() -> Result<Mirror, String> {
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

fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's package is found among dependencies, old and new ways of packaging.
    #[test]
    fn follows_dependencies() {
        let check = |depends: &str, expect: Option<&str>| {
            let about = format!("Package: x\nDepends: {depends}\n\nPackage: x\nDepends: linux-image-1-older\n");
            assert_eq!(carrier(&about).as_deref(), expect);
        };
        check("linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)", Some("linux-image-6.1.0-56-cloud-amd64"));
        check("dracut | x (>= 1), linux-base-7.2 (= 7), linux-binary-7.2-cloud (= 7)", Some("linux-binary-7.2-cloud"));
        check("linux-base (>= 4.3~), linux-image-cloud", None);
    }

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

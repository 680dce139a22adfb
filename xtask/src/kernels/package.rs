//! Fetches a suite's kernel, once.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::suite::{Suite, files};

/// Depends on a suite's newest kernel for VMs.
const ENTRY: &str = "linux-image-cloud-amd64";
/// What begins the names of packages that have the kernel or depend on the one that has it.
const CARRIERS: &[&str] = &["linux-image-", "linux-binary-"];
/// Packages to open in search of a kernel.
const MAX_PACKAGES: usize = 4;

/// The suite's kernel image, from the folder or the mirror.
pub(super) fn kernel(folder: &Path, suite: &str) -> Result<PathBuf, String> {
    let image = folder.join(suite).join("vmlinuz");
    if image.is_file() {
        return Ok(image);
    }
    fetch(&folder.join(suite).join("apt"), suite, &image)
        .map_err(|error| format!("the kernel of suite {suite} cannot be fetched: {error}"))?;
    Ok(image)
}

/// Finds the package with the kernel, from dependency to dependency, and keeps its image.
fn fetch(root: &Path, suite: &str, image: &Path) -> Result<(), String> {
    let suite = Suite::open(root.to_owned(), suite)?;
    let unpacked = root.join("files");
    let mut package = ENTRY.to_owned();
    for _ in 0..MAX_PACKAGES {
        let carrier = carrier(&suite.about(&package)?);
        if package != ENTRY {
            suite.unpack(&package, &unpacked)?;
            if let Some(found) = image_in(&unpacked) {
                return fs::rename(found, image).map_err(|error| format!("{}: {error}", image.display()));
            }
        }
        package = carrier.ok_or_else(|| format!("package {package} leads to no kernel"))?;
    }
    Err(format!("{MAX_PACKAGES} packages have no kernel"))
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
}

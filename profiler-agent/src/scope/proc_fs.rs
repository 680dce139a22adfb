//! What `/proc` tells about processes that rules ask about.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
};

use super::rules::Executable;

/// Flag of threads of the kernel's (`include/linux/sched.h`).
const PF_KTHREAD: u32 = 0x20_0000;
/// Most ancestors that are looked at.
const MAX_ANCESTORS: usize = 256;

/// A process's executable file; `None`: the process is ending, or has ended.
pub(super) fn executable(tgid: u32) -> Option<Executable> {
    match fs::read_link(format!("/proc/{tgid}/exe")) {
        Ok(path) => {
            let path = path.to_string_lossy();
            Some(Executable::Path(path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (_, flags) = parent_and_flags(tgid)?;
            (flags & PF_KTHREAD != 0).then_some(Executable::None)
        }
        Err(_) => Some(Executable::Unknown),
    }
}

/// Every process.
pub(super) fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Of each of `processes` which of `roots` it is or descends from, those left out that descend from none.
pub(super) fn lineages(processes: &[u32], roots: &BTreeSet<u32>) -> HashMap<u32, Vec<u32>> {
    if roots.is_empty() {
        return HashMap::new();
    }
    let parents: HashMap<u32, u32> =
        processes.iter().filter_map(|&tgid| Some((tgid, parent_and_flags(tgid)?.0))).collect();
    let lineage = |tgid: u32| {
        let ancestors = std::iter::successors(Some(tgid), |tgid| parents.get(tgid).copied());
        ancestors.take(MAX_ANCESTORS).filter(|ancestor| roots.contains(ancestor)).collect::<Vec<_>>()
    };
    processes.iter().map(|&tgid| (tgid, lineage(tgid))).filter(|(_, lineage)| !lineage.is_empty()).collect()
}

/// Its parent's PID, and its flags (fields 4 and 9 of `/proc/PID/stat`).
fn parent_and_flags(tgid: u32) -> Option<(u32, u32)> {
    parse(&String::from_utf8_lossy(&fs::read(format!("/proc/{tgid}/stat")).ok()?))
}

pub(super) fn parse(stat: &str) -> Option<(u32, u32)> {
    // The command name, field 2, may hold spaces and parentheses; what follows its last `)` may not.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    Some((fields.nth(1)?.parse().ok()?, fields.nth(4)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields are counted from the end of the name, whatever it is.
    #[test]
    fn reads_parent_and_flags() {
        assert_eq!(parse("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"), Some((0, 2_129_984)));
        assert_eq!(parse("7 (a) b) (c) R 5 7 7 0 -1 4194304 1"), Some((5, 4_194_304)));
        for text in ["", "7 (x", "7 (x) R 5", "7 (x) R 5 7 7 0 -1 x"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    /// This very process has an executable, and descends from its parent.
    #[test]
    fn reads_this_process() {
        let own = std::process::id();
        let path = std::env::current_exe().expect("a path").display().to_string();
        assert_eq!(executable(own), Some(Executable::Path(path)));
        assert!(processes().contains(&own));
        let parent = std::os::unix::process::parent_id();
        let lineages = lineages(&processes(), &[own, parent].into());
        assert_eq!(lineages[&own], [own, parent]);
        assert_eq!(executable(u32::MAX), None);
    }
}

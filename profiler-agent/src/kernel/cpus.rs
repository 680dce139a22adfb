//! Which CPUs are online, read from sysfs so that hotplug is seen.

use std::{collections::BTreeSet, fs, io, path::Path};

const ONLINE: &str = "/sys/devices/system/cpu/online";

/// The CPUs that are online now.
pub fn online() -> io::Result<BTreeSet<u32>> {
    let text = fs::read_to_string(Path::new(ONLINE))?;
    parse(text.trim()).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{ONLINE}: {text:?}")))
}

/// Parses the kernel's list format, for example `0-3,6`.
fn parse(list: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last - first > 1 << 16 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(list: &str, expect: Option<&[u32]>) {
        assert_eq!(parse(list), expect.map(|cpus| cpus.iter().copied().collect()), "{list:?}");
    }

    /// Single CPUs, ranges and both mixed; nonsense is refused.
    #[test]
    fn reads_the_kernels_list_format() {
        check("0", Some(&[0]));
        check("0-3", Some(&[0, 1, 2, 3]));
        check("0-1,4,6-7", Some(&[0, 1, 4, 6, 7]));
        check("", None);
        check("3-1", None);
        check("0-4294967295", None);
    }
}

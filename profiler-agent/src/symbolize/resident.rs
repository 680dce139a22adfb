//! Gives file pages back that only symbol look-ups touched.
//!
//! blazesym maps whole files. What it read of their symbol tables stays resident in this process (28 MB after
//! a compiler was sampled), although the next look-up could take it from the page cache as well.

use std::{fs, path::Path};

use tracing::debug;

/// Pages of files that may become resident before they are given back: 4 MiB.
const MAX_PAGES: u64 = 1 << 10;

/// What of this process's resident memory is pages of files.
pub(super) struct FilePages {
    /// After they were given back last: mostly the agent's own code.
    kept: u64,
}

impl FilePages {
    pub(super) fn new() -> Self {
        Self { kept: resident_file_pages() }
    }

    /// Gives them back if there are many.
    pub(super) fn limit(&mut self) {
        if resident_file_pages().saturating_sub(self.kept) > MAX_PAGES {
            self.release();
        }
    }

    /// Gives them back.
    pub(super) fn release(&mut self) {
        release_file_pages();
        self.kept = resident_file_pages();
    }
}

/// The third field of `/proc/self/statm`.
fn resident_file_pages() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split_ascii_whitespace().nth(2).and_then(|pages| pages.parse().ok()).unwrap_or_default()
}

/// Drops this process's resident pages of every file that is mapped shared and read-only. Reading them again
/// is a minor fault as long as the page cache has them.
fn release_file_pages() {
    let maps = match fs::read_to_string("/proc/self/maps") {
        Ok(maps) => maps,
        Err(error) => {
            debug!("own mappings cannot be read: {error}");
            return;
        }
    };
    for (start, len) in maps.lines().filter_map(shared_read_only_file) {
        // SAFETY: the range was just read from the kernel and is one shared, read-only mapping of a file: no
        // content can be lost, only looked up again. Mappings of this kind are made and removed by this thread
        // alone (blazesym runs on it), so the range is still the same mapping.
        let result = unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTNEED) };
        if result != 0 {
            debug!("pages at {start:#x} stay resident: {}", std::io::Error::last_os_error());
        }
    }
}

/// Address and length of the mapping in a line of `/proc/self/maps`, if it is of the kind that is released.
/// (BPF maps are shared and read-only too, but their names are no paths.)
pub(super) fn shared_read_only_file(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let is_released_kind = fields.next()? == "r--s" && Path::new(fields.nth(3)?.trim_start()).is_absolute();
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    is_released_kind.then_some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only shared read-only files are released.
    #[test]
    fn tells_mappings_apart() {
        let check = |line, expect| assert_eq!(shared_read_only_file(line), expect, "{line}");
        check("1000-3000 r--s 00000000 fe:00 77  /usr/lib/libx.so", Some((0x1000, 0x2000)));
        check("1000-3000 r--s 00000000 fe:00 77  /usr/lib/libx.so (deleted)", Some((0x1000, 0x2000)));
        check("1000-3000 r--p 00000000 fe:00 77  /usr/lib/libx.so", None);
        check("1000-3000 rw-s 00000000 fe:00 77  /usr/lib/libx.so", None);
        check("1000-3000 r--s 00000000 00:0e 9  anon_inode:bpf-map", None);
        check("1000-3000 r--s 00000000 00:00 0", None);
    }
}

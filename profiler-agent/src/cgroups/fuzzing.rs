//! What the fuzz target of cgroups calls.

use super::{Cgroups, MAX_BYTES, path};
use crate::fuzzing::Input;

/// Notices of any length in any order, each after a byte that says how long it is; what they name is read, and the books
/// of what is kept balance.
pub fn cgroups(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut cgroups = Cgroups::default();
    while !input.is_empty() {
        let len = usize::from(input.byte());
        let notice = input.piece(len);
        cgroups.notice(notice);
        if let Some(text) = notice.get(16..).and_then(|path| std::str::from_utf8(path).ok()) {
            let said = path::parse(text);
            for (id, at) in &said.containers {
                assert!(text.starts_with(at) && at.contains(id) && id.is_ascii() && id.len() >= 34);
            }
            assert!(said.unit.is_none() || said.containers.is_empty());
        }
    }
    assert!(cgroups.bytes <= MAX_BYTES);
    assert_eq!(cgroups.bytes, cgroups.known.values().map(|known| known.bytes).sum::<usize>());
    let claimed: usize = cgroups.known.values().map(|known| known.cgroup.containers.len()).sum();
    assert_eq!(cgroups.claims.values().map(|claim| claim.users).sum::<usize>(), claimed);
    for known in cgroups.known.values() {
        assert!(!known.cgroup.path.contains(char::is_control));
    }
    for id in cgroups.known.keys().copied().collect::<Vec<_>>() {
        cgroups.forget(id);
    }
    assert!(cgroups.bytes == 0 && cgroups.claims.is_empty());
}

//! What the fuzz targets of perf maps and jitdumps call.

use std::os::unix::fs::FileExt as _;

use super::{MAX_NAME, Names, RuntimeFileKind};
use crate::fuzzing::{Input, file};

/// Most ranges that are kept: few, so that the bound is met.
const MOST: usize = 8;

/// Perf maps, in whatever pieces they appear.
pub fn perf_map(bytes: &[u8]) {
    check(RuntimeFileKind::PerfMap, bytes);
}

/// Jitdumps, in whatever pieces they appear.
pub fn jitdump(bytes: &[u8]) {
    check(RuntimeFileKind::Jitdump, bytes);
}

/// A file that is read while it grows says what it says when it is read at once.
fn check(kind: RuntimeFileKind, bytes: &[u8]) {
    let mut input = Input(bytes);
    let steps: [u8; 4] = input.bytes();
    let contents = input.0;
    let all = |names: &Names| match names {
        Names::PerfMap(map) => map.all(),
        Names::Jitdump(dump) => dump.all(),
    };
    let growing = file(b"");
    let mut in_pieces = Names::of(kind);
    let (mut place, mut piece) = (0, 0);
    while place < contents.len() {
        let len = (usize::from(steps[piece % steps.len()]) + 1).min(contents.len() - place);
        growing.write_all_at(&contents[place..place + len], place as u64).expect("memory for a small file");
        in_pieces.read_on(&growing, &mut u64::MAX.clone(), MOST);
        (place, piece) = (place + len, piece + 1);
    }
    let mut at_once = Names::of(kind);
    at_once.read_on(&growing, &mut u64::MAX.clone(), MOST);
    let ranges = all(&at_once);
    assert_eq!(ranges, all(&in_pieces));
    assert!(ranges.len() <= MOST);
    let ends = ranges.windows(2).all(|pair| pair[0].0 + u64::from(pair[0].1) <= pair[1].0);
    assert!(ends, "ranges overlap");
    for (start, size, _) in ranges {
        for address in [start, start + u64::from(size) - 1] {
            let name = at_once.name(&growing, address);
            assert!(name.as_ref().is_none_or(|(name, _)| (1..=MAX_NAME).contains(&name.len())));
            assert_eq!(name, in_pieces.name(&growing, address));
        }
    }
}

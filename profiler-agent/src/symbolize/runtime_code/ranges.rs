//! Ranges of addresses, each with the place in a file that names it. What was added last holds.

use std::collections::BTreeMap;

/// Estimated bytes of memory that a range takes: a key and a value in a tree whose nodes are about two thirds full.
pub(super) const RANGE_BYTES: usize = 32;

/// A range: bytes, and where its name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    size: u32,
    place: u32,
}

/// Ranges that do not overlap.
#[derive(Debug, Default)]
pub(super) struct CodeRanges {
    ranges: BTreeMap<u64, Range>,
    refused: u64,
}

impl CodeRanges {
    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Adds a range; what it covers of earlier ones is gone. Where there are `most` already, it has no name, rather than
    /// the one of what was there before.
    pub(super) fn insert(&mut self, start: u64, size: u32, place: u32, most: usize) {
        if size == 0 || start.checked_add(u64::from(size)).is_none() {
            return;
        }
        self.clear(start, size, most);
        if self.ranges.len() < most {
            self.ranges.insert(start, Range { size, place });
        } else {
            self.refused += 1;
        }
    }

    /// Ranges that found no room.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Removes a range that begins exactly here; returns its size and place.
    pub(super) fn take(&mut self, start: u64) -> Option<(u32, u32)> {
        self.ranges.remove(&start).map(|range| (range.size, range.place))
    }

    /// The place that names an address, and the size of the range that it is in.
    pub(super) fn place(&self, address: u64) -> Option<(u32, u32)> {
        let (&start, range) = self.ranges.range(..=address).next_back()?;
        (address - start < u64::from(range.size)).then_some((range.place, range.size))
    }

    /// Makes a hole. What lies behind it is given up where a hole would make one range too many.
    fn clear(&mut self, start: u64, size: u32, most: usize) {
        let end = start + u64::from(size);
        let before = self.ranges.range(..start).next_back().map(|(&start, &range)| (start, range));
        if let Some((first, range)) = before {
            let range_end = first + u64::from(range.size);
            if range_end > start {
                // (What is left fits: it is smaller than the range was.)
                self.ranges.insert(first, Range { size: (start - first) as u32, ..range });
            }
            if range_end > end && self.ranges.len() < most {
                self.ranges.insert(end, Range { size: (range_end - end) as u32, ..range });
            }
        }
        while let Some((&first, &range)) = self.ranges.range(start..end).next() {
            self.ranges.remove(&first);
            let range_end = first + u64::from(range.size);
            if range_end > end {
                self.ranges.insert(end, Range { size: (range_end - end) as u32, ..range });
            }
        }
    }

    /// Every range: start, size and place.
    #[cfg(any(test, fuzzing))]
    pub(super) fn all(&self) -> Vec<(u64, u32, u32)> {
        self.ranges.iter().map(|(&start, range)| (start, range.size, range.place)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(added: &[(u64, u32)], expect: &[(u64, u32, u32)]) {
        let mut ranges = CodeRanges::default();
        for (place, &(start, size)) in added.iter().enumerate() {
            ranges.insert(start, size, place as u32, 100);
        }
        assert_eq!(ranges.all(), expect, "{added:?}");
    }

    /// The last range holds; what it leaves of others keeps its place.
    #[test]
    fn later_ranges_win() {
        check(&[(10, 10), (20, 5)], &[(10, 10, 0), (20, 5, 1)]);
        check(&[(10, 10), (10, 10)], &[(10, 10, 1)]);
        check(&[(10, 10), (12, 2)], &[(10, 2, 0), (12, 2, 1), (14, 6, 0)]);
        check(&[(10, 10), (15, 10)], &[(10, 5, 0), (15, 10, 1)]);
        check(&[(10, 10), (5, 10)], &[(5, 10, 1), (15, 5, 0)]);
        check(&[(10, 5), (20, 5), (30, 5), (12, 20)], &[(10, 2, 0), (12, 20, 3), (32, 3, 2)]);
        check(&[(10, 0), (u64::MAX, 2)], &[]);
    }

    /// However many come, there are no more than allowed; and what found no room hides what was there.
    #[test]
    fn is_bounded() {
        let mut ranges = CodeRanges::default();
        for start in 0..100 {
            ranges.insert(start * 16, 16, 7, 10);
        }
        assert_eq!((ranges.len(), ranges.refused()), (10, 90));
        ranges.insert(8, 16, 8, 2);
        assert_eq!((ranges.place(7), ranges.place(8), ranges.place(24)), (Some((7, 8)), None, Some((7, 8))));
        for hole in 2..14 {
            ranges.insert(hole * 12, 1, 9, 10);
            assert!(ranges.len() <= 10);
        }
    }

    #[test]
    fn finds_places() {
        let mut ranges = CodeRanges::default();
        ranges.insert(0x100, 0x10, 3, 10);
        assert_eq!((ranges.place(0xff), ranges.place(0x10f), ranges.place(0x110)), (None, Some((3, 0x10)), None));
        assert_eq!((ranges.take(0x101), ranges.take(0x100), ranges.len()), (None, Some((0x10, 3)), 0));
    }
}

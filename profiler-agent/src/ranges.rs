//! Ranges of a numbered space: allocated, freed, and merged again.

use std::collections::BTreeMap;

/// Some consecutive numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first number.
    pub first: u32,
    /// How many.
    pub len: u32,
}

/// What is free of a numbered space.
#[derive(Clone, Debug)]
pub struct FreeRanges {
    /// First number and length of each free range; no two of them touch.
    free: BTreeMap<u32, u32>,
}

impl FreeRanges {
    /// A space of `len` numbers from zero, all free.
    pub fn new(len: u32) -> Self {
        Self { free: (len > 0).then_some((0, len)).into_iter().collect() }
    }

    /// Takes the first free range that holds at least `min` numbers, and at most `max` of it.
    pub fn allocate(&mut self, min: u32, max: u32) -> Option<Range> {
        let (&first, &len) = self.free.iter().find(|(_, len)| **len >= min.max(1))?;
        self.free.remove(&first);
        let taken = len.min(max.max(min));
        if taken < len {
            self.free.insert(first + taken, len - taken);
        }
        Some(Range { first, len: taken })
    }

    /// Gives back a range, all of which was allocated.
    pub fn free(&mut self, range: Range) {
        let Range { mut first, mut len } = range;
        if len == 0 {
            return;
        }
        if let Some((&before, &before_len)) = self.free.range(..first).next_back()
            && before + before_len == first
        {
            self.free.remove(&before);
            first = before;
            len += before_len;
        }
        if let Some(after_len) = self.free.remove(&(first + len)) {
            len += after_len;
        }
        self.free.insert(first, len);
    }

    /// How many numbers are free.
    pub fn available(&self) -> u32 {
        self.free.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is freed can be allocated again, in one piece with what it touches.
    #[test]
    fn merges_what_touches() {
        let mut space = FreeRanges::new(100);
        let parts: Vec<Range> = (0..10).filter_map(|_| space.allocate(10, 10)).collect();
        assert_eq!((parts.len(), space.available(), space.allocate(1, 1)), (10, 0, None));
        for index in [3, 5, 4] {
            space.free(parts[index]);
        }
        assert_eq!(space.allocate(31, 31), None);
        assert_eq!(space.allocate(30, 30), Some(Range { first: 30, len: 30 }));
    }

    /// Between the least and the most wanted, as much as there is.
    #[test]
    fn takes_as_much_as_there_is() {
        let mut space = FreeRanges::new(10);
        assert_eq!(space.allocate(2, 4), Some(Range { first: 0, len: 4 }));
        assert_eq!(space.allocate(2, 40), Some(Range { first: 4, len: 6 }));
        assert_eq!(FreeRanges::new(0).allocate(0, 0), None);
    }
}

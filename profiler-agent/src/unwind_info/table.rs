//! The unwind table of one executable: rows in pages, ready to be copied into the kernel's maps.

use std::collections::HashMap;

use profiler_common::{
    abi::tables::{MAX_PAGES, MAX_RULES, PAGE_SHIFT, Page, Row},
    unwind::rule::{Rule, cfa},
};

/// Number of the rule for code that no table covers.
pub(super) const NO_RULE: u16 = 0;
/// Number of the rule for code whose rule does not fit into the map.
const UNSUPPORTED: u16 = 1;

/// Every different rule, by its number. Numbers are never given up: there are few.
#[derive(Debug)]
pub(super) struct Rules {
    numbers: HashMap<Rule, u16>,
    /// In the order of their numbers.
    all: Vec<Rule>,
}

impl Default for Rules {
    fn default() -> Self {
        let mut rules = Self { numbers: HashMap::new(), all: Vec::new() };
        let reserved = [cfa::FRAME_POINTER_CHAIN, cfa::UNSUPPORTED].map(|kind| rules.number(Rule::plain(kind)));
        debug_assert_eq!(reserved, [NO_RULE, UNSUPPORTED]);
        rules
    }
}

impl Rules {
    /// The number of a rule; a new one while there is room, then that of the unsupported rule.
    pub(super) fn number(&mut self, rule: Rule) -> u16 {
        if let Some(&number) = self.numbers.get(&rule) {
            return number;
        }
        let Some(number) = u16::try_from(self.all.len()).ok().filter(|_| self.all.len() < MAX_RULES) else {
            return UNSUPPORTED;
        };
        self.numbers.insert(rule, number);
        self.all.push(rule);
        number
    }

    /// Every rule in the order of their numbers.
    pub(super) fn all(&self) -> &[Rule] {
        &self.all
    }
}

/// The rows of one executable.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// Page number of the first page: stated virtual address >> `PAGE_SHIFT`.
    pub(super) base: u32,
    /// End of each page's rows in `rows`; they begin where the page before ends.
    pub(super) page_ends: Vec<u32>,
    /// Rows of all pages.
    pub(super) rows: Vec<Row>,
}

impl Table {
    /// The rows of each page, in order.
    pub(super) fn pages(&self) -> impl Iterator<Item = &[Row]> {
        self.page_ends.iter().enumerate().map(|(index, &end)| {
            let start = index.checked_sub(1).and_then(|before| self.page_ends.get(before)).copied().unwrap_or(0);
            self.rows.get(start as usize..end as usize).unwrap_or_default()
        })
    }
}

/// Why a table cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TooLarge {
    /// It would span more pages than there are.
    Pages,
    /// It would have more rows than the budget allows.
    Rows,
}

/// Writes a table from rows that come in the order of their addresses.
pub(super) struct TableWriter {
    table: Table,
    /// Rule in force at the end of what was written.
    current: u16,
    /// Where that rule begins.
    last: u64,
    max_rows: usize,
}

impl TableWriter {
    /// A table for the code between two stated addresses.
    pub(super) fn new(start: u64, end: u64, max_rows: usize) -> Result<Self, TooLarge> {
        let first = start >> PAGE_SHIFT;
        let pages = (end.saturating_sub(1) >> PAGE_SHIFT).saturating_sub(first) + 1;
        let (Ok(base), true) = (u32::try_from(first), pages <= MAX_PAGES as u64) else {
            return Err(TooLarge::Pages);
        };
        let table = Table { base, ..Table::default() };
        Ok(Self { table, current: NO_RULE, last: first << PAGE_SHIFT, max_rows })
    }

    /// From `address` on, `rule` holds. An address that falls counts as the last one: what a file says about
    /// overlapping pieces of code may be in any order.
    pub(super) fn push(&mut self, address: u64, rule: u16) -> Result<(), TooLarge> {
        if rule == self.current {
            return Ok(());
        }
        let address = address.max(self.last);
        self.last = address;
        // SANITY: `new` limits the span to MAX_PAGES, and callers stay within it.
        let page = ((address >> PAGE_SHIFT) - u64::from(self.table.base)).min(MAX_PAGES as u64) as usize;
        self.reach_page(page);
        let place = (address & 0xffff) as u16;
        self.current = rule;
        let page_start = self.table.page_ends.last().map_or(0, |&end| end as usize);
        let rows = &mut self.table.rows;
        match rows.get_mut(page_start..).and_then(<[Row]>::last_mut) {
            Some(last) if last.place() == place => *last = Row::new(place, rule),
            Some(_) => rows.push(Row::new(place, rule)),
            None => {
                if place != 0 {
                    rows.push(Row::new(0, NO_RULE));
                }
                rows.push(Row::new(place, rule));
            }
        }
        if rows.len() > self.max_rows || rows.len() - page_start > Page::MAX_ROWS {
            Err(TooLarge::Rows)
        } else {
            Ok(())
        }
    }

    /// Ends every page before `page`, and carries the current rule over into each that follows.
    fn reach_page(&mut self, page: usize) {
        while self.table.page_ends.len() < page {
            self.table.page_ends.push(self.table.rows.len() as u32);
            if self.current != NO_RULE {
                self.table.rows.push(Row::new(0, self.current));
            }
        }
    }

    /// The finished table.
    pub(super) fn finish(mut self) -> Table {
        self.table.page_ends.push(self.table.rows.len() as u32);
        self.table.rows.shrink_to_fit();
        self.table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rows: &[(u64, u16)], expect: &[&[(u16, u16)]]) {
        let mut writer = TableWriter::new(0x1_0000, 0x5_0000, 100).expect("small");
        for &(address, rule) in rows {
            writer.push(address, rule).expect("small");
        }
        let table = writer.finish();
        let pages: Vec<Vec<(u16, u16)>> =
            table.pages().map(|page| page.iter().map(|row| (row.place(), row.rule())).collect()).collect();
        assert_eq!(pages, expect, "{rows:x?}");
        assert_eq!(table.base, 1);
    }

    /// A page that has rows begins with the rule carried over from before it.
    #[test]
    fn every_page_begins_with_a_row() {
        check(&[(0x1_0010, 5), (0x1_0020, 6)], &[&[(0, 0), (0x10, 5), (0x20, 6)]]);
        check(&[(0x1_0000, 5), (0x3_0008, 6), (0x3_0010, 0)], &[&[(0, 5)], &[(0, 5)], &[(0, 5), (8, 6), (0x10, 0)]]);
        check(&[(0x3_0000, 7)], &[&[], &[], &[(0, 7)]]);
    }

    /// A rule that goes on needs no row; one that lasts for no byte leaves none.
    #[test]
    fn rows_are_changes() {
        check(&[(0x1_0000, 5), (0x1_0004, 5), (0x1_0008, 6), (0x1_0008, 7)], &[&[(0, 5), (8, 7)]]);
    }

    /// Rows stay in order whatever order they come in, also across pages.
    #[test]
    fn addresses_never_fall() {
        check(&[(0x1_0020, 5), (0x1_001f, 6), (0x1_0030, 7)], &[&[(0, 0), (0x20, 6), (0x30, 7)]]);
        check(&[(0x1_0000, 5), (0x2_0000, 6), (0x1_ffff, 7)], &[&[(0, 5)], &[(0, 7)]]);
        check(&[(0x800, 5), (0x1_0008, 6)], &[&[(0, 5), (8, 6)]]);
    }

    /// Spans and row counts that no real file has are refused.
    #[test]
    fn sizes_are_limited() {
        assert_eq!(TableWriter::new(0, u64::MAX, 100).err(), Some(TooLarge::Pages));
        let mut writer = TableWriter::new(0, 0x1_0000, 2).expect("small");
        assert_eq!((0..4).map(|n| writer.push(n, n as u16 + 1)).find_map(Result::err), Some(TooLarge::Rows));
    }

    /// Rules are numbered once; when there is no room, code ends its stacks under a reason of its own.
    #[test]
    fn rules_are_numbered_once() {
        let mut rules = Rules::default();
        let rule = |offset| Rule { cfa_offset: offset, ..Rule::plain(cfa::STACK_POINTER) };
        assert_eq!((rules.number(rule(8)), rules.number(rule(16)), rules.number(rule(8))), (2, 3, 2));
        for offset in 0..2 * MAX_RULES as i32 {
            rules.number(rule(offset));
        }
        assert_eq!((rules.all().len(), rules.number(rule(-1))), (MAX_RULES, UNSUPPORTED));
    }
}

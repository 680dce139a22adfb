//! Which tables are in the kernel's maps, within the budget.
//!
//! In: finished tables. Out: writes to the maps, in an order that never lets a running program see a part of a
//! change. What was used least lately makes room for what is needed now.

use std::{
    collections::HashMap,
    io,
    time::{Duration, Instant},
};

use profiler_common::{
    abi::tables::{CHUNK_ROWS, ExecutableTable, MAX_CHUNKS, MAX_PAGES, Page, Row, TableState},
    unwind::rule::Rule,
};

use super::table::Table;
use crate::ranges::{FreeRanges, Range};

/// How often it is looked up which tables are in use. What was in use since is not evicted.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The kernel's maps of tables.
pub trait TableMaps {
    /// Sets rules from number `first` on.
    fn set_rules(&mut self, first: u32, rules: &[Rule]) -> io::Result<()>;
    /// Sets pages from index `first` on.
    fn set_pages(&mut self, first: u32, pages: &[Page]) -> io::Result<()>;
    /// Makes an empty chunk, and returns when programs can see it.
    fn add_chunk(&mut self, chunk: u16) -> io::Result<()>;
    /// Frees a chunk.
    fn remove_chunk(&mut self, chunk: u16) -> io::Result<()>;
    /// Sets rows of a chunk from index `first` on.
    fn set_rows(&mut self, chunk: u16, first: u16, rows: &[Row]) -> io::Result<()>;
    /// What is known about an executable, with the marks that programs made.
    fn executable(&self, number: u32) -> io::Result<ExecutableTable>;
    /// Sets what is known about an executable.
    fn set_executable(&mut self, number: u32, table: ExecutableTable) -> io::Result<()>;
    /// Returns when no program uses any more what it saw before the call.
    fn wait_for_programs(&mut self) -> io::Result<()>;
}

/// Sizes and events, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreStats {
    /// Tables in place.
    pub tables: usize,
    /// Rows in place.
    pub rows: usize,
    /// Bytes of kernel memory that rows take, in whole chunks.
    pub bytes: usize,
    /// Tables that made room for others.
    pub evicted: u64,
    /// Tables that found no room.
    pub over_budget: u64,
}

/// A table in place.
struct Placed {
    /// Executables that share it.
    users: Vec<u32>,
    /// What programs need to find it.
    entry: ExecutableTable,
    pages: Range,
    /// Rows, by chunk.
    rows: Vec<(u16, Range)>,
    row_count: usize,
    last_used: Instant,
}

/// Where a table's rows and pages go.
struct Placement {
    pages: Range,
    /// Rows, by chunk.
    rows: Vec<(u16, Range)>,
    entries: Vec<Page>,
}

/// Every table in place, and what is free.
pub(super) struct Store<M> {
    maps: M,
    /// By fingerprint of their source.
    tables: HashMap<u64, Placed>,
    /// Free rows of each chunk that exists.
    chunks: Vec<Option<FreeRanges>>,
    pages: FreeRanges,
    rules: usize,
    max_chunks: usize,
    /// Executables that found no room, and how many rows they need.
    refused: Vec<(u32, usize)>,
    looked: Instant,
    stats: StoreStats,
}

impl<M: TableMaps> Store<M> {
    /// An empty store for at most `budget` bytes of rows.
    pub(super) fn new(mut maps: M, budget: usize) -> io::Result<Self> {
        maps.set_executable(0, ExecutableTable { state: TableState::None as u32, ..ExecutableTable::default() })?;
        let max_chunks = (budget / (CHUNK_ROWS * size_of::<Row>())).clamp(1, MAX_CHUNKS);
        Ok(Self {
            maps,
            tables: HashMap::new(),
            chunks: Vec::new(),
            pages: FreeRanges::new(MAX_PAGES as u32),
            rules: 0,
            max_chunks,
            refused: Vec::new(),
            looked: Instant::now(),
            stats: StoreStats::default(),
        })
    }

    /// The most rows a table can have.
    pub(super) fn max_rows(&self) -> usize {
        self.max_chunks * CHUNK_ROWS
    }

    pub(super) fn stats(&self) -> StoreStats {
        let chunks = self.chunks.iter().flatten().count();
        StoreStats {
            tables: self.tables.len(),
            rows: self.tables.values().map(|table| table.row_count).sum(),
            bytes: chunks * CHUNK_ROWS * size_of::<Row>(),
            ..self.stats
        }
    }

    /// Of some executables the one whose table most samples missed.
    pub(super) fn most_missed(&self, executables: impl Iterator<Item = u32>) -> Option<u32> {
        executables.max_by_key(|&executable| self.maps.executable(executable).map_or(0, |entry| entry.missed))
    }

    /// Notes that an executable's table is about to be built: samples need not ask for it again. (Its number may just have
    /// been forgotten as another file's, and the request with it.)
    pub(super) fn begin(&mut self, executable: u32) -> io::Result<()> {
        let entry = self.maps.executable(executable)?;
        if entry.state == TableState::Absent as u32 {
            self.maps.set_executable(executable, ExecutableTable { state: TableState::Requested as u32, ..entry })?;
        }
        Ok(())
    }

    /// Uses the table of an equal source for another executable. False: there is none.
    pub(super) fn share(&mut self, fingerprint: u64, executable: u32) -> io::Result<bool> {
        let Some(placed) = self.tables.get_mut(&fingerprint) else { return Ok(false) };
        publish(&mut self.maps, executable, placed.entry)?;
        if !placed.users.contains(&executable) {
            placed.users.push(executable);
        }
        Ok(true)
    }

    /// Notes that there is nothing to make a table from.
    pub(super) fn set_none(&mut self, executable: u32) -> io::Result<()> {
        self.set_state(executable, TableState::None)
    }

    /// Notes that a table of so many rows finds no room. It is asked for again when there may be some.
    pub(super) fn refuse(&mut self, executable: u32, rows: usize) -> io::Result<()> {
        self.stats.over_budget += 1;
        self.refused.push((executable, rows));
        self.set_state(executable, TableState::OverBudget)
    }

    fn set_state(&mut self, executable: u32, state: TableState) -> io::Result<()> {
        self.maps.set_executable(executable, ExecutableTable { state: state as u32, ..ExecutableTable::default() })
    }

    /// Puts a table in place for an executable; `rules` are all there are, in the order of their numbers.
    pub(super) fn insert(
        &mut self,
        fingerprint: u64,
        executable: u32,
        table: &Table,
        rules: &[Rule],
    ) -> io::Result<()> {
        if let Some(new) = rules.get(self.rules..)
            && !new.is_empty()
        {
            self.maps.set_rules(self.rules as u32, new)?;
            self.rules = rules.len();
        }
        let page_count = table.page_ends.len() as u32;
        let Some(Placement { pages, rows, entries }) = self.make_place(page_count, table)? else {
            return self.refuse(executable, table.rows.len());
        };
        let entry = ExecutableTable {
            state: TableState::Ready as u32,
            base: table.base,
            first_page: pages.first,
            pages: page_count,
            used: 1,
            missed: 0,
        };
        let written = self.write(executable, table, entry, &rows, &entries);
        let placed = Placed {
            users: vec![executable],
            entry,
            pages,
            rows,
            row_count: table.rows.len(),
            last_used: Instant::now(),
        };
        self.tables.insert(fingerprint, placed);
        if written.is_err() {
            self.free(fingerprint)?;
        }
        written
    }

    /// Writes a table to the maps: what leads to it comes last.
    fn write(
        &mut self,
        executable: u32,
        table: &Table,
        entry: ExecutableTable,
        rows: &[(u16, Range)],
        entries: &[Page],
    ) -> io::Result<()> {
        for ((chunk, range), part) in rows.iter().zip(parts(table, rows)) {
            self.maps.set_rows(*chunk, range.first as u16, part)?;
        }
        self.maps.set_pages(entry.first_page, entries)?;
        publish(&mut self.maps, executable, entry)
    }

    /// Forgets executables: nothing maps them any more. The last user's table is freed.
    pub(super) fn forget(&mut self, executables: &[u32]) -> io::Result<()> {
        self.refused.retain(|(refused, _)| !executables.contains(refused));
        for &executable in executables {
            self.maps.set_executable(executable, ExecutableTable::default())?;
        }
        let unused: Vec<u64> = self
            .tables
            .iter_mut()
            .filter_map(|(fingerprint, placed)| {
                placed.users.retain(|user| !executables.contains(user));
                placed.users.is_empty().then_some(*fingerprint)
            })
            .collect();
        if !unused.is_empty() {
            self.maps.wait_for_programs()?;
        }
        for fingerprint in unused {
            self.free(fingerprint)?;
        }
        Ok(())
    }

    /// Keeps one empty chunk ready, since making one takes as long as ten small tables do.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        let is_empty = |chunk: &FreeRanges| chunk.available() == CHUNK_ROWS as u32;
        let vacant = self.chunks.iter().position(Option::is_none).unwrap_or(self.chunks.len());
        if vacant < self.max_chunks && !self.chunks.iter().flatten().any(is_empty) {
            self.add_chunk(vacant)?;
        }
        Ok(())
    }

    /// Looks up, once in a while, which tables are in use; those that found no room may ask again.
    pub(super) fn look(&mut self) -> io::Result<()> {
        if self.looked.elapsed() < LOOK_EVERY {
            return Ok(());
        }
        self.looked = Instant::now();
        for placed in self.tables.values_mut() {
            for &user in &placed.users {
                let entry = self.maps.executable(user)?;
                if entry.used != 0 {
                    placed.last_used = self.looked;
                    self.maps.set_executable(user, ExecutableTable { used: 0, ..entry })?;
                }
            }
        }
        let idle = self.tables.values().filter(|placed| placed.last_used < self.looked);
        let free = self.chunks.iter().flatten().map(|chunk| chunk.available() as usize).sum::<usize>();
        let missing = self.max_chunks - self.chunks.iter().flatten().count();
        let mut room = idle.map(|placed| placed.row_count).sum::<usize>() + free + missing * CHUNK_ROWS;
        // Building a table just to find that it still does not fit would be a waste.
        let (fitting, refused) = std::mem::take(&mut self.refused).into_iter().partition(|(_, rows)| {
            let fits = *rows + *rows / 8 < room;
            room -= if fits { *rows } else { 0 };
            fits
        });
        self.refused = refused;
        let fitting: Vec<(u32, usize)> = fitting;
        for (executable, _) in fitting {
            self.maps.set_executable(executable, ExecutableTable::default())?;
        }
        Ok(())
    }

    /// Finds room for a table, evicting others if need be; `None` where that does not help.
    fn make_place(&mut self, page_count: u32, table: &Table) -> io::Result<Option<Placement>> {
        loop {
            if let Some(pages) = self.pages.allocate(page_count, page_count) {
                if let Some(placement) = self.place_rows(pages, table)? {
                    return Ok(Some(placement));
                }
                self.pages.free(pages);
            }
            let idle = self
                .tables
                .iter()
                .filter(|(_, placed)| placed.last_used < self.looked)
                .min_by_key(|(_, placed)| placed.last_used)
                .map(|(fingerprint, _)| *fingerprint);
            let Some(idle) = idle else { return Ok(None) };
            self.stats.evicted += 1;
            for user in self.tables.get(&idle).map(|placed| placed.users.clone()).unwrap_or_default() {
                self.maps.set_executable(user, ExecutableTable::default())?;
            }
            self.maps.wait_for_programs()?;
            self.free(idle)?;
        }
    }

    /// Allocates rows for every page: the rows of a page lie together in one chunk.
    fn place_rows(&mut self, pages: Range, table: &Table) -> io::Result<Option<Placement>> {
        let mut left = table.rows.len() as u32;
        let mut placed: Vec<(u16, Range)> = Vec::new();
        let mut entries = Vec::with_capacity(table.page_ends.len());
        // Room left in the range that was allocated last.
        let mut room = 0;
        for page in table.pages() {
            let rows = page.len() as u32;
            if rows == 0 {
                entries.push(Page::default());
                continue;
            }
            if room < rows {
                if let Some((chunk, last)) = placed.last_mut() {
                    self.give_back(*chunk, Range { first: last.first + last.len - room, len: room });
                    last.len -= room;
                }
                let Some((chunk, range)) = self.allocate_rows(rows, left)? else {
                    for (chunk, range) in placed {
                        self.give_back(chunk, range);
                    }
                    self.remove_empty_chunks()?;
                    return Ok(None);
                };
                room = range.len;
                placed.push((chunk, range));
            }
            let Some((chunk, last)) = placed.last() else { return Ok(None) };
            let first = last.first + last.len - room;
            // SANITY: chunks have 2^16 rows, so the index of one fits; tables are written with fewer a page.
            entries.push(Page::new(*chunk, first as u16, rows as u16));
            room -= rows;
            left -= rows;
        }
        if let Some((chunk, last)) = placed.last_mut() {
            last.len -= room;
            let unused = Range { first: last.first + last.len, len: room };
            let chunk = *chunk;
            self.give_back(chunk, unused);
        }
        Ok(Some(Placement { pages, rows: placed, entries }))
    }

    fn allocate_rows(&mut self, min: u32, max: u32) -> io::Result<Option<(u16, Range)>> {
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            if let Some(range) = chunk.as_mut().and_then(|chunk| chunk.allocate(min, max)) {
                return Ok(Some((number as u16, range)));
            }
        }
        let vacant = self.chunks.iter().position(Option::is_none).unwrap_or(self.chunks.len());
        if vacant >= self.max_chunks {
            return Ok(None);
        }
        self.add_chunk(vacant)?;
        let chunk = self.chunks.get_mut(vacant).and_then(Option::as_mut);
        Ok(chunk.and_then(|chunk| chunk.allocate(min, max)).map(|range| (vacant as u16, range)))
    }

    fn add_chunk(&mut self, vacant: usize) -> io::Result<()> {
        self.maps.add_chunk(vacant as u16)?;
        if vacant == self.chunks.len() {
            self.chunks.push(None);
        }
        if let Some(slot) = self.chunks.get_mut(vacant) {
            *slot = Some(FreeRanges::new(CHUNK_ROWS as u32));
        }
        Ok(())
    }

    fn give_back(&mut self, chunk: u16, range: Range) {
        if let Some(Some(chunk)) = self.chunks.get_mut(usize::from(chunk)) {
            chunk.free(range);
        }
    }

    /// Gives back what a table takes. No program may be able to find it any more.
    fn free(&mut self, fingerprint: u64) -> io::Result<()> {
        let Some(placed) = self.tables.remove(&fingerprint) else { return Ok(()) };
        self.pages.free(placed.pages);
        for (chunk, range) in placed.rows {
            self.give_back(chunk, range);
        }
        self.remove_empty_chunks()
    }

    /// Frees all empty chunks but one.
    fn remove_empty_chunks(&mut self) -> io::Result<()> {
        let mut kept = false;
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            let is_empty = chunk.as_ref().is_some_and(|free| free.available() == CHUNK_ROWS as u32);
            if is_empty && !std::mem::replace(&mut kept, true) {
                continue;
            }
            if is_empty {
                *chunk = None;
                self.maps.remove_chunk(number as u16)?;
            }
        }
        Ok(())
    }
}

/// Makes a table known to programs: they must not see its state before the rest.
fn publish(maps: &mut impl TableMaps, executable: u32, entry: ExecutableTable) -> io::Result<()> {
    maps.set_executable(executable, ExecutableTable { state: TableState::Requested as u32, ..entry })?;
    maps.set_executable(executable, entry)
}

/// The rows of a table, cut as they were placed.
fn parts<'a>(table: &'a Table, placed: &'a [(u16, Range)]) -> impl Iterator<Item = &'a [Row]> {
    placed.iter().scan(0usize, |start, (_, range)| {
        let part = table.rows.get(*start..*start + range.len as usize).unwrap_or_default();
        *start += range.len as usize;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unwind_info::table::TableWriter;

    #[derive(Default)]
    struct Maps {
        executables: HashMap<u32, ExecutableTable>,
        pages: HashMap<u32, Page>,
        chunks: HashMap<u16, Vec<Row>>,
    }

    impl TableMaps for Maps {
        fn set_rules(&mut self, _first: u32, _rules: &[Rule]) -> io::Result<()> {
            Ok(())
        }

        fn set_pages(&mut self, first: u32, pages: &[Page]) -> io::Result<()> {
            self.pages.extend((first..).zip(pages.iter().copied()));
            Ok(())
        }

        fn add_chunk(&mut self, chunk: u16) -> io::Result<()> {
            assert!(self.chunks.insert(chunk, vec![Row::default(); CHUNK_ROWS]).is_none());
            Ok(())
        }

        fn remove_chunk(&mut self, chunk: u16) -> io::Result<()> {
            assert!(self.chunks.remove(&chunk).is_some());
            Ok(())
        }

        fn set_rows(&mut self, chunk: u16, first: u16, rows: &[Row]) -> io::Result<()> {
            let first = usize::from(first);
            let chunk = self.chunks.get_mut(&chunk).ok_or(io::ErrorKind::NotFound)?;
            chunk[first..first + rows.len()].copy_from_slice(rows);
            Ok(())
        }

        fn executable(&self, number: u32) -> io::Result<ExecutableTable> {
            Ok(self.executables.get(&number).copied().unwrap_or_default())
        }

        fn set_executable(&mut self, number: u32, table: ExecutableTable) -> io::Result<()> {
            self.executables.insert(number, table);
            Ok(())
        }

        fn wait_for_programs(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A table of `rows` rows, all with the rule `rule`.
    fn table(rows: u64, rule: u16) -> Table {
        let mut writer = TableWriter::new(0, rows * 100, usize::MAX).expect("small");
        for row in 0..rows {
            // Equal rules would be one row.
            writer.push(row * 100, rule + (row % 2) as u16).expect("small");
        }
        writer.finish()
    }

    fn store(mib: usize) -> Store<Maps> {
        let mut store = Store::new(Maps::default(), mib << 20).expect("in memory");
        store.looked = Instant::now();
        store
    }

    fn insert(store: &mut Store<Maps>, executable: u32, rows: u64) {
        let table = table(rows, executable as u16 * 2);
        store.insert(u64::from(executable), executable, &table, &[]).expect("in memory");
    }

    fn state(store: &Store<Maps>, executable: u32) -> u32 {
        store.maps.executables[&executable].state
    }

    /// What the kernel program would find at a stated address.
    fn rule_at(store: &Store<Maps>, executable: u32, address: u64) -> u16 {
        let entry = store.maps.executables[&executable];
        let page = store.maps.pages[&(entry.first_page + (address >> 16) as u32 - entry.base)];
        let first = usize::from(page.first);
        let rows = &store.maps.chunks[&page.chunk][first..first + usize::from(page.rows)];
        rows.iter().rev().find(|row| u64::from(row.place()) <= address & 0xffff).map_or(0, |row| row.rule())
    }

    /// A number that was just forgotten as another file's is not asked for again while its table is being built.
    #[test]
    fn tables_that_are_being_built_are_not_asked_for() {
        let mut store = store(2);
        store.forget(&[1]).expect("in memory");
        store.begin(1).expect("in memory");
        assert_eq!(state(&store, 1), TableState::Requested as u32);
        insert(&mut store, 1, 1000);
        store.begin(1).expect("in memory");
        assert_eq!(state(&store, 1), TableState::Ready as u32);
    }

    /// Every row is found where its address leads, in tables that share chunks and span several.
    #[test]
    fn rows_are_found_by_address() {
        let mut store = store(2);
        for (executable, rows) in [(1, 50_000), (2, 100_000), (3, 10_000)] {
            insert(&mut store, executable, rows);
        }
        for (executable, rows) in [(1, 50_000), (2, 100_000), (3, 10_000)] {
            for row in (0..rows).step_by(997) {
                let expected = executable as u16 * 2 + (row % 2) as u16;
                assert_eq!(rule_at(&store, executable, row * 100 + 50), expected, "{executable} {row}");
            }
        }
    }

    /// What was not used lately makes room; what is in use does not, and the newcomer is refused until it can.
    #[test]
    fn least_used_tables_make_room() {
        let (ready, over_budget) = (TableState::Ready as u32, TableState::OverBudget as u32);
        let mut store = store(2);
        insert(&mut store, 1, 200_000);
        insert(&mut store, 2, 200_000);
        insert(&mut store, 3, 200_000);
        assert_eq!([1, 2, 3].map(|executable| state(&store, executable)), [ready, ready, over_budget]);
        store.looked = Instant::now() - LOOK_EVERY;
        store.look().expect("in memory");
        assert_eq!(state(&store, 3), over_budget, "both others were used since they were placed");
        store.looked = Instant::now() - LOOK_EVERY;
        store.maps.executables.get_mut(&2).expect("placed").used = 1;
        store.look().expect("in memory");
        assert_eq!(state(&store, 3), TableState::Absent as u32, "it may ask again");
        insert(&mut store, 3, 200_000);
        assert_eq!([1, 2, 3].map(|executable| state(&store, executable)), [0, ready, ready]);
        assert!(store.stats().bytes <= 2 << 20);
    }

    /// Equal sources share a table, which is freed with its last user.
    #[test]
    fn tables_are_shared_and_freed_with_their_last_user() {
        let mut store = store(2);
        insert(&mut store, 1, 200_000);
        assert!(store.share(1, 7).expect("in memory"));
        assert!(!store.share(2, 8).expect("in memory"));
        store.forget(&[1]).expect("in memory");
        assert_eq!((store.stats().tables, state(&store, 7)), (1, TableState::Ready as u32));
        store.forget(&[7]).expect("in memory");
        let stats = store.stats();
        assert_eq!((stats.tables, stats.rows, stats.bytes), (0, 0, CHUNK_ROWS * size_of::<Row>()));
    }
}

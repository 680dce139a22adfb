//! What the kernel programs know about processes: ranges of mappings, shared by processes that are copies of
//! each other.
//!
//! In: changes of the process table. Out: writes to the kernel's maps. A published range is never changed: a
//! new one takes its place, and the old one's place is used again only after no program can be reading it.

use std::{collections::HashMap, io, sync::Arc};

use profiler_common::abi::{
    process::ProcessKey,
    tables::{MAX_MAPPINGS, MAX_PROCESSES, MappingRange, MappingRecord},
};

use crate::ranges::{FreeRanges, Range};

/// The kernel's maps of processes and mappings.
pub trait MappingMaps {
    /// Sets mappings from index `first` on.
    fn set_mappings(&mut self, first: u32, mappings: &[MappingRecord]) -> io::Result<()>;
    /// Says which mappings a process has.
    fn set_process(&mut self, process: ProcessKey, range: MappingRange) -> io::Result<()>;
    /// Forgets a process, if it is known.
    fn remove_process(&mut self, process: ProcessKey) -> io::Result<()>;
}

/// Something that changed in the process table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A process has these mappings now.
    Mapped(ProcessKey, Vec<MappingRecord>),
    /// A process is a copy of another.
    Forked {
        /// The process that was copied.
        parent: ProcessKey,
        /// The copy.
        child: ProcessKey,
    },
    /// A process will not be sampled any more.
    Gone(ProcessKey),
}

/// Which processes and mappings are in the kernel's maps.
pub struct Published<M> {
    maps: M,
    processes: HashMap<ProcessKey, Arc<Range>>,
    free: FreeRanges,
    /// Ranges that programs may still be reading.
    released: Vec<Range>,
    /// Processes that found no room.
    refused: u64,
}

impl<M: MappingMaps> Published<M> {
    /// Nothing is known yet.
    pub fn new(maps: M) -> Self {
        Self {
            maps,
            processes: HashMap::new(),
            free: FreeRanges::new(MAX_MAPPINGS as u32),
            released: Vec::new(),
            refused: 0,
        }
    }

    /// How many times a process's mappings found no room.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Makes a change known to the programs.
    pub fn apply(&mut self, change: Change) -> io::Result<()> {
        match change {
            Change::Mapped(process, records) => {
                let len = records.len() as u32;
                let is_room = self.processes.contains_key(&process) || self.processes.len() < MAX_PROCESSES;
                let range = if is_room { self.free.allocate(len, len) } else { None };
                let Some(range) = range else {
                    self.refused += 1;
                    return self.remove(process);
                };
                self.maps.set_mappings(range.first, &records)?;
                self.set(process, Arc::new(range))
            }
            Change::Forked { parent, child } => match self.processes.get(&parent).cloned() {
                Some(range) if self.processes.len() < MAX_PROCESSES => self.set(child, range),
                _ => self.remove(child),
            },
            Change::Gone(process) => self.remove(process),
        }
    }

    /// Reuses what was released. Call when no program can be reading any more what it read before.
    pub fn reuse_released(&mut self) {
        for range in self.released.drain(..) {
            self.free.free(range);
        }
    }

    fn set(&mut self, process: ProcessKey, range: Arc<Range>) -> io::Result<()> {
        self.maps.set_process(process, MappingRange { first: range.first, count: range.len })?;
        let old = self.processes.insert(process, range);
        self.release(old);
        Ok(())
    }

    fn remove(&mut self, process: ProcessKey) -> io::Result<()> {
        let old = self.processes.remove(&process);
        self.release(old);
        // A fork's copy may be there although we never knew of it.
        self.maps.remove_process(process)
    }

    fn release(&mut self, old: Option<Arc<Range>>) {
        if let Some(range) = old.and_then(Arc::into_inner) {
            self.released.push(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Maps {
        mappings: HashMap<u32, MappingRecord>,
        processes: HashMap<ProcessKey, MappingRange>,
    }

    impl MappingMaps for Maps {
        fn set_mappings(&mut self, first: u32, mappings: &[MappingRecord]) -> io::Result<()> {
            self.mappings.extend((first..).zip(mappings.iter().copied()));
            Ok(())
        }

        fn set_process(&mut self, process: ProcessKey, range: MappingRange) -> io::Result<()> {
            self.processes.insert(process, range);
            Ok(())
        }

        fn remove_process(&mut self, process: ProcessKey) -> io::Result<()> {
            self.processes.remove(&process);
            Ok(())
        }
    }

    fn key(tgid: u32) -> ProcessKey {
        ProcessKey { tgid, ..ProcessKey::default() }
    }

    fn records(start: u64) -> Vec<MappingRecord> {
        vec![MappingRecord { start, ..MappingRecord::default() }; 2]
    }

    fn check(published: &Published<Maps>, tgid: u32, expect: Option<u64>) {
        let range = published.maps.processes.get(&key(tgid));
        assert_eq!(range.map(|range| published.maps.mappings[&range.first].start), expect, "{tgid}");
    }

    /// A forked process keeps its parent's mappings for as long as it needs them, whatever becomes of the parent.
    #[test]
    fn copies_outlive_their_originals() {
        let mut published = Published::new(Maps::default());
        let mut apply = |change| {
            published.apply(change).expect("in memory");
            published.reuse_released();
        };
        apply(Change::Mapped(key(1), records(10)));
        apply(Change::Forked { parent: key(1), child: key(2) });
        apply(Change::Mapped(key(1), records(20)));
        apply(Change::Gone(key(1)));
        apply(Change::Mapped(key(3), records(30)));
        check(&published, 1, None);
        check(&published, 2, Some(10));
        check(&published, 3, Some(30));
    }

    /// A place is used again only when no program can be reading it.
    #[test]
    fn places_are_reused_late() {
        let mut published = Published::new(Maps::default());
        for start in 0..4 {
            published.apply(Change::Mapped(key(1), records(start))).expect("in memory");
        }
        let free = |published: &Published<Maps>| published.free.available();
        assert_eq!(free(&published), MAX_MAPPINGS as u32 - 8);
        published.reuse_released();
        assert_eq!(free(&published), MAX_MAPPINGS as u32 - 2);
    }

    /// What finds no room is forgotten rather than left with something old.
    #[test]
    fn room_is_limited() {
        let mut published = Published::new(Maps::default());
        published.apply(Change::Mapped(key(1), records(1))).expect("in memory");
        published.apply(Change::Mapped(key(1), vec![MappingRecord::default(); MAX_MAPPINGS])).expect("in memory");
        check(&published, 1, None);
        assert_eq!(published.refused(), 1);
    }
}

//! The executable mappings of one process, sorted by address.

use std::sync::Arc;

use profiler_common::abi::tables::{MAX_PROCESS_MAPPINGS, MappingRecord};

use super::executables::MappedFile;
use crate::profile::{FileOffset, Location, RuntimeCode};

/// Most mappings kept of one process.
const MAX_MAPPINGS: usize = MAX_PROCESS_MAPPINGS;

/// What backs a mapping.
#[derive(Clone, Debug)]
pub(super) enum Backing {
    File(Arc<MappedFile>),
    /// Code made at run time.
    Anonymous,
}

/// One executable range of addresses.
#[derive(Clone, Debug)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) file_offset: u64,
    pub(super) backing: Backing,
}

/// Mappings that do not overlap, sorted by start.
#[derive(Clone, Debug, Default)]
pub(super) struct Mappings(Vec<Mapping>);

impl Mappings {
    /// Adds a mapping; what it covers of earlier ones is gone.
    pub(super) fn insert(&mut self, mapping: Mapping) {
        if mapping.start >= mapping.end || !self.make_room(&mapping) {
            return;
        }
        let first = self.0.partition_point(|existing| existing.end <= mapping.start);
        let last = self.0.partition_point(|existing| existing.start < mapping.end);
        let mut replacement = Vec::with_capacity(3);
        for existing in self.0.get(first..last).unwrap_or_default() {
            if existing.start < mapping.start {
                replacement.push(Mapping { end: mapping.start, ..existing.clone() });
            }
        }
        let end = mapping.end;
        replacement.push(mapping);
        for existing in self.0.get(first..last).unwrap_or_default() {
            if existing.end > end {
                let skipped = end - existing.start;
                replacement.push(Mapping {
                    start: end,
                    file_offset: existing.file_offset.saturating_add(skipped),
                    ..existing.clone()
                });
            }
        }
        self.0.splice(first..last, replacement);
    }

    /// Keeps the number bounded: files are worth more than code made at run time, of which there can be any
    /// number of pieces.
    fn make_room(&mut self, mapping: &Mapping) -> bool {
        if self.0.len() < MAX_MAPPINGS {
            return true;
        }
        if matches!(mapping.backing, Backing::File(_))
            && let Some(index) = self.0.iter().rposition(|existing| matches!(existing.backing, Backing::Anonymous))
        {
            self.0.remove(index);
            return true;
        }
        false
    }

    /// Where `address`, an address to look up, is in a process that makes `code`.
    pub(super) fn locate(&self, address: u64, code: &Arc<RuntimeCode>) -> Location {
        let index = self.0.partition_point(|mapping| mapping.end <= address);
        match self.0.get(index) {
            Some(mapping) if mapping.start <= address => match &mapping.backing {
                Backing::File(file) => Location::File {
                    executable: Arc::clone(&file.0),
                    offset: FileOffset((address - mapping.start).saturating_add(mapping.file_offset)),
                },
                Backing::Anonymous => Location::Anonymous { code: Arc::clone(code), address },
            },
            _ => Location::Unmapped(address),
        }
    }

    /// The same as the kernel programs see it.
    pub(super) fn records(&self) -> Vec<MappingRecord> {
        let mut records: Vec<MappingRecord> = Vec::with_capacity(self.0.len());
        for mapping in &self.0 {
            let (bias, executable) = match &mapping.backing {
                Backing::File(file) => {
                    let size = mapping.end - mapping.start;
                    match file.0.stated_minus_offset(FileOffset(mapping.file_offset), size) {
                        // Address minus place in the file, minus stated address minus place in the file.
                        Some(shift) => {
                            (mapping.start.wrapping_sub(mapping.file_offset).wrapping_sub(shift), file.0.table)
                        }
                        None => (0, 0),
                    }
                }
                Backing::Anonymous => (0, 0),
            };
            match records.last_mut() {
                Some(last) if (last.end, last.bias, last.executable) == (mapping.start, bias, executable) => {
                    last.end = mapping.end;
                }
                _ => records.push(MappingRecord {
                    start: mapping.start,
                    end: mapping.end,
                    bias,
                    executable,
                    reserved: 0,
                }),
            }
        }
        records
    }

    /// Whether an address is in memory that no file backs.
    pub(super) fn is_anonymous(&self, address: u64) -> bool {
        let index = self.0.partition_point(|mapping| mapping.end <= address);
        let mapping = self.0.get(index).filter(|mapping| mapping.start <= address);
        mapping.is_some_and(|mapping| matches!(mapping.backing, Backing::Anonymous))
    }

    /// Whether there is any such memory.
    pub(super) fn has_anonymous(&self) -> bool {
        self.0.iter().any(|mapping| matches!(mapping.backing, Backing::Anonymous))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use profiler_common::abi::process::ProcessKey;

    use super::*;
    use crate::profile::{Executable, ExecutableId, FileIdentity, Segment, VirtualAddress};

    fn file(id: u32) -> Backing {
        file_with(id, Vec::new())
    }

    fn file_with(id: u32, segments: Vec<Segment>) -> Backing {
        Backing::File(Arc::new(MappedFile(Arc::new(Executable {
            id: ExecutableId(id),
            table: id,
            path: format!("/{id}"),
            build_id: None,
            identity: FileIdentity::default(),
            segments: segments.into(),
            file: Mutex::default(),
            debug: Mutex::default(),
        }))))
    }

    fn check(mappings: &Mappings, address: u64, expect: Option<(u32, u64)>) {
        let code = Arc::new(RuntimeCode::new(ProcessKey::default()));
        let found = match mappings.locate(address, &code) {
            Location::File { executable, offset } => Some((executable.id.0, offset.0)),
            _ => None,
        };
        assert_eq!(found, expect, "{address:#x}");
    }

    /// An address is found in the mapping that covers it, at the right place of the file.
    #[test]
    fn locates_by_range() {
        let mut mappings = Mappings::default();
        mappings.insert(Mapping { start: 0x3000, end: 0x4000, file_offset: 0x800, backing: file(2) });
        mappings.insert(Mapping { start: 0x1000, end: 0x2000, file_offset: 0, backing: file(1) });
        check(&mappings, 0xfff, None);
        check(&mappings, 0x1000, Some((1, 0)));
        check(&mappings, 0x1fff, Some((1, 0xfff)));
        check(&mappings, 0x2000, None);
        check(&mappings, 0x3010, Some((2, 0x810)));
    }

    /// The kernel programs subtract the bias to get the address that the file states, also where the mapping's first
    /// page begins before the segment, and see adjoining mappings of one file as one.
    #[test]
    fn records_lead_to_stated_addresses() {
        let segment = Segment { offset: FileOffset(0x1234), size: 0x5000, address: VirtualAddress(0x40_3234) };
        let mut mappings = Mappings::default();
        let backing = file_with(1, vec![segment]);
        mappings.insert(Mapping { start: 0x7000, end: 0x8000, file_offset: 0x1000, backing: backing.clone() });
        mappings.insert(Mapping { start: 0x8000, end: 0xc000, file_offset: 0x2000, backing });
        mappings.insert(Mapping { start: 0xd000, end: 0xe000, file_offset: 0, backing: Backing::Anonymous });
        let records = mappings.records();
        assert_eq!(
            records.iter().map(|record| (record.start, record.end, record.executable)).collect::<Vec<_>>(),
            [(0x7000, 0xc000, 1), (0xd000, 0xe000, 0)]
        );
        assert_eq!(0x7234u64.wrapping_sub(records[0].bias), 0x40_3234);
    }

    /// A new mapping replaces what it covers and leaves the rest at its right offsets.
    #[test]
    fn newer_mappings_win() {
        let mut mappings = Mappings::default();
        mappings.insert(Mapping { start: 0x1000, end: 0x5000, file_offset: 0x100, backing: file(1) });
        mappings.insert(Mapping { start: 0x2000, end: 0x3000, file_offset: 0, backing: file(2) });
        check(&mappings, 0x1800, Some((1, 0x900)));
        check(&mappings, 0x2000, Some((2, 0)));
        check(&mappings, 0x3000, Some((1, 0x2100)));
        mappings.insert(Mapping { start: 0x0, end: 0x6000, file_offset: 0, backing: file(3) });
        check(&mappings, 0x1800, Some((3, 0x1800)));
        check(&mappings, 0x5fff, Some((3, 0x5fff)));
    }
}

//! The maps that tell the kernel programs about code: unwind tables, and what is mapped where.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    ptr,
};

use aya::{
    Ebpf,
    maps::{Map, MapData},
};
use aya_obj::generated::{BPF_F_MMAPABLE, bpf_map_type::BPF_MAP_TYPE_ARRAY};
use profiler_common::{
    abi::{
        process::ProcessKey,
        tables::{CHUNK_ROWS, ExecutableTable, MAX_CHUNKS, MappingRange, MappingRecord, Page, Row},
    },
    unwind::rule::Rule,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{KernelError, commands};
use crate::{process::MappingMaps, unwind_info::TableMaps};

const CHUNK_BYTES: usize = CHUNK_ROWS * size_of::<Row>();

/// A map of records.
pub(super) struct Records(MapData);

impl Records {
    pub(super) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, KernelError> {
        match ebpf.take_map(name) {
            Some(Map::Array(data) | Map::HashMap(data) | Map::ArrayOfMaps(data)) => Ok(Self(data)),
            _ => Err(KernelError::MissingPart(name)),
        }
    }

    /// Uses a map of records that stays where it is.
    pub(super) fn in_place<T>(
        ebpf: &Ebpf,
        name: &'static str,
        with: impl FnOnce(BorrowedFd<'_>) -> T,
    ) -> Result<T, KernelError> {
        match ebpf.map(name) {
            Some(Map::Array(data) | Map::HashMap(data)) => Ok(with(data.fd().as_fd())),
            _ => Err(KernelError::MissingPart(name)),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd().as_fd()
    }

    pub(super) fn set<T: IntoBytes + Immutable>(&mut self, first: u32, records: &[T]) -> io::Result<()> {
        commands::update(self.fd(), first, records.as_bytes(), records.len())
    }
}

/// The maps of unwind tables.
pub struct KernelTables {
    rules: Records,
    pages: Records,
    executables: Records,
    slots: Records,
    chunks: Vec<Option<MapData>>,
}

impl KernelTables {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Ok(Self {
            rules: Records::take(ebpf, "RULES")?,
            pages: Records::take(ebpf, "PAGES")?,
            executables: Records::take(ebpf, "EXECUTABLES")?,
            slots: Records::take(ebpf, "CHUNKS")?,
            chunks: (0..MAX_CHUNKS).map(|_| None).collect(),
        })
    }

    /// Puts a map into a slot, and returns when no program sees the slot's old content any more.
    fn set_slot(&self, chunk: u16, map: &MapData) -> io::Result<()> {
        let descriptor = map.fd().as_fd().as_raw_fd();
        commands::insert(self.slots.fd(), u32::from(chunk).as_bytes(), descriptor.as_bytes())
    }
}

impl TableMaps for KernelTables {
    fn set_rules(&mut self, first: u32, rules: &[Rule]) -> io::Result<()> {
        self.rules.set(first, rules)
    }

    fn set_pages(&mut self, first: u32, pages: &[Page]) -> io::Result<()> {
        self.pages.set(first, pages)
    }

    fn add_chunk(&mut self, chunk: u16) -> io::Result<()> {
        let definition = aya_obj::Map::new_from_params(
            BPF_MAP_TYPE_ARRAY as u32,
            size_of::<u32>() as u32,
            CHUNK_BYTES as u32,
            1,
            BPF_F_MMAPABLE,
        );
        let map = MapData::create(definition, "rows", None).map_err(io::Error::other)?;
        self.set_slot(chunk, &map)?;
        if let Some(slot) = self.chunks.get_mut(usize::from(chunk)) {
            *slot = Some(map);
        }
        Ok(())
    }

    fn remove_chunk(&mut self, chunk: u16) -> io::Result<()> {
        if let Some(slot) = self.chunks.get_mut(usize::from(chunk)) {
            *slot = None;
        }
        commands::delete(self.slots.fd(), &u32::from(chunk))
    }

    fn set_rows(&mut self, chunk: u16, first: u16, rows: &[Row]) -> io::Result<()> {
        let Some(Some(map)) = self.chunks.get(usize::from(chunk)) else {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        };
        if usize::from(first) + rows.len() > CHUNK_ROWS {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: a new mapping of a whole map's value, which the kernel keeps alive for as long as it is mapped.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                CHUNK_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the rows fit behind `first`, as was checked, and nothing else in this process has the memory
        // mapped; programs may read it, but no page leads them to these rows yet.
        unsafe {
            ptr::copy_nonoverlapping(rows.as_ptr(), mapped.cast::<Row>().add(usize::from(first)), rows.len());
            libc::munmap(mapped, CHUNK_BYTES);
        }
        Ok(())
    }

    fn executable(&self, number: u32) -> io::Result<ExecutableTable> {
        let mut bytes = [0; size_of::<ExecutableTable>()];
        commands::lookup(self.executables.fd(), &number, &mut bytes)?;
        ExecutableTable::read_from_bytes(&bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn set_executable(&mut self, number: u32, table: ExecutableTable) -> io::Result<()> {
        self.executables.set(number, &[table])
    }

    /// Replacing a map in a map waits for the programs that may still see the old one
    /// (`maybe_wait_bpf_programs`, `kernel/bpf/syscall.c`); so does replacing one by itself.
    fn wait_for_programs(&mut self) -> io::Result<()> {
        let chunk = self.chunks.iter().enumerate().find_map(|(number, map)| Some((number as u16, map.as_ref()?)));
        match chunk {
            Some((number, map)) => self.set_slot(number, map),
            // Without any rows no program uses any.
            None => Ok(()),
        }
    }
}

/// The maps that say what is mapped where.
pub struct KernelMappings {
    mappings: Records,
    processes: Records,
}

impl KernelMappings {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Ok(Self { mappings: Records::take(ebpf, "MAPPINGS")?, processes: Records::take(ebpf, "PROCESSES")? })
    }
}

impl MappingMaps for KernelMappings {
    fn set_mappings(&mut self, first: u32, mappings: &[MappingRecord]) -> io::Result<()> {
        self.mappings.set(first, mappings)
    }

    fn set_process(&mut self, process: ProcessKey, range: MappingRange) -> io::Result<()> {
        commands::insert(self.processes.fd(), process.as_bytes(), range.as_bytes())
    }

    fn remove_process(&mut self, process: ProcessKey) -> io::Result<()> {
        match commands::delete(self.processes.fd(), &process) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            outcome => outcome,
        }
    }
}

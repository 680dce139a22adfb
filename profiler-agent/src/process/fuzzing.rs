//! What the fuzz targets of notices, mappings and `/proc` call.

use std::sync::{Arc, Mutex};

use profiler_common::abi::process::ProcessKey;

use super::{
    Change, NewMapping, ProcessTable,
    executables::MappedFile,
    mappings::{Backing, Mapping, Mappings},
    proc_fs::{parse_maps_line, parse_start_ticks, parse_status},
};
use crate::{
    fuzzing::Input,
    profile::{
        Executable, ExecutableId, FileIdentity, FileOffset, Location, RawSample, RuntimeCode, Segment, VirtualAddress,
    },
};

/// Lines of `/proc/PID/maps` and of `/proc/PID/stat`: what was read is what the line says.
pub fn proc_text(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = (parse_start_ticks(&text), parse_status(&text));
    let Some(line) = parse_maps_line(&text) else { return };
    let (major, minor) = (line.device >> 20, line.device & 0xf_ffff);
    let place = format!("{:x}-{:x} r-xp {:x} {major:x}:{minor:x}", line.start, line.end, line.file_offset);
    let deleted = if line.path.is_empty() { "" } else { " (deleted)" };
    let written = format!("{place} {} {}{deleted}", line.inode, line.path);
    assert_eq!(parse_maps_line(&written), Some(line));
}

/// What the kernel announces, in any order: the table never remembers more than it was told.
pub fn notices(bytes: &[u8]) {
    /// No process has a PID with this bit: nothing is read from `/proc`.
    const NO_PROCESS: u32 = 1 << 30;
    /// Bytes of the longest notice.
    const NOTICE: usize = 40;
    let mut input = Input(bytes);
    let mut table = ProcessTable::default();
    let mut told = 0;
    while !input.is_empty() {
        told += 2;
        match input.byte() % 8 {
            0 => drop(table.end_drain()),
            1 => table.mapped(&NewMapping {
                tgid: u32::from(input.byte()) | NO_PROCESS,
                start: input.half().into(),
                end: input.half().into(),
                file_offset: input.word(),
                device: 0,
                inode: input.byte().into(),
            }),
            2 => {
                let len = usize::from(input.byte());
                if let Ok(mut sample) = RawSample::decode(input.piece(len)) {
                    sample.process.tgid |= NO_PROCESS;
                    let frames = sample.kernel.len() + sample.user.len();
                    assert!(table.locate(sample, None).locations.len() <= frames);
                }
            }
            3 => {
                for change in table.take_changes() {
                    if let Change::Mapped(_, records) = change {
                        assert!(records.windows(2).all(|pair| pair[0].end <= pair[1].start));
                    }
                }
            }
            _ => {
                let mut notice = [0; NOTICE];
                let len = usize::from(input.byte()) % (NOTICE + 1);
                let piece = input.piece(len);
                notice[..piece.len()].copy_from_slice(piece);
                // The PIDs of the process and of a child.
                notice[8 + 3] |= 0x40;
                notice[24 + 3] |= 0x40;
                table.notice(&notice[..piece.len()]);
            }
        }
    }
    let stats = table.stats();
    assert!(stats.processes <= told && stats.executables == 0);
    assert!(stats.notices_malformed <= stats.notices);
}

/// Mappings in any order: every address belongs to what was mapped there last.
pub fn mappings(bytes: &[u8]) {
    const SPACE: usize = 128;
    const MAX_INSERTED: usize = 24;
    let files = [1, 2].map(|id| {
        Arc::new(MappedFile(Arc::new(Executable {
            id: ExecutableId(id),
            table: id,
            path: String::new(),
            build_id: None,
            identity: FileIdentity::default(),
            segments: [Segment { offset: FileOffset(3), size: 200, address: VirtualAddress(1000) }].into(),
            file: Mutex::default(),
            debug: Mutex::default(),
        })))
    });
    let mut input = Input(bytes);
    let mut mappings = Mappings::default();
    let mut expected: Vec<Option<(u32, u64)>> = vec![None; SPACE];
    for _ in 0..MAX_INSERTED {
        if input.is_empty() {
            break;
        }
        let [start, len, file_offset, backing] = input.bytes();
        let (start, len) = (usize::from(start) % (SPACE / 2), usize::from(len) % (SPACE / 2));
        let end = start + len;
        let file = files.get(usize::from(backing % 3));
        mappings.insert(Mapping {
            start: start as u64,
            end: end as u64,
            file_offset: file_offset.into(),
            backing: file.map_or(Backing::Anonymous, |file| Backing::File(Arc::clone(file))),
        });
        for (address, place) in expected.iter_mut().enumerate().take(end).skip(start) {
            *place =
                Some(file.map_or((0, address as u64), |file| {
                    (file.0.id.0, u64::from(file_offset) + (address - start) as u64)
                }));
        }
    }
    let code = Arc::new(RuntimeCode::new(ProcessKey::default()));
    for (address, expected) in expected.iter().enumerate() {
        let found = match mappings.locate(address as u64, &code) {
            Location::File { executable, offset } => Some((executable.id.0, offset.0)),
            Location::Anonymous { address, .. } => Some((0, address)),
            _ => None,
        };
        assert_eq!(found, *expected, "{address}");
    }
    let records = mappings.records();
    assert!(records.iter().all(|record| record.start < record.end));
    assert!(records.windows(2).all(|pair| pair[0].end <= pair[1].start));
    let mapped: u64 = records.iter().map(|record| record.end - record.start).sum();
    assert_eq!(mapped as usize, expected.iter().flatten().count());
}

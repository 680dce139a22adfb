//! Jitdumps: records of code that was made, with its bytes, and of code that was moved.
//!
//! Format: `tools/perf/Documentation/jitdump-specification.txt` in the kernel's source. Records are appended; the bytes of
//! code are passed over. Names stay in the file and are read when they are asked for.

use std::{fs::File, os::unix::fs::FileExt as _};

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{
    MAX_NAME, Progress,
    ranges::{CodeRanges, RANGE_BYTES},
    text,
};
use crate::regular_file::Stamp;

const MAGIC: u32 = 0x4a69_5444;
/// Bytes that are read at once: a record without the code, most of the time.
const PIECE: usize = 512;

/// The beginning of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: u32,
    version: u32,
    /// Bytes of this header, and of what later versions may add.
    total_size: u32,
    elf_machine: u32,
    reserved: u32,
    pid: u32,
    timestamp: u64,
    flags: u64,
}

/// What each record begins with.
#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Prefix {
    id: u32,
    /// Bytes of the record, with this.
    total_size: u32,
    timestamp: u64,
}

/// Code was made. A name that ends in a zero and the code follow.
const LOAD: u32 = 0;
#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Load {
    prefix: Prefix,
    pid: u32,
    thread: u32,
    /// Where it was made.
    vma: u64,
    /// Where it runs.
    address: u64,
    size: u64,
    index: u64,
}

/// Code was moved.
const MOVE: u32 = 1;
#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Move {
    prefix: Prefix,
    pid: u32,
    thread: u32,
    vma: u64,
    old_address: u64,
    address: u64,
    size: u64,
    index: u64,
}

/// Nothing follows.
const CLOSE: u32 = 3;

/// What a jitdump says, up to where it was read.
#[derive(Debug, Default)]
pub(super) struct Jitdump {
    ranges: CodeRanges,
    header: Option<Header>,
    /// Where the first record begins that was not read yet.
    read: u64,
    /// It is no jitdump, is broken, or says that it has ended.
    has_ended: bool,
    stamp: Option<Stamp>,
}

impl Jitdump {
    /// Reads what was added since the last time, as [`PerfMap::read_on`](super::perf_map::PerfMap::read_on) does.
    pub(super) fn read_on(&mut self, file: &File, allowance: &mut u64, most: usize) -> Progress {
        let Some(stamp) = Stamp::of(file) else { return Progress::Same };
        if self.stamp == Some(stamp) {
            return Progress::Same;
        }
        if *allowance < PIECE as u64 {
            return Progress::Same;
        }
        let mut pieces = Pieces { file, allowance, bytes: [0; PIECE], start: 0, len: 0 };
        // (While it was written, names may have been missed that are in it again.)
        let mut progress = if self.stamp.is_some() { Progress::Added } else { Progress::Same };
        let header = pieces.record::<Header>(0);
        if stamp.size < self.read || self.header.is_some() && header != self.header {
            *self = Self::default();
            progress = Progress::Restarted;
        }
        self.stamp = None;
        if self.header.is_none()
            && let Some(header) = header
        {
            self.header = Some(header);
            self.read = header.total_size.into();
            let is_known = header.magic == MAGIC && header.version == 1;
            self.has_ended = !is_known || self.read < size_of::<Header>() as u64;
        }
        while !self.has_ended
            && let Some(header) = self.header
            && let Some(prefix) = pieces.record::<Prefix>(self.read)
        {
            let next = self.read.saturating_add(prefix.total_size.into());
            if (prefix.total_size as usize) < size_of::<Prefix>() || next > u64::from(u32::MAX) {
                self.has_ended = true;
            } else if next > stamp.size || !self.take(&mut pieces, prefix, header.pid, most) {
                break;
            } else {
                self.read = next;
                progress = progress.max(Progress::Added);
            }
        }
        if *pieces.allowance > 0 {
            self.stamp = Some(stamp);
        }
        progress
    }

    /// Takes over one record; false where it cannot be read now.
    fn take(&mut self, pieces: &mut Pieces<'_>, prefix: Prefix, pid: u32, most: usize) -> bool {
        match prefix.id {
            LOAD if prefix.total_size as usize > size_of::<Load>() => {
                let Some(load) = pieces.record::<Load>(self.read) else { return false };
                if load.pid == pid
                    && let (Ok(size), Ok(place)) = (u32::try_from(load.size), u32::try_from(self.read))
                {
                    self.ranges.insert(load.address, size, place, most);
                }
            }
            MOVE if prefix.total_size as usize >= size_of::<Move>() => {
                let Some(moved) = pieces.record::<Move>(self.read) else { return false };
                if moved.pid == pid
                    && let Some((size, place)) = self.ranges.take(moved.old_address)
                {
                    self.ranges.insert(moved.address, size, place, most);
                }
            }
            CLOSE => self.has_ended = true,
            // Lines of source, unwind tables, and what others may add.
            _ => {}
        }
        true
    }

    /// The name of what holds the address.
    pub(super) fn name(&self, file: &File, address: u64) -> Option<String> {
        let (place, size) = self.ranges.place(address)?;
        let mut record = [0; size_of::<Load>() + MAX_NAME];
        let len = file.read_at(&mut record, place.into()).ok()?;
        let (load, name) = Load::read_from_prefix(&record[..len]).ok()?;
        let is_that = load.prefix.id == LOAD && load.size >= size.into();
        let room = (load.prefix.total_size as usize).checked_sub(size_of::<Load>()).filter(|_| is_that)?;
        text(name[..room.min(name.len())].split(|&byte| byte == 0).next()?)
    }

    /// Ranges that found no room.
    pub(super) fn refused(&self) -> u64 {
        self.ranges.refused()
    }

    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.ranges.len() * RANGE_BYTES
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn all(&self) -> Vec<(u64, u32, u32)> {
        self.ranges.all()
    }
}

/// A file, read in pieces.
struct Pieces<'a> {
    file: &'a File,
    allowance: &'a mut u64,
    bytes: [u8; PIECE],
    start: u64,
    len: usize,
}

impl Pieces<'_> {
    /// The structure at a place; `None` where the file or the allowance ends before.
    fn record<T: FromBytes + KnownLayout + Immutable>(&mut self, place: u64) -> Option<T> {
        let offset = |pieces: &Self| place.checked_sub(pieces.start).and_then(|offset| usize::try_from(offset).ok());
        let is_held = offset(self).is_some_and(|offset| offset.saturating_add(size_of::<T>()) <= self.len);
        if !is_held {
            if *self.allowance < PIECE as u64 {
                *self.allowance = 0;
                return None;
            }
            self.len = self.file.read_at(&mut self.bytes, place).ok()?;
            self.start = place;
            *self.allowance -= PIECE as u64;
        }
        let (record, _) = T::read_from_prefix(self.bytes.get(offset(self)?..self.len)?).ok()?;
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::file, *};

    const MOST: usize = 1000;

    fn header() -> Vec<u8> {
        let words = [MAGIC, 1, 40, 62, 0, 7, 1, 0, 0, 0];
        words.iter().flat_map(|word: &u32| word.to_ne_bytes()).collect()
    }

    fn record(id: u32, words: &[u64], rest: &[u8]) -> Vec<u8> {
        let total = (16 + 8 * words.len() + rest.len()) as u32;
        let mut bytes: Vec<u8> = [id, total, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes.extend(rest);
        bytes
    }

    fn load(pid: u64, address: u64, size: usize, name: &str) -> Vec<u8> {
        let rest = [name.as_bytes(), &[0], &vec![0xcc; size]].concat();
        record(LOAD, &[pid, address, address, size as u64, 1], &rest)
    }

    fn read(dump: &mut Jitdump, file: &File) -> Progress {
        dump.read_on(file, &mut u64::MAX.clone(), MOST)
    }

    /// Code that was made has its name, code that was moved has it where it is now, and what another process wrote into
    /// the file it inherited is not ours.
    #[test]
    fn follows_code() {
        let moved = record(MOVE, &[7, 0, 0x1000, 0x9000, 0x800, 1], &[]);
        let records = [
            header(),
            load(7, 0x1000, 0x800, "first"),
            record(2, &[1, 2, 3], b"lines of source"),
            load(7, 0x2000, 0x10, "second"),
            load(8, 0x3000, 0x10, "of another process"),
            moved,
            load(7, 0x2008, 0x10, "third"),
            record(CLOSE, &[], &[]),
            load(7, 0x4000, 0x10, "after the end"),
        ];
        let contents = records.concat();
        let whole = file(&contents);
        let mut dump = Jitdump::default();
        assert_eq!(read(&mut dump, &whole), Progress::Added);
        let names = [(0x9000, "first"), (0x97ff, "first"), (0x2007, "second"), (0x2010, "third")];
        for (address, name) in names {
            assert_eq!(dump.name(&whole, address).as_deref(), Some(name), "{address:#x}");
        }
        for address in [0x1000, 0x2018, 0x3000, 0x4000] {
            assert_eq!(dump.name(&whole, address), None, "{address:#x}");
        }
        assert_eq!(read(&mut dump, &whole), Progress::Same);
        // The same in the smallest of steps, and with the smallest of allowances.
        let growing = file(b"");
        let mut again = Jitdump::default();
        for (place, byte) in contents.iter().enumerate() {
            growing.write_all_at(&[*byte], place as u64).expect("room");
            again.read_on(&growing, &mut (PIECE as u64 * 4), MOST);
        }
        assert_eq!(again.all(), dump.all());
    }

    /// Where nothing may be read, nothing is known to have changed.
    #[test]
    fn waits_for_an_allowance() {
        let file = file(&[header(), load(7, 0x1000, 0x10, "first")].concat());
        let mut dump = Jitdump::default();
        read(&mut dump, &file);
        let end = file.metadata().expect("a file").len();
        file.write_all_at(&load(7, 0x2000, 0x10, "second"), end).expect("room");
        assert_eq!(dump.read_on(&file, &mut 10, MOST), Progress::Same);
        assert_eq!((dump.name(&file, 0x1000).as_deref(), dump.name(&file, 0x2000)), (Some("first"), None));
        assert_eq!(read(&mut dump, &file), Progress::Added);
        assert_eq!(dump.name(&file, 0x2000).as_deref(), Some("second"));
    }

    /// A file that was written anew is another one.
    #[test]
    fn starts_again_when_the_file_was_rewritten() {
        let file = file(&[header(), load(7, 0x1000, 0x10, "first")].concat());
        let mut dump = Jitdump::default();
        read(&mut dump, &file);
        let mut other = header();
        other[24] = 9;
        file.write_all_at(&[other, load(7, 0x2000, 0x10, "second"), load(7, 0x3000, 0x10, "third")].concat(), 0)
            .expect("room");
        assert_eq!(read(&mut dump, &file), Progress::Restarted);
        assert_eq!((dump.name(&file, 0x1000), dump.name(&file, 0x3000).as_deref()), (None, Some("third")));
    }

    /// Files that are none, and records that lie about their size.
    #[test]
    fn survives_lies() {
        let check = |contents: &[&[u8]]| {
            let file = file(&contents.concat());
            let mut dump = Jitdump::default();
            read(&mut dump, &file);
            assert!(dump.all().is_empty(), "{contents:?}");
        };
        let good = load(7, 0x1000, 0x10, "name");
        check(&[b"\x7fELF", &good]);
        let mut swapped = header();
        swapped[..4].reverse();
        check(&[&swapped, &good]);
        let mut short = good.clone();
        short[4..8].fill(0);
        check(&[&header(), &short, &good]);
        let mut long = good.clone();
        long[7] = 0x7f;
        check(&[&header(), &long, &good]);
        let mut huge = good.clone();
        huge[40 + 4] = 1;
        check(&[&header(), &huge]);
    }
}

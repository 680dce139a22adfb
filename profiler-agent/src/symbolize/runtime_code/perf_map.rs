//! `/tmp/perf-PID.map`: lines of address, size and name.
//!
//! ```text
//! 7f9e84006040 254 JS:*hot /srv/app.js:2:18
//! ```
//!
//! Format: `tools/perf/Documentation/jit-interface.txt` in the kernel's source. Lines are appended as code is made, and
//! some runtimes write the whole file anew when they are asked to. Names stay in the file; they are read when they are
//! asked for, and only believed where their line still says what it said.

use std::{fs::File, os::unix::fs::FileExt as _};

use super::{
    MAX_NAME, Progress,
    ranges::{CodeRanges, RANGE_BYTES},
    text,
};
use crate::regular_file::Stamp;

/// Longest line that is read as a whole. Of a longer one the beginning counts.
const MAX_LINE: usize = if cfg!(fuzzing) { 64 } else { 64 << 10 };
/// Bytes at the beginning of what was read, and at its end, by which a file that was rewritten is told.
const SEAM: usize = 64;
/// Most bytes of two numbers and what is around them.
const MAX_NUMBERS: usize = 40;

/// What a perf map says, up to where it was read.
#[derive(Debug, Default)]
pub(super) struct PerfMap {
    ranges: CodeRanges,
    /// Where the first line begins that was not read yet.
    read: u64,
    /// What is left to be read of a line that is too long.
    is_inside_line: bool,
    head: Vec<u8>,
    tail: Vec<u8>,
    /// What the file looked like when all of it was read.
    stamp: Option<Stamp>,
}

impl PerfMap {
    /// Reads what was added since the last time, at most `allowance` bytes, which it is reduced by; everything, if the
    /// file is not what it was. Keeps at most `most` ranges.
    pub(super) fn read_on(&mut self, file: &File, allowance: &mut u64, most: usize) -> Progress {
        let Some(stamp) = Stamp::of(file) else { return Progress::Same };
        if self.stamp == Some(stamp) {
            return Progress::Same;
        }
        // (While it was written, names may have been missed that are in it again.)
        let mut progress = if self.stamp.is_some() { Progress::Added } else { Progress::Same };
        if !self.continues(file, stamp) {
            *self = Self::default();
            progress = Progress::Restarted;
        }
        self.stamp = None;
        let mut buffer: Box<[u8]> = vec![0; MAX_LINE].into();
        loop {
            let want = usize::try_from(*allowance).unwrap_or(usize::MAX).min(MAX_LINE);
            if want == 0 || self.read > u64::from(u32::MAX) {
                break;
            }
            let Ok(len) = file.read_at(&mut buffer[..want], self.read) else { break };
            *allowance -= len as u64;
            let consumed = self.parse(&buffer[..len], len == MAX_LINE, most);
            self.remember(&buffer[..consumed]);
            self.read += consumed as u64;
            if consumed > 0 {
                progress = progress.max(Progress::Added);
            } else if want == MAX_LINE {
                // The end, or a line that is not finished.
                self.stamp = Some(stamp);
                break;
            } else {
                break;
            }
        }
        progress
    }

    /// The name of what holds the address.
    pub(super) fn name(&self, file: &File, address: u64) -> Option<String> {
        let (place, _) = self.ranges.place(address)?;
        let mut line = [0; MAX_NUMBERS + MAX_NAME];
        let len = file.read_at(&mut line, place.into()).ok()?;
        let line = line[..len].split(|&byte| byte == b'\n').next()?;
        let (start, size, name) = parse_line(line)?;
        // The file may have been rewritten since.
        (address.checked_sub(start)? < u64::from(size)).then(|| text(name)).flatten()
    }

    /// Ranges that found no room.
    pub(super) fn refused(&self) -> u64 {
        self.ranges.refused()
    }

    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + 2 * SEAM + self.ranges.len() * RANGE_BYTES
    }

    /// Whether the file still begins as it did, and holds what was read last where it was.
    fn continues(&self, file: &File, stamp: Stamp) -> bool {
        let is_at = |expected: &[u8], place: u64| {
            let mut found = [0; SEAM];
            let found = &mut found[..expected.len()];
            file.read_exact_at(found, place).is_ok() && found == expected
        };
        stamp.size >= self.read
            && is_at(&self.head, 0)
            && is_at(&self.tail, self.read.saturating_sub(self.tail.len() as u64))
    }

    /// Keeps the ends of what was read.
    fn remember(&mut self, piece: &[u8]) {
        self.head.extend_from_slice(&piece[..piece.len().min(SEAM - self.head.len())]);
        self.tail.extend_from_slice(&piece[piece.len().saturating_sub(SEAM)..]);
        self.tail.drain(..self.tail.len().saturating_sub(SEAM));
    }

    /// Takes over every line that ends in a piece of the file; returns how many bytes need not be read again.
    fn parse(&mut self, piece: &[u8], is_long: bool, most: usize) -> usize {
        let mut at = 0;
        while let Some(len) = piece[at..].iter().position(|&byte| byte == b'\n') {
            if !std::mem::take(&mut self.is_inside_line) {
                self.add(&piece[at..at + len], at, most);
            }
            at += len + 1;
        }
        if self.is_inside_line {
            return piece.len();
        }
        if at == 0 && is_long {
            self.add(piece, 0, most);
            self.is_inside_line = true;
            return piece.len();
        }
        at
    }

    fn add(&mut self, line: &[u8], at: usize, most: usize) {
        if let Some((start, size, _)) = parse_line(line)
            && let Ok(place) = u32::try_from(self.read + at as u64)
        {
            self.ranges.insert(start, size, place, most);
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn all(&self) -> Vec<(u64, u32, u32)> {
        self.ranges.all()
    }
}

/// Address, size and name of a line; `None` where it has none.
fn parse_line(line: &[u8]) -> Option<(u64, u32, &[u8])> {
    let mut fields = line.splitn(3, |&byte| byte == b' ');
    let start = hex(fields.next()?)?;
    let size = u32::try_from(hex(fields.next()?)?).ok().filter(|&size| size > 0)?;
    let name = fields.next().filter(|name| !name.is_empty())?;
    start.checked_add(size.into())?;
    Some((start, size, name))
}

fn hex(digits: &[u8]) -> Option<u64> {
    let digits = digits.strip_prefix(b"0x").unwrap_or(digits);
    // (`from_str_radix` takes a sign too.)
    let is_number = !digits.is_empty() && digits.len() <= 16 && digits.iter().all(u8::is_ascii_hexdigit);
    is_number.then(|| u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::{super::tests::file, *};

    const MOST: usize = 1000;

    fn read(map: &mut PerfMap, file: &File) -> Progress {
        map.read_on(file, &mut u64::MAX.clone(), MOST)
    }

    #[test]
    fn parses_lines() {
        let check = |line: &str, expect: Option<(u64, u32, &str)>| {
            let expect = expect.map(|(start, size, name)| (start, size, name.as_bytes()));
            assert_eq!(parse_line(line.as_bytes()), expect, "{line:?}");
        };
        check("7f9e84006040 254 JS:*hot /x.js:2:18", Some((0x7f9e_8400_6040, 0x254, "JS:*hot /x.js:2:18")));
        check("0x10 0x20 name", Some((0x10, 0x20, "name")));
        check("10 20 ", None);
        check("10 20", None);
        check("10 0 name", None);
        check("+10 20 name", None);
        check("10 1ffffffff name", None);
        check("ffffffffffffffff 2 name", None);
        check("11111111111111111 2 name", None);
        check("", None);
    }

    /// What is appended is read from there on; a line that is not finished waits for its end.
    #[test]
    fn reads_what_is_appended() {
        let file = file(b"100 10 one\n200 10 tw");
        let mut map = PerfMap::default();
        assert_eq!(read(&mut map, &file), Progress::Added);
        assert_eq!((map.name(&file, 0x105).as_deref(), map.name(&file, 0x205)), (Some("one"), None));
        assert_eq!(read(&mut map, &file), Progress::Same);
        file.write_all_at(b"o\n108 10 three\n", 20).expect("room");
        assert_eq!(read(&mut map, &file), Progress::Added);
        for (address, name) in [(0x107, "one"), (0x108, "three"), (0x205, "two")] {
            assert_eq!(map.name(&file, address).as_deref(), Some(name), "{address:#x}");
        }
        assert_eq!(map.name(&file, 0x118), None);
    }

    /// A file that was cut or written anew is read from its start, also where it has become longer meanwhile.
    #[test]
    fn starts_again_when_the_file_was_rewritten() {
        let file = file(b"100 10 one\n200 10 two\n");
        let mut map = PerfMap::default();
        read(&mut map, &file);
        // Rewritten, and not noticed yet: no name rather than that of another function.
        file.write_all_at(b"500 10 six\n300 10 four\n400 10 five\n", 0).expect("room");
        assert_eq!(map.name(&file, 0x205), None);
        assert_eq!(read(&mut map, &file), Progress::Restarted);
        assert_eq!((map.name(&file, 0x205), map.name(&file, 0x405).as_deref()), (None, Some("five")));
        file.set_len(11).expect("it can be cut");
        assert_eq!(read(&mut map, &file), Progress::Restarted);
        assert_eq!((map.name(&file, 0x505).as_deref(), map.name(&file, 0x405)), (Some("six"), None));
    }

    /// Another thread writes the file anew again and again: whatever is seen of it, names belong to their addresses, and
    /// the end is right.
    #[test]
    fn survives_being_rewritten_while_it_is_read() {
        let file = file(b"");
        let contents = |round: u64| -> Vec<u8> {
            let line = |index: u64| format!("{:x} 10 function_{:x}\n", index * 16, index * 16);
            (0..500).map(|index| line((index * 7 + round) % 4096)).collect::<String>().into_bytes()
        };
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for round in 0..200 {
                    file.set_len(0).expect("it can be cut");
                    file.write_all_at(&contents(round), 0).expect("room");
                }
            });
            let mut map = PerfMap::default();
            while !writer.is_finished() {
                read(&mut map, &file);
                for address in (0..65536).step_by(256) {
                    let expected = format!("function_{address:x}");
                    assert!(map.name(&file, address).is_none_or(|name| expected.starts_with(&name)));
                }
            }
            // The clock of files may not have moved since the last look.
            file.write_all_at(b"fffff0 10 last\n", contents(199).len() as u64).expect("room");
            read(&mut map, &file);
            assert_eq!(map.name(&file, 0xff_fff0).as_deref(), Some("last"));
            assert_eq!(map.name(&file, 199 * 16).as_deref(), Some("function_c70"));
        });
    }

    /// However it appears, it says the same.
    #[test]
    fn reads_in_any_pieces() {
        let contents = b"100 10 one\n\nnothing\n108 4 two\n0x50 0x100 three\n58 8 four\n60 10 five";
        let whole = file(contents);
        let mut at_once = PerfMap::default();
        read(&mut at_once, &whole);
        assert_eq!(at_once.all().len(), 3);
        for len in 1..contents.len() {
            let growing = file(b"");
            let mut map = PerfMap::default();
            for (index, piece) in contents.chunks(len).enumerate() {
                growing.write_all_at(piece, (index * len) as u64).expect("room");
                read(&mut map, &growing);
            }
            assert_eq!(map.all(), at_once.all(), "{len}");
        }
    }

    /// Of a line without end the beginning counts; an allowance stops reading until the next one.
    #[test]
    fn long_lines_and_small_allowances() {
        let mut contents = b"100 10 ".to_vec();
        contents.extend([b'x'; 3 * MAX_LINE]);
        contents.extend(b"\n200 10 two\n300 10 three");
        let file = file(&contents);
        let mut map = PerfMap::default();
        let mut passes = 0;
        while read_some(&mut map, &file) {
            passes += 1;
        }
        assert_eq!(passes, 4);
        assert_eq!(map.name(&file, 0x100).map(|name| name.len()), Some(MAX_NAME));
        assert_eq!((map.name(&file, 0x200).as_deref(), map.name(&file, 0x300)), (Some("two"), None));
    }

    fn read_some(map: &mut PerfMap, file: &File) -> bool {
        map.read_on(file, &mut (MAX_LINE as u64), MOST) != Progress::Same
    }
}

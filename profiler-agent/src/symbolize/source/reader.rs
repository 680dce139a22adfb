//! What debug information is read through: sections in memory, and a meter that ends what would take too long.
//!
//! The parsers that read it follow what a file says, and a file may say the same again and again, or nest without end.
//! Everything they do begins with a read, so a bound on reads bounds their time and memory, and a look at the stack with
//! each read bounds how deep they nest.

use std::{
    borrow::Cow,
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use gimli::{Error, LittleEndian, Reader, ReaderOffsetId, Result};

/// Bytes that searching or copying may pass for the price of one read.
const BYTES_PER_READ: usize = 8;
/// How far the stack may grow, bytes. What real programs nest takes a few thousand.
const MAX_STACK: usize = 256 << 10;

/// How much may still be read. One thread at a time uses it.
#[derive(Debug, Default)]
pub(super) struct Meter {
    left: AtomicU64,
    /// Where the stack was when it was last filled.
    stack: AtomicUsize,
}

impl Meter {
    /// Allows so many reads from here on.
    pub(super) fn fill(&self, reads: u64) {
        self.left.store(reads, Relaxed);
        self.stack.store(stack_pointer(), Relaxed);
    }

    /// How many reads are left.
    pub(super) fn left(&self) -> u64 {
        self.left.load(Relaxed)
    }

    fn charge(&self, bytes: usize) -> Result<()> {
        let reads = 1 + (bytes / BYTES_PER_READ) as u64;
        let left = self.left().checked_sub(reads);
        self.left.store(left.unwrap_or(0), Relaxed);
        if left.is_none() || stack_pointer().abs_diff(self.stack.load(Relaxed)) > MAX_STACK {
            return Err(Error::Io);
        }
        Ok(())
    }
}

/// About where the stack ends.
#[inline(always)]
fn stack_pointer() -> usize {
    let marker = 0u8;
    (&raw const *black_box(&marker)).addr()
}

/// One section's contents.
#[derive(Debug)]
struct Section {
    bytes: Box<[u8]>,
    meter: Arc<Meter>,
}

/// Part of a section, read from its beginning.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    section: Arc<Section>,
    start: usize,
    end: usize,
}

impl Piece {
    /// A whole section.
    pub(super) fn new(bytes: Vec<u8>, meter: &Arc<Meter>) -> Self {
        let end = bytes.len();
        Self { section: Arc::new(Section { bytes: bytes.into(), meter: Arc::clone(meter) }), start: 0, end }
    }

    fn bytes(&self) -> &[u8] {
        self.section.bytes.get(self.start..self.end).unwrap_or_default()
    }

    fn charge(&self, bytes: usize) -> Result<()> {
        self.section.meter.charge(bytes)
    }

    fn end_of_data<T>(&self) -> Result<T> {
        Err(Error::UnexpectedEof(self.offset_id()))
    }
}

impl Reader for Piece {
    type Endian = LittleEndian;
    type Offset = usize;

    fn endian(&self) -> LittleEndian {
        LittleEndian
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    fn empty(&mut self) {
        self.start = self.end;
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len() {
            return self.end_of_data();
        }
        self.end = self.start + len;
        Ok(())
    }

    fn offset_from(&self, base: &Self) -> usize {
        self.start.wrapping_sub(base.start)
    }

    fn offset_id(&self) -> ReaderOffsetId {
        ReaderOffsetId(self.start as u64)
    }

    fn lookup_offset_id(&self, id: ReaderOffsetId) -> Option<usize> {
        usize::try_from(id.0).ok().filter(|id| (self.start..=self.end).contains(id)).map(|id| id - self.start)
    }

    fn find(&self, byte: u8) -> Result<usize> {
        let found = self.bytes().iter().position(|&other| other == byte);
        self.charge(found.unwrap_or(self.len()))?;
        found.map_or_else(|| self.end_of_data(), Ok)
    }

    fn skip(&mut self, len: usize) -> Result<()> {
        self.charge(0)?;
        if len > self.len() {
            return self.end_of_data();
        }
        self.start += len;
        Ok(())
    }

    fn split(&mut self, len: usize) -> Result<Self> {
        self.charge(0)?;
        let mut piece = self.clone();
        piece.truncate(len)?;
        self.start += len;
        Ok(piece)
    }

    fn to_slice(&self) -> Result<Cow<'_, [u8]>> {
        self.charge(self.len())?;
        Ok(self.bytes().into())
    }

    fn to_string(&self) -> Result<Cow<'_, str>> {
        self.charge(self.len())?;
        str::from_utf8(self.bytes()).map(Cow::from).map_err(|_| Error::BadUtf8)
    }

    fn to_string_lossy(&self) -> Result<Cow<'_, str>> {
        self.charge(self.len())?;
        Ok(String::from_utf8_lossy(self.bytes()))
    }

    fn read_slice(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.charge(0)?;
        match self.bytes().get(..buffer.len()) {
            Some(bytes) => buffer.copy_from_slice(bytes),
            None => return self.end_of_data(),
        }
        self.start += buffer.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(bytes: &[u8], reads: u64) -> Piece {
        let meter = Arc::default();
        let piece = Piece::new(bytes.to_vec(), &meter);
        meter.fill(reads);
        piece
    }

    /// Pieces of pieces, up to where each ends.
    #[test]
    fn reads_its_part() {
        let mut whole = piece(b"ab\0cd", 100);
        let mut name = whole.read_null_terminated_slice().expect("a name");
        assert_eq!(name.to_slice().expect("bytes").as_ref(), b"ab");
        assert_eq!((name.read_u16().ok(), name.read_u8().ok()), (Some(0x6261), None));
        assert_eq!((whole.len(), whole.find(0).ok(), whole.read_u8().ok()), (2, None, Some(b'c')));
        assert!(whole.skip(2).is_err() && whole.truncate(2).is_err());
    }

    /// However little it reads at a time, and however far it searches, a reader comes to an end.
    #[test]
    fn ends_when_the_meter_is_empty() {
        let mut endless = piece(&[0x80; 1 << 10], 64);
        assert!(endless.clone().skip_leb128().is_err());
        endless.section.meter.fill(2);
        assert!(
            (endless.read_u8().is_ok(), endless.read_u8().is_ok(), endless.read_u8().is_ok()) == (true, true, false)
        );
        endless.section.meter.fill(64);
        assert_eq!(endless.find(0x80).ok(), Some(0));
        assert!(endless.find(0).is_err());
        assert_eq!(endless.section.meter.left(), 0);
    }

    /// A reader that is called deeper and deeper is an error long before the stack ends.
    #[test]
    fn ends_when_the_stack_grows() {
        fn nest(piece: &mut Piece, depth: u32) -> u32 {
            let room = black_box([0u8; 512]);
            if piece.clone().read_u8().is_err() {
                return depth + u32::from(room[0]);
            }
            nest(piece, depth + 1) + u32::from(black_box(room)[1])
        }
        let depth = nest(&mut piece(&[1], 1 << 20), 0);
        assert!((32..=MAX_STACK as u32 / 512).contains(&depth), "{depth}");
    }
}

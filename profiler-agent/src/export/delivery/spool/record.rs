//! A stored request: what a file of the spool holds.
//!
//! A header of fixed size, which says what the request stands for, and the compressed body. Each has a checksum, so that
//! a header can be believed though the body cannot. All of it may be anything when it is read: nothing is as large as it
//! says before that was checked.

use std::{
    io::{self, Read as _, Write as _},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use flate2::{Compression, Crc, read::GzDecoder, write::GzEncoder};
use thiserror::Error;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

use crate::{export::otlp::Request, profile::Tally};

/// Longest body that is stored.
pub(super) const MAX_BODY: usize = 64 << 20;
/// Longest compressed body: what cannot be compressed becomes longer by some bytes in each 32 KiB.
const MAX_COMPRESSED: u32 = (MAX_BODY + MAX_BODY / 1024 + 64) as u32;
/// What a file begins with; the last byte is the version.
const MAGIC: [u8; 8] = *b"OTLPSPL\x01";
/// Bytes of a header.
pub(super) const HEADER: usize = size_of::<Header>();
/// Longest file.
pub(super) const MAX_FILE: u64 = HEADER as u64 + MAX_COMPRESSED as u64;

/// What comes before the body.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Header {
    magic: [u8; 8],
    /// CRC-32 of the header without this member.
    checksum: U32,
    /// CRC-32 of the compressed body.
    body_checksum: U32,
    compressed_len: U32,
    body_len: U32,
    profiles: U32,
    samples: U64,
    off_cpu_ns: U64,
    /// Nanoseconds since 1970.
    closed_ns: U64,
}

const _: () = assert!(HEADER == 52);

/// Why bytes are no stored request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Damage {
    #[error("its header is not one of this version, or damaged")]
    Header,
    #[error("it is not as long as it says")]
    Length,
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it cannot be decompressed to what it says")]
    Body,
}

impl Header {
    /// Checks what does not depend on the body.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Damage> {
        let (header, _) = Self::read_from_prefix(bytes).map_err(|_| Damage::Header)?;
        let is_whole = header.magic == MAGIC
            && header.checksum.get() == header.compute_checksum()
            && header.compressed_len.get() <= MAX_COMPRESSED
            && header.body_len.get() as usize <= MAX_BODY;
        if is_whole { Ok(header) } else { Err(Damage::Header) }
    }

    /// How long a file with this header is.
    pub(super) fn file_len(&self) -> u64 {
        HEADER as u64 + u64::from(self.compressed_len.get())
    }

    pub(super) fn tally(&self) -> Tally {
        Tally { samples: self.samples.get(), off_cpu_ns: self.off_cpu_ns.get() }
    }

    pub(super) fn closed(&self) -> SystemTime {
        // It holds 584 years from 1970.
        UNIX_EPOCH + Duration::from_nanos(self.closed_ns.get())
    }

    fn compute_checksum(&self) -> u32 {
        let zeroed = Self { checksum: U32::ZERO, ..*self };
        checksum(zeroed.as_bytes())
    }

    /// Makes the checksums right, as a writer with a different idea of the rest would.
    pub(super) fn seal(mut self, compressed: &[u8]) -> Self {
        self.body_checksum = U32::new(checksum(compressed));
        self.checksum = U32::new(self.compute_checksum());
        self
    }
}

/// A request as it is stored: header and compressed body. `None`: its body is longer than any that is stored.
pub(super) fn encode(request: &Request) -> io::Result<Option<(Header, Vec<u8>)>> {
    if request.body.len() > MAX_BODY {
        return Ok(None);
    }
    // Gzip, as receivers take it; the fastest, since it is done for each window.
    let mut encoder = GzEncoder::new(Vec::with_capacity(request.body.len() / 4), Compression::fast());
    encoder.write_all(&request.body)?;
    let compressed = encoder.finish()?;
    let since_1970 = request.closed.duration_since(UNIX_EPOCH).unwrap_or_default();
    let header = Header {
        magic: MAGIC,
        checksum: U32::ZERO,
        body_checksum: U32::ZERO,
        compressed_len: U32::new(compressed.len() as u32),
        body_len: U32::new(request.body.len() as u32),
        profiles: U32::new(request.profiles),
        samples: U64::new(request.tally.samples),
        off_cpu_ns: U64::new(request.tally.off_cpu_ns),
        closed_ns: U64::new(since_1970.as_nanos().try_into().unwrap_or(u64::MAX)),
    };
    Ok(Some((header.seal(&compressed), compressed)))
}

/// The request of a file with these bytes.
pub(super) fn decode(file: &[u8]) -> Result<Request, Damage> {
    let header = Header::parse(file)?;
    let compressed = file.get(HEADER..).unwrap_or_default();
    if compressed.len() as u64 != u64::from(header.compressed_len.get()) {
        return Err(Damage::Length);
    }
    if checksum(compressed) != header.body_checksum.get() {
        return Err(Damage::Checksum);
    }
    let body_len = header.body_len.get() as usize;
    let mut body = Vec::with_capacity(body_len);
    // One more than there should be, to see whether there is more.
    let mut decoder = GzDecoder::new(compressed).take(body_len as u64 + 1);
    decoder.read_to_end(&mut body).map_err(|_| Damage::Body)?;
    if body.len() != body_len {
        return Err(Damage::Body);
    }
    Ok(Request { body: body.into(), tally: header.tally(), profiles: header.profiles.get(), closed: header.closed() })
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    //! What the fuzz target of stored requests calls.

    use super::*;
    use crate::fuzzing::Input;

    /// Stored requests: what is read is as long as it says, and is what was written; one damaged byte is noticed.
    pub fn spool(bytes: &[u8]) {
        check(bytes);
        // As it is, and with checksums that are right: others would keep nearly everything from being parsed.
        if let Ok((header, compressed)) = Header::read_from_prefix(bytes) {
            let header = Header { magic: MAGIC, compressed_len: U32::new(compressed.len() as u32), ..header };
            check(&[header.seal(compressed).as_bytes(), compressed].concat());
        }
        let mut input = Input(bytes);
        let (place, change) = (input.half() as usize, input.byte().max(1));
        let request = Request {
            tally: Tally { samples: input.word(), off_cpu_ns: input.word() },
            profiles: input.half(),
            closed: UNIX_EPOCH + Duration::from_nanos(input.word()),
            body: input.0.to_vec().into(),
        };
        let (header, compressed) = encode(&request).expect("memory takes everything").expect("it is short");
        let mut file = [header.as_bytes(), &compressed].concat();
        assert!(file.len() as u64 == header.file_len() && header.file_len() <= MAX_FILE);
        assert_eq!(decode(&file), Ok(request));
        let place = place % file.len();
        file[place] ^= change;
        assert!(decode(&file).is_err());
        assert!(decode(&file[..place]).is_err());
    }

    fn check(bytes: &[u8]) {
        let Ok(request) = decode(bytes) else { return };
        assert!(request.body.len() <= MAX_BODY);
        let (header, compressed) = encode(&request).expect("memory takes everything").expect("it is not too long");
        assert_eq!(decode(&[header.as_bytes(), &compressed].concat()), Ok(request));
    }
}

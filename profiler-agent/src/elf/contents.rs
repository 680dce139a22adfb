//! Contents of sections, decompressed where they are compressed.

use std::{fs::File, io::Read as _};

use flate2::read::ZlibDecoder;
use object::{
    LittleEndian as LE,
    elf::{CompressionHeader64, ELFCOMPRESS_ZLIB},
    pod,
};

use super::{Section, read};

/// Why a section's contents were not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unread {
    /// There are more bytes than were asked for.
    TooLarge,
    /// They are compressed in a way that is not understood (only zlib is).
    Compression,
    /// The file does not hold what it states.
    Broken,
}

/// A section's contents, of which there are at most `room` bytes.
pub(crate) fn contents(file: &File, section: &Section, room: usize) -> Result<Vec<u8>, Unread> {
    let read_part = |offset, size: u64| {
        let size = usize::try_from(size).ok().filter(|&size| size <= room).ok_or(Unread::TooLarge)?;
        read(file, offset, size).ok_or(Unread::Broken)
    };
    if !section.is_compressed {
        return read_part(section.offset, section.size);
    }
    const HEADER: usize = size_of::<CompressionHeader64<LE>>();
    let after = |offset: u64| offset.checked_add(HEADER as u64).zip(section.size.checked_sub(HEADER as u64));
    let (start, len) = after(section.offset).ok_or(Unread::Broken)?;
    let header = read(file, section.offset, HEADER).ok_or(Unread::Broken)?;
    let (header, _) = pod::from_bytes::<CompressionHeader64<LE>>(&header).map_err(|()| Unread::Broken)?;
    if header.ch_type.get(LE) != ELFCOMPRESS_ZLIB {
        return Err(Unread::Compression);
    }
    let size = header.ch_size.get(LE);
    let compressed = read_part(start, len)?;
    if size > room as u64 {
        return Err(Unread::TooLarge);
    }
    // (Memory is set aside as the bytes come: the size may be a lie.)
    let mut bytes = Vec::new();
    ZlibDecoder::new(&*compressed).take(size).read_to_end(&mut bytes).map_err(|_| Unread::Broken)?;
    if bytes.len() as u64 == size { Ok(bytes) } else { Err(Unread::Broken) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::ZlibEncoder};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn section(kind: u32, stated: u64, contents: &[u8]) -> (File, Section) {
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(contents).expect("memory");
        let mut bytes = [kind.to_le_bytes(), [0; 4]].concat();
        bytes.extend([stated.to_le_bytes(), 1u64.to_le_bytes()].concat());
        bytes.extend(zlib.finish().expect("memory"));
        let mut file = File::from(memfd_create(c"section", MFdFlags::MFD_CLOEXEC).expect("a file"));
        file.write_all(&bytes).expect("room");
        let section = Section {
            name: ".debug_info".to_owned(),
            address: 0,
            offset: 0,
            size: bytes.len() as u64,
            is_code: false,
            is_compressed: true,
        };
        (file, section)
    }

    /// What is compressed comes out as it was, within the bound, and only if it is what the header states.
    #[test]
    fn decompresses_within_a_bound() {
        let text = [7; 10_000];
        let check = |kind, stated, room, expect: Result<(), Unread>| {
            let (file, section) = section(kind, stated, &text);
            assert_eq!(contents(&file, &section, room).map(|bytes| assert_eq!(bytes, text)), expect);
        };
        check(ELFCOMPRESS_ZLIB, 10_000, 10_000, Ok(()));
        check(ELFCOMPRESS_ZLIB, 10_000, 9_999, Err(Unread::TooLarge));
        check(ELFCOMPRESS_ZLIB, 10_001, 20_000, Err(Unread::Broken));
        check(ELFCOMPRESS_ZLIB, u64::MAX, usize::MAX, Err(Unread::Broken));
        check(2, 10_000, 10_000, Err(Unread::Compression));
    }

    /// Sections that are not there.
    #[test]
    fn survives_lying_sections() {
        let (file, section) = section(ELFCOMPRESS_ZLIB, 10, &[7; 10]);
        for (offset, size) in [(u64::MAX, 30), (0, u64::MAX), (0, 3), (1 << 20, 30)] {
            for is_compressed in [false, true] {
                let lying = Section { offset, size, is_compressed, ..section.clone() };
                assert!(contents(&file, &lying, 1 << 20).is_err() || size == 3);
            }
        }
    }
}

//! Batched map reads through raw `bpf(2)`: aya has none.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use zerocopy::IntoBytes as _;

/// `BPF_MAP_LOOKUP_AND_DELETE_BATCH` (`include/uapi/linux/bpf.h`, Linux 5.6).
const LOOKUP_AND_DELETE_BATCH: libc::c_long = 25;

/// The `batch` member of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct BatchAttributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Entries asked for at once, at first; a hash bucket that holds more makes the kernel ask for more room.
const FIRST_BATCH: usize = 256;

/// Empties a hash map: calls `row` with every key and value, and deletes them.
///
/// `key_size` and `value_size` must be those of the map. On error, rows already passed on were deleted and
/// the rest are still in the map.
pub fn drain(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut row: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let mut capacity = FIRST_BATCH;
    let mut keys = vec![0u64; (key_size * capacity).div_ceil(8)];
    let mut values = vec![0u64; (value_size * capacity).div_ceil(8)];
    let (mut cursor, mut next_cursor) = (0u64, 0u64);
    let mut started = false;
    loop {
        let mut attributes = BatchAttributes {
            in_batch: if started { &raw const cursor as u64 } else { 0 },
            out_batch: &raw mut next_cursor as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(capacity).map_err(io::Error::other)?,
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..BatchAttributes::default()
        };
        // SAFETY: every pointer refers to a live buffer of at least the size the kernel writes: `count`
        // elements of the map's key and value size, and a cursor of at most 8 bytes (hash maps use 4).
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, LOOKUP_AND_DELETE_BATCH, &raw mut attributes, size_of::<BatchAttributes>())
        };
        let outcome = if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        let finished = match outcome {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                capacity *= 2;
                keys.resize((key_size * capacity).div_ceil(8), 0);
                values.resize((value_size * capacity).div_ceil(8), 0);
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = (attributes.count as usize).min(capacity);
        let rows = keys.as_bytes().chunks_exact(key_size).zip(values.as_bytes().chunks_exact(value_size));
        for (key, value) in rows.take(count) {
            row(key, value);
        }
        if finished {
            return Ok(());
        }
        cursor = next_cursor;
        started = true;
    }
}

//! Map commands through raw `bpf(2)` that aya does not have: batches, deletion from a map of maps, and records
//! as bytes.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
};

use zerocopy::IntoBytes as _;

/// `BPF_MAP_LOOKUP_BATCH` and `BPF_MAP_LOOKUP_AND_DELETE_BATCH` (`include/uapi/linux/bpf.h`, Linux 5.6).
const LOOKUP_BATCH: libc::c_long = 24;
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

/// `BPF_MAP_UPDATE_BATCH` (Linux 5.6), `BPF_MAP_LOOKUP_ELEM`, `BPF_MAP_UPDATE_ELEM` and `BPF_MAP_DELETE_ELEM`.
const UPDATE_BATCH: libc::c_long = 26;
const LOOKUP: libc::c_long = 1;
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;

/// The members of `union bpf_attr` for commands on one element.
#[repr(C)]
#[derive(Default)]
struct ElementAttributes {
    map_fd: u32,
    reserved: u32,
    key: u64,
    /// `next_key` shares this place.
    value: u64,
    flags: u64,
}

/// Sets consecutive elements of an array map, from index `first` on, to `count` values that `values` holds.
pub fn update(map: BorrowedFd<'_>, first: u32, values: &[u8], count: usize) -> io::Result<()> {
    let mut keys: Vec<u32> = (first..).take(count).collect();
    let mut attributes = BatchAttributes {
        keys: keys.as_mut_ptr() as u64,
        values: values.as_ptr() as u64,
        count: u32::try_from(count).map_err(io::Error::other)?,
        map_fd: map.as_raw_fd().cast_unsigned(),
        ..BatchAttributes::default()
    };
    if count == 0 {
        return Ok(());
    }
    // SAFETY: keys and values are live for the call and hold `count` elements each: callers pass the bytes of a
    // slice of the map's value type.
    unsafe { command(UPDATE_BATCH, &mut attributes) }
}

/// Reads the element of `key` into `value`, which has the map's value size.
pub fn lookup(map: BorrowedFd<'_>, key: &u32, value: &mut [u8]) -> io::Result<()> {
    let mut attributes = ElementAttributes {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: ptr::from_ref(key) as u64,
        value: value.as_mut_ptr() as u64,
        ..ElementAttributes::default()
    };
    // SAFETY: key and value are live for the call and of the map's sizes.
    unsafe { command(LOOKUP, &mut attributes) }
}

/// Sets the element of `key`; both are bytes of the map's types.
pub fn insert(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attributes = ElementAttributes {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        ..ElementAttributes::default()
    };
    // SAFETY: as above.
    unsafe { command(UPDATE, &mut attributes) }
}

/// Deletes the element of `key`, which is of the map's key type.
pub fn delete<K>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut attributes = ElementAttributes {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: ptr::from_ref(key) as u64,
        ..ElementAttributes::default()
    };
    // SAFETY: as above.
    unsafe { command(DELETE, &mut attributes) }
}

/// Calls `bpf(2)`.
///
/// # Safety
/// `attributes` are those of the command, and the pointers in them refer to what the kernel reads and writes.
unsafe fn command<A>(command: libc::c_long, attributes: &mut A) -> io::Result<()> {
    // SAFETY: as promised by the caller; the kernel reads and writes no more than the size it is told.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attributes), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Entries asked for at once, at first; a hash bucket that holds more makes the kernel ask for more room.
const FIRST_BATCH: usize = 256;

/// Reads a hash map: calls `row` with every key and value. Rows that are added or removed meanwhile may be missed.
///
/// `key_size` and `value_size` must be those of the map.
pub fn read(map: BorrowedFd<'_>, key_size: usize, value_size: usize, row: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    in_batches(LOOKUP_BATCH, map, key_size, value_size, row)
}

/// Empties a hash map: calls `row` with every key and value, and deletes them.
///
/// `key_size` and `value_size` must be those of the map. On error, rows already passed on were deleted and
/// the rest are still in the map.
pub fn drain(map: BorrowedFd<'_>, key_size: usize, value_size: usize, row: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    in_batches(LOOKUP_AND_DELETE_BATCH, map, key_size, value_size, row)
}

fn in_batches(
    batch_command: libc::c_long,
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
        let outcome = unsafe { command(batch_command, &mut attributes) };
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

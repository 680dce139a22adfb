//! What the fuzz targets of names and symbol tables call.

use std::sync::Arc;

pub use super::runtime_code::fuzzing::{jitdump, perf_map};
use super::{demangle::readable, source, symbols::FileSymbols};
use crate::{
    elf::{self, GoTable},
    fuzzing::{Input, file},
    profile::printable,
};

/// Symbols' readable names: they are short and hold nothing that ends a line.
pub fn demangle(bytes: &[u8]) {
    let readable = readable(&String::from_utf8_lossy(bytes));
    assert!(readable.len() <= 1024);
    assert!(!printable(&readable).contains(|c: char| c == ';' || c.is_control()));
}

/// Symbol tables: names for any address, none of them too long.
pub fn symbols(bytes: &[u8]) {
    let mut input = Input(bytes);
    let addresses: [u64; 4] = std::array::from_fn(|_| u64::from(u32::from_le_bytes(input.bytes())));
    let file = Arc::new(file(input.0));
    if elf::summarize(&file).is_none() {
        return;
    }
    let symbols = FileSymbols::read(&file, None, None, None);
    for address in addresses {
        if let Ok((name, _)) = symbols.name(address) {
            assert!(readable(&name).len() <= 1024);
        }
    }
}

/// Debug information: whatever it says, of any address, it is said soon and takes no more memory than is allowed.
pub fn debug_info(bytes: &[u8]) {
    const ROOM: usize = 1 << 20;
    let mut input = Input(bytes);
    let addresses: [u64; 4] = std::array::from_fn(|_| input.half().into());
    let file = file(input.0);
    if elf::summarize(&file).is_none() {
        return;
    }
    let mut source = source::FileSource::read(&file, None, None, ROOM);
    for address in addresses.into_iter().chain([u64::MAX]) {
        for function in source.find(address, ROOM).unwrap_or_default() {
            assert!(function.place.is_none_or(|place| place.file.len() <= 4096));
        }
        assert!(source.bytes() <= 2 * ROOM);
    }
}

/// Lines of Go's table: no more of them than may be nested, with names out of the table.
pub fn go_lines(bytes: &[u8]) {
    let mut input = Input(bytes);
    let trees = usize::from(input.byte());
    let trees = input.piece(trees);
    let Some(mut table) = GoTable::parse(input.0.to_vec()) else { return };
    table.assume_inline_trees(0);
    let read = |place: u64, into: &mut [u8]| {
        let place = usize::try_from(place).ok()?;
        into.copy_from_slice(trees.get(place..place.checked_add(into.len())?)?);
        Some(())
    };
    for function in table.functions().take(16).collect::<Vec<_>>() {
        for address in [function.start, function.end - 1] {
            let calls = table.calls_at(address, read).unwrap_or_default();
            assert!(calls.len() <= 129);
            let texts = calls.iter().flat_map(|call| [&call.name, &call.file]).flatten();
            assert!(texts.map(String::len).all(|len| len > 0 && len < bytes.len()));
        }
    }
}

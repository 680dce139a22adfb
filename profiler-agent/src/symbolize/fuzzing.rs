//! What the fuzz targets of names and symbol tables call.

use std::sync::Arc;

pub use super::runtime_code::fuzzing::{jitdump, perf_map};
use super::{demangle::readable, symbols::FileSymbols};
use crate::{
    elf,
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
    let addresses: [u64; 4] = std::array::from_fn(|_| u64::from(u16::from_le_bytes(input.bytes())));
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

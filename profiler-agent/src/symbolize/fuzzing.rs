//! What the fuzz targets of names and symbol tables call.

use std::{os::fd::AsRawFd as _, path::PathBuf};

use blazesym::symbolize::{
    Input as Places,
    source::{Elf, Source},
};

use super::{demangle::readable, names_of, new_symbolizer, resident::shared_read_only_file};
use crate::{
    elf,
    fuzzing::{Input, file},
    profile::{FrameName, printable},
};

/// Symbols' readable names, and lines of `/proc/self/maps`: names are short and hold nothing that ends a line.
pub fn demangle(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let readable = readable(&text);
    assert!(readable.len() <= 1024);
    assert!(!printable(&readable).contains(|c: char| c == ';' || c.is_control()));
    if let Some((start, len)) = shared_read_only_file(&text) {
        assert!(start.checked_add(len).is_some());
    }
}

/// Symbol tables: an answer for every place that is asked for, and no name that is too long.
pub fn symbols(bytes: &[u8]) {
    let mut input = Input(bytes);
    let places: [u64; 4] = std::array::from_fn(|_| u64::from(u16::from_le_bytes(input.bytes())));
    let file = file(input.0);
    if !elf::summarize(&file).is_some_and(|summary| summary.is_nameable) {
        return;
    }
    let mut source = Elf::new(PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
    source.debug_syms = false;
    let symbolizer = new_symbolizer();
    let names = names_of(symbolizer.symbolize(&Source::Elf(source), Places::FileOffset(&places)), places.len());
    assert_eq!(names.len(), places.len());
    for name in names {
        if let FrameName::Function(name) = name {
            assert!(name.len() <= 1024);
        }
    }
}

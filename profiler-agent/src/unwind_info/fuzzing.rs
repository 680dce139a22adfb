//! What the fuzz targets of unwind tables and their sources call.

use std::{
    collections::BTreeSet,
    hash::{BuildHasherDefault, DefaultHasher},
    sync::{Arc, Mutex},
};

use profiler_common::{
    abi::tables::{MAX_PAGES, MAX_RULES, PAGE_SHIFT, Row},
    unwind::{
        GENERAL_REGISTERS,
        rule::{Rule, cfa},
    },
};

use super::{
    build::Source,
    code,
    dwarf::{self, Function},
    go::GoRules,
    table::{NO_RULE, Rules, Table, TableWriter},
};
use crate::{
    elf::{self, GoTable},
    fuzzing::{Input, file},
    profile::{Executable, ExecutableId, FileIdentity},
};

/// Most rows of a table.
const MAX_ROWS: usize = 1 << 16;

/// `.eh_frame`: the address it is loaded at, that of `.text`, and the section.
pub fn eh_frame(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (address, text) = (input.word(), input.word());
    let mut frames = dwarf::eh_frame(input.0, address, text);
    let mut functions = Vec::new();
    frames.functions(|function| functions.push(function));
    for function in functions {
        check_rows(function, bytes.len(), |row| frames.rows(function, row));
    }
}

/// `.debug_frame`.
pub fn debug_frame(bytes: &[u8]) {
    let mut frames = dwarf::debug_frame(bytes);
    let mut functions = Vec::new();
    frames.functions(|function| functions.push(function));
    for function in functions {
        check_rows(function, bytes.len(), |row| frames.rows(function, row));
    }
}

/// Go's `.gopclntab`.
pub fn go_table(bytes: &[u8]) {
    let Some(mut table) = GoTable::parse(bytes.to_vec()).map(GoRules::new) else { return };
    for function in table.functions().collect::<Vec<_>>() {
        check_rows(function, bytes.len(), |row| table.rows(function, row));
    }
}

/// The rows of one function: in order, no more than there are bytes, and of rules that exist.
fn check_rows(function: Function, len: usize, rows: impl FnOnce(&mut dyn FnMut(u64, Rule)) -> Result<(), u64>) {
    assert!(function.start < function.end);
    let (mut last, mut count) = (function.start, 0);
    let outcome = rows(&mut |address, rule| {
        assert!(address >= last);
        check_rule(rule);
        last = address;
        count += 1;
    });
    assert!(count <= len);
    if let Err(from) = outcome {
        assert!(from >= function.start);
    }
}

fn check_rule(rule: Rule) {
    let kind = rule.cfa & !cfa::GUESSED;
    assert!(kind <= cfa::LEAF_JUMP);
    if matches!(kind, cfa::LEAF_REGISTER | cfa::LEAF_JUMP) {
        assert!((0..GENERAL_REGISTERS as i16).contains(&rule.cfa_addend));
    }
}

/// Code without tables: where it begins, the program's entry, known functions, and the code.
pub fn guessed_code(bytes: &[u8]) {
    let mut input = Input(bytes);
    let start = input.word();
    let places: [u64; 4] = std::array::from_fn(|_| start.wrapping_add(input.byte().into()));
    let code = input.0;
    let Some(end) = start.checked_add(code.len() as u64) else { return };
    let functions: BTreeSet<u64> = places[1..].iter().copied().chain(code::called(code, start)).collect();
    assert!(functions.len() <= code.len() + 3);
    let rows = code::rows(code, start, places[0], &functions);
    assert!(rows.len() <= 2 * code.len());
    assert!(rows.is_sorted_by(|a, b| a.0 < b.0));
    for (address, rule) in rows {
        assert!((start..end).contains(&address));
        check_rule(rule);
    }
}

/// Rows of a table: pages say what was written, wherever it is asked.
pub fn table(bytes: &[u8]) {
    const MAX_PUSHED: usize = 128;
    let mut input = Input(bytes);
    let start = u64::from(input.half());
    let span = u64::from(input.half()) % (64 << PAGE_SHIFT);
    let max_rows = usize::from(input.byte());
    let Ok(mut writer) = TableWriter::new(start, start + span, max_rows) else { return };
    // From which address on which rule holds.
    let mut pushed = vec![(start >> PAGE_SHIFT << PAGE_SHIFT, NO_RULE)];
    let mut address = start;
    for _ in 0..MAX_PUSHED {
        if input.is_empty() {
            break;
        }
        let distance = u64::from(u32::from_le_bytes([input.byte(), input.byte(), input.byte() % 4, 0]));
        let byte = input.byte();
        let (rule, falls_by) = (u16::from(byte % 8), u64::from(byte >> 6));
        address += distance;
        if address >= start + span {
            break;
        }
        // One that falls counts as the last one.
        if writer.push(address.saturating_sub(falls_by), rule).is_err() {
            return;
        }
        let last = pushed.last().copied().unwrap_or_default();
        if rule != last.1 {
            pushed.push((address.saturating_sub(falls_by).max(last.0), rule));
        }
    }
    // The builder ends every table like this.
    if writer.push(start + span, NO_RULE).is_err() {
        return;
    }
    pushed.push((start + span, NO_RULE));
    let table = writer.finish();
    check_table(&table, max_rows);
    for &(address, _) in &pushed[1..] {
        for asked in [address, address.saturating_sub(1)] {
            let after = pushed.partition_point(|(address, _)| *address <= asked);
            let expected = after.checked_sub(1).map_or(NO_RULE, |index| pushed[index].1);
            assert_eq!(rule_at(&table, asked), expected, "{asked:#x}");
        }
    }
}

/// What the kernel program finds for a stated address.
fn rule_at(table: &Table, address: u64) -> u16 {
    let page = (address >> PAGE_SHIFT).checked_sub(table.base.into());
    let rows = page.and_then(|page| table.pages().nth(page as usize)).unwrap_or_default();
    let after = rows.partition_point(|row| u64::from(row.place()) <= address & 0xffff);
    after.checked_sub(1).map_or(NO_RULE, |index| rows[index].rule())
}

/// Every page's rows are in order and begin at its first byte.
fn check_table(table: &Table, max_rows: usize) {
    assert!(table.rows.len() <= max_rows + MAX_PAGES && table.page_ends.len() <= MAX_PAGES + 1);
    assert!(table.page_ends.is_sorted());
    for page in table.pages() {
        assert!(page.first().is_none_or(|row| row.place() == 0));
        assert!(page.is_sorted_by(|a: &Row, b: &Row| a.place() < b.place()));
        assert!(page.iter().all(|row| usize::from(row.rule()) < MAX_RULES));
    }
}

/// A whole file.
pub fn executable(bytes: &[u8]) {
    let file = file(bytes);
    let summary = elf::summarize(&file).unwrap_or_default();
    let executable = Executable {
        id: ExecutableId(1),
        table: 1,
        path: String::new(),
        build_id: summary.build_id,
        identity: FileIdentity::default(),
        segments: summary.segments.into(),
        file: Mutex::new(Some(Arc::clone(&file))),
        debug: Mutex::default(),
    };
    let Some(source) = Source::read(&executable) else { return };
    let _ = source.fingerprint(&BuildHasherDefault::<DefaultHasher>::default());
    if let Ok(Some(built)) = source.build(&mut Rules::default(), MAX_ROWS) {
        check_table(&built.table, MAX_ROWS);
    }
}

/// A file of sections: the program's entry, then address, size and flags of each, then their contents.
pub fn sections(bytes: &[u8]) {
    const NAMES: [&str; 10] = [
        ".text",
        ".init",
        ".eh_frame",
        ".debug_frame",
        ".gopclntab",
        ".plt",
        ".plt.sec",
        ".data",
        ".rela.dyn",
        ".symtab",
    ];
    /// Addresses are cut to this: tables of many empty pages take long to write.
    const SPACE: u32 = 32 << PAGE_SHIFT;
    let mut input = Input(bytes);
    let entry = u64::from(input.half());
    let headers = NAMES.map(|name| (name, input.half() % SPACE, u16::from_le_bytes(input.bytes()), input.byte()));
    executable(&file_of_sections(
        entry,
        &headers.map(|(name, address, size, flags)| (name, u64::from(address), flags, input.piece(size.into()))),
    ));
}

/// An ELF file with these sections: name, address, flags, contents.
fn file_of_sections(entry: u64, sections: &[(&str, u64, u8, &[u8])]) -> Vec<u8> {
    const HEADER: usize = 64;
    const SYMTAB: u32 = 2;
    let mut file = vec![0; HEADER];
    let mut headers: Vec<u8> = Vec::new();
    let mut names: Vec<u8> = Vec::new();
    let mut add = |file: &mut Vec<u8>, name: u32, kind: u32, flags: u64, address: u64, contents: &[u8]| {
        for half in [name, kind] {
            headers.extend(half.to_le_bytes());
        }
        for word in [flags, address, file.len() as u64, contents.len() as u64, 0, 0, 0] {
            headers.extend(word.to_le_bytes());
        }
        file.extend(contents);
    };
    for &(name, address, flags, contents) in sections {
        let kind = if name == ".symtab" { SYMTAB } else { 1 };
        let place = names.len() as u32;
        names.extend(name.bytes().chain([0]));
        // The lowest bits choose whether it is code (4) and compressed (0x800).
        let flags = u64::from(flags & 1) << 2 | u64::from(flags & 2) << 10;
        add(&mut file, place, kind, flags, address, contents);
    }
    add(&mut file, 0, 3, 0, 0, &names);
    let header_place = file.len() as u64;
    file.extend(&headers);
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16..20].copy_from_slice(&[3, 0, 62, 0]);
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[40..48].copy_from_slice(&header_place.to_le_bytes());
    let counts = [HEADER as u16, 56, 0, HEADER as u16, sections.len() as u16 + 1, sections.len() as u16];
    for (place, count) in file[52..HEADER].chunks_exact_mut(2).zip(counts) {
        place.copy_from_slice(&count.to_le_bytes());
    }
    file
}

//! Source lines and inlined functions from Go's table.
//!
//! In: the table. Out: which function of which file runs at an address, and what called what was inlined. Layouts by Go
//! version, from `src/runtime/symtab.go`, `symtabinl.go` and `runtime2.go` of Go 1.18 to 1.26 and
//! `src/debug/gosym/pclntab.go` of Go 1.15 to 1.26. Inlined functions are only known of programs of Go 1.18 and later; before,
//! the line is that of the innermost function.

use super::go_table::{GoFunction, GoTable, Layout, read_u32};

/// Most functions that are inlined in one another.
const MAX_DEPTH: usize = 128;
/// Most changes of a value within a function. The largest functions of Go's own compiler have 5,108.
const MAX_STEPS: usize = 1 << 16;
/// Longest name read, bytes.
const MAX_NAME: usize = 16 << 10;
/// Which of a function's tables say what is inlined: `abi.PCDATA_InlTreeIndex` and `abi.FUNCDATA_InlTree`.
const TREE_INDEXES: u32 = 2;
const TREE: u32 = 3;

/// What runs at an address: a function, or one that was inlined in the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GoCall {
    pub(crate) name: Option<String>,
    pub(crate) file: Option<String>,
    pub(crate) line: u32,
    /// The line at which the function begins; 0 before Go 1.20.
    pub(crate) start_line: u32,
}

/// An inlined call: the function, the line at which it begins, and a place of its caller, from the outer function's
/// beginning.
struct InlinedCall {
    name: u32,
    start_line: u32,
    parent: u32,
}

impl GoTable {
    /// Whether it is known what is inlined.
    pub(crate) fn has_inline_trees(&self) -> bool {
        self.inline_trees.is_some()
    }

    /// What runs at a stated address, innermost first. `file` reads what is at a place of the program's file.
    pub(crate) fn calls_at(&self, address: u64, file: impl Fn(u64, &mut [u8]) -> Option<()>) -> Option<Vec<GoCall>> {
        let function = self.function_at(address)?;
        let mut calls = Vec::new();
        let mut place = address;
        loop {
            let mut call = self.place(function, place);
            let inlined = if calls.len() < MAX_DEPTH { self.inlined_at(function, place, &file) } else { None };
            let Some(inlined) = inlined else {
                call.name = self.name(function).and_then(|name| self.text(self.names, name));
                call.start_line = self.start_line(function);
                calls.push(call);
                return Some(calls);
            };
            call.name = self.text(self.names, inlined.name);
            call.start_line = inlined.start_line;
            calls.push(call);
            place = function.start.checked_add(inlined.parent.into())?;
        }
    }

    /// The function that holds an address.
    fn function_at(&self, address: u64) -> Option<GoFunction> {
        let (mut low, mut high) = (0, self.count);
        // Functions are sorted by address; the last one before or at it is looked for.
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle)?.0 <= address { low = middle + 1 } else { high = middle }
        }
        let index = low.checked_sub(1)?;
        let ((start, record), (end, _)) = (self.entry(index)?, self.entry(index + 1)?);
        (start <= address && address < end).then_some(GoFunction { start, end, record })
    }

    /// File and line of an address of a function.
    fn place(&self, function: GoFunction, address: u64) -> GoCall {
        let value = |field| {
            let start = read_u32(&self.bytes, self.field(function, field))?;
            self.value(start, function, address)
        };
        let line = value(20).and_then(|line| u32::try_from(line).ok());
        let file = value(16).and_then(|file| self.file(function, u32::try_from(file).ok()?));
        GoCall { file, line: line.unwrap_or(0), ..GoCall::default() }
    }

    /// The name of a file, by its number: in its package since Go 1.16, in the program before.
    fn file(&self, function: GoFunction, number: u32) -> Option<String> {
        if self.layout == Layout::V1_2 {
            let name = read_u32(&self.bytes, self.files.checked_add(usize::try_from(number).ok()?.checked_mul(4)?)?)?;
            return self.text(0, name).filter(|_| number != 0);
        }
        let package = read_u32(&self.bytes, self.field(function, 28))?;
        let place = usize::try_from(package.checked_add(number)?).ok()?.checked_mul(4)?;
        let name = read_u32(&self.bytes, self.packages.checked_add(place)?)?;
        self.text(self.files, name).filter(|_| name != u32::MAX)
    }

    /// The line at which a function begins; 0 where it is not said.
    fn start_line(&self, function: GoFunction) -> u32 {
        let line = self.has_start_lines.then(|| read_u32(&self.bytes, self.field(function, 32))).flatten();
        line.filter(|&line| line <= i32::MAX as u32).unwrap_or(0)
    }

    /// What is inlined at an address of a function, innermost.
    fn inlined_at(
        &self,
        function: GoFunction,
        address: u64,
        file: &impl Fn(u64, &mut [u8]) -> Option<()>,
    ) -> Option<InlinedCall> {
        let trees = self.inline_trees?;
        // A record ends in a byte with the number of the second kind of tables; the lists of both follow.
        let lists = self.field(function, if self.has_start_lines { 40 } else { 36 });
        let (values, trees_listed) =
            (read_u32(&self.bytes, self.field(function, 24))?, u32::from(*self.bytes.get(lists.checked_sub(1)?)?));
        let listed =
            |index: u32| read_u32(&self.bytes, lists.checked_add(usize::try_from(index).ok()?.checked_mul(4)?)?);
        if values <= TREE_INDEXES || trees_listed <= TREE {
            return None;
        }
        let indexes = listed(TREE_INDEXES).filter(|&start| start != 0)?;
        let index = u64::try_from(self.value(indexes, function, address)?).ok()?;
        let tree = listed(values.checked_add(TREE)?).filter(|&tree| tree != u32::MAX)?;
        let (size, [name, parent]) = if self.has_start_lines { (16, [4, 8]) } else { (20, [12, 16]) };
        let mut call = [0; 20];
        let call = call.get_mut(..size)?;
        file(trees.checked_add(tree.into())?.checked_add(index.checked_mul(size as u64)?)?, call)?;
        let start_line = if self.has_start_lines { read_u32(call, 12)? } else { 0 };
        let start_line = if start_line <= i32::MAX as u32 { start_line } else { 0 };
        Some(InlinedCall { name: read_u32(call, name)?, parent: read_u32(call, parent)?, start_line })
    }

    /// The value at an address of a function, of those whose changes begin at `start`. Both what is added to the value and
    /// how many bytes it then holds for are numbers in groups of 7 bits.
    fn value(&self, start: u32, function: GoFunction, address: u64) -> Option<i32> {
        let mut at = self.depths.checked_add(usize::try_from(start).ok()?)?;
        let (mut value, mut until) = (-1i32, function.start);
        for step in 0..MAX_STEPS {
            let change = self.varint(&mut at)?;
            if change == 0 && step != 0 {
                return None;
            }
            // The lowest bit is the sign.
            let change = if change & 1 == 1 { !(change >> 1) } else { change >> 1 } as i32;
            value = value.wrapping_add(change);
            until = until.checked_add(self.varint(&mut at)?.into())?;
            if address < until {
                return Some(value);
            }
        }
        None
    }

    /// The text that begins at `place` of what begins at `base`.
    fn text(&self, base: usize, place: u32) -> Option<String> {
        let bytes = self.bytes.get(base.checked_add(usize::try_from(place).ok()?)?..)?;
        let bytes = &bytes[..bytes.len().min(MAX_NAME)];
        let end = bytes.iter().position(|&byte| byte == 0)?;
        let text = str::from_utf8(&bytes[..end]).ok()?;
        (!text.is_empty()).then(|| text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[u8] = b"main.outer\0main.inner\0";
    const FILES: &[u8] = b"main.go\0";
    /// Nothing, then: the first file for 32 bytes; line 10 for 8 bytes, 3 for 8, 12 for 16; what is inlined: nothing for 8
    /// bytes, the first entry for 8, nothing for 16.
    const VALUES: &[u8] = &[0, 2, 32, 0, 22, 8, 13, 8, 18, 16, 0, 0, 8, 2, 8, 1, 16, 0];
    /// The function that is inlined, the place of its call in the outer one, and the line at which it begins.
    const TREE: [u32; 4] = [0, 11, 4, 2];

    fn halves(halves: &[u32]) -> Vec<u8> {
        halves.iter().flat_map(|half| half.to_le_bytes()).collect()
    }

    /// A table of Go 1.20 and later with one function, at 0x1000.
    fn table() -> Vec<u8> {
        let names = 8 + 8 * 8;
        let packages = names + NAMES.len();
        let files = packages + 4;
        let values = files + FILES.len();
        let functions = values + VALUES.len();
        let mut bytes = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8];
        for word in [1, 1, 0x1000, names, packages, files, values, functions] {
            bytes.extend((word as u64).to_le_bytes());
        }
        bytes.extend([NAMES, &[0; 4], FILES, VALUES].concat());
        bytes.extend(halves(&[0, 12, 32]));
        // Address, name, two that do not matter, depths, files, lines, number of values, package, first line.
        bytes.extend(halves(&[0, 0, 0, 0, 0, 1, 4, 3, 0, 9]));
        bytes.extend([0, 0, 0, 4]);
        bytes.extend(halves(&[0, 0, 11, u32::MAX, u32::MAX, u32::MAX, 0]));
        bytes
    }

    fn check(bytes: &[u8], address: u64, expect: &[(&str, u32, u32)]) {
        let mut table = GoTable::parse(bytes.to_vec()).expect("a table");
        table.inline_trees = Some(0);
        let tree = halves(&TREE);
        let read = |place: u64, into: &mut [u8]| {
            into.copy_from_slice(tree.get(place as usize..)?.get(..into.len())?);
            Some(())
        };
        let calls = table.calls_at(address, read).unwrap_or_default();
        let calls: Vec<_> = calls
            .iter()
            .map(|call| {
                assert_eq!(call.file.as_deref(), Some("main.go"));
                (call.name.as_deref().unwrap_or_default(), call.line, call.start_line)
            })
            .collect();
        assert_eq!(calls, expect, "{address:#x}");
    }

    /// Lines, and where the inlined function was called.
    #[test]
    fn reads_lines_and_what_is_inlined() {
        let table = table();
        check(&table, 0x1000, &[("main.outer", 10, 9)]);
        check(&table, 0x1008, &[("main.inner", 3, 2), ("main.outer", 10, 9)]);
        check(&table, 0x101f, &[("main.outer", 12, 9)]);
        check(&table, 0xfff, &[]);
        check(&table, 0x1020, &[]);
    }

    /// However the table is cut or changed, reading it ends.
    #[test]
    fn survives_broken_tables() {
        let table = table();
        for place in 0..table.len() {
            for byte in [0, 1, 0x80, 0xff] {
                let mut broken = table.clone();
                broken[place] = byte;
                for bytes in [&broken[..], &table[..place]] {
                    let Some(mut broken) = GoTable::parse(bytes.to_vec()) else { continue };
                    broken.inline_trees = Some(0);
                    let calls = broken.calls_at(0x1008, |_, into| {
                        into.fill(byte);
                        Some(())
                    });
                    assert!(calls.is_none_or(|calls| calls.len() <= MAX_DEPTH + 1));
                }
            }
        }
    }
}

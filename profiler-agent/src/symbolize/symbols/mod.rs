//! Functions of files, within a byte budget.
//!
//! A file may say what its functions are called in several places. What says most is asked first, and what it does not
//! know is asked of the next. Names stay in their files: only where they are is kept.

mod index;

use std::{collections::HashMap, fs::File, sync::Arc};

use tracing::debug;

use self::index::{Function, Index, Names};
use crate::{
    elf::{self, GoTable, SymbolTable},
    profile::{Executable, ExecutableId, Nameless},
};

/// Most functions of one file: 16 MiB of memory. Browsers have half as many.
const MAX_FUNCTIONS: usize = 1 << 20;

/// Where a name was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymbolSource {
    /// `.symtab` of the file itself.
    SymbolTable,
    /// `.symtab` of the debug file that was split off it.
    DebugFile,
    /// `.symtab` of the small file inside it.
    MiniDebugInfo,
    /// `.dynsym`: what other files may call.
    DynamicSymbols,
    /// The table of Go's runtime.
    GoTable,
    /// Debug information, where it was asked for lines or inlined functions and no symbol covers the place.
    DebugInfo,
}

impl SymbolSource {
    /// Every source, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::SymbolTable, Self::DebugFile, Self::MiniDebugInfo, Self::DynamicSymbols, Self::GoTable, Self::DebugInfo];

    /// Its name for people and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::SymbolTable => "symbol table",
            Self::DebugFile => "debug file",
            Self::MiniDebugInfo => "MiniDebugInfo",
            Self::DynamicSymbols => "dynamic symbols",
            Self::GoTable => "Go table",
            Self::DebugInfo => "debug information",
        }
    }
}

/// What one file says its functions are called.
#[derive(Debug, Default)]
pub(super) struct FileSymbols {
    /// What is asked first comes first.
    indexes: Vec<(SymbolSource, Index)>,
    /// Bytes of files that were made in memory.
    made: usize,
}

impl FileSymbols {
    /// Reads everything that names functions of the file.
    pub(super) fn read(file: &Arc<File>, build_id: Option<&[u8]>) -> Self {
        let mut symbols = Self::default();
        symbols.add_tables(file, SymbolSource::SymbolTable);
        let sections = elf::sections(file);
        if symbols.indexes.is_empty()
            && let Some(debug_file) = build_id.and_then(elf::debug_file)
        {
            symbols.add_tables(&Arc::new(debug_file), SymbolSource::DebugFile);
        }
        if symbols.indexes.is_empty() {
            if let Some(inside) = elf::mini_debug_info(file, &sections) {
                symbols.made = inside.metadata().map_or(0, |metadata| usize::try_from(metadata.len()).unwrap_or(0));
                symbols.add_tables(&Arc::new(inside), SymbolSource::MiniDebugInfo);
            }
            symbols.add_tables(file, SymbolSource::DynamicSymbols);
            if let Some(table) = GoTable::find(file, &sections) {
                symbols.add_go(file, &table);
            }
        }
        symbols
    }

    /// Adds a file's full table, or its dynamic one.
    fn add_tables(&mut self, file: &Arc<File>, source: SymbolSource) {
        let is_dynamic = source == SymbolSource::DynamicSymbols;
        let tables = elf::symbol_tables(file);
        let Some(table) = tables.iter().find(|table| table.is_dynamic == is_dynamic) else { return };
        if let Some(functions) = functions_of(file, table, self.room())
            && !functions.is_empty()
        {
            let (start, len) = table.names;
            self.indexes.push((source, Index::new(functions, Names { file: Arc::clone(file), start, len })));
        }
    }

    /// How many more functions may be known.
    fn room(&self) -> usize {
        MAX_FUNCTIONS - self.indexes.iter().map(|(_, index)| index.len()).sum::<usize>().min(MAX_FUNCTIONS)
    }

    fn add_go(&mut self, file: &Arc<File>, table: &GoTable) {
        let functions: Vec<Function> = table
            .functions()
            .take(self.room())
            .filter_map(|function| {
                Some(Function::new(function.start, function.end - function.start, table.name(function)?))
            })
            .collect();
        let names = Names { file: Arc::clone(file), start: table.names_place(), len: table.names().len() as u64 };
        self.indexes.push((SymbolSource::GoTable, Index::new(functions, names)));
    }

    /// The function that holds a stated address, as the file calls it, and where it was found.
    pub(super) fn name(&self, address: u64) -> Result<(String, SymbolSource), Nameless> {
        let nameless = if self.indexes.is_empty() { Nameless::NoSymbols } else { Nameless::NotCovered };
        let found = self.indexes.iter().find_map(|(source, index)| Some((index.name(address)?, *source)));
        found.ok_or(nameless)
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + self.made + self.indexes.iter().map(|(_, index)| index.bytes()).sum::<usize>()
    }
}

/// The functions of a table; `None` where there are more than `most`.
fn functions_of(file: &File, table: &SymbolTable, most: usize) -> Option<Vec<Function>> {
    // Counted first: a vector that grows takes up to twice what it needs.
    let mut count = 0usize;
    table.each(file, |_| {
        count += 1;
        count <= most
    });
    if count > most {
        debug!("a symbol table has more than {most} functions: it is not used");
        return None;
    }
    let mut functions = Vec::with_capacity(count);
    table.each(file, |symbol| {
        functions.push(match symbol.size {
            0 => Function::without_size(symbol.address, symbol.left, symbol.name),
            size => Function::new(symbol.address, size, symbol.name),
        });
        functions.len() < count
    });
    Some(functions)
}

/// One file's symbols.
struct Held {
    symbols: Arc<FileSymbols>,
    executable: Arc<Executable>,
    bytes: usize,
    used: u64,
}

/// Symbols of the files that were asked for last.
pub(super) struct SymbolStore {
    files: HashMap<ExecutableId, Held>,
    bytes: usize,
    budget: usize,
    /// Counts requests, to tell which file was used last.
    clock: u64,
    read: u64,
    evicted: u64,
}

impl SymbolStore {
    pub(super) fn new(budget: usize) -> Self {
        Self { files: HashMap::new(), bytes: 0, budget, clock: 0, read: 0, evicted: 0 }
    }

    /// The symbols of a file; `None` where it cannot be read.
    pub(super) fn of(&mut self, executable: &Arc<Executable>) -> Option<Arc<FileSymbols>> {
        self.clock += 1;
        if let Some(held) = self.files.get_mut(&executable.id) {
            held.used = self.clock;
            return Some(Arc::clone(&held.symbols));
        }
        let symbols = Arc::new(FileSymbols::read(&executable.file()?, executable.build_id.as_deref()));
        self.read += 1;
        let bytes = symbols.bytes();
        while self.bytes + bytes > self.budget && self.evict_oldest() {}
        self.bytes += bytes;
        let held = Held { symbols: Arc::clone(&symbols), executable: Arc::clone(executable), bytes, used: self.clock };
        self.files.insert(executable.id, held);
        Some(symbols)
    }

    /// Lets go of files that were closed.
    pub(super) fn forget_closed(&mut self) {
        self.files.retain(|_, held| {
            let keep = held.executable.file().is_some();
            if !keep {
                self.bytes -= held.bytes;
            }
            keep
        });
    }

    /// Bytes it takes, files read, and files that were let go to keep the budget.
    pub(super) fn stats(&self) -> (usize, u64, u64) {
        (self.bytes, self.read, self.evicted)
    }

    /// Returns whether there was one.
    fn evict_oldest(&mut self) -> bool {
        let oldest = self.files.iter().min_by_key(|(_, held)| held.used).map(|(&id, _)| id);
        let Some(held) = oldest.and_then(|id| self.files.remove(&id)) else { return false };
        self.bytes -= held.bytes;
        self.evicted += 1;
        true
    }
}

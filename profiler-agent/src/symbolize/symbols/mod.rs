//! Functions of files.
//!
//! A file may say what its functions are called in several places. What says most is asked first, and what it does not
//! know is asked of the next. Names stay in their files: only where they are is kept.

mod index;
mod store;

use std::{fs::File, sync::Arc};

use tracing::debug;

use self::index::{Function, Index, Names};
pub(super) use self::store::SymbolStore;
use super::{
    debuginfod::{Absence, Answer, Debuginfod},
    demangle,
};
use crate::{
    elf::{self, GoTable, Section, Stub, SymbolTable},
    profile::{Nameless, SplitDebug},
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
    /// The same of a debug file that a server sent.
    Debuginfod,
    /// `.symtab` of the small file inside it.
    MiniDebugInfo,
    /// `.dynsym`: what other files may call.
    DynamicSymbols,
    /// The table of Go's runtime.
    GoTable,
    /// A procedure linkage table, through which other files' functions are called.
    LinkageTable,
    /// The perf map of the process that made the code.
    PerfMap,
    /// Its jitdump.
    Jitdump,
    /// Debug information, where it was asked for lines or inlined functions and no symbol covers the place.
    DebugInfo,
}

impl SymbolSource {
    /// Every source, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::SymbolTable,
        Self::DebugFile,
        Self::Debuginfod,
        Self::MiniDebugInfo,
        Self::DynamicSymbols,
        Self::GoTable,
        Self::LinkageTable,
        Self::PerfMap,
        Self::Jitdump,
        Self::DebugInfo,
    ];

    /// Its name for people and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::SymbolTable => "symbol table",
            Self::DebugFile => "debug file",
            Self::Debuginfod => "debuginfod",
            Self::MiniDebugInfo => "MiniDebugInfo",
            Self::DynamicSymbols => "dynamic symbols",
            Self::GoTable => "Go table",
            Self::LinkageTable => "linkage table",
            Self::PerfMap => "perf map",
            Self::Jitdump => "jitdump",
            Self::DebugInfo => "debug information",
        }
    }
}

/// What one file says its functions are called.
#[derive(Debug)]
pub(super) struct FileSymbols {
    /// The file itself.
    file: Arc<File>,
    /// What was split off it, where that is known.
    split_off: Option<Arc<File>>,
    /// What is asked first comes first.
    indexes: Vec<(SymbolSource, Index)>,
    /// Bytes of files that were made in memory.
    made: usize,
    /// What servers say of its debug file, where they were asked and have not sent it.
    not_sent: Option<NotSent>,
}

/// Why there is no debug file from a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NotSent {
    /// It may still come.
    Pending,
    Absent(Absence),
}

impl FileSymbols {
    /// Reads everything that names functions of the file. `debug` may have been split off it; where nothing on this machine
    /// was, `servers` are asked.
    pub(super) fn read(
        file: &Arc<File>,
        build_id: Option<&[u8]>,
        debug: Option<&SplitDebug>,
        servers: Option<&Debuginfod>,
    ) -> Self {
        let mut symbols =
            Self { file: Arc::clone(file), split_off: None, indexes: Vec::new(), made: 0, not_sent: None };
        symbols.add_tables(file, SymbolSource::SymbolTable);
        if symbols.indexes.is_empty() {
            let of_process =
                debug.filter(|debug| elf::is_split_off(debug, build_id)).map(|debug| Arc::clone(&debug.file));
            if let Some(split) = of_process.or_else(|| build_id.and_then(elf::debug_file).map(Arc::new)) {
                symbols.add_tables(&split, SymbolSource::DebugFile);
                symbols.split_off = Some(split);
            }
        }
        let sections = elf::sections(file);
        if symbols.indexes.is_empty() {
            symbols.add_partial(file, build_id, &sections, servers);
        }
        symbols.add_stubs(file, &sections);
        symbols
    }

    /// Adds what names only some of the functions, unless a server has all.
    fn add_partial(
        &mut self,
        file: &Arc<File>,
        build_id: Option<&[u8]>,
        sections: &[Section],
        servers: Option<&Debuginfod>,
    ) {
        let go_table = GoTable::find(file, sections);
        // What Go's table knows is as much as a debug file would tell.
        if let (None, Some(servers), Some(build_id)) = (&go_table, servers, build_id) {
            self.ask(servers, build_id);
        }
        if !self.indexes.is_empty() {
            return;
        }
        if let Some(inside) = elf::mini_debug_info(file, sections) {
            self.made = inside.metadata().map_or(0, |metadata| usize::try_from(metadata.len()).unwrap_or(0));
            self.add_tables(&Arc::new(inside), SymbolSource::MiniDebugInfo);
        }
        self.add_tables(file, SymbolSource::DynamicSymbols);
        if let Some(table) = go_table {
            self.add_go(file, &table);
        }
    }

    fn ask(&mut self, servers: &Debuginfod, build_id: &[u8]) {
        match servers.debug_file(build_id) {
            Answer::Ready(debug_file) => {
                let debug_file = Arc::new(debug_file);
                self.add_tables(&debug_file, SymbolSource::Debuginfod);
                self.split_off = Some(debug_file);
            }
            Answer::Pending => self.not_sent = Some(NotSent::Pending),
            Answer::Absent(reason) => self.not_sent = Some(NotSent::Absent(reason)),
        }
    }

    /// The file that was split off this one, where its symbols were needed.
    pub(super) fn split_off(&self) -> Option<&Arc<File>> {
        self.split_off.as_ref()
    }

    /// Why servers did not send more of them.
    fn absence(&self) -> Option<Absence> {
        match self.not_sent? {
            NotSent::Absent(reason) => Some(reason),
            NotSent::Pending => None,
        }
    }

    /// Whether a server may still send more of them.
    fn is_awaiting(&self) -> bool {
        self.not_sent == Some(NotSent::Pending)
    }

    /// Whether they are the symbols of that file too: it says the same, and has nothing besides that says more.
    pub(super) fn are_of(&self, file: &File, has_debug: bool) -> bool {
        let says_most = |(source, _): &(SymbolSource, Index)| {
            matches!(source, SymbolSource::SymbolTable | SymbolSource::DebugFile | SymbolSource::Debuginfod)
        };
        (!has_debug || self.indexes.iter().any(says_most)) && elf::tables_are_equal(&self.file, file)
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

    fn add_stubs(&mut self, file: &Arc<File>, sections: &[Section]) {
        let Some(names) = sections.iter().find(|section| section.name == ".dynstr") else { return };
        let stubs = elf::stubs(file, sections);
        if !stubs.is_empty() {
            let function = |stub: Stub| Function::new(stub.address, stub.size, stub.name);
            let functions = stubs.into_iter().take(self.room()).map(function).collect();
            let names = Names { file: Arc::clone(file), start: names.offset, len: names.size };
            self.indexes.push((SymbolSource::LinkageTable, Index::new(functions, names)));
        }
    }

    /// The function that holds a stated address, as the file calls it, and where it was found.
    pub(super) fn name(&self, address: u64) -> Result<(String, SymbolSource), Nameless> {
        let says_nothing = self.indexes.iter().all(|(source, _)| *source == SymbolSource::LinkageTable);
        let nameless = match self.not_sent {
            Some(NotSent::Pending) => Nameless::DebugFilePending,
            Some(NotSent::Absent(reason)) if reason != Absence::NotFound => Nameless::DebugFileNotSent,
            _ if says_nothing => Nameless::NoSymbols,
            _ => Nameless::NotCovered,
        };
        let found = self.indexes.iter().find_map(|(source, index)| {
            let name = index.name(address)?;
            Some((if *source == SymbolSource::LinkageTable { name + demangle::STUB } else { name }, *source))
        });
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

//! Names of the kernel's functions: its own, its modules', and those it makes at run time (BPF programs, trampolines).
//!
//! blazesym reads the kernel's table of symbols once. Modules come and go with `/proc/modules`; what the kernel makes at
//! run time is announced as it comes and goes, and remembered here.

use std::collections::BTreeMap;

use blazesym::{
    MaybeDefault,
    symbolize::{
        Input, Symbolized, Symbolizer,
        source::{Kernel, Source},
    },
};
use tracing::debug;

use super::demangle;
use crate::profile::{FrameName, KernelCode, Nameless};

/// Names of loaded kernel modules and their addresses: kernel symbols are read again when it changes.
const MODULES: &str = "/proc/modules";
/// How far a symbol reaches, which the kernel's table does not say: farther than any of its functions. What lies behind
/// the last function of a module is none of it.
const REACH: usize = 128 << 10;
/// The same of a BPF program, of up to a million instructions.
const BPF_REACH: usize = 16 << 20;
/// How the kernel names BPF programs (`bpf_get_prog_name`, kernel/bpf/core.c).
const BPF_PREFIX: &str = "bpf_prog_";
/// Announcements remembered. When there are more, the table is read again, which has them all.
const MAX_ANNOUNCED: usize = 4096;

/// Names kernel addresses.
pub(super) struct KernelSymbols {
    symbolizer: Symbolizer,
    /// What [`MODULES`] said when symbols were read.
    modules: Vec<u8>,
    /// Code that came or went since: by its first address, where it ends, and its name if it is there.
    announced: BTreeMap<u64, (u64, Option<Box<str>>)>,
}

impl KernelSymbols {
    pub(super) fn new() -> Self {
        Self { symbolizer: symbolizer(), modules: read_modules(), announced: BTreeMap::new() }
    }

    /// Reads all symbols again, at the next question. Every name that was given before may be wrong by now.
    pub(super) fn read_again(&mut self) {
        self.symbolizer = symbolizer();
        self.announced.clear();
    }

    /// Whether modules came or went since the last question, so that every name may be wrong.
    pub(super) fn have_changed(&mut self) -> bool {
        let modules = read_modules();
        let have_changed = modules != self.modules;
        if have_changed {
            debug!("kernel modules changed: symbols are read again");
            self.modules = modules;
            self.read_again();
        }
        have_changed
    }

    /// Takes note of code that came or went.
    pub(super) fn announce(&mut self, code: &KernelCode) {
        if self.announced.len() >= MAX_ANNOUNCED {
            self.read_again();
        }
        self.announced.insert(code.start, (code.end, code.name.clone()));
    }

    /// The names of addresses, in their order.
    pub(super) fn names(&self, addresses: &[u64]) -> Vec<FrameName> {
        let mut names: Vec<FrameName> = self.read_names(addresses);
        for (name, &address) in names.iter_mut().zip(addresses) {
            if let Some((_, (end, announced))) = self.announced.range(..=address).next_back()
                && address < *end
            {
                *name = match announced {
                    Some(announced) => FrameName::Function((&**announced).into()),
                    None => FrameName::Unnamed(Nameless::NotCovered),
                };
            }
        }
        names
    }

    /// What the kernel's table says; a failed call names nothing.
    fn read_names(&self, addresses: &[u64]) -> Vec<FrameName> {
        let source = Source::Kernel(Kernel { vmlinux: MaybeDefault::None, debug_syms: false, ..Kernel::default() });
        let symbolized = self.symbolizer.symbolize(&source, Input::AbsAddr(addresses)).unwrap_or_else(|error| {
            debug!("no symbols of the kernel: {error:#}");
            Vec::new()
        });
        let mut names: Vec<FrameName> = symbolized
            .into_iter()
            .map(|symbolized| match symbolized {
                Symbolized::Sym(symbol) if symbol.offset < reach_of(&symbol.name) => {
                    FrameName::Function(demangle::function(symbol.name.into_owned()))
                }
                Symbolized::Sym(_) | Symbolized::Unknown(_) => FrameName::Unnamed(Nameless::NotCovered),
            })
            .collect();
        names.resize(addresses.len(), FrameName::Unnamed(Nameless::Unreadable));
        names
    }
}

fn reach_of(name: &str) -> usize {
    if name.starts_with(BPF_PREFIX) { BPF_REACH } else { REACH }
}

fn read_modules() -> Vec<u8> {
    // Kernels without modules have no such file.
    std::fs::read(MODULES).unwrap_or_default()
}

fn symbolizer() -> Symbolizer {
    Symbolizer::builder()
        .enable_code_info(false)
        .enable_inlined_fns(false)
        .enable_auto_reload(true)
        .enable_demangling(false)
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that is announced has its name, between its ends and until it goes.
    #[test]
    fn announced_code_comes_and_goes() {
        let mut symbols = KernelSymbols::new();
        let name = |symbols: &KernelSymbols, address| match symbols.names(&[address]).pop() {
            Some(FrameName::Function(name)) => name.readable.into_string(),
            other => format!("{other:?}"),
        };
        symbols.announce(&KernelCode { start: 0x1000, end: 0x1020, name: Some("bpf_prog_1".into()) });
        assert_eq!(name(&symbols, 0x1000), "bpf_prog_1");
        assert_eq!(name(&symbols, 0x101f), "bpf_prog_1");
        assert_ne!(name(&symbols, 0x1020), "bpf_prog_1");
        symbols.announce(&KernelCode { start: 0x1000, end: 0x1020, name: None });
        assert_eq!(name(&symbols, 0x1000), "Some(Unnamed(NotCovered))");
        for start in 0..2 * MAX_ANNOUNCED as u64 {
            symbols.announce(&KernelCode { start, end: start + 1, name: None });
        }
        assert!(symbols.announced.len() <= MAX_ANNOUNCED);
    }
}

//! Readable names for C++ and Rust symbols, within a bound.
//!
//! A mangled name can refer back to its own parts, so a short one may stand for an endless readable one:
//! writing stops where a name is longer than anybody would read. One that does not parse may be tried in an endless
//! number of ways: how deep it nests is limited.

use std::fmt::{self, Write};

use cpp_demangle::{DemangleOptions, ParseOptions};

use crate::profile::FunctionName;

/// Longest readable name, bytes.
const MAX_READABLE: usize = 1024;
/// Most bytes of a symbol that are kept beside its readable name.
const MAX_SYSTEM: usize = 4096;
/// Longest symbol that is read at all.
const MAX_SYMBOL: usize = 16 << 10;
/// Deepest nesting of C++ names that is read: what does not parse may take twice as long for each level. Of 129,579
/// names in LLVM, Node and the C++ library 50 are deeper.
const MAX_CPP_DEPTH: u32 = 56;
/// Most places of a C++ symbol that look like the operators `new` and `delete`, whose operand is parsed twice if it
/// does not parse. Of the same names 39 have more.
const MAX_TWICE_PARSED: usize = 8;

/// The name of the function with this symbol.
pub(super) fn function(symbol: String) -> FunctionName {
    let readable = readable(&symbol);
    let system = (readable != symbol).then(|| cut(symbol, MAX_SYSTEM).into());
    FunctionName { readable: readable.into(), system }
}

fn cut(mut text: String, len: usize) -> String {
    text.truncate(text.floor_char_boundary(len));
    text
}

/// Ends the names of entries of procedure linkage tables, as binutils writes them.
pub(super) const STUB: &str = "@plt";

/// The readable form of a symbol; the symbol itself (cut to the bound) where it is not mangled or cannot be read.
pub(super) fn readable(symbol: &str) -> String {
    if let Some(called) = symbol.strip_suffix(STUB)
        && !called.ends_with(STUB)
    {
        let called = readable(called);
        return called[..called.floor_char_boundary(MAX_READABLE - STUB.len())].to_owned() + STUB;
    }
    let symbol = &symbol[..symbol.floor_char_boundary(MAX_SYMBOL)];
    rust(symbol)
        .or_else(|| cpp(symbol))
        .unwrap_or_else(|| symbol[..symbol.floor_char_boundary(MAX_READABLE)].to_owned())
}

fn rust(symbol: &str) -> Option<String> {
    let name = rustc_demangle::try_demangle(symbol).ok()?;
    let mut readable = Bounded(String::new());
    // An error means that the bound was reached: what fits is kept. `#` leaves out the hash.
    let _ = write!(readable, "{name:#}");
    Some(readable.0)
}

fn cpp(symbol: &str) -> Option<String> {
    if !symbol.starts_with("_Z") && !symbol.starts_with("__Z") {
        return None;
    }
    let is_twice_parsed = |pair: &&[u8]| matches!(*pair, b"dl" | b"da" | b"nw" | b"na");
    if symbol.as_bytes().windows(2).filter(is_twice_parsed).count() > MAX_TWICE_PARSED {
        return None;
    }
    let options = ParseOptions::default().recursion_limit(MAX_CPP_DEPTH);
    let name = cpp_demangle::Symbol::new_with_options(symbol, &options).ok()?;
    let mut readable = Bounded(String::new());
    let outcome = name.structured_demangle(&mut readable, &DemangleOptions::default());
    (outcome.is_ok() || readable.0.len() >= MAX_READABLE).then_some(readable.0)
}

/// A string that refuses to grow beyond the bound.
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = MAX_READABLE - self.0.len().min(MAX_READABLE);
        let fits = text.floor_char_boundary(room);
        self.0.push_str(&text[..fits]);
        if fits == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(symbol: &str, expect: &str) {
        assert_eq!(readable(symbol), expect);
    }

    /// Both of Rust's manglings, C++, and names that are none of them.
    #[test]
    fn reads_what_compilers_write() {
        check("_ZN4core3fmt9Formatter3pad17h0123456789abcdefE", "core::fmt::Formatter::pad");
        check("_RNvCs1234_7mycrate3foo", "mycrate::foo");
        check("_ZNSt6vectorIiSaIiEE9push_backEOi", "std::vector<int, std::allocator<int> >::push_back(int&&)");
        check("main", "main");
        check("_Znonsense", "_Znonsense");
        check("memcpy@plt", "memcpy@plt");
        check("_ZdlPv@plt", "operator delete(void*)@plt");
    }

    /// What does not parse is given up soon, however many ways there are to try.
    #[test]
    fn gives_up_soon() {
        let started = std::time::Instant::now();
        for repeated in ["dl", "nwna", "plda", "StIDp", "cvT_I", "KXsr"] {
            for times in [6, 12, 40, 1000] {
                let symbol = format!("_Z1fIX{}#", repeated.repeat(times));
                assert!(symbol.starts_with(&readable(&symbol)));
            }
        }
        assert!(started.elapsed() < std::time::Duration::from_secs(5), "{:?}", started.elapsed());
    }

    /// A name that doubles with every reference to itself stays short and is read in no time.
    #[test]
    fn bounds_exploding_names() {
        let mut symbol = "_Z1fSt4pairIiiE".to_owned();
        for reference in ["S0_", "S1_", "S2_", "S3_", "S4_", "S5_", "S6_", "S7_", "S8_", "S9_", "SA_", "SB_", "SC_"] {
            symbol.push_str(&format!("St4pairI{reference}{reference}E"));
        }
        assert!(readable(&symbol).len() <= MAX_READABLE);
        assert!(readable(&"x".repeat(100_000)).len() <= MAX_READABLE);
    }
}

//! Functions of one symbol table, by address.
//!
//! A function with a size has the addresses it says. One without, which hand-written assembly often has, reaches to the
//! next symbol or the end of its section, but not far: what a stripped file does not name has no name, and a wrong one
//! is worse than none.

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc};

/// How far a symbol without a size reaches, bytes.
const REACH: u64 = 4 << 10;
/// How many symbols before an address are looked at for one that holds it: they may nest, and several may begin at one
/// place.
const LOOK_BACK: usize = 32;
/// Most names of one place that are compared.
const MAX_ALIASES: usize = 8;
/// Longest name read, bytes.
const MAX_NAME: usize = 16 << 10;
/// What a name is read in.
const NAME_PIECE: usize = 256;

/// One function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Function {
    /// Stated address.
    start: u64,
    /// Bytes, and in the highest bit whether the file does not state them.
    size: u32,
    /// Where its name begins among the names.
    name: u32,
}

/// See [`Function::size`].
const UNSTATED: u32 = 1 << 31;

impl Function {
    /// A function of a stated size.
    pub(super) fn new(start: u64, size: u64, name: u32) -> Self {
        Self { start, size: u32::try_from(size).unwrap_or(u32::MAX).min(UNSTATED - 1), name }
    }

    /// A function without one, `left` bytes before the end of its section.
    pub(super) fn without_size(start: u64, left: u64, name: u32) -> Self {
        Self { start, size: UNSTATED | left.min(REACH) as u32, name }
    }

    fn has_size(&self) -> bool {
        self.size & UNSTATED == 0
    }

    /// Whether it holds an address that is not before it.
    fn holds(&self, address: u64) -> bool {
        address - self.start < u64::from(self.size & !UNSTATED)
    }
}

/// Where the names are: a part of a file. Each is ended by a zero.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) file: Arc<File>,
    /// Where the part begins, and its bytes.
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Functions by address, and their names.
#[derive(Debug)]
pub(super) struct Index {
    functions: Box<[Function]>,
    names: Names,
}

impl Index {
    /// An index of functions in any order.
    pub(super) fn new(mut functions: Vec<Function>, names: Names) -> Self {
        functions.sort_unstable();
        functions.dedup();
        Self { functions: functions.into(), names }
    }

    pub(super) fn len(&self) -> usize {
        self.functions.len()
    }

    /// Bytes of memory it takes.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.functions)
    }

    /// The name of the function that holds `address`, as the file has it.
    pub(super) fn name(&self, address: u64) -> Option<String> {
        let after = self.functions.partition_point(|function| function.start <= address);
        let before = &self.functions[after.saturating_sub(LOOK_BACK)..after];
        let found =
            before.iter().rev().find(|function| function.has_size() && function.holds(address)).or_else(|| {
                let last = before.last().filter(|last| last.holds(address))?;
                // (Of several names of one place, one may have a size that ends before.)
                let mut alike = before.iter().rev().take_while(|other| other.start == last.start);
                alike.all(|other| !other.has_size()).then_some(last)
            })?;
        before
            .iter()
            .rev()
            .filter(|other| other.start == found.start && other.has_size() == found.has_size() && other.holds(address))
            .take(MAX_ALIASES)
            .filter_map(|function| self.names.at(function.name))
            .min_by(|a, b| preference(a).cmp(&preference(b)))
    }
}

/// Of several names of one function, the one that people use: `write` rather than `__libc_write`, but
/// `__vdso_clock_gettime`, since the C library has another `clock_gettime`.
fn preference(name: &str) -> (bool, usize, usize, &str) {
    let is_mangled = name.starts_with("_Z") || name.starts_with("_R");
    let underscores = if is_mangled { 0 } else { name.bytes().take_while(|&byte| byte == b'_').count() };
    (!name.starts_with("__vdso_"), underscores, name.len(), name)
}

impl Names {
    /// The name that begins at `place`; `None` where there is none, or it is absurdly long.
    fn at(&self, place: u32) -> Option<String> {
        let place = u64::from(place);
        let mut left = usize::try_from(self.len.checked_sub(place)?).unwrap_or(usize::MAX).min(MAX_NAME);
        let mut at = self.start.checked_add(place)?;
        let mut name = Vec::new();
        let mut piece = [0; NAME_PIECE];
        while left > 0 {
            let read = self.file.read_at(&mut piece[..NAME_PIECE.min(left)], at).ok().filter(|&read| read > 0)?;
            if let Some(end) = piece[..read].iter().position(|&byte| byte == 0) {
                name.extend_from_slice(&piece[..end]);
                return text(&name);
            }
            name.extend_from_slice(&piece[..read]);
            at = at.checked_add(read as u64)?;
            left -= read;
        }
        None
    }
}

fn text(name: &[u8]) -> Option<String> {
    let name = str::from_utf8(name).ok()?;
    // A version may follow the name: `memcpy@@GLIBC_2.14`.
    let name = name.split_once('@').filter(|(plain, _)| !plain.is_empty()).map_or(name, |(plain, _)| plain);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn names(contents: &[u8]) -> Names {
        let mut file = File::from(memfd_create(c"names", MFdFlags::MFD_CLOEXEC).expect("a file"));
        file.write_all(contents).expect("room");
        Names { file: Arc::new(file), start: 0, len: contents.len() as u64 }
    }

    fn index(functions: &[(u64, u64, &str)]) -> Index {
        let mut contents = vec![0];
        let functions = functions
            .iter()
            .map(|&(start, size, name)| {
                let place = contents.len() as u32;
                contents.extend(name.bytes().chain([0]));
                // The section is large.
                if size == 0 {
                    Function::without_size(start, 1 << 20, place)
                } else {
                    Function::new(start, size, place)
                }
            })
            .collect();
        Index::new(functions, names(&contents))
    }

    #[test]
    fn finds_what_holds_the_address() {
        let index = index(&[(0x100, 0x10, "first"), (0x200, 0x100, "outer"), (0x240, 0x10, "inner")]);
        let name = |address| index.name(address);
        assert_eq!(name(0xff), None);
        assert_eq!(name(0x100).as_deref(), Some("first"));
        assert_eq!(name(0x10f).as_deref(), Some("first"));
        // The gap has no name.
        assert_eq!(name(0x110), None);
        assert_eq!(name(0x248).as_deref(), Some("inner"));
        assert_eq!(name(0x250).as_deref(), Some("outer"));
        assert_eq!(name(0x300), None);
    }

    /// A symbol without a size reaches to the next symbol, but not far, and not where one with a size ended.
    #[test]
    fn symbols_without_a_size_do_not_reach_far() {
        let index = index(&[(0x100, 0, "start"), (0x180, 0x10, "sized"), (0x180, 0, "label"), (0x4000, 0, "last")]);
        let name = |address| index.name(address);
        assert_eq!(name(0x17f).as_deref(), Some("start"));
        assert_eq!(name(0x18f).as_deref(), Some("sized"));
        assert_eq!(name(0x190), None);
        assert_eq!(name(0x4000 + REACH - 1).as_deref(), Some("last"));
        assert_eq!(name(0x4000 + REACH), None);
    }

    #[test]
    fn prefers_the_names_that_people_use() {
        let index = index(&[(0x100, 8, "__libc_write"), (0x100, 8, "write"), (0x100, 8, "__write@@GLIBC_2.2")]);
        assert_eq!(index.name(0x104).as_deref(), Some("write"));
    }

    /// `_init` is the only symbol before the procedure linkage table, which is another section.
    #[test]
    fn symbols_without_a_size_end_with_their_section() {
        let index = Index::new(vec![Function::without_size(0x1000, 0x17, 0)], names(b"_init\0"));
        assert_eq!((index.name(0x1016).as_deref(), index.name(0x1017)), (Some("_init"), None));
    }

    /// Names that do not end, or are not there.
    #[test]
    fn survives_lying_names() {
        let functions = vec![Function::new(0, 8, 0), Function::new(8, 8, u32::MAX)];
        let index = Index::new(functions, names(&[b'x'; 100]));
        assert_eq!((index.name(0), index.name(8)), (None, None));
    }
}

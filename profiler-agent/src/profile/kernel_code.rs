//! Code that the kernel makes at run time.

/// Code that came, or went: a BPF program, a trampoline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelCode {
    /// First address.
    pub start: u64,
    /// First address past the end.
    pub end: u64,
    /// Its name; `None` when it went.
    pub name: Option<Box<str>>,
}

/// Most pieces of code that are remembered of what came and went.
const MAX_CODE: usize = 4096;

/// Code that came and went, in that order.
#[derive(Debug, Default)]
pub struct KernelChanges {
    /// What is known of it.
    pub code: Vec<KernelCode>,
    /// Whether there was more.
    pub is_incomplete: bool,
}

impl KernelChanges {
    /// Adds what came or went last.
    pub fn add(&mut self, code: KernelCode) {
        if self.code.len() >= MAX_CODE {
            self.code.clear();
            self.is_incomplete = true;
        }
        self.code.push(code);
    }
}

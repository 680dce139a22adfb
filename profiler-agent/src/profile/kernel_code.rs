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

//! What a process says about the code that it makes at run time.

use std::{
    fs::File,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use profiler_common::abi::process::ProcessKey;

/// Most files of one process. One has a perf map, and a jitdump for each of its runtimes.
const MAX_FILES: usize = 4;

/// The form of a file that names code made at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuntimeFileKind {
    /// Lines of address, size and name.
    PerfMap,
    /// Records of code that was made and moved.
    Jitdump,
}

/// A file in which a process names the code that it makes. It is open, so that it can be read when the process is gone,
/// and may grow, be cut or be rewritten at any time.
#[derive(Debug)]
pub struct RuntimeFile {
    /// Unique while the agent runs.
    pub id: u64,
    /// Its form.
    pub kind: RuntimeFileKind,
    /// The file itself. It also keeps its inode number from being reused.
    pub file: File,
    /// Its device and inode number.
    pub identity: (u64, u64),
    /// Held as long as the file is open, to count open ones.
    _permit: Arc<()>,
}

impl RuntimeFile {
    /// A file that was opened; `permit` is dropped with it.
    pub fn new(kind: RuntimeFileKind, file: File, identity: (u64, u64), permit: Arc<()>) -> Self {
        Self { id: next_id(), kind, file, identity, _permit: permit }
    }
}

/// The code that one process makes at run time.
#[derive(Debug)]
pub struct RuntimeCode {
    /// Unique while the agent runs.
    pub id: u64,
    /// The process.
    pub process: ProcessKey,
    files: Mutex<Vec<Arc<RuntimeFile>>>,
    version: AtomicU64,
}

impl RuntimeCode {
    /// Code of a process that has said nothing about it so far.
    pub fn new(process: ProcessKey) -> Self {
        Self { id: next_id(), process, files: Mutex::default(), version: AtomicU64::new(0) }
    }

    /// The code of a forked child: what its parent said of it holds for the child too.
    pub fn of_child(&self, child: ProcessKey) -> Self {
        Self { files: Mutex::new(self.files()), ..Self::new(child) }
    }

    /// The files that name it.
    pub fn files(&self) -> Vec<Arc<RuntimeFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a file. There is one perf map: a new one takes the place of the last.
    pub fn add(&self, file: RuntimeFile) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if file.kind == RuntimeFileKind::PerfMap {
            files.retain(|held| held.kind != RuntimeFileKind::PerfMap);
        } else if files.len() + 1 >= MAX_FILES {
            return;
        }
        files.push(Arc::new(file));
    }

    /// Tells apart what its files say at one time and at another: a frame that was named under one version may have
    /// another name under the next.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    /// Notes what [`Self::version`] says from now on.
    pub fn set_version(&self, version: u64) {
        self.version.store(version, Ordering::Relaxed);
    }
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn file(kind: RuntimeFileKind) -> RuntimeFile {
        let file = File::from(memfd_create(c"names", MFdFlags::MFD_CLOEXEC).expect("a file"));
        RuntimeFile::new(kind, file, (0, 0), Arc::default())
    }

    /// A process has one perf map, the last one, and a few jitdumps; a child has what its parent had.
    #[test]
    fn keeps_few_files() {
        let code = RuntimeCode::new(ProcessKey::default());
        for _ in 0..10 {
            code.add(file(RuntimeFileKind::PerfMap));
            code.add(file(RuntimeFileKind::Jitdump));
        }
        let count = |code: &RuntimeCode, kind| code.files().iter().filter(|file| file.kind == kind).count();
        assert_eq!(count(&code, RuntimeFileKind::PerfMap), 1);
        assert_eq!(count(&code, RuntimeFileKind::Jitdump), MAX_FILES - 2);
        let child = code.of_child(ProcessKey { tgid: 1, ..ProcessKey::default() });
        assert!(child.id != code.id && child.files().len() == code.files().len());
    }
}

//! Finds a Rust toolchain that can build the kernel programs.
//!
//! Shared by profiler-agent's build script and `cargo xtask` (both include this file), so it uses only std.
//! Two kinds of toolchain work, and are tried in this order:
//! 1. rustup's nightly with the `rust-src` component, which builds `core` itself (`-Z build-std`);
//! 2. a distribution's rustc that ships a precompiled `core` for BPF (Debian and Ubuntu:
//!    `libstd-rust-dev-bpf` or `libstd-rust-web-dev-bpf`).
//!
//! Both need bpf-linker, built against the LLVM major version of the rustc that is used.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The programs' target.
pub const TARGET: &str = "bpfel-unknown-none";

/// Where `core` for BPF comes from.
#[derive(Clone, Debug)]
pub enum Compiler {
    /// rustup's nightly, with `-Z build-std=core`.
    NightlyBuildStd,
    /// A rustc whose sysroot has a precompiled `core` for BPF.
    PrecompiledCore {
        /// The compiler.
        rustc: PathBuf,
    },
}

/// Everything needed to build the kernel programs.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// The compiler and its `core`.
    pub compiler: Compiler,
    /// bpf-linker's executable.
    pub linker: PathBuf,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.compiler {
            Compiler::NightlyBuildStd => write!(f, "rustup nightly with rust-src")?,
            Compiler::PrecompiledCore { rustc } => write!(f, "{} with precompiled core", rustc.display())?,
        }
        write!(f, ", {}", self.linker.display())
    }
}

/// What is missing, as a sentence for people.
#[derive(Debug)]
pub struct Missing(pub String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Toolchain {
    /// Looks for a complete toolchain on this machine. `workspace` is the folder of the workspace.
    pub fn find(workspace: &Path) -> Result<Self, Missing> {
        let compiler = find_compiler().ok_or_else(|| {
            Missing(
                "no Rust compiler that can build for BPF: run `cargo xtask setup`, or install \
                 rustup's nightly with rust-src, or Debian's rustc-web and libstd-rust-web-dev-bpf"
                    .into(),
            )
        })?;
        let linker = find_linker(workspace).ok_or_else(|| {
            Missing("bpf-linker is missing: run `cargo xtask setup`, or `cargo install bpf-linker`".into())
        })?;
        Ok(Self { compiler, linker })
    }
}

/// The best compiler on this machine that has `core` for BPF.
pub fn find_compiler() -> Option<Compiler> {
    if let Some(sysroot) = sysroot(Command::new("rustup").args(["run", "nightly", "rustc"]))
        && sysroot.join("lib/rustlib/src/rust/library/core").is_dir()
    {
        return Some(Compiler::NightlyBuildStd);
    }
    let distribution = PathBuf::from("/usr/bin/rustc");
    let sysroot = sysroot(&mut Command::new(&distribution))?;
    let library = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    let has_core =
        fs::read_dir(library).ok()?.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore"));
    has_core.then_some(Compiler::PrecompiledCore { rustc: distribution })
}

fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !path.trim().is_empty()).then(|| PathBuf::from(path.trim()))
}

/// bpf-linker, where it is installed.
pub fn find_linker(workspace: &Path) -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = [Some(workspace.join("target/tools/bin")), cargo_home.map(|home| home.join("bin"))];
    folders
        .into_iter()
        .flatten()
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
}

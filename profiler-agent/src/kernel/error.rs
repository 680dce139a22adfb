//! What may go wrong in the kernel.

use std::io;

use aya::{maps::MapError, programs::ProgramError};
use thiserror::Error;
use tracing::debug;

use super::BtfError;

/// Why the kernel side could not be set up or read.
#[derive(Debug, Error)]
pub enum KernelError {
    /// No usable type information.
    #[error(transparent)]
    Btf(BtfError),
    /// The kernel's structs are not shaped as expected.
    #[error("this kernel's {structure} has no member {member}; Linux 5.10 or later is needed")]
    MissingMember {
        /// The struct.
        structure: &'static str,
        /// The member.
        member: &'static str,
    },
    /// A program was refused.
    #[error("the kernel refused the program {program}: {}", first_line(.error))]
    Program {
        /// Its name in the object.
        program: &'static str,
        /// What aya or the kernel said.
        error: ProgramError,
    },
    /// The object could not be loaded.
    #[error("the kernel programs could not be loaded: {}", first_line(.0))]
    Load(#[from] aya::EbpfError),
    /// A map operation failed.
    #[error("a BPF map operation failed: {0}")]
    Map(#[from] MapError),
    /// The object lacks a program or map: a bug in the build.
    #[error("the embedded kernel programs have no {0}")]
    MissingPart(&'static str),
    /// A system call failed.
    #[error("{what} failed: {error}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The sampling event could not be opened.
    #[error("sampling events cannot be opened on CPU {cpu}: {error}; see `profiler-agent check`")]
    Clock {
        /// The CPU.
        cpu: u32,
        /// What the system said.
        error: ProgramError,
    },
}

/// A verifier log follows an error's first line; people get the line, the debug log the rest.
fn first_line(error: &(impl std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    debug!("{text}");
    let line = text.lines().next().unwrap_or_default();
    line.split(" Verifier output:").next().unwrap_or(line).trim_end_matches('.').to_owned()
}

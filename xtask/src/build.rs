//! `cargo xtask build`: the release binaries.

use std::path::Path;

use crate::{
    Outcome,
    process::{cargo, run},
    setup,
};

pub(crate) fn main(workspace: &Path) -> Outcome {
    setup::for_build(workspace)?;
    run(cargo(workspace).args(["build", "--release", "--package", "profiler-agent"]))?;
    eprintln!("xtask: built target/release/profiler-agent");
    Ok(())
}

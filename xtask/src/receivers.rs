//! The receivers of other people's making that tests export to, built from `tests/receivers`.

use std::path::Path;

use crate::{Outcome, go::Module, process::find};

/// Programs that tests use where somebody has installed them, and what is not tested where nobody has.
const FOUND: &[(&str, &str)] = &[
    ("profcheck", "nothing but our own rules says whether requests are valid"),
    ("pyroscope", "no profile is stored in it and queried"),
];

/// Builds what is missing or older than its sources, and says what is not there.
pub(crate) fn build(workspace: &Path) -> Outcome {
    let collector = Module {
        sources: workspace.join("tests/receivers/collector"),
        folder: workspace.join("target/receivers"),
        packages: &["collector"],
        variables: |_| String::new(),
    };
    collector.build("nothing is sent to a Collector")?;
    for (name, consequence) in FOUND.iter().filter(|(name, _)| find(name).is_none()) {
        eprintln!("xtask: SKIPPED: there is no program `{name}` on this machine: {consequence}");
    }
    Ok(())
}

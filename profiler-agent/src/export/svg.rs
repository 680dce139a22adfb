//! A flame graph as a self-contained SVG file.

use anyhow::Context as _;
use inferno::flamegraph::{self, Options};
use profiler_common::abi::sample::EventKind;

use super::folded;
use crate::profile::Profile;

/// Draws a profile.
pub fn encode(profile: &Profile) -> anyhow::Result<Vec<u8>> {
    let lines: Vec<String> =
        folded::lines(profile).into_iter().map(|(stack, count)| format!("{stack} {count}")).collect();
    if lines.is_empty() {
        return Ok(EMPTY.as_bytes().to_vec());
    }
    let mut options = Options::default();
    options.title = match profile.kind {
        EventKind::OnCpu => "CPU flame graph".to_owned(),
    };
    options.subtitle = Some(format!(
        "{} samples in {:.1} s, {:.3} ms of CPU time each",
        profile.total(),
        profile.duration.as_secs_f64(),
        profile.period.as_secs_f64() * 1e3,
    ));
    options.count_name = "samples".to_owned();
    options.no_sort = true;
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut svg)
        .context("the flame graph could not be drawn")?;
    Ok(svg)
}

/// A recording without samples is a fact to show, not an error.
const EMPTY: &str = "<?xml version=\"1.0\" standalone=\"no\"?>\n\
    <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"600\" height=\"60\">\
    <text x=\"20\" y=\"35\" font-family=\"monospace\">No samples were taken.</text></svg>\n";

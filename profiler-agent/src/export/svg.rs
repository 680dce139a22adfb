//! A flame graph as a self-contained SVG file.

use anyhow::Context as _;
use inferno::flamegraph::{self, Options, Palette, color::MultiPalette};

use super::folded;
use crate::profile::{Events, Profile};

/// Draws a profile.
pub fn encode(profile: &Profile) -> anyhow::Result<Vec<u8>> {
    let lines: Vec<String> =
        folded::lines(profile).into_iter().map(|(stack, count)| format!("{} {count}", annotate(&stack))).collect();
    if lines.is_empty() {
        return Ok(EMPTY.as_bytes().to_vec());
    }
    let mut options = Options::default();
    let title = match profile.events {
        Events::OnCpu => "CPU flame graph",
        Events::OffCpu => "Off-CPU flame graph",
        Events::Both => "CPU and off-CPU flame graph",
    };
    options.title = title.to_owned();
    let total = profile.total();
    let on_cpu = format!("{} samples, {:.3} ms of CPU time each", total.samples, profile.period.as_secs_f64() * 1e3);
    let off_cpu = format!("{:.3} s off the CPU", total.off_cpu().as_secs_f64());
    let seconds = profile.duration.as_secs_f64();
    options.subtitle = Some(match profile.events {
        Events::OnCpu => format!("{on_cpu}, in {seconds:.1} s"),
        Events::OffCpu => format!("{off_cpu}, in {seconds:.1} s"),
        Events::Both => format!("{on_cpu}; {off_cpu}; in {seconds:.1} s"),
    });
    options.count_name = if profile.events == Events::OnCpu { "samples" } else { "µs" }.to_owned();
    options.colors = Palette::Multi(MultiPalette::Java);
    options.no_sort = true;
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut svg)
        .context("the flame graph could not be drawn")?;
    Ok(svg)
}

/// inferno takes a frame's annotation for its colour and does not show it; kernel frames get a second one, so
/// that people see it too.
fn annotate(stack: &str) -> String {
    let stack = stack.replace(KERNEL, &format!("{KERNEL}{KERNEL}"));
    match stack.rsplit_once(' ') {
        // Two numbers at the end of a line would be read as the two columns of a difference.
        Some((rest, last)) if last.parse::<f64>().is_ok() => format!("{rest}_{last}"),
        _ => stack,
    }
}

/// Annotation of kernel frames.
const KERNEL: &str = "_[k]";

/// A recording without samples is a fact to show, not an error.
const EMPTY: &str = "<?xml version=\"1.0\" standalone=\"no\"?>\n\
    <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"600\" height=\"60\">\
    <text x=\"20\" y=\"35\" font-family=\"monospace\">No samples were taken.</text></svg>\n";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing;

    /// The drawing shows processes, functions, kernel frames as such, and what is missing.
    #[test]
    fn shows_every_kind_of_frame() {
        let svg = String::from_utf8(encode(&testing::profile()).expect("a drawing")).expect("text");
        for text in ["burner", "main", "sys_read_[k] (", "[incomplete: depth limit]", "10 samples"] {
            assert!(svg.contains(text), "{text} is not shown");
        }
    }

    /// Nothing recorded is shown as such.
    #[test]
    fn draws_an_empty_profile() {
        let empty = Profile { samples: Vec::new(), ..testing::profile() };
        let svg = String::from_utf8(encode(&empty).expect("a drawing")).expect("text");
        assert!(svg.contains("No samples") && svg.trim_end().ends_with("</svg>"));
    }
}

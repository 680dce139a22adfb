//! What profiling costs, and what is done to keep it within its budget.

use super::Page;
use crate::status::Stats;

pub(super) fn render(page: &mut Page, stats: &Stats) {
    let (now, spent) = stats.control.get();
    let seconds = |value: f64| format!("{value:.6}");
    page.labelled(
        "overhead_cpu_seconds",
        "CPU time that profiling took: the agent, beside that its reading of symbols and building of unwind tables, and the kernel programs by what they did.",
        [
            ("agent", spent.agent),
            ("files", spent.files),
            ("samples", spent.samples),
            ("switches", spent.switches),
            ("wait_stacks", spent.wait_stacks),
            ("notices", spent.notices),
        ]
        .map(|(part, value)| (format!("part=\"{part}\""), seconds(value))),
    );
    page.gauge("overhead_cpu_ratio", "What profiling cost lately, CPU seconds per second.", seconds(now.cost));
    page.gauge("budget_cpu_ratio", "What it may cost, CPU seconds per second.", seconds(now.budget));
    page.gauge("memory_bytes", "Memory of the agent, without pages of files.", now.memory);
    page.gauge("budget_memory_bytes", "Memory that the agent may use.", now.memory_budget);
    if let Some(effort) = now.effort {
        page.gauge("sampling_frequency", "Samples per second and CPU that the budget allows.", effort.frequency);
        page.gauge(
            "wait_stacks_per_second",
            "Stacks of waits per second and CPU that the budget allows; 0: all.",
            effort.wait_stacks,
        );
        page.gauge(
            "waits_followed_ratio",
            "Share of waits that are followed, of those that come too often; 0: no waits are.",
            effort.wait_share.map_or(0.0, |share| 1.0 / f64::from(1_u32 << share.min(31))),
        );
        page.gauge("names_budget_bytes", "Memory for names that the budget allows.", effort.names_bytes);
    }
    page.gauge("stopped", "1: somebody has stopped collection.", u8::from(stats.is_stopped()));
    captures(page, stats);
    page.counter(
        "config_reloads",
        "Times that the configuration was read again while the agent ran, and holds.",
        stats.config_loaded.get(),
    );
    page.counter(
        "config_reloads_refused",
        "Times that the configuration was read again and not taken over, because something in it is wrong.",
        stats.config_refused.get(),
    );
}

/// Captures, by what became of them and of what was asked for.
fn captures(page: &mut Page, stats: &Stats) {
    let (admitted, refused) = stats.captures.decided();
    page.counter("captures", "Captures that were begun.", admitted);
    page.gauge("captures_running", "Captures that are under way.", stats.capturing());
    page.labelled(
        "captures_refused",
        "Captures that were asked for, by a rule or by hand, and not made, by reason.",
        refused.map(|(reason, count)| (format!("reason=\"{}\"", reason.label()), count.to_string())),
    );
    page.labelled(
        "captures_ended",
        "Captures that are over, by what ended them.",
        stats.captures.ended().map(|(ended, count)| (format!("reason=\"{}\"", ended.label()), count.to_string())),
    );
    let watched = stats.captures.watched();
    page.gauge("containers_watched", "Containers whose use is watched by rules for captures.", watched.containers);
    page.counter(
        "containers_unwatched",
        "Times a container was not watched, because there were too many.",
        watched.unwatched,
    );
}

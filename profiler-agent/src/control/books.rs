//! The last lines: what became of everything that was seen.

use std::time::Duration;

use profiler_common::abi::counter::Counter;

use crate::{profile::Events, status::Stats};

/// How the books balance, for each destination: what was seen, what that stands for besides, and what earlier runs left, is
/// exported, lost, dropped or still in the spool.
pub(super) fn books(stats: &Stats, events: Events) -> Vec<String> {
    let destinations = stats.destinations();
    let mut lines = Vec::new();
    for destination in &destinations {
        let name = if destinations.len() == 1 { String::new() } else { format!("{}: ", destination.name) };
        let exported = destination.exported.get();
        let mut dropped = stats.dropped_in_all();
        dropped += destination.dropped_in_all();
        let (recovered, [_, spool]) = (destination.recovered.get(), destination.waiting());
        // (Captures may record something else.)
        if events.includes_on_cpu() || stats.kernel(Counter::Seen) > 0 {
            let mut line = format!(
                "stopped: {name}seen {}, exported {}, lost in kernel {}, dropped {}",
                stats.kernel(Counter::Seen),
                exported.samples,
                stats.lost_in_kernel(),
                dropped.samples,
            );
            let extrapolated = stats.samples_extrapolated.get();
            if extrapolated > 0 {
                line += &format!(", extrapolated {extrapolated}");
            }
            if recovered.samples > 0 || spool.tally.samples > 0 {
                line +=
                    &format!(", left in the spool {}; from earlier runs {}", spool.tally.samples, recovered.samples);
            }
            lines.push(line);
        }
        if events.includes_off_cpu() || exported.off_cpu_ns > 0 {
            let seconds = |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64();
            let mut line = format!(
                "off the CPU: {name}exported {:.3} s, lost in kernel {:.3} s, dropped {:.3} s",
                seconds(exported.off_cpu_ns),
                seconds(stats.kernel(Counter::WaitsLostNs)),
                seconds(dropped.off_cpu_ns),
            );
            if recovered.off_cpu_ns > 0 || spool.tally.off_cpu_ns > 0 {
                line += &format!(
                    ", left in the spool {:.3} s; from earlier runs {:.3} s",
                    seconds(spool.tally.off_cpu_ns),
                    seconds(recovered.off_cpu_ns)
                );
            }
            lines.push(line);
        }
    }
    lines
}

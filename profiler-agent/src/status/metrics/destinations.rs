//! What became of what each destination was to get.

use std::sync::Arc;

use super::{Page, seconds};
use crate::export::delivery::{DestinationStats, LATENCY_BUCKETS, Waiting};

/// Renders the metrics of every destination.
pub(super) fn render(page: &mut Page, destinations: &[Arc<DestinationStats>]) {
    let mut counter = |name, help, value: fn(&DestinationStats) -> String| {
        page.labelled(name, help, destinations.iter().map(|stats| (label(stats), value(stats))));
    };
    counter("samples_exported", "Samples that destinations accepted.", |stats| {
        stats.exported.get().samples.to_string()
    });
    counter("off_cpu_exported_seconds", "Time off the CPU that destinations accepted.", |stats| {
        seconds(stats.exported.get().off_cpu_ns)
    });
    counter("export_requests", "Requests that were accepted; of files, files.", |stats| {
        stats.requests.get().to_string()
    });
    counter("export_bytes", "Bytes of requests that were accepted, before compression; of files, on disk.", |stats| {
        stats.bytes.get().to_string()
    });
    counter(
        "export_wire_bytes",
        "Bytes of requests that were accepted, as they were sent; of files, on disk.",
        |stats| stats.wire_bytes.get().to_string(),
    );
    counter("export_retries", "Requests that were sent again.", |stats| stats.retries.get().to_string());
    counter(
        "profiles_rejected",
        "Profiles that a receiver rejected while it accepted the rest of a request.",
        |stats| stats.profiles_rejected.get().to_string(),
    );
    counter("export_samples_spooled", "Samples that were written to the spool.", |stats| {
        stats.spooled.get().samples.to_string()
    });
    counter("export_samples_recovered", "Samples that an earlier run had left in the spool.", |stats| {
        stats.recovered.get().samples.to_string()
    });
    counter("export_spool_failures", "Times that a request could not be written to the spool.", |stats| {
        stats.spool_failures.get().to_string()
    });
    let failures = destinations.iter().flat_map(|stats| {
        stats
            .failures()
            .map(|(reason, count)| (format!("{},reason=\"{}\"", label(stats), reason.label()), count.to_string()))
    });
    page.labelled("export_failures", "Attempts to send a request that failed, by reason.", failures);
    let dropped = |value: fn(crate::profile::Tally) -> String| {
        destinations.iter().flat_map(move |stats| {
            let with_reason = move |(reason, tally): (crate::export::delivery::DropReason, _)| {
                (format!("{},reason=\"{}\"", label(stats), reason.label()), value(tally))
            };
            stats.dropped().map(with_reason)
        })
    };
    page.labelled(
        "export_samples_dropped",
        "Samples that a destination never gets, by reason.",
        dropped(|tally| tally.samples.to_string()),
    );
    page.labelled(
        "export_off_cpu_dropped_seconds",
        "Time off the CPU that a destination never gets, by reason.",
        dropped(|tally| seconds(tally.off_cpu_ns)),
    );
    let mut waiting = |name, help, value: fn(Waiting) -> u64| {
        let values = destinations.iter().flat_map(|stats| {
            let places = ["memory", "spool"].into_iter().zip(stats.waiting());
            places.map(|(place, waiting)| (format!("{},place=\"{place}\"", label(stats)), value(waiting).to_string()))
        });
        page.family(name, help, "gauge", values);
    };
    waiting("export_queue_requests", "Requests that wait for a destination.", |waiting| waiting.requests);
    waiting("export_queue_bytes", "Bytes of requests that wait for a destination, as they are kept.", |waiting| {
        waiting.bytes
    });
    waiting("export_queue_samples", "Samples that wait for a destination.", |waiting| waiting.tally.samples);
    page.family(
        "export_oldest_seconds",
        "How long ago the window was closed of the oldest request that waits; zero: none does.",
        "gauge",
        destinations.iter().map(|stats| (label(stats), stats.oldest_age().as_secs().to_string())),
    );
    latency(page, destinations);
}

fn latency(page: &mut Page, destinations: &[Arc<DestinationStats>]) {
    const NAME: &str = "export_latency_seconds";
    page.head(NAME, "How long receivers took to accept a request.", "histogram");
    for stats in destinations {
        let (buckets, time) = stats.latency();
        let mut count = 0;
        for (limit, answers) in LATENCY_BUCKETS.iter().zip(buckets) {
            count += answers;
            let limit = if limit.is_finite() { limit.to_string() } else { "+Inf".to_owned() };
            page.value(&format!("{NAME}_bucket"), &format!("{},le=\"{limit}\"", label(stats)), &count.to_string());
        }
        page.value(&format!("{NAME}_sum"), &label(stats), &time.to_string());
        page.value(&format!("{NAME}_count"), &label(stats), &count.to_string());
    }
}

/// The label that tells destinations apart. Their names are the operator's words.
fn label(stats: &DestinationStats) -> String {
    let name = stats.name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("destination=\"{name}\"")
}

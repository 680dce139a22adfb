//! Whose samples were, and how the pods of this node are known.

use super::Page;
use crate::{label::kubernetes::WatchState, status::Stats};

/// Renders the metrics of the labeller, and of the cluster, if there is one.
pub(super) fn render(page: &mut Page, stats: &Stats) {
    page.labelled(
        "samples_labelled",
        "Samples (and waits) by what they were found to belong to.",
        stats.labels.samples().map(|(owner, count)| (format!("owner=\"{}\"", owner.label()), count.to_string())),
    );
    let Some(pods) = stats.pods() else { return };
    let pods = pods.snapshot();
    page.counter(
        "label_windows_waited",
        "Windows that waited for the metadata of new containers.",
        stats.labels.waited.get(),
    );
    page.gauge("kubernetes_synced", "1 while changes of pods arrive.", u8::from(pods.state == WatchState::Synced));
    page.gauge("kubernetes_pods", "Pods known on this node, those that have just gone included.", pods.pods);
    page.gauge("kubernetes_containers", "Containers known on this node, by ID.", pods.containers);
    page.gauge("kubernetes_bytes", "Estimated bytes that pods and containers take.", pods.bytes);
    page.counter("kubernetes_lists", "Lists of pods that the API server was asked for.", pods.lists);
    page.counter("kubernetes_watches", "Watches of pods that were begun.", pods.watches);
    page.counter("kubernetes_errors", "Lists and watches of pods that failed.", pods.errors);
    page.labelled(
        "kubernetes_pods_refused",
        "Times that a pod was not taken note of, by reason.",
        [("budget", pods.pods_refused), ("malformed", pods.pods_malformed)]
            .map(|(reason, count)| (format!("reason=\"{reason}\""), count.to_string())),
    );
}

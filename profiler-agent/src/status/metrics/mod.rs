//! The metrics page, in the Prometheus text format (version 0.0.4).
//!
//! Names of the kernel's counters, their help and their order come from the counter enum itself.

mod control;
mod destinations;
mod labels;

use std::{
    fmt::{Display, Write as _},
    fs,
};

use profiler_common::abi::{counter::Counter, sample::EventKind};

use super::Stats;
use crate::{
    profile::Nameless,
    symbolize::{
        NoSource, SymbolSource,
        debuginfod::{Absence, DebuginfodStats},
    },
};

const PREFIX: &str = "profiler_agent_";

/// Renders every metric.
pub(super) fn render(stats: &Stats) -> String {
    let mut page = Page(String::with_capacity(8 << 10));
    for &counter in Counter::ALL {
        page.counter(counter.metric(), counter.doc(), stats.kernel(counter));
    }
    page.counter(
        "samples_drained",
        "Samples read from the kernel, with those that they stand for.",
        stats.samples_drained.get(),
    );
    page.counter(
        "samples_extrapolated",
        "Samples for which others stand: of replicas whose turn it was not.",
        stats.samples_extrapolated.get(),
    );
    page.counter("rows_drained", "Rows (distinct stacks per drain) read from the kernel.", stats.rows_drained.get());
    page.counter("drains_postponed", "Drains put off because naming was behind.", stats.drains_postponed.get());
    page.counter("windows_closed", "Aggregation windows closed.", stats.windows_closed.get());
    page.counter("rows_exported", "Rows (distinct stacks per window) handed to exporters.", stats.rows_exported.get());
    page.labelled(
        "samples_dropped",
        "Samples lost in the agent on the way to its exporters, by stage and reason.",
        stats.dropped().map(|(stage, reason, tally)| (dropped_labels(stage, reason), tally.samples.to_string())),
    );
    page.labelled(
        "off_cpu_dropped_seconds",
        "Time off the CPU that was lost in the agent on the way to its exporters, by stage and reason.",
        stats.dropped().map(|(stage, reason, tally)| (dropped_labels(stage, reason), seconds(tally.off_cpu_ns))),
    );
    page.counter(
        "rows_encoded",
        "Rows (distinct stacks of functions per window) of OTLP requests.",
        stats.rows_encoded.get(),
    );
    control::render(&mut page, stats);
    labels::render(&mut page, stats);
    destinations::render(&mut page, &stats.destinations());
    page.labelled(
        "stack_ends",
        "Samples by why their user stack ends.",
        stats.ends().map(|(end, value)| (format!("reason=\"{}\"", end.label()), value.to_string())),
    );
    page.labelled(
        "off_cpu_stack_ends_seconds",
        "Time off the CPU by why the stack of the wait ends, estimated where waits are rationed.",
        stats.wait_ends().map(|(end, value)| (format!("reason=\"{}\"", end.label()), seconds(value))),
    );
    let (waits, totals) = stats.waits();
    page.counter("waits_ended", "Waits (times a thread was off the CPU) that ended.", totals.ended);
    page.labelled(
        "off_cpu_seconds",
        "Time that threads were off the CPU, whether their stacks were sampled or not.",
        [EventKind::Blocked, EventKind::Uninterruptible, EventKind::RunQueue]
            .map(|kind| (format!("state=\"{}\"", kind.label()), seconds(totals.waited_ns[kind as usize]))),
    );
    page.gauge("wait_stacks", "Stacks kept for waits that are under way.", waits.stacks);
    page.gauge("wait_stack_bytes", "Estimated bytes of stacks kept for waits.", waits.bytes);
    page.counter("wait_stacks_evicted", "Stacks of waits that were dropped for their budget.", waits.evicted);
    page.counter("waits_forgotten", "Waits whose stack was dropped or lost before they ended.", waits.forgotten);

    let symbolize = stats.symbolize();
    page.counter("frames_named", "Distinct frames named.", symbolize.frames_named);
    page.labelled(
        "frames_named_by_source",
        "Distinct frames of user code, by where their name was found.",
        SymbolSource::ALL
            .map(|source| (format!("source=\"{}\"", source.label()), symbolize.by_source[source as usize].to_string())),
    );
    page.counter("frames_unnamed", "Distinct frames for which no name was found.", symbolize.frames_unnamed);
    page.labelled(
        "frames_unnamed_by_reason",
        "Distinct frames of user code for which no name was found, by reason.",
        Nameless::ALL
            .map(|reason| (format!("reason=\"{}\"", reason.label()), symbolize.by_reason[reason as usize].to_string())),
    );
    page.gauge("symbol_bytes", "Bytes that symbols of files take.", symbolize.symbol_bytes);
    page.counter("symbols_read", "Times the symbols of a file were read.", symbolize.symbols_read);
    page.counter("symbols_shared", "Files that were equal to one that had been read.", symbolize.symbols_shared);
    page.counter("symbols_overdue", "Files whose symbols took too long to read.", symbolize.symbols_overdue);
    page.gauge("symbols_pending", "Files whose symbols are being read.", symbolize.symbols_pending);
    page.counter(
        "symbols_read_again",
        "Times the symbols of a file were read that had been dropped to keep the budget.",
        symbolize.symbols_read_again,
    );
    page.sample("naming_seconds_total", "Time spent on naming frames.", "counter", symbolize.time.as_secs_f64());
    page.counter("symbols_evicted", "Files whose symbols were dropped to keep the budget.", symbolize.symbols_evicted);
    debuginfod(&mut page, &symbolize.debuginfod);
    page.gauge("runtime_code_bytes", "Bytes that names of code made at run time take.", symbolize.runtime_code.bytes);
    page.counter(
        "runtime_code_restarted",
        "Perf maps and jitdumps that were written anew, and read again.",
        symbolize.runtime_code.restarted,
    );
    page.counter(
        "runtime_code_evicted",
        "Perf maps and jitdumps of which what was read was dropped to keep the budget.",
        symbolize.runtime_code.evicted,
    );
    page.counter(
        "runtime_code_refused",
        "Pieces of code made at run time whose names were not kept because there were too many.",
        symbolize.runtime_code.refused,
    );
    let source = symbolize.source;
    page.gauge("debug_info_bytes", "Estimated bytes that debug information of files takes.", source.bytes);
    page.counter("debug_info_read", "Times the debug information of a file was looked for.", source.read);
    page.counter("debug_info_evicted", "Files whose debug information was dropped to keep the budget.", source.evicted);
    page.labelled(
        "debug_info_missing",
        "Files whose debug information says nothing, by reason.",
        NoSource::ALL
            .map(|reason| (format!("reason=\"{}\"", reason.label()), source.by_reason[reason as usize].to_string())),
    );
    page.counter("frame_cache_evictions", "Times half of the frame cache was dropped.", symbolize.cache_evictions);
    page.gauge("frame_cache_bytes", "Estimated bytes of named frames kept.", symbolize.cache_bytes);

    let table = stats.table();
    page.counter("process_notices", "Process notices received from the kernel.", table.notices);
    page.counter("process_notices_malformed", "Process notices that did not decode.", table.notices_malformed);
    page.counter("process_scans", "Times a process's mappings were read.", table.scans);
    page.counter("process_scans_failed", "Times a process was gone before its mappings were read.", table.scans_failed);
    page.counter(
        "rows_unknown_process",
        "Rows of processes that could not be remembered.",
        table.samples_unknown_process,
    );
    let (tables, mappings_refused) = stats.unwind_tables();
    page.gauge("unwind_tables", "Unwind tables in the kernel's maps.", tables.store.tables);
    page.gauge("unwind_table_rows", "Rows of unwind tables in the kernel's maps.", tables.store.rows);
    page.gauge("unwind_table_bytes", "Kernel memory that rows of unwind tables take.", tables.store.bytes);
    page.gauge("unwind_rules", "Different unwind rules in the kernel's map.", tables.rules);
    page.counter("unwind_tables_built", "Unwind tables built.", tables.built);
    page.counter("unwind_table_rows_built", "Rows of unwind tables built.", tables.rows_built);
    page.counter("unwind_tables_shared", "Unwind tables that an equal file had already.", tables.shared);
    page.counter("unwind_tables_empty", "Executables that say nothing about their frames.", tables.empty);
    page.counter("unwind_tables_evicted", "Unwind tables that made room for others.", tables.store.evicted);
    page.counter("unwind_tables_over_budget", "Unwind tables that found no room.", tables.store.over_budget);
    page.sample(
        "unwind_table_build_seconds_total",
        "CPU time spent on unwind tables: reading files, building them, writing them to the kernel's maps.",
        "counter",
        tables.build_time.as_secs_f64(),
    );
    page.counter("mappings_announced", "New mappings of known processes.", table.mappings_announced);
    page.counter("mappings_lost", "Announcements of new mappings that found their ring full.", stats.mappings_lost());
    page.counter("mappings_refused", "Times a process's mappings found no room in the kernel's map.", mappings_refused);
    page.gauge("processes", "Program images remembered.", table.processes);
    page.gauge("executables", "Executable files known.", table.executables);
    page.gauge("runtime_files", "Perf maps and jitdumps that are open.", table.runtime_files);
    page.counter(
        "runtime_files_refused",
        "Times that too many perf maps and jitdumps were open to look for another.",
        table.runtime_files_refused,
    );
    let scope = stats.scope();
    page.gauge("scope_cgroups", "Cgroups that rules of the scope are about.", scope.cgroups);
    page.gauge("scope_processes", "Processes that rules of the scope are about.", scope.processes);
    page.counter("scope_refused", "Times that one of them found no room in the kernel's maps.", scope.refused);
    let cgroups = stats.cgroups();
    page.gauge("cgroups", "Cgroups remembered.", cgroups.known);
    page.gauge("containers", "Containers that they are of.", cgroups.containers);
    page.counter(
        "cgroups_evicted",
        "Cgroups forgotten while they were there, because there were too many.",
        cgroups.evicted,
    );
    page.counter("cgroup_scans", "Times that all cgroups were read.", cgroups.scans);
    page.counter(
        "cgroup_notices_malformed",
        "Notices of new and removed cgroups that could not be understood.",
        cgroups.notices_malformed,
    );
    page.counter(
        "container_claims_refused",
        "Cgroups made inside of a container that have another container's ID in their path.",
        cgroups.claims_refused,
    );
    page.counter(
        "samples_unknown_cgroup",
        "Rows read from the kernel whose cgroup is not known.",
        cgroups.samples_unknown,
    );

    page.gauge("cpus_sampled", "CPUs the sampling clock runs on.", stats.cpus());
    page.gauge("up", "1 while sampling is under way.", u8::from(stats.is_ready()));
    if let Some(bytes) = resident_bytes() {
        page.gauge("resident_memory_bytes", "Resident memory of the agent.", bytes);
    }
    if let Some(seconds) = cpu_seconds() {
        page.sample("cpu_seconds_total", "CPU time of the agent's threads.", "counter", seconds);
    }
    page.0
}

/// What became of debug files that this machine does not have.
fn debuginfod(page: &mut Page, stats: &DebuginfodStats) {
    page.counter("debuginfod_requests", "Requests that debuginfod servers were sent.", stats.requests);
    page.counter("debuginfod_received_bytes", "Bytes of debug files that servers sent.", stats.bytes);
    page.counter("debuginfod_files_fetched", "Debug files that servers sent and that were kept.", stats.fetched);
    page.labelled(
        "debuginfod_failures",
        "Requests that gave no debug file, by reason.",
        Absence::ALL
            .map(|reason| (format!("reason=\"{}\"", reason.label()), stats.failures[reason as usize].to_string())),
    );
    page.counter("debuginfod_cache_hits", "Debug files that were on disk when they were wanted.", stats.disk_hits);
    page.counter("debuginfod_cache_misses", "Debug files for which a server had to be asked.", stats.disk_misses);
    page.counter("debuginfod_cache_evictions", "Debug files that made room for others on disk.", stats.evicted);
    page.gauge("debuginfod_cache_bytes", "Bytes of debug files that were fetched, on disk.", stats.cache_bytes);
    page.gauge("debuginfod_pending", "Debug files that servers are asked for, or will be.", stats.pending);
}

fn dropped_labels(stage: &str, reason: &str) -> String {
    format!("stage=\"{stage}\",reason=\"{reason}\"")
}

fn seconds(nanoseconds: u64) -> String {
    (nanoseconds as f64 / 1e9).to_string()
}

struct Page(String);

impl Page {
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.sample(&format!("{name}_total"), help, "counter", value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.sample(name, help, "gauge", value);
    }

    fn sample(&mut self, name: &str, help: &str, kind: &str, value: impl Display) {
        self.head(name, help, kind);
        // SANITY: writing to a string cannot fail.
        let _ = writeln!(self.0, "{PREFIX}{name} {value}");
    }

    fn labelled(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (String, String)>) {
        self.family(&format!("{name}_total"), help, "counter", values);
    }

    fn family(&mut self, name: &str, help: &str, kind: &str, values: impl IntoIterator<Item = (String, String)>) {
        self.head(name, help, kind);
        for (labels, value) in values {
            self.value(name, &labels, &value);
        }
    }

    fn value(&mut self, name: &str, labels: &str, value: &str) {
        // SANITY: writing to a string cannot fail.
        let _ = writeln!(self.0, "{PREFIX}{name}{{{labels}}} {value}");
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        // SANITY: writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {kind}");
    }
}

/// Resident memory, from the second field of `/proc/self/statm` (pages).
fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}

/// User and system time of all threads.
fn cpu_seconds() -> Option<f64> {
    use nix::sys::resource::{UsageWho, getrusage};
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Some(seconds(usage.user_time()) + seconds(usage.system_time()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::delivery::DestinationStats;

    /// Every line is a comment or `name{labels} number`, and every metric has help and type.
    #[test]
    fn renders_valid_text() {
        let stats = Stats::default();
        let destination = DestinationStats::new("a \"quoted\" name".to_owned());
        destination.answered_within(std::time::Duration::from_millis(50));
        stats.set_destinations(vec![destination.into()]);
        let page = render(&stats);
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').expect("a value");
            assert!(name.starts_with(PREFIX) && value.parse::<f64>().is_ok(), "{line}");
            let bare = name.split('{').next().unwrap_or(name);
            let bare = ["_bucket", "_sum", "_count"].iter().find_map(|part| bare.strip_suffix(part)).unwrap_or(bare);
            assert!(page.contains(&format!("# TYPE {bare} ")) && page.contains(&format!("# HELP {bare} ")), "{line}");
        }
        assert!(page.contains("profiler_agent_samples_seen_total 0"));
        let labels = r#"destination="a \"quoted\" name""#;
        assert!(page.contains(&format!("profiler_agent_samples_exported_total{{{labels}}} 0")), "{page}");
        assert!(page.contains(&format!("profiler_agent_export_latency_seconds_bucket{{{labels},le=\"0.1\"}} 1")));
        assert!(page.contains(&format!("profiler_agent_export_latency_seconds_bucket{{{labels},le=\"0.025\"}} 0")));
    }
}

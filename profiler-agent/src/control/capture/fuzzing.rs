//! What the fuzz target of cgroups' files calls.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Capture,
    rules::{Rule, Threshold, Watch},
    usage::{Missing, Throttling, Usage, field, parse_pressure, parse_schedstat, parse_threads, parse_throttling},
};

/// Files of a cgroup, each look's after a NUL: whatever they say, a rule that fires says what it has measured.
pub fn cgroup_usage(bytes: &[u8]) {
    const INTERVAL: Duration = Duration::from_secs(5);
    let text = String::from_utf8_lossy(bytes);
    let capture = Capture { duration: INTERVAL, frequency: None, events: None, lines: None, inlines: None };
    let thresholds =
        [Threshold::Cpu(0.5), Threshold::Throttled(0.5), Threshold::MemoryGrowth(1.0), Threshold::RunQueueDelay(0.5)];
    let rules = thresholds
        .map(|threshold| Arc::new(Rule { name: "rule".into(), threshold, lasts: INTERVAL, capture: capture.clone() }));
    let mut watch = Watch::new(rules.to_vec(), INTERVAL);
    let (mut now, container) = (Instant::now(), Arc::from("container"));
    for file in text.split('\0') {
        let is_first = file.contains("throttled_time");
        let throttling = parse_throttling(file, is_first);
        if let Ok(Throttling { periods, throttled, time }) = throttling {
            let (unit, time) =
                if is_first { ("throttled_time", time.as_nanos()) } else { ("throttled_usec", time.as_micros()) };
            let written = format!("nr_periods {periods}\nnr_throttled {throttled}\n{unit} {time}\n");
            assert_eq!(parse_throttling(&written, is_first), throttling);
        }
        let pressure = parse_pressure(file);
        if let Ok(delay) = pressure {
            assert!(file.contains("total=") && delay.as_micros() <= u128::from(u64::MAX));
        }
        assert!(parse_threads(file).all(|thread| thread != 0 && file.contains(&thread.to_string())));
        let usage = Usage {
            cpu: field(file, "usage_usec").map(Duration::from_micros),
            throttling,
            memory: field(file, "inactive_file"),
            run_queue_delay: pressure.or_else(|_| parse_schedstat(file).ok_or(Missing::NotUnderstood)),
        };
        now += INTERVAL;
        if let Some(trigger) = watch.observe(now, &container, usage) {
            assert!(trigger.reason.contains("threshold") && trigger.reason.len() < 512);
        }
    }
    assert_eq!(watch.stats().containers, 1);
}

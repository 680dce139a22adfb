//! What the fuzz target of the configuration file calls.

use super::{Config, Overrides, Request, TABLE_MIB_RANGE, export::WINDOW_RANGE, parse};
use crate::schedule::Schedule;
use crate::scope::MAX_CONFIGURED;

/// The configuration file: what is accepted is within the limits.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(file) = parse(text) else { return };
    let Ok(config) = Config::merge(file, Overrides::default()) else { return };
    assert!(config.frequency > 0);
    assert!(WINDOW_RANGE.contains(&config.export.window));
    assert!(TABLE_MIB_RANGE.contains(&((config.table_bytes >> 20) as u32)));
    assert!(!config.schedule.collect.is_zero() && config.schedule.collect <= config.schedule.every);
    if let Ok(schedule) = Schedule::new(&config.schedule, "node") {
        assert!(schedule.scale() >= 1.0 && schedule.scale().is_finite());
    }
    let rules = &config.capture.rules;
    let longest = config.capture.limits.longest;
    assert!(rules.iter().all(|rule| rule.capture.duration <= longest && rule.capture.frequency != Some(0)));
    let names: std::collections::BTreeSet<_> = rules.iter().map(|rule| &rule.name).collect();
    assert!(rules.len() <= 16 && names.len() == rules.len());
    let names: std::collections::BTreeSet<_> = config.export.destinations.iter().map(|to| &to.name).collect();
    assert!(!names.is_empty() && names.len() == config.export.destinations.len());
    assert!(names.iter().all(|name| !name.contains('/') && !name.starts_with('.')));
    for matcher in config.scope.include.iter().chain(&config.scope.exclude) {
        // There is no cluster.
        assert!(!matcher.is_empty() && !matcher.asks_about_pods());
    }
    assert!(config.scope.include.len() + config.scope.exclude.len() <= MAX_CONFIGURED);
    if let Some(debuginfod) = config.debuginfod {
        assert!(!debuginfod.urls.is_empty());
        assert!(debuginfod.max_file_bytes < debuginfod.cache_bytes);
        assert!(debuginfod.urls.iter().all(|url| !url.to_string().contains('@')));
    }
}

/// A capture that a client asks for: what is accepted is within the limits, and can be said on one line.
pub fn capture_request(bytes: &[u8]) {
    let Ok(request) = serde_json::from_slice::<Request>(bytes) else { return };
    let sent = serde_json::to_vec(&request).unwrap_or_default();
    let [order, again] = [serde_json::from_slice::<Request>(&sent).ok(), Some(request)]
        .map(|request| request.and_then(|request| request.validate(true).ok()));
    assert_eq!(order, again);
    let Some(order) = order else { return };
    assert!(order.capture.duration.as_secs() >= 1 && order.capture.duration.as_secs() <= 300);
    assert!(order.capture.frequency != Some(0) && order.scope.as_ref().is_none_or(|scope| !scope.is_empty()));
    let subject = order.subject();
    assert!(!subject.is_empty() && !subject.contains(char::is_control) && !order.reason.contains(char::is_control));
}

//! What the fuzz target of the configuration file calls.

use super::{Config, Overrides, TABLE_MIB_RANGE, export::WINDOW_RANGE, parse};
use crate::scope::MAX_MATCHERS;

/// The configuration file: what is accepted is within the limits.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(file) = parse(text) else { return };
    let Ok(config) = Config::merge(file, Overrides::default()) else { return };
    assert!(config.frequency > 0);
    assert!(WINDOW_RANGE.contains(&config.export.window));
    assert!(TABLE_MIB_RANGE.contains(&((config.table_bytes >> 20) as u32)));
    let names: std::collections::BTreeSet<_> = config.export.destinations.iter().map(|to| &to.name).collect();
    assert!(!names.is_empty() && names.len() == config.export.destinations.len());
    assert!(names.iter().all(|name| !name.contains('/') && !name.starts_with('.')));
    for matcher in config.scope.include.iter().chain(&config.scope.exclude) {
        // There is no cluster.
        assert!(!matcher.is_empty() && !matcher.asks_about_pods());
    }
    assert!(config.scope.include.len() + config.scope.exclude.len() <= MAX_MATCHERS);
    if let Some(debuginfod) = config.debuginfod {
        assert!(!debuginfod.urls.is_empty());
        assert!(debuginfod.max_file_bytes < debuginfod.cache_bytes);
        assert!(debuginfod.urls.iter().all(|url| !url.to_string().contains('@')));
    }
}

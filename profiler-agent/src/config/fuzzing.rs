//! What the fuzz target of the configuration file calls.

use super::{Config, Overrides, TABLE_MIB_RANGE, WINDOW_RANGE, parse};

/// The configuration file: what is accepted is within the limits.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(file) = parse(text) else { return };
    let Ok(config) = Config::merge(file, Overrides::default()) else { return };
    assert!(config.frequency > 0);
    assert!(WINDOW_RANGE.contains(&config.window));
    assert!(TABLE_MIB_RANGE.contains(&((config.table_bytes >> 20) as u32)));
    if let Some(debuginfod) = config.debuginfod {
        assert!(!debuginfod.urls.is_empty());
        assert!(debuginfod.max_file_bytes < debuginfod.cache_bytes);
        assert!(debuginfod.urls.iter().all(|url| !url.to_string().contains('@')));
    }
}

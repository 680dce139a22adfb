//! What the fuzz target of redaction calls.

use super::{MAX_PLACES, REDACTED, Redaction};
use crate::{fuzzing::Input, pattern::Pattern};

/// A pattern, after a byte that says how long it is, and a text: a path that matches is gone, and no text becomes much longer.
pub fn redact(bytes: &[u8]) {
    let mut input = Input(bytes);
    let len = usize::from(input.byte());
    let Ok(pattern) = std::str::from_utf8(input.piece(len)) else { return };
    let Ok(text) = std::str::from_utf8(input.0) else { return };
    let pattern = Pattern::from(pattern);
    let rules = Redaction { paths: vec![pattern.clone()], processes: Vec::new(), functions: true };
    let redacted = rules.text(text);
    if let Some(redacted) = &redacted {
        assert!(redacted.contains(REDACTED) && redacted.len() <= text.len() + MAX_PLACES * REDACTED.len());
    }
    if text.starts_with('/') && !text.contains(['"', '\n']) && pattern.matches(text) {
        assert_eq!(redacted.as_deref(), Some(REDACTED));
    }
}

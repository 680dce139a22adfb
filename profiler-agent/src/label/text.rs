//! What others wrote, made fit for attributes: short, without control characters.

/// Bytes of an attribute's value.
pub(crate) const MAX_VALUE: usize = 1024;
/// Bytes of an attribute's name: a prefix of ours, and a Kubernetes key (253 bytes, a slash and 63).
pub(crate) const MAX_NAME: usize = 384;

/// An attribute's value.
pub(crate) fn value(text: &str) -> Box<str> {
    clean(text, MAX_VALUE)
}

/// An attribute's name.
pub(crate) fn name(text: &str) -> Box<str> {
    clean(text, MAX_NAME)
}

/// One line of at most `limit` bytes.
pub(crate) fn clean(text: &str, limit: usize) -> Box<str> {
    if text.len() <= limit && !text.contains(char::is_control) {
        return text.into();
    }
    let mut cleaned = String::new();
    for c in text.chars() {
        let c = if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
        if cleaned.len() + c.len_utf8() > limit {
            break;
        }
        cleaned.push(c);
    }
    cleaned.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text is cut between characters, and control characters are replaced.
    #[test]
    fn cleans_text() {
        assert_eq!(&*clean("plain", 5), "plain");
        assert_eq!(&*clean("a\nb\u{1b}c", 100), "a\u{fffd}b\u{fffd}c");
        assert_eq!(&*clean("äöü", 5), "äö");
        assert_eq!(&*clean("\n\n", 4), "\u{fffd}");
    }
}

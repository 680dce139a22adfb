//! What others wrote, made fit for attributes: short, without control characters; and patterns that choose some of it.

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

/// A name in which each `*` stands for any characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Box<str>);

impl Pattern {
    /// Whether it is the pattern of `text`.
    pub fn matches(&self, text: &str) -> bool {
        let mut parts = self.0.split('*');
        // SANITY: a split has at least one part.
        let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        // What comes first is taken: if the rest can be matched at all, it can be after that.
        for part in parts {
            let Some(start) = rest.find(part) else { return false };
            rest = &rest[start + part.len()..];
        }
        rest.ends_with(last)
    }

    /// Whether any of the patterns is that of `text`.
    pub fn any(patterns: &[Self], text: &str) -> bool {
        patterns.iter().any(|pattern| pattern.matches(text))
    }
}

impl From<&str> for Pattern {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
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

    fn check(pattern: &str, matching: &[&str], others: &[&str]) {
        for text in matching {
            assert!(Pattern::from(pattern).matches(text), "{pattern} does not match {text}");
        }
        for text in others {
            assert!(!Pattern::from(pattern).matches(text), "{pattern} matches {text}");
        }
    }

    /// A star is any number of characters; without one, the text is meant.
    #[test]
    fn matches_patterns() {
        check("app", &["app"], &["", "ap", "apps", "my-app"]);
        check("*", &["", "anything"], &[]);
        check("app*", &["app", "apps"], &["my-app"]);
        check("*/name", &["app.kubernetes.io/name", "/name"], &["name", "a/names"]);
        check("a*b*c", &["abc", "a-b-c", "abbcc", "aXbYcbc"], &["ab", "acb", "abcd"]);
        check("ab*ba", &["abba", "ab-ba"], &["aba"]);
    }
}

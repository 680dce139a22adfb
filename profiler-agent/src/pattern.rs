//! Patterns of names, as the configuration has them.

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

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
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

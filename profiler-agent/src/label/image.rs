//! References to images: `registry:5000/team/app:1.2@sha256:…`.
//!
//! The form is <https://github.com/distribution/reference>'s.

/// A reference, taken apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Image<'a> {
    /// Registry and path.
    pub(super) name: &'a str,
    /// What follows the colon.
    pub(super) tag: Option<&'a str>,
    /// What follows the `@`.
    pub(super) digest: Option<&'a str>,
}

impl<'a> Image<'a> {
    /// `None` where it names no image: a bare digest is an image's ID.
    pub(super) fn parse(reference: &'a str) -> Option<Self> {
        let (rest, digest) = match reference.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest).filter(|digest| digest.contains(':'))),
            None => (reference, None),
        };
        // A colon before the last slash is that of the registry's port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag).filter(|tag| !tag.is_empty())),
            _ => (rest, None),
        };
        let is_digest = digest.is_none() && name == "sha256";
        (!name.is_empty() && !is_digest).then_some(Self { name, tag, digest })
    }

    /// The version of what is in it, as OpenTelemetry derives it: `tag@digest`, or one of them.
    pub(super) fn version(&self) -> Option<String> {
        match (self.tag, self.digest) {
            (Some(tag), Some(digest)) => Some(format!("{tag}@{digest}")),
            (one, other) => other.or(one).map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reference: &str, expect: Option<(&str, Option<&str>, Option<&str>)>, version: Option<&str>) {
        let image = Image::parse(reference);
        assert_eq!(image.map(|image| (image.name, image.tag, image.digest)), expect, "{reference}");
        assert_eq!(image.and_then(|image| image.version()).as_deref(), version, "{reference}");
    }

    /// Ports are no tags, digests are none either, and what is not there is not made up.
    #[test]
    fn takes_references_apart() {
        check("nginx", Some(("nginx", None, None)), None);
        check("nginx:1.25", Some(("nginx", Some("1.25"), None)), Some("1.25"));
        check("localhost:5000/app", Some(("localhost:5000/app", None, None)), None);
        check("r.io:443/a/b:v2", Some(("r.io:443/a/b", Some("v2"), None)), Some("v2"));
        check("a/b@sha256:0a", Some(("a/b", None, Some("sha256:0a"))), Some("sha256:0a"));
        check("a/b:v1@sha256:0a", Some(("a/b", Some("v1"), Some("sha256:0a"))), Some("v1@sha256:0a"));
        check("sha256:0a", None, None);
        check("", None, None);
        check(":tag", None, None);
        check("a:@", Some(("a", None, None)), None);
    }
}

//! What the configuration says about attributes: which are added, left out, and called otherwise.

use std::collections::BTreeMap;

use crate::{pattern::Pattern, profile::ResourceValue};

/// The attribute that no sample is without.
const SERVICE: &str = "service.name";
/// What a service is called that nothing names.
pub(super) const UNKNOWN_SERVICE: &str = "unknown_service";

/// Rules that are applied to every sample's attributes, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Attributes that hold where nothing else was found out.
    pub defaults: BTreeMap<String, String>,
    /// Attributes that hold whatever was found out.
    pub extra: BTreeMap<String, String>,
    /// Names that are kept; empty: all.
    pub allow: Vec<Pattern>,
    /// Names that are left out.
    pub deny: Vec<Pattern>,
    /// New names by old ones.
    pub rename: BTreeMap<String, String>,
}

impl Rules {
    /// Applies the rules. Of attributes with the same name the first counts.
    pub(super) fn apply(
        &self,
        found: impl IntoIterator<Item = (String, ResourceValue)>,
    ) -> BTreeMap<String, ResourceValue> {
        let mut attributes = BTreeMap::new();
        for (name, value) in found {
            attributes.entry(name).or_insert(value);
        }
        for (name, value) in &self.defaults {
            attributes.entry(name.clone()).or_insert_with(|| value.as_str().into());
        }
        attributes.extend(self.extra.iter().map(|(name, value)| (name.clone(), value.as_str().into())));
        attributes.retain(|name, _| {
            (self.allow.is_empty() || Pattern::any(&self.allow, name)) && !Pattern::any(&self.deny, name)
        });
        // All are taken before any is put back: two may swap their names.
        let renamed: Vec<_> =
            self.rename.iter().filter_map(|(old, new)| Some((new.clone(), attributes.remove(old)?))).collect();
        attributes.extend(renamed);
        attributes.entry(SERVICE.to_owned()).or_insert_with(|| UNKNOWN_SERVICE.into());
        attributes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn check(rules: &Rules, expect: &[(&str, &str)]) {
        let found = [("service.name", "web"), ("host.name", "n1"), ("k8s.pod.name", "web-1"), ("host.name", "later")];
        let applied = rules.apply(found.map(|(name, value)| (name.to_owned(), value.into())));
        let expect: BTreeMap<String, ResourceValue> =
            expect.iter().map(|&(name, value)| (name.to_owned(), value.into())).collect();
        assert_eq!(applied, expect, "{rules:?}");
    }

    /// Each rule by itself, and all of them in their order.
    #[test]
    fn rules_are_applied_in_order() {
        check(&Rules::default(), &[("service.name", "web"), ("host.name", "n1"), ("k8s.pod.name", "web-1")]);
        let extra = map(&[("env", "prod"), ("host.name", "mine")]);
        let defaults = map(&[("zone", "a"), ("k8s.pod.name", "default")]);
        check(
            &Rules { extra: extra.clone(), defaults, ..Rules::default() },
            &[
                ("service.name", "web"),
                ("host.name", "mine"),
                ("k8s.pod.name", "web-1"),
                ("env", "prod"),
                ("zone", "a"),
            ],
        );
        check(
            &Rules { allow: vec!["host.*".into(), "service.name".into()], ..Rules::default() },
            &[("service.name", "web"), ("host.name", "n1")],
        );
        check(
            &Rules { deny: vec!["host.*".into(), "service.*".into()], ..Rules::default() },
            &[("service.name", "unknown_service"), ("k8s.pod.name", "web-1")],
        );
        check(
            &Rules {
                extra,
                allow: vec!["env".into(), "k8s.*".into()],
                deny: vec!["k8s.node.*".into()],
                rename: map(&[("k8s.pod.name", "service.name"), ("env", "stage"), ("absent", "present")]),
                ..Rules::default()
            },
            &[("service.name", "web-1"), ("stage", "prod")],
        );
        check(
            &Rules { rename: map(&[("host.name", "k8s.pod.name"), ("k8s.pod.name", "host.name")]), ..Rules::default() },
            &[("service.name", "web"), ("host.name", "web-1"), ("k8s.pod.name", "n1")],
        );
    }

    /// A service can be called otherwise, and still is one.
    #[test]
    fn a_service_has_a_name() {
        let rules = Rules { rename: map(&[("service.name", "app"), ("host.name", "h")]), ..Rules::default() };
        check(&rules, &[("service.name", "unknown_service"), ("app", "web"), ("h", "n1"), ("k8s.pod.name", "web-1")]);
    }
}

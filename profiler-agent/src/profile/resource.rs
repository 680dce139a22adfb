//! Whose samples they are.

/// What an attribute of a resource says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceValue {
    /// One thing.
    Text(Box<str>),
    /// Several, in an order that means nothing.
    List(Box<[Box<str>]>),
}

/// What samples belong to: attributes by the names of OpenTelemetry's semantic conventions, in the order of their names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Resource {
    attributes: Box<[(Box<str>, ResourceValue)]>,
}

impl Resource {
    /// Puts attributes in order; of several with the same name, the first counts.
    pub fn new(attributes: impl IntoIterator<Item = (String, ResourceValue)>) -> Self {
        let mut attributes: Vec<(Box<str>, ResourceValue)> =
            attributes.into_iter().map(|(name, value)| (name.into(), value)).collect();
        attributes.sort_by(|(a, _), (b, _)| a.cmp(b));
        attributes.dedup_by(|later, first| later.0 == first.0);
        Self { attributes: attributes.into() }
    }

    /// Its attributes, by name.
    pub fn attributes(&self) -> impl Iterator<Item = (&str, &ResourceValue)> {
        self.attributes.iter().map(|(name, value)| (&**name, value))
    }

    /// What an attribute says, if it is one thing.
    pub fn text(&self, name: &str) -> Option<&str> {
        let index = self.attributes.binary_search_by(|(own, _)| (**own).cmp(name)).ok()?;
        match &self.attributes[index].1 {
            ResourceValue::Text(text) => Some(text),
            ResourceValue::List(_) => None,
        }
    }
}

impl From<&str> for ResourceValue {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for ResourceValue {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attributes are found by name; the first of two with the same name counts.
    #[test]
    fn keeps_attributes_in_order() {
        let attribute = |name: &str, value: &str| (name.to_owned(), ResourceValue::from(value));
        let resource = Resource::new([attribute("b", "1"), attribute("a", "2"), attribute("b", "3")]);
        assert_eq!(resource.attributes().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((resource.text("b"), resource.text("c")), (Some("1"), None));
    }
}

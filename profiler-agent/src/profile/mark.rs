//! What is unusual about how a profile was collected.

/// An attribute of a whole profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its name.
    pub name: &'static str,
    /// What it says.
    pub value: Box<str>,
}

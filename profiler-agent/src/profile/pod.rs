//! What is known of the pod that a cgroup is of.

/// A pod, as far as anybody asks about it besides for its attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its name.
    pub name: Box<str>,
    /// What it is a replica of, called the same on all nodes: `shop/Deployment/web`. `None`: of nothing.
    pub workload: Option<Box<str>>,
    /// The container in it that the cgroup is of, once that is known.
    pub container: Option<Box<str>>,
    /// Labels that were asked for: names and values.
    pub labels: Vec<(Box<str>, Box<str>)>,
    /// Annotations that were asked for: names and values.
    pub annotations: Vec<(Box<str>, Box<str>)>,
}

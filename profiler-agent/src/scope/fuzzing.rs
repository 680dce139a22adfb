//! What the fuzz target of the scope calls.

use std::time::Instant;

use super::{
    Matcher, Rules,
    proc_fs::parse,
    rules::{Executable, PodOf},
};
use crate::{
    fuzzing::Input,
    profile::{Cgroup, CgroupId, PodFacts},
};

/// Paths of executables and cgroups, IDs and pods' metadata of any text, and patterns of any text: who meets a rule may meet it,
/// and what is equal is matched.
pub fn scope(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut text = || {
        let len = usize::from(input.byte());
        String::from_utf8_lossy(input.piece(len)).into_owned()
    };
    let (pattern, executable, path, id, namespace, value) = (text(), text(), text(), text(), text(), text());
    let _ = parse(&executable);
    let patterns = vec![pattern.as_str().into()];
    let pair = |value: &str| [("name".to_owned(), value.into())].into();
    let rules = Rules {
        include: vec![
            Matcher { executables: patterns.clone(), ..Matcher::default() },
            Matcher { cgroups: patterns.clone(), ..Matcher::default() },
            Matcher { containers: patterns.clone(), namespaces: patterns.clone(), ..Matcher::default() },
        ],
        exclude: vec![
            Matcher { executables: vec![executable.as_str().into()], ..Matcher::default() },
            Matcher { cgroups: vec![path.as_str().into()], pod_labels: pair(&value), ..Matcher::default() },
        ],
        within: Vec::new(),
        honor_annotation: true,
    };
    let pod =
        PodFacts { namespace: namespace.into(), labels: vec![("name".into(), value.into())], ..PodFacts::default() };
    let cgroup = Cgroup {
        id: CgroupId(1),
        path: path.into(),
        containers: [id.into()].into(),
        pod_uid: None,
        unit: None,
        known_since: Instant::now(),
    };
    let process = rules.of_process(&[], &Executable::Path(executable.clone()));
    assert_eq!(process.met & !process.possible, 0);
    // (A pattern is a text's own, even if stars are in it. Without a slash it is a name's, which then is all of the path.)
    assert_ne!(process.met & 1 << 3, 0, "{executable:?}");
    for pod in [PodOf::None, PodOf::Unknown, PodOf::Known(&pod)] {
        let matched = rules.of_cgroup(&cgroup, pod);
        assert_eq!(matched.met & !matched.possible, 0);
        assert!(!matches!(pod, PodOf::None) || matched.met & 1 << 2 == 0);
        assert!(!matches!(pod, PodOf::Known(_)) || matched.met & 1 << 4 != 0, "{:?}", cgroup.path);
    }
}

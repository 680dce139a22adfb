//! What the fuzz target of pods' metadata calls.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::kubernetes::{self, Found, Index, Items, Wanted};
use crate::{
    fuzzing::Input,
    profile::{Resource, ResourceValue},
};

/// A list of pods, in pieces of any size: whatever is kept of it, and said about it, is short and plain.
pub fn pod(bytes: &[u8]) {
    let mut input = Input(bytes);
    let size = usize::from(input.byte()) + 1;
    let wanted = Wanted {
        labels: vec!["*".into()],
        annotations: vec!["*a*".into()],
        service_from_labels: size % 2 == 0,
        ..Wanted::default()
    };
    let (mut items, mut index, now) = (Items::default(), Index::new(Duration::ZERO), Instant::now());
    let mut ids: Vec<Arc<str>> = Vec::new();
    index.begin_list();
    for piece in input.0.chunks(size) {
        let pushed = items.push(piece, |item| match kubernetes::parse(item, &wanted) {
            Ok(stated) => {
                ids.extend(stated.containers.iter().map(|(id, _)| Arc::clone(id)));
                check(&Found { pod: stated.pod.clone().into(), container: stated.containers.first().cloned() });
                index.put(stated, now);
            }
            Err(problem) => assert!(problem.len() <= 200 && !problem.contains(char::is_control)),
        });
        if pushed.is_err() {
            return;
        }
    }
    assert!(ids.last().is_none_or(|id| index.container(id).is_some()));
    ids.iter().filter_map(|id| index.container(id)).for_each(|found| check(&found));
    index.begin_list();
    index.end_list(now);
    index.sweep(now + Duration::from_secs(2));
    assert_eq!(index.sizes(), (0, 0, 0, 0));
}

fn check(found: &Found) {
    let is_plain = |text: &str, limit| text.len() <= limit && !text.contains(char::is_control);
    let resource = Resource::new(kubernetes::attributes(found));
    assert!(resource.text("service.name").is_some() || resource.text("k8s.pod.name").is_none());
    assert!(resource.attributes().count() <= 160);
    for (name, value) in resource.attributes() {
        assert!(is_plain(name, 384));
        match value {
            ResourceValue::Text(text) => assert!(is_plain(text, 1024)),
            ResourceValue::List(list) => assert!(list.iter().all(|text| is_plain(text, 1024))),
        }
    }
}

//! Attributes of a pod and a container, by OpenTelemetry's conventions: `k8s.*`, `container.*`, and `service.*` as
//! <https://opentelemetry.io/docs/specs/semconv/non-normative/k8s-attributes/> derives them.

use super::index::Found;
use crate::{label::text, profile::ResourceValue};

/// Whether annotations may state an attribute: which pod and machine it is, they do not know better.
fn may_be_stated(name: &str) -> bool {
    name != "container.id" && !["k8s.", "host.", "os."].iter().any(|prefix| name.starts_with(prefix))
}

/// Everything that is known of a pod, and of the container, if that is known. Of attributes with the same name, the first
/// counts.
pub(crate) fn attributes(found: &Found) -> Vec<(String, ResourceValue)> {
    let pod = &*found.pod;
    let text = |name: &str, value: &str| (name.to_owned(), ResourceValue::from(value));
    let list = |name: &str, value: &str| (name.to_owned(), ResourceValue::List([value.into()].into()));
    let mut attributes = vec![
        text("k8s.namespace.name", &pod.namespace),
        text("k8s.pod.name", &pod.name),
        text("k8s.pod.uid", &pod.uid),
    ];
    attributes.extend(pod.workload.iter().map(|(name, value)| text(name, value)));
    if let Some((id, container)) = &found.container {
        attributes.push(text("container.id", id));
        attributes.push(text("k8s.container.name", &container.name));
    }
    attributes.extend(pod.chosen.iter().map(|(name, value)| text(name, value)));
    let stated = pod.stated.iter().filter(|(name, _)| may_be_stated(name));
    attributes.extend(stated.map(|(name, value)| text(name, value)));

    let container = found.container.as_ref().map(|(_, container)| &**container);
    let workload = pod.workload.first().map(|(_, name)| name);
    attributes.push(text("service.name", pod.service.as_ref().or(workload).unwrap_or(&pod.name)));
    attributes.push(text("service.namespace", &pod.namespace));
    let version = pod.version.as_deref().or_else(|| container?.version.as_deref());
    attributes.extend(version.map(|version| text("service.version", version)));
    if let Some(container) = container {
        let instance = format!("{}.{}.{}", pod.namespace, pod.name, container.name);
        attributes.push(("service.instance.id".to_owned(), ResourceValue::Text(text::value(&instance))));
        attributes.extend(container.image.as_ref().map(|image| text("container.image.name", image)));
        attributes.extend(container.tag.as_ref().map(|tag| list("container.image.tags", tag)));
        attributes.extend(container.repo_digest.as_ref().map(|digest| list("container.image.repo_digests", digest)));
        attributes.extend(container.image_id.as_ref().map(|id| text("container.image.id", id)));
    }
    attributes.retain(|(_, value)| *value != "".into());
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        label::kubernetes::pod::{self, Wanted},
        profile::Resource,
    };

    fn resource(metadata: &str, with_container: bool, wanted: &Wanted) -> Resource {
        let json = format!(
            r#"{{"metadata":{{"uid":"u","name":"web-5d-x","namespace":"shop",{metadata}}},
            "spec":{{"containers":[{{"name":"app","image":"r.io/app:1.2"}}]}},
            "status":{{"containerStatuses":[{{"name":"app","containerID":"x://c","imageID":"r.io/app@sha256:aa"}}]}}}}"#
        );
        let stated = pod::parse(json.as_bytes(), wanted).expect("a pod");
        let container = stated.containers.first().cloned().filter(|_| with_container);
        Resource::new(attributes(&Found { pod: stated.pod.into(), container }))
    }

    const OWNED: &str = r#""ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"web-5d"}],
        "labels":{"pod-template-hash":"5d","app.kubernetes.io/instance":"shop-web","app.kubernetes.io/version":"7"}"#;

    fn check(resource: &Resource, expect: &[(&str, Option<&str>)]) {
        for (name, value) in expect {
            assert_eq!(resource.text(name), *value, "{name} of {resource:?}");
        }
    }

    /// A container of a Deployment has all of it, by the conventions' names.
    #[test]
    fn attributes_follow_the_conventions() {
        let resource = resource(OWNED, true, &Wanted::default());
        let attributes: Vec<_> = resource
            .attributes()
            .map(|(name, value)| match value {
                ResourceValue::Text(text) => format!("{name}={text}"),
                ResourceValue::List(list) => format!("{name}=[{}]", list.join(",")),
            })
            .collect();
        assert_eq!(
            attributes,
            [
                "container.id=c",
                "container.image.name=r.io/app",
                "container.image.repo_digests=[r.io/app@sha256:aa]",
                "container.image.tags=[1.2]",
                "k8s.container.name=app",
                "k8s.deployment.name=web",
                "k8s.namespace.name=shop",
                "k8s.pod.name=web-5d-x",
                "k8s.pod.uid=u",
                "k8s.replicaset.name=web-5d",
                "service.instance.id=shop.web-5d-x.app",
                "service.name=web",
                "service.namespace=shop",
                "service.version=1.2",
            ]
        );
    }

    /// Annotations come first, then labels where they may, then what runs the pod, then the pod.
    #[test]
    fn services_are_derived_in_order() {
        let labels = Wanted { service_from_labels: true, ..Wanted::default() };
        let annotated = format!(
            r#"{OWNED},"annotations":{{"resource.opentelemetry.io/service.name":"stated",
            "resource.opentelemetry.io/service.version":"9","resource.opentelemetry.io/service.instance.id":"i",
            "resource.opentelemetry.io/service.namespace":"n","resource.opentelemetry.io/deployment.environment.name":"prod"}}"#
        );
        check(
            &resource(&annotated, true, &labels),
            &[
                ("service.name", Some("stated")),
                ("service.version", Some("9")),
                ("service.instance.id", Some("i")),
                ("service.namespace", Some("n")),
                ("deployment.environment.name", Some("prod")),
            ],
        );
        check(&resource(OWNED, true, &labels), &[("service.name", Some("shop-web")), ("service.version", Some("7"))]);
        check(
            &resource(r#""labels":null"#, true, &labels),
            &[("service.name", Some("web-5d-x")), ("k8s.replicaset.name", None), ("service.version", Some("1.2"))],
        );
        check(
            &resource(OWNED, false, &Wanted::default()),
            &[
                ("service.name", Some("web")),
                ("service.version", None),
                ("service.instance.id", None),
                ("k8s.container.name", None),
                ("container.id", None),
            ],
        );
    }

    /// Who writes annotations cannot pretend to be another pod or machine.
    #[test]
    fn annotations_do_not_say_who_it_is() {
        let metadata = r#""annotations":{"resource.opentelemetry.io/k8s.pod.name":"other",
            "resource.opentelemetry.io/container.id":"other","resource.opentelemetry.io/host.name":"other",
            "resource.opentelemetry.io/k8s.cluster.name":"other"}"#;
        check(
            &resource(metadata, true, &Wanted::default()),
            &[
                ("k8s.pod.name", Some("web-5d-x")),
                ("container.id", Some("c")),
                ("host.name", None),
                ("k8s.cluster.name", None),
            ],
        );
    }
}

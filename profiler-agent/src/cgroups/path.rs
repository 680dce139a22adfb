//! What the path of a cgroup says: which containers, pod and service it belongs to.
//!
//! Paths are made by container runtimes, by systemd, and by whoever may make cgroups inside of a container: what they
//! say is checked for its form here, and believed or not by the table.

/// What a path says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Said<'a> {
    /// Containers, the outermost first, each with the path of its own cgroup.
    pub(super) containers: Vec<(&'a str, &'a str)>,
    /// The outermost pod.
    pub(super) pod_uid: Option<String>,
    /// The innermost systemd service.
    pub(super) unit: Option<&'a str>,
}

/// Reads a path.
///
/// Forms, by runtime and driver (seen with containerd 1.6, CRI-O, docker and podman, kubelet's
/// `pkg/kubelet/cm/cgroup_manager_linux.go`):
///
/// ```text
/// kubepods/burstable/podUID/ID                                           cgroupfs
/// kubepods.slice/…/kubepods-burstable-podU_I_D.slice/cri-containerd-ID.scope   systemd; crio-ID.scope, docker-ID.scope
/// …/kubepods-burstable-podU_I_D.slice:cri-containerd:ID                  containerd that was not told of systemd
/// docker/ID, system.slice/docker-ID.scope, machine.slice/libpod-ID.scope outside of Kubernetes
/// ecs/TASK/ID                                                            ID: 32 digits, a hyphen, a number
/// ```
///
/// A kind node, or docker in docker, has such paths within such paths.
pub(super) fn parse(path: &str) -> Said<'_> {
    let mut said = Said::default();
    let mut in_kubernetes = false;
    let mut end = 0;
    for component in path.split('/') {
        end += component.len();
        let (own, parts) = (&path[..end.min(path.len())], component.split(':'));
        for part in parts.clone() {
            in_kubernetes |= part.contains("kubepods");
            if in_kubernetes && said.pod_uid.is_none() {
                said.pod_uid = pod_uid(part);
            }
        }
        if let Some(id) = parts.clone().next_back().and_then(container_id) {
            said.containers.push((id, own));
        }
        if component.ends_with(".service") && !component.starts_with("user@") {
            said.unit = Some(component);
        }
        // (The slash.)
        end += 1;
    }
    if !said.containers.is_empty() {
        said.unit = None;
    }
    said
}

/// The ID in the name of a container's cgroup.
fn container_id(name: &str) -> Option<&str> {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let (runtime, id) = name.rsplit_once('-').unwrap_or(("", name));
    if is_hex(id, 64) {
        // conmon watches a container and is not in it.
        return (!runtime.ends_with("conmon")).then_some(id);
    }
    let is_number = (1..=20).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && is_hex(runtime, 32)).then_some(name)
}

/// The UID in the name of a pod's cgroup, with dashes.
fn pod_uid(name: &str) -> Option<String> {
    let (name, is_slice) = name.strip_suffix(".slice").map_or((name, false), |name| (name, true));
    let at = if is_slice { name.rfind("-pod")? + 1 } else { 0 };
    let uid = name.get(at..)?.strip_prefix("pod")?;
    // (A hyphen would be a step in the hierarchy of systemd's slices.)
    let uid = if is_slice { uid.replace('_', "-") } else { uid.to_owned() };
    // A static pod has a hash of its manifest in place of a UID.
    (is_uuid(&uid) || is_hex(&uid, 32)).then_some(uid)
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_uuid(text: &str) -> bool {
    let mut parts = text.split('-');
    [8, 4, 4, 4, 12].into_iter().all(|len| parts.next().is_some_and(|part| is_hex(part, len))) && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const OTHER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";
    const UID: &str = "2d8a3c1e-0f4b-4c56-9d7e-8a9b0c1d2e3f";
    const HASH: &str = "c7cfb0e4d6e2a4d7a1a8d7a6c5b4a392";

    /// Every layout that runtimes and drivers make, and what is none of them.
    #[test]
    fn reads_every_layout() {
        let check = |path: &str, containers: &[&str], pod: Option<&str>, unit: Option<&str>| {
            let path = path.replace("ID", ID).replace("OTHER", OTHER);
            let path = path.replace("U-I-D", UID).replace("U_I_D", &UID.replace('-', "_")).replace("HASH", HASH);
            let said = parse(&path);
            let found: Vec<&str> = said.containers.iter().map(|(id, _)| *id).collect();
            assert_eq!((&found[..], said.pod_uid.as_deref(), said.unit), (containers, pod, unit), "{path}");
            for (id, own) in said.containers {
                assert!(path.starts_with(own) && own.contains(id), "{own} of {path}");
            }
        };
        // Kubernetes, by cgroupfs and by systemd.
        check("/kubepods/podU-I-D/ID", &[ID], Some(UID), None);
        check("/kubepods/burstable/podU-I-D/ID", &[ID], Some(UID), None);
        check("/kubepods/besteffort/podHASH/ID", &[ID], Some(HASH), None);
        check("/kubepods/burstable/podU-I-D/crio-ID", &[ID], Some(UID), None);
        check("/kubepods/burstable/podU-I-D/crio-conmon-ID", &[], Some(UID), None);
        check("/kubepods/burstable/podU-I-D", &[], Some(UID), None);
        let slice = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_I_D.slice";
        check(&format!("{slice}/cri-containerd-ID.scope"), &[ID], Some(UID), None);
        check(&format!("{slice}/crio-ID.scope"), &[ID], Some(UID), None);
        check(&format!("{slice}/docker-ID.scope"), &[ID], Some(UID), None);
        check(&format!("{slice}/crio-conmon-ID.scope"), &[], Some(UID), None);
        check(&format!("{slice}/crio-ID.scope/container"), &[ID], Some(UID), None);
        check("/kubepods.slice/kubepods-podU_I_D.slice/cri-containerd-ID.scope", &[ID], Some(UID), None);
        check("/kubepods.slice/kubepods-podHASH.slice/crio-ID.scope", &[ID], Some(HASH), None);
        let unaware = "/system.slice/containerd.service/kubepods-burstable-podU_I_D.slice:cri-containerd:ID";
        check(unaware, &[ID], Some(UID), None);
        // A kind node, and a service manager inside of a container.
        let kind = "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podU_I_D.slice/cri-containerd-ID.scope";
        check(&format!("/docker/OTHER{kind}"), &[OTHER, ID], Some(UID), None);
        check(&format!("/system.slice/docker-OTHER.scope{kind}"), &[OTHER, ID], Some(UID), None);
        check("/docker/OTHER/kubelet/kubepods/besteffort/podU-I-D/ID", &[OTHER, ID], Some(UID), None);
        check("/kubepods/podU-I-D/ID/system.slice/nginx.service", &[ID], Some(UID), None);
        check("/kubepods/podU-I-D/OTHER/docker/ID", &[OTHER, ID], Some(UID), None);
        // Outside of Kubernetes.
        check("/docker/ID", &[ID], None, None);
        check("/system.slice/docker-ID.scope", &[ID], None, None);
        check("/machine.slice/libpod-ID.scope/container", &[ID], None, None);
        check("/libpod_parent/libpod-ID", &[ID], None, None);
        check("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope", &[ID], None, None);
        check("/machine.slice/libpod-conmon-ID.scope", &[], None, None);
        check(&format!("/ecs/{HASH}/{HASH}-12345"), &[&format!("{HASH}-12345")], None, None);
        // No container.
        check("/", &[], None, None);
        check("/system.slice/nginx.service", &[], None, Some("nginx.service"));
        check("/system.slice/system-getty.slice/getty@tty1.service", &[], None, Some("getty@tty1.service"));
        check("/user.slice/user-1000.slice/session-3.scope", &[], None, None);
        check("/user.slice/user-1000.slice/user@1000.service/init.scope", &[], None, None);
        check("/user.slice/user-0.slice/user@0.service/app.slice/x.service", &[], None, Some("x.service"));
        // What only looks like one.
        check("/podU-I-D/x", &[], None, None);
        check("/kubepods/podU-I-D-1", &[], None, None);
        check(&format!("/docker/{}", ID.to_uppercase()), &[], None, None);
        check(&format!("/docker/{}", &ID[1..]), &[], None, None);
        check("/docker/ID0", &[], None, None);
        check("/kubepods-pod.slice/-pod.slice/pod/:/::", &[], None, None);
        check("/kubepods/podé/-é.scope", &[], None, None);
        check("", &[], None, None);
    }
}

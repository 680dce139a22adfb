//! The machine that samples were taken on.

use std::io::Read as _;

use nix::fcntl::OFlag;

use super::text;
use crate::{process_root::Root, profile::ResourceValue, regular_file};

/// Bytes of a file that says something about the machine.
const MAX_FILE: u64 = 64 << 10;
/// Where systems say what they are, the administrator's word first (`os-release(5)`).
const OS_RELEASE: [&str; 2] = ["etc/os-release", "usr/lib/os-release"];

/// What is known about the machine. `node` is its name in the cluster: in a pod, the host's name is the pod's.
pub(super) fn attributes(node: Option<&str>) -> Vec<(String, ResourceValue)> {
    let attribute = |name: &str, value: &str| (name.to_owned(), ResourceValue::Text(text::value(value)));
    let own = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned());
    let name = node.map_or_else(|| own.unwrap_or_else(|_| "unknown".to_owned()), str::to_owned);
    let mut attributes =
        vec![attribute("host.name", &name), attribute("host.arch", arch()), attribute("os.type", "linux")];
    attributes.extend(node.map(|node| attribute("k8s.node.name", node)));
    let read = |path| read(path).unwrap_or_default();
    attributes.extend(machine_id(&read("etc/machine-id")).map(|id| attribute("host.id", id)));
    let release = OS_RELEASE.iter().map(|path| read(path)).find(|release| !release.is_empty()).unwrap_or_default();
    for (name, key) in [("os.name", "NAME"), ("os.version", "VERSION_ID"), ("os.description", "PRETTY_NAME")] {
        attributes.extend(release_value(&release, key).map(|value| attribute(name, value)));
    }
    attributes
}

/// The architecture in the words of the semantic conventions.
fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A file of the host's: that of its first process, which in a container is not ours. Links do not lead out of there.
fn read(path: &str) -> Option<String> {
    let place = Root::of(1)?.look_up(path, OFlag::empty())?;
    let mut text = String::new();
    regular_file::reopen(&place).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// `machine-id(5)`: 32 hexadecimal digits; before the first start it may hold other words.
fn machine_id(text: &str) -> Option<&str> {
    let id = text.trim();
    (id.len() == 32 && id.bytes().all(|digit| digit.is_ascii_hexdigit())).then_some(id)
}

/// The value of a key in `os-release(5)`, which has the shell's quotes.
fn release_value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = text.lines().rev().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))?;
    let unquoted = ['"', '\''].iter().find_map(|&quote| value.strip_prefix(quote)?.strip_suffix(quote));
    Some(unquoted.unwrap_or(value)).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values with and without quotes; what is not there is nothing.
    #[test]
    fn reads_what_a_system_says_it_is() {
        let text = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME='Debian'\nVERSION_ID=12\nEMPTY=\"\"\n";
        assert_eq!(release_value(text, "PRETTY_NAME"), Some("Debian GNU/Linux 12 (bookworm)"));
        assert_eq!(release_value(text, "NAME"), Some("Debian"));
        assert_eq!(release_value(text, "VERSION_ID"), Some("12"));
        assert_eq!(release_value(text, "EMPTY"), None);
        assert_eq!(release_value(text, "VERSION"), None);
        assert_eq!(machine_id("0123456789abcdef0123456789abcdef\n"), Some("0123456789abcdef0123456789abcdef"));
        assert_eq!(machine_id("uninitialized\n"), None);
    }

    /// A node's name is the host's; without one, it is what the system says.
    #[test]
    fn a_node_names_the_host() {
        let name = |node| {
            let attributes = attributes(node);
            attributes.into_iter().find(|(name, _)| name == "host.name").map(|(_, value)| value)
        };
        assert_eq!(name(Some("worker-1")), Some("worker-1".into()));
        assert!(name(None).is_some_and(|name| name != "worker-1".into()));
    }
}

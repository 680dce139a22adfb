//! The API server's audit log: who asked for what.

use std::{collections::HashMap, fs, path::Path};

use serde_json::Value;

/// What is logged: every request, without the objects.
pub(super) const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
rules:
  - level: Metadata
";

/// A request that the API server got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// `list`, `watch`, `get`, `create`…
    pub verb: String,
    /// `pods`, or `pods/status`; empty where it was no resource.
    pub resource: String,
    /// The path with its query.
    pub uri: String,
    /// HTTP's status; `None` while there is no answer.
    pub status: Option<u64>,
}

/// What a user asked for, in order.
pub(super) fn requests_of(log: &Path, user: &str) -> Vec<Asked> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let mut requests: Vec<Asked> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    // The last line may be half written.
    for event in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let word = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        if word("/user/username") != user {
            continue;
        }
        // A request has an event when it arrives, one when an answer that lasts begins, and one at its end.
        let status = event.pointer("/responseStatus/code").and_then(Value::as_u64);
        let place = *places.entry(word("/auditID")).or_insert_with(|| {
            let mut resource = word("/objectRef/resource");
            if let Some(part) = event.pointer("/objectRef/subresource").and_then(Value::as_str) {
                resource = format!("{resource}/{part}");
            }
            requests.push(Asked { verb: word("/verb"), resource, uri: word("/requestURI"), status });
            requests.len() - 1
        });
        if status.is_some() {
            requests[place].status = status;
        }
    }
    requests
}

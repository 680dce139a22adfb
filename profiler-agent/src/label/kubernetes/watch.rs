//! Follows the pods: one list, then one watch after another from where the last one ended. Only where the API server does
//! not know any more what changed since is there another list.

use std::time::{Duration, Instant};

use serde::{Deserialize, de::IgnoredAny};

use super::{
    Settings, Shared,
    api::{Api, ApiError, Status, causes, next},
    list::Lines,
    pod,
};

/// How long is waited for what.
#[derive(Clone, Debug)]
pub(super) struct Patience {
    /// For an answer, and for each part of a list.
    pub(super) answer: Duration,
    /// For the next change, or a bookmark, of which there is one a minute. An API server that is stopped, or behind a
    /// connection that is dead, says nothing; the next watch finds out.
    pub(super) silence: Duration,
    /// Between two attempts: at first, and at most.
    pub(super) pause: [Duration; 2],
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(15),
            silence: Duration::from_secs(150),
            pause: [Duration::from_secs(1), Duration::from_secs(30)],
        }
    }
}

/// A line of a watch.
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: EventKind,
    #[serde(rename = "object")]
    _object: IgnoredAny,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum EventKind {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
    #[serde(other)]
    Unknown,
}

#[derive(Deserialize)]
struct Of<T> {
    object: T,
}

#[derive(Deserialize)]
struct Versioned {
    metadata: Version,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Version {
    resource_version: String,
    uid: String,
}

/// Follows the pods for ever.
pub(super) async fn follow(settings: &Settings, patience: &Patience, shared: &Shared) {
    let mut follower = Follower { settings, patience, shared, api: None, version: None };
    let mut failures = 0;
    loop {
        let begun = Instant::now();
        let outcome = follower.step().await;
        if begun.elapsed() >= patience.pause[1] {
            failures = 0;
        }
        match outcome {
            // Watches end all the time; one that ends at once is a failure in disguise.
            Ok(()) if begun.elapsed() >= patience.pause[0] => {
                failures = 0;
                continue;
            }
            Ok(()) => {}
            Err(ApiError::Expired) => follower.version = None,
            Err(error) => {
                shared.failed(&error);
                if matches!(error, ApiError::Malformed(_)) {
                    // The same would come again.
                    follower.version = None;
                }
                // Credentials, addresses and authorities are read again.
                follower.api = None;
            }
        }
        tokio::time::sleep(pause(patience, failures)).await;
        failures = failures.saturating_add(1);
    }
}

/// Doubles with each failure. Half of it is left to chance: a cluster's agents must not come back all at once.
fn pause(patience: &Patience, failures: u32) -> Duration {
    let [first, most] = patience.pause;
    let longest = first.saturating_mul(1 << failures.min(16)).min(most);
    let fraction = getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX));
    longest / 2 + (longest / 2).mul_f64(fraction)
}

struct Follower<'a> {
    settings: &'a Settings,
    patience: &'a Patience,
    shared: &'a Shared,
    api: Option<Api>,
    /// Of what is known, as the API server counts.
    version: Option<String>,
}

impl Follower<'_> {
    /// Lists the pods if they are not known, then watches until the watch ends.
    async fn step(&mut self) -> Result<(), ApiError> {
        let (settings, shared) = (self.settings, self.shared);
        let api = match self.api.take() {
            Some(api) => api,
            None => Api::new(&settings.access, &settings.node, self.patience.answer).await?,
        };
        let api = self.api.insert(api);
        let version = match &mut self.version {
            Some(version) => version,
            None => {
                shared.update(|known| {
                    known.lists += 1;
                    known.index.begin_list();
                });
                let (version, refused) = api.list(|object| shared.put(pod::parse(object, &settings.wanted))).await?;
                shared.update(|known| {
                    known.malformed += refused;
                    known.index.end_list(Instant::now());
                });
                shared.synced();
                self.version.insert(version)
            }
        };
        shared.update(|known| known.watches += 1);
        let mut body = api.watch(version, None).await?;
        shared.synced();
        let mut lines = Lines::default();
        let mut outcome = Ok(());
        while outcome.is_ok() {
            let bytes = match next(&mut body, self.patience.silence).await {
                Ok(Some(bytes)) => bytes,
                // (Nothing happened for long, or the connection was cut: the next watch tells what that means.)
                Ok(None) | Err(ApiError::Silent(_) | ApiError::Unreachable(_)) => break,
                Err(error) => return Err(error),
            };
            let refused = lines.push(&bytes, |line| {
                if outcome.is_ok() {
                    outcome = event(settings, shared, line, version);
                }
            });
            shared.update(|known| known.malformed += refused);
        }
        outcome
    }
}

/// Takes note of one event, and of the version that it leads to.
fn event(settings: &Settings, shared: &Shared, line: &[u8], version: &mut String) -> Result<(), ApiError> {
    let malformed = |error: serde_json::Error| ApiError::Malformed(causes(&error));
    let Event { kind, .. } = serde_json::from_slice(line).map_err(malformed)?;
    if kind == EventKind::Error {
        let status: Of<Status> = serde_json::from_slice(line).map_err(malformed)?;
        return Err(status.object.into());
    }
    if matches!(kind, EventKind::Added | EventKind::Modified) {
        let pod = pod::parse_event(line, &settings.wanted);
        let leads_to = pod.as_ref().map(|pod| pod.version.clone()).unwrap_or_default();
        shared.put(pod);
        if !leads_to.is_empty() {
            *version = leads_to.into();
            return Ok(());
        }
    }
    let Of { object: Versioned { metadata } } = serde_json::from_slice(line).map_err(malformed)?;
    if kind == EventKind::Deleted {
        shared.update(|known| known.index.delete(&metadata.uid, Instant::now()));
    }
    if !metadata.resource_version.is_empty() {
        *version = metadata.resource_version;
    }
    Ok(())
}

//! What the daemon's loop is asked to do by others: by clients of the control socket, and by whoever watches containers.

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{
    capture::{limits::Refusal, rules::Trigger},
    socket::{Command, State},
};
use crate::config::Request;

/// Something to do, with a place for the answer.
#[derive(Debug)]
pub(super) enum Demand {
    /// A command of a client's.
    Command(Command, oneshot::Sender<State>),
    /// A capture that a client asks for.
    Capture(Box<Request>, oneshot::Sender<Result<CaptureState, Declined>>),
    /// A rule has fired. The answer is whether that is followed.
    Trigger(Trigger, oneshot::Sender<bool>),
}

/// A capture that runs.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct CaptureState {
    /// The rule that has fired, or `trigger`.
    pub rule: String,
    /// Of whom.
    pub scope: String,
    /// Why.
    pub reason: String,
    /// Samples per second and CPU.
    pub frequency: u64,
    /// When it ends: RFC 3339.
    pub until: String,
    /// Where its profile goes.
    pub destinations: Vec<String>,
}

impl CaptureState {
    /// Whether both are of the same capture: of the same, there are never two at a time.
    pub fn is(&self, other: &Self) -> bool {
        (&self.rule, &self.scope) == (&other.rule, &other.scope)
    }
}

/// Why a client gets no capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Declined {
    /// Something is wrong with what was asked for.
    Invalid(String),
    /// The limits do not allow it.
    Refused(Refusal, String),
    /// It was allowed, and could not begin.
    Failed(String),
}

//! An encoded export request: what is queued, stored and sent.

use std::time::SystemTime;

use bytes::Bytes;

use crate::profile::Tally;

/// An encoded export request, with what it stands for. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `ExportProfilesServiceRequest`, binary protobuf, not compressed.
    pub body: Bytes,
    /// How much its samples stand for.
    pub tally: Tally,
    /// How many profiles it holds: what a receiver's partial success counts.
    pub profiles: u32,
    /// When the window of its samples was closed.
    pub closed: SystemTime,
}

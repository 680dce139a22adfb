//! OTLP profiles (`opentelemetry.proto.profiles.v1development`, as of opentelemetry-proto v1.10).

pub mod client;
mod dictionary;
mod encode;
mod request;

pub use self::{
    encode::{Encoded, Options, requests},
    request::Request,
};

use prost::Message as _;

use crate::profile::Profile;

/// Encodes a profile as one binary export request: what a file holds.
pub fn encode(profile: &Profile) -> Vec<u8> {
    encode::request(profile, &encode::in_order(profile), &Options::default()).encode_to_vec()
}

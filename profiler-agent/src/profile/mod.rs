//! The nouns every stage shares, in the order in which a sample passes through them:
//! a [`RawSample`] of addresses, a [`LocatedSample`] of places in files, and a [`Profile`] of named samples.

mod address;
mod executable;
mod frame;
mod located;
mod profile;
mod raw;

pub use self::{
    address::{CodeAddress, FileOffset, VirtualAddress},
    executable::{Executable, ExecutableId, Segment},
    frame::{Frame, FrameName, FrameType, printable},
    located::{LocatedSample, Location, ProcessInfo},
    profile::{Profile, Sample},
    raw::{DecodeError, RawSample},
};

//! The nouns every stage shares, in the order in which a sample passes through them:
//! a [`RawSample`] of addresses, a [`LocatedSample`] of places in files, and a [`Profile`] of named samples.

mod address;
mod events;
mod executable;
mod frame;
mod located;
mod raw;
mod sample;

pub use self::{
    address::{CodeAddress, FileOffset, VirtualAddress},
    events::{Events, Tally},
    executable::{Executable, ExecutableId, Segment},
    frame::{Frame, FrameName, FrameType, FunctionName, InlinedFunction, Nameless, SourceLine, printable},
    located::{LocatedSample, Location, ProcessInfo},
    raw::{DecodeError, RawSample, WaitDue, Waited},
    sample::{Profile, Sample},
};

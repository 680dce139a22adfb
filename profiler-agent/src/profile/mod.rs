//! The nouns every stage shares, in the order in which a sample passes through them:
//! a [`RawSample`] of addresses, a [`LocatedSample`] of places in files, and a [`Profile`] of named samples.

mod address;
mod events;
mod executable;
mod frame;
mod kernel_code;
mod located;
mod raw;
mod runtime_code;
mod sample;

pub use self::{
    address::{CodeAddress, FileOffset, VirtualAddress},
    events::{Events, Tally},
    executable::{Executable, ExecutableId, FileIdentity, Segment, SplitDebug, hex},
    frame::{Frame, FrameName, FrameType, FunctionName, InlinedFunction, Nameless, SourceLine, printable},
    kernel_code::{KernelChanges, KernelCode},
    located::{LocatedSample, Location, ProcessInfo},
    raw::{DecodeError, RawSample, WaitDue, Waited},
    runtime_code::{RuntimeCode, RuntimeFile, RuntimeFileKind},
    sample::{Profile, Sample},
};

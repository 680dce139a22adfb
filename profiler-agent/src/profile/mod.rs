//! The nouns every stage shares, in the order in which a sample passes through them:
//! a [`RawSample`] of addresses, a [`LocatedSample`] of places in files, and a [`Profile`] of named samples, first
//! [`Unlabelled`] and then with a [`Resource`] each.

mod address;
mod cgroup;
mod events;
mod executable;
mod frame;
mod kernel_code;
mod located;
mod mark;
mod pod;
mod raw;
mod resource;
mod runtime_code;
mod sample;

pub use self::{
    address::{CodeAddress, FileOffset, VirtualAddress},
    cgroup::{Cgroup, CgroupId},
    events::{Events, Tally},
    executable::{Executable, ExecutableId, FileIdentity, Segment, SplitDebug, hex},
    frame::{Frame, FrameName, FrameType, FunctionName, InlinedFunction, Nameless, SourceLine, printable},
    kernel_code::{KernelChanges, KernelCode},
    located::{LocatedSample, Location, ProcessInfo},
    mark::Mark,
    pod::PodFacts,
    raw::{DecodeError, RawSample, WaitDue, Waited},
    resource::{Resource, ResourceValue},
    runtime_code::{RuntimeCode, RuntimeFile, RuntimeFileKind},
    sample::{Profile, Sample, Unlabelled},
};

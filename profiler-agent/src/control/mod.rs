//! What keeps profiling in bounds: the budget, the kill switch, and the daemon that heeds them.
//!
//! Nothing in here touches samples: it decides whether and how closely the pipeline collects.

mod books;
pub mod capture;
pub mod client;
mod collection;
mod daemon;
mod delivery;
mod demand;
mod effort;
mod governor;
mod kill_switch;
mod reload;
mod signals;
mod socket;
mod spending;
mod stats;

pub use self::{
    capture::CaptureStats,
    collection::label_options,
    daemon::{Options, run},
    demand::CaptureState,
    effort::Effort,
    socket::{Command, State},
    spending::Spent,
    stats::{Control, ControlStats},
};

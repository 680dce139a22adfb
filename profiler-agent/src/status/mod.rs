//! What the agent tells about itself: counts for metrics and reports, and the status endpoint.

mod access;
mod metrics;
mod server;
mod state;
mod stats;

pub use self::{
    access::{Access, AccessFiles, TlsFiles},
    server::serve,
    stats::{Amount, Count, Stats},
};

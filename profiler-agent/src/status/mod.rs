//! What the agent tells about itself: counts for metrics and reports, and the status endpoint.

mod metrics;
mod server;
mod state;
mod stats;

pub use self::{
    server::serve,
    stats::{Amount, Count, Stats},
};

//! What `deploy/` has: rendered, read back, and compared with what it promises.

mod admitted;
mod chart;
mod configuration;
mod manifests;
mod rendered;

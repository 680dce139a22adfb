//! What `deploy/` has: rendered, read back, and compared with what it promises.

mod chart;
mod configuration;
mod manifests;
mod rendered;

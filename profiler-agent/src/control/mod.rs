//! What the agent does when: its schedule, and captures of more detail where something is wrong.
//!
//! Decides and carries out nothing: whoever collects asks.

pub mod capture;
pub mod schedule;

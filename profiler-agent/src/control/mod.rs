//! What the agent does when: its schedule.
//!
//! Decides and carries out nothing: whoever collects asks.

pub mod schedule;

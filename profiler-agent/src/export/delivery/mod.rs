//! Brings requests to where they are wanted.

pub mod spool;

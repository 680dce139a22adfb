//! Tests on the real kernel: real programs are profiled, and what comes out is compared with what is known
//! about them. `cargo xtask test` runs them one after another.

mod agreement;
mod budget;
mod daemon;
mod naming;
mod recording;
mod runtime_code;
mod stacks;
mod unwinding;
mod waits;

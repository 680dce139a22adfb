//! Tests on the real kernel: real programs are profiled, and what comes out is compared with what is known
//! about them. `cargo xtask test` runs them one after another.

mod agreement;
mod budget;
mod captures;
mod cgroups;
mod compilation;
mod containers;
mod daemon;
mod debuginfod;
mod delivery;
mod deployment;
mod guardrails;
mod hostile;
mod kubernetes;
mod labels;
mod naming;
mod privileges;
mod receivers;
mod recording;
mod redaction;
mod replicas;
mod runtime_code;
mod scope;
mod servers;
mod stacks;
mod status;
mod storms;
mod unwinding;
mod waits;

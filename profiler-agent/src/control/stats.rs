//! What is counted about the budget.

use std::sync::{Mutex, PoisonError};

use super::{effort::Effort, spending::Spent};

/// How the budget is kept at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct ControlStats {
    /// How closely the machine is looked at; `None`: nothing has been yet.
    pub effort: Option<Effort>,
    /// What that costs, CPU seconds per second.
    pub cost: f64,
    /// What it may.
    pub budget: f64,
    /// Memory that is used, bytes.
    pub memory: usize,
    /// What may be.
    pub memory_budget: usize,
}

/// The same, shared, with what was spent in all.
#[derive(Debug, Default)]
pub struct Control(Mutex<(ControlStats, Spent)>);

impl Control {
    /// Takes over how the budget is kept.
    pub fn set(&self, stats: ControlStats) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0 = stats;
    }

    /// Adds what was spent.
    pub fn add(&self, spent: &Spent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.add(spent);
    }

    /// How the budget is kept, and what was spent so far.
    pub fn get(&self) -> (ControlStats, Spent) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

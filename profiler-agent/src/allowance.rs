//! CPU time for work that can wait: reading symbols, building unwind tables. What there is to do comes in bursts (a deploy
//! brings a hundred new executables at once); this spreads it, so that the machine never notices.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};

/// What may be saved up: the symbols and tables of what a machine runs when the agent starts take about as much.
const SAVINGS: Duration = Duration::from_secs(1);
/// Least time between two looks at whether there is some again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// CPU time that threads share. It grows with time; whoever has taken more than there was makes the next one wait.
#[derive(Debug)]
pub struct Allowance(Mutex<Account>);

#[derive(Debug)]
struct Account {
    /// CPU seconds per second; infinite: as much as is wanted.
    rate: f64,
    /// CPU seconds; negative: owed.
    balance: f64,
    /// CPU seconds that were taken in all.
    used: f64,
    since: Instant,
}

impl Default for Allowance {
    fn default() -> Self {
        Self(Mutex::new(Account {
            rate: f64::INFINITY,
            balance: SAVINGS.as_secs_f64(),
            used: 0.0,
            since: Instant::now(),
        }))
    }
}

impl Allowance {
    /// CPU seconds per second from now on; infinite: as much as is wanted.
    pub fn set_rate(&self, rate: f64) {
        let mut account = self.account();
        if !rate.is_finite() || !account.rate.is_finite() {
            account.balance = SAVINGS.as_secs_f64();
        }
        account.rate = rate;
    }

    /// Whether there is some.
    pub fn is_open(&self) -> bool {
        self.account().balance > 0.0
    }

    /// Takes what somebody has used.
    pub fn take(&self, used: Duration) {
        let mut account = self.account();
        account.balance -= used.as_secs_f64();
        account.used += used.as_secs_f64();
    }

    /// CPU seconds that were taken so far.
    pub fn used(&self) -> f64 {
        self.account().used
    }

    /// Does some work when there is time for it. The thread waits until then.
    pub fn spend<R>(&self, work: impl FnOnce() -> R) -> R {
        while !self.is_open() {
            thread::sleep(LOOK_AGAIN);
        }
        let before = thread_time();
        let result = work();
        self.take(thread_time().saturating_sub(before));
        result
    }

    /// The account, up to date.
    fn account(&self) -> MutexGuard<'_, Account> {
        let mut account = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(account.since).as_secs_f64();
        account.since = now;
        account.balance =
            if account.rate.is_finite() { account.balance + elapsed * account.rate } else { SAVINGS.as_secs_f64() };
        account.balance = account.balance.min(SAVINGS.as_secs_f64());
        account
    }
}

/// CPU time of this thread.
pub fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was taken beyond what there is has to be earned first; without a limit there is always some.
    #[test]
    fn debts_are_paid_first() {
        let allowance = Allowance::default();
        allowance.take(Duration::from_secs(100));
        assert!(allowance.is_open(), "there is no limit yet");
        allowance.set_rate(0.001);
        assert!(allowance.is_open(), "a burst is allowed");
        allowance.take(Duration::from_secs(100));
        assert!(!allowance.is_open());
        allowance.set_rate(f64::INFINITY);
        assert_eq!(allowance.spend(|| 7), 7);
        allowance.set_rate(0.001);
        assert!(allowance.is_open(), "what was unlimited is no debt");
    }

    /// What is earned is saved up to a limit.
    #[test]
    fn savings_are_limited() {
        let allowance = Allowance::default();
        allowance.set_rate(1e9);
        thread::sleep(Duration::from_millis(1));
        assert!(allowance.is_open());
        allowance.set_rate(1e-9);
        allowance.take(SAVINGS + LOOK_AGAIN);
        assert!(!allowance.is_open());
    }
}

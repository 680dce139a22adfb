//! How long to wait before a request is sent again.

use std::time::Duration;

/// The first pause at most; doubles with each failure.
const FIRST: Duration = Duration::from_secs(1);
/// Pauses do not grow further than this.
const LONGEST: Duration = Duration::from_secs(30);

/// Growing pauses between attempts that fail.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The pause after another failure. `retry_after` is what the receiver asked for: no pause is shorter.
    pub(super) fn pause(&mut self, retry_after: Option<Duration>) -> Duration {
        let longest = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        // A fleet whose receiver was away must not come back all at once: half of the pause is left to chance.
        let pause = longest / 2 + (longest / 2).mul_f64(fraction());
        match retry_after {
            Some(asked) if asked > pause => asked + asked.min(FIRST).mul_f64(fraction()),
            _ => pause,
        }
    }

    /// The receiver accepted something.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A number from 0 to 1, at random; a half where the system has no random numbers.
fn fraction() -> f64 {
    getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pauses grow up to their limit, are never shorter than asked for, and begin anew after a success.
    #[test]
    fn pauses_grow_and_are_bounded() {
        let mut backoff = Backoff::default();
        for longest in [1, 2, 4, 8, 16, 30, 30, 30].map(Duration::from_secs) {
            let pause = backoff.pause(None);
            assert!(pause >= longest / 2 && pause <= longest, "{pause:?} of {longest:?}");
        }
        let asked = Duration::from_secs(100);
        assert!(backoff.pause(Some(asked)) >= asked);
        backoff.reset();
        assert!(backoff.pause(None) <= FIRST);
        for _ in 0..100 {
            assert!(backoff.pause(Some(Duration::ZERO)) <= LONGEST);
        }
    }
}

//! Which waits' stacks are taken: as many as the ration allows, those that last longer the more often.

use profiler_common::abi::{
    sample::EventKind,
    waits::{FIRST_WAITS, Ration, ThreadWait, USED_SHIFT},
};

/// Time between two looks at the ration: about 16 ms, in nanoseconds.
const PERIOD: u64 = 1 << 24;
/// A stack, in the units of [`Ration::tokens`]: so that a ration of one per second earns one unit per nanosecond.
const STACK: u64 = 1_000_000_000;
/// What has to be earned before it says something: eight stacks.
const ENOUGH: u64 = 8 * STACK;
/// The ration that can be saved: this part of a second.
const BURST_DIVISOR: u64 = 4;
/// Most waits that one may stand for.
const MAX_WEIGHT: u64 = 1 << 16;
/// Expectations are at least this, nanoseconds: nothing is shorter.
const SHORTEST: u64 = 256;

/// What is to be done about a wait that begins.
pub enum Choice {
    /// Take its stack; it stands for so many waits.
    Stack(u32),
    /// Others stand for it.
    Represented,
    /// Its stack would be taken if the ration allowed it.
    Rationed,
}

/// Decides about a wait that begins, before anybody knows how long it will last. Where its place has no slot, there
/// is nothing that others could stand for it by. `rate`: stacks that this CPU may take per second; zero: all of them.
#[inline(always)]
pub fn choose(ration: &mut Ration, rate: u64, wait: &ThreadWait, now: u64) -> Choice {
    if rate == 0 {
        return Choice::Stack(1);
    }
    let elapsed = now.saturating_sub(ration.period_ns);
    if elapsed >= PERIOD {
        next_period(ration, now, elapsed, rate);
    }
    let mut weight = 1;
    if ration.threshold_ns != 0 && wait.site != 0 {
        let expected = if wait.expected_ns == 0 { ration.typical_ns } else { u64::from(wait.expected_ns) };
        let expected = if expected > SHORTEST { expected } else { SHORTEST };
        if expected < ration.threshold_ns {
            let random = random(ration);
            // Most are told apart without a division, which takes as long as all the rest.
            if (random >> 8) * ration.threshold_ns >= expected << 25 && ration.threshold_ns < expected * MAX_WEIGHT {
                return Choice::Represented;
            }
            weight = ration.threshold_ns / expected;
            if weight > MAX_WEIGHT {
                weight = MAX_WEIGHT;
            }
            if (random * weight) >> 32 != 0 {
                return Choice::Represented;
            }
        }
    }
    ration.wanted += 1;
    if ration.tokens < STACK {
        return Choice::Rationed;
    }
    ration.tokens -= STACK;
    Choice::Stack(weight as u32)
}

/// Pays out the ration of the time since the last period, and moves the threshold so that it will last.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn next_period(ration: &mut Ration, now: u64, elapsed: u64, rate: u64) {
    let capacity = (STACK / BURST_DIVISOR) * rate + 2 * STACK;
    let elapsed = if elapsed > STACK { STACK } else { elapsed };
    let earned = elapsed * rate;
    // (Unless everything is used up: that says enough.)
    if earned < ENOUGH && elapsed < STACK && ration.tokens >= STACK {
        return;
    }
    let tokens = ration.tokens + earned;
    ration.tokens = if tokens > capacity { capacity } else { tokens };
    // With little left, some is saved.
    let wanted = ration.wanted * STACK * if ration.tokens < capacity / 4 { 2 } else { 1 };
    if wanted > earned && ration.tokens < capacity / 2 {
        let threshold =
            if ration.threshold_ns > ration.typical_ns { ration.threshold_ns } else { ration.typical_ns + SHORTEST };
        let threshold = threshold / 4 * (wanted / (earned / 4));
        ration.threshold_ns = if threshold > 64 * STACK { 64 * STACK } else { threshold };
    } else if wanted < earned / 4 * 3 || ration.tokens > capacity / 4 * 3 {
        ration.threshold_ns -= ration.threshold_ns / 4;
        if ration.threshold_ns < SHORTEST {
            ration.threshold_ns = 0;
        }
    }
    ration.wanted = 0;
    ration.period_ns = now;
}

/// A random number of 32 bits (xorshift64, by Marsaglia): the kernel's helper takes longer than all the rest.
#[inline(always)]
fn random(ration: &mut Ration) -> u64 {
    let mut state = if ration.random == 0 { ration.compared_ns | 1 } else { ration.random };
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    ration.random = state;
    state >> 32
}

/// Whether a wait that begins is followed, and how many it stands for then, as a power of two: where they are thinned out,
/// the first ones of each unit of time, and one of `1 << share` after them.
///
/// How many are left out between two that are followed is drawn when one is, from zero to twice as many as on average,
/// since a number for each takes longer than to count down. Behind the first ones, the place between two is drawn that
/// any wait might be in.
#[inline(always)]
pub fn thin(ration: &mut Ration, wait: Option<&mut ThreadWait>, share: u32, now: u64) -> Option<u8> {
    if share == 0 {
        return Some(0);
    }
    let Some(wait) = wait else { return Some(0) };
    if wait.used != (now >> USED_SHIFT) as u32 {
        wait.begun = 0;
    }
    if wait.begun > FIRST_WAITS {
        wait.begun -= 1;
        return None;
    }
    Some(next_followed(ration, wait, share & 15))
}

#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
fn next_followed(ration: &mut Ration, wait: &mut ThreadWait, share: u32) -> u8 {
    // (One of them is in each such number of waits, on average.)
    let numbers = (2 << share) - 1;
    let between = (random(ration) * numbers) >> 32;
    if wait.begun == FIRST_WAITS {
        wait.begun = FIRST_WAITS + between as u8;
        return share as u8;
    }
    wait.begun += 1;
    if wait.begun == FIRST_WAITS {
        let other = (random(ration) * numbers) >> 32;
        let rest = if other < between { other } else { between };
        wait.begun = FIRST_WAITS + rest as u8;
    }
    0
}

/// Lets this CPU's totals and expectation learn from a wait that ended: it took `total`, and what it stands for was so
/// long blocked and queued.
#[inline(always)]
pub fn note_duration(ration: &mut Ration, kind: u8, total: u64, thinned: u8, blocked: u64, queued: u64) {
    ration.ended += 1 << thinned;
    ration.waited_ns[usize::from(kind & 7)] += blocked;
    ration.waited_ns[EventKind::RunQueue as usize] += queued;
    // A second is as good as forever.
    let bounded = if total > STACK { STACK } else { total };
    ration.typical_ns = ration.typical_ns - ration.typical_ns / 64 + bounded / 64;
}

//! Joins what waits cost with where they were.
//!
//! A wait's stack is taken when it begins, and reaches the agent with the next drain; what the wait cost is known
//! only when it ends, which may be hours later, and then reaches the agent under the key of the stack's row. So
//! stacks are kept as long as waits are under way in them. Waits that last are charged bit by bit, so that a thread
//! that is stuck is seen while it is stuck; what was charged before a wait ends is taken off its end.

use std::collections::HashMap;

use profiler_common::abi::{
    sample::{EventKind, SampleKey, StackEnd},
    waits::{MAX_SHARE, ThreadWait},
};

use crate::profile::{LocatedSample, Location, ProcessInfo, WaitDue, Waited};

/// Bytes of stacks that are kept, estimated. Those that have not been needed for longest go first.
const MAX_BYTES: usize = 16 << 20;
/// Estimated bytes of a kept stack besides its frames.
const STACK_BYTES: usize = 256;
/// Waits that are under way longer than this are charged before they end, nanoseconds.
const LONG_NS: u64 = 5_000_000_000;
/// Drains for which a stack is kept after its last wait: its place may be due something.
const KEEP_FOR: u64 = 4;
/// Drains after which what is to be taken off a row that never came is forgotten.
const OWED_FOR: u64 = 12;

/// What waits cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cost {
    count: u64,
    blocked_ns: u64,
    queued_ns: u64,
}

impl Cost {
    fn add(&mut self, other: Self) {
        self.count = self.count.saturating_add(other.count);
        self.blocked_ns = self.blocked_ns.saturating_add(other.blocked_ns);
        self.queued_ns = self.queued_ns.saturating_add(other.queued_ns);
    }

    /// Takes off as much of `owed` as there is; what remains is still owed.
    fn settle(&mut self, owed: &mut Self) {
        let settle = |cost: &mut u64, owed: &mut u64| {
            let part = (*cost).min(*owed);
            *cost -= part;
            *owed -= part;
        };
        settle(&mut self.count, &mut owed.count);
        settle(&mut self.blocked_ns, &mut owed.blocked_ns);
        settle(&mut self.queued_ns, &mut owed.queued_ns);
    }

    fn minus(self, other: Self) -> Self {
        Self {
            count: self.count.saturating_sub(other.count),
            blocked_ns: self.blocked_ns.saturating_sub(other.blocked_ns),
            queued_ns: self.queued_ns.saturating_sub(other.queued_ns),
        }
    }

    fn is_zero(self) -> bool {
        self == Self::default()
    }
}

/// A stack in which waits are under way.
struct Known {
    sample: LocatedSample,
    /// Sampled waits that began and have not ended.
    open: i64,
    /// The last drain that needed it.
    used: u64,
}

/// A wait that was charged while it is under way.
struct Progress {
    began_ns: u64,
    key: SampleKey,
    charged: Cost,
}

/// Sizes and events of a [`WaitBook`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitStats {
    /// Stacks that are kept.
    pub stacks: usize,
    /// Bytes of them, estimated.
    pub bytes: usize,
    /// Stacks that were dropped for the budget.
    pub evicted: u64,
    /// Waits whose stack was not known any more when they ended, or was lost.
    pub forgotten: u64,
}

/// The waits that are under way.
#[derive(Default)]
pub struct WaitBook {
    known: HashMap<SampleKey, Known>,
    bytes: usize,
    /// What this drain's rows cost.
    drained: HashMap<SampleKey, Cost>,
    /// Who waited, for rows whose stack is not known.
    strangers: HashMap<SampleKey, LocatedSample>,
    progress: HashMap<u32, Progress>,
    /// What was charged of waits that have ended, with the drain that found out.
    owed: HashMap<SampleKey, (Cost, u64)>,
    drain: u64,
    /// Since when waits are charged.
    since_ns: u64,
    stats: WaitStats,
}

impl WaitBook {
    /// Takes a row of a drain. `is_reference`: its stack is that of an earlier row.
    pub fn add(&mut self, key: SampleKey, count: u64, waited: Waited, is_reference: bool, sample: LocatedSample) {
        self.drained.entry(key).or_default().add(Cost {
            count,
            blocked_ns: waited.blocked_ns,
            queued_ns: waited.queued_ns,
        });
        let open = i64::from(waited.began) - i64::from(waited.ended);
        let drain = self.drain;
        if let Some(known) = self.known.get_mut(&key) {
            known.open += open;
            known.used = drain;
        } else if is_reference {
            // The stack itself may be among the rows that are still to come.
            match self.strangers.get_mut(&key) {
                Some(stranger) => stranger.count += u64::from(waited.ended),
                None => {
                    let sample = LocatedSample { count: u64::from(waited.ended), ..sample };
                    self.strangers.insert(key, sample);
                }
            }
        } else {
            // What ended before its stack was known has been counted as a stranger.
            let ended = self.strangers.remove(&key).map_or(0, |stranger| stranger.count);
            self.bytes += bytes_of(&sample);
            let open = open - i64::try_from(ended).unwrap_or(i64::MAX);
            self.known.insert(key, Known { sample, open, used: drain });
        }
    }

    /// Takes what a place of rationed waits is due, or owes. `stranger` makes the sample for a place whose stack is not
    /// known.
    pub fn add_due(&mut self, due: &WaitDue, stranger: impl FnOnce() -> LocatedSample) {
        let key = if self.known.contains_key(&due.key) {
            due.key
        } else {
            let key = SampleKey { hash: u64::from(due.tag), tgid: due.key.tgid, shape: 0 };
            self.strangers.entry(key).or_insert_with(stranger);
            key
        };
        let part = |balance: i64| u64::try_from(balance).unwrap_or(0);
        let drained = self.drained.entry(key).or_default();
        drained.add(Cost { count: 0, blocked_ns: part(due.blocked_ns), queued_ns: part(due.queued_ns) });
        let owed = Cost {
            count: 0,
            blocked_ns: part(due.blocked_ns.saturating_neg()),
            queued_ns: part(due.queued_ns.saturating_neg()),
        };
        if !owed.is_zero() {
            self.owe(key, owed);
        }
    }

    /// Ends a drain: what waits cost since the last one. `threads` are those that wait at `now_ns`, read after the
    /// rows; all that are under way are charged where `is_last`, otherwise those that last.
    pub fn settle(&mut self, threads: &HashMap<u32, ThreadWait>, now_ns: u64, is_last: bool) -> Vec<LocatedSample> {
        self.collect_ended(threads);
        let least = if is_last { 0 } else { LONG_NS };
        for (&thread, wait) in threads {
            if wait.weight != 0 && now_ns.saturating_sub(wait.began_ns) >= least {
                self.charge(thread, wait, now_ns);
            }
        }
        let mut samples = Vec::new();
        for (key, mut cost) in std::mem::take(&mut self.drained) {
            if let Some((owed, _)) = self.owed.get_mut(&key) {
                cost.settle(owed);
            }
            let sample = match (self.known.get(&key), self.strangers.get(&key)) {
                (Some(known), _) => &known.sample,
                (None, Some(stranger)) => {
                    self.stats.forgotten += u64::from(stranger.end == StackEnd::Forgotten) * cost.count;
                    stranger
                }
                (None, None) => continue,
            };
            emit(sample, cost, &mut samples);
        }
        self.strangers.clear();
        let (drain, bytes) = (self.drain, &mut self.bytes);
        self.owed.retain(|_, (owed, since)| !owed.is_zero() && drain - *since < OWED_FOR);
        self.known.retain(|_, known| {
            let keep = known.open > 0 || drain - known.used < KEEP_FOR;
            if !keep {
                *bytes -= bytes_of(&known.sample);
            }
            keep
        });
        self.evict();
        self.drain += 1;
        samples
    }

    /// Goes on as if all waits that are under way began now: what they have cost was settled, with all of them as the last.
    /// Some of them may end unseen, so how many there are is counted anew.
    pub fn restart(&mut self, threads: &HashMap<u32, ThreadWait>, now_ns: u64) {
        self.since_ns = now_ns;
        self.progress.clear();
        self.known.values_mut().for_each(|known| known.open = 0);
        for wait in threads.values().filter(|wait| wait.weight != 0) {
            if let Some(known) = self.known.get_mut(&wait.key) {
                known.open += 1;
            }
        }
    }

    /// A book without waits, which goes on counting where this one ends.
    pub fn successor(&self) -> Self {
        Self { stats: self.stats, ..Self::default() }
    }

    /// The process and the cgroup in which a stack was taken, if it is kept.
    pub fn process(&self, key: &SampleKey) -> Option<&ProcessInfo> {
        self.known.get(key).map(|known| &*known.sample.process)
    }

    /// Sizes and events so far.
    pub fn stats(&self) -> WaitStats {
        WaitStats { stacks: self.known.len(), bytes: self.bytes, ..self.stats }
    }

    /// Notes what is owed for waits that were charged and have ended since.
    fn collect_ended(&mut self, threads: &HashMap<u32, ThreadWait>) {
        let mut ended = Vec::new();
        self.progress.retain(|thread, progress| {
            let goes_on = threads.get(thread).is_some_and(|wait| wait.began_ns == progress.began_ns);
            if !goes_on {
                ended.push((progress.key, progress.charged));
            }
            goes_on
        });
        for (key, charged) in ended {
            self.owe(key, charged);
        }
    }

    /// Notes what is to be taken off a stack's next costs.
    fn owe(&mut self, key: SampleKey, cost: Cost) {
        let (owed, since) = self.owed.entry(key).or_insert((Cost::default(), self.drain));
        owed.add(cost);
        *since = self.drain;
    }

    /// Charges what a wait that is under way has cost since it was charged last.
    fn charge(&mut self, thread: u32, wait: &ThreadWait, now_ns: u64) {
        let Some(known) = self.known.get_mut(&wait.key) else { return };
        known.used = self.drain;
        let total = now_ns.saturating_sub(wait.began_ns.max(self.since_ns));
        let queued = match wait.ready_ns {
            _ if wait.kind == EventKind::RunQueue as u8 => total,
            0 => 0,
            woken => now_ns.saturating_sub(woken).min(total),
        };
        // What others are due for which no stack was taken is in their place's balance: only those count that are not known.
        let unknown = 1_u64 << wait.thinned.min(MAX_SHARE as u8);
        let cost = Cost {
            count: u64::from(wait.weight),
            blocked_ns: total.saturating_sub(queued).saturating_mul(unknown),
            queued_ns: queued.saturating_mul(unknown),
        };
        let progress = self.progress.entry(thread).or_insert(Progress {
            began_ns: wait.began_ns,
            key: wait.key,
            charged: Cost::default(),
        });
        self.drained.entry(wait.key).or_default().add(cost.minus(progress.charged));
        progress.charged = cost;
    }

    /// Drops the stacks that have not been needed for longest until the budget holds.
    fn evict(&mut self) {
        if self.bytes <= MAX_BYTES {
            return;
        }
        let mut by_use: Vec<(u64, SampleKey)> = self.known.iter().map(|(key, known)| (known.used, *key)).collect();
        by_use.sort_unstable_by_key(|&(used, _)| used);
        for (_, key) in by_use {
            // Some more than needed, so that not every drain has to sort.
            if self.bytes <= MAX_BYTES / 8 * 7 {
                break;
            }
            if let Some(known) = self.known.remove(&key) {
                self.bytes -= bytes_of(&known.sample);
                self.stats.evicted += 1;
            }
        }
    }
}

/// The samples of a row: the time blocked under its own kind, the time waiting for a CPU under that.
fn emit(sample: &LocatedSample, cost: Cost, into: &mut Vec<LocatedSample>) {
    for (kind, time_ns) in [(sample.kind, cost.blocked_ns), (EventKind::RunQueue, cost.queued_ns)] {
        if time_ns != 0 {
            into.push(LocatedSample { kind, count: cost.count, time_ns, ..sample.clone() });
        }
    }
}

fn bytes_of(sample: &LocatedSample) -> usize {
    STACK_BYTES + sample.locations.len() * size_of::<Location>()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use profiler_common::abi::process::ProcessKey;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn sample(frames: usize, end: StackEnd) -> LocatedSample {
        let key = ProcessKey { start_time_ns: 1, tgid: 7, exec_id: 0 };
        LocatedSample {
            process: Arc::new(ProcessInfo { key, name: "p".to_owned(), cgroup: None }),
            thread_name: "t".into(),
            kind: EventKind::Blocked,
            end,
            locations: vec![Location::Kernel(1); frames],
            count: 0,
            time_ns: 0,
        }
    }

    fn key(hash: u64) -> SampleKey {
        SampleKey { hash, tgid: 7, shape: 3 }
    }

    /// A row with a stack.
    fn begin(book: &mut WaitBook, hash: u64, began: u32, ended: u32, blocked_ns: u64) {
        let waited = Waited { blocked_ns, queued_ns: 0, began, ended };
        book.add(key(hash), u64::from(ended), waited, false, sample(3, StackEnd::Root));
    }

    /// A row that refers to a stack.
    fn end(book: &mut WaitBook, hash: u64, blocked_ns: u64, queued_ns: u64) {
        let waited = Waited { blocked_ns, queued_ns, began: 0, ended: 1 };
        book.add(key(hash), 1, waited, true, sample(0, StackEnd::Forgotten));
    }

    fn waiting(began_ns: u64, hash: u64) -> HashMap<u32, ThreadWait> {
        let wait =
            ThreadWait { began_ns, key: key(hash), weight: 1, kind: EventKind::Blocked as u8, ..ThreadWait::default() };
        HashMap::from([(9, wait)])
    }

    fn nobody() -> HashMap<u32, ThreadWait> {
        HashMap::new()
    }

    /// Kind, frames and time of what a drain yields.
    fn settle(
        book: &mut WaitBook,
        threads: &HashMap<u32, ThreadWait>,
        now: u64,
        is_last: bool,
    ) -> Vec<(EventKind, usize, u64)> {
        let mut samples: Vec<_> = book
            .settle(threads, now, is_last)
            .iter()
            .map(|sample| (sample.kind, sample.locations.len(), sample.time_ns))
            .collect();
        samples.sort_unstable();
        samples
    }

    /// A wait that ends in a later drain finds its stack, in whatever order the rows come; then it is dropped.
    #[test]
    fn a_wait_that_ends_later_finds_its_stack() {
        let mut book = WaitBook::default();
        begin(&mut book, 1, 1, 0, 0);
        assert_eq!(settle(&mut book, &nobody(), 0, false), []);
        assert_eq!(book.stats().stacks, 1);
        end(&mut book, 1, 40, 2);
        let expected = [(EventKind::Blocked, 3, 40), (EventKind::RunQueue, 3, 2)];
        assert_eq!(settle(&mut book, &nobody(), 0, false), expected);

        end(&mut book, 2, 5, 0);
        begin(&mut book, 2, 1, 0, 0);
        assert_eq!(settle(&mut book, &nobody(), 0, false), [(EventKind::Blocked, 3, 5)]);
        for _ in 0..=KEEP_FOR {
            settle(&mut book, &nobody(), 0, false);
        }
        assert_eq!((book.stats().stacks, book.stats().bytes), (0, 0));
    }

    /// What ends without its stack is still charged to its process.
    #[test]
    fn an_unknown_stack_keeps_its_time() {
        let mut book = WaitBook::default();
        end(&mut book, 1, 40, 0);
        assert_eq!(settle(&mut book, &nobody(), 0, false), [(EventKind::Blocked, 0, 40)]);
        assert_eq!(book.stats().forgotten, 1);
    }

    /// A wait that lasts is charged bit by bit, and once altogether, whenever its end is noticed.
    #[test]
    fn a_long_wait_is_charged_once() {
        let mut book = WaitBook::default();
        begin(&mut book, 1, 1, 0, 0);
        assert_eq!(settle(&mut book, &waiting(SECOND, 1), 2 * SECOND, false), [], "too short to be charged early");
        let now = 7 * SECOND;
        assert_eq!(settle(&mut book, &waiting(SECOND, 1), now, false), [(EventKind::Blocked, 3, 6 * SECOND)]);
        assert_eq!(settle(&mut book, &waiting(SECOND, 1), now + 5, false), [(EventKind::Blocked, 3, 5)]);
        // It ended, but its row comes with the next drain.
        assert_eq!(settle(&mut book, &nobody(), now + 9, false), []);
        end(&mut book, 1, 6 * SECOND + 8, 0);
        assert_eq!(settle(&mut book, &nobody(), now + 20, false), [(EventKind::Blocked, 3, 3)]);
        assert_eq!((book.owed.len(), book.progress.len()), (0, 0));
    }

    /// What a place is due goes to its stack, or to its process; what it owes is taken off its stack's next cost.
    #[test]
    fn balances_places() {
        let due = |hash, blocked_ns| WaitDue { tag: 5, key: key(hash), blocked_ns, queued_ns: 0 };
        let unknown = || sample(0, StackEnd::Rationed);
        let mut book = WaitBook::default();
        begin(&mut book, 1, 1, 1, 10);
        book.add_due(&due(1, 4), unknown);
        assert_eq!(settle(&mut book, &nobody(), 0, false), [(EventKind::Blocked, 3, 14)]);
        book.add_due(&due(1, -3), unknown);
        book.add_due(&due(2, 6), unknown);
        assert_eq!(settle(&mut book, &nobody(), 0, false), [(EventKind::Blocked, 0, 6)]);
        begin(&mut book, 1, 1, 1, 10);
        assert_eq!(settle(&mut book, &nobody(), 0, false), [(EventKind::Blocked, 3, 7)]);
    }

    /// The last drain charges everything that is under way.
    #[test]
    fn the_last_drain_charges_what_is_under_way() {
        let mut book = WaitBook::default();
        begin(&mut book, 1, 2, 1, 10);
        assert_eq!(settle(&mut book, &waiting(100, 1), 130, true), [(EventKind::Blocked, 3, 40)]);
    }

    /// Where turns end, what has been waited is charged, and the rest of it later, also of waits that went on unseen
    /// meanwhile; stacks of those that ended unseen are dropped.
    #[test]
    fn waits_restart() {
        let mut book = WaitBook::default();
        begin(&mut book, 1, 1, 0, 0);
        begin(&mut book, 2, 1, 0, 0);
        let threads = waiting(SECOND, 1);
        assert_eq!(settle(&mut book, &threads, 3 * SECOND, true), [(EventKind::Blocked, 3, 2 * SECOND)]);
        book.restart(&threads, 3 * SECOND);
        for _ in 0..=KEEP_FOR {
            assert_eq!(settle(&mut book, &nobody(), 0, false), []);
        }
        assert_eq!(book.stats().stacks, 1);
        // As when its turn begins.
        book.restart(&threads, 60 * SECOND);
        assert_eq!(settle(&mut book, &threads, 64 * SECOND, false), [(EventKind::Blocked, 3, 4 * SECOND)]);
        end(&mut book, 1, 5 * SECOND, 0);
        assert_eq!(settle(&mut book, &nobody(), 66 * SECOND, false), [(EventKind::Blocked, 3, SECOND)]);
    }

    /// The budget holds; what was needed last stays.
    #[test]
    fn evicts_what_was_not_needed_for_longest() {
        let mut book = WaitBook::default();
        let each = bytes_of(&sample(1000, StackEnd::Root));
        let fitting = MAX_BYTES / each;
        for hash in 0..2 * fitting as u64 {
            let waited = Waited { began: 1, ..Waited::default() };
            book.add(key(hash), 0, waited, false, sample(1000, StackEnd::Root));
            if hash == fitting as u64 / 2 {
                book.settle(&nobody(), 0, false);
            }
        }
        book.settle(&nobody(), 0, false);
        let stats = book.stats();
        assert!(stats.bytes <= MAX_BYTES && stats.evicted > 0, "{stats:?}");
        assert!(!book.known.contains_key(&key(0)) && book.known.len() * each == book.bytes);
    }
}

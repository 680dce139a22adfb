//! Keeps profiling within its budget: how closely the machine is looked at follows from what that costs.
//!
//! In: what was spent, second by second, and how much memory is used. Out: an [`Effort`]. When the budget is passed, the
//! sampling rate falls, and with it the ration of waits' stacks and the share of waits that are followed; then details
//! (source lines, inlined functions) go. Where threads are switched so often that it takes most of the budget to call a
//! program each time, whatever it does, no waits are followed. When there has been room for a while, all of it comes
//! back, and slower each time that it was too early. Caches shrink before memory runs out.

use std::collections::VecDeque;

use profiler_common::abi::waits::MAX_SHARE;

use super::{effort::Effort, spending::Spent};

/// Seconds over which the kernel programs' cost is averaged: it is steady.
const PROGRAMS_SECONDS: usize = 3;
/// Seconds over which the agent's own cost is averaged: it comes in bursts, since windows are named and encoded at once.
const AGENT_SECONDS: usize = 15;
/// What the last of these seconds count against all of them.
const RECENT_SECONDS: usize = 5;
const RECENT_PART: f64 = 0.6;
/// Part of the budget that is aimed at, so that what varies does not pass it.
const AIM: f64 = 0.7;
/// What more would cost may take this part of the budget.
const ROOM: f64 = 0.8;
/// Part of the budget that reading symbols and building unwind tables may take: see [`crate::allowance`].
pub(super) const FILES_PART: f64 = 0.3;
/// The sampling rate falls to this part of what is wanted, and no further: with less, nothing is to be seen, and what is left
/// of the cost is for other things.
const LEAST_PART: u64 = 5;
/// What a switch costs of which nothing is recorded, CPU seconds, and what part of the budget may be spent on that. (Linux
/// 6.18 in a virtual machine: 88 to 92 ns by the kernel's books, most of it to call the program and to return.)
const LEAST_SWITCH: f64 = 90e-9;
const MOST_FOR_SWITCHES: f64 = 0.8;
/// How much is added when there is.
const STEP: f64 = 1.5;
/// The least that one correction leaves; and the first one, if it is for what may be a burst of the agent's: that is one
/// which was quiet for some seconds.
const LARGEST_CUT: f64 = 0.1;
const LARGEST_FIRST_CUT: f64 = 0.5;
const BURST: u32 = 10;
/// Seconds after the begin in which what the agent does itself counts for this part of the budget at most: it gets to know
/// what is there.
const BEGIN: u32 = 30;
const BEGIN_PART: f64 = 0.3;
/// Seconds after a change for which its effect is not known yet.
const SETTLING: u32 = 3;
/// Seconds that there has to be room for before more is done: at first, and at most.
const PATIENCE: u32 = 15;
const MOST_PATIENCE: u32 = 600;
/// Seconds after more was done in which passing the budget shows that it was too much.
const PROBATION: u32 = 60;
/// What a ration of all stacks counts as when it has to be lowered.
const ALL_STACKS: u32 = 1000;
/// Least bytes for names: less does not hold one large program's symbols.
const LEAST_NAMES: usize = 8 << 20;
/// Parts of the memory budget at which caches shrink, and may grow again.
const MEMORY_HIGH: f64 = 0.9;
const MEMORY_LOW: f64 = 0.6;
/// Seconds of low memory before caches grow again, and between two steps down.
const MEMORY_PATIENCE: u32 = 60;
const MEMORY_SETTLING: u32 = 5;

/// The control loop.
pub struct Governor {
    /// CPU seconds per second.
    budget: f64,
    memory: usize,
    wanted: Effort,
    effort: Effort,
    spent: VecDeque<Spent>,
    /// Seconds since the last change.
    since_change: u32,
    /// Whether the last change was to do more.
    did_more: bool,
    /// Seconds that there has been room for.
    calm: u32,
    patience: u32,
    memory_calm: u32,
    memory_settling: u32,
    /// Whether memory alone has put details off.
    short_of_memory: bool,
    /// Seconds since collection began.
    since_begin: u32,
}

impl Governor {
    /// Keeps to `cpu` CPU seconds per second and `memory` bytes, and does what is wanted where that is possible.
    pub fn new(cpu: f64, memory: usize, wanted: Effort) -> Self {
        Self {
            budget: cpu,
            memory,
            wanted,
            effort: wanted,
            spent: VecDeque::new(),
            since_change: MOST_PATIENCE,
            did_more: false,
            calm: 0,
            patience: PATIENCE,
            memory_calm: 0,
            memory_settling: 0,
            short_of_memory: false,
            since_begin: 0,
        }
    }

    /// Collection begins, or begins again.
    pub fn begin(&mut self) {
        self.since_begin = 0;
    }

    /// What is done now.
    pub fn effort(&self) -> Effort {
        self.effort
    }

    /// The sampling rate below which nothing is given up any more.
    pub fn least_frequency(&self) -> u64 {
        (self.wanted.frequency / LEAST_PART).max(1)
    }

    /// What may be spent, CPU seconds per second.
    pub fn budget(&self) -> f64 {
        self.budget
    }

    /// What the last seconds cost, CPU seconds per second. Files count for what they may cost in the long run: bursts of
    /// them end by themselves, whatever is done here.
    pub fn cost(&self) -> f64 {
        let programs = self.average(PROGRAMS_SECONDS, Spent::programs);
        let agent = |spent: &Spent| spent.agent;
        let agent = self.average(AGENT_SECONDS, agent).max(RECENT_PART * self.average(RECENT_SECONDS, agent));
        let files = self.average(AGENT_SECONDS, |spent| spent.files).min(self.budget * FILES_PART);
        programs + agent + files
    }

    /// Takes note of what the last second cost, and of the memory that is used. `is_reached`: the effort is what was decided
    /// last; until it is, nothing more is decided. Returns whether the effort changes.
    pub fn observe(&mut self, spent: Spent, memory: Option<usize>, is_reached: bool) -> bool {
        let before = self.effort;
        self.since_begin = self.since_begin.saturating_add(1);
        let most = if self.since_begin <= BEGIN { self.budget * BEGIN_PART * spent.elapsed } else { f64::INFINITY };
        self.spent.push_back(Spent { agent: spent.agent.min(most), ..spent });
        if self.spent.len() > AGENT_SECONDS {
            self.spent.pop_front();
        }
        if !is_reached {
            self.since_change = 0;
            return false;
        }
        self.since_change = self.since_change.saturating_add(1);
        if let Some(memory) = memory {
            self.keep_memory(memory);
        }
        if self.since_change >= SETTLING {
            self.keep_time();
        }
        self.effort != before
    }

    fn keep_time(&mut self) {
        let cost = self.cost();
        if cost > self.budget {
            self.calm = 0;
            if self.did_more && self.since_change < PROBATION {
                self.patience = (self.patience * 2).min(MOST_PATIENCE);
            }
            self.do_less(cost);
        } else if let Some(more) = self.more(cost) {
            self.calm += 1;
            if self.calm >= self.patience {
                self.effort = more;
                self.changed(true);
            }
        } else {
            self.calm = 0;
            if self.effort == self.wanted_now() && self.since_change > MOST_PATIENCE {
                self.patience = PATIENCE;
            }
        }
    }

    /// What would be done if time were no object.
    fn wanted_now(&self) -> Effort {
        Effort {
            names_bytes: self.effort.names_bytes,
            detail: self.wanted.detail && !self.short_of_memory,
            ..self.wanted
        }
    }

    /// The next step up, if it would fit as far as that can be told: the rate and what depends on it come before waits.
    fn more(&self, cost: f64) -> Option<Effort> {
        let wanted = self.wanted_now();
        let fits = |cost: f64| cost < self.budget * ROOM;
        let (now, switches) = (self.effort, self.average(PROGRAMS_SECONDS, |spent| spent.switches));
        let mut more = self.sampled_more();
        if more == now || !fits((cost - switches) * STEP + switches) {
            let least = self.average(PROGRAMS_SECONDS, |spent| spent.switched) * LEAST_SWITCH;
            let (share, then) = match now.wait_share {
                Some(share) => (Some(share.saturating_sub(1)).max(wanted.wait_share), least + (switches - least) * 2.0),
                None => (Some(MAX_SHARE), least),
            };
            more = Effort { wait_share: share, ..now };
            if !fits(cost - switches + then) {
                return None;
            }
        }
        (more != now).then_some(more)
    }

    /// What is done now, but with more samples, stacks of waits and details.
    fn sampled_more(&self) -> Effort {
        let (wanted, mut effort) = (self.wanted_now(), self.effort);
        if effort.detail != wanted.detail && effort.frequency * 2 >= wanted.frequency {
            effort.detail = wanted.detail;
        }
        effort.frequency = (scaled(effort.frequency, STEP) + 1).min(wanted.frequency);
        effort.wait_stacks = match (effort.wait_stacks, wanted.wait_stacks) {
            (0, _) => 0,
            (stacks, 0) if stacks >= ALL_STACKS => 0,
            (stacks, 0) => (stacks + stacks / 2 + 1).min(ALL_STACKS),
            (stacks, most) => (stacks + stacks / 2 + 1).min(most),
        };
        effort
    }

    fn do_less(&mut self, cost: f64) {
        let before = self.effort;
        let average = |part: fn(&Spent) -> f64| self.average(PROGRAMS_SECONDS, part);
        let (switches, programs) = (average(|spent| spent.switches), average(Spent::programs));
        let scalable = (cost - switches).max(0.0);
        let (followed, fixed) = self.fewer_waits(scalable);
        self.effort.wait_share = followed;
        if fixed + scalable > self.budget {
            // What the agent does itself may be a burst: of processes that have just been started, for instance.
            let may_end = fixed + programs - switches < self.budget && self.since_change > BURST;
            let most = if may_end { LARGEST_FIRST_CUT } else { LARGEST_CUT };
            let part = ((self.budget - fixed).max(0.0) * AIM / scalable).max(most);
            let least = self.least_frequency();
            self.effort.frequency = scaled(self.effort.frequency, part).max(least);
            let stacks = if self.effort.wait_stacks == 0 { ALL_STACKS } else { self.effort.wait_stacks };
            self.effort.wait_stacks = scaled(u64::from(stacks), part).max(1).try_into().unwrap_or(u32::MAX);
            self.effort.detail &= self.effort.frequency > least && part > 0.5;
        }
        if self.effort != before {
            self.changed(false);
        }
    }

    /// The share of waits to follow, and what switches will cost then: that does not depend on how many stacks are taken, and
    /// a part of it does not on how many waits are followed. `scalable`: what falls with the sampling rate.
    fn fewer_waits(&self, scalable: f64) -> (Option<u32>, f64) {
        // (The average may be of a time when there were less.)
        let lately = |part: fn(&Spent) -> f64| self.average(PROGRAMS_SECONDS, part).max(self.average(1, part));
        let switches = lately(|spent| spent.switches);
        let Some(share) = self.effort.wait_share.filter(|_| switches > self.budget / 2.0) else {
            return (self.effort.wait_share, switches);
        };
        let least = lately(|spent| spent.switched) * LEAST_SWITCH;
        let is_least = share == MAX_SHARE && self.effort.frequency <= self.least_frequency();
        if is_least || least > self.budget * MOST_FOR_SWITCHES {
            return (None, 0.0);
        }
        let then = |share_then: u32| least + (switches - least).max(0.0) / f64::from(1_u32 << (share_then - share));
        // Half of the samples are worth more than half of the waits, and the other half is not.
        let suffices = |share_then: &u32| then(*share_then) + scalable / 2.0 < self.budget * 0.9;
        let next = (share + 1..=MAX_SHARE).find(suffices).unwrap_or(MAX_SHARE);
        (Some(next), then(next))
    }

    fn changed(&mut self, did_more: bool) {
        self.since_change = 0;
        self.did_more = did_more;
        self.calm = 0;
        // What the programs cost before says nothing any more.
        for spent in &mut self.spent {
            *spent = Spent {
                elapsed: spent.elapsed,
                switched: spent.switched,
                agent: spent.agent.min(self.budget * AIM * spent.elapsed),
                files: spent.files,
                ..Spent::default()
            };
        }
    }

    fn keep_memory(&mut self, memory: usize) {
        let used = memory as f64 / self.memory as f64;
        self.memory_settling = self.memory_settling.saturating_sub(1);
        if used > MEMORY_HIGH {
            self.memory_calm = 0;
            if self.memory_settling > 0 {
                return;
            }
            self.memory_settling = MEMORY_SETTLING;
            if self.effort.names_bytes > LEAST_NAMES {
                self.effort.names_bytes = (self.effort.names_bytes / 2).max(LEAST_NAMES);
            } else if self.effort.detail {
                self.short_of_memory = true;
                self.effort.detail = false;
            }
        } else if used < MEMORY_LOW {
            self.memory_calm += 1;
            if self.memory_calm < MEMORY_PATIENCE {
                return;
            }
            self.memory_calm = 0;
            if self.effort.names_bytes < self.wanted.names_bytes {
                self.effort.names_bytes = (self.effort.names_bytes * 2).min(self.wanted.names_bytes);
            } else {
                self.short_of_memory = false;
            }
        } else {
            self.memory_calm = 0;
        }
    }

    /// The average of the last `seconds` observations, per second. What is not known was nothing.
    fn average(&self, seconds: usize, part: impl Fn(&Spent) -> f64) -> f64 {
        let last = || self.spent.iter().rev().take(seconds);
        let elapsed: f64 = last().map(|spent| spent.elapsed).sum();
        last().map(part).sum::<f64>() / elapsed.max(seconds as f64)
    }
}

fn scaled(number: u64, factor: f64) -> u64 {
    (number as f64 * factor) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPU seconds per second: 1 % of two CPUs.
    const BUDGET: f64 = 0.02;
    const WANTED: Effort =
        Effort { frequency: 99, wait_stacks: 50, wait_share: Some(0), detail: true, names_bytes: 32 << 20 };

    /// A machine on which things cost so much, in CPU seconds.
    #[derive(Clone, Copy, Default)]
    struct Machine {
        /// Of the agent, whatever it does.
        fixed: f64,
        /// Of one sample: in the kernel, and in the agent.
        sample: f64,
        handling: f64,
        /// Of all switches in a second, and of a stack of a wait.
        switches: f64,
        stack: f64,
    }

    impl Machine {
        fn spend(&self, effort: &Effort) -> Spent {
            let (samples, stacks) = (effort.frequency as f64, f64::from(effort.wait_stacks));
            Spent {
                elapsed: 1.0,
                files: 0.0,
                agent: self.fixed + self.handling * samples,
                samples: self.sample * samples,
                // (Half of what a switch costs is that a program is called.)
                switches: effort
                    .wait_share
                    .map_or(0.0, |share| self.switches * (0.5 + 0.5 / f64::from(1_u32 << share))),
                switched: self.switches / 2.0 / LEAST_SWITCH,
                wait_stacks: self.stack * stacks,
                notices: 0.0,
            }
        }

        /// Runs for so many seconds; returns what each cost.
        fn run(&self, governor: &mut Governor, seconds: u32) -> Vec<f64> {
            let mut costs = Vec::new();
            for _ in 0..seconds {
                let spent = self.spend(&governor.effort());
                costs.push(spent.total());
                governor.observe(spent, None, true);
            }
            costs
        }
    }

    /// What is cheap is done in full, for ever.
    #[test]
    fn cheap_work_is_left_alone() {
        let mut governor = Governor::new(BUDGET, 1 << 30, WANTED);
        Machine { fixed: 0.005, sample: 5e-6, ..Machine::default() }.run(&mut governor, 1000);
        assert_eq!(governor.effort(), WANTED);
    }

    /// A window that is encoded once in a while is no reason to do less.
    #[test]
    fn bursts_are_averaged() {
        let mut governor = Governor::new(BUDGET, 1 << 30, WANTED);
        for second in 0..300 {
            let agent = if second % 15 == 0 { 0.12 } else { 0.004 };
            governor.observe(Spent { elapsed: 1.0, agent, ..Spent::default() }, None, true);
        }
        assert_eq!(governor.effort(), WANTED);
    }

    /// Whatever is expensive, the budget holds within a few seconds, and from then on but for a try now and then.
    #[test]
    fn expensive_work_is_cut_down() {
        let machines = [
            ("deep stacks", Machine { fixed: 0.002, sample: 5e-4, ..Machine::default() }),
            ("switches", Machine { fixed: 0.002, switches: 0.03, stack: 2e-5, ..Machine::default() }),
            ("a switch storm", Machine { fixed: 0.005, switches: 0.05, stack: 1e-4, ..Machine::default() }),
            ("handling", Machine { fixed: 0.002, handling: 5e-4, ..Machine::default() }),
            ("everything", Machine { fixed: 0.004, sample: 2e-4, handling: 2e-4, switches: 0.02, stack: 1e-4 }),
        ];
        for (name, machine) in machines {
            let mut governor = Governor::new(BUDGET, 1 << 30, WANTED);
            let costs = machine.run(&mut governor, 1200);
            // (The costs of the agent before the first correction are averaged away by then.)
            let late: Vec<f64> = costs.iter().copied().skip(10).collect();
            let over = late.iter().filter(|&&cost| cost > BUDGET).count();
            let mean = late.iter().sum::<f64>() / late.len() as f64;
            println!("{name}: mean {:.1} ms/s, {over} s over, {:?}", mean * 1e3, governor.effort());
            assert!(mean < BUDGET, "{name}: mean {mean}");
            assert!(over < late.len() / 20, "{name}: {over} seconds over the budget");
            assert!(mean > BUDGET / 4.0, "{name}: {mean}: more would be possible");
        }
    }

    /// When the load is over, everything comes back.
    #[test]
    fn effort_comes_back() {
        let mut governor = Governor::new(BUDGET, 1 << 30, WANTED);
        Machine { sample: 2e-3, switches: 0.2, stack: 1e-3, ..Machine::default() }.run(&mut governor, 120);
        assert_ne!(governor.effort(), WANTED);
        Machine { sample: 5e-6, switches: 1e-5, ..Machine::default() }.run(&mut governor, 2 * MOST_PATIENCE);
        assert_eq!(governor.effort(), WANTED);
    }

    /// Names make room before memory runs out, then details, and both come back.
    #[test]
    fn caches_shrink_first() {
        let mut governor = Governor::new(BUDGET, 100 << 20, WANTED);
        let idle = Spent { elapsed: 1.0, ..Spent::default() };
        for _ in 0..10 {
            governor.observe(idle, Some(95 << 20), true);
        }
        let shrunk = governor.effort();
        assert!(shrunk.names_bytes < WANTED.names_bytes && shrunk.detail);
        for _ in 0..60 {
            governor.observe(idle, Some(95 << 20), true);
        }
        let least = governor.effort();
        assert!(least.names_bytes == LEAST_NAMES && !least.detail, "{least:?}");
        assert_eq!(least.frequency, WANTED.frequency);
        for _ in 0..600 {
            governor.observe(idle, Some(30 << 20), true);
        }
        assert_eq!(governor.effort(), WANTED);
    }
}

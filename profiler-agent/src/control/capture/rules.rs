//! What triggers a capture: something that a container uses is above a threshold for some time.
//!
//! In: what containers have used so far, as often as somebody looks. Out: triggers. A rule that has fired for a container
//! fires again only after it was below its threshold. How often captures may run is not its business.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Capture,
    usage::{Resource, Usage},
};

/// Containers that are watched at most.
pub const MAX_CONTAINERS: usize = 4096;
/// How long a container that nobody asks about is remembered, in addition to three intervals.
const FORGET_AFTER: Duration = Duration::from_secs(60);
const MIB: f64 = (1 << 20) as f64;

/// When to capture what.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Tells it from others.
    pub name: Box<str>,
    /// What triggers it.
    pub threshold: Threshold,
    /// How long it has to hold; memory's growth is measured over this time.
    pub lasts: Duration,
    /// What is captured then.
    pub capture: Capture,
}

/// Something that may be too much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threshold {
    /// CPUs in use.
    Cpu(f64),
    /// Share of the periods of its quota in which a container was throttled.
    Throttled(f64),
    /// MiB of memory more in a minute.
    MemoryGrowth(f64),
    /// Share of time in which threads waited for a CPU.
    RunQueueDelay(f64),
}

impl Threshold {
    /// What it is about.
    pub const fn resource(self) -> Resource {
        match self {
            Self::Cpu(_) => Resource::Cpu,
            Self::Throttled(_) => Resource::Throttling,
            Self::MemoryGrowth(_) => Resource::Memory,
            Self::RunQueueDelay(_) => Resource::RunQueue,
        }
    }

    const fn value(self) -> f64 {
        match self {
            Self::Cpu(value) | Self::Throttled(value) | Self::MemoryGrowth(value) | Self::RunQueueDelay(value) => value,
        }
    }

    fn describe(self, value: f64) -> String {
        match self {
            Self::Cpu(_) => format!("{value:.2} CPUs"),
            Self::Throttled(_) => format!("throttled in {:.0} % of periods", value * 100.0),
            Self::MemoryGrowth(_) => format!("{value:.1} MiB more a minute"),
            Self::RunQueueDelay(_) => format!("waiting for a CPU {:.0} % of the time", value * 100.0),
        }
    }
}

/// A rule that holds for a container.
#[derive(Clone, Debug, PartialEq)]
pub struct Trigger {
    /// The rule.
    pub rule: Arc<Rule>,
    /// The container's ID.
    pub container: Arc<str>,
    /// What was measured, in words.
    pub reason: String,
}

/// How many containers are watched, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WatchStats {
    /// Containers that are watched.
    pub containers: usize,
    /// Times that a container was not looked at, because there were too many.
    pub unwatched: u64,
}

/// Watches what containers use.
#[derive(Debug)]
pub struct Watch {
    rules: Vec<Arc<Rule>>,
    known: HashMap<Arc<str>, Known>,
    forget_after: Duration,
    /// When those that are gone were last forgotten.
    swept: Option<Instant>,
    unwatched: u64,
}

/// What is known of a container.
#[derive(Debug)]
struct Known {
    seen: Instant,
    usage: Usage,
    /// Of each rule.
    states: Box<[State]>,
}

/// How a rule stands for a container.
#[derive(Clone, Debug, Default)]
struct State {
    /// Since when it has been above its threshold.
    since: Option<Instant>,
    /// Fired, and not below its threshold since.
    has_fired: bool,
    growth: Growth,
}

/// What was measured, and from when on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Measured {
    value: f64,
    from: Instant,
}

/// Growth over a window to twice as much, from two points in the past, however often somebody looks.
#[derive(Clone, Debug, Default)]
struct Growth {
    older: Option<(Instant, u64)>,
    newer: Option<(Instant, u64)>,
}

impl Watch {
    /// Watches by these rules; `interval` is between two looks at a container.
    pub fn new(rules: Vec<Arc<Rule>>, interval: Duration) -> Self {
        let forget_after = FORGET_AFTER.saturating_add(interval.saturating_mul(3));
        Self { rules, known: HashMap::new(), forget_after, swept: None, unwatched: 0 }
    }

    /// Takes note of what a container uses; a rule that holds fires. One at a time: others have their turn when somebody
    /// looks again.
    pub fn observe(&mut self, now: Instant, container: &Arc<str>, usage: Usage) -> Option<Trigger> {
        self.sweep(now);
        let Some(known) = self.known.get_mut(container) else {
            if self.known.len() >= MAX_CONTAINERS {
                self.unwatched += 1;
                return None;
            }
            self.known.insert(Arc::clone(container), Known::new(now, usage, self.rules.len()));
            return None;
        };
        if !usage.continues(&known.usage) {
            *known = Known::new(now, usage, self.rules.len());
            return None;
        }
        let mut fired = None;
        for (rule, state) in self.rules.iter().zip(&mut known.states) {
            let measured = state.measure(rule, (known.seen, &known.usage), (now, &usage));
            let may_fire = fired.is_none();
            if let Some(reason) = state.judge(rule, measured, now, may_fire) {
                fired = Some(Trigger { rule: Arc::clone(rule), container: Arc::clone(container), reason });
            }
        }
        (known.seen, known.usage) = (now, usage);
        fired
    }

    /// A trigger that nobody could follow may come again, if its rule holds for its time once more.
    pub fn refused(&mut self, trigger: &Trigger) {
        let Some(known) = self.known.get_mut(&trigger.container) else { return };
        for (_, state) in self.rules.iter().zip(&mut known.states).filter(|(rule, _)| Arc::ptr_eq(rule, &trigger.rule))
        {
            *state = State::default();
        }
    }

    /// Forgets a container that is gone. (Those that nobody asks about are forgotten anyway.)
    pub fn forget(&mut self, container: &str) {
        self.known.remove(container);
    }

    /// Sizes, for metrics.
    pub fn stats(&self) -> WatchStats {
        WatchStats { containers: self.known.len(), unwatched: self.unwatched }
    }

    /// Forgets containers that nobody asked about for long: now and then, for that looks at all of them.
    fn sweep(&mut self, now: Instant) {
        let since = |past: Instant| now.saturating_duration_since(past);
        if since(*self.swept.get_or_insert(now)) < self.forget_after / 2 {
            return;
        }
        self.swept = Some(now);
        self.known.retain(|_, known| since(known.seen) < self.forget_after);
    }
}

impl Known {
    fn new(seen: Instant, usage: Usage, rules: usize) -> Self {
        Self { seen, usage, states: vec![State::default(); rules].into() }
    }
}

impl State {
    /// What a rule is about, since the last time that somebody looked.
    fn measure(&mut self, rule: &Rule, before: (Instant, &Usage), now: (Instant, &Usage)) -> Option<Measured> {
        let ((from, past), (now, usage)) = (before, now);
        let elapsed = now.saturating_duration_since(from);
        let share = |past: Duration, now: Duration| {
            let of_time = now.checked_sub(past)?.as_secs_f64() / elapsed.as_secs_f64();
            of_time.is_finite().then_some(of_time)
        };
        let value = match rule.threshold {
            Threshold::Cpu(_) => share(past.cpu.ok()?, usage.cpu.ok()?)?,
            // (Threads that are asked one by one may have waited at the same time.)
            Threshold::RunQueueDelay(_) => share(past.run_queue_delay.ok()?, usage.run_queue_delay.ok()?)?.min(1.0),
            Threshold::Throttled(_) => {
                let (past, usage) = (past.throttling.ok()?, usage.throttling.ok()?);
                let periods = usage.periods.checked_sub(past.periods)?;
                // Where nothing ran, nothing was throttled.
                usage.throttled.checked_sub(past.throttled)? as f64 / periods.max(1) as f64
            }
            Threshold::MemoryGrowth(_) => return self.growth.measure(now, usage.memory.ok()?, rule.lasts),
        };
        Some(Measured { value, from })
    }

    /// Why the rule fires, if it does.
    fn judge(&mut self, rule: &Rule, measured: Option<Measured>, now: Instant, may_fire: bool) -> Option<String> {
        let above = measured.filter(|measured| measured.value >= rule.threshold.value());
        let Some(Measured { value, from }) = above else {
            self.since = None;
            // What is not known is not below either.
            self.has_fired &= measured.is_none();
            return None;
        };
        let held = now.saturating_duration_since(*self.since.get_or_insert(from));
        if held < rule.lasts || self.has_fired || !may_fire {
            return None;
        }
        self.has_fired = true;
        let (threshold, held) = (rule.threshold, humantime::format_duration(Duration::from_secs(held.as_secs())));
        Some(format!(
            "{} for {held}; {} is the threshold",
            threshold.describe(value),
            threshold.describe(threshold.value())
        ))
    }
}

impl Growth {
    /// MiB a minute; `None` until there is a whole window.
    fn measure(&mut self, now: Instant, bytes: u64, window: Duration) -> Option<Measured> {
        let age = |at: Instant| now.saturating_duration_since(at);
        if self.newer.is_none_or(|(at, _)| age(at) >= window) {
            (self.older, self.newer) = (self.newer, Some((now, bytes)));
        }
        let (from, past) = self.older?;
        let minutes = age(from).as_secs_f64() / 60.0;
        (minutes > 0.0).then(|| Measured { value: (bytes as f64 - past as f64) / MIB / minutes, from })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::usage::{Missing, Throttling},
        *,
    };

    const INTERVAL: Duration = Duration::from_secs(5);
    const NEVER: [usize; 0] = [];

    fn rule(threshold: Threshold, seconds: u64) -> Arc<Rule> {
        let capture =
            Capture { duration: Duration::from_secs(30), frequency: None, events: None, lines: None, inlines: None };
        Arc::new(Rule { name: "rule".into(), threshold, lasts: Duration::from_secs(seconds), capture })
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// One container that is looked at every five seconds.
    struct Container {
        watch: Watch,
        now: Instant,
        usage: Usage,
        id: Arc<str>,
    }

    impl Container {
        fn new(rules: &[Arc<Rule>], usage: Usage) -> Self {
            let (watch, now) = (Watch::new(rules.to_vec(), INTERVAL), Instant::now());
            let mut container = Self { watch, now, usage, id: "c".into() };
            assert_eq!(container.watch.observe(now, &container.id, usage), None);
            container
        }

        /// The look after this one.
        fn then(&mut self, change: impl FnOnce(&mut Usage)) -> Option<Trigger> {
            self.now += INTERVAL;
            change(&mut self.usage);
            self.watch.observe(self.now, &self.id, self.usage)
        }

        /// Looks that fire, of `looks` after which `cpus` were used.
        fn burn(&mut self, cpus: f64, looks: usize) -> Vec<usize> {
            let burn = |usage: &mut Usage| usage.cpu = usage.cpu.map(|cpu| cpu + seconds(cpus * 5.0));
            (1..=looks).filter(|_| self.then(burn).is_some()).collect()
        }
    }

    fn of_cpu() -> Usage {
        Usage { cpu: Ok(Duration::from_secs(1000)), ..Usage::UNKNOWN }
    }

    /// A rule fires once it has held for its time, and again only after it was below.
    #[test]
    fn fires_once_until_it_was_below() {
        let mut container = Container::new(&[rule(Threshold::Cpu(2.0), 10)], of_cpu());
        assert_eq!(container.burn(1.9, 20), NEVER);
        assert_eq!(container.burn(2.5, 20), [2]);
        assert_eq!(container.burn(0.5, 1), NEVER);
        assert_eq!(container.burn(2.5, 1), NEVER);
        assert_eq!(container.burn(0.5, 1), NEVER);
        assert_eq!(container.burn(2.5, 3), [2]);
        // Not known is neither above nor below.
        assert_eq!(container.then(|usage| usage.cpu = Err(Missing::Unreadable)), None);
        assert_eq!(container.then(|usage| usage.cpu = of_cpu().cpu), None);
        assert_eq!(container.burn(2.5, 5), NEVER);
        // A long time between two looks is one like others.
        container.burn(0.0, 1);
        container.now += Duration::from_secs(55);
        let trigger = container.then(|usage| usage.cpu = usage.cpu.map(|cpu| cpu + seconds(180.0)));
        let trigger = trigger.expect("three CPUs for a minute");
        assert_eq!(trigger.reason, "3.00 CPUs for 1m; 2.00 CPUs is the threshold");
        assert_eq!((&*trigger.rule.name, &*trigger.container), ("rule", "c"));
    }

    /// A trigger that was refused comes again after its time.
    #[test]
    fn refused_triggers_come_again() {
        let mut container = Container::new(&[rule(Threshold::Cpu(2.0), 10)], of_cpu());
        assert_eq!(container.burn(2.5, 1), NEVER);
        let trigger = container.then(|usage| usage.cpu = usage.cpu.map(|cpu| cpu + seconds(50.0))).expect("fires");
        container.watch.refused(&trigger);
        assert_eq!(container.burn(2.5, 10), [2]);
    }

    /// What goes backwards is another cgroup.
    #[test]
    fn a_cgroup_that_was_made_anew_is_another() {
        let mut container = Container::new(&[rule(Threshold::Cpu(2.0), 10)], of_cpu());
        assert_eq!(container.burn(2.5, 3), [2]);
        assert_eq!(container.then(|usage| usage.cpu = Ok(Duration::ZERO)), None);
        assert_eq!(container.burn(2.5, 3), [2]);
    }

    /// Shares of periods and of time.
    #[test]
    fn measures_throttling_and_delay() {
        let none = Throttling { periods: 5, throttled: 5, time: Duration::ZERO };
        let start = Usage { throttling: Ok(none), ..Usage::UNKNOWN };
        let mut container = Container::new(&[rule(Threshold::Throttled(0.5), 5)], start);
        let mut throttle = |periods: u64, throttled: u64| {
            let trigger = container.then(|usage| {
                let past = usage.throttling.expect("known");
                let (periods, throttled) = (past.periods + periods, past.throttled + throttled);
                usage.throttling = Ok(Throttling { periods, throttled, time: Duration::ZERO });
            });
            trigger.map(|trigger| trigger.reason)
        };
        assert_eq!(throttle(0, 0), None);
        assert_eq!(throttle(50, 24), None);
        let reason = "throttled in 80 % of periods for 5s; throttled in 50 % of periods is the threshold";
        assert_eq!(throttle(50, 40).as_deref(), Some(reason));
        let start = Usage { run_queue_delay: Ok(Duration::ZERO), ..Usage::UNKNOWN };
        let mut container = Container::new(&[rule(Threshold::RunQueueDelay(0.3), 5)], start);
        let mut wait = |delay: f64| {
            container.then(|usage| usage.run_queue_delay = usage.run_queue_delay.map(|total| total + seconds(delay)))
        };
        assert_eq!(wait(1.4), None);
        let reason = wait(50.0).expect("many threads waited").reason;
        assert!(reason.starts_with("waiting for a CPU 100 % of the time"), "{reason}");
        // Threads that ended took along what they waited: nothing is known of this time.
        assert_eq!(container.then(|usage| usage.run_queue_delay = Ok(Duration::ZERO)), None);
    }

    /// A leak is found within two windows; garbage that is collected, and one large piece in a long window, are none.
    #[test]
    fn measures_growth_of_memory() {
        let mib = |number: f64| (number * MIB) as u64;
        let grow = |bytes: &dyn Fn(usize) -> f64, looks: usize, window: u64| {
            let start = Usage { memory: Ok(mib(bytes(0))), ..Usage::UNKNOWN };
            let mut container = Container::new(&[rule(Threshold::MemoryGrowth(64.0), window)], start);
            let fires = (1..=looks).map(|look| container.then(|usage| usage.memory = Ok(mib(bytes(look)))));
            fires.enumerate().find_map(|(look, trigger)| Some((look + 1, trigger?.reason)))
        };
        // 72 MiB a minute.
        let (look, reason) = grow(&|look| 100.0 + 6.0 * look as f64, 100, 30).expect("a leak");
        println!("after {look} looks: {reason}");
        assert!((6..=12).contains(&look) && reason.starts_with("72.0 MiB more a minute for 30s"), "{look}: {reason}");
        let (look, _) = grow(&|look| 100.0 + 6.0 * look.saturating_sub(50) as f64, 200, 30).expect("a later leak");
        assert!((52..=62).contains(&look), "{look}");
        assert_eq!(grow(&|look| 100.0 + 5.0 * look as f64, 100, 30), None);
        // Up by 100 MiB and down again every twenty seconds.
        assert_eq!(grow(&|look| 100.0 + 25.0 * (look % 4) as f64, 200, 120), None);
        assert_eq!(grow(&|look| if look < 50 { 100.0 } else { 150.0 }, 100, 60), None);
        assert_eq!(grow(&|look| 10_000.0 - 6.0 * look as f64, 100, 30), None);
    }

    /// Rules are about what they are about; two that hold come one after the other.
    #[test]
    fn rules_take_turns() {
        let rules = [rule(Threshold::Cpu(1.0), 5), rule(Threshold::Cpu(2.0), 5), rule(Threshold::Throttled(0.1), 5)];
        let mut container = Container::new(&rules, of_cpu());
        assert_eq!(container.burn(3.0, 10), [1, 2]);
    }

    /// Containers that are gone are forgotten; more than fit are not watched, and counted.
    #[test]
    fn containers_are_bounded() {
        let mut watch = Watch::new(vec![rule(Threshold::Cpu(2.0), 10)], INTERVAL);
        let mut now = Instant::now();
        let ids: Vec<Arc<str>> = (0..MAX_CONTAINERS + 100).map(|number| number.to_string().into()).collect();
        for id in &ids {
            watch.observe(now, id, of_cpu());
        }
        assert_eq!(watch.stats(), WatchStats { containers: MAX_CONTAINERS, unwatched: 100 });
        watch.forget("0");
        for _ in 0..60 {
            now += INTERVAL;
            for id in &ids[ids.len() - 100..] {
                watch.observe(now, id, of_cpu());
            }
        }
        assert_eq!(watch.stats().containers, 100);
    }
}

//! When this agent collects: slots of time, turns in a rotation, and chance, all of them drawn by hashing.
//!
//! In: the configuration, the names of this node and of pods, and the time. Out: whether there is something to collect, until
//! when that holds, and what the values of samples have to be multiplied with so that sums over the fleet stay true. Reads
//! neither clocks nor files.
//!
//! There is no coordinator. Slots are counted from the Unix epoch, and whatever looks random is a hash of a slot's number
//! and of names, so agents whose clocks agree agree on everything. That includes agents of other versions: what is drawn is
//! part of the interface, and a test pins it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What lots are drawn for: so that they do not depend on each other.
mod purpose {
    pub(super) const PART_OF_SLOT: u64 = 1;
    pub(super) const NODES: u64 = 2;
    pub(super) const REPLICAS: u64 = 3;
    pub(super) const CHANCE: u64 = 4;
}

/// Length of a slot unless told otherwise.
const DEFAULT_EVERY: Duration = Duration::from_secs(60);

/// When agents collect, all over the fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Length of a slot.
    pub every: Duration,
    /// How much of each slot is collected; at most all of it.
    pub collect: Duration,
    /// Nodes take turns; `None`: all collect in every slot.
    pub nodes: Option<Rotation>,
    /// Groups of each workload's pods that take turns; `None`: all are collected.
    pub replicas: Option<u32>,
    /// Share of slots, above 0 and at most 1, in which a node takes part at all.
    pub probability: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { every: DEFAULT_EVERY, collect: DEFAULT_EVERY, nodes: None, replicas: None, probability: 1.0 }
    }
}

/// Who takes turns with whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// How this node is called in the rotation; `None`: as everywhere.
    pub member: Option<String>,
    /// What there are turns for.
    pub turns: Turns,
}

/// What there are turns for: one slot each in every cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turns {
    /// So many groups. A member's group follows from its name alone; some groups are larger than others.
    Groups(u32),
    /// Each of these members.
    Members(Vec<String>),
}

/// The list of members does not have this node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this node is called {0:?}, which is none of the members: it would never collect")]
pub struct NotAMember(pub String);

/// What holds for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Phase {
    /// Whether this node collects.
    pub collects: bool,
    /// When to ask again: later than now, by one slot at most.
    pub until: SystemTime,
    /// What samples of this node stand for: the inverse of the share of time that it collects. The same in all phases, since
    /// sums are only right on average if a sample's weight does not depend on when it was taken.
    pub scale: f64,
}

/// When this agent collects.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Nanoseconds of a slot, and of its part that is collected.
    every: u64,
    collect: u64,
    /// Hash of this node's name.
    node: u64,
    nodes: Option<Place>,
    replicas: Option<Replicas>,
    probability: f64,
}

/// Groups of each workload's pods that take turns: one slot each in every cycle. The same on all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    of: u32,
    /// Nanoseconds of a slot.
    every: u64,
}

/// One of `of` groups that take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    group: u32,
    of: u32,
}

/// A point in time: a slot, and nanoseconds since it began.
struct Moment {
    slot: i128,
    within: u64,
}

impl Schedule {
    /// The schedule of the node of this name.
    pub fn new(settings: &Settings, node: &str) -> Result<Self, NotAMember> {
        let every = nanoseconds(settings.every).max(1);
        let place = |rotation: &Rotation| {
            let member = rotation.member.as_deref().unwrap_or(node);
            match &rotation.turns {
                Turns::Groups(of) => Ok(Place { group: group_of(member, *of), of: (*of).max(1) }),
                Turns::Members(members) => {
                    // Agents agree on the order whatever the one of their lists is.
                    let rank = members.iter().filter(|other| other.as_str() < member).count();
                    let is_member = members.iter().any(|other| other == member);
                    let place = Place { group: saturating(rank), of: saturating(members.len()) };
                    is_member.then_some(place).ok_or_else(|| NotAMember(member.to_owned()))
                }
            }
        };
        Ok(Self {
            every,
            collect: nanoseconds(settings.collect).clamp(1, every),
            node: hash(node),
            nodes: settings.nodes.as_ref().map(place).transpose()?,
            replicas: settings.replicas.filter(|&of| of > 1).map(|of| Replicas { of, every }),
            probability: settings.probability,
        })
    }

    /// Whether all is collected all the time, so that nobody has to ask.
    pub fn is_always(&self) -> bool {
        self.scale() <= 1.0 && self.replicas.is_none()
    }

    /// What this node does.
    pub fn at(&self, now: SystemTime) -> Phase {
        let Moment { slot, within } = self.moment(now);
        let to_end = self.every - within;
        let (collects, rest) = if self.takes_part(slot) { self.part_of_slot(slot, within) } else { (false, to_end) };
        let rest = Duration::from_nanos(rest.min(to_end));
        Phase { collects, until: now.checked_add(rest).unwrap_or(now), scale: self.scale() }
    }

    /// What samples of this node stand for.
    pub fn scale(&self) -> f64 {
        let turns = self.nodes.map_or(1, |place| place.of);
        self.every as f64 / self.collect as f64 * f64::from(turns) / self.probability
    }

    /// The replicas that take turns; they are collected while their node collects, too.
    pub fn replicas(&self) -> Option<Replicas> {
        self.replicas
    }

    fn takes_part(&self, slot: i128) -> bool {
        let is_drawn = || share(draw(&[purpose::CHANCE, self.node, number(slot)])) < self.probability;
        self.nodes.is_none_or(|place| place.has_turn(&[purpose::NODES], slot)) && is_drawn()
    }

    /// Whether the part that is collected has begun and not ended, and how many nanoseconds that holds at most.
    ///
    /// It begins anywhere in the slot, and what would be beyond its end is at its beginning instead. So no second of a
    /// minute is collected more often than another, which matters to whatever happens on the minute; and no slot's part is
    /// in another slot, where it would be another member's turn.
    fn part_of_slot(&self, slot: i128, within: u64) -> (bool, u64) {
        if self.collect == self.every {
            return (true, self.every);
        }
        let start = draw(&[purpose::PART_OF_SLOT, self.node, number(slot)]) % self.every;
        let since = (within + self.every - start) % self.every;
        if since < self.collect { (true, self.collect - since) } else { (false, self.every - since) }
    }

    fn moment(&self, now: SystemTime) -> Moment {
        Moment::of(now, self.every)
    }
}

impl Replicas {
    /// Whether it is this pod's turn among the replicas of its workload, which has to be called the same on all nodes.
    pub fn has_turn(&self, workload: &str, pod: &str, now: SystemTime) -> bool {
        let place = Place { group: group_of(pod, self.of), of: self.of };
        place.has_turn(&[purpose::REPLICAS, hash(workload)], Moment::of(now, self.every).slot)
    }

    /// Whether turns are the same at both times.
    pub fn is_same_turn(&self, one: SystemTime, other: SystemTime) -> bool {
        Moment::of(one, self.every).slot == Moment::of(other, self.every).slot
    }

    /// How long turns stay as they are.
    pub fn time_left(&self, now: SystemTime) -> Duration {
        Duration::from_nanos(self.every - Moment::of(now, self.every).within)
    }

    /// What samples of a replica stand for, beyond those of its node: turns in a cycle.
    pub fn scale(&self) -> u64 {
        u64::from(self.of)
    }
}

impl Moment {
    fn of(now: SystemTime, every: u64) -> Self {
        let since_epoch = match now.duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_nanos() as i128,
            Err(error) => -(error.duration().as_nanos() as i128),
        };
        let every = i128::from(every);
        Self { slot: since_epoch.div_euclid(every), within: since_epoch.rem_euclid(every) as u64 }
    }
}

impl Place {
    /// Whether the slot is this group's. In each cycle of `of` slots all groups draw lots, and the lowest comes first: every
    /// group has exactly one turn in a cycle, and nobody is always in step with something.
    fn has_turn(self, rotation: &[u64], slot: i128) -> bool {
        let of = i128::from(self.of);
        let seed = draw(&[draw(rotation), number(slot.div_euclid(of))]);
        let lot = |group: u32| (draw(&[seed, u64::from(group)]), group);
        let own = lot(self.group);
        let before = (0..self.of).filter(|&group| lot(group) < own).count();
        before as i128 == slot.rem_euclid(of)
    }
}

/// The group of a member: its number, or the one after the last hyphen (a StatefulSet's pods are `name-0`, `name-1`, ...), so
/// that groups are equally large; or what its name's hash says.
fn group_of(member: &str, of: u32) -> u32 {
    let last = member.rsplit('-').next().unwrap_or(member);
    let is_number = !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit());
    let number = last.parse::<u64>().ok().filter(|_| is_number);
    (number.unwrap_or_else(|| hash(member)) % u64::from(of.max(1))) as u32
}

fn nanoseconds(duration: Duration) -> u64 {
    // (Half of all numbers: sums of two fit.)
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).min(u64::MAX >> 1)
}

fn saturating(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A slot or cycle as what is hashed. (They only wrap in times that no clock shows.)
fn number(slot: i128) -> u64 {
    slot as u64
}

/// A text as a number: FNV-1a of 64 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>), and mixed, since alone it hardly
/// changes its upper bits with the last letter.
fn hash(text: &str) -> u64 {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    mix(text.bytes().fold(0xcbf2_9ce4_8422_2325, fnv))
}

/// A lot: one number of several, in their order.
fn draw(numbers: &[u64]) -> u64 {
    numbers.iter().fold(0, |lot, number| mix(lot ^ *number))
}

/// What splitmix64 does with its state (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): each bit
/// depends on each.
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// A lot as a number from 0 to below 1.
fn share(lot: u64) -> f64 {
    // (As many bits as a double has.)
    (lot >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const TEN: Duration = Duration::from_secs(10);
    const HOUR: u64 = 3600;

    fn ten_of_sixty() -> Settings {
        Settings { every: MINUTE, collect: TEN, ..Settings::default() }
    }

    fn in_groups(of: u32) -> Option<Rotation> {
        Some(Rotation { member: None, turns: Turns::Groups(of) })
    }

    fn schedule(settings: &Settings, node: &str) -> Schedule {
        Schedule::new(settings, node).expect("a member")
    }

    fn second(number: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(number)
    }

    /// CPUs that a replica uses: each another amount, up and down by a share of it in some minutes.
    fn cpus(replica: usize, second: u64, wave: f64) -> f64 {
        let period = 60.0 * (7.0 + 3.0 * (replica % 5) as f64);
        let phase = second as f64 / period * std::f64::consts::TAU + replica as f64;
        (0.2 + 0.15 * replica as f64) * (1.0 + wave * phase.sin())
    }

    /// What was seen of a replica in some time.
    #[derive(Clone, Default)]
    struct Seen {
        seconds: u64,
        scaled: f64,
        used: f64,
    }

    /// Simulates an hour of twenty replicas second by second; `collects` says by what samples of one are multiplied, if they
    /// are taken.
    fn simulate(from: u64, wave: f64, collects: impl Fn(usize, SystemTime) -> Option<f64>) -> Vec<Seen> {
        let mut all = vec![Seen::default(); 20];
        for at in from..from + HOUR {
            for (replica, seen) in all.iter_mut().enumerate() {
                let used = cpus(replica, at, wave);
                seen.used += used;
                if let Some(scale) = collects(replica, second(at)) {
                    seen.seconds += 1;
                    seen.scaled += used * scale;
                }
            }
        }
        all
    }

    /// How far off the scaled sum of all is.
    fn error_of(all: &[Seen]) -> f64 {
        let used: f64 = all.iter().map(|seen| seen.used).sum();
        all.iter().map(|seen| seen.scaled).sum::<f64>() / used - 1.0
    }

    /// Twenty replicas on twenty nodes, one at a time for 10 s of a minute: each has its share of every hour, and scaled they
    /// used what they used: exactly if that does not change, and else on average, for 10 s stand for 20 minutes.
    #[test]
    fn replicas_have_fair_shares() {
        let settings = Settings { replicas: Some(20), ..ten_of_sixty() };
        let nodes: Vec<Schedule> = (0..20).map(|node| schedule(&settings, &format!("n{node}.example"))).collect();
        let pods: Vec<String> = (0..20).map(|pod| format!("web-{pod}")).collect();
        let run = |workload: &str, from, wave| {
            simulate(from, wave, |replica, now| {
                let (node, phase) = (&nodes[replica], nodes[replica].at(now));
                let replicas = node.replicas().expect("they take turns");
                let is_collected = phase.collects && replicas.has_turn(workload, &pods[replica], now);
                is_collected.then_some(phase.scale * replicas.scale() as f64)
            })
        };
        println!("replica  seconds  CPU seconds   scaled");
        // (A whole number of hours since 1970, so that cycles of 20 minutes begin with it.)
        for (pod, seen) in pods.iter().zip(run("shop/StatefulSet/web", 472_222 * HOUR, 0.3)) {
            println!("{pod:>7}  {:>7}  {:>11.1}  {:>7.1}", seen.seconds, seen.used, seen.scaled);
        }
        let fair = HOUR as f64 / 20.0 * 10.0 / 60.0;
        let mut errors = Vec::new();
        for number in 0..50 {
            let (workload, from) = (format!("shop/StatefulSet/web{number}"), (472_222 + number) * HOUR);
            let all = run(&workload, from, 0.3);
            assert!(all.iter().all(|seen| (seen.seconds as f64 / fair - 1.0).abs() <= 0.05));
            errors.push(error_of(&all));
        }
        let worst = errors.iter().fold(0.0_f64, |worst, error| worst.max(error.abs()));
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        println!("50 hours: scaled sums are off by {:.2} % at most, {:+.2} % on average", worst * 100.0, mean * 100.0);
        assert!(worst < 0.1 && mean.abs() < 0.01, "{worst}, {mean}");
        for seen in run("shop/StatefulSet/web", 472_222 * HOUR, 0.0) {
            assert!((seen.scaled / seen.used - 1.0).abs() < 1e-9);
        }
    }

    /// The same by nodes that know each other: never two at a time, one in every slot, and each in every cycle.
    #[test]
    fn members_take_turns() {
        for seed in 0..10 {
            let names: Vec<String> = (0..20).map(|node| format!("node-{seed}-{}", hash(&format!("{node}")))).collect();
            let rotation = Rotation { member: None, turns: Turns::Members(names.clone()) };
            let settings = Settings { nodes: Some(rotation), ..ten_of_sixty() };
            let nodes: Vec<Schedule> = names.iter().map(|name| schedule(&settings, name)).collect();
            let from = (400_000 + seed) * HOUR;
            for at in from..from + HOUR {
                let collecting = nodes.iter().filter(|node| node.at(second(at)).collects).count();
                assert!(collecting <= 1, "{collecting} at {at}");
            }
            let all = simulate(from, 0.3, |node, now| {
                let phase = nodes[node].at(now);
                phase.collects.then_some(phase.scale)
            });
            assert!(all.iter().all(|seen| seen.seconds == 30));
            assert!(error_of(&all).abs() < 0.1, "{}", error_of(&all));
        }
    }

    /// Lists in another order are the same; a node that is on none is told.
    #[test]
    fn members_are_a_set() {
        let of = |members: &[&str], member: Option<&str>, node| {
            let turns = Turns::Members(members.iter().map(|&name| name.to_owned()).collect());
            let rotation = Rotation { member: member.map(str::to_owned), turns };
            Schedule::new(&Settings { nodes: Some(rotation), ..ten_of_sixty() }, node)
        };
        assert_eq!(of(&["a", "b", "c"], None, "b"), of(&["c", "b", "a"], None, "b"));
        assert_eq!(of(&["a", "b"], None, "z"), Err(NotAMember("z".to_owned())));
        assert_eq!(of(&["a", "b"], Some("z"), "a"), Err(NotAMember("z".to_owned())));
        assert!(of(&["a", "b"], Some("a"), "z").is_ok());
    }

    /// Whatever nodes are called, each has one turn in a cycle; groups are about equally large.
    #[test]
    fn groups_follow_from_names() {
        let settings = Settings { nodes: in_groups(20), every: MINUTE, ..Settings::default() };
        let mut sizes = [0; 20];
        for number in 0..2000 {
            let node = schedule(&settings, &format!("ip-{number}.internal"));
            sizes[node.nodes.expect("a place").group as usize] += 1;
            let first_slot = 20 * (1_400_000 + number);
            let turns = (first_slot..first_slot + 20).filter(|slot| node.at(second(60 * slot)).collects).count();
            assert_eq!(turns, 1);
        }
        assert!(sizes.iter().all(|size| (60..140).contains(size)), "{sizes:?}");
        for (member, group) in [("web-0", 0), ("web-23", 3), ("47", 7), ("a-b-19", 19), ("20", 0)] {
            assert_eq!(group_of(member, 20), group, "{member}");
        }
        let huge = "web-99999999999999999999999";
        assert_eq!(u64::from(group_of(huge, 20)), hash(huge) % 20);
        assert_eq!(u64::from(group_of("web-+3", 20)), hash("web-+3") % 20);
    }

    /// A part of every slot is collected that is exactly as long as it was asked for, wherever it begins.
    #[test]
    fn the_duty_cycle_is_exact() {
        for (every, collect) in [(60_000, 10_000), (7_919, 1_009), (1000, 999), (86_400_000, 1)] {
            let (every, collect) = (Duration::from_millis(every), Duration::from_millis(collect));
            let node = schedule(&Settings { every, collect, ..Settings::default() }, "n");
            let (mut now, slots) = (UNIX_EPOCH + every * 10_000, 2000);
            let end = now + every * slots;
            let mut collected = Duration::ZERO;
            while now < end {
                let phase = node.at(now);
                let lasts = phase.until.duration_since(now).expect("later than now");
                assert!(!lasts.is_zero() && lasts <= every);
                collected += if phase.collects { lasts } else { Duration::ZERO };
                now = phase.until;
            }
            assert_eq!((now, collected), (end, collect * slots));
        }
    }

    /// What always happens in the same second of a minute is seen as often as anything else.
    #[test]
    fn nothing_is_in_step_with_slots() {
        let node = schedule(&ten_of_sixty(), "n");
        let mut seen = [0; 60];
        for at in 0..60 * 60 * 100 {
            seen[at % 60] += u32::from(node.at(second(at as u64)).collects);
        }
        // A sixth of 6,000 minutes; four standard deviations are 115.
        assert!(seen.iter().all(|count| (885..=1115).contains(count)), "{seen:?}");
        let rotating = schedule(&Settings { nodes: in_groups(10), ..Settings::default() }, "n");
        let mut turns = [0; 10];
        for slot in 0..10_000 {
            turns[slot % 10] += u32::from(rotating.at(second(60 * slot as u64)).collects);
        }
        assert!(turns.iter().all(|count| (60..=140).contains(count)), "{turns:?}");
    }

    /// A node takes part in its share of slots, and different nodes in different ones.
    #[test]
    fn chance_converges() {
        for probability in [0.01, 0.1, 0.5, 1.0] {
            let settings = Settings { probability, ..Settings::default() };
            let nodes = ["a", "b"].map(|name| schedule(&settings, name));
            let slots = 100_000;
            let (mut one, mut both) = (0.0, 0.0);
            for slot in 0..slots {
                let collects = nodes.each_ref().map(|node| node.at(second(60 * slot)).collects);
                one += f64::from(u8::from(collects[0])) / slots as f64;
                both += f64::from(u8::from(collects == [true, true])) / slots as f64;
            }
            println!("{probability}: {one:.4}, two at once {both:.4}");
            assert!((one - probability).abs() < 0.006, "{one}");
            assert!((both - probability * probability).abs() < 0.006, "{both}");
            assert!((nodes[0].scale() * probability - 1.0).abs() < 1e-9);
        }
    }

    /// What is not asked for is collected all the time, and counts once.
    #[test]
    fn always_by_default() {
        let node = schedule(&Settings::default(), "n");
        assert!(node.is_always() && node.at(second(5)).collects && node.replicas().is_none());
        assert_eq!(node.at(second(5)), Phase { collects: true, until: second(60), scale: 1.0 });
        assert!(!schedule(&ten_of_sixty(), "n").is_always());
        assert!(!schedule(&Settings { replicas: Some(2), ..Settings::default() }, "n").is_always());
        let all = Settings { nodes: in_groups(20), replicas: Some(5), probability: 0.1, ..ten_of_sixty() };
        let node = schedule(&all, "n");
        assert!((node.scale() - 1200.0).abs() < 1e-9 && node.replicas().is_some_and(|replicas| replicas.scale() == 5));
    }

    /// Clocks that jump, or show times before 1970 or far from now, are clocks like others.
    #[test]
    fn any_time_will_do() {
        let far = Duration::from_secs(i64::MAX as u64 - 100_000);
        let settings = |every, collect| {
            let (nodes, replicas) = (in_groups(3), Some(7));
            Settings { every, collect, nodes, replicas, probability: 0.5 }
        };
        for every in [Duration::ZERO, Duration::from_nanos(1), Duration::from_millis(7919), Duration::MAX] {
            for collect in [Duration::ZERO, Duration::from_nanos(3), TEN, Duration::MAX] {
                let node = schedule(&settings(every, collect), "n");
                let moments = [Some(UNIX_EPOCH), UNIX_EPOCH.checked_add(far), UNIX_EPOCH.checked_sub(far)];
                for now in moments.into_iter().flatten().chain([second(1_700_000_000), UNIX_EPOCH - MINUTE]) {
                    let phase = node.at(now);
                    let lasts = phase.until.duration_since(now).expect("no earlier than now");
                    assert!(lasts <= every.max(Duration::from_nanos(1)));
                    let replicas = node.replicas().expect("they take turns");
                    replicas.has_turn("w", "p-1", now);
                    let left = replicas.time_left(now);
                    assert!(!left.is_zero() && left <= every.max(Duration::from_nanos(1)));
                }
            }
        }
        // Slots before 1970 are as long as others.
        let node = schedule(&Settings::default(), "n");
        assert_eq!(node.at(UNIX_EPOCH - Duration::from_secs(61)).until, UNIX_EPOCH - MINUTE);
        assert_eq!(node.at(UNIX_EPOCH - MINUTE).until, UNIX_EPOCH);
    }

    /// Agents of all versions draw the same. (The numbers are those of a second implementation, in Python.)
    #[test]
    fn what_is_drawn_never_changes() {
        assert_eq!(hash(""), 0xc381_7c01_6ba4_ff30);
        assert_eq!(hash("node-1"), 0x94a9_d409_86da_123d);
        assert_eq!(draw(&[1, 2, 3]), 0xd073_4750_fde3_62b3);
        let settings = Settings { nodes: in_groups(5), replicas: Some(5), ..ten_of_sixty() };
        let node = schedule(&settings, "node-2");
        let slots_of = |has: &dyn Fn(u64) -> bool, slots| (0..slots).filter(|&slot| has(slot)).collect::<Vec<u64>>();
        assert_eq!(slots_of(&|slot| node.takes_part(slot.into()), 25), [3, 5, 10, 15, 24]);
        let replicas = node.replicas().expect("they take turns");
        let replica_turn = |slot| replicas.has_turn("w", "p-3", second(60 * slot));
        assert_eq!(slots_of(&replica_turn, 25), [3, 9, 10, 17, 21]);
        assert_eq!(node.part_of_slot(0, 31_855_951_780), (true, 10_000_000_000));
        let seldom = schedule(&Settings { probability: 0.1, ..Settings::default() }, "node-2");
        assert_eq!(slots_of(&|slot| seldom.takes_part(slot.into()), 50), [3, 10, 11, 15, 28, 36, 45]);
    }
}

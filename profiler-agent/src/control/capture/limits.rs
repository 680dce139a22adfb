//! How much may be captured: limits that hold however many triggers there are.
//!
//! In: triggers. Out: permits, or refusals that are counted by reason.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use super::Capture;

const HOUR: Duration = Duration::from_secs(3600);

/// What is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Captures at the same time.
    pub max_running: usize,
    /// Captures in any hour, of all containers.
    pub per_hour: usize,
    /// Least time between two captures of a container, from when the first one was to end.
    pub cooldown: Duration,
    /// Longest capture.
    pub longest: Duration,
}

/// Why a capture is not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// As many are running as may.
    Running,
    /// There were as many in the last hour as may be.
    Hourly,
    /// The container was captured a short time ago.
    Cooldown,
    /// Nothing is to be collected at all.
    Stopped,
}

impl Refusal {
    /// Every reason.
    pub const ALL: [Self; 4] = [Self::Running, Self::Hourly, Self::Cooldown, Self::Stopped];

    /// The reason in words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Hourly => "hourly",
            Self::Cooldown => "cooldown",
            Self::Stopped => "stopped",
        }
    }
}

/// A capture may run. It counts as running until this is dropped, and no longer than it may take.
#[derive(Debug)]
pub struct Permit {
    /// What is captured, and for how long at most.
    pub capture: Capture,
    /// When it ends.
    pub until: Instant,
    _running: Arc<()>,
}

/// Admits captures, and remembers which.
#[derive(Debug)]
pub struct Limits {
    settings: Settings,
    /// Captures that are running, until when.
    running: Vec<(Instant, Weak<()>)>,
    /// When captures of the last hour began, the oldest first: `per_hour` of them at most.
    begun: VecDeque<Instant>,
    /// Until when what was captured is left alone. As many as captures are admitted in that time.
    cooling: HashMap<Arc<str>, Instant>,
    admitted: u64,
    refused: [u64; Refusal::ALL.len()],
}

impl Limits {
    /// Nothing has been captured yet.
    pub fn new(settings: Settings) -> Self {
        let (running, begun, cooling) = (Vec::new(), VecDeque::new(), HashMap::new());
        Self { settings, running, begun, cooling, admitted: 0, refused: [0; Refusal::ALL.len()] }
    }

    /// Other limits hold from now on. What was admitted is not forgotten.
    pub fn configure(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// What is admitted.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Refuses something for a reason that is not of the limits' own.
    pub fn refuse(&mut self, refusal: Refusal) -> Refusal {
        self.refused[refusal as usize] += 1;
        refusal
    }

    /// Whether this may be captured. `subject` tells those apart that are left alone for a while afterwards.
    pub fn admit(&mut self, now: Instant, subject: &Arc<str>, capture: &Capture) -> Result<Permit, Refusal> {
        self.forget(now);
        let refusal = if self.cooling.contains_key(subject) {
            Some(Refusal::Cooldown)
        } else if self.running.len() >= self.settings.max_running {
            Some(Refusal::Running)
        } else if self.begun.len() >= self.settings.per_hour {
            Some(Refusal::Hourly)
        } else {
            None
        };
        if let Some(refusal) = refusal {
            return Err(self.refuse(refusal));
        }
        self.admitted += 1;
        let duration = capture.duration.min(self.settings.longest);
        let (until, running) = (now + duration, Arc::new(()));
        self.running.push((until, Arc::downgrade(&running)));
        self.begun.push_back(now);
        self.cooling.insert(Arc::clone(subject), until + self.settings.cooldown);
        Ok(Permit { capture: Capture { duration, ..capture.clone() }, until, _running: running })
    }

    /// Captures that are running.
    pub fn running(&mut self, now: Instant) -> usize {
        self.forget(now);
        self.running.len()
    }

    /// Captures that were admitted.
    pub fn admitted(&self) -> u64 {
        self.admitted
    }

    /// Captures that were refused, by reason.
    pub fn refused(&self) -> [(Refusal, u64); Refusal::ALL.len()] {
        Refusal::ALL.map(|refusal| (refusal, self.refused[refusal as usize]))
    }

    /// What is over restricts nothing any more.
    fn forget(&mut self, now: Instant) {
        self.running.retain(|(until, capture)| *until > now && capture.strong_count() > 0);
        while self.begun.front().is_some_and(|&begun| now.saturating_duration_since(begun) >= HOUR) {
            self.begun.pop_front();
        }
        self.cooling.retain(|_, until| *until > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings =
        Settings { max_running: 1, per_hour: 6, cooldown: Duration::from_secs(600), longest: Duration::from_secs(300) };

    fn admit(limits: &mut Limits, now: Instant, subject: &str, seconds: u64) -> Result<Permit, Refusal> {
        let duration = Duration::from_secs(seconds);
        let capture = Capture { duration, frequency: Some(499), events: None, lines: None, inlines: None };
        limits.admit(now, &subject.into(), &capture)
    }

    /// Each limit refuses by itself, and not for longer than it has to.
    #[test]
    fn limits_end() {
        let mut limits = Limits::new(SETTINGS);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let refusal = |result: Result<Permit, Refusal>| result.map(|_| ()).expect_err("refused");
        let first = admit(&mut limits, at(0), "a", 3000).expect("the first one");
        assert_eq!((first.capture.duration, first.until), (Duration::from_secs(300), at(300)));
        assert_eq!(first.capture.frequency, Some(499));
        assert_eq!(refusal(admit(&mut limits, at(1), "b", 10)), Refusal::Running);
        assert_eq!(refusal(admit(&mut limits, at(1), "a", 10)), Refusal::Cooldown);
        // It was over earlier than planned.
        drop(first);
        assert_eq!(limits.running(at(2)), 0);
        let second = admit(&mut limits, at(2), "b", 10).expect("nothing is running");
        // A permit that nobody gives back ends by itself.
        assert_eq!(limits.running(at(11)), 1);
        assert_eq!(limits.running(at(12)), 0);
        assert_eq!(refusal(admit(&mut limits, at(899), "a", 10)), Refusal::Cooldown);
        assert!(admit(&mut limits, at(900), "a", 10).is_ok());
        for number in 0..3 {
            assert!(admit(&mut limits, at(1000 + number), &number.to_string(), 10).is_ok());
        }
        assert_eq!(refusal(admit(&mut limits, at(3599), "d", 10)), Refusal::Hourly);
        assert!(admit(&mut limits, at(3600), "d", 10).is_ok());
        assert_eq!(limits.admitted(), 7);
        assert_eq!(
            limits.refused(),
            [(Refusal::Running, 1), (Refusal::Hourly, 1), (Refusal::Cooldown, 2), (Refusal::Stopped, 0)]
        );
        drop(second);
        assert_eq!(limits.refuse(Refusal::Stopped), Refusal::Stopped);
        assert_eq!(limits.refused()[3], (Refusal::Stopped, 1));
    }

    /// Ten thousand triggers in an hour lead to six captures, one at a time.
    #[test]
    fn a_storm_stays_within_limits() {
        for (settings, containers) in [
            (SETTINGS, 5000),
            (SETTINGS, 1),
            (Settings { max_running: 3, per_hour: 60, ..SETTINGS }, 100),
            (Settings { max_running: 3, per_hour: 60, cooldown: Duration::ZERO, ..SETTINGS }, 1),
            (Settings { max_running: 0, ..SETTINGS }, 7),
        ] {
            let mut limits = Limits::new(settings);
            let (start, mut permits, mut admitted) = (Instant::now(), Vec::new(), Vec::new());
            for number in 0..10_000_u32 {
                let now = start + HOUR * number / 10_000;
                permits.retain(|permit: &Permit| permit.until > now);
                let container = (number % containers).to_string();
                if let Ok(permit) = admit(&mut limits, now, &container, 10 + u64::from(number % 600)) {
                    admitted.push((container, now));
                    permits.push(permit);
                }
                assert!(permits.len() <= settings.max_running && limits.running(now) == permits.len());
                assert!(limits.cooling.len() <= limits.begun.len().max(1));
            }
            let refused: u64 = limits.refused().iter().map(|(_, count)| count).sum();
            println!("{settings:?}, {containers} containers: {} captures, {:?}", admitted.len(), limits.refused());
            assert_eq!((admitted.len() as u64, refused + limits.admitted()), (limits.admitted(), 10_000));
            assert!(admitted.len() <= settings.per_hour);
            assert_eq!(admitted.is_empty(), settings.max_running == 0);
            for (index, (container, begun)) in admitted.iter().enumerate() {
                let again = admitted[index + 1..].iter().find(|(other, _)| other == container);
                assert!(again.is_none_or(|(_, again)| *again >= *begun + settings.cooldown));
            }
        }
    }
}

//! What a daemon says at its end: how the books of its destinations balance.

use std::time::Duration;

/// The books of one destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Samples the kernel saw.
    pub seen: u64,
    /// Samples for which others stand: of replicas whose turn it was not.
    pub extrapolated: u64,
    /// Samples that the destination accepted.
    pub exported: u64,
    /// Samples that the kernel programs could not keep.
    pub lost: u64,
    /// Samples that the agent dropped.
    pub dropped: u64,
    /// Samples left in the spool.
    pub spool: u64,
    /// Samples that earlier runs had left in the spool.
    pub recovered: u64,
    /// Time off the CPU that the destination accepted, to the millisecond; `None`: it was not recorded.
    pub waited: Option<Duration>,
}

impl Stopped {
    /// Of the only destination.
    pub fn of(text: &str) -> Self {
        Self::parse(text, "")
    }

    /// Of one of several destinations.
    pub fn of_destination(text: &str, name: &str) -> Self {
        Self::parse(text, &format!("{name}: "))
    }

    fn parse(text: &str, name: &str) -> Self {
        let after = |words: &str| {
            let words = format!("{words}: {name}");
            text.lines().find_map(|line| line.split_once(&words).map(|(_, rest)| rest))
        };
        let books = after("stopped").unwrap_or_else(|| panic!("no books of {name:?} in {text}"));
        let of = |before| number(books, before).unwrap_or_else(|| panic!("no {before:?} in {books}"));
        let waited = after("off the CPU").map(|books| {
            let seconds = books.split("exported ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
            Duration::from_secs_f64(seconds.unwrap_or_else(|| panic!("no time in {books}")))
        });
        Self {
            seen: of("seen "),
            // (Told where there are some, like the last ones.)
            extrapolated: number(books, "extrapolated ").unwrap_or(0),
            exported: of("exported "),
            lost: of("lost in kernel "),
            dropped: of("dropped "),
            spool: number(books, "left in the spool ").unwrap_or(0),
            recovered: number(books, "from earlier runs ").unwrap_or(0),
            waited,
        }
    }

    /// Whether every sample is accounted for, once.
    pub fn balances(&self) -> bool {
        self.seen + self.extrapolated + self.recovered == self.exported + self.lost + self.dropped + self.spool
    }
}

/// The number that follows these words, if they are there.
pub fn number(text: &str, before: &str) -> Option<u64> {
    let rest = text.split(before).nth(1)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

//! Who is recorded: rules of the agent's, evaluated for each sample.
//!
//! A rule asks about a process, about its cgroup, or about both. The agent finds out which rules each process and each
//! cgroup meets, one bit a rule; a sample meets the rules that its process and its cgroup both meet. So a process that moves
//! to another cgroup is in the right scope at once.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most rules: bits of a [`ScopeMatch`].
pub const MAX_RULES: usize = 64;
/// Most cgroups that meet a rule.
pub const MAX_SCOPED_CGROUPS: usize = 16 << 10;
/// Most processes that meet a rule.
pub const MAX_SCOPED_PROCESSES: usize = 16 << 10;

/// Which rules a process or a cgroup meets. Who has none of these meets no rule that asks about it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct ScopeMatch {
    /// Rules that it meets.
    pub met: u64,
    /// Rules that it meets, and those of which nobody has found that out yet.
    pub possible: u64,
}

/// The rules, and where they stand.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct ScopeControl {
    /// One of [`state`].
    pub state: u32,
    /// 1: some threads may have run or waited without anybody noticing, since they were out of scope.
    pub has_gaps: u32,
    /// Rules of which one has to be met; none: all is included.
    pub include: u64,
    /// Rules of which none may be met.
    pub exclude: u64,
    /// Rules of which one has to be met besides; none: nothing more is asked.
    pub within: u64,
    /// Rules that ask nothing about processes.
    pub any_process: u64,
    /// Rules that ask nothing about cgroups.
    pub any_cgroup: u64,
    /// Rules of which nobody knows, right after `execve`, whether the process meets them.
    pub unknown_after_exec: u64,
    /// Rules of which nobody knows whether a new cgroup meets them.
    pub unknown_when_made: u64,
}

/// Whether rules are looked at.
pub mod state {
    /// There are none: everything is in scope.
    pub const OPEN: u32 = 0;
    /// They decide.
    pub const LIMITED: u32 = 1;
    /// They are being changed, or have yet to come: nothing is decided.
    pub const CHANGING: u32 = 2;
}

/// Whether something is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// It is.
    InScope = 0,
    /// It is not.
    OutOfScope = 1,
    /// It is not, until more is known.
    Undecided = 2,
}

impl ScopeControl {
    /// Whether rules have to be looked at.
    #[inline(always)]
    pub fn is_limited(&self) -> bool {
        self.state != state::OPEN
    }

    /// Every rule.
    #[inline(always)]
    pub fn rules(&self) -> u64 {
        self.include | self.exclude | self.within
    }

    /// Whether any rule asks about processes.
    #[inline(always)]
    pub fn asks_about_processes(&self) -> bool {
        self.rules() & !self.any_process != 0
    }

    /// Whether any rule asks about cgroups.
    #[inline(always)]
    pub fn asks_about_cgroups(&self) -> bool {
        self.rules() & !self.any_cgroup != 0
    }

    /// Whether what is of this process and in this cgroup is recorded.
    #[inline(always)]
    pub fn decide(&self, process: ScopeMatch, cgroup: ScopeMatch) -> Verdict {
        let met = (process.met | self.any_process) & (cgroup.met | self.any_cgroup);
        let possible = (process.possible | self.any_process) & (cgroup.possible | self.any_cgroup);
        if self.state == state::OPEN {
            Verdict::InScope
        } else if self.state == state::CHANGING {
            Verdict::Undecided
        } else if met & self.exclude != 0 {
            Verdict::OutOfScope
        } else if possible & self.exclude != 0 {
            Verdict::Undecided
        } else if self.include & possible == 0 && self.include != 0 || self.within & possible == 0 && self.within != 0 {
            Verdict::OutOfScope
        } else if self.include & met == 0 && self.include != 0 || self.within & met == 0 && self.within != 0 {
            Verdict::Undecided
        } else {
            Verdict::InScope
        }
    }
}

impl ScopeMatch {
    /// The same where nobody knows about some rules.
    #[inline(always)]
    pub fn with_unknown(self, rules: u64) -> Self {
        Self { met: self.met & !rules, possible: self.possible | rules }
    }
}

const _: () = {
    assert!(size_of::<ScopeMatch>() == 16);
    assert!(size_of::<ScopeControl>() == 64);
    assert!(MAX_RULES == u64::BITS as usize);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(met: u64, possible: u64) -> ScopeMatch {
        ScopeMatch { met, possible: met | possible }
    }

    /// Rule 0 asks about processes, rule 1 about cgroups, rule 2 about both.
    fn check(include: u64, exclude: u64, process: ScopeMatch, cgroup: ScopeMatch, expect: Verdict) {
        let control = ScopeControl {
            state: state::LIMITED,
            include,
            exclude,
            any_process: 0b010,
            any_cgroup: 0b001,
            ..ScopeControl::default()
        };
        assert_eq!(control.decide(process, cgroup), expect, "{include:b} {exclude:b} {process:?} {cgroup:?}");
    }

    /// What is included and not excluded is in scope, and what is not known is kept out.
    #[test]
    fn rules_decide() {
        use Verdict::{InScope, OutOfScope, Undecided};
        let none = ScopeMatch::default();
        check(0, 0b001, none, none, InScope);
        check(0, 0b001, bits(0b001, 0), none, OutOfScope);
        check(0, 0b001, bits(0, 0b001), none, Undecided);
        check(0, 0b011, bits(0, 0b001), bits(0b010, 0), OutOfScope);
        check(0, 0b100, bits(0b100, 0), none, InScope);
        check(0, 0b100, bits(0b100, 0), bits(0b100, 0), OutOfScope);
        check(0, 0b100, bits(0b100, 0), bits(0, 0b100), Undecided);
        check(0b011, 0, none, none, OutOfScope);
        check(0b011, 0, bits(0b001, 0), none, InScope);
        check(0b011, 0, bits(0b001, 0), bits(0, 0b010), InScope);
        check(0b011, 0, none, bits(0, 0b010), Undecided);
        check(0b001, 0b010, bits(0b001, 0), bits(0b010, 0), OutOfScope);
        check(0b001, 0b010, bits(0b001, 0), bits(0, 0b010), Undecided);
    }

    /// A part of what is in scope: of two lists one rule each has to be met, and none that excludes.
    #[test]
    fn a_part_is_within() {
        use Verdict::{InScope, OutOfScope, Undecided};
        let check = |include: u64, exclude: u64, process: ScopeMatch, expect: Verdict| {
            let control = ScopeControl {
                state: state::LIMITED,
                include,
                exclude,
                within: 0b1000,
                any_cgroup: 0b1111,
                ..ScopeControl::default()
            };
            assert!(control.asks_about_processes() && !control.asks_about_cgroups());
            assert_eq!(control.decide(process, ScopeMatch::default()), expect, "{include:b} {exclude:b} {process:?}");
        };
        let none = ScopeMatch::default();
        check(0, 0, none, OutOfScope);
        check(0, 0, bits(0b1000, 0), InScope);
        check(0, 0, bits(0, 0b1000), Undecided);
        // Who is not included is not within, whoever asks for it.
        check(0b0001, 0, bits(0b1000, 0), OutOfScope);
        check(0b0001, 0, bits(0b1000, 0b0001), Undecided);
        check(0b0001, 0, bits(0b0001, 0), OutOfScope);
        check(0b0001, 0, bits(0b0001, 0b1000), Undecided);
        check(0b0011, 0, bits(0b1010, 0), InScope);
        check(0, 0b0001, bits(0b1001, 0), OutOfScope);
        check(0, 0b0001, bits(0b1000, 0b0001), Undecided);
        check(0b0010, 0b0001, bits(0b1010, 0), InScope);
    }

    /// Without rules everything is in scope; while they change, nothing is decided.
    #[test]
    fn states_come_first() {
        let open = ScopeControl::default();
        assert_eq!(open.decide(bits(1, 0), bits(1, 0)), Verdict::InScope);
        let changing = ScopeControl { state: state::CHANGING, ..open };
        assert_eq!(changing.decide(bits(1, 0), bits(1, 0)), Verdict::Undecided);
    }
}

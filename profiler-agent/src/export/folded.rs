//! Folded stacks: `process;frame;...;leaf COUNT`, root first.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{incomplete_marker, wait_marker};
use crate::profile::{Events, Profile, printable};

/// Encodes a profile, one line per distinct stack, sorted by stack.
///
/// Kernel frames end in `_[k]`; inlined functions are frames of their own. A stack that is not whole has a frame `[incomplete: REASON]` next to the
/// process. Where waits are recorded, all values are microseconds, time spent waiting for a CPU ends in a frame
/// `[run queue]`; and where CPU time is recorded too, the frame after the process says which of both it is.
pub fn encode(profile: &Profile) -> String {
    lines(profile).into_iter().fold(String::new(), |mut text, (stack, count)| {
        // SANITY: writing to a string cannot fail.
        let _ = writeln!(text, "{stack} {count}");
        text
    })
}

/// The stacks and their samples, or microseconds.
pub(super) fn lines(profile: &Profile) -> BTreeMap<String, u64> {
    let mut lines: BTreeMap<String, u64> = BTreeMap::new();
    let period_ns = u64::try_from(profile.period.as_nanos()).unwrap_or(u64::MAX);
    for sample in &profile.samples {
        let mut stack = printable(&sample.process.name);
        if stack.is_empty() {
            stack.push_str("[unnamed process]");
        }
        if profile.events == Events::Both {
            stack.push_str(if sample.kind.is_off_cpu() { ";[off-cpu]" } else { ";[on-cpu]" });
        }
        if let Some(marker) = incomplete_marker(sample) {
            stack.push(';');
            stack.push_str(&marker);
        }
        for frame in sample.frames.iter().rev() {
            stack.push(';');
            stack.push_str(&frame.display_name());
            for name in frame.inlined_names().rev() {
                stack.push(';');
                stack.push_str(&name);
            }
        }
        if let Some(marker) = wait_marker(sample) {
            stack.push(';');
            stack.push_str(marker);
        }
        let value = match profile.events {
            Events::OnCpu => sample.count,
            // Nanoseconds, until all of a stack are added up.
            _ if sample.kind.is_off_cpu() => sample.time_ns,
            _ => sample.count.saturating_mul(period_ns),
        };
        let line = lines.entry(stack).or_default();
        *line = line.saturating_add(value);
    }
    if profile.events != Events::OnCpu {
        lines.values_mut().for_each(|value| *value = value.saturating_add(500) / 1000);
        lines.retain(|_, value| *value != 0);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing;

    /// Root first, kernel frames marked, reasons shown, equal stacks of several threads added up.
    #[test]
    fn writes_root_first_and_marks_what_is_missing() {
        assert_eq!(
            encode(&testing::profile()),
            "burner;[incomplete: depth limit];libx.so+0x401300;[unmapped] 3\n\
             burner;main;work;sys_read_[k] 7\n"
        );
    }

    /// What is inlined stands between its caller and what it calls.
    #[test]
    fn writes_inlined_functions_as_frames() {
        assert_eq!(encode(&testing::inlined()), "burner;main;work;outer;inner;sys_read_[k] 5\n");
    }

    /// Both kinds of time in one unit, and told apart.
    #[test]
    fn writes_microseconds_where_waits_are_recorded() {
        assert_eq!(
            encode(&testing::both()),
            "burner;[off-cpu];main;work;sys_read_[k] 3000\n\
             burner;[off-cpu];main;work;sys_read_[k];[run queue] 2000\n\
             burner;[on-cpu];[incomplete: depth limit];libx.so+0x401300;[unmapped] 30303\n\
             burner;[on-cpu];main;work;sys_read_[k] 70707\n"
        );
    }
}

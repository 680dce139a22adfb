//! Folded stacks: `process;frame;...;leaf COUNT`, root first.

use std::{collections::BTreeMap, fmt::Write as _};

use super::incomplete_marker;
use crate::profile::{Profile, printable};

/// Encodes a profile, one line per distinct stack, sorted by stack.
///
/// Kernel frames end in `_[k]`. A stack that is not whole has a frame `[incomplete: REASON]` next to the
/// process.
pub fn encode(profile: &Profile) -> String {
    lines(profile).into_iter().fold(String::new(), |mut text, (stack, count)| {
        // SANITY: writing to a string cannot fail.
        let _ = writeln!(text, "{stack} {count}");
        text
    })
}

/// The stacks and their counts.
pub(super) fn lines(profile: &Profile) -> BTreeMap<String, u64> {
    let mut lines = BTreeMap::new();
    for sample in &profile.samples {
        let mut stack = printable(&sample.process.name);
        if stack.is_empty() {
            stack.push_str("[unnamed process]");
        }
        if let Some(marker) = incomplete_marker(sample) {
            stack.push(';');
            stack.push_str(&marker);
        }
        for frame in sample.frames.iter().rev() {
            stack.push(';');
            stack.push_str(&frame.display_name());
        }
        *lines.entry(stack).or_default() += sample.count;
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
            "burner;[incomplete: depth limit];[libx.so];[unmapped] 3\n\
             burner;main;work;sys_read_[k] 7\n"
        );
    }
}

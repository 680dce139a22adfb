//! Where in the configuration file a setting is.

/// The line, from one, on which a setting such as `budget.cpu` is set; `None`: it is not, or not where it is looked for.
pub(super) fn line_of(text: &str, setting: &str) -> Option<usize> {
    let mut lines = text.lines().enumerate().map(|(index, line)| (index + 1, without_comment(line))).peekable();
    let mut found = None;
    // Keys of a block are further to the right than the block's own.
    let mut outer = None;
    // What follows a key on its line may be a mapping in braces.
    let mut rest = "";
    for key in setting.split('.') {
        if let Some(after) = after_key(rest, key) {
            rest = after;
            continue;
        }
        // All keys of a block begin where its first one does.
        let mut block = None;
        loop {
            let (number, line) = lines.next()?;
            let trimmed = line.trim_start();
            let indent = line.len() - trimmed.len();
            if trimmed.is_empty() {
                continue;
            }
            if outer.is_some_and(|outer| indent <= outer) {
                return None;
            }
            if indent > *block.get_or_insert(indent) {
                continue;
            }
            let own = trimmed.trim_start_matches("- ");
            if let Some(after) = own.strip_prefix(key).and_then(|after| after.trim_start().strip_prefix(':')) {
                (found, outer, rest) = (Some(number), Some(indent), after);
                break;
            }
        }
    }
    found
}

/// The setting that an error is about, by its first words.
pub(super) fn setting_of(error: &str) -> &str {
    let is_name = |char: char| char.is_ascii_lowercase() || char == '_' || char == '.';
    let end = error.find(|char: char| !is_name(char)).unwrap_or(error.len());
    &error[..end]
}

/// What follows `key:` in a mapping in braces.
fn after_key<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let inside = text.trim_start().strip_prefix('{')?;
    let start = inside.match_indices(key).map(|(start, _)| start).find(|&start| {
        let is_first = inside[..start].trim_end().is_empty() || inside[..start].trim_end().ends_with(',');
        is_first && inside[start + key.len()..].trim_start().starts_with(':')
    })?;
    inside[start + key.len()..].trim_start().strip_prefix(':')
}

fn without_comment(line: &str) -> &str {
    let comment = line.find(" #").or_else(|| line.starts_with('#').then_some(0));
    comment.map_or(line, |start| &line[..start])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# cpu: 1\nsampling: {frequency: 49, event: both}\n\nexport:\n  window: 3s\n  spool:\n    mib: 7 # mib\nbudget:\n  cpu: 7\n";

    fn check(setting: &str, expect: Option<usize>) {
        assert_eq!(line_of(TEXT, setting), expect, "{setting}");
    }

    /// Blocks and braces are looked through; what is in other blocks is not found.
    #[test]
    fn finds_settings() {
        check("budget.cpu", Some(9));
        check("sampling.event", Some(2));
        check("export.spool.mib", Some(7));
        check("export.mib", None);
        check("sampling.window", None);
        check("status.listen", None);
        check("", None);
    }

    /// Errors begin with the setting.
    #[test]
    fn errors_name_settings() {
        assert_eq!(setting_of("budget.cpu: 7 is outside of 8"), "budget.cpu");
        assert_eq!(setting_of("symbolize.debuginfod.urls, number 2: x"), "symbolize.debuginfod.urls");
        assert_eq!(setting_of("The"), "");
    }
}

//! Whether anything may be collected: not while somebody says that nothing is to be.

use std::{fmt, path::PathBuf};

/// Who says that nothing is to be collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopReason {
    /// The stop file exists.
    File,
    /// The configuration says so.
    Configuration,
    /// A command over the control socket, or a signal.
    Command,
}

impl StopReason {
    /// Word for people and scripts.
    pub fn label(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Configuration => "configuration",
            Self::Command => "command",
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// What keeps collection from going on. Each reason is taken back where it was given.
#[derive(Debug)]
pub struct KillSwitch {
    file: PathBuf,
    by_file: bool,
    by_configuration: bool,
    by_command: bool,
}

impl KillSwitch {
    /// A switch that looks for this file.
    pub fn new(file: PathBuf, by_configuration: bool) -> Self {
        let mut switch = Self { file, by_file: false, by_configuration, by_command: false };
        switch.look();
        switch
    }

    /// Looks whether the file is there.
    pub fn look(&mut self) {
        // Whatever is there stops: a folder, a broken link. Where that cannot be told, what was known before holds.
        match self.file.symlink_metadata() {
            Ok(_) => self.by_file = true,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
                self.by_file = false;
            }
            Err(_) => {}
        }
    }

    /// Takes over what the configuration says.
    pub fn configure(&mut self, file: PathBuf, stopped: bool) {
        (self.file, self.by_configuration) = (file, stopped);
        self.look();
    }

    /// Stops, or takes that back.
    pub fn command(&mut self, stopped: bool) {
        self.by_command = stopped;
    }

    /// Who says that nothing is to be collected: nobody, usually.
    pub fn reasons(&self) -> Vec<StopReason> {
        [
            (self.by_file, StopReason::File),
            (self.by_configuration, StopReason::Configuration),
            (self.by_command, StopReason::Command),
        ]
        .into_iter()
        .filter_map(|(holds, reason)| holds.then_some(reason))
        .collect()
    }

    /// Whether nothing is to be collected.
    pub fn is_off(&self) -> bool {
        self.by_file || self.by_configuration || self.by_command
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Each reason holds until it is taken back, whatever becomes of the others.
    #[test]
    fn reasons_are_independent() {
        let folder = std::env::temp_dir().join(format!("profiler-kill-switch-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join("stop");
        let mut switch = KillSwitch::new(file.clone(), false);
        assert!(!switch.is_off());
        fs::write(&file, "").expect("a file");
        switch.look();
        switch.command(true);
        assert_eq!(switch.reasons(), [StopReason::File, StopReason::Command]);
        fs::remove_file(&file).expect("removed");
        switch.look();
        assert_eq!(switch.reasons(), [StopReason::Command]);
        switch.command(false);
        assert!(!switch.is_off());
        switch.configure(file, true);
        switch.command(false);
        assert_eq!(switch.reasons(), [StopReason::Configuration]);
        fs::remove_dir_all(&folder).expect("removed");
    }
}

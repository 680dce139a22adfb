//! Profiles as files, for machines without a receiver: one for each window, the oldest removed.
//!
//! In: profiles. Out: `profile-2026-11-21T18-04-07.123Z.pb.gz` and the like in a folder, which may hold other files as
//! well: only what has such a name is ever removed.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use thiserror::Error;

use super::{
    Format,
    folder::{FileName, Folder, FolderError, Kept, Limits, NewFile, on_disk},
};
use crate::profile::Profile;

/// What names begin with.
const PREFIX: &str = "profile-";
/// Profiles tell what a machine does: they are for the agent's user and group.
const FOLDER_MODE: u32 = 0o750;
const FILE_MODE: u32 = 0o640;
/// The last moment whose year has four digits, milliseconds since 1970.
const LAST_MS: u64 = 253_402_300_799_999;
/// Formats whose files are rotated: another may have been configured before.
const FORMATS: [Format; 4] = [Format::Folded, Format::Pprof, Format::Svg, Format::Otlp];

/// What to write, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Made where there is none.
    pub folder: PathBuf,
    /// Form of each file.
    pub format: Format,
    /// How much is kept.
    pub limits: Limits,
}

/// Why a profile was not written.
#[derive(Debug, Error)]
pub enum FilesError {
    /// The folder's fault.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// It has no such form.
    #[error("a profile cannot be encoded: {0:#}")]
    Encode(anyhow::Error),
}

/// A profile that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The file.
    pub path: PathBuf,
    /// What it takes on disk.
    pub bytes: u64,
}

/// Writes profiles to a folder.
#[derive(Debug)]
pub struct FileExporter {
    folder: Folder<ProfileFile>,
    format: Format,
    removed: u64,
}

/// A file of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ProfileFile {
    /// When its window began, milliseconds since 1970.
    start_ms: u64,
    format: Format,
}

impl FileName for ProfileFile {
    fn file_name(&self) -> String {
        // Colons separate hosts, drives and lists of paths elsewhere.
        let start = humantime::format_rfc3339_millis(self.start()).to_string().replace(':', "-");
        format!("{PREFIX}{start}.{}", self.format.extension())
    }
}

impl ProfileFile {
    fn new(start: SystemTime, format: Format) -> Self {
        let start = start.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { start_ms: start.as_millis().try_into().unwrap_or(LAST_MS).min(LAST_MS), format }
    }

    /// The file that has this name, if it can be one of ours.
    fn parse(name: &str) -> Option<Self> {
        let (date, rest) = name.strip_prefix(PREFIX)?.split_once('T')?;
        let (time, extension) = rest.split_once('Z')?;
        let start = humantime::parse_rfc3339(&format!("{date}T{}Z", time.replace('-', ":"))).ok()?;
        let format = FORMATS.into_iter().find(|format| extension.strip_prefix('.') == Some(format.extension()))?;
        let file = Self::new(start, format);
        (file.file_name() == name).then_some(file)
    }

    fn start(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.start_ms)
    }
}

impl FileExporter {
    /// Makes the folder where there is none, keeps other agents out of it, and finds what earlier runs left.
    pub fn open(settings: &Settings, now: SystemTime) -> Result<Self, FilesError> {
        let mut folder: Folder<ProfileFile> = Folder::open(&settings.folder, FOLDER_MODE, settings.limits)?;
        let mut found = folder.find(ProfileFile::parse)?;
        found.sort_unstable_by_key(|file| file.start_ms);
        let mut removed = 0;
        for file in found {
            // They may vanish while they are listed; a folder with such a name is somebody else's.
            let Ok(metadata) = folder.path_of(&file).symlink_metadata() else { continue };
            if metadata.is_file() {
                let kept = Kept { file, since: file.start(), bytes: on_disk(&metadata) };
                folder.adopt(kept, now, |_, _| removed += 1);
            }
        }
        Ok(Self { folder, format: settings.format, removed })
    }

    /// Writes a profile, and removes what has to make room.
    pub fn write(&mut self, profile: &Profile, now: SystemTime) -> Result<Written, FilesError> {
        let contents = self.format.encode(profile).map_err(FilesError::Encode)?;
        let mut file = ProfileFile::new(profile.start, self.format);
        // Of two windows that began at once (the clock was set back), the later is a millisecond later.
        while self.folder.path_of(&file).symlink_metadata().is_ok() && file.start_ms < LAST_MS {
            file.start_ms += 1;
        }
        let path = self.folder.path_of(&file);
        let file = NewFile { file, since: file.start(), mode: FILE_MODE, parts: &[&contents] };
        let bytes = self.folder.write(file, now, |_, _| self.removed += 1)?;
        Ok(Written { path, bytes })
    }

    /// What the files take on disk.
    pub fn bytes(&self) -> u64 {
        self.folder.bytes()
    }

    /// How many files there are.
    pub fn len(&self) -> usize {
        self.folder.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many files had to go, since this began.
    pub fn removed(&self) -> u64 {
        self.removed
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::export::testing::{self, Scratch};

    const WIDE: Limits = Limits { bytes: 1 << 30, age: None };

    fn open(scratch: &Scratch, format: Format, limits: Limits, now: SystemTime) -> FileExporter {
        let folder = scratch.0.clone();
        FileExporter::open(&Settings { folder, format, limits }, now).expect("a folder")
    }

    /// The small profile, of a window that began so many seconds later.
    fn profile(seconds: u64) -> Profile {
        let profile = testing::profile();
        Profile { start: profile.start + Duration::from_millis(1000 * seconds + 7), ..profile }
    }

    fn write(exporter: &mut FileExporter, seconds: u64) -> Written {
        exporter.write(&profile(seconds), profile(seconds).start).expect("it is written")
    }

    /// Names say when windows began, and are recognised; what they hold is what their format says.
    #[test]
    fn writes_a_file_for_each_window() {
        for (format, extension) in FORMATS.into_iter().zip(["folded", "pb.gz", "svg", "otlp"]) {
            let scratch = Scratch::new(extension);
            let mut exporter = open(&scratch, format, WIDE, profile(0).start);
            let written = write(&mut exporter, 0);
            assert_eq!(scratch.names(), [format!("profile-2023-11-14T22-13-20.007Z.{extension}")]);
            assert_eq!(Format::of_file_name(&written.path), Some(format));
            // (Pictures and profile IDs are different each time.)
            if matches!(format, Format::Folded | Format::Pprof) {
                assert_eq!(fs::read(&written.path).expect("a file"), format.encode(&profile(0)).expect("it encodes"));
            }
            let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
            assert_eq!((mode(&scratch.0) & 0o027, mode(&written.path) & 0o137), (0, 0));
            // Again of the same moment, and of one that has no such name.
            write(&mut exporter, 0);
            let early = Profile { start: UNIX_EPOCH - Duration::from_secs(1), ..profile(0) };
            exporter.write(&early, profile(0).start).expect("it is written");
            let late = Profile { start: UNIX_EPOCH + Duration::from_secs(1 << 40), ..profile(0) };
            exporter.write(&late, profile(0).start).expect("it is written");
            assert_eq!(scratch.names()[2], format!("profile-2023-11-14T22-13-20.008Z.{extension}"));
            assert_eq!(exporter.len(), 4);
            assert!(exporter.bytes() >= 4 * written.bytes);
        }
    }

    /// The oldest files go, those of earlier runs too; nobody else's.
    #[test]
    fn removes_the_oldest() {
        let scratch = Scratch::new("rotate");
        let mut exporter = open(&scratch, Format::Pprof, WIDE, profile(0).start);
        let each = write(&mut exporter, 0).bytes;
        drop(exporter);
        let foreign = [
            "note",
            "profile-2001-01-01T00-00-00.000Z.pb.gz.old",
            "profile-2001-01-01T00-00-00Z.pb.gz",
            "profile-2001-02-30T00-00-00.000Z.pb.gz",
            "profile-2001-01-01T00-00-00.000Z.txt",
            "profile-old.pb.gz",
        ];
        for name in foreign {
            fs::write(scratch.0.join(name), vec![1; 100_000]).expect("a file");
        }
        fs::create_dir(scratch.0.join("profile-2001-01-01T00-00-00.000Z.svg")).expect("a folder");
        // What a killed agent was writing.
        fs::write(scratch.0.join(".incoming"), b"half").expect("a file");
        let limits = Limits { bytes: 3 * each, ..WIDE };
        let mut exporter = open(&scratch, Format::Otlp, limits, profile(0).start);
        assert_eq!(exporter.bytes(), each);
        for seconds in 1..5 {
            write(&mut exporter, seconds);
        }
        assert_eq!((exporter.len(), exporter.bytes(), exporter.removed()), (3, 3 * each, 2));
        let starts = |scratch: &Scratch| -> Vec<u64> {
            let files = scratch.names().iter().filter_map(|name| ProfileFile::parse(name)).collect::<Vec<_>>();
            let first = ProfileFile::new(profile(0).start, Format::Otlp).start_ms;
            files.iter().filter_map(|file| file.start_ms.checked_sub(first)).map(|ms| ms / 1000).collect()
        };
        assert_eq!(starts(&scratch), [2, 3, 4]);
        // One that somebody took away is not missed.
        fs::remove_file(scratch.0.join(ProfileFile::new(profile(2).start, Format::Otlp).file_name())).expect("a file");
        write(&mut exporter, 5);
        assert_eq!(starts(&scratch), [3, 4, 5]);
        drop(exporter);
        let limits = Limits { age: Some(Duration::from_secs(60)), ..WIDE };
        let mut exporter = open(&scratch, Format::Otlp, limits, profile(64).start);
        assert_eq!((starts(&scratch), exporter.removed()), (vec![4, 5], 1));
        write(&mut exporter, 65);
        assert_eq!((starts(&scratch), exporter.removed()), (vec![5, 65], 2));
        assert_eq!(scratch.names().len(), foreign.len() + 1 + 2);
    }

    /// A folder that is gone is an error for each profile until it is back; a second agent is told.
    #[test]
    fn says_what_is_wrong_with_the_folder() {
        let scratch = Scratch::new("gone");
        let mut exporter = open(&scratch, Format::Folded, WIDE, profile(0).start);
        let settings = Settings { folder: scratch.0.clone(), format: Format::Folded, limits: WIDE };
        let error = FileExporter::open(&settings, profile(0).start).expect_err("it is in use");
        assert!(error.to_string().ends_with("is in use by another agent"), "{error}");
        fs::remove_dir_all(&scratch.0).expect("the folder");
        let error = exporter.write(&profile(0), profile(0).start).expect_err("it is gone");
        assert!(error.to_string().contains("No such file or directory"), "{error}");
        fs::create_dir(&scratch.0).expect("a folder");
        write(&mut exporter, 1);
        assert_eq!((scratch.names().len(), exporter.len()), (1, 1));
    }
}

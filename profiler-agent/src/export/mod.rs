//! Turns profiles into files and messages.

pub mod delivery;
pub mod files;
pub mod folded;
mod folder;
pub mod otlp;
pub mod pprof;
pub mod svg;

#[cfg(fuzzing)]
pub(crate) use self::delivery::fuzzing;
pub use self::folder::{FolderError, Limits};

use std::path::Path;

use clap::ValueEnum;
use profiler_common::abi::sample::EventKind;

use crate::profile::{Profile, Sample};

/// Form of a written profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One line per stack: `process;frame;...;leaf COUNT`, root first; microseconds where waits are recorded.
    Folded,
    /// Gzip-compressed protobuf for `go tool pprof` and its relatives.
    Pprof,
    /// Flame graph to open in a browser.
    Svg,
    /// OTLP export request, binary protobuf.
    Otlp,
}

impl Format {
    /// What a file's name asks for, if anything.
    pub fn of_file_name(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
        if ends(&[".pb.gz", ".pprof", ".pprof.gz"]) {
            Some(Self::Pprof)
        } else if ends(&[".svg"]) {
            Some(Self::Svg)
        } else if ends(&[".folded", ".txt", ".collapsed"]) {
            Some(Self::Folded)
        } else if ends(&[".otlp", ".otlp.pb"]) {
            Some(Self::Otlp)
        } else {
            None
        }
    }

    /// What names of its files end with.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Folded => "folded",
            Self::Pprof => "pb.gz",
            Self::Svg => "svg",
            Self::Otlp => "otlp",
        }
    }

    /// Encodes a profile.
    pub fn encode(self, profile: &Profile) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::Folded => Ok(folded::encode(profile).into_bytes()),
            Self::Pprof => pprof::encode(profile),
            Self::Svg => svg::encode(profile),
            Self::Otlp => Ok(otlp::encode(profile)),
        }
    }
}

/// Frame that stands at the root of a stack that is not whole, and says why.
fn incomplete_marker(sample: &Sample) -> Option<String> {
    (!sample.end.is_whole()).then(|| format!("[incomplete: {}]", sample.end.label()))
}

/// Frame that stands beyond the leaf of a wait whose kernel frames do not tell its kind.
fn wait_marker(sample: &Sample) -> Option<&'static str> {
    (sample.kind == EventKind::RunQueue).then_some("[run queue]")
}

/// Text as it is written: names come from files that anybody may have made, and a terminal would obey some of what they
/// can hold.
fn legible(text: &str) -> String {
    text.replace(char::is_control, ":")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a terminal would obey is replaced, and nothing else.
    #[test]
    fn control_characters_are_not_written() {
        assert_eq!(legible("a;b\n\u{1b}[1mé"), "a;b::[1mé");
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A small profile for the exporters' tests, and a place for what they write.

    use std::{
        fs,
        path::PathBuf,
        sync::{Arc, Mutex},
        time::{Duration, UNIX_EPOCH},
    };

    use profiler_common::abi::{
        process::ProcessKey,
        sample::{EventKind, StackEnd},
    };

    use crate::profile::{
        Events, Executable, ExecutableId, FileIdentity, FileOffset, Frame, FrameName, FrameType, InlinedFunction,
        Nameless, ProcessInfo, Profile, Resource, ResourceValue, Sample, Segment, SourceLine, VirtualAddress,
    };

    /// Where a folder of a test's own can be made; removed with it.
    pub(crate) struct Scratch(pub(crate) PathBuf);

    impl Scratch {
        pub(crate) fn new(test: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("export-{}-{test}", std::process::id()));
            // It may not exist yet.
            let _ = fs::remove_dir_all(&folder);
            Self(folder)
        }

        /// Names of what is in it, in order.
        pub(crate) fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).expect("the folder");
            let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"));
            let mut names: Vec<_> = names.collect();
            names.sort();
            names
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Two threads share a whole stack; a third has one that is cut off.
    pub(crate) fn profile() -> Profile {
        let executable = Arc::new(Executable {
            table: 1,
            id: ExecutableId(1),
            path: "/opt/libx.so".to_owned(),
            build_id: Some(vec![0xab; 20].into()),
            identity: FileIdentity { go_build_id: Some("a/b/c/d".into()), hash: Some([0xcd; 16]) },
            segments: Box::new([Segment {
                offset: FileOffset(0x1000),
                size: 0x4000,
                address: VirtualAddress(0x40_1000),
            }]),
            file: Mutex::default(),
            debug: Mutex::default(),
        });
        let native =
            |name, address| Arc::new(Frame::new(FrameType::Native, name, Some(Arc::clone(&executable)), address));
        let function = |name: &str| FrameName::Function(name.into());
        let kernel = Arc::new(Frame::new(FrameType::Kernel, function("sys_read"), None, 0xffff_ffff_8100_0000));
        let unmapped = Arc::new(Frame::new(FrameType::Native, FrameName::Unmapped, None, 0x7f00_0000_1000));
        let process = Arc::new(ProcessInfo {
            key: ProcessKey { start_time_ns: 1, tgid: 42, exec_id: 0 },
            name: "burner".to_owned(),
            cgroup: None,
        });
        let attribute = |name: &str, value: &str| (name.to_owned(), ResourceValue::from(value));
        let resource =
            Arc::new(Resource::new([attribute("service.name", "burner"), attribute("host.name", "machine")]));
        let sample = |thread: &str, end, frames, count| Sample {
            resource: Arc::clone(&resource),
            process: Arc::clone(&process),
            thread_name: thread.into(),
            kind: EventKind::OnCpu,
            end,
            frames,
            count,
            time_ns: 0,
        };
        let whole =
            || vec![Arc::clone(&kernel), native(function("work"), 0x40_1100), native(function("main"), 0x40_1200)];
        Profile {
            events: Events::OnCpu,
            start: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
            duration: Duration::from_secs(10),
            period: Duration::from_nanos(10_101_010),
            marks: Arc::default(),
            samples: vec![
                sample("one", StackEnd::Root, whole(), 5),
                sample("two", StackEnd::Root, whole(), 2),
                sample(
                    "two",
                    StackEnd::DepthLimit,
                    vec![unmapped, native(FrameName::Unnamed(Nameless::NotCovered), 0x40_1300)],
                    3,
                ),
            ],
        }
    }

    /// One stack whose leaf has a function inlined in it that has another inlined, and source lines.
    pub(crate) fn inlined() -> Profile {
        let mut profile = profile();
        let place = |file: &str, line, start_line| Some(SourceLine { file: file.into(), line, start_line });
        let inlined = |name: &str, place| InlinedFunction { name: name.into(), place };
        let leaf = &profile.samples[0].frames[1];
        let leaf = Frame {
            place: place("work.c", 20, 10),
            inlined: [inlined("inner", place("inner.h", 3, 2)), inlined("outer", place("work.c", 7, 5))].into(),
            ..Frame::new(leaf.frame_type, leaf.name.clone(), leaf.executable.clone(), leaf.address)
        };
        profile.samples.truncate(1);
        profile.samples[0].frames[1] = Arc::new(leaf);
        profile
    }

    /// The small profile with waits: 3 ms blocked and 2 ms waiting for a CPU in one stack.
    pub(crate) fn both() -> Profile {
        let mut profile = profile();
        let wait = |kind, time_ns| Sample { kind, count: 4, time_ns, ..profile.samples[0].clone() };
        let waits = [wait(EventKind::Blocked, 3_000_000), wait(EventKind::RunQueue, 2_000_000)];
        profile.samples.extend(waits);
        Profile { events: Events::Both, ..profile }
    }
}

//! What the configuration wants nobody to see: names and paths that its patterns match are replaced by `[redacted]`.
//!
//! In: windows that are not labelled yet. Out: the same, before anything is made of them, so that no exporter and no
//! attribute can tell what was there. Build IDs stay: they are how a backend that may know the names still finds them.

#[cfg(fuzzing)]
pub(crate) mod fuzzing;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use crate::{
    pattern::Pattern,
    profile::{
        Executable, Frame, FrameName, FrameType, FunctionName, InlinedFunction, Nameless, ProcessInfo, Profile, Sample,
        SourceLine, Unlabelled,
    },
};

/// What stands in the place of what is not shown.
pub const REDACTED: &str = "[redacted]";
/// Places of a text that are looked at: what a process says of its code may hold any number of slashes.
const MAX_PLACES: usize = 32;

/// What is not shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redaction {
    /// Paths of executables and source files.
    pub paths: Vec<Pattern>,
    /// Names of processes and threads.
    pub processes: Vec<Pattern>,
    /// Whether functions of files whose paths match have no names either.
    pub functions: bool,
}

impl Default for Redaction {
    fn default() -> Self {
        Self::NONE
    }
}

impl Redaction {
    /// Everything is shown.
    pub const NONE: Self = Self { paths: Vec::new(), processes: Vec::new(), functions: true };

    /// Whether there is nothing to hide.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty() && self.processes.is_empty()
    }

    /// Replaces what matches.
    pub fn apply(&self, mut profile: Profile<Unlabelled>) -> Profile<Unlabelled> {
        if self.is_empty() {
            return profile;
        }
        let mut replaced = Replaced::default();
        for sample in &mut profile.samples {
            self.redact(sample, &mut replaced);
        }
        profile
    }

    /// A text with the paths in it that match replaced; `None` where there are none. A path may hold blanks, so what follows
    /// one that matches `/folder/*` is gone too, up to the next quotation mark.
    pub fn text(&self, text: &str) -> Option<String> {
        if self.paths.is_empty() {
            return None;
        }
        let is_start = |(at, _): &(usize, &str)| {
            // (Of `file:///opt/x`, the last slash begins the path.)
            let before = text[..*at].chars().next_back();
            before.is_none_or(|c| c == '/' || !(c.is_alphanumeric() || matches!(c, '.' | '-' | '_')))
        };
        let mut redacted = String::new();
        let mut rest = 0;
        for (at, _) in text.match_indices('/').filter(is_start).take(MAX_PLACES) {
            if at < rest {
                continue;
            }
            if let Some(len) = self.matching_prefix(&text[at..]) {
                redacted.push_str(&text[rest..at]);
                redacted.push_str(REDACTED);
                rest = at + len;
            }
        }
        (rest > 0).then(|| redacted + &text[rest..])
    }

    /// How much of what begins with a path is one that matches.
    fn matching_prefix(&self, text: &str) -> Option<usize> {
        let line = &text[..text.find(['"', '\n']).unwrap_or(text.len())];
        let word = &line[..line.find(char::is_whitespace).unwrap_or(line.len())];
        let ends =
            [line, without_position(line), word.trim_end_matches([':', ',', ';', '.', ')']), without_position(word)];
        ends.into_iter().find(|end| Pattern::any(&self.paths, end)).map(str::len)
    }

    fn redact(&self, sample: &mut Sample<Unlabelled>, replaced: &mut Replaced) {
        let is_secret = |name: &str| Pattern::any(&self.processes, name);
        let is_secret_process = is_secret(&sample.process.name);
        if is_secret_process || is_secret(&sample.thread_name) {
            sample.thread_name = REDACTED.into();
        }
        if is_secret_process {
            let process = replaced.processes.entry(Arc::as_ptr(&sample.process) as usize).or_insert_with(|| {
                let hidden = ProcessInfo { name: REDACTED.to_owned(), ..(*sample.process).clone() };
                (Arc::clone(&sample.process), Arc::new(hidden))
            });
            sample.process = Arc::clone(&process.1);
        }
        if self.paths.is_empty() {
            return;
        }
        for frame in &mut sample.frames {
            let known = replaced.frames.get(&(Arc::as_ptr(frame) as usize)).map(|(_, hidden)| Arc::clone(hidden));
            let hidden = known.unwrap_or_else(|| {
                let hidden = self.hidden(frame, &mut replaced.executables).map_or_else(|| Arc::clone(frame), Arc::new);
                replaced.frames.insert(Arc::as_ptr(frame) as usize, (Arc::clone(frame), Arc::clone(&hidden)));
                hidden
            });
            *frame = hidden;
        }
    }

    /// A frame without what matches; `None` where nothing does.
    fn hidden(&self, frame: &Frame, executables: &mut HashMap<usize, Arc<Executable>>) -> Option<Frame> {
        let is_secret = |path: &str| Pattern::any(&self.paths, path);
        let secret_file = frame.executable.as_ref().filter(|executable| is_secret(&executable.path));
        let executable = secret_file.map(|executable| {
            let hidden = executables.entry(Arc::as_ptr(executable) as usize);
            Arc::clone(hidden.or_insert_with(|| Arc::new(without_path(executable))))
        });
        if let (Some(executable), true) = (&executable, self.functions) {
            let name = FrameName::Unnamed(Nameless::Redacted);
            return Some(Frame::new(frame.frame_type, name, Some(Arc::clone(executable)), frame.address));
        }
        let place = |place: &Option<SourceLine>| match place {
            Some(place) if is_secret(&place.file) => Some(SourceLine { file: REDACTED.into(), ..place.clone() }),
            place => place.clone(),
        };
        let inlined = frame.inlined.iter();
        let hidden = Frame {
            frame_type: frame.frame_type,
            name: self.hidden_name(frame).unwrap_or_else(|| frame.name.clone()),
            executable: executable.or_else(|| frame.executable.clone()),
            address: frame.address,
            place: place(&frame.place),
            inlined: inlined.map(|it| InlinedFunction { name: it.name.clone(), place: place(&it.place) }).collect(),
        };
        let is_changed = secret_file.is_some()
            || hidden.name != frame.name
            || hidden.place != frame.place
            || hidden.inlined != frame.inlined;
        is_changed.then_some(hidden)
    }

    /// Runtimes put the source file into the names of what they compile: `JS:*spin /srv/app/spin.js:3:14`.
    fn hidden_name(&self, frame: &Frame) -> Option<FrameName> {
        let FrameName::Function(name) = &frame.name else { return None };
        if frame.frame_type != FrameType::Runtime {
            return None;
        }
        let hidden = |name: &str| self.text(name).map(|text| if self.functions { REDACTED.to_owned() } else { text });
        let readable = hidden(&name.readable);
        let system = name.system.as_deref().map(|system| hidden(system).unwrap_or_else(|| system.to_owned()));
        let system_matches = system.as_deref() != name.system.as_deref();
        (readable.is_some() || system_matches).then(|| {
            let readable = readable.unwrap_or_else(|| REDACTED.to_owned());
            FrameName::Function(FunctionName { readable: readable.into(), system: system.map(Into::into) })
        })
    }
}

/// What has been replaced in one profile, by where it is in memory; what it was is kept there as long.
#[derive(Default)]
struct Replaced {
    processes: HashMap<usize, (Arc<ProcessInfo>, Arc<ProcessInfo>)>,
    frames: HashMap<usize, (Arc<Frame>, Arc<Frame>)>,
    /// (Frames keep what they were.)
    executables: HashMap<usize, Arc<Executable>>,
}

fn without_path(executable: &Executable) -> Executable {
    Executable {
        id: executable.id,
        table: executable.table,
        path: REDACTED.to_owned(),
        build_id: executable.build_id.clone(),
        identity: executable.identity.clone(),
        segments: executable.segments.clone(),
        // Nobody reads the file by way of an export.
        file: Mutex::default(),
        debug: Mutex::default(),
    }
}

/// A text without the line and column at its end.
fn without_position(mut text: &str) -> &str {
    while let Some((path, number)) = text.rsplit_once(':')
        && !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit())
    {
        text = path;
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use profiler_common::abi::{
        process::ProcessKey,
        sample::{EventKind, StackEnd},
    };

    use super::*;
    use crate::{
        export::Format,
        label::{self, Labeller},
        profile::{Events, ExecutableId, FileIdentity},
    };

    const SECRET: &str = "hunter2";

    fn redaction(paths: &[&str], processes: &[&str], functions: bool) -> Redaction {
        let patterns = |texts: &[&str]| texts.iter().map(|&text| Pattern::from(text)).collect();
        Redaction { paths: patterns(paths), processes: patterns(processes), functions }
    }

    fn file(id: u32, path: &str) -> Arc<Executable> {
        Arc::new(Executable {
            id: ExecutableId(id),
            table: id,
            path: path.to_owned(),
            build_id: Some([0xab, id as u8].into()),
            identity: FileIdentity::default(),
            segments: Box::default(),
            file: Mutex::default(),
            debug: Mutex::default(),
        })
    }

    fn line(file: &str) -> Option<SourceLine> {
        Some(SourceLine { file: file.into(), line: 7, start_line: 1 })
    }

    fn frame(kind: FrameType, name: &str, executable: Option<&Arc<Executable>>, source: &str) -> Frame {
        let name = FrameName::Function(name.into());
        Frame { place: line(source), ..Frame::new(kind, name, executable.cloned(), 0x1000) }
    }

    /// Samples of a process that is secret, and of one whose thread, files, source and runtime code are.
    fn profile() -> Profile<Unlabelled> {
        let (secret, plain) = (file(1, "/opt/hunter2/lib.so"), file(2, "/usr/lib/libc.so.6"));
        let of_secret = frame(FrameType::Native, "hunter2_main", Some(&secret), "/src/hunter2/main.c");
        let mut inlining = frame(FrameType::Native, "qsort", Some(&plain), "/src/hunter2/qsort.c");
        inlining.inlined = [InlinedFunction { name: "compare".into(), place: line("/src/hunter2/compare.h") }].into();
        let runtime = frame(FrameType::Runtime, "JS:*spin file:///opt/hunter2/spin.js:3:14", None, "");
        let unnamed = Frame {
            address: 0x2000,
            name: FrameName::Unnamed(Nameless::NoSymbols),
            ..frame(FrameType::Native, "", Some(&secret), "")
        };
        let frames: Vec<_> = [of_secret, inlining, runtime, unnamed].map(Arc::new).into();
        let sample = |process: &str, thread: &str, frames: &[Arc<Frame>]| Sample {
            resource: Unlabelled,
            process: Arc::new(ProcessInfo { key: ProcessKey::default(), name: process.to_owned(), cgroup: None }),
            thread_name: thread.into(),
            kind: EventKind::OnCpu,
            end: StackEnd::Root,
            frames: frames.to_vec(),
            count: 1,
            time_ns: 0,
        };
        Profile {
            events: Events::OnCpu,
            start: SystemTime::UNIX_EPOCH,
            duration: Duration::from_secs(1),
            period: Duration::from_millis(10),
            marks: Arc::default(),
            samples: vec![sample("hunter2d", "worker", &[]), sample("nginx", "hunter2-io", &frames)],
        }
    }

    /// Whatever exporter writes it, in whatever form, says the secret nowhere; what is not secret is still there.
    #[test]
    fn no_exporter_tells() {
        let folded = |redact: Redaction| {
            let mut labeller = Labeller::new(label::Options { redact, ..label::Options::default() });
            let profile = labeller.label(profile());
            let bytes = [Format::Folded, Format::Otlp].map(|format| format.encode(&profile).expect("a profile"));
            let pprof = Format::Pprof.encode(&profile).expect("a profile");
            let mut unpacked = Vec::new();
            std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&pprof[..]), &mut unpacked).expect("gzip");
            let all = [&bytes[0][..], &bytes[1], &unpacked].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
            assert!(all[1..].iter().all(|text| text.contains("ab01")), "no build ID");
            all
        };
        assert!(folded(Redaction::default()).iter().all(|text| text.contains(SECRET)));
        for functions in [true, false] {
            let [folded, otlp, pprof] = folded(redaction(&["*/hunter2/*"], &["hunter2*"], functions));
            for text in [&folded, &otlp, &pprof] {
                assert_eq!(text.contains(SECRET), !functions, "{text}");
                assert!(!text.contains("hunter2d") && !text.contains("/hunter2/"), "{text}");
                assert!(text.contains("nginx") && text.contains("qsort") && text.contains(REDACTED), "{text}");
            }
            assert!(otlp.contains("/usr/lib/libc.so.6"));
            assert_eq!(folded.contains("[redacted]+0x1000"), functions, "{folded}");
            assert!(folded.contains("[redacted]+0x2000"), "{folded}");
            assert_eq!(folded.contains("JS:*spin file:[redacted]"), !functions, "{folded}");
        }
    }

    /// The same frame of many samples is replaced once, and equal files stay equal.
    #[test]
    fn what_was_shared_stays_shared() {
        let mut profile = profile();
        let again = profile.samples[1].clone();
        profile.samples.push(again);
        let redacted = redaction(&["/opt/*"], &["nginx"], true).apply(profile);
        let [_, first, second] = &redacted.samples[..] else { panic!("three samples") };
        assert!(Arc::ptr_eq(&first.process, &second.process));
        assert!(first.frames.iter().zip(&second.frames).all(|(a, b)| Arc::ptr_eq(a, b)));
        let file = |frame: usize| first.frames[frame].executable.as_ref().expect("a file");
        assert!(Arc::ptr_eq(file(0), file(3)) && file(1).path == "/usr/lib/libc.so.6");
    }

    fn check(text: &str, expect: Option<&str>) {
        let rules = redaction(&["/opt/secret/*", "/srv/app", "*/.ssh/*"], &[], true);
        assert_eq!(rules.text(text).as_deref(), expect, "{text:?}");
    }

    /// Paths are found in lines of the log and in what runtimes call functions.
    #[test]
    fn finds_paths_in_text() {
        check("nothing /opt/other/x", None);
        check("/opt/secretive", None);
        check("cannot open /opt/secret/a b", Some("cannot open [redacted]"));
        check(r#"{"message":"/opt/secret/a b","level":"DEBUG"}"#, Some(r#"{"message":"[redacted]","level":"DEBUG"}"#));
        check("/srv/app: no symbols", Some("[redacted]: no symbols"));
        check("JS:~run file:///srv/app:1:2", Some("JS:~run file://[redacted]:1:2"));
        check("/srv/application /srv/app", Some("/srv/application [redacted]"));
        check("opened /home/a/.ssh/id", Some("opened [redacted]"));
        check(&"/".repeat(100_000), None);
    }
}

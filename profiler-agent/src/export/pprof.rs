//! pprof's `profile.proto`, gzip-compressed.
//!
//! The message types are written down here from
//! <https://github.com/google/pprof/blob/main/proto/profile.proto>.

use std::{collections::HashMap, io::Write as _, slice, time::UNIX_EPOCH};

use anyhow::Context as _;
use flate2::{Compression, write::GzEncoder};
use prost::Message;

use super::{incomplete_marker, legible, wait_marker};
use crate::profile::{Events, ExecutableId, Frame, FrameName, FrameType, Profile, ResourceValue, SourceLine, hex};

#[derive(Clone, PartialEq, Eq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    r#type: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct PprofSample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    str: i64,
    #[prost(int64, tag = "3")]
    num: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct PprofMapping {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    memory_start: u64,
    #[prost(uint64, tag = "3")]
    memory_limit: u64,
    #[prost(uint64, tag = "4")]
    file_offset: u64,
    #[prost(int64, tag = "5")]
    filename: i64,
    #[prost(int64, tag = "6")]
    build_id: i64,
    #[prost(bool, tag = "7")]
    has_functions: bool,
    #[prost(bool, tag = "8")]
    has_filenames: bool,
    #[prost(bool, tag = "9")]
    has_line_numbers: bool,
    #[prost(bool, tag = "10")]
    has_inline_frames: bool,
}

#[derive(Clone, PartialEq, Message)]
struct PprofLocation {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    mapping_id: u64,
    #[prost(uint64, tag = "3")]
    address: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<PprofLine>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct PprofLine {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct PprofFunction {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
    #[prost(int64, tag = "5")]
    start_line: i64,
}

#[derive(Clone, PartialEq, Message)]
struct PprofProfile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<PprofSample>,
    #[prost(message, repeated, tag = "3")]
    mapping: Vec<PprofMapping>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<PprofLocation>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<PprofFunction>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
    #[prost(int64, repeated, tag = "13")]
    comment: Vec<i64>,
    #[prost(int64, tag = "14")]
    default_sample_type: i64,
}

/// Encodes a profile.
pub fn encode(profile: &Profile) -> anyhow::Result<Vec<u8>> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&build(profile).encode_to_vec())
        .and_then(|()| gzip.finish())
        .context("the profile could not be compressed")
}

fn build(profile: &Profile) -> PprofProfile {
    let mut tables = Tables::default();
    tables.string("");
    let period = i64::try_from(profile.period.as_nanos()).unwrap_or(i64::MAX);
    let (on_cpu, off_cpu) = (profile.events.includes_on_cpu(), profile.events.includes_off_cpu());
    let mut sample_type = vec![tables.value_type("samples", "count")];
    if on_cpu {
        sample_type.push(tables.value_type("cpu", "nanoseconds"));
    }
    if off_cpu {
        sample_type.push(tables.value_type("offcpu", "nanoseconds"));
    }
    // What is shown unless asked otherwise, and what the period is one of.
    let time_type = sample_type[1].clone();
    let samples = profile
        .samples
        .iter()
        .map(|sample| {
            let mut location_id: Vec<u64> = wait_marker(sample).iter().map(|marker| tables.marker(marker)).collect();
            location_id.extend(sample.frames.iter().map(|frame| tables.location(frame)));
            let mut labels = vec![
                Label { key: tables.string("pid"), str: 0, num: i64::from(sample.process.key.tgid) },
                Label { key: tables.string("thread_name"), str: tables.string(&sample.thread_name), num: 0 },
                Label { key: tables.string("process_name"), str: tables.string(&sample.process.name), num: 0 },
            ];
            for (key, value) in sample.resource.attributes() {
                // (A label that is there several times has several values.)
                let values = match value {
                    ResourceValue::Text(one) => slice::from_ref(one),
                    ResourceValue::List(several) => several,
                };
                let key = tables.string(key);
                labels.extend(values.iter().map(|value| Label { key, str: tables.string(value), num: 0 }));
            }
            if let Some(marker) = incomplete_marker(sample) {
                location_id.push(tables.marker(&marker));
                labels.push(Label { key: tables.string("stack_end"), str: tables.string(sample.end.label()), num: 0 });
            }
            if sample.kind.is_off_cpu() {
                labels.push(Label {
                    key: tables.string("off_cpu_state"),
                    str: tables.string(sample.kind.label()),
                    num: 0,
                });
            }
            let count = i64::try_from(sample.count).unwrap_or(i64::MAX);
            let cpu = if sample.kind.is_off_cpu() { 0 } else { count.saturating_mul(period) };
            let mut value = vec![count];
            value.extend(on_cpu.then_some(cpu));
            value.extend(off_cpu.then(|| i64::try_from(sample.time_ns).unwrap_or(i64::MAX)));
            PprofSample { location_id, value, label: labels }
        })
        .collect();
    let comments = profile.marks.iter().map(|mark| tables.string(&format!("{}: {}", mark.name, mark.value))).collect();
    PprofProfile {
        sample_type,
        sample: samples,
        time_nanos: profile
            .start
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|since| i64::try_from(since.as_nanos()).ok())
            .unwrap_or_default(),
        duration_nanos: i64::try_from(profile.duration.as_nanos()).unwrap_or(i64::MAX),
        default_sample_type: time_type.r#type,
        period_type: Some(time_type),
        period: if profile.events == Events::OffCpu { 0 } else { period },
        comment: comments,
        mapping: tables.mappings,
        location: tables.locations,
        function: tables.functions,
        string_table: tables.strings,
    }
}

/// The message's tables, each entry interned once.
#[derive(Default)]
struct Tables {
    strings: Vec<String>,
    string_indices: HashMap<String, i64>,
    functions: Vec<PprofFunction>,
    /// By name, system name, file and the line at which it begins.
    function_ids: HashMap<(i64, i64, i64, i64), u64>,
    mappings: Vec<PprofMapping>,
    /// By file (none: the kernel) and start.
    mapping_ids: HashMap<(Option<ExecutableId>, u64), u64>,
    locations: Vec<PprofLocation>,
    /// By mapping, address and the outermost function.
    location_ids: HashMap<(u64, u64, u64), u64>,
}

impl Tables {
    fn string(&mut self, text: &str) -> i64 {
        if let Some(&index) = self.string_indices.get(text) {
            return index;
        }
        let index = self.strings.len() as i64;
        self.strings.push(legible(text));
        self.string_indices.insert(text.to_owned(), index);
        index
    }

    fn value_type(&mut self, name: &str, unit: &str) -> ValueType {
        ValueType { r#type: self.string(name), unit: self.string(unit) }
    }

    fn line(&mut self, name: &str, system_name: &str, place: Option<&SourceLine>) -> PprofLine {
        let (name, system_name) = (self.string(name), self.string(system_name));
        let filename = place.map_or(0, |place| self.string(&place.file));
        let start_line = place.map_or(0, |place| i64::from(place.start_line));
        let functions = &mut self.functions;
        let function_id = *self.function_ids.entry((name, system_name, filename, start_line)).or_insert_with(|| {
            let id = functions.len() as u64 + 1;
            functions.push(PprofFunction { id, name, system_name, filename, start_line });
            id
        });
        PprofLine { function_id, line: place.map_or(0, |place| i64::from(place.line)) }
    }

    fn mapping(&mut self, frame: &Frame) -> u64 {
        let (id, path, build_id) = match (&frame.executable, frame.frame_type) {
            (Some(executable), _) => (Some(executable.id), executable.path.as_str(), executable.build_id.as_deref()),
            (None, FrameType::Kernel) => (None, "[kernel.kallsyms]", None),
            (None, FrameType::Native | FrameType::Runtime) => return 0,
        };
        let segment = frame.executable.as_ref().and_then(|executable| executable.segment_at(frame.address));
        let (start, limit, file_offset) =
            segment.map_or((0, u64::MAX, 0), |s| (s.address.0, s.address.0.saturating_add(s.size), s.offset.0));
        if let Some(&known) = self.mapping_ids.get(&(id, start)) {
            return known;
        }
        let mapping_id = self.mappings.len() as u64 + 1;
        let mapping = PprofMapping {
            id: mapping_id,
            memory_start: start,
            memory_limit: limit,
            file_offset,
            filename: self.string(path),
            build_id: self.string(&build_id.map(hex).unwrap_or_default()),
            has_functions: true,
            ..PprofMapping::default()
        };
        self.mappings.push(mapping);
        self.mapping_ids.insert((id, start), mapping_id);
        mapping_id
    }

    fn location(&mut self, frame: &Frame) -> u64 {
        let mapping = self.mapping(frame);
        let inlined = frame.inlined.iter();
        let mut lines: Vec<PprofLine> = inlined
            .map(|function| self.line(&function.name.readable, function.name.system(), function.place.as_ref()))
            .collect();
        if let Some(mapping) = usize::try_from(mapping).ok().and_then(|id| self.mappings.get_mut(id.checked_sub(1)?)) {
            mapping.has_filenames |= frame.place.is_some();
            mapping.has_line_numbers |= frame.place.is_some();
            mapping.has_inline_frames |= !lines.is_empty();
        }
        // Frames without a function keep their address; their file stands in for the name.
        lines.push(match &frame.name {
            FrameName::Function(name) => self.line(&name.readable, name.system(), frame.place.as_ref()),
            _ => {
                let name = frame.display_name();
                self.line(&name, &name, None)
            }
        });
        self.add_location(mapping, frame.address, lines)
    }

    fn marker(&mut self, name: &str) -> u64 {
        let line = self.line(name, name, None);
        self.add_location(0, 0, vec![line])
    }

    /// Adds a place whose lines are those of the inlined functions, innermost first, and of the function itself.
    fn add_location(&mut self, mapping_id: u64, address: u64, line: Vec<PprofLine>) -> u64 {
        let locations = &mut self.locations;
        let function_id = line.last().map_or(0, |line| line.function_id);
        *self.location_ids.entry((mapping_id, address, function_id)).or_insert_with(|| {
            let id = locations.len() as u64 + 1;
            locations.push(PprofLocation { id, mapping_id, address, line });
            id
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing;

    /// Every reference points at an entry, and the values add up.
    #[test]
    fn refers_only_to_what_it_holds() {
        let profile = testing::profile();
        let built = build(&profile);
        assert_eq!(built.string_table[0], "");
        let total: i64 = built.sample.iter().map(|sample| sample.value[0]).sum();
        assert_eq!(total, 10);
        for sample in &built.sample {
            assert_eq!(sample.value[1], sample.value[0] * built.period);
            for &id in &sample.location_id {
                let location = &built.locations()[&id];
                assert!(location.line.iter().all(|line| (1..=built.function.len() as u64).contains(&line.function_id)));
                assert!(location.mapping_id <= built.mapping.len() as u64);
            }
        }
    }

    /// What is inlined is a line of its own, innermost first; functions know their files and where they begin.
    #[test]
    fn writes_inlined_functions_as_lines() {
        let built = build(&testing::inlined());
        let location = built.location.iter().find(|location| location.line.len() > 1).expect("lines");
        let text = |index: i64| built.string_table[index as usize].as_str();
        let lines = location.line.iter().map(|line| {
            let function = &built.function[line.function_id as usize - 1];
            (text(function.name), text(function.filename), function.start_line, line.line)
        });
        let expect = [("inner", "inner.h", 2, 3), ("outer", "work.c", 5, 7), ("work", "work.c", 10, 20)];
        assert_eq!(lines.collect::<Vec<_>>(), expect);
        assert!(built.mapping.iter().any(|mapping| mapping.has_inline_frames && mapping.has_line_numbers));
    }

    impl PprofProfile {
        fn locations(&self) -> HashMap<u64, &PprofLocation> {
            self.location.iter().map(|location| (location.id, location)).collect()
        }
    }
}

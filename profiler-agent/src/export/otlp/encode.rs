//! From a profile to export requests.

use std::{collections::BTreeMap, sync::Arc, time::UNIX_EPOCH};

use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest,
    common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value::Value},
    profiles::v1development::{
        Profile as WireProfile, ResourceProfiles, Sample as WireSample, ScopeProfiles, ValueType,
    },
    resource::v1::Resource as WireResource,
};
use prost::Message as _;

use super::{
    Request,
    dictionary::{AttributeValue, Dictionary},
};
use crate::{
    export::{incomplete_marker, legible, pprof, wait_marker},
    profile::{Events, Profile, Resource, ResourceValue, Sample},
};

/// Samples per request at most: Pyroscope takes no more in a profile.
const MAX_SAMPLES: usize = 16_000;
/// Bytes per request at most: gRPC receivers accept 4 MiB by default.
const MAX_REQUEST_BYTES: usize = 7 << 19;

/// How profiles are encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether each profile carries itself in pprof's form too, for receivers that read nothing else. About doubles what is
    /// sent.
    pub original_payload: bool,
}

/// A profile as it is sent.
#[derive(Debug, Default)]
pub struct Encoded {
    /// One after the other.
    pub requests: Vec<Request>,
    /// Samples on the wire: distinct stacks of functions, by process and thread.
    pub rows: u64,
}

/// Encodes a profile, split into requests that receivers accept.
pub fn requests(profile: &Profile, options: &Options) -> Encoded {
    let mut encoded = Encoded::default();
    for samples in in_order(profile).chunks(MAX_SAMPLES) {
        encode_within_limit(profile, samples, options, &mut encoded);
    }
    encoded
}

/// A profile's samples, those of a resource side by side: what they share is in one request.
pub(super) fn in_order(profile: &Profile) -> Vec<&Sample> {
    let mut samples: Vec<&Sample> = profile.samples.iter().collect();
    samples.sort_by(|a, b| a.resource.cmp(&b.resource));
    samples
}

/// Halves what is too large; one sample alone is sent whatever its size.
fn encode_within_limit(profile: &Profile, samples: &[&Sample], options: &Options, encoded: &mut Encoded) {
    let request = request(profile, samples, options);
    if samples.len() > 1 && request.encoded_len() > MAX_REQUEST_BYTES {
        let (first, second) = samples.split_at(samples.len() / 2);
        encode_within_limit(profile, first, options, encoded);
        encode_within_limit(profile, second, options, encoded);
    } else {
        let scopes = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
        let profiles: Vec<&WireProfile> = scopes.flat_map(|scope| &scope.profiles).collect();
        encoded.rows += profiles.iter().map(|profile| profile.samples.len() as u64).sum::<u64>();
        encoded.requests.push(Request {
            profiles: u32::try_from(profiles.len()).unwrap_or(u32::MAX),
            tally: samples.iter().map(|sample| sample.tally()).sum(),
            closed: profile.start + profile.duration,
            body: request.encode_to_vec().into(),
        });
    }
}

/// Encodes some of a profile's samples as one request.
pub(super) fn request(profile: &Profile, samples: &[&Sample], options: &Options) -> ExportProfilesServiceRequest {
    let mut by_resource: BTreeMap<&Resource, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        by_resource.entry(&sample.resource).or_default().push(sample);
    }
    let mut dictionary = Dictionary::new();
    let resource_profiles = by_resource
        .into_iter()
        .map(|(resource, samples)| ResourceProfiles {
            resource: Some(wire_resource(resource)),
            scope_profiles: vec![ScopeProfiles {
                scope: Some(InstrumentationScope {
                    name: env!("CARGO_PKG_NAME").to_owned(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    ..InstrumentationScope::default()
                }),
                profiles: wire_profiles(profile, &samples, options, &mut dictionary),
                schema_url: String::new(),
            }],
            schema_url: String::new(),
        })
        .collect();
    ExportProfilesServiceRequest { resource_profiles, dictionary: Some(dictionary.into_tables()) }
}

/// A resource with its attributes spelled out: not every receiver looks them up in the dictionary.
fn wire_resource(resource: &Resource) -> WireResource {
    let text = |text: &str| AnyValue { value: Some(Value::StringValue(legible(text))) };
    let attributes = resource.attributes().map(|(name, value)| KeyValue {
        key: legible(name),
        value: Some(match value {
            ResourceValue::Text(one) => text(one),
            ResourceValue::List(several) => {
                let values = several.iter().map(|one| text(one)).collect();
                AnyValue { value: Some(Value::ArrayValue(ArrayValue { values })) }
            }
        }),
        ..KeyValue::default()
    });
    WireResource { attributes: attributes.collect(), ..WireResource::default() }
}

/// A profile of CPU time and one of waits, where there are samples of either.
fn wire_profiles(
    profile: &Profile,
    samples: &[&Sample],
    options: &Options,
    dictionary: &mut Dictionary,
) -> Vec<WireProfile> {
    let (off_cpu, on_cpu): (Vec<&Sample>, Vec<&Sample>) = samples.iter().partition(|sample| sample.kind.is_off_cpu());
    let mut profiles = Vec::new();
    if !on_cpu.is_empty() {
        let sample_type = value_type(dictionary, "samples", "count");
        let period_type = value_type(dictionary, "cpu", "nanoseconds");
        let period = i64::try_from(profile.period.as_nanos()).unwrap_or(i64::MAX);
        profiles.push(wire_profile(profile, &on_cpu, sample_type, (period_type, period), dictionary));
    }
    if !off_cpu.is_empty() {
        let sample_type = value_type(dictionary, "off_cpu", "nanoseconds");
        profiles.push(wire_profile(profile, &off_cpu, sample_type, (ValueType::default(), 0), dictionary));
    }
    if options.original_payload {
        let parts = [(Events::OnCpu, on_cpu), (Events::OffCpu, off_cpu)];
        let parts = parts.into_iter().filter(|(_, samples)| !samples.is_empty());
        for (wire, (events, samples)) in profiles.iter_mut().zip(parts) {
            let Profile { start, duration, period, ref marks, .. } = *profile;
            let marks = Arc::clone(marks);
            let part =
                Profile { events, start, duration, period, marks, samples: samples.into_iter().cloned().collect() };
            if let Ok(payload) = pprof::encode(&part) {
                wire.original_payload_format = "pprof".to_owned();
                wire.original_payload = payload;
            }
        }
    }
    profiles
}

fn wire_profile(
    profile: &Profile,
    samples: &[&Sample],
    sample_type: ValueType,
    (period_type, period): (ValueType, i64),
    dictionary: &mut Dictionary,
) -> WireProfile {
    let samples = merged(samples, dictionary)
        .into_iter()
        .map(|(row, value)| WireSample {
            stack_index: dictionary.stack(&row.locations()),
            attribute_indices: row.attributes,
            link_index: 0,
            values: vec![i64::try_from(value).unwrap_or(i64::MAX)],
            timestamps_unix_nano: Vec::new(),
        })
        .collect();
    let nanos = |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    WireProfile {
        sample_type: Some(sample_type),
        samples,
        time_unix_nano: profile.start.duration_since(UNIX_EPOCH).map(nanos).unwrap_or_default(),
        duration_nano: nanos(profile.duration),
        period_type: Some(period_type),
        period,
        profile_id: profile_id(),
        attribute_indices: profile
            .marks
            .iter()
            .map(|mark| dictionary.attribute(mark.name, AttributeValue::Text(mark.value.to_string())))
            .collect(),
        ..WireProfile::default()
    }
}

/// Tells a profile that arrives twice: 16 random bytes. Empty, which means none, where the system has no random numbers.
fn profile_id() -> Vec<u8> {
    let mut id = vec![0; 16];
    getrandom::fill(&mut id).map(|()| id).unwrap_or_default()
}

/// What tells samples on the wire apart.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    /// Root first: in this order, what compresses well is side by side.
    path: Vec<i32>,
    attributes: Vec<i32>,
}

impl Row {
    /// Its locations, leaf first.
    fn locations(&self) -> Vec<i32> {
        self.path.iter().rev().copied().collect()
    }
}

/// Samples that are the same once their frames are locations, added up.
fn merged(samples: &[&Sample], dictionary: &mut Dictionary) -> BTreeMap<Row, u64> {
    let mut rows = BTreeMap::new();
    for sample in samples {
        // Backends that show stacks and nothing else would lose a sample without any frame, and not know what is missing.
        let mut path: Vec<i32> = incomplete_marker(sample).iter().map(|marker| dictionary.marker(marker)).collect();
        path.extend(sample.frames.iter().rev().map(|frame| dictionary.location(frame)));
        path.extend(wait_marker(sample).map(|marker| dictionary.marker(marker)));
        let row = Row { path, attributes: attributes(sample, dictionary) };
        let value = if sample.kind.is_off_cpu() { sample.time_ns } else { sample.count };
        let total: &mut u64 = rows.entry(row).or_default();
        *total = total.saturating_add(value);
    }
    rows
}

fn value_type(dictionary: &mut Dictionary, name: &str, unit: &str) -> ValueType {
    ValueType { type_strindex: dictionary.string(name), unit_strindex: dictionary.string(unit) }
}

fn attributes(sample: &Sample, dictionary: &mut Dictionary) -> Vec<i32> {
    let text = |text: &str| AttributeValue::Text(text.to_owned());
    let mut attributes = vec![
        dictionary.attribute("process.pid", AttributeValue::Number(i64::from(sample.process.key.tgid))),
        dictionary.attribute("process.executable.name", text(&sample.process.name)),
        dictionary.attribute("thread.name", text(&sample.thread_name)),
    ];
    if sample.kind.is_off_cpu() {
        attributes.push(dictionary.attribute("profiler.off_cpu.state", text(sample.kind.label())));
    }
    if !sample.end.is_whole() {
        attributes.push(dictionary.attribute("profiler.stack.end", text(sample.end.label())));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::{
        export::testing,
        profile::{Executable, ExecutableId, Frame, ProcessInfo, Tally},
    };

    /// Index 0 of every table is the zero value, every index is valid, and the values add up.
    #[test]
    fn keeps_the_dictionary_rules() {
        let profile = testing::profile();
        let request = request(&profile, &in_order(&profile), &Options::default());
        let dictionary = request.dictionary.expect("a dictionary");
        assert_eq!(dictionary.mapping_table[0], Default::default());
        assert_eq!(dictionary.location_table[0], Default::default());
        assert_eq!(dictionary.function_table[0], Default::default());
        assert_eq!(dictionary.link_table[0], Default::default());
        assert_eq!(dictionary.string_table[0], "");
        assert_eq!(dictionary.attribute_table[0], Default::default());
        assert_eq!(dictionary.stack_table[0], Default::default());
        let inside = |index: i32, len: usize| usize::try_from(index).is_ok_and(|index| index < len);
        let profile = &request.resource_profiles[0].scope_profiles[0].profiles[0];
        assert_eq!(profile.samples.iter().map(|sample| sample.values[0]).sum::<i64>(), 10);
        for sample in &profile.samples {
            assert!(inside(sample.stack_index, dictionary.stack_table.len()));
            assert!(sample.attribute_indices.iter().all(|&i| inside(i, dictionary.attribute_table.len())));
        }
        for stack in &dictionary.stack_table {
            assert!(stack.location_indices.iter().all(|&i| inside(i, dictionary.location_table.len())));
        }
        // Threads that share a stack share its entry: the empty one and two more.
        assert_eq!(dictionary.stack_table.len(), 3);
    }

    /// What is inlined is a line of its own, innermost first; functions know their files and where they begin.
    #[test]
    fn writes_inlined_functions_as_lines() {
        let profile = testing::inlined();
        let request = request(&profile, &in_order(&profile), &Options::default());
        let dictionary = request.dictionary.expect("a dictionary");
        let location = dictionary.location_table.iter().find(|location| location.lines.len() > 1).expect("lines");
        let lines: Vec<_> = location
            .lines
            .iter()
            .map(|line| {
                let function = &dictionary.function_table[line.function_index as usize];
                let text = |index: i32| dictionary.string_table[index as usize].as_str();
                (text(function.name_strindex), text(function.filename_strindex), function.start_line, line.line)
            })
            .collect();
        assert_eq!(lines, [("inner", "inner.h", 2, 3), ("outer", "work.c", 5, 7), ("work", "work.c", 10, 20)]);
    }

    /// Waits are a profile of their own, in nanoseconds and without a period.
    #[test]
    fn keeps_waits_apart() {
        let profile = testing::both();
        let request = request(&profile, &in_order(&profile), &Options::default());
        let strings = request.dictionary.expect("a dictionary").string_table;
        let profiles = &request.resource_profiles[0].scope_profiles[0].profiles;
        assert_eq!(profiles.len(), 2);
        let waits = &profiles[1];
        let sample_type = waits.sample_type.expect("a type");
        assert_eq!(strings[sample_type.type_strindex as usize], "off_cpu");
        assert_eq!(strings[sample_type.unit_strindex as usize], "nanoseconds");
        assert_eq!((waits.period, waits.period_type), (0, Some(ValueType::default())));
        assert_eq!(waits.samples.iter().map(|sample| sample.values[0]).sum::<i64>(), 5_000_000);
    }

    /// What is too much for one request is split by service, loses nothing, and every profile has an identity of its own.
    #[test]
    fn splits_what_receivers_would_not_take() {
        let small = testing::profile();
        let mut profile = testing::profile();
        profile.samples = (0..20_000)
            .map(|number: u32| {
                let process =
                    ProcessInfo { name: format!("service {}", number % 3), ..(*small.samples[0].process).clone() };
                Sample { process: process.into(), thread_name: format!("{number}").into(), ..small.samples[0].clone() }
            })
            .collect();
        let Encoded { requests, rows } = requests(&profile, &Options { original_payload: true });
        assert!(requests.len() > 1 && requests.iter().all(|request| request.body.len() <= MAX_REQUEST_BYTES));
        assert_eq!(requests.iter().map(|request| request.tally).sum::<Tally>(), profile.total());
        let (mut ids, mut resources, mut samples, mut profiles) = (HashSet::new(), 0, 0, 0);
        for request in &requests {
            let decoded = ExportProfilesServiceRequest::decode(request.body.clone()).expect("a request");
            resources += decoded.resource_profiles.len();
            for scope in decoded.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles) {
                for profile in &scope.profiles {
                    assert!(profile.profile_id.len() == 16 && ids.insert(profile.profile_id.clone()));
                    assert!(profile.original_payload_format == "pprof" && !profile.original_payload.is_empty());
                    samples += profile.samples.len();
                    profiles += 1;
                }
            }
        }
        // Only what a border runs through is in two requests.
        assert!(resources < 3 + requests.len());
        assert_eq!(
            (samples, rows, profiles),
            (profile.samples.len(), samples as u64, requests.iter().map(|request| request.profiles).sum())
        );
    }

    /// Places in one function are one location, and samples that only differ in them are one; without a name they are not.
    #[test]
    fn places_in_a_function_are_one() {
        let mut profile = testing::profile();
        let at = |frame: &Frame, address| {
            Frame::new(frame.frame_type, frame.name.clone(), frame.executable.clone(), address)
        };
        let moved = |sample: &Sample, by: u64| {
            let frames = sample.frames.iter().map(|frame| Arc::new(at(frame, frame.address + by))).collect();
            Sample { frames, ..sample.clone() }
        };
        profile.samples = profile.samples.iter().flat_map(|sample| [sample.clone(), moved(sample, 4)]).collect();
        let request = request(&profile, &in_order(&profile), &Options::default());
        let dictionary = request.dictionary.expect("a dictionary");
        // Nothing, two functions in the file and one in the kernel, each of two nameless places twice, and what is missing.
        assert_eq!(dictionary.location_table.len(), 1 + 3 + 4 + 1);
        assert!(dictionary.location_table.iter().all(|location| location.address < 0xffff_8000_0000_0000));
        let samples = &request.resource_profiles[0].scope_profiles[0].profiles[0].samples;
        let mut values: Vec<i64> = samples.iter().map(|sample| sample.values[0]).collect();
        values.sort_unstable();
        assert_eq!(values, [3, 3, 4, 10]);
    }

    /// A stack that is not whole says so in a frame, even if it has no other.
    #[test]
    fn marks_what_is_missing() {
        let mut profile = testing::profile();
        profile.samples.retain(|sample| !sample.end.is_whole());
        profile.samples[0].frames = [].into();
        let request = request(&profile, &in_order(&profile), &Options::default());
        let dictionary = request.dictionary.expect("a dictionary");
        let sample = &request.resource_profiles[0].scope_profiles[0].profiles[0].samples[0];
        let stack = &dictionary.stack_table[sample.stack_index as usize];
        let [marker] = stack.location_indices[..] else { panic!("{stack:?}") };
        let location = &dictionary.location_table[marker as usize];
        let function = &dictionary.function_table[location.lines[0].function_index as usize];
        let name = &dictionary.string_table[function.name_strindex as usize];
        assert!(name.starts_with("[incomplete: "), "{name}");
    }

    /// A file that is there twice, in two containers, is one mapping, and its functions are one location each. So are names
    /// that only differ in what is not written.
    #[test]
    fn writes_equal_things_once() {
        let mut profile = testing::profile();
        let frame = &profile.samples[0].frames[1];
        let executable = frame.executable.as_ref().expect("an executable");
        let twin = Executable {
            table: 2,
            id: ExecutableId(2),
            path: executable.path.clone(),
            build_id: executable.build_id.clone(),
            identity: executable.identity.clone(),
            segments: executable.segments.clone(),
            file: Mutex::default(),
            debug: Mutex::default(),
        };
        let twin = Frame::new(frame.frame_type, frame.name.clone(), Some(Arc::new(twin)), frame.address);
        profile.samples[1].frames = vec![Arc::new(twin), Arc::clone(&profile.samples[0].frames[2])];
        profile.samples[0].frames.remove(0);
        profile.samples[0].thread_name = "a\u{1}".into();
        profile.samples[1].thread_name = "a\u{2}".into();
        profile.samples.truncate(2);
        let request = request(&profile, &in_order(&profile), &Options::default());
        let tables = request.dictionary.expect("a dictionary");
        assert_eq!((tables.mapping_table.len(), tables.location_table.len()), (2, 3), "{tables:?}");
        assert_eq!(request.resource_profiles[0].scope_profiles[0].profiles[0].samples.len(), 1);
        let strings: HashSet<_> = tables.string_table.iter().collect();
        assert_eq!(strings.len(), tables.string_table.len());
    }
}

//! From a profile to export requests.

use std::{collections::BTreeMap, time::UNIX_EPOCH};

use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    profiles::v1development::{
        Profile as WireProfile, ResourceProfiles, Sample as WireSample, ScopeProfiles, ValueType,
    },
    resource::v1::Resource,
};
use prost::Message as _;

use super::{
    Request,
    dictionary::{AttributeValue, Dictionary},
};
use crate::{
    export::{legible, pprof},
    label,
    profile::{Events, Profile, Sample},
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

/// Encodes a profile, split into requests that receivers accept.
pub fn requests(profile: &Profile, options: &Options) -> Vec<Request> {
    let mut requests = Vec::new();
    for samples in in_order(profile).chunks(MAX_SAMPLES) {
        encode_within_limit(profile, samples, options, &mut requests);
    }
    requests
}

/// A profile's samples, those of a service side by side: what they share is in one request.
pub(super) fn in_order(profile: &Profile) -> Vec<&Sample> {
    let mut samples: Vec<&Sample> = profile.samples.iter().collect();
    samples.sort_by_key(|sample| label::service_name(&sample.process));
    samples
}

/// Halves what is too large; one sample alone is sent whatever its size.
fn encode_within_limit(profile: &Profile, samples: &[&Sample], options: &Options, requests: &mut Vec<Request>) {
    let request = request(profile, samples, options);
    if samples.len() > 1 && request.encoded_len() > MAX_REQUEST_BYTES {
        let (first, second) = samples.split_at(samples.len() / 2);
        encode_within_limit(profile, first, options, requests);
        encode_within_limit(profile, second, options, requests);
    } else {
        let profiles = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
        requests.push(Request {
            profiles: profiles.map(|scope| u32::try_from(scope.profiles.len()).unwrap_or(u32::MAX)).sum(),
            tally: samples.iter().map(|sample| sample.tally()).sum(),
            closed: profile.start + profile.duration,
            body: request.encode_to_vec().into(),
        });
    }
}

/// Encodes some of a profile's samples as one request: a resource per service.
pub(super) fn request(profile: &Profile, samples: &[&Sample], options: &Options) -> ExportProfilesServiceRequest {
    let mut by_service: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        by_service.entry(label::service_name(&sample.process)).or_default().push(sample);
    }
    let mut dictionary = Dictionary::new();
    let resource_profiles = by_service
        .into_iter()
        .map(|(service, samples)| ResourceProfiles {
            resource: Some(resource(service)),
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

/// The resource that stands for a service on this host.
fn resource(service: &str) -> Resource {
    let attribute = |(key, value): (&str, &str)| KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(Value::StringValue(legible(value))) }),
        ..KeyValue::default()
    };
    Resource { attributes: label::attributes(service).map(attribute).into(), ..Resource::default() }
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
            let Profile { start, duration, period, .. } = *profile;
            let part = Profile { events, start, duration, period, samples: samples.into_iter().cloned().collect() };
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
    let samples = samples
        .iter()
        .map(|sample| {
            let value = if sample.kind.is_off_cpu() { sample.time_ns } else { sample.count };
            WireSample {
                stack_index: dictionary.stack(&sample.frames),
                attribute_indices: attributes(sample, dictionary),
                link_index: 0,
                values: vec![i64::try_from(value).unwrap_or(i64::MAX)],
                timestamps_unix_nano: Vec::new(),
            }
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
        ..WireProfile::default()
    }
}

/// Tells a profile that arrives twice: 16 random bytes. Empty, which means none, where the system has no random numbers.
fn profile_id() -> Vec<u8> {
    let mut id = vec![0; 16];
    getrandom::fill(&mut id).map(|()| id).unwrap_or_default()
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
    use std::collections::HashSet;

    use super::*;
    use crate::{
        export::testing,
        profile::{ProcessInfo, Tally},
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
        let requests = requests(&profile, &Options { original_payload: true });
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
        assert_eq!((samples, profiles), (profile.samples.len(), requests.iter().map(|request| request.profiles).sum()));
    }
}

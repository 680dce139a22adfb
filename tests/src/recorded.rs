//! Recordings in OTLP's format, read back: samples, and all that is told about their frames.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest,
    common::v1::{AnyValue, any_value::Value},
    profiles::v1development::{Location, ProfilesDictionary},
};
use prost::Message as _;

/// A frame, as its location tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Its function, if it has a name.
    pub name: Option<String>,
    /// Why it has none.
    pub nameless: Option<String>,
    /// Kind of code.
    pub kind: String,
    /// Path of its file, as the process saw it; empty where there is none.
    pub file: String,
    /// Build ID of the file.
    pub build_id: String,
    /// Address, as the file states it.
    pub address: u64,
}

impl Frame {
    /// Whether its function's name begins like this.
    pub fn is_named_like(&self, start: &str) -> bool {
        self.name.as_deref().is_some_and(|name| name.starts_with(start))
    }
}

/// Samples that share a stack.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Attributes of its resource; a list's items are joined by commas.
    pub resource: Arc<BTreeMap<String, String>>,
    /// The process.
    pub pid: i64,
    /// Whether it was taken off the CPU: it counts nanoseconds then.
    pub is_wait: bool,
    /// Name of the process's executable.
    pub process: String,
    /// Frames, leaf first.
    pub frames: Vec<Arc<Frame>>,
    /// How many.
    pub count: u64,
    /// How long: on the CPU, or off it where it is a wait; nanoseconds.
    pub time_ns: u64,
    /// Attributes of its profile.
    pub marks: Arc<BTreeMap<String, String>>,
}

/// How long a recording of one window lasted.
pub fn duration(recording: &[u8]) -> Duration {
    let request = ExportProfilesServiceRequest::decode(recording).expect("an export request");
    let scopes = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
    let profiles = scopes.flat_map(|scope| &scope.profiles);
    Duration::from_nanos(profiles.map(|profile| profile.duration_nano).max().unwrap_or_default())
}

/// When a recording of one window began.
pub fn begin(recording: &[u8]) -> SystemTime {
    let request = ExportProfilesServiceRequest::decode(recording).expect("an export request");
    let scopes = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
    let profiles = scopes.flat_map(|scope| &scope.profiles);
    UNIX_EPOCH + Duration::from_nanos(profiles.map(|profile| profile.time_unix_nano).min().unwrap_or_default())
}

/// Every sample of a recording.
pub fn samples(recording: &[u8]) -> Vec<Sample> {
    let request = ExportProfilesServiceRequest::decode(recording).expect("an export request");
    let dictionary = request.dictionary.unwrap_or_default();
    let frames: Vec<Arc<Frame>> =
        dictionary.location_table.iter().map(|location| Arc::new(frame(&dictionary, location))).collect();
    let mut samples = Vec::new();
    for resource in &request.resource_profiles {
        let attributes = resource.resource.iter().flat_map(|resource| &resource.attributes);
        let attributes: BTreeMap<String, String> =
            attributes.map(|attribute| (attribute.key.clone(), text_of(attribute.value.as_ref()))).collect();
        let attributes = Arc::new(attributes);
        for profile in resource.scope_profiles.iter().flat_map(|scope| &scope.profiles) {
            // (Waits have no period.)
            let is_wait = profile.period == 0;
            let period = if is_wait { 1 } else { profile.period.unsigned_abs() };
            let marks = profile.attribute_indices.iter().map(|&index| {
                let entry = &dictionary.attribute_table[index as usize];
                (dictionary.string_table[entry.key_strindex as usize].clone(), text_of(entry.value.as_ref()))
            });
            let marks: Arc<BTreeMap<String, String>> = Arc::new(marks.collect());
            samples.extend(profile.samples.iter().map(|sample| {
                let count = sample.values.iter().sum::<i64>().unsigned_abs();
                Sample {
                    resource: Arc::clone(&attributes),
                    pid: number(&dictionary, &sample.attribute_indices, "process.pid").unwrap_or_default(),
                    is_wait,
                    process: attribute(&dictionary, &sample.attribute_indices, "process.executable.name")
                        .unwrap_or_default(),
                    frames: dictionary.stack_table[sample.stack_index as usize]
                        .location_indices
                        .iter()
                        .map(|&index| Arc::clone(&frames[index as usize]))
                        .collect(),
                    count,
                    time_ns: count * period,
                    marks: Arc::clone(&marks),
                }
            }));
        }
    }
    samples
}

fn text_of(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::ArrayValue(list)) => {
            list.values.iter().map(|item| text_of(Some(item))).collect::<Vec<_>>().join(",")
        }
        _ => String::new(),
    }
}

fn frame(dictionary: &ProfilesDictionary, location: &Location) -> Frame {
    let text = |index: i32| dictionary.string_table[index as usize].clone();
    let mapping = &dictionary.mapping_table[location.mapping_index as usize];
    let function = location.lines.first().map(|line| &dictionary.function_table[line.function_index as usize]);
    let own = |key| attribute(dictionary, &location.attribute_indices, key);
    Frame {
        name: function.map(|function| text(function.name_strindex)),
        nameless: own("profiler.frame.nameless"),
        kind: own("profile.frame.type").unwrap_or_default(),
        file: text(mapping.filename_strindex),
        build_id: attribute(dictionary, &mapping.attribute_indices, "process.executable.build_id.gnu")
            .unwrap_or_default(),
        address: location.address,
    }
}

fn attribute(dictionary: &ProfilesDictionary, indices: &[i32], key: &str) -> Option<String> {
    match value(dictionary, indices, key)? {
        Value::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

fn number(dictionary: &ProfilesDictionary, indices: &[i32], key: &str) -> Option<i64> {
    match value(dictionary, indices, key)? {
        Value::IntValue(number) => Some(*number),
        _ => None,
    }
}

fn value<'a>(dictionary: &'a ProfilesDictionary, indices: &[i32], key: &str) -> Option<&'a Value> {
    let mut entries = indices.iter().map(|&index| &dictionary.attribute_table[index as usize]);
    let entry = entries.find(|entry| dictionary.string_table[entry.key_strindex as usize] == key)?;
    entry.value.as_ref()?.value.as_ref()
}

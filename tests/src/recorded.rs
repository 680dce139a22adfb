//! Recordings in OTLP's format, read back: samples, and all that is told about their frames.

use std::sync::Arc;

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
    /// Name of the process's executable.
    pub process: String,
    /// Frames, leaf first.
    pub frames: Vec<Arc<Frame>>,
    /// How many.
    pub count: u64,
}

/// Every sample of a recording.
pub fn samples(recording: &[u8]) -> Vec<Sample> {
    let request = ExportProfilesServiceRequest::decode(recording).expect("an export request");
    let dictionary = request.dictionary.unwrap_or_default();
    let frames: Vec<Arc<Frame>> =
        dictionary.location_table.iter().map(|location| Arc::new(frame(&dictionary, location))).collect();
    let profiles = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
    profiles
        .flat_map(|scope| &scope.profiles)
        .flat_map(|profile| &profile.samples)
        .map(|sample| Sample {
            process: attribute(&dictionary, &sample.attribute_indices, "process.executable.name").unwrap_or_default(),
            frames: dictionary.stack_table[sample.stack_index as usize]
                .location_indices
                .iter()
                .map(|&index| Arc::clone(&frames[index as usize]))
                .collect(),
            count: sample.values.iter().sum::<i64>().unsigned_abs(),
        })
        .collect()
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
    let mut entries = indices.iter().map(|&index| &dictionary.attribute_table[index as usize]);
    let entry = entries.find(|entry| dictionary.string_table[entry.key_strindex as usize] == key)?;
    match entry.value.as_ref() {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => Some(text.clone()),
        _ => None,
    }
}

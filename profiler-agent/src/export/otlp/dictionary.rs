//! The tables that every profile of a request shares, each entry interned once.
//!
//! Index 0 of every table is the zero value and stands for "absent".

use std::{collections::HashMap, sync::Arc};

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, any_value::Value},
    profiles::v1development::{Function, KeyValueAndUnit, Line, Link, Location, Mapping, ProfilesDictionary, Stack},
};

use crate::{
    export::legible,
    profile::{Executable, Frame, FrameName, FrameType, FunctionName, SourceLine, hex},
};

/// A request's dictionary under construction.
pub(super) struct Dictionary {
    tables: ProfilesDictionary,
    strings: HashMap<String, i32>,
    functions: HashMap<FunctionKey, i32>,
    mappings: HashMap<MappingKey, i32>,
    /// By frame: where one was found before.
    frames: HashMap<Arc<Frame>, i32>,
    locations: HashMap<LocationKey, i32>,
    /// By name.
    markers: HashMap<String, i32>,
    stacks: HashMap<Vec<i32>, i32>,
    attributes: HashMap<(i32, AttributeValue), i32>,
}

/// What tells functions apart: name, system name, file and the line at which it begins.
type FunctionKey = (i32, i32, i32, i64);

/// What tells mappings apart for those who read them: file, attributes, and start, limit and offset. The same file may be
/// there more than once, in a container each.
type MappingKey = (i32, Vec<i32>, [u64; 3]);

/// What tells locations apart. Places in a function are one location where its lines are not known: nothing that is shown
/// differs, and there are ten times fewer stacks. Of code without a name the address is all that is known.
#[derive(PartialEq, Eq, Hash)]
struct LocationKey {
    mapping_index: i32,
    frame_type: FrameType,
    place: Place,
}

#[derive(PartialEq, Eq, Hash)]
enum Place {
    /// By function and line, innermost first.
    Lines(Box<[(i32, i64)]>),
    Address(u64),
}

/// Value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum AttributeValue {
    Text(String),
    Number(i64),
}

impl Dictionary {
    pub(super) fn new() -> Self {
        let tables = ProfilesDictionary {
            mapping_table: vec![Mapping::default()],
            location_table: vec![Location::default()],
            function_table: vec![Function::default()],
            link_table: vec![Link::default()],
            string_table: vec![String::new()],
            attribute_table: vec![KeyValueAndUnit::default()],
            stack_table: vec![Stack::default()],
        };
        Self {
            tables,
            strings: HashMap::from([(String::new(), 0)]),
            functions: HashMap::new(),
            mappings: HashMap::new(),
            frames: HashMap::new(),
            locations: HashMap::new(),
            markers: HashMap::new(),
            stacks: HashMap::from([(Vec::new(), 0)]),
            attributes: HashMap::new(),
        }
    }

    pub(super) fn into_tables(self) -> ProfilesDictionary {
        self.tables
    }

    pub(super) fn string(&mut self, text: &str) -> i32 {
        if let Some(&index) = self.strings.get(text) {
            return index;
        }
        // Two texts may be the same once they are legible.
        let written = legible(text);
        let table = &mut self.tables.string_table;
        let index = *self.strings.entry(written.clone()).or_insert_with(|| push(table, written));
        self.strings.insert(text.to_owned(), index);
        index
    }

    pub(super) fn attribute(&mut self, key: &str, value: AttributeValue) -> i32 {
        let key_strindex = self.string(key);
        let value = match value {
            AttributeValue::Text(text) => AttributeValue::Text(legible(&text)),
            number @ AttributeValue::Number(_) => number,
        };
        if let Some(&index) = self.attributes.get(&(key_strindex, value.clone())) {
            return index;
        }
        let wire = match &value {
            AttributeValue::Text(text) => Value::StringValue(text.clone()),
            AttributeValue::Number(number) => Value::IntValue(*number),
        };
        let entry = KeyValueAndUnit { key_strindex, value: Some(AnyValue { value: Some(wire) }), unit_strindex: 0 };
        let index = push(&mut self.tables.attribute_table, entry);
        self.attributes.insert((key_strindex, value), index);
        index
    }

    /// Interns a stack of locations, leaf first.
    pub(super) fn stack(&mut self, location_indices: &[i32]) -> i32 {
        if let Some(&index) = self.stacks.get(location_indices) {
            return index;
        }
        let location_indices = location_indices.to_vec();
        let index = push(&mut self.tables.stack_table, Stack { location_indices: location_indices.clone() });
        self.stacks.insert(location_indices, index);
        index
    }

    /// Interns a location that is no place, only a name.
    pub(super) fn marker(&mut self, name: &str) -> i32 {
        if let Some(&index) = self.markers.get(name) {
            return index;
        }
        let line = self.line(&name.into(), None);
        let index = push(&mut self.tables.location_table, Location { lines: vec![line], ..Location::default() });
        self.markers.insert(name.to_owned(), index);
        index
    }

    /// Interns a frame.
    pub(super) fn location(&mut self, frame: &Arc<Frame>) -> i32 {
        if let Some(&index) = self.frames.get(frame) {
            return index;
        }
        let index = self.add_location(frame);
        self.frames.insert(Arc::clone(frame), index);
        index
    }

    fn add_location(&mut self, frame: &Frame) -> i32 {
        let mapping_index = frame.executable.as_ref().map_or(0, |executable| self.mapping(executable, frame.address));
        let mut lines: Vec<Line> =
            frame.inlined.iter().map(|inlined| self.line(&inlined.name, inlined.place.as_ref())).collect();
        if let FrameName::Function(name) = &frame.name {
            lines.push(self.line(name, frame.place.as_ref()));
        }
        let is_named = matches!(frame.name, FrameName::Function(_));
        let place = if is_named {
            Place::Lines(lines.iter().map(|line| (line.function_index, line.line)).collect())
        } else {
            Place::Address(frame.address)
        };
        let key = LocationKey { mapping_index, frame_type: frame.frame_type, place };
        if let Some(&index) = self.locations.get(&key) {
            return index;
        }
        let mut attribute_indices =
            vec![self.attribute("profile.frame.type", AttributeValue::Text(frame.frame_type.label().to_owned()))];
        // Nothing is known but the place: backends can still name it by mapping and address.
        if let FrameName::Unnamed(reason) = &frame.name {
            let reason = AttributeValue::Text(reason.label().to_owned());
            attribute_indices.push(self.attribute("profiler.frame.nameless", reason));
        }
        // Where the kernel is in memory is nobody's business, and tells nothing about a function that has a name.
        let address = if is_named && frame.frame_type == FrameType::Kernel { 0 } else { frame.address };
        let location = Location { mapping_index, address, lines, attribute_indices };
        let index = push(&mut self.tables.location_table, location);
        self.locations.insert(key, index);
        index
    }

    fn line(&mut self, name: &FunctionName, place: Option<&SourceLine>) -> Line {
        let line = place.map_or(0, |place| i64::from(place.line));
        Line { function_index: self.function(name, place), line, column: 0 }
    }

    fn function(&mut self, name: &FunctionName, place: Option<&SourceLine>) -> i32 {
        let name_strindex = self.string(&name.readable);
        let system_name_strindex = name.system.as_deref().map_or(0, |system| self.string(system));
        let filename_strindex = place.map_or(0, |place| self.string(&place.file));
        let start_line = place.map_or(0, |place| i64::from(place.start_line));
        let table = &mut self.tables.function_table;
        *self.functions.entry((name_strindex, system_name_strindex, filename_strindex, start_line)).or_insert_with(
            || push(table, Function { name_strindex, system_name_strindex, filename_strindex, start_line }),
        )
    }

    /// One mapping per executable segment; addresses are as the file states them.
    fn mapping(&mut self, executable: &Executable, address: u64) -> i32 {
        let (memory_start, memory_limit, file_offset) = executable
            .segment_at(address)
            .map_or((0, 0, 0), |s| (s.address.0, s.address.0.saturating_add(s.size), s.offset.0));
        let filename_strindex = self.string(&executable.path);
        let identity = &executable.identity;
        let attribute_indices: Vec<i32> = [
            ("gnu", executable.build_id.as_deref().map(hex)),
            ("go", identity.go_build_id.as_deref().map(str::to_owned)),
            ("htlhash", identity.hash.map(|hash| hex(&hash))),
        ]
        .into_iter()
        .filter_map(|(kind, id)| {
            Some(self.attribute(&format!("process.executable.build_id.{kind}"), AttributeValue::Text(id?)))
        })
        .collect();
        let table = &mut self.tables.mapping_table;
        let key = (filename_strindex, attribute_indices.clone(), [memory_start, memory_limit, file_offset]);
        *self.mappings.entry(key).or_insert_with(|| {
            push(table, Mapping { memory_start, memory_limit, file_offset, filename_strindex, attribute_indices })
        })
    }
}

/// Appends and returns the index. Requests are split long before an index could overflow.
fn push<T>(table: &mut Vec<T>, entry: T) -> i32 {
    table.push(entry);
    i32::try_from(table.len() - 1).unwrap_or(0)
}

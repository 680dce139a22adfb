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
    profile::{Executable, ExecutableId, Frame, FrameName, FunctionName, SourceLine, hex},
};

/// A request's dictionary under construction.
pub(super) struct Dictionary {
    tables: ProfilesDictionary,
    strings: HashMap<String, i32>,
    functions: HashMap<FunctionKey, i32>,
    mappings: HashMap<(ExecutableId, u64), i32>,
    locations: HashMap<Arc<Frame>, i32>,
    stacks: HashMap<Vec<i32>, i32>,
    attributes: HashMap<(i32, AttributeValue), i32>,
}

/// What tells functions apart: name, system name, file and the line at which it begins.
type FunctionKey = (i32, i32, i32, i64);

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
            locations: HashMap::new(),
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
        let index = push(&mut self.tables.string_table, legible(text));
        self.strings.insert(text.to_owned(), index);
        index
    }

    pub(super) fn attribute(&mut self, key: &str, value: AttributeValue) -> i32 {
        let key_strindex = self.string(key);
        if let Some(&index) = self.attributes.get(&(key_strindex, value.clone())) {
            return index;
        }
        let wire = match &value {
            AttributeValue::Text(text) => Value::StringValue(legible(text)),
            AttributeValue::Number(number) => Value::IntValue(*number),
        };
        let entry = KeyValueAndUnit { key_strindex, value: Some(AnyValue { value: Some(wire) }), unit_strindex: 0 };
        let index = push(&mut self.tables.attribute_table, entry);
        self.attributes.insert((key_strindex, value), index);
        index
    }

    /// Interns a stack, leaf first.
    pub(super) fn stack(&mut self, frames: &[Arc<Frame>]) -> i32 {
        let location_indices: Vec<i32> = frames.iter().map(|frame| self.location(frame)).collect();
        if let Some(&index) = self.stacks.get(&location_indices) {
            return index;
        }
        let index = push(&mut self.tables.stack_table, Stack { location_indices: location_indices.clone() });
        self.stacks.insert(location_indices, index);
        index
    }

    fn location(&mut self, frame: &Arc<Frame>) -> i32 {
        if let Some(&index) = self.locations.get(frame) {
            return index;
        }
        let mut attribute_indices =
            vec![self.attribute("profile.frame.type", AttributeValue::Text(frame.frame_type.label().to_owned()))];
        let mut lines: Vec<Line> =
            frame.inlined.iter().map(|inlined| self.line(&inlined.name, inlined.place.as_ref())).collect();
        match &frame.name {
            FrameName::Function(name) => lines.push(self.line(name, frame.place.as_ref())),
            // Nothing is known but the place: backends can still name it by mapping and address.
            FrameName::Unnamed(reason) => {
                let reason = AttributeValue::Text(reason.label().to_owned());
                attribute_indices.push(self.attribute("profiler.frame.nameless", reason));
            }
            FrameName::Unmapped => {}
        }
        let location = Location {
            mapping_index: frame.executable.as_ref().map_or(0, |executable| self.mapping(executable, frame.address)),
            address: frame.address,
            lines,
            attribute_indices,
        };
        let index = push(&mut self.tables.location_table, location);
        self.locations.insert(Arc::clone(frame), index);
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
        if let Some(&index) = self.mappings.get(&(executable.id, memory_start)) {
            return index;
        }
        let attribute_indices = executable
            .build_id
            .as_deref()
            .map(|id| self.attribute("process.executable.build_id.gnu", AttributeValue::Text(hex(id))))
            .into_iter()
            .collect();
        let mapping = Mapping {
            memory_start,
            memory_limit,
            file_offset,
            filename_strindex: self.string(&executable.path),
            attribute_indices,
        };
        let index = push(&mut self.tables.mapping_table, mapping);
        self.mappings.insert((executable.id, memory_start), index);
        index
    }
}

/// Appends and returns the index. Requests are split long before an index could overflow.
fn push<T>(table: &mut Vec<T>, entry: T) -> i32 {
    table.push(entry);
    i32::try_from(table.len() - 1).unwrap_or(0)
}

//! Frames by place, within a byte budget.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use crate::profile::{ExecutableId, FileOffset, Frame, FrameName, FunctionName, Location, SourceLine};

/// Estimated bytes of an entry besides its name: the frame, its reference counts, and its share of the table.
const ENTRY_BYTES: usize = 200;

/// What a frame is cached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FrameKey {
    Kernel(u64),
    File(ExecutableId, FileOffset),
    /// Code made at run time: which, its version, address.
    Runtime(u64, u64, u64),
    Unmapped(u64),
}

impl FrameKey {
    pub(super) fn of(location: &Location) -> Self {
        match location {
            Location::Kernel(address) => Self::Kernel(*address),
            Location::File { executable, offset } => Self::File(executable.id, *offset),
            Location::Anonymous { code, address } => Self::Runtime(code.id, code.version(), *address),
            Location::Unmapped(address) => Self::Unmapped(*address),
        }
    }
}

/// Two generations: entries are added to, and on use moved to, the young one; when it has filled half of the
/// budget it becomes the old one, and what was old and not used since is dropped.
pub(super) struct FrameCache {
    young: HashMap<FrameKey, Arc<Frame>>,
    old: HashMap<FrameKey, Arc<Frame>>,
    young_bytes: usize,
    old_bytes: usize,
    budget: usize,
    evictions: u64,
}

impl FrameCache {
    pub(super) fn new(budget: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), young_bytes: 0, old_bytes: 0, budget, evictions: 0 }
    }

    pub(super) fn get(&mut self, key: FrameKey) -> Option<Arc<Frame>> {
        if let Some(frame) = self.young.get(&key) {
            return Some(Arc::clone(frame));
        }
        let frame = self.old.remove(&key)?;
        self.old_bytes = self.old_bytes.saturating_sub(bytes_of(&frame));
        self.insert(key, Arc::clone(&frame));
        Some(frame)
    }

    pub(super) fn insert(&mut self, key: FrameKey, frame: Arc<Frame>) {
        let bytes = bytes_of(&frame);
        if self.young_bytes + bytes > self.budget / 2 {
            self.evictions += u64::from(!self.old.is_empty());
            self.old = std::mem::take(&mut self.young);
            self.old_bytes = std::mem::take(&mut self.young_bytes);
        }
        self.young_bytes += bytes;
        if let Some(replaced) = self.young.insert(key, frame) {
            self.young_bytes = self.young_bytes.saturating_sub(bytes_of(&replaced));
        }
    }

    /// Keeps to another budget from now on.
    pub(super) fn set_budget(&mut self, budget: usize) {
        self.budget = budget;
        if self.young_bytes > budget / 2 {
            self.evictions += 1;
            self.young.clear();
            self.young_bytes = 0;
        }
        if self.old_bytes > budget / 2 {
            self.old.clear();
            self.old_bytes = 0;
        }
    }

    /// Drops one frame.
    pub(super) fn forget(&mut self, key: FrameKey) {
        for (frames, bytes) in [(&mut self.young, &mut self.young_bytes), (&mut self.old, &mut self.old_bytes)] {
            if let Some(frame) = frames.remove(&key) {
                *bytes = bytes.saturating_sub(bytes_of(&frame));
            }
        }
    }

    /// Drops the frames of all files.
    pub(super) fn forget_files(&mut self) {
        for (frames, bytes) in [(&mut self.young, &mut self.young_bytes), (&mut self.old, &mut self.old_bytes)] {
            frames.retain(|key, _| !matches!(key, FrameKey::File(..)));
            *bytes = frames.values().map(|frame| bytes_of(frame)).sum();
        }
    }

    /// Drops the nameless frames of these files.
    pub(super) fn forget_nameless(&mut self, files: &HashSet<ExecutableId>) {
        let keep = |key: &FrameKey, frame: &mut Arc<Frame>| match key {
            FrameKey::File(file, _) => !matches!(frame.name, FrameName::Unnamed(_)) || !files.contains(file),
            _ => true,
        };
        for (frames, bytes) in [(&mut self.young, &mut self.young_bytes), (&mut self.old, &mut self.old_bytes)] {
            frames.retain(keep);
            *bytes = frames.values().map(|frame| bytes_of(frame)).sum();
        }
    }

    /// Drops kernel frames whose addresses may mean something else now.
    pub(super) fn forget_kernel(&mut self, is_stale: impl Fn(u64) -> bool) {
        for (frames, bytes) in [(&mut self.young, &mut self.young_bytes), (&mut self.old, &mut self.old_bytes)] {
            frames.retain(|key, _| !matches!(key, FrameKey::Kernel(address) if is_stale(*address)));
            *bytes = frames.values().map(|frame| bytes_of(frame)).sum();
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.young_bytes + self.old_bytes
    }

    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }
}

fn bytes_of(frame: &Frame) -> usize {
    let name = |name: &FunctionName| name.readable.len() + name.system.as_ref().map_or(0, |system| system.len());
    let place = |place: &Option<SourceLine>| place.as_ref().map_or(0, |place| place.file.len());
    let own = match &frame.name {
        FrameName::Function(function) => name(function),
        FrameName::Unnamed(_) | FrameName::Unmapped => 0,
    };
    let inlined: usize = frame.inlined.iter().map(|function| name(&function.name) + place(&function.place)).sum();
    ENTRY_BYTES + own + place(&frame.place) + inlined + size_of_val(&*frame.inlined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::FrameType;

    fn frame(address: u64) -> Arc<Frame> {
        Arc::new(Frame::new(FrameType::Kernel, FrameName::Unmapped, None, address))
    }

    /// However much is added, the budget holds, and what is used all the time stays.
    #[test]
    fn keeps_its_budget_and_what_is_used() {
        let budget = 100 * ENTRY_BYTES;
        let mut cache = FrameCache::new(budget);
        cache.insert(FrameKey::Kernel(0), frame(0));
        for address in 1..10_000 {
            cache.insert(FrameKey::Kernel(address), frame(address));
            assert!(cache.get(FrameKey::Kernel(0)).is_some(), "dropped after {address}");
            assert!(cache.bytes() <= budget);
        }
        assert!(cache.get(FrameKey::Kernel(1)).is_none());
        assert!(cache.evictions() > 0);
    }
}

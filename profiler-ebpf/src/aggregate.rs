//! Counts a finished sample in the buffer of its size class.

use core::ptr::{self, NonNull};

use aya_ebpf::btf_maps::ArrayOfMaps;
use profiler_common::abi::{
    counter::Counter,
    sample::{LARGE_FRAMES, MEDIUM_FRAMES, SMALL_FRAMES, Sample, SampleHeader, SampleKey},
};

use crate::{
    maps::{Buffer, OVERFLOW, SAMPLES_LARGE, SAMPLES_MEDIUM, SAMPLES_SMALL, count},
    memory::atomic_add,
    unwind::Scratch,
};

/// Odd constant close to 2^64 divided by the golden ratio: spreads every input bit over the high bits.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Folds one word into a hash.
#[inline(always)]
pub fn mix(hash: u64, word: u64) -> u64 {
    let mixed = (hash.rotate_left(5) ^ word).wrapping_mul(MULTIPLIER);
    mixed ^ (mixed >> 32)
}

/// Adds the scratch sample to its row in the smallest size class that holds it. False: it was lost, and counted.
#[inline(always)]
pub fn add(scratch: &Scratch) -> bool {
    let key = scratch.sample.header.key();
    let frames = scratch.frames as usize;
    if frames <= SMALL_FRAMES {
        add_to::<_, SMALL_FRAMES>(&SAMPLES_SMALL, &key, scratch)
    } else if frames <= MEDIUM_FRAMES {
        add_to::<_, MEDIUM_FRAMES>(&SAMPLES_MEDIUM, &key, scratch)
    } else {
        add_to::<_, LARGE_FRAMES>(&SAMPLES_LARGE, &key, scratch)
    }
}

/// Raises the row of `key`. False: it is not there any more.
#[inline(always)]
pub fn raise(key: &SampleKey, count: u64, blocked_ns: u64, queued_ns: u64, waits: u64) -> bool {
    let frames = (key.shape & 0xffff) as usize + (key.shape >> 16) as usize;
    let row = if frames <= SMALL_FRAMES {
        row_of::<_, SMALL_FRAMES>(&SAMPLES_SMALL, key)
    } else if frames <= MEDIUM_FRAMES {
        row_of::<_, MEDIUM_FRAMES>(&SAMPLES_MEDIUM, key)
    } else {
        row_of::<_, LARGE_FRAMES>(&SAMPLES_LARGE, key)
    };
    let Some(row) = row else { return false };
    raise_row(row, count, blocked_ns, queued_ns, waits);
    true
}

/// Adds a row that has no frames of its own. False: it was lost.
#[inline(always)]
pub fn add_reference(header: &SampleHeader, key: &SampleKey) -> bool {
    let Some(buffer) = SAMPLES_SMALL.get(0) else { return false };
    let raise = |row: NonNull<Sample<SMALL_FRAMES>>| {
        raise_row(row.cast(), header.count, header.blocked_ns, header.queued_ns, header.waits);
        true
    };
    if let Some(row) = buffer.get_ptr_mut::<SampleKey, Sample<SMALL_FRAMES>>(key) {
        return raise(row);
    }
    // SAFETY: the header is the beginning of a scratch sample, which is at least as large as this class's.
    let sample = unsafe { &*ptr::from_ref(header).cast::<Sample<SMALL_FRAMES>>() };
    if buffer.add(key, sample) {
        return true;
    }
    if let Some(row) = buffer.get_ptr_mut::<SampleKey, Sample<SMALL_FRAMES>>(key) {
        return raise(row);
    }
    let is_sent = OVERFLOW.output_untyped::<SampleHeader>(header, 0).is_ok();
    if is_sent {
        count(Counter::Overflowed);
    }
    is_sent
}

#[inline(always)]
fn row_of<const BYTES: usize, const FRAMES: usize>(
    buffers: &ArrayOfMaps<Buffer<BYTES>, 1>,
    key: &SampleKey,
) -> Option<NonNull<SampleHeader>> {
    buffers.get(0)?.get_ptr_mut::<SampleKey, Sample<FRAMES>>(key).map(NonNull::cast)
}

#[inline(always)]
fn raise_row(row: NonNull<SampleHeader>, count: u64, blocked_ns: u64, queued_ns: u64, waits: u64) {
    let row = row.as_ptr();
    // SAFETY: the row stays readable while the program runs; only addresses of its members are taken.
    let (counts, blocked, queued, begun) = unsafe {
        (&raw mut (*row).count, &raw mut (*row).blocked_ns, &raw mut (*row).queued_ns, &raw mut (*row).waits)
    };
    if count != 0 {
        atomic_add(counts, count);
    }
    if blocked_ns != 0 {
        atomic_add(blocked, blocked_ns);
    }
    if queued_ns != 0 {
        atomic_add(queued, queued_ns);
    }
    if waits != 0 {
        atomic_add(begun, waits);
    }
}

#[inline(always)]
fn add_to<const BYTES: usize, const FRAMES: usize>(
    buffers: &ArrayOfMaps<Buffer<BYTES>, 1>,
    key: &SampleKey,
    scratch: &Scratch,
) -> bool {
    let header = &scratch.sample.header;
    let Some(buffer) = buffers.get(0) else {
        count(Counter::LostBuffer);
        return false;
    };
    if let Some(row) = buffer.get_ptr_mut::<SampleKey, Sample<FRAMES>>(key) {
        raise_row(row.cast(), header.count, 0, 0, header.waits);
        return true;
    }
    // SAFETY: FRAMES is at most the scratch sample's, so its first bytes are a valid sample of this class.
    let sample = unsafe { &*ptr::from_ref(&scratch.sample).cast::<Sample<FRAMES>>() };
    if buffer.add(key, sample) {
        return true;
    }
    // Another CPU may have made the row in between.
    if let Some(row) = buffer.get_ptr_mut::<SampleKey, Sample<FRAMES>>(key) {
        raise_row(row.cast(), header.count, 0, 0, header.waits);
        return true;
    }
    let is_sent = OVERFLOW.output_untyped::<Sample<FRAMES>>(sample, 0).is_ok();
    // What is lost of a wait is its stack only, which the caller notes.
    if is_sent {
        count(Counter::Overflowed);
    } else if header.waits == 0 {
        count(Counter::LostOverflow);
    }
    is_sent
}

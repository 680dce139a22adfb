//! Counts a finished sample in the buffer of its size class.

use core::ptr;

use aya_ebpf::btf_maps::ArrayOfMaps;
use profiler_common::abi::{
    counter::Counter,
    sample::{LARGE_FRAMES, MEDIUM_FRAMES, SMALL_FRAMES, Sample, SampleKey},
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

/// Counts the scratch sample in the smallest size class that holds it.
#[inline(always)]
pub fn add(scratch: &Scratch) {
    let header = &scratch.sample.header;
    let key = SampleKey {
        hash: scratch.hash,
        tgid: header.process.tgid,
        shape: u32::from(header.kernel_frames) | u32::from(header.user_frames) << 16,
    };
    let frames = scratch.frames as usize;
    if frames <= SMALL_FRAMES {
        add_to::<_, SMALL_FRAMES>(&SAMPLES_SMALL, &key, scratch);
    } else if frames <= MEDIUM_FRAMES {
        add_to::<_, MEDIUM_FRAMES>(&SAMPLES_MEDIUM, &key, scratch);
    } else {
        add_to::<_, LARGE_FRAMES>(&SAMPLES_LARGE, &key, scratch);
    }
}

#[inline(always)]
fn add_to<const BYTES: usize, const FRAMES: usize>(
    buffers: &ArrayOfMaps<Buffer<BYTES>, 1>,
    key: &SampleKey,
    scratch: &Scratch,
) {
    let Some(buffer) = buffers.get(0) else {
        count(Counter::LostBuffer);
        return;
    };
    if let Some(row) = buffer.get_ptr_mut::<SampleKey, Sample<FRAMES>>(key) {
        atomic_add(row.as_ptr().cast(), 1);
        return;
    }
    // SAFETY: FRAMES is at most the scratch sample's, so its first bytes are a valid sample of this class.
    let sample = unsafe { &*ptr::from_ref(&scratch.sample).cast::<Sample<FRAMES>>() };
    if buffer.add(key, sample) {
        return;
    }
    // Another CPU may have made the row in between.
    if let Some(row) = buffer.get_ptr_mut::<SampleKey, Sample<FRAMES>>(key) {
        atomic_add(row.as_ptr().cast(), 1);
        return;
    }
    if OVERFLOW.output_untyped::<Sample<FRAMES>>(sample, 0).is_ok() {
        count(Counter::Overflowed);
    } else {
        count(Counter::LostOverflow);
    }
}

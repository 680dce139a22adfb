//! What the fuzz targets in `fuzz/` call: one function for each parser of untrusted bytes.
//!
//! In: any bytes. Out: nothing; a function panics where something does not hold that has to hold for any bytes.
//! Only builds of cargo-fuzz have this module.

use std::{cell::OnceCell, fs::File, os::unix::fs::FileExt as _, sync::Arc};

use nix::sys::memfd::{MFdFlags, memfd_create};
use profiler_common::{
    abi::sample::SampleHeader,
    unwind::{
        Memory, Registers, Saved, USER_SPACE_END, pt_regs,
        rule::{Rule, cfa},
        step,
    },
};
use zerocopy::{FromBytes as _, IntoBytes as _};

pub use crate::{
    cgroups::fuzzing::cgroups,
    config::fuzzing::{capture_request, config},
    control::capture::fuzzing::cgroup_usage,
    export::{fuzzing::spool, otlp::client::fuzzing::otlp_answer},
    kernel::fuzzing::{btf, mmap_record},
    label::fuzzing::pod,
    process::fuzzing::{mappings, notices, proc_text},
    redact::fuzzing::redact,
    scope::fuzzing::scope,
    symbolize::fuzzing::{debug_info, demangle, go_lines, jitdump, perf_map, symbols},
    unwind_info::fuzzing::{debug_frame, eh_frame, executable, go_table, guessed_code, sections, table},
};
use crate::{elf, profile::RawSample};

/// Takes numbers and pieces from the bytes of an input; zeroes where it has ended.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn bytes<const LEN: usize>(&mut self) -> [u8; LEN] {
        let mut taken = [0; LEN];
        let piece = self.piece(LEN);
        taken[..piece.len()].copy_from_slice(piece);
        taken
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    pub(crate) fn half(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub(crate) fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// At most `len` bytes.
    pub(crate) fn piece(&mut self, len: usize) -> &'a [u8] {
        let (piece, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        piece
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A file with these contents. There is one for each thread, whose contents change.
pub(crate) fn file(contents: &[u8]) -> Arc<File> {
    thread_local! {
        static FILE: OnceCell<Arc<File>> = const { OnceCell::new() };
    }
    let file = FILE.with(|file| {
        let make = || File::from(memfd_create(c"input", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
        Arc::clone(file.get_or_init(|| Arc::new(make())))
    });
    file.write_all_at(contents, 0).expect("memory for a small file");
    file.set_len(contents.len() as u64).expect("a file in memory can be cut");
    file
}

/// ELF headers: whatever is kept of them is bounded.
pub fn elf(bytes: &[u8]) {
    let file = file(bytes);
    if let Some(summary) = elf::summarize(&file) {
        assert!(summary.segments.len() <= 256);
        assert!(summary.build_id.is_none_or(|id| (1..=64).contains(&id.len())));
    }
    let sections = elf::sections(&file);
    let names: usize = sections.iter().map(|section| section.name.len()).sum();
    assert!(names <= sections.len() * bytes.len());
    if let Some(index) = elf::unwind_index(&file) {
        assert!(index.offset < index.part_end);
    }
    assert!(elf::functions(&file).len() * 24 <= bytes.len() * sections.len().max(1));
    let _ = elf::entry(&file);
}

/// Rows of sample buffers: what was decoded is what the bytes say.
pub fn raw_sample(bytes: &[u8]) {
    assert!(RawSample::count_of(bytes) > 0);
    let Ok(sample) = RawSample::decode(bytes) else { return };
    for name in [&sample.process_name, &sample.thread_name] {
        assert!(name.len() <= 3 * 16 && !name.contains(char::is_control));
    }
    let mut header = SampleHeader {
        count: sample.count,
        process: sample.process,
        blocked_ns: sample.waited.blocked_ns,
        queued_ns: sample.waited.queued_ns,
        waits: u64::from(sample.waited.ended) << 32 | u64::from(sample.waited.began),
        hash: sample.key.hash,
        kernel_frames: sample.key.shape as u16,
        user_frames: (sample.key.shape >> 16) as u16,
        kind: sample.kind as u8,
        user_end: sample.end as u8,
        is_reference: u8::from(sample.is_reference),
        ..SampleHeader::default()
    };
    // The names as they were.
    let (given, _) = SampleHeader::read_from_prefix(bytes).expect("it was decoded");
    (header.process_comm, header.thread_comm) = (given.process_comm, given.thread_comm);
    let mut encoded = header.as_bytes().to_vec();
    encoded.extend(sample.kernel.iter().chain(&sample.user).flat_map(|word| word.to_ne_bytes()));
    assert_eq!(RawSample::decode(&encoded), Ok(sample));
}

/// Memory that holds whatever the input says next, wherever it is read.
struct AnyMemory<'a>(Input<'a>);

impl Memory for AnyMemory<'_> {
    fn read_pair(&mut self, address: u64) -> Option<[u64; 2]> {
        Some([self.read_word(address)?, self.read_word(address)?])
    }

    fn read_word(&mut self, _: u64) -> Option<u64> {
        (!self.0.is_empty()).then(|| self.0.word())
    }
}

/// A walk by any rules through any memory: callers lie in user space, and stacks are left upwards.
pub fn unwind_step(bytes: &[u8]) {
    const MAX_STEPS: usize = 64;
    let mut input = Input(bytes);
    let words: [u64; pt_regs::WORDS] = std::array::from_fn(|_| input.word());
    let mut registers = Registers::interrupted(&words);
    if input.byte() & 1 == 1 {
        registers.fp = Saved { value: input.word(), address: input.word() };
    }
    let rules = usize::from(input.byte()) % MAX_STEPS * size_of::<Rule>();
    let rules = input.piece(rules);
    let mut memory = AnyMemory(input);
    let mut leaf = Some(&words);
    for rule in rules.chunks_exact(size_of::<Rule>()) {
        let Ok(rule) = Rule::read_from_bytes(rule) else { return };
        let Ok(caller) = step(&rule, &registers, leaf.take(), &mut memory) else { return };
        assert!((0x1000..USER_SPACE_END).contains(&caller.pc));
        let is_upwards = !matches!(rule.cfa & !cfa::GUESSED, cfa::OTHER_STACK | cfa::SIGNAL_FRAME | cfa::LEAF_JUMP);
        assert!(!is_upwards || caller.sp > registers.sp);
        registers = caller;
    }
}

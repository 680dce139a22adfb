//! A sample as the kernel recorded it: addresses, and who was running.

use profiler_common::abi::{
    process::{Comm, ProcessKey},
    sample::{EventKind, SampleHeader, SampleKey, StackEnd},
};
use thiserror::Error;
use zerocopy::FromBytes as _;

use super::CgroupId;

/// A row of a sample buffer, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawSample {
    /// The process and program image.
    pub process: ProcessKey,
    /// The cgroup of the thread; zero: not known.
    pub cgroup: CgroupId,
    /// Command name of the process.
    pub process_name: String,
    /// Command name of the thread.
    pub thread_name: String,
    /// What was measured.
    pub kind: EventKind,
    /// Why the user stack ends.
    pub end: StackEnd,
    /// Kernel addresses, leaf first.
    pub kernel: Vec<u64>,
    /// User addresses, leaf first.
    pub user: Vec<u64>,
    /// How many samples this stands for; of waits, how many that ended.
    pub count: u64,
    /// What threads waited.
    pub waited: Waited,
    /// What tells the row from others.
    pub key: SampleKey,
    /// The frames were in an earlier row of the same key; there are none here.
    pub is_reference: bool,
    /// At which pace it was collected.
    pub epoch: u8,
}

/// What a place is due: time that its samples were charged too little, or (negative) too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitDue {
    /// The place: see `WaitSite::tag`.
    pub tag: u32,
    /// The row of the last sampled wait there; without a hash, there is none yet.
    pub key: SampleKey,
    /// Nanoseconds blocked.
    pub blocked_ns: i64,
    /// Nanoseconds waiting for a CPU.
    pub queued_ns: i64,
}

/// The part of a row that only waits have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// Time that threads were blocked, nanoseconds.
    pub blocked_ns: u64,
    /// Time that threads waited for a CPU, nanoseconds.
    pub queued_ns: u64,
    /// Sampled waits that began.
    pub began: u32,
    /// Sampled waits that ended.
    pub ended: u32,
}

/// Why bytes are not a sample. Kernel and agent are built together, so this is a bug, but not a reason to stop.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Shorter than its header or than the frames it announces.
    #[error("a sample of {len} bytes cannot hold what its header announces")]
    Truncated {
        /// Bytes received.
        len: usize,
    },
    /// An enum value outside its range.
    #[error("a sample has the unknown {field} {value}")]
    UnknownValue {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u8,
    },
}

impl RawSample {
    /// Decodes a row.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let truncated = DecodeError::Truncated { len: bytes.len() };
        let Ok((header, frames)) = SampleHeader::read_from_prefix(bytes) else { return Err(truncated) };
        let is_reference = header.is_reference != 0;
        let (kernel_len, user_len) =
            if is_reference { (0, 0) } else { (usize::from(header.kernel_frames), usize::from(header.user_frames)) };
        let mut words = frames.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()));
        if words.len() < kernel_len + user_len {
            return Err(truncated);
        }
        Ok(Self {
            process: header.process,
            cgroup: CgroupId(header.cgroup),
            process_name: comm_to_string(&header.process_comm),
            thread_name: comm_to_string(&header.thread_comm),
            kind: EventKind::try_from(header.kind)
                .map_err(|value| DecodeError::UnknownValue { field: "event kind", value })?,
            end: StackEnd::try_from(header.user_end)
                .map_err(|value| DecodeError::UnknownValue { field: "stack end", value })?,
            kernel: words.by_ref().take(kernel_len).collect(),
            user: words.take(user_len).collect(),
            count: header.count,
            waited: Waited {
                blocked_ns: header.blocked_ns,
                queued_ns: header.queued_ns,
                began: header.waits as u32,
                ended: (header.waits >> 32) as u32,
            },
            key: header.key(),
            is_reference,
            epoch: header.epoch,
        })
    }
}

impl RawSample {
    /// How many samples a row stands for that does not decode: what its first field says, or one.
    pub fn count_of(bytes: &[u8]) -> u64 {
        SampleHeader::read_from_prefix(bytes).map_or(1, |(header, _)| header.count.max(1))
    }
}

/// A command name may hold any bytes: what is not printable text is replaced.
fn comm_to_string(comm: &Comm) -> String {
    let end = comm.iter().position(|&byte| byte == 0).unwrap_or(comm.len());
    String::from_utf8_lossy(&comm[..end]).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes as _;

    use super::*;

    fn row(kernel: &[u64], user: &[u64]) -> Vec<u8> {
        let mut header = SampleHeader {
            count: 7,
            kernel_frames: kernel.len() as u16,
            user_frames: user.len() as u16,
            kind: EventKind::OnCpu as u8,
            user_end: StackEnd::Root as u8,
            ..SampleHeader::default()
        };
        header.thread_comm[..3].copy_from_slice(b"a\nb");
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(kernel.iter().chain(user).flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    /// Kernel frames come first; padding after the last frame is ignored; control characters are replaced.
    #[test]
    fn splits_kernel_and_user_frames() {
        let mut bytes = row(&[1, 2], &[3]);
        bytes.extend_from_slice(&[0xff; 16]);
        let sample = RawSample::decode(&bytes).expect("valid");
        assert_eq!((sample.kernel, sample.user, sample.count), (vec![1, 2], vec![3], 7));
        assert_eq!(sample.thread_name, "a\u{fffd}b");
    }

    /// Whatever the bytes are, the answer is an error, never a panic.
    #[test]
    fn refuses_what_does_not_fit() {
        let bytes = row(&[1, 2], &[3]);
        for len in 0..bytes.len() {
            assert_eq!(RawSample::decode(&bytes[..len]), Err(DecodeError::Truncated { len }));
        }
        let mut unknown = row(&[], &[]);
        unknown[100] = 99;
        assert_eq!(RawSample::decode(&unknown), Err(DecodeError::UnknownValue { field: "event kind", value: 99 }));
    }
}

//! Code as it appears, from the perf subsystem's own side-band records.
//!
//! In: online CPUs. Out: which range of which process became executable, and which file backs it; which code the kernel
//! made for itself (BPF programs, trampolines), and when it went. This needs neither kprobes nor trampolines, so it works
//! wherever sampling does.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd, FromRawFd as _, OwnedFd, RawFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use aya_obj::generated::{
    perf_event_attr, perf_event_mmap_page, perf_sw_ids::PERF_COUNT_SW_DUMMY, perf_type_id::PERF_TYPE_SOFTWARE,
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::{Interest, unix::AsyncFd};

use super::cpus;
use crate::{process::NewMapping, profile::KernelCode};

/// Bytes of a CPU's ring: a power of two of pages. A record has about 150 bytes.
const RING_BYTES: usize = 32 << 10;
/// Bytes of the page before it, which holds the positions.
const PAGE: usize = 4096;
/// Closes the descriptor on `execve`; kinds of records (`include/uapi/linux/perf_event.h`).
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
const PERF_RECORD_LOST: u32 = 2;
const PERF_RECORD_MMAP2: u32 = 10;
const PERF_RECORD_KSYMBOL: u32 = 17;
/// Flag of the last: the code is gone.
const KSYMBOL_UNREGISTER: u16 = 1;
/// Most bytes of a symbol's name (`KSYM_NAME_LEN`, `include/linux/kallsyms.h`).
const MAX_SYMBOL: usize = 512;
/// Bytes of every record's header: type, misc, size.
const HEADER: usize = 8;
/// Longest record: its size has 16 bits.
const MAX_RECORD: usize = 1 << 16;

/// One CPU's records.
struct CpuRing {
    event: OwnedFd,
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for CpuRing {}

impl Drop for CpuRing {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this size and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), PAGE + RING_BYTES) };
    }
}

impl CpuRing {
    fn open(cpu: u32) -> io::Result<Self> {
        // SAFETY: all zeroes is a valid value of this plain struct.
        let mut attributes: perf_event_attr = unsafe { std::mem::zeroed() };
        attributes.type_ = PERF_TYPE_SOFTWARE as u32;
        attributes.size = size_of::<perf_event_attr>() as u32;
        attributes.config = PERF_COUNT_SW_DUMMY as u64;
        attributes.set_mmap(1);
        attributes.set_mmap2(1);
        // Since Linux 5.1.
        attributes.set_ksymbol(1);
        attributes.set_watermark(1);
        attributes.__bindgen_anon_2.wakeup_watermark = 1;
        // SAFETY: the attributes are live for the call, and the kernel reads no more than the size they state.
        let descriptor = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                -1,
                libc::c_long::from(cpu),
                -1,
                PERF_FLAG_FD_CLOEXEC,
            )
        };
        let descriptor = RawFd::try_from(descriptor).ok().filter(|&descriptor| descriptor >= 0);
        let Some(descriptor) = descriptor else { return Err(io::Error::last_os_error()) };
        // SAFETY: the kernel has just made this descriptor for us.
        let event = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // SAFETY: a new mapping of the event's ring.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE + RING_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { event, base }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Calls `record` with the kind and body of every record that is waiting.
    fn read(&mut self, mut record: impl FnMut(u32, &[u8])) {
        let page = self.base.as_ptr().cast::<perf_event_mmap_page>();
        // SAFETY: the first page of the mapping holds the positions, which the kernel changes and reads
        // concurrently; both are aligned words.
        let (head, tail) = unsafe {
            (AtomicU64::from_ptr(&raw mut (*page).data_head), AtomicU64::from_ptr(&raw mut (*page).data_tail))
        };
        let end = head.load(Ordering::Acquire);
        let mut position = tail.load(Ordering::Relaxed);
        let mut body = Vec::new();
        while end.wrapping_sub(position) >= HEADER as u64 {
            let mut header = [0; HEADER];
            self.copy(position, &mut header);
            let [kind @ .., _, _, low, high] = header;
            let size = usize::from(u16::from_ne_bytes([low, high]));
            if size < HEADER || size as u64 > end.wrapping_sub(position) {
                break;
            }
            body.resize(size - HEADER, 0);
            self.copy(position.wrapping_add(HEADER as u64), &mut body);
            record(u32::from_ne_bytes(kind), &body);
            position = position.wrapping_add(size as u64);
        }
        tail.store(end, Ordering::Release);
    }

    /// Copies bytes out of the ring, from a position that only grows.
    fn copy(&self, position: u64, into: &mut [u8]) {
        debug_assert!(into.len() <= MAX_RECORD);
        for (index, byte) in into.iter_mut().enumerate() {
            let place = (position.wrapping_add(index as u64) % RING_BYTES as u64) as usize;
            // SAFETY: the place lies within the ring, which follows the first page; the kernel does not write to
            // what it has handed out until the tail moves on.
            *byte = unsafe { self.base.as_ptr().add(PAGE + place).read_volatile() };
        }
    }
}

/// The records of all CPUs, as one thing to wait for.
pub struct SideBand {
    epoll: Epoll,
    cpus: BTreeMap<u32, CpuRing>,
    lost: u64,
}

impl SideBand {
    /// Opens the records of every online CPU.
    pub(super) fn open() -> io::Result<Self> {
        let mut this = Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, cpus: BTreeMap::new(), lost: 0 };
        this.follow_hotplug()?;
        Ok(this)
    }

    /// Opens the records of CPUs that came, and forgets those that went.
    pub fn follow_hotplug(&mut self) -> io::Result<()> {
        let online = cpus::online()?;
        self.cpus.retain(|cpu, _| online.contains(cpu));
        for cpu in online {
            if !self.cpus.contains_key(&cpu) {
                let ring = CpuRing::open(cpu)?;
                self.epoll.add(&ring.event, EpollEvent::new(EpollFlags::EPOLLIN, u64::from(cpu)))?;
                self.cpus.insert(cpu, ring);
            }
        }
        Ok(())
    }

    /// Calls `mapped` for every mapping that appeared, and `kernel_code` for what the kernel made or let go of.
    pub fn read(&mut self, mut mapped: impl FnMut(&NewMapping), mut kernel_code: impl FnMut(KernelCode)) {
        let mut events = [EpollEvent::empty(); 64];
        // What is ready is taken note of here, so that the next record is news again.
        let _ready = self.epoll.wait(&mut events, EpollTimeout::ZERO);
        let lost = &mut self.lost;
        for ring in self.cpus.values_mut() {
            ring.read(|kind, body| match kind {
                PERF_RECORD_MMAP2 => {
                    if let Some(mapping) = parse(body) {
                        mapped(&mapping);
                    }
                }
                PERF_RECORD_KSYMBOL => {
                    if let Some(code) = parse_symbol(body) {
                        kernel_code(code);
                    }
                }
                PERF_RECORD_LOST => *lost += word(body, 8).unwrap_or(1),
                _ => {}
            });
        }
    }

    /// Records that found their ring full.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Registers it with the current event loop, to be awaited.
    pub fn watch(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is neither replaced nor closed while this lives.
        Ok(unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?)
    }
}

impl AsRawFd for SideBand {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_fd().as_raw_fd()
    }
}

/// Body of a `PERF_RECORD_MMAP2`: u32 pid, tid; u64 addr, len, pgoff; u32 maj, min; u64 ino; and more.
pub(super) fn parse(body: &[u8]) -> Option<NewMapping> {
    let half = |at: usize| Some(u32::from_ne_bytes(body.get(at..at + 4)?.try_into().ok()?));
    let (start, len) = (word(body, 8)?, word(body, 16)?);
    Some(NewMapping {
        tgid: half(0)?,
        start,
        end: start.checked_add(len)?,
        file_offset: word(body, 24)?,
        device: half(32)?.checked_mul(1 << 20)?.checked_add(half(36)?)?,
        inode: word(body, 40)?,
    })
}

/// Body of a `PERF_RECORD_KSYMBOL`: u64 addr; u32 len; u16 type, flags; the name, ended by zeroes.
pub(super) fn parse_symbol(body: &[u8]) -> Option<KernelCode> {
    let start = word(body, 0)?;
    let len = u32::from_ne_bytes(body.get(8..12)?.try_into().ok()?);
    let flags = u16::from_ne_bytes(body.get(14..16)?.try_into().ok()?);
    let name = body.get(16..)?.split(|&byte| byte == 0).next().filter(|name| name.len() <= MAX_SYMBOL)?;
    let name = (flags & KSYMBOL_UNREGISTER == 0).then(|| String::from_utf8_lossy(name).into());
    Some(KernelCode { start, end: start.checked_add(u64::from(len))?, name })
}

fn word(body: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(body.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record is read field by field; one that is too short is none.
    #[test]
    fn reads_records() {
        let mut body = Vec::new();
        for half in [7u32, 8] {
            body.extend(half.to_ne_bytes());
        }
        for word in [0x1000u64, 0x2000, 0x3000] {
            body.extend(word.to_ne_bytes());
        }
        for half in [0xfeu32, 1] {
            body.extend(half.to_ne_bytes());
        }
        body.extend(99u64.to_ne_bytes());
        let expect =
            NewMapping { tgid: 7, start: 0x1000, end: 0x3000, file_offset: 0x3000, device: 0xfe << 20 | 1, inode: 99 };
        assert_eq!(parse(&body), Some(expect));
        for len in 0..body.len() {
            assert_eq!(parse(&body[..len]), None);
        }
    }

    /// A BPF program that comes, and goes.
    #[test]
    fn reads_symbols_of_the_kernel() {
        let body = |flags: u16| {
            let words =
                [&0x1000u64.to_ne_bytes()[..], &0x20u32.to_ne_bytes(), &1u16.to_ne_bytes(), &flags.to_ne_bytes()];
            [words.concat(), b"bpf_prog_1\0\0\0\0\0\0".to_vec()].concat()
        };
        let code = |name: Option<&str>| Some(KernelCode { start: 0x1000, end: 0x1020, name: name.map(Into::into) });
        assert_eq!(parse_symbol(&body(0)), code(Some("bpf_prog_1")));
        assert_eq!(parse_symbol(&body(1)), code(None));
        assert_eq!(parse_symbol(&body(0)[..15]), None);
    }
}

//! What this process may do: checked to be enough for profiling, and cut down to it.
//!
//! Capabilities belong to threads, so they are given up before there is a second one.

use std::{
    fmt, fs, io, mem,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

use aya_obj::generated::{perf_event_attr, perf_sw_ids::PERF_COUNT_SW_CPU_CLOCK, perf_type_id::PERF_TYPE_SOFTWARE};
use nix::sys::prctl;

use super::{cpus, kernel_version};

/// A capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Capability {
    name: &'static str,
    /// By `include/uapi/linux/capability.h`.
    number: u32,
    purpose: &'static str,
}

impl Capability {
    const fn new(name: &'static str, number: u32, purpose: &'static str) -> Self {
        Self { name, number, purpose }
    }
}

/// What nothing works without. It stays: programs are loaded again, CPUs come and go, and so do processes.
const NEEDED: [Capability; 3] = [
    Capability::new("CAP_BPF", 39, "load the kernel programs"),
    Capability::new("CAP_PERFMON", 38, "sample other processes and read kernel stacks"),
    Capability::new("CAP_SYS_PTRACE", 19, "read other processes' mappings"),
];
/// What names need.
const HELPFUL: [Capability; 3] = [
    Capability::new("CAP_SYSLOG", 34, "name kernel frames"),
    Capability::new("CAP_CHECKPOINT_RESTORE", 40, "read files that were deleted while they run"),
    Capability::new("CAP_DAC_READ_SEARCH", 2, "read files that only their owners may read"),
];
/// Linux counted maps as locked memory before 5.11, and its limit has to be lifted.
const SYS_RESOURCE: Capability = Capability::new("CAP_SYS_RESOURCE", 24, "lift the limit of locked memory");
const MAPS_ARE_LOCKED_MEMORY_BEFORE: (u32, u32) = (5, 11);
/// What the first two, and the one about deleted files, were split off.
const SYS_ADMIN: Capability = Capability::new("CAP_SYS_ADMIN", 21, "stand in for what was split off it");
/// A recording is written where its user wants it, and file and folder may be somebody else's.
const WRITE: [Capability; 2] = [
    Capability::new("CAP_DAC_OVERRIDE", 1, "write the recording into a folder of another user"),
    Capability::new("CAP_FOWNER", 3, "replace a recording of another user in /tmp"),
];
/// The command of a recording may run as another user.
const KILL: Capability = Capability::new("CAP_KILL", 5, "end the recorded command");
/// Lets a process give up what programs could get back.
const SETPCAP: u32 = 8;

/// Who gives privileges up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The daemon: what it has in memory is of the whole machine, so there are no core dumps of it either.
    Daemon,
    /// A recording.
    Recording {
        /// Whether it has started a command, which it may have to end.
        of_command: bool,
    },
}

/// A set of capabilities, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    fn holds(self, capability: Capability) -> bool {
        self.0 >> capability.number & 1 == 1
    }

    fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl FromIterator<Capability> for Capabilities {
    fn from_iter<I: IntoIterator<Item = Capability>>(capabilities: I) -> Self {
        Self(capabilities.into_iter().fold(0, |bits, capability| bits | 1 << capability.number))
    }
}

/// Those that profiling has a use for, by name; of others their number.
impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let special = [SYS_RESOURCE, SYS_ADMIN, KILL];
        let known: Vec<Capability> = NEEDED.into_iter().chain(HELPFUL).chain(WRITE).chain(special).collect();
        let mut names: Vec<&str> = Vec::new();
        names.extend(known.iter().filter(|&&capability| self.holds(capability)).map(|capability| capability.name));
        let others = self.0 & !known.iter().copied().collect::<Self>().0;
        let more = (others != 0).then(|| format!("{} more", others.count_ones()));
        names.extend(more.as_deref());
        f.write_str(&if names.is_empty() { "none".to_owned() } else { names.join(", ") })
    }
}

/// Capabilities that are needed and not held.
#[derive(Debug, PartialEq, Eq)]
pub struct MissingPrivileges(Vec<Capability>);

impl fmt::Display for MissingPrivileges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.0.iter().map(|capability| capability.name).collect();
        let purposes: Vec<&str> = self.0.iter().map(|capability| capability.purpose).collect();
        write!(
            f,
            "missing privileges: {} ({}); run as root, or grant these capabilities",
            names.join(", "),
            purposes.join("; ")
        )
    }
}

impl std::error::Error for MissingPrivileges {}

/// Checks this process's effective capabilities.
pub fn check() -> Result<(), MissingPrivileges> {
    missing(own_status().capabilities("CapEff:"))
}

fn missing(effective: Capabilities) -> Result<(), MissingPrivileges> {
    // Before Linux 5.8 split it up, and still, this one implies the first two.
    let stands_in = |capability: Capability| effective.holds(SYS_ADMIN) && capability.name != "CAP_SYS_PTRACE";
    let missing: Vec<_> =
        NEEDED.into_iter().filter(|&capability| !effective.holds(capability) && !stands_in(capability)).collect();
    if missing.is_empty() { Ok(()) } else { Err(MissingPrivileges(missing)) }
}

/// What `holder` would keep of what this process has.
pub fn kept(holder: Holder) -> Capabilities {
    let held = own_status().capabilities("CapPrm:");
    let without_admin = wanted(holder, held, kernel_version(), true);
    let is_enough = !held.holds(SYS_ADMIN) || is_enough_to_sample(held, without_admin);
    wanted(holder, held, kernel_version(), is_enough)
}

/// What there is a use for. `is_enough`: whether the kernel samples for who has only what was split off `CAP_SYS_ADMIN`.
fn wanted(holder: Holder, held: Capabilities, version: Option<(u32, u32)>, is_enough: bool) -> Capabilities {
    let mut wanted: Vec<Capability> = NEEDED.into_iter().chain(HELPFUL).collect();
    if version.is_none_or(|version| version < MAPS_ARE_LOCKED_MEMORY_BEFORE) {
        wanted.push(SYS_RESOURCE);
    }
    let split_off = [NEEDED[0], NEEDED[1], HELPFUL[1]];
    if !is_enough || split_off.iter().any(|&capability| !held.holds(capability)) {
        wanted.push(SYS_ADMIN);
    }
    if let Holder::Recording { of_command } = holder {
        wanted.extend(WRITE);
        wanted.extend(of_command.then_some(KILL));
    }
    held.and(wanted.into_iter().collect())
}

/// Whether the kernel opens a sampling event for who has no more than `capabilities`: where `kernel.perf_event_paranoid` is
/// above 3, Ubuntu's kernels ask for `CAP_SYS_ADMIN` whoever has `CAP_PERFMON` (aquasecurity/tracee, pull request 2033).
fn is_enough_to_sample(held: Capabilities, capabilities: Capabilities) -> bool {
    let permitted = Sets { effective: capabilities, permitted: held };
    if permitted.set().is_err() {
        return false;
    }
    let opened = open_sampling_event();
    // What is permitted can be made effective again; if not, less is.
    let restored = Sets { effective: held, permitted: held }.set();
    let is_refused = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    restored.is_ok() && !opened.is_err_and(|error| is_refused(&error))
}

/// Gives up what `holder` has no use for, so that it cannot be had again, by this process or what it starts. Says what is
/// left. The user stays who it is.
///
/// Call it while there is one thread.
pub fn give_up(holder: Holder) -> io::Result<Capabilities> {
    let status = own_status();
    if status.field("Threads:") != Some("1") {
        return Err(io::Error::other("privileges are given up before threads are started"));
    }
    let kept = kept(holder);
    // Each thread started from here on is like this one.
    // SAFETY: takes no pointers.
    unsafe { option(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong) }?;
    if status.capabilities("CapEff:").0 >> SETPCAP & 1 == 1 {
        // What no program can ever get: anything.
        for capability in 0..u64::BITS {
            // SAFETY: takes no pointers.
            match unsafe { option(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability)) } {
                Ok(_) => {}
                // There are no more capabilities.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                Err(error) => return Err(error),
            }
        }
        // SAFETY: takes no pointers.
        let set = unsafe { option(libc::PR_GET_SECUREBITS, 0) }?;
        // SAFETY: takes no pointers.
        unsafe { option(libc::PR_SET_SECUREBITS, libc::c_ulong::from(set.cast_unsigned()) | SECURE_BITS) }?;
    }
    Sets { effective: kept, permitted: kept }.set()?;
    // Who is in a container may lack CAP_SETPCAP; with this, no program gains anything.
    prctl::set_no_new_privs()?;
    if holder == Holder::Daemon {
        prctl::set_dumpable(false)?;
    }
    Ok(kept)
}

/// Being root means nothing when a program is started, changing users changes nothing, nothing becomes ambient, and none of
/// this can be undone: `SECBIT_NOROOT`, `SECBIT_NO_SETUID_FIXUP`, `SECBIT_NO_CAP_AMBIENT_RAISE`, and the locks of these and of
/// `SECBIT_KEEP_CAPS` (`include/uapi/linux/securebits.h`).
const SECURE_BITS: libc::c_ulong = 0b1110_1111;

/// Calls `prctl` with one argument that is no pointer.
///
/// # Safety
/// The option takes no pointer.
unsafe fn option(option: libc::c_int, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: as promised by the caller.
    let result = unsafe { libc::prctl(option, argument, NONE, NONE, NONE) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// What the calling thread may do; it hands nothing on.
struct Sets {
    effective: Capabilities,
    permitted: Capabilities,
}

impl Sets {
    fn set(&self) -> io::Result<()> {
        /// `struct __user_cap_header_struct`; version 3 has 64 bits.
        #[repr(C)]
        struct Header {
            version: u32,
            pid: libc::c_int,
        }
        /// `struct __user_cap_data_struct`, for 32 capabilities.
        #[repr(C)]
        struct Data {
            effective: u32,
            permitted: u32,
            inheritable: u32,
        }
        const VERSION_3: u32 = 0x2008_0522;
        let half = |shift: u32| Data {
            effective: (self.effective.0 >> shift) as u32,
            permitted: (self.permitted.0 >> shift) as u32,
            inheritable: 0,
        };
        let (mut header, data) = (Header { version: VERSION_3, pid: 0 }, [half(0), half(32)]);
        // SAFETY: header and data are live for the call, and as many as the version says.
        let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Opens, for a moment, an event like those that drive sampling, and does not start it.
fn open_sampling_event() -> io::Result<()> {
    let cpu = cpus::online()?.into_iter().next().unwrap_or_default();
    // SAFETY: all zeroes is a valid value of this plain struct.
    let mut attributes: perf_event_attr = unsafe { mem::zeroed() };
    attributes.type_ = PERF_TYPE_SOFTWARE as u32;
    attributes.size = size_of::<perf_event_attr>() as u32;
    attributes.config = PERF_COUNT_SW_CPU_CLOCK as u64;
    attributes.set_disabled(1);
    // SAFETY: the attributes are live for the call, and the kernel reads no more than the size they state.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attributes, -1, libc::c_long::from(cpu), -1, 0u64)
    };
    let descriptor = RawFd::try_from(descriptor).ok().filter(|&descriptor| descriptor >= 0);
    let Some(descriptor) = descriptor else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has just made this descriptor for us; it is closed at once.
    drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
    Ok(())
}

/// `/proc/self/status`.
struct Status(String);

fn own_status() -> Status {
    Status(fs::read_to_string("/proc/self/status").unwrap_or_default())
}

impl Status {
    fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
    }

    /// A set of capabilities; nothing where it is not told.
    fn capabilities(&self, name: &str) -> Capabilities {
        Capabilities(self.field(name).and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(effective: u64, expect: &[&str]) {
        let status = Status(format!("Name:\tx\nCapEff:\t{effective:016x}\n"));
        let missing = match missing(status.capabilities("CapEff:")) {
            Ok(()) => Vec::new(),
            Err(MissingPrivileges(missing)) => missing.into_iter().map(|capability| capability.name).collect(),
        };
        assert_eq!(missing, expect);
    }

    /// Root has everything, SYS_ADMIN stands in for what was split off it, nobody has nothing.
    #[test]
    fn names_what_is_missing() {
        check(u64::MAX, &[]);
        check(1 << 39 | 1 << 38 | 1 << 19, &[]);
        check(1 << 21 | 1 << 19, &[]);
        check(1 << 39 | 1 << 19, &["CAP_PERFMON"]);
        check(0, &["CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"]);
    }

    fn check_kept(holder: Holder, held: u64, version: (u32, u32), is_enough: bool, expect: &str) {
        let kept = wanted(holder, Capabilities(held), Some(version), is_enough);
        assert_eq!(kept.to_string(), expect, "{holder:?} with {held:x} on {version:?}");
    }

    /// Of root's capabilities few are kept, and none that is not held; what stands in for others only where they are missing
    /// or the kernel wants it.
    #[test]
    fn keeps_what_has_a_use() {
        const ALL: u64 = (1 << 41) - 1;
        const USUAL: &str =
            "CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE, CAP_SYSLOG, CAP_CHECKPOINT_RESTORE, CAP_DAC_READ_SEARCH";
        let recording = |of_command| Holder::Recording { of_command };
        check_kept(Holder::Daemon, ALL, (6, 1), true, USUAL);
        check_kept(Holder::Daemon, ALL, (5, 10), true, &format!("{USUAL}, CAP_SYS_RESOURCE"));
        check_kept(Holder::Daemon, ALL, (6, 8), false, &format!("{USUAL}, CAP_SYS_ADMIN"));
        check_kept(recording(false), ALL, (6, 1), true, &format!("{USUAL}, CAP_DAC_OVERRIDE, CAP_FOWNER"));
        check_kept(recording(true), ALL, (6, 1), true, &format!("{USUAL}, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL"));
        check_kept(Holder::Daemon, 1 << 39 | 1 << 38 | 1 << 19, (6, 1), true, "CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE");
        check_kept(Holder::Daemon, 1 << 21 | 1 << 19 | 1, (6, 1), true, "CAP_SYS_PTRACE, CAP_SYS_ADMIN");
        check_kept(Holder::Daemon, 0, (6, 1), true, "none");
        assert_eq!(Capabilities(1 << 39 | 0b1_0001).to_string(), "CAP_BPF, 2 more");
    }
}

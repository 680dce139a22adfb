//! What a container uses, as the files of its cgroup say: of both versions of cgroups, and of machines that have both.
//!
//! In: the path of a cgroup. Out: CPU time, throttling, memory and time in run queues so far, each of which may be missing for
//! a reason. Formats: `Documentation/admin-guide/cgroup-v1`, `cgroup-v2.rst`, `Documentation/accounting/psi.rst` and
//! `Documentation/scheduler/sched-stats.rst` of Linux.

use std::{
    fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{cgroup_mount::mount_of, regular_file};

/// Most bytes of a file: `memory.stat`, the longest, has some two thousand.
const MAX_BYTES: u64 = 16 << 10;
/// Most bytes of a list of threads.
const MAX_LIST_BYTES: u64 = 64 << 10;
/// Most threads of a container that are asked how long they have been waiting: 2 ms of reading.
const MAX_THREADS: usize = 512;

/// Something that a container uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// CPU time.
    Cpu,
    /// How often its quota of CPU time was used up.
    Throttling,
    /// Memory.
    Memory,
    /// Time that threads waited for a CPU.
    RunQueue,
}

impl Resource {
    /// Every resource.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Throttling, Self::Memory, Self::RunQueue];
}

/// Why something is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Nobody asked.
    NotAsked,
    /// No hierarchy that we can see has the controller.
    NoHierarchy,
    /// The cgroup has no such file: it is gone, or the controller is off for it.
    NoFile,
    /// The file cannot be read.
    Unreadable,
    /// The file says something else than expected.
    NotUnderstood,
}

impl Missing {
    /// Every reason.
    pub const ALL: [Self; 5] = [Self::NotAsked, Self::NoHierarchy, Self::NoFile, Self::Unreadable, Self::NotUnderstood];

    /// The reason in words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::NotAsked => "not asked",
            Self::NoHierarchy => "no hierarchy",
            Self::NoFile => "no file",
            Self::Unreadable => "unreadable",
            Self::NotUnderstood => "not understood",
        }
    }
}

impl From<io::Error> for Missing {
    fn from(error: io::Error) -> Self {
        // A cgroup that is removed while one of its files is read.
        let is_gone = error.raw_os_error() == Some(nix::libc::ENODEV);
        match error.kind() {
            io::ErrorKind::NotFound => Self::NoFile,
            _ if is_gone => Self::NoFile,
            io::ErrorKind::InvalidData => Self::NotUnderstood,
            _ => Self::Unreadable,
        }
    }
}

/// What a container has used since its cgroup was made, and what it has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// CPU time.
    pub cpu: Result<Duration, Missing>,
    /// How often its quota was used up.
    pub throttling: Result<Throttling, Missing>,
    /// Bytes of memory that cannot be reclaimed easily: all but file pages that were not used lately, as `kubectl top` has it.
    pub memory: Result<u64, Missing>,
    /// Second version: time in which some thread waited for a CPU. First version, and where the kernel does not tell (it was
    /// started with `psi=0`): what all threads together waited, of those that are still there and in no cgroup below.
    pub run_queue_delay: Result<Duration, Missing>,
}

impl Usage {
    /// What is known of a container that nobody asked about.
    pub const UNKNOWN: Self = Self {
        cpu: Err(Missing::NotAsked),
        throttling: Err(Missing::NotAsked),
        memory: Err(Missing::NotAsked),
        run_queue_delay: Err(Missing::NotAsked),
    };

    /// Whether `earlier` can be of the same cgroup: what only grows has not become less.
    pub fn continues(&self, earlier: &Self) -> bool {
        fn has_grown<T: PartialOrd>(from: Result<T, Missing>, to: Result<T, Missing>) -> bool {
            from.ok().zip(to.ok()).is_none_or(|(from, to)| from <= to)
        }
        has_grown(earlier.cpu, self.cpu)
            && has_grown(earlier.throttling.map(|past| past.periods), self.throttling.map(|now| now.periods))
            && has_grown(earlier.throttling.map(|past| past.throttled), self.throttling.map(|now| now.throttled))
    }
}

/// What became of a quota of CPU time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttling {
    /// Periods of the quota in which something ran.
    pub periods: u64,
    /// Periods in which it was used up.
    pub throttled: u64,
    /// How long threads had to stop for it, all CPUs together.
    pub time: Duration,
}

/// Where the cgroups of a controller are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Hierarchy {
    First(PathBuf),
    Second(PathBuf),
}

/// Where files of cgroups are on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    cpu: Option<Hierarchy>,
    cpuacct: Option<Hierarchy>,
    memory: Option<Hierarchy>,
}

impl Hierarchies {
    /// Those that are mounted. A controller belongs to the first version where that has it, whatever else is mounted.
    pub fn of_machine() -> Self {
        Self::find(mount_of)
    }

    fn find(mount_of: impl Fn(Option<&str>) -> Option<PathBuf>) -> Self {
        let of = |controller| {
            let first = mount_of(Some(controller)).map(Hierarchy::First);
            first.or_else(|| mount_of(None).map(Hierarchy::Second))
        };
        Self { cpu: of("cpu"), cpuacct: of("cpuacct"), memory: of("memory") }
    }

    /// What a cgroup uses of these resources. Its path is the same in all hierarchies.
    pub fn usage(&self, path: &str, resources: &[Resource]) -> Usage {
        let mut usage = Usage::UNKNOWN;
        for resource in resources {
            match resource {
                Resource::Cpu => usage.cpu = cpu_time(self.cpuacct.as_ref(), path),
                Resource::Throttling => usage.throttling = throttling(self.cpu.as_ref(), path),
                Resource::Memory => usage.memory = memory(self.memory.as_ref(), path),
                Resource::RunQueue => usage.run_queue_delay = run_queue_delay(self.cpu.as_ref(), path),
            }
        }
        usage
    }
}

impl Hierarchy {
    /// The folder of a cgroup, and whether it is of the first version. Paths are up to who runs in a container.
    fn folder(this: Option<&Self>, path: &str) -> Result<(PathBuf, bool), Missing> {
        let (mount, is_first) = match this.ok_or(Missing::NoHierarchy)? {
            Self::First(mount) => (mount, true),
            Self::Second(mount) => (mount, false),
        };
        if path.split('/').any(|component| component == "..") {
            return Err(Missing::NoFile);
        }
        Ok((mount.join(path.trim_start_matches('/')), is_first))
    }
}

fn cpu_time(hierarchy: Option<&Hierarchy>, path: &str) -> Result<Duration, Missing> {
    let (folder, is_first) = Hierarchy::folder(hierarchy, path)?;
    if is_first {
        let text = read(&folder.join("cpuacct.usage"))?;
        text.trim().parse().map(Duration::from_nanos).map_err(|_| Missing::NotUnderstood)
    } else {
        field(&read(&folder.join("cpu.stat"))?, "usage_usec").map(Duration::from_micros)
    }
}

fn throttling(hierarchy: Option<&Hierarchy>, path: &str) -> Result<Throttling, Missing> {
    let (folder, is_first) = Hierarchy::folder(hierarchy, path)?;
    parse_throttling(&read(&folder.join("cpu.stat"))?, is_first)
}

fn memory(hierarchy: Option<&Hierarchy>, path: &str) -> Result<u64, Missing> {
    let (folder, is_first) = Hierarchy::folder(hierarchy, path)?;
    // (Those that begin with `total` are of the cgroups below, too.)
    let (all, inactive) =
        if is_first { ("memory.usage_in_bytes", "total_inactive_file") } else { ("memory.current", "inactive_file") };
    let all: u64 = read(&folder.join(all))?.trim().parse().map_err(|_| Missing::NotUnderstood)?;
    Ok(all.saturating_sub(field(&read(&folder.join("memory.stat"))?, inactive)?))
}

fn run_queue_delay(hierarchy: Option<&Hierarchy>, path: &str) -> Result<Duration, Missing> {
    let (folder, is_first) = Hierarchy::folder(hierarchy, path)?;
    if is_first {
        return delay_of_threads(&folder.join("tasks"));
    }
    match read(&folder.join("cpu.pressure")) {
        Ok(text) => parse_pressure(&text),
        Err(_) => delay_of_threads(&folder.join("cgroup.threads")),
    }
}

/// What the threads of a list have waited for a CPU. Those that end take what they waited along.
fn delay_of_threads(list: &Path) -> Result<Duration, Missing> {
    let list = read_at_most(list, MAX_LIST_BYTES)?;
    let mut delay = Duration::ZERO;
    for thread in parse_threads(&list).take(MAX_THREADS) {
        // A thread that has ended is none.
        let text = fs::File::open(format!("/proc/{thread}/schedstat")).and_then(|file| text_of(file, MAX_BYTES));
        delay = delay.saturating_add(text.ok().and_then(|text| parse_schedstat(&text)).unwrap_or_default());
    }
    Ok(delay)
}

fn read(path: &Path) -> Result<String, Missing> {
    read_at_most(path, MAX_BYTES)
}

fn read_at_most(path: &Path, bytes: u64) -> Result<String, Missing> {
    Ok(text_of(regular_file::open(path)?, bytes)?)
}

fn text_of(file: fs::File, bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    file.take(bytes).read_to_string(&mut text)?;
    Ok(text)
}

/// The number of a line `name number`.
pub(super) fn field(text: &str, name: &str) -> Result<u64, Missing> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    // The kernel leaves out what a controller would say that is off.
    line.ok_or(Missing::NoFile)?.trim().parse().map_err(|_| Missing::NotUnderstood)
}

/// `cpu.stat`: the versions differ in the unit of time.
pub(super) fn parse_throttling(text: &str, is_first: bool) -> Result<Throttling, Missing> {
    let time = if is_first {
        Duration::from_nanos(field(text, "throttled_time")?)
    } else {
        Duration::from_micros(field(text, "throttled_usec")?)
    };
    Ok(Throttling { periods: field(text, "nr_periods")?, throttled: field(text, "nr_throttled")?, time })
}

/// `cpu.pressure`: `some avg10=0.00 avg60=0.00 avg300=0.00 total=MICROSECONDS`.
pub(super) fn parse_pressure(text: &str) -> Result<Duration, Missing> {
    let some = text.lines().find_map(|line| line.strip_prefix("some ")).ok_or(Missing::NotUnderstood)?;
    let total = some.split(' ').find_map(|field| field.strip_prefix("total=")).ok_or(Missing::NotUnderstood)?;
    total.parse().map(Duration::from_micros).map_err(|_| Missing::NotUnderstood)
}

/// Threads of a list. Those of other PID namespaces are 0.
pub(super) fn parse_threads(text: &str) -> impl Iterator<Item = u32> {
    text.lines().filter_map(|line| line.parse().ok()).filter(|&thread| thread != 0)
}

/// `/proc/TID/schedstat`: nanoseconds on a CPU, nanoseconds of waiting for one, and how often.
pub(super) fn parse_schedstat(text: &str) -> Option<Duration> {
    text.split_ascii_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const PATH: &str = "/kubepods/pod1/c1";

    /// A machine of folders: `files` are those of the cgroup in each mount.
    fn machine(name: &str, mounts: &[(&str, &[(&str, &str)])]) -> (PathBuf, Hierarchies) {
        let root = std::env::temp_dir().join(format!("usage-{name}-{}", std::process::id()));
        for (mount, files) in mounts {
            let folder = root.join(mount).join(PATH.trim_start_matches('/'));
            fs::create_dir_all(&folder).expect("a folder");
            for (file, text) in *files {
                fs::write(folder.join(file), text).expect("a file");
            }
        }
        let hierarchies = Hierarchies::find(|controller| {
            let mount = root.join(controller.unwrap_or("unified"));
            mount.is_dir().then_some(mount)
        });
        (root, hierarchies)
    }

    /// The second version has everything in one folder.
    #[test]
    fn reads_the_second_version() {
        let files = [
            (
                "cpu.stat",
                "usage_usec 2500000\nuser_usec 1\nnr_periods 70\nnr_throttled 7\nthrottled_usec 900\nnr_bursts 0\n",
            ),
            ("memory.current", "104857600\n"),
            ("memory.stat", "anon 1\ninactive_anon 9\ninactive_file 4857600\nactive_file 5\n"),
            ("cpu.pressure", "some avg10=1.53 avg60=0.87 avg300=0.20 total=1834567\nfull avg10=0.00 total=0\n"),
        ];
        let (root, machine) = machine("second", &[("unified", &files)]);
        let expected = Usage {
            cpu: Ok(Duration::from_millis(2500)),
            throttling: Ok(Throttling { periods: 70, throttled: 7, time: Duration::from_micros(900) }),
            memory: Ok(100_000_000),
            run_queue_delay: Ok(Duration::from_micros(1_834_567)),
        };
        assert_eq!(machine.usage(PATH, &Resource::ALL), expected);
        // Nothing is read that nobody asks for.
        let memory = machine.usage(PATH, &[Resource::Memory]);
        assert_eq!(memory, Usage { memory: Ok(100_000_000), ..Usage::UNKNOWN });
        // What the machine does not have is missing for a reason.
        let gone = machine.usage("/kubepods/pod1/c2", &Resource::ALL);
        assert_eq!((gone.cpu, gone.memory), (Err(Missing::NoFile), Err(Missing::NoFile)));
        assert_eq!(gone.run_queue_delay, Err(Missing::NoFile));
        assert_eq!(machine.usage("/kubepods/pod1/c1/../c1", &Resource::ALL).cpu, Err(Missing::NoFile));
        fs::remove_dir_all(&root).expect("no folder");
        assert_eq!(Hierarchies::default().usage(PATH, &Resource::ALL).cpu, Err(Missing::NoHierarchy));
    }

    /// The first version has a folder for each controller, other names and other units; threads tell what they waited.
    #[test]
    fn reads_the_first_version() {
        let own = format!("{}\n0\n4294967295\n", nix::unistd::gettid());
        let (root, machine) = machine(
            "first",
            &[
                ("cpuacct", &[("cpuacct.usage", "2500000000\n")]),
                ("cpu", &[("cpu.stat", "nr_periods 70\nnr_throttled 7\nthrottled_time 900000\n"), ("tasks", &own)]),
                (
                    "memory",
                    &[
                        ("memory.usage_in_bytes", "104857600\n"),
                        ("memory.stat", "cache 7\ninactive_file 3\ntotal_inactive_file 4857600\n"),
                    ],
                ),
                // Machines of the first version have the second one beside it.
                ("unified", &[("cpu.stat", "usage_usec 1\n"), ("cpu.pressure", "some total=1\n")]),
            ],
        );
        let usage = machine.usage(PATH, &Resource::ALL);
        assert_eq!(usage.cpu, Ok(Duration::from_millis(2500)));
        assert_eq!(usage.throttling, Ok(Throttling { periods: 70, throttled: 7, time: Duration::from_micros(900) }));
        assert_eq!(usage.memory, Ok(100_000_000));
        assert!(usage.run_queue_delay.is_ok_and(|delay| delay != Duration::from_micros(1)));
        fs::remove_dir_all(&root).expect("no folder");
    }

    /// A kernel that does not tell pressure leaves the threads to be asked; a machine may have controllers of both versions.
    #[test]
    fn fills_gaps() {
        let files = [("cpu.stat", "usage_usec 5\nuser_usec 5\nsystem_usec 0\n"), ("cgroup.threads", "1\n")];
        let (root, machine) = machine("gaps", &[("unified", &files), ("memory", &[("memory.stat", "cache 7\n")])]);
        let usage = machine.usage(PATH, &Resource::ALL);
        assert_eq!(usage.cpu, Ok(Duration::from_micros(5)));
        assert_eq!((usage.throttling, usage.memory), (Err(Missing::NoFile), Err(Missing::NoFile)));
        assert!(usage.run_queue_delay.is_ok());
        fs::remove_dir_all(&root).expect("no folder");
    }

    /// Whatever files hold is a value or a reason; what is no file is not opened.
    #[test]
    fn files_may_hold_anything() {
        let huge = "x".repeat(1 << 20);
        for text in ["", "\n", "-1", "usage_usec -1\n", "usage_usec 99999999999999999999999\n", "usage_usec\n", &huge] {
            let files = [("cpu.stat", text), ("memory.current", text), ("memory.stat", text), ("cpu.pressure", text)];
            let (root, machine) = machine("anything", &[("unified", &files)]);
            let usage = machine.usage(PATH, &Resource::ALL);
            assert!(usage.cpu.is_err() && usage.throttling.is_err() && usage.memory.is_err(), "{usage:?}");
            assert_eq!(usage.run_queue_delay, Err(Missing::NotUnderstood));
            fs::remove_dir_all(&root).expect("no folder");
        }
        let (root, machine) = machine("pipe", &[("unified", &[])]);
        let pipe = root.join("unified").join(PATH.trim_start_matches('/')).join("cpu.stat");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        assert_eq!(machine.usage(PATH, &[Resource::Cpu]).cpu, Err(Missing::Unreadable));
        fs::remove_dir_all(&root).expect("no folder");
    }

    /// The cgroup of this test: who uses CPU time has used it, and who takes memory has it.
    #[test]
    fn reads_its_own_cgroup() {
        let is_of = |line: &str, wanted: &str| {
            line.split(':').nth(1).is_some_and(|controllers| controllers.split(',').any(|one| one == wanted))
        };
        let own = fs::read_to_string("/proc/self/cgroup").expect("our own cgroups");
        let path_of = |controller: &str| {
            let of_first = own.lines().find(|line| is_of(line, controller));
            let line = of_first.or_else(|| own.lines().find(|line| line.starts_with("0::")));
            line.and_then(|line| line.splitn(3, ':').nth(2)).unwrap_or("/").to_owned()
        };
        let machine = Hierarchies::of_machine();
        let read = || {
            let cpu = machine.usage(&path_of("cpuacct"), &[Resource::Cpu]).cpu;
            let of_cpu = machine.usage(&path_of("cpu"), &[Resource::Throttling, Resource::RunQueue]);
            Usage { cpu, memory: machine.usage(&path_of("memory"), &[Resource::Memory]).memory, ..of_cpu }
        };
        let before = read();
        println!("{machine:?}\n{before:?}");
        let Ok(cpu_before) = before.cpu else {
            eprintln!("NOT RUN: this process's own cgroup cannot be seen here: {before:?}");
            return;
        };
        let start = Instant::now();
        let (mut taken, burn) = (vec![0_u8; 64 << 20], Duration::from_millis(200));
        taken.iter_mut().step_by(4096).for_each(|page| *page = 1);
        while start.elapsed() < burn {
            std::hint::black_box(&mut taken);
        }
        let after = read();
        println!("{after:?}");
        assert!(after.continues(&before));
        assert!(after.cpu.expect("it was there") > cpu_before);
        // (The root of the second version has no files of memory.)
        assert!(matches!(after.memory, Ok(1..) | Err(Missing::NoFile)), "{after:?}");
        assert!(after.run_queue_delay.is_ok(), "{after:?}");
    }
}

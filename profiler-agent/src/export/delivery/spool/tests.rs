//! Spools with real files, on real disks, of processes that are really killed.

use std::{
    collections::{VecDeque, hash_map::RandomState},
    env, fs,
    hash::{BuildHasher as _, Hasher as _},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, UNIX_EPOCH},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;

/// What tells a process of this test that it is the one to be killed, and which request comes next.
const VICTIM: &str = "SPOOL_VICTIM";
/// What tells a process of this test where its small disk is.
const SMALL_DISK: &str = "SPOOL_SMALL_DISK";
const HOUR: Duration = Duration::from_secs(3600);
const WIDE: Limits = Limits { bytes: 1 << 30, age: None };

/// A folder of a test's own, removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(test: &str) -> Self {
        let folder = env::temp_dir().join(format!("spool-{}-{test}", std::process::id()));
        // It may not exist yet.
        let _ = fs::remove_dir_all(&folder);
        Self(folder)
    }

    fn open(&self, limits: Limits) -> Spool {
        Spool::open(&self.0, limits, noon()).expect("a spool")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("the folder");
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"));
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn noon() -> SystemTime {
    UNIX_EPOCH + Duration::new(1_763_726_400, 123_456_789)
}

/// Any number.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A request that is told from others by its number, whose body is so long and cannot be compressed.
fn request_of(number: u64, len: usize) -> Request {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let body: Vec<u8> = number.to_le_bytes().into_iter().chain(std::iter::repeat_with(next)).take(len.max(8)).collect();
    Request {
        body: body.into(),
        tally: Tally { samples: number + 1, off_cpu_ns: 1000 * number },
        profiles: 1 + number as u32 % 3,
        closed: noon() + Duration::from_secs(number),
    }
}

fn request(number: u64) -> Request {
    request_of(number, 100)
}

/// The number of a whole request.
fn number_of(request: &Request) -> u64 {
    let number = u64::from_le_bytes(request.body[..8].try_into().expect("eight bytes"));
    assert_eq!(request, &request_of(number, request.body.len()), "request {number} is not what was pushed");
    number
}

fn push(spool: &mut Spool, requests: impl IntoIterator<Item = u64>) {
    for number in requests {
        spool.push(&request(number), noon()).expect("it is stored");
    }
}

/// Everything in it, oldest first, removed as it comes.
fn drain(spool: &mut Spool, now: SystemTime) -> Vec<u64> {
    let mut numbers = Vec::new();
    while let Some(stored) = spool.front(now).expect("it can be read") {
        numbers.push(number_of(&stored.request));
        assert!(spool.pop(stored.number));
        assert!(!spool.pop(stored.number));
    }
    numbers
}

fn dropped(reason: DropReason, numbers: &[u64]) -> Dropped {
    let tally = numbers.iter().map(|&number| request(number).tally).sum();
    Dropped { reason, requests: numbers.len() as u64, tally }
}

/// Requests come out as they went in, whole, before and after a restart; nothing but them is in the folder.
#[test]
fn keeps_order_and_what_requests_are() {
    let scratch = Scratch::new("order");
    let mut spool = scratch.open(WIDE);
    assert_eq!((spool.len(), spool.bytes(), spool.oldest()), (0, 0, None));
    push(&mut spool, 0..5);
    assert_eq!(spool.tally(), (0..5).map(|number| request(number).tally).sum());
    let first = spool.front(noon()).expect("it can be read").expect("there is one");
    assert_eq!(first.request, request(0));
    assert!(spool.pop(first.number));
    let bytes = spool.bytes();
    drop(spool);

    let mut spool = scratch.open(WIDE);
    assert_eq!((spool.len(), spool.bytes(), spool.oldest()), (4, bytes, Some(request(1).closed)));
    assert_eq!(spool.tally(), (1..5).map(|number| request(number).tally).sum());
    push(&mut spool, 5..7);
    assert_eq!(names(&scratch.0).len(), 6);
    assert_eq!(drain(&mut spool, noon()), [1, 2, 3, 4, 5, 6]);
    assert_eq!((spool.len(), spool.bytes(), spool.tally()), (0, 0, Tally::default()));
    assert_eq!(names(&scratch.0), [""; 0]);
    assert_eq!(spool.take_dropped(), []);
}

/// Requests of every length come back, compressible ones take less, and what is too long is refused.
#[test]
fn keeps_any_length() {
    let scratch = Scratch::new("length");
    let mut spool = scratch.open(WIDE);
    for len in [0, 1, 100, 70_000, 4 << 20] {
        let zeroes = Request { body: vec![0; len].into(), ..request(1) };
        spool.push(&zeroes, noon()).expect("it is stored");
        assert!(spool.bytes() < 128 << 10, "{len} zeroes take {}", spool.bytes());
        let stored = spool.front(noon()).expect("it can be read").expect("there is one");
        assert_eq!(stored.request, zeroes);
        spool.pop(stored.number);
        spool.push(&request_of(2, len), noon()).expect("it is stored");
        assert_eq!(drain(&mut spool, noon()), [2]);
    }
    let long = Request { body: vec![0; MAX_BODY + 1].into(), ..request(1) };
    assert!(matches!(spool.push(&long, noon()), Err(SpoolError::TooLong(_))));
    drop(spool);
    let mut spool = scratch.open(Limits { bytes: 64 << 10, ..WIDE });
    push(&mut spool, [1]);
    let error = spool.push(&request_of(2, 64 << 10), noon()).expect_err("it does not fit");
    assert!(error.to_string().contains("do not fit into the 65536 that"), "{error}");
    // Nothing was removed for what cannot fit.
    assert_eq!(drain(&mut spool, noon()), [1]);
}

/// The oldest make room, are counted, and one that was being delivered is not mistaken for its successor.
#[test]
fn drops_the_oldest_for_space() {
    let scratch = Scratch::new("space");
    let mut spool = scratch.open(WIDE);
    push(&mut spool, [0]);
    let each = spool.bytes();
    assert!(each >= 4096, "a file takes a block, not {each} bytes");
    drop(spool);
    let limits = Limits { bytes: 3 * each, ..WIDE };
    let mut spool = scratch.open(limits);
    push(&mut spool, [1, 2]);
    let delivering = spool.front(noon()).expect("it can be read").expect("there is one");
    push(&mut spool, [3, 4]);
    assert_eq!((spool.len(), spool.bytes()), (3, 3 * each));
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Space, &[0, 1])]);
    assert!(!spool.pop(delivering.number));
    assert_eq!(spool.len(), 3);
    drop(spool);
    let mut spool = scratch.open(Limits { bytes: 2 * each, ..WIDE });
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Space, &[2])]);
    assert_eq!(drain(&mut spool, noon()), [3, 4]);
}

/// What is too old is dropped, at start and later; a clock that was set back makes nothing old.
#[test]
fn drops_what_is_too_old() {
    let scratch = Scratch::new("age");
    let limits = Limits { age: Some(HOUR), ..WIDE };
    let mut spool = scratch.open(limits);
    push(&mut spool, 0..6);
    let hour_after = |number| request(number).closed + HOUR;
    let front = spool.front(hour_after(1)).expect("it can be read").expect("there is one");
    assert_eq!(number_of(&front.request), 1);
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Age, &[0])]);
    spool.push(&request(6), hour_after(2)).expect("it is stored");
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Age, &[1])]);
    drop(spool);
    let mut spool = Spool::open(&scratch.0, limits, hour_after(4)).expect("a spool");
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Age, &[2, 3])]);
    assert_eq!(spool.len(), 3);
    // Years before the requests were made, and before time began.
    push(&mut spool, [7]);
    let ancient = Request { closed: UNIX_EPOCH - HOUR, ..request(8) };
    spool.push(&ancient, UNIX_EPOCH - HOUR).expect("it is stored");
    assert_eq!((spool.len(), spool.take_dropped()), (5, vec![]));
    drop(spool);
    let mut spool = Spool::open(&scratch.0, limits, UNIX_EPOCH).expect("a spool");
    assert!(spool.front(UNIX_EPOCH).expect("it can be read").is_some());
    assert_eq!((spool.len(), spool.take_dropped()), (5, vec![]));
}

/// Any byte that is changed, missing or too much is noticed, at start or later, and the next request is found.
#[test]
fn drops_what_is_damaged() {
    let scratch = Scratch::new("damage");
    let mut spool = scratch.open(WIDE);
    push(&mut spool, [0, 1]);
    drop(spool);
    let paths: Vec<PathBuf> = names(&scratch.0).iter().map(|name| scratch.0.join(name)).collect();
    let whole = fs::read(&paths[0]).expect("a file");
    let second = fs::read(&paths[1]).expect("a file");
    let check = |damaged: &[u8], is_open: bool, knows: bool| {
        fs::write(&paths[0], if is_open { &whole } else { damaged }).expect("a file");
        fs::write(&paths[1], &second).expect("a file");
        let mut spool = scratch.open(WIDE);
        if is_open {
            fs::write(&paths[0], damaged).expect("a file");
        }
        let front = spool.front(noon()).expect("it can be read").expect("there is one");
        assert_eq!(number_of(&front.request), 1);
        let tally = if knows { request(0).tally } else { Tally::default() };
        assert_eq!(spool.take_dropped(), [Dropped { reason: DropReason::Damaged, requests: 1, tally }]);
        assert!(!paths[0].exists());
        assert_eq!(spool.len(), 1);
    };
    for place in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[place] ^= 1 << (place % 8);
        // Where the header is whole, it is known how much was lost; an agent that pushed it knows anyway.
        check(&damaged, false, place >= HEADER);
        check(&damaged, true, true);
        check(&whole[..place], false, place >= HEADER);
        check(&whole[..place], true, true);
    }
    check(&[&whole[..], b"x"].concat(), false, true);
    check(&[&whole[..], b"x"].concat(), true, true);
    println!("{} bytes changed and {} cut off, at start and later", whole.len(), whole.len());

    // Something else in its place, and nothing.
    let elsewhere = scratch.0.join("elsewhere");
    for replace in [|_: &Path, _: &Path| {}, |path: &Path, to: &Path| symlink(to, path).expect("a link")] {
        fs::write(&paths[0], &whole).expect("a file");
        fs::write(&elsewhere, &whole).expect("a file");
        let mut spool = scratch.open(WIDE);
        fs::remove_file(&paths[0]).expect("a file");
        replace(&paths[0], &elsewhere);
        assert_eq!(drain(&mut spool, noon()), [1]);
        assert_eq!(spool.take_dropped(), [dropped(DropReason::Damaged, &[0])]);
        assert_eq!(names(&scratch.0), ["elsewhere"]);
        fs::write(&paths[1], &second).expect("a file");
    }
}

/// What a killed agent was writing is removed; what was never of a spool stays.
#[test]
fn removes_leftovers_only() {
    let scratch = Scratch::new("leftovers");
    let mut spool = scratch.open(WIDE);
    push(&mut spool, [0]);
    drop(spool);
    let foreign = ["0.request", "00000000000000000009.request.old", "99999999999999999999.request", "note"];
    for name in foreign.into_iter().chain([".incoming"]) {
        fs::write(scratch.0.join(name), b"half").expect("a file");
    }
    let mut spool = scratch.open(WIDE);
    assert_eq!(spool.len(), 1);
    push(&mut spool, [1]);
    assert_eq!(drain(&mut spool, noon()), [0, 1]);
    assert_eq!(spool.take_dropped(), []);
    assert_eq!(names(&scratch.0), foreign.map(str::to_owned));
}

/// A second agent is told, and gets in when the first is gone; a folder that others may write to is refused.
#[test]
fn is_one_agents() {
    let scratch = Scratch::new("two");
    let spool = scratch.open(WIDE);
    let mode = fs::metadata(&scratch.0).expect("the folder").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let error = Spool::open(&scratch.0, WIDE, noon()).expect_err("it is in use");
    assert!(error.to_string().ends_with("is in use by another agent"), "{error}");
    drop(spool);
    scratch.open(WIDE);
    fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o770)).expect("the folder is ours");
    let error = Spool::open(&scratch.0, WIDE, noon()).expect_err("others may write");
    assert!(error.to_string().contains("may be written by others"), "{error}");
    let error = Spool::open(Path::new("/proc/nothing"), WIDE, noon()).expect_err("no place for folders");
    assert!(error.to_string().starts_with("/proc/nothing: "), "{error}");
}

/// Starts another process of this test.
fn again(test: &str, wrapper: &[&str]) -> Command {
    let (_, module) = module_path!().split_once("::").expect("a module");
    let own = env::current_exe().expect("this program");
    let mut words = wrapper.iter().map(std::ffi::OsStr::new).chain([own.as_os_str()]);
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).args(["--exact", &format!("{module}::{test}"), "--nocapture"]);
    command
}

/// A disk that is full, and one that has become read-only: nothing half-written stays, what is stored comes out, and
/// when there is room again more goes in.
#[test]
fn survives_disks_without_room() {
    if let Some(folder) = env::var_os(SMALL_DISK) {
        return use_small_disk(Path::new(&folder));
    }
    let scratch = Scratch::new("disk");
    fs::create_dir(&scratch.0).expect("a folder");
    let mount = "mount -t tmpfs -o size=256k none \"$SPOOL_SMALL_DISK\" || exit 77; exec \"$@\"";
    let mut command = again("survives_disks_without_room", &["unshare", "--mount", "sh", "-c", mount, "sh"]);
    match command.env(SMALL_DISK, &scratch.0).status() {
        Ok(status) if status.success() => {}
        Ok(status) if !matches!(status.code(), Some(1 | 77)) || nix::unistd::geteuid().is_root() => {
            panic!("on a small disk: {status}")
        }
        outcome => {
            let words = format!("SKIPPED: spools on a full disk: a file system cannot be mounted here ({outcome:?})\n");
            std::io::stderr().write_all(words.as_bytes()).expect("standard error");
        }
    }
}

fn use_small_disk(disk: &Path) {
    let remount = |how: &str| {
        let status = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(disk).status();
        assert!(status.expect("mount can be run").success());
    };
    let is = |outcome: Result<(), SpoolError>, kind: io::ErrorKind| {
        let Err(SpoolError::Folder(FolderError::Io { source, .. })) = outcome else { panic!("{outcome:?}") };
        assert_eq!(source.kind(), kind, "{source}");
    };
    let folder = disk.join("spool");
    let mut spool = Spool::open(&folder, WIDE, noon()).expect("a spool");
    let large = |number| request_of(number, 20_000);
    let mut stored = 0;
    let full = loop {
        match spool.push(&large(stored), noon()) {
            Ok(()) => stored += 1,
            Err(error) => break error,
        }
    };
    println!("a disk of 256 KiB took {stored} requests of 20,000 bytes, then: {full}");
    is(Err(full), io::ErrorKind::StorageFull);
    is(spool.push(&large(stored), noon()), io::ErrorKind::StorageFull);
    assert_eq!((names(&folder).len() as u64, spool.len() as u64), (stored, stored));

    // It comes out, and there is room again.
    let front = spool.front(noon()).expect("it can be read").expect("there is one");
    assert_eq!(front.request, large(0));
    assert!(spool.pop(front.number));
    spool.push(&large(stored), noon()).expect("there is room");

    remount("ro");
    is(spool.push(&large(99), noon()), io::ErrorKind::ReadOnlyFilesystem);
    let bytes = spool.bytes();
    let front = spool.front(noon()).expect("it can be read").expect("there is one");
    assert_eq!(number_of(&front.request), 1);
    assert!(spool.pop(front.number));
    let next = spool.front(noon()).expect("it can be read").expect("there is one");
    assert_eq!(number_of(&next.request), 2);
    assert_eq!((spool.len() as u64, spool.bytes()), (stored - 1, bytes));
    remount("rw");
    spool.push(&large(stored + 1), noon()).expect("there is room");
    assert_eq!((names(&folder).len() as u64, spool.len() as u64), (stored, stored));

    // Where nothing can be removed, nothing is dropped for what cannot be written either.
    drop(spool);
    let mut spool = Spool::open(&folder, Limits { bytes, ..WIDE }, noon()).expect("a spool");
    remount("ro");
    is(spool.push(&large(99), noon()), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!((spool.len() as u64, spool.take_dropped()), (stored, vec![]));

    // Neither where the process may open no more files.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).expect("it may be lowered");
    let front = spool.front(noon());
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("it may be raised");
    assert!(matches!(front, Err(SpoolError::Unreadable(_))), "{front:?}");
    remount("rw");
    assert_eq!(drain(&mut spool, noon()), (2..stored + 2).collect::<Vec<_>>());
    assert_eq!((names(&folder), spool.take_dropped()), (vec![], vec![]));
}

/// A process that pushes and pops, and says before and after each what it does, until it is killed.
#[test]
fn victim() {
    let Some(task) = env::var(VICTIM).ok() else { return };
    let (next, folder) = task.split_once(' ').expect("a number and a folder");
    let say = |words: String| std::io::stdout().write_all(format!("\n{words}\n").as_bytes()).expect("a pipe");
    let mut spool = Spool::open(Path::new(folder), WIDE, noon()).expect("a spool");
    say("opened 0".to_owned());
    for number in next.parse::<u64>().expect("a number").. {
        let request = request_of(number, (random() as usize % 200_000) >> (random() % 8));
        say(format!("pushing {number}"));
        spool.push(&request, noon()).expect("it is stored");
        say(format!("pushed {number}"));
        if random().is_multiple_of(2) || spool.len() > 20 {
            let front = spool.front(noon()).expect("it can be read").expect("there is one");
            let number = number_of(&front.request);
            say(format!("popping {number}"));
            assert!(spool.pop(front.number));
            say(format!("popped {number}"));
        }
    }
}

/// Whatever moment a process is killed at, every request that was pushed and not popped is there, whole, in order, once.
#[test]
fn loses_nothing_when_killed() {
    const KILLS: usize = 50;
    let scratch = Scratch::new("killed");
    let mut next = 0;
    let mut expected = VecDeque::new();
    let (mut pushes, mut pops, mut unfinished, mut within) = (0, 0, 0, [0; 4]);
    for round in 0..KILLS {
        let mut child = again("victim", &[])
            .env(VICTIM, format!("{next} {}", scratch.0.display()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be run");
        let mut said = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut lines = Vec::new();
        // Most are killed while they work; some while they start.
        while round % 5 != 0 && !lines.iter().any(|line: &String| line.starts_with("opened")) {
            let mut line = String::new();
            assert!(said.read_line(&mut line).expect("a pipe") > 0, "it ended: {lines:?}");
            lines.push(line.trim_end().to_owned());
        }
        thread::sleep(Duration::from_micros(random() % 100_000));
        child.kill().expect("it can be killed");
        let status = child.wait().expect("it ends");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{lines:?}");
        lines.extend(said.lines().map(|line| line.expect("a pipe")));

        let (mut pushing, mut popping) = (None, None);
        for (what, number) in lines.iter().filter_map(|line| line.split_once(' ')) {
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "pushing" => (pushing, next) = (Some(number), number + 1),
                "pushed" => {
                    (pushing, pushes) = (None, pushes + 1);
                    expected.push_back(number);
                }
                "popping" => popping = Some(number),
                "popped" => {
                    (popping, pops) = (None, pops + 1);
                    assert_eq!(expected.pop_front(), Some(number));
                }
                _ => {}
            }
        }
        unfinished += usize::from(scratch.0.join(".incoming").exists());
        let mut spool = scratch.open(WIDE);
        let stored = names(&scratch.0);
        let found: Vec<u64> = stored
            .iter()
            .map(|name| record::decode(&fs::read(scratch.0.join(name)).expect("a file")).expect("a whole request"))
            .map(|request| number_of(&request))
            .collect();
        assert_eq!((spool.len(), spool.take_dropped()), (found.len(), vec![]));
        // What it was just doing may have happened or not.
        if let Some(number) = pushing {
            let is_there = found.last() == Some(&number);
            expected.extend(is_there.then_some(number));
            within[usize::from(is_there)] += 1;
        }
        if let Some(number) = popping {
            let is_there = found.first() == Some(&number);
            if !is_there {
                assert_eq!(expected.pop_front(), Some(number));
            }
            within[2 + usize::from(is_there)] += 1;
        }
        assert_eq!(expected, found, "after kill {round}: {lines:?}");
        if round % 10 == 9 {
            assert_eq!(drain(&mut spool, noon()), found);
            expected.clear();
        }
    }
    println!(
        "{KILLS} kills: {pushes} requests pushed and {pops} popped; killed within a push {} times (whole {}, {unfinished} \
         left unfinished), within a pop {} times (removed {})",
        within[0] + within[1],
        within[1],
        within[2] + within[3],
        within[2],
    );
    assert!(pushes > 0 && pops > 0);
}

//! Spools of processes that are really killed, and on disks that are really full.

use std::{
    collections::{VecDeque, hash_map::RandomState},
    env,
    hash::{BuildHasher as _, Hasher as _},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::ExitStatusExt as _,
    process::{Command, Stdio},
    thread,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;

/// What tells a process of this test that it is the one to be killed, and which request comes next.
const VICTIM: &str = "SPOOL_VICTIM";
/// What tells a process of this test where its small disk is.
const SMALL_DISK: &str = "SPOOL_SMALL_DISK";

/// Any number.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
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
    let folder = Scratch(disk.join("spool"));
    let mut spool = Spool::open(&folder.0, WIDE, noon()).expect("a spool");
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
    assert_eq!((folder.names().len() as u64, spool.len() as u64), (stored, stored));

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
    assert_eq!((folder.names().len() as u64, spool.len() as u64), (stored, stored));

    // Where nothing can be removed, nothing is dropped for what cannot be written either.
    drop(spool);
    let mut spool = Spool::open(&folder.0, Limits { bytes, ..WIDE }, noon()).expect("a spool");
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
    assert_eq!((folder.names(), spool.take_dropped()), (vec![], vec![]));
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
        // Most are killed while they work, some while they start.
        let mut awaited = if round % 5 == 0 { 0 } else { 1 + random() % 24 };
        while awaited > 0 {
            let mut line = String::new();
            assert!(said.read_line(&mut line).expect("a pipe") > 0, "it ended: {lines:?}");
            awaited -= u64::from(["opened", "push", "pop"].iter().any(|word| line.starts_with(word)));
            lines.push(line.trim_end().to_owned());
        }
        thread::sleep(Duration::from_micros(random() % 10_000));
        child.kill().expect("it can be killed");
        let status = child.wait().expect("it ends");
        assert_eq!(status.signal(), Some(9), "{lines:?}");
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
        let mut spool = open(&scratch, WIDE);
        let stored = scratch.names();
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

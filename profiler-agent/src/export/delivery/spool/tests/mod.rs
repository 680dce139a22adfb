//! Spools with real files.

mod processes;

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
    time::{Duration, UNIX_EPOCH},
};

use super::*;
use crate::export::testing::Scratch;

const HOUR: Duration = Duration::from_secs(3600);
const WIDE: Limits = Limits { bytes: 1 << 30, age: None };

fn open(scratch: &Scratch, limits: Limits) -> Spool {
    Spool::open(&scratch.0, limits, noon()).expect("a spool")
}

fn noon() -> SystemTime {
    UNIX_EPOCH + Duration::new(1_763_726_400, 123_456_789)
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
    let mut spool = open(&scratch, WIDE);
    assert_eq!((spool.len(), spool.bytes(), spool.oldest()), (0, 0, None));
    push(&mut spool, 0..5);
    assert_eq!(spool.tally(), (0..5).map(|number| request(number).tally).sum());
    let first = spool.front(noon()).expect("it can be read").expect("there is one");
    assert_eq!(first.request, request(0));
    assert!(spool.pop(first.number));
    let bytes = spool.bytes();
    drop(spool);

    let mut spool = open(&scratch, WIDE);
    assert_eq!((spool.len(), spool.bytes(), spool.oldest()), (4, bytes, Some(request(1).closed)));
    assert_eq!(spool.tally(), (1..5).map(|number| request(number).tally).sum());
    push(&mut spool, 5..7);
    assert_eq!(scratch.names().len(), 6);
    assert_eq!(drain(&mut spool, noon()), [1, 2, 3, 4, 5, 6]);
    assert_eq!((spool.len(), spool.bytes(), spool.tally()), (0, 0, Tally::default()));
    assert_eq!(scratch.names(), [""; 0]);
    assert_eq!(spool.take_dropped(), []);
}

/// Requests of every length come back, compressible ones take less, and what is too long is refused.
#[test]
fn keeps_any_length() {
    let scratch = Scratch::new("length");
    let mut spool = open(&scratch, WIDE);
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
    let mut spool = open(&scratch, Limits { bytes: 64 << 10, ..WIDE });
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
    let mut spool = open(&scratch, WIDE);
    push(&mut spool, [0]);
    let each = spool.bytes();
    assert!(each >= 4096, "a file takes a block, not {each} bytes");
    drop(spool);
    let limits = Limits { bytes: 3 * each, ..WIDE };
    let mut spool = open(&scratch, limits);
    push(&mut spool, [1, 2]);
    let delivering = spool.front(noon()).expect("it can be read").expect("there is one");
    push(&mut spool, [3, 4]);
    assert_eq!((spool.len(), spool.bytes()), (3, 3 * each));
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Space, &[0, 1])]);
    assert!(!spool.pop(delivering.number));
    assert_eq!(spool.len(), 3);
    drop(spool);
    let mut spool = open(&scratch, Limits { bytes: 2 * each, ..WIDE });
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Space, &[2])]);
    assert_eq!(drain(&mut spool, noon()), [3, 4]);
}

/// What is too old is dropped, at start and later; a clock that was set back makes nothing old.
#[test]
fn drops_what_is_too_old() {
    let scratch = Scratch::new("age");
    let limits = Limits { age: Some(HOUR), ..WIDE };
    let mut spool = open(&scratch, limits);
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
    let mut spool = open(&scratch, WIDE);
    push(&mut spool, [0, 1]);
    drop(spool);
    let paths: Vec<PathBuf> = scratch.names().iter().map(|name| scratch.0.join(name)).collect();
    let whole = fs::read(&paths[0]).expect("a file");
    let second = fs::read(&paths[1]).expect("a file");
    let check = |damaged: &[u8], is_open: bool, knows: bool| {
        fs::write(&paths[0], if is_open { &whole } else { damaged }).expect("a file");
        fs::write(&paths[1], &second).expect("a file");
        let mut spool = open(&scratch, WIDE);
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
        let mut spool = open(&scratch, WIDE);
        fs::remove_file(&paths[0]).expect("a file");
        replace(&paths[0], &elsewhere);
        assert_eq!(drain(&mut spool, noon()), [1]);
        assert_eq!(spool.take_dropped(), [dropped(DropReason::Damaged, &[0])]);
        assert_eq!(scratch.names(), ["elsewhere"]);
        fs::write(&paths[1], &second).expect("a file");
    }
}

/// What a killed agent was writing is removed; what was never of a spool stays.
#[test]
fn removes_leftovers_only() {
    let scratch = Scratch::new("leftovers");
    let mut spool = open(&scratch, WIDE);
    push(&mut spool, [0]);
    drop(spool);
    let foreign = ["0.request", "00000000000000000009.request.old", "99999999999999999999.request", "note"];
    for name in foreign.into_iter().chain([".incoming"]) {
        fs::write(scratch.0.join(name), b"half").expect("a file");
    }
    let mut spool = open(&scratch, WIDE);
    assert_eq!(spool.len(), 1);
    push(&mut spool, [1]);
    assert_eq!(drain(&mut spool, noon()), [0, 1]);
    assert_eq!(spool.take_dropped(), []);
    assert_eq!(scratch.names(), foreign.map(str::to_owned));
}

/// A second agent is told, and gets in when the first is gone; a folder that others may write to is refused.
#[test]
fn is_one_agents() {
    let scratch = Scratch::new("two");
    let spool = open(&scratch, WIDE);
    let mode = fs::metadata(&scratch.0).expect("the folder").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let error = Spool::open(&scratch.0, WIDE, noon()).expect_err("it is in use");
    assert!(error.to_string().ends_with("is in use by another agent"), "{error}");
    drop(spool);
    drop(open(&scratch, WIDE));
    fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o770)).expect("the folder is ours");
    let error = Spool::open(&scratch.0, WIDE, noon()).expect_err("others may write");
    assert!(error.to_string().contains("may be written by others"), "{error}");
    let error = Spool::open(Path::new("/proc/nothing"), WIDE, noon()).expect_err("no place for folders");
    assert!(error.to_string().starts_with("/proc/nothing: "), "{error}");
}

/// There is an end to how many files are kept, and how many are looked at.
#[test]
fn bounds_the_number_of_files() {
    const MOST: u64 = 65_536;
    // In memory, where there is such a place: a disk takes a minute to make so many.
    let memory = Path::new("/dev/shm").join(format!("spool-{}", std::process::id()));
    let scratch = if memory.parent().is_some_and(Path::is_dir) { Scratch(memory) } else { Scratch::new("many") };
    let mut spool = open(&scratch, WIDE);
    push(&mut spool, 0..4);
    let path = |number: u64| scratch.0.join(Entry { number, tally: Tally::default() }.file_name());
    // File systems have a limit of names for one file.
    let fill = |from: u64, to: u64| (from..to).for_each(|n| fs::hard_link(path(n % 4), path(n)).expect("a name"));
    fill(4, MOST + 3);
    drop(spool);
    let started = std::time::Instant::now();
    let mut spool = Spool::open(&scratch.0, Limits { bytes: u64::MAX, ..WIDE }, noon()).expect("a spool");
    println!("{MOST} requests of an earlier run were found within {:?}", started.elapsed());
    assert_eq!(spool.len() as u64, MOST);
    assert_eq!(spool.take_dropped(), [dropped(DropReason::Space, &[0, 1, 2])]);
    push(&mut spool, [3]);
    assert_eq!((spool.len() as u64, spool.take_dropped()), (MOST, vec![dropped(DropReason::Space, &[3])]));
    drop(spool);
    (0..4).for_each(|n| fs::hard_link(path(4 + n), path(n)).expect("a name"));
    fill(MOST + 4, 2 * MOST + 1);
    let error = Spool::open(&scratch.0, WIDE, noon()).expect_err("it holds too much");
    assert!(error.to_string().ends_with("holds more than 131072 files"), "{error}");
}

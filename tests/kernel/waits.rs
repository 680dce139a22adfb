//! Is time off the CPU charged to the right places, and all of it?

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    time::Duration,
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, Folded, Native, agent, books, folded, kernel_is_usable, native, record, run, scratch, stderr, stdout,
    total, workload,
};

/// Reasons that only the first moments of a program have. (A wait that begins then and lasts keeps its stack.)
const LEARNING: [&str; 2] = ["[incomplete: table pending]", "[incomplete: unknown process]"];

/// Records what a command waits for; its own output comes with the recording's.
fn record_waits(arguments: &[&str], command: &[&str]) -> (Output, Vec<Folded>) {
    let output = scratch("waits").join("waits.folded");
    let output = output.to_string_lossy();
    let arguments = [&["--event", "off-cpu", "--output", &output], arguments, &["--"], command].concat();
    let outcome = run(&mut record(&arguments));
    print!("{}", stderr(&outcome));
    assert!(outcome.status.success());
    let stacks = folded(&fs::read_to_string(output.as_ref()).expect("a recording"));
    (outcome, stacks)
}

/// What the program of known waits reads from the disk, in a folder of its own.
fn input(folder: &str) -> PathBuf {
    let file = scratch(folder).join("data");
    fs::write(&file, vec![7; 16 << 20]).expect("a file to read");
    file
}

/// Compares what the program of known waits says about itself with a recording of it.
fn check_places(arguments: &[&str], tolerance: f64) {
    const SECONDS: &str = "30";
    let file = input("waits-input");
    let binary = native(Native::Waits);
    let command = [&binary.to_string_lossy(), SECONDS, &file.to_string_lossy()].map(str::to_owned);
    let (outcome, stacks) = record_waits(arguments, &command.each_ref().map(String::as_str));
    let text = stdout(&outcome);
    let sites: Vec<(&str, f64)> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("site ")?.split(' ');
            Some((words.next()?, words.next()?.parse::<f64>().ok()? / 1e9))
        })
        .collect();
    assert_eq!(sites.len(), 6, "{text:?}");
    let mut worst: f64 = 0.0;
    for (site, own) in sites {
        let ours = total(&stacks, |stack| stack.frames.iter().any(|frame| frame == site)) as f64 / 1e6;
        let difference = ours / own - 1.0;
        println!("{site:20} {own:8.3} s by itself, {ours:8.3} s recorded, {:+.2} %", difference * 100.0);
        worst = worst.max(difference.abs());
    }
    // What the ration left without a stack, until it had adapted itself, says so.
    let is_rationed = |stack: &Folded| stack.frames[1] == "[incomplete: rationed]";
    println!("{:.3} s without a stack", total(&stacks, is_rationed) as f64 / 1e6);
    let is_learning = |stack: &Folded| LEARNING.contains(&stack.frames[1].as_str()) || is_rationed(stack);
    let known = total(&stacks, |stack| !is_learning(stack));
    let rooted = total(&stacks, |stack| !stack.frames[1].starts_with("[incomplete"));
    println!("{:.3} % of {:.1} s rooted", 100.0 * rooted as f64 / known as f64, known as f64 / 1e6);
    assert!(worst <= tolerance, "one place is {:.2} % off", worst * 100.0);
    assert!(rooted as f64 >= 0.99 * known as f64, "{rooted} of {known} rooted");
}

/// Every wait with its stack (the waits are long, because the kernel counts the time between waking a thread and
/// switching to it as its CPU time, if that preempts: `rq_clock_skip_update`): sleeping, a lock, a pipe, a disk, and one that begins on one CPU and ends on another.
#[test]
fn waits_are_charged_to_their_places() {
    if kernel_is_usable() {
        check_places(&["--wait-stacks", "0"], 0.01);
    }
}

/// One stack in ten: the others stand for those that were not taken.
#[test]
fn rationed_waits_are_charged_to_their_places() {
    if kernel_is_usable() {
        check_places(&["--wait-stacks", "50"], 0.05);
    }
}

/// Time that processes wait for a CPU is what the kernel says.
#[test]
fn waiting_for_a_cpu_is_what_the_kernel_says() {
    if !kernel_is_usable() {
        return;
    }
    let binary = workload("crowd");
    let (outcome, stacks) = record_waits(&[], &[&binary.to_string_lossy(), "8", "10"]);
    let kernel: f64 = stdout(&outcome)
        .lines()
        .filter_map(|line| line.strip_prefix("waited ")?.parse::<f64>().ok())
        .map(|nanoseconds| nanoseconds / 1e9)
        .sum();
    let is_queued = |stack: &Folded| stack.frames.last().is_some_and(|leaf| leaf == "[run queue]");
    let ours = total(&stacks, is_queued) as f64 / 1e6;
    let in_loop = total(&stacks, |stack| is_queued(stack) && stack.frames.iter().any(|frame| frame == "burn"));
    println!("{kernel:.3} s by the kernel, {ours:.3} s recorded, {:.3} s of them in the loop", in_loop as f64 / 1e6);
    assert!((ours / kernel - 1.0).abs() <= 0.03, "{ours} instead of {kernel}");
    assert!(in_loop as f64 / 1e6 >= 0.95 * ours, "the stacks do not show the loop");
}

/// The scheduler's own books of when threads are ready to run say what watching them wake up says. (Two recordings of
/// one program, on CPUs that others want too. The books begin some microseconds earlier: making a thread ready takes
/// that long where its data is in no cache, and the tracepoint is at its end.)
#[test]
fn wakeups_need_not_be_watched() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("wakeups");
    let file = input("wakeups-input");
    let by_books = folder.join("books.folded").to_string_lossy().into_owned();
    let by_watching = folder.join("watching.folded").to_string_lossy().into_owned();
    let _burners: Vec<Background> =
        (0..3).map(|_| Background::start(Command::new(workload("burner")).args(["1", "60"]))).collect();
    let inner = record(&["--event", "off-cpu", "--wait-stacks", "0", "--output", &by_books, "--"]);
    let mut outer = record(&["--event", "off-cpu", "--wait-stacks", "0", "--watch-wakeups", "--output", &by_watching]);
    outer.arg("--").arg(inner.get_program()).args(inner.get_args());
    let outcome = run(outer.arg(native(Native::Waits)).arg("10").arg(&file));
    assert!(outcome.status.success(), "{}", stderr(&outcome));
    let times = |file: &str| {
        let stacks = folded(&fs::read_to_string(file).expect("a recording"));
        // (Not by function: each agent learns their names in its own time.)
        let is_ours = |stack: &Folded| stack.frames[0] == "shapes-waits";
        let is_queued = |stack: &Folded| stack.frames.last().is_some_and(|leaf| leaf == "[run queue]");
        let queued = total(&stacks, |stack| is_ours(stack) && is_queued(stack)) as f64 / 1e6;
        (total(&stacks, is_ours) as f64 / 1e6 - queued, queued)
    };
    let ((blocked, queued), (blocked_watched, queued_watched)) = (times(&by_books), times(&by_watching));
    println!(
        "blocked {blocked:.3} s by the books, {blocked_watched:.3} s by watching; waiting for a CPU {queued:.3} s, \
         {queued_watched:.3} s"
    );
    assert!(queued_watched > 0.5, "the CPUs were idle");
    assert!((blocked / blocked_watched - 1.0).abs() < 0.01);
    // 14 microseconds for each of some 14,000 waits: 3 on a machine that does nothing else, 10 where compilers run.
    assert!((queued - queued_watched).abs() < 0.2, "too far apart");
}

/// A wait that does not end is seen while it lasts; one that is ended by a signal, once.
#[test]
fn waits_under_way_are_seen() {
    if !kernel_is_usable() {
        return;
    }
    let seconds = |stacks: &[Folded]| total(stacks, |stack| stack.frames[0] == "sleep") as f64 / 1e6;
    let (_, stacks) = record_waits(&["--duration", "12s"], &["sleep", "100"]);
    let lasting = seconds(&stacks);
    let (_, stacks) = record_waits(&[], &["timeout", "--signal=KILL", "7", "sleep", "100"]);
    let killed = seconds(&stacks);
    println!("{lasting:.3} s of a sleep that lasts, {killed:.3} s of one that is killed after 7 s");
    assert!((11.5..=12.1).contains(&lasting) && (6.9..=7.1).contains(&killed), "{lasting} {killed}");
}

/// A wait that began before the recording is charged from its start on.
#[test]
fn waits_that_began_earlier_are_seen() {
    if !kernel_is_usable() {
        return;
    }
    let sleeper = Background::start(Command::new("sleep").arg("5"));
    std::thread::sleep(Duration::from_secs(1));
    let pid = sleeper.pid().to_string();
    let outcome = run(&mut record(&["--event", "off-cpu", "--duration", "10s", "--pid", &pid, "--output", "-"]));
    let stacks = folded(&stdout(&outcome));
    let earlier = total(&stacks, |stack| stack.frames[1] == "[incomplete: began earlier]") as f64 / 1e6;
    println!("{earlier:.3} s of a wait that began before the recording");
    assert!((3.0..=4.0).contains(&earlier), "{stacks:?}");
}

/// Both kinds of time in one recording, in every format, and the books of the samples balance.
#[test]
fn both_kinds_of_time_together() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("both");
    let burner = workload("burner");
    let script = format!("{} 1 2 & sleep 2; wait", burner.display());
    for (format, name) in
        [("folded", "both.folded"), ("pprof", "both.pb.gz"), ("svg", "both.svg"), ("otlp", "both.otlp")]
    {
        let output = folder.join(name).to_string_lossy().into_owned();
        let arguments = ["--event", "both", "--format", format, "--output", &output, "--", "sh", "-c", &script];
        let outcome = run(&mut record(&arguments));
        let books = books(&outcome);
        assert_eq!((books.seen, books.lost), (books.exported, 0), "{}", stderr(&outcome));
    }
    let stacks = folded(&fs::read_to_string(folder.join("both.folded")).expect("a recording"));
    let seconds = |process: &str, side: &str| {
        total(&stacks, |stack| stack.frames[0] == process && stack.frames[1] == side) as f64 / 1e6
    };
    let (burned, slept) = (seconds("burner", "[on-cpu]"), seconds("sleep", "[off-cpu]"));
    let queued = total(&stacks, |stack| {
        stack.frames[0] == "burner" && stack.frames.last().is_some_and(|leaf| leaf == "[run queue]")
    }) as f64
        / 1e6;
    println!("{burned:.3} s burned, {queued:.3} s waiting for a CPU, {slept:.3} s slept");
    assert!((1.9..=2.1).contains(&(burned + queued)) && (1.95..=2.05).contains(&slept));
    let top =
        run(Command::new("go").args(["tool", "pprof", "-sample_index=offcpu", "-top"]).arg(folder.join("both.pb.gz")));
    assert!(stdout(&top).contains("Type: offcpu") && stdout(&top).contains("do_nanosleep"), "{}", stdout(&top));
    let svg = fs::read_to_string(folder.join("both.svg")).expect("a drawing");
    assert!(svg.contains("[off-cpu]") && svg.contains("[on-cpu]") && svg.contains("off the CPU"));
}

/// Threads by the thousand, most of them waiting: every map within its budget, no time lost.
#[test]
fn a_crowd_of_threads_is_followed() {
    if !kernel_is_usable() {
        return;
    }
    let binary = native(Native::Waits);
    let file = input("waits-crowd");
    let mut others: Vec<Background> =
        (0..100).map(|_| Background::start(Command::new(&binary).arg("100").arg(&file))).collect();
    let outcome = run(Command::new(agent()).args(["record", "--event", "both", "--duration", "10s", "--output", "-"]));
    for other in &mut others {
        other.signal(Signal::SIGKILL);
    }
    let text = stderr(&outcome);
    print!("{text}");
    let books = books(&outcome);
    assert_eq!(books.seen, books.exported + books.lost);
    assert!(text.contains(", 0.000 s lost"), "{text}");
}

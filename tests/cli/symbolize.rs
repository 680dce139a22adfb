//! The `symbolize` command: what it says about files, compared with binutils' `addr2line`, and about processes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use profiler_tests::{Native, agent, native, run, scratch, stderr, stdout, workspace};

use super::check_refused;

/// Addresses that are compared in each program.
const ADDRESSES: usize = 10_000;
/// A place that is not known.
const UNKNOWN: &str = "?:0";
/// Of so many addresses, one may be told differently.
const ONE_IN: usize = 1000;

fn symbolize() -> Command {
    let mut command = Command::new(agent());
    command.arg("symbolize");
    command
}

/// Runs a command with lines on its standard input.
fn run_with_input(command: &mut Command, input: String) -> String {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("standard input is piped");
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).expect("the command reads its input"));
    let output = child.wait_with_output().expect("a child");
    writer.join().expect("the writer");
    assert!(output.status.success(), "{command:?}");
    stdout(&output)
}

/// What is said about an address: functions as the file has them, and where in them, innermost first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    functions: Vec<String>,
    places: Vec<String>,
}

/// A file's functions that have a size: names by address and size.
fn functions(binary: &Path) -> BTreeMap<(u64, u64), BTreeSet<String>> {
    let output = run(Command::new("nm").args(["--print-size", "--defined-only"]).arg(binary));
    assert!(output.status.success(), "{}", stderr(&output));
    let mut functions = BTreeMap::<_, BTreeSet<String>>::new();
    for line in stdout(&output).lines() {
        let mut fields = line.splitn(4, ' ');
        let number = |field: Option<&str>| u64::from_str_radix(field?, 16).ok();
        if let (Some(start), Some(size), Some("t" | "T" | "w" | "W" | "i"), Some(name)) =
            (number(fields.next()), number(fields.next()), fields.next(), fields.next())
        {
            functions.entry((start, size)).or_default().insert(name.replace(';', ":"));
        }
    }
    functions
}

/// Addresses in functions, every byte as likely as every other; the same each time.
fn choose(functions: &BTreeMap<(u64, u64), BTreeSet<String>>) -> Vec<u64> {
    let total: u64 = functions.keys().map(|(_, size)| size).sum();
    let mut ends = Vec::new();
    for (start, size) in functions.keys() {
        ends.push((ends.last().map_or(0, |&(end, _, _)| end) + size, *start, *size));
    }
    let mut state = 1u64;
    let mut next = || {
        // Marsaglia's xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % total
    };
    let pick = |place: u64| {
        let (end, start, size) = ends[ends.partition_point(|&(end, _, _)| end <= place)];
        start + (place + size - end)
    };
    (0..ADDRESSES).map(|_| pick(next())).collect()
}

/// Takes `.` and `..` out of a path, and what `addr2line` says besides.
fn plain(place: &str) -> String {
    let place = place.split(" (discriminator").next().unwrap_or_default();
    let (file, line) = place.rsplit_once(':').unwrap_or((place, "0"));
    let mut parts: Vec<&str> = Vec::new();
    for part in file.split('/').enumerate().filter(|(index, part)| *part != "." && (*index == 0 || !part.is_empty())) {
        match part.1 {
            ".." if parts.len() > 1 => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    // Of code without a line, `addr2line` may still say the unit's name.
    if matches!(line, "?" | "0") { UNKNOWN.to_owned() } else { format!("{}:{line}", parts.join("/")) }
}

fn ours(binary: &Path, addresses: &[u64]) -> Vec<Said> {
    let flags = ["--addresses", "--lines", "--inlines", "--mangled"];
    let text = run_with_input(symbolize().args(flags).arg("--file").arg(binary), lines(addresses));
    let mut said = vec![Said::default()];
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [_, name, _, source, place] = fields[..] else { panic!("{line:?}") };
        let last = said.last_mut().expect("one is open");
        last.functions.push(name.to_owned());
        last.places.push(plain(if place == "-" { UNKNOWN } else { place }));
        if source != "inlined" {
            said.push(Said::default());
        }
    }
    said.pop();
    said
}

fn theirs(binary: &Path, addresses: &[u64]) -> Vec<Said> {
    let text = run_with_input(Command::new("addr2line").args(["-a", "-f", "-i", "-e"]).arg(binary), lines(addresses));
    let mut said: Vec<Said> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("0x") {
            said.push(Said::default());
            continue;
        }
        let last = said.last_mut().expect("an address comes first");
        last.functions.push(line.replace(';', ":"));
        last.places.push(plain(lines.next().expect("a place follows")));
    }
    said
}

fn lines(addresses: &[u64]) -> String {
    addresses.iter().fold(String::new(), |mut text, address| {
        // SANITY: writing to a string cannot fail.
        let _ = writeln!(text, "{address:#x}");
        text
    })
}

/// Whether two names are the same function's. Compilers append what they made of it (`.isra.0`) to its symbol, and not to
/// its name in debug information; of the function itself, we print the symbol, and `addr2line` either.
fn is_same(ours: &str, theirs: &str, symbols: &BTreeSet<&String>) -> bool {
    let is_symbol = |name: &str| {
        let mut rests = symbols.iter().filter_map(|symbol| symbol.strip_prefix(name));
        rests.any(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    ours == theirs || is_symbol(ours) && is_symbol(theirs)
}

/// Compares what we and `addr2line` say about a program, and prints what differs. Addresses lie in functions: of what is
/// between them, `addr2line` says the nearest symbol before, and we say nothing.
fn compare(name: &str, binary: &Path) {
    let functions = functions(binary);
    let addresses = choose(&functions);
    let (ours, theirs) = (ours(binary, &addresses), theirs(binary, &addresses));
    assert_eq!((ours.len(), theirs.len()), (addresses.len(), addresses.len()));
    let aliases = |address: u64| {
        let before = functions.range(..=(address, u64::MAX)).rev().take(64);
        before.filter(move |((start, size), _)| address - start < *size).flat_map(|(_, names)| names)
    };
    let (mut asked, mut inlined, mut replaced, mut functions_differ, mut places_differ) = (0, 0, 0, 0, 0);
    for ((address, ours), theirs) in addresses.iter().zip(&ours).zip(&theirs) {
        if theirs.functions.iter().any(|function| function == "??") {
            continue;
        }
        asked += 1;
        inlined += theirs.functions.len() - 1;
        let (Some((our_own, our_inlined)), Some((their_own, their_inlined))) =
            (ours.functions.split_last(), theirs.functions.split_last())
        else {
            panic!("{address:#x}: {ours:?} {theirs:?}");
        };
        let symbols: BTreeSet<&String> = aliases(*address).collect();
        // Where the innermost function is inlined and has no linkage name, `addr2line` prints the outermost one's symbol in
        // its place (binutils' `elf_find_nearest_line`): then that one name cannot be compared.
        let is_replaced = our_inlined.len() == their_inlined.len()
            && their_inlined.first().is_some_and(|name| symbols.contains(name))
            && our_inlined.first() != their_inlined.first();
        replaced += usize::from(is_replaced);
        let skipped = usize::from(is_replaced);
        if !is_same(our_own, their_own, &symbols) || our_inlined[skipped..] != their_inlined[skipped..] {
            functions_differ += 1;
            println!("{name} {address:#x}: functions\n  ours   {:?}\n  theirs {:?}", ours.functions, theirs.functions);
        } else if !ours.places.iter().zip(&theirs.places).all(|(ours, theirs)| ours == theirs || theirs == UNKNOWN) {
            places_differ += 1;
            println!("{name} {address:#x}: places\n  ours   {:?}\n  theirs {:?}", ours.places, theirs.places);
        }
    }
    println!(
        "{name}: {asked} addresses, {inlined} inlined functions in all, {replaced} of which addr2line does not name; \
         {functions_differ} with other functions, {places_differ} with other lines"
    );
    assert!(asked * 10 >= ADDRESSES * 9 && inlined > 0, "{name}: addr2line knows {asked} of {ADDRESSES}");
    assert!(functions_differ * ONE_IN <= asked, "{name}: {functions_differ} of {asked} differ");
    assert!(places_differ * ONE_IN <= asked, "{name}: {places_differ} lines of {asked} differ");
}

/// Compiles a program of `tests/workloads/native` with debug information.
fn with_debug_info(program: &str, flags: &[&str], source: &str) -> PathBuf {
    let binary = scratch(&format!("symbolize-{source}")).join("program");
    let mut compile = Command::new(program);
    compile.args(flags).arg("-o").arg(&binary).arg(workspace().join("tests/workloads/native").join(source));
    let output = run(&mut compile);
    assert!(output.status.success(), "{source} does not compile: {}", stderr(&output));
    binary
}

/// Functions, what is inlined in them, and lines are what binutils says they are.
#[test]
fn agrees_with_addr2line() {
    // Each in another form: DWARF 4 in compressed sections, DWARF 5, and what rustc makes.
    compare("c", &with_debug_info("gcc", &["-O2", "-gdwarf-4", "-gz=zlib", "-pthread"], "shapes.c"));
    compare("c++", &with_debug_info("g++", &["-O2", "-gdwarf-5", "-std=c++20"], "templates.cpp"));
    let flags = ["-C", "opt-level=3", "-C", "debuginfo=2", "--edition", "2024"];
    compare("rust", &with_debug_info("rustc", &flags, "shapes.rs"));
}

/// Go's own table says what binutils read in debug information.
#[test]
fn go_agrees_with_addr2line() {
    // (Binutils do not read all of the fifth version, which Go 1.25 and later write.)
    let binary = scratch("symbolize-go").join("program");
    let source = workspace().join("tests/workloads/native/shapes.go");
    let build = |experiment| {
        let mut build = Command::new("go");
        build.args(["build", "-o"]).arg(&binary).arg(&source).env("GOEXPERIMENT", experiment);
        run(&mut build).status.success()
    };
    assert!(build("nodwarf5") || build(""), "the Go program does not compile");
    compare("go", &binary);
}

/// Go's own table has lines and inlined functions where there are neither symbols nor debug information.
#[test]
fn go_needs_no_debug_information() {
    let (whole, stripped) = (native(Native::Go), native(Native::GoStripped));
    let functions = functions(&whole);
    let addresses: Vec<u64> = choose(&functions).into_iter().take(2000).collect();
    let (with, without) = (ours(&whole, &addresses), ours(&stripped, &addresses));
    // (Symbols have type parameters in full.)
    let differ = with.iter().zip(&without).filter(|(with, without)| with.places != without.places).count();
    println!("go: {differ} of {} differ without symbols", addresses.len());
    assert!(differ * ONE_IN <= addresses.len());
    let known = without.iter().filter(|said| said.places.iter().all(|place| place != UNKNOWN)).count();
    let inlined: usize = without.iter().map(|said| said.functions.len() - 1).sum();
    println!("go: {known} of {} with lines, {inlined} inlined functions", addresses.len());
    assert!(known * 100 >= addresses.len() * 99 && inlined > 100);
}

/// Entries of procedure linkage tables, which have no symbols, are called what `objdump` calls them.
#[test]
fn linkage_tables_are_named() {
    for kind in [Native::C, Native::Cpp] {
        let binary = native(kind);
        let listing =
            run(Command::new("objdump").args(["-d", "-j", ".plt", "-j", ".plt.got", "-j", ".plt.sec"]).arg(&binary));
        let entries = stdout(&listing);
        // `0000000000001030 <strtol@plt>:`; what is chosen at start has no name that it could have.
        let entries = entries.lines().filter_map(|line| line.strip_suffix(">:")?.split_once(" <"));
        let (addresses, names): (Vec<u64>, Vec<String>) = entries
            .filter(|(_, name)| name.ends_with("@plt") && !name.contains('*'))
            .filter_map(|(address, name)| Some((u64::from_str_radix(address, 16).ok()?, name.to_owned())))
            .unzip();
        let last_bytes: Vec<u64> = addresses.iter().map(|address| address + 5).collect();
        for addresses in [&addresses, &last_bytes] {
            let said: Vec<String> = ours(&binary, addresses).into_iter().flat_map(|said| said.functions).collect();
            assert_eq!(said, names);
        }
        println!("{}: {} entries", binary.display(), names.len());
        assert!(names.len() > 5);
    }
}

/// A place in a file is the same whether it is given as an offset, as an address, or as an address in a process.
#[test]
fn files_and_processes_agree() {
    #[inline(never)]
    fn landmark() -> u64 {
        std::hint::black_box(17)
    }
    assert_eq!(landmark(), 17);
    let address = format!("{:x}", landmark as fn() -> u64 as usize);
    let pid = std::process::id().to_string();
    let said = run(symbolize().args(["--lines", "--inlines", "--pid", &pid, &address]));
    let said = stdout(&said);
    let fields: Vec<&str> = said.lines().last().expect("a line").trim_end().split('\t').collect();
    assert!(fields[1].ends_with("files_and_processes_agree::landmark"), "{said}");
    let (_, stated) = fields[2].split_once('+').expect("a file and an address");
    let own = std::env::current_exe().expect("a path");
    let by_address = run(symbolize().args(["--lines", "--inlines", "--addresses", stated, "--file"]).arg(&own));
    let by_address = stdout(&by_address);
    assert_eq!(by_address.lines().last().map(|line| line.split('\t').skip(1).collect()), Some(fields[1..].to_vec()));
}

/// What does not exist, is no ELF file, or no address.
#[test]
fn refuses_what_is_none() {
    check_refused(&run(symbolize().args(["--pid", "4194304", "1000"])), &["no process with PID 4194304"]);
    check_refused(&run(symbolize().args(["--file", "/nonexistent", "1000"])), &["/nonexistent", "cannot be read"]);
    check_refused(&run(symbolize().args(["--file", "/", "1000"])), &["/", "cannot be read"]);
    let manifest = workspace().join("Cargo.toml");
    check_refused(&run(symbolize().arg("1000").arg("--file").arg(&manifest)), &["Cargo.toml", "is no ELF file"]);
    let none = run(symbolize().args(["--file", "/proc/self/exe", "main"]));
    assert!(!none.status.success() && stderr(&none).contains("\"main\" is no hexadecimal number"), "{}", stderr(&none));
    assert!(!run(symbolize().arg("1000")).status.success());
}

/// What has no name says why.
#[test]
fn says_why_there_is_no_name() {
    let nowhere = run(symbolize().args(["--file", "/proc/self/exe", "0xffffffff"]));
    assert_eq!(stdout(&nowhere), "0xffffffff\t-\t-\tno code\n");
    let binary = scratch("symbolize-stripped").join("program");
    std::fs::copy(native(Native::C), &binary).expect("a copy");
    let main = functions(&binary).into_iter().find(|(_, names)| names.contains("main")).expect("main");
    assert!(run(Command::new("strip").arg(&binary)).status.success());
    let address = format!("{:#x}", main.0.0);
    let said = run(symbolize().args(["--addresses", &address, "--file"]).arg(&binary));
    assert_eq!(stdout(&said), format!("{address}\t-\tprogram+{address}\tno symbols\n"));
}

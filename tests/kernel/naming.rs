//! Do frames have names, and the right ones?

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use profiler_tests::{
    Folded, Native, folded, kernel_is_usable, native, record, run, scratch, stderr, stdout, total, workload,
};

/// Seconds that each program runs for.
const SECONDS: &str = "3";

/// Records a command that has no children.
fn record_program(binary: &Path, arguments: &[&str]) -> Vec<Folded> {
    let mut command = record(&["--frequency", "499", "--output", "-", "--"]);
    let outcome = run(command.arg(binary).args(arguments));
    assert!(outcome.status.success(), "{}", stderr(&outcome));
    folded(&stdout(&outcome))
}

/// How many of the samples' user frames have names, and how many of the program's own files have none.
fn named_and_not(stacks: &[Folded], binary: &Path) -> (u64, u64) {
    let own = format!("{}+0x", binary.file_name().expect("a name").to_string_lossy());
    let (mut named, mut nameless) = (0, 0);
    for stack in stacks {
        for frame in stack.frames[1..].iter().filter(|frame| !frame.ends_with("_[k]") && !frame.starts_with('[')) {
            // (Whatever the tests compile is called `shapes-`.)
            if frame.starts_with(&own) || frame.starts_with("shapes-") && frame.contains("+0x") {
                nameless += stack.count;
            } else if !frame.contains("+0x") {
                named += stack.count;
            }
        }
    }
    (named, nameless)
}

fn check_named(name: &str, binary: &Path, arguments: &[&str]) {
    check_all_named(name, binary, &record_program(binary, arguments));
}

fn check_all_named(name: &str, binary: &Path, stacks: &[Folded]) {
    let (named, nameless) = named_and_not(stacks, binary);
    println!("{name:24} {named} frames with names, {nameless} without");
    assert!(named > 1000 && nameless * 100 <= named, "{name}: {nameless} frames have no name");
}

/// Programs that kept their symbols, and Go programs that did not: 99 of 100 sampled frames have a name.
#[test]
fn functions_are_named() {
    if !kernel_is_usable() {
        return;
    }
    let plugin = native(Native::CPlugin);
    let plugin = plugin.to_string_lossy();
    check_named("c", &native(Native::C), &["chain", SECONDS]);
    check_named("c, shared library", &native(Native::C), &["plugin", SECONDS, &plugin]);
    check_named("c, static", &native(Native::CStaticPie), &["chain", SECONDS]);
    check_named("c, musl", &native(Native::CMusl), &["chain", SECONDS]);
    check_named("c++", &native(Native::Cpp), &["chain", SECONDS]);
    check_named("rust", &native(Native::Rust), &[SECONDS]);
    check_named("go", &native(Native::Go), &["allocate", SECONDS]);
    check_named("go, stripped", &native(Native::GoStripped), &["allocate", SECONDS]);
}

/// On request, what is inlined is a frame between its caller and what it calls, and places in files are exported.
#[test]
fn inlined_functions_are_frames() {
    if !kernel_is_usable() {
        return;
    }
    let binary = workload("inlined");
    let chain = |stacks: &[Folded]| {
        let has_chain =
            |stack: &Folded| stack.frames.windows(3).any(|three| three == ["outermost", "middle", "innermost"]);
        (total(stacks, has_chain), total(stacks, |stack| stack.frames.iter().any(|frame| frame == "outermost")))
    };
    let flags = ["--frequency", "499", "--inlines", "--output", "-", "--"];
    let outcome = run(record(&flags).arg(&binary).arg(SECONDS));
    let (inlined, all) = chain(&folded(&stdout(&outcome)));
    println!("inlined: {inlined} of {all} stacks");
    assert!(all > 500 && inlined * 10 > all * 9, "{}", stderr(&outcome));
    // Nobody asked.
    let (inlined, all) = chain(&record_program(&binary, &[SECONDS]));
    assert!(all > 500 && inlined == 0, "{inlined} of {all}");
    let profile = scratch("inlined").join("profile.pb.gz");
    let outcome = run(record(&["--lines", "--inlines", "--output"]).arg(&profile).arg("--").arg(&binary).arg(SECONDS));
    assert!(outcome.status.success(), "{}", stderr(&outcome));
    let text = stdout(&run(Command::new("go").args(["tool", "pprof", "-lines", "-top"]).arg(&profile)));
    assert!(text.contains("tests/workloads/inlined.c:12 (inline)"), "{text}");
}

/// A copy of the C program without symbols.
fn stripped(folder: &Path) -> PathBuf {
    strip(&native(Native::C), folder)
}

/// A copy of a program without symbols.
fn strip(program: &Path, folder: &Path) -> PathBuf {
    let binary = folder.join("stripped");
    fs::copy(program, &binary).expect("a copy");
    assert!(run(Command::new("strip").arg(&binary)).status.success());
    binary
}

/// Splits the symbols of a program off into a file of their own.
fn split_off(program: &Path, debug_file: &Path) {
    fs::create_dir_all(debug_file.parent().expect("a folder")).expect("a folder");
    let outcome = run(Command::new("objcopy").arg("--only-keep-debug").arg(program).arg(debug_file));
    assert!(outcome.status.success(), "{}", stderr(&outcome));
}

/// A debug file that the program links to by name and checksum, beside it as GDB expects it.
#[test]
fn debug_links_are_followed() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("link");
    let (binary, debug_file) = (stripped(&folder), folder.join(".debug/symbols"));
    split_off(&native(Native::C), &debug_file);
    let link = format!("--add-gnu-debuglink={}", debug_file.display());
    assert!(
        run(Command::new("objcopy").args([&link, "--remove-section=.note.gnu.build-id"]).arg(&binary)).status.success()
    );
    check_named("c, debug link", &binary, &["chain", SECONDS]);

    // Of another file, it would tell lies.
    split_off(&native(Native::Cpp), &debug_file);
    let (named, nameless) = named_and_not(&record_program(&binary, &["chain", SECONDS]), &binary);
    assert!(named * 10 < nameless, "{named} frames are named by the debug file of another program, {nameless} are not");
}

/// A debug file inside a container's root, where the machine has none.
#[test]
fn debug_files_are_found_in_other_roots() {
    if !kernel_is_usable() {
        return;
    }
    let program = native(Native::CStaticPie);
    let root = scratch("root");
    let binary = strip(&program, &root);
    let notes = stdout(&run(Command::new("readelf").arg("--notes").arg(&program)));
    let build_id =
        notes.split("Build ID: ").nth(1).and_then(|rest| rest.split_whitespace().next()).expect("a build ID");
    let (first, rest) = build_id.split_at(2);
    split_off(&program, &root.join(format!("usr/lib/debug/.build-id/{first}/{rest}.debug")));
    let root = root.to_string_lossy();
    let stacks = record_program(Path::new("chroot"), &[&root, "/stripped", "chain", SECONDS]);
    check_all_named("c, debug file in a root", &binary, &stacks);
}

/// Symbols that a distribution keeps, compressed, inside its stripped programs.
#[test]
fn mini_debug_info_names_functions() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("mini");
    let (binary, symbols) = (stripped(&folder), folder.join("symbols"));
    let only_symbols = ["--only-keep-debug", "--strip-debug"];
    let steps = [
        run(Command::new("objcopy").args(only_symbols).arg(native(Native::C)).arg(&symbols)),
        run(Command::new("xz").arg("--force").arg(&symbols)),
        run(Command::new("objcopy").arg(format!("--add-section=.gnu_debugdata={}.xz", symbols.display())).arg(&binary)),
    ];
    for step in steps {
        assert!(step.status.success(), "{}", stderr(&step));
    }
    check_named("c, MiniDebugInfo", &binary, &["chain", SECONDS]);
}

/// Without symbols, a frame is its file and address: no name of something else nearby.
#[test]
fn stripped_code_has_no_wrong_names() {
    if !kernel_is_usable() {
        return;
    }
    let binary = stripped(&scratch("stripped"));
    let stacks = record_program(&binary, &["chain", SECONDS]);
    let (named, nameless) = named_and_not(&stacks, &binary);
    println!("stripped: {named} frames with names, {nameless} without");
    // `main` is called by a function of the C library, and that by `_start`: nothing else has a name.
    assert!(nameless > 10_000 && named * 10 < nameless, "{named} {nameless}");
    assert!(stacks.iter().all(|stack| !stack.frames.iter().any(|frame| frame.contains("level_"))));
}

/// A BPF program that is loaded, and gone again, while it is recorded.
#[test]
fn bpf_programs_are_named() {
    if !kernel_is_usable() {
        return;
    }
    let stacks = record_program(&workload("socket_filter"), &[SECONDS]);
    let total: u64 = stacks.iter().map(|stack| stack.count).sum();
    let is_filter = |frame: &String| frame.starts_with("bpf_prog_") && frame.ends_with("_slow_filter_[k]");
    let named: u64 = stacks.iter().filter(|stack| stack.frames.iter().any(is_filter)).map(|stack| stack.count).sum();
    println!("{named} of {total} samples in the program");
    assert!(total > 100 && named * 4 > total, "{stacks:?}");
}

//! Do stacks of code without frame pointers reach their root, and are they right?

use std::process::Command;

use profiler_tests::{Folded, Native, books, folded, kernel_is_usable, native, record, run, stderr, stdout, total};

/// Samples per second: many, so that a recording of some seconds shows what happens in one of a thousand.
const FREQUENCY: &str = "499";
/// Seconds that each program runs for.
const SECONDS: &str = "4";
/// Reasons that only the first moments of a program have.
const LEARNING: [&str; 2] = ["[incomplete: table pending]", "[incomplete: unknown process]"];

/// What a recording of one program showed, in user mode only.
struct Outcome {
    stacks: Vec<Folded>,
    user: u64,
    learning: u64,
}

/// Records a program from its start to its end.
fn record_native(name: &str, command: &[&str]) -> Outcome {
    let output = run(record(&["--frequency", FREQUENCY, "--output", "-", "--"]).args(command));
    let text = stderr(&output);
    assert!(output.status.success(), "{name}: {text}");
    let books = books(&output);
    assert_eq!((books.seen, books.lost), (books.exported, 0), "{name}");
    let mut stacks = folded(&stdout(&output));
    stacks.retain(|stack| !stack.frames.last().is_some_and(|leaf| leaf.ends_with("_[k]")));
    let user = total(&stacks, |_| true);
    let learning = total(&stacks, |stack| LEARNING.contains(&stack.frames[1].as_str()));
    stacks.retain(|stack| !LEARNING.contains(&stack.frames[1].as_str()));
    Outcome { stacks, user, learning }
}

/// Records a program and checks that its stacks reach their root in `rooted` of the samples, and show `chain`
/// (consecutive frames, root first) in 99 % of those that `is_chain` picks by their leaf.
fn check(name: &str, command: &[&str], rooted: f64, leaf: &str, chain: &[String]) {
    let outcome = record_native(name, command);
    let known = outcome.user - outcome.learning;
    let whole = total(&outcome.stacks, |stack| !stack.frames[1].starts_with("[incomplete"));
    let picked = |stack: &Folded| stack.frames.last().is_some_and(|frame| frame == leaf);
    let of_chain = total(&outcome.stacks, picked);
    let exact = total(&outcome.stacks, |stack| {
        picked(stack) && (chain.is_empty() || stack.frames.windows(chain.len()).any(|window| window == chain))
    });
    println!(
        "{name:28} {:6} samples in user mode, {:3} while learning, {:7.3} % of the others rooted, {exact} of {of_chain} exact",
        outcome.user,
        outcome.learning,
        100.0 * whole as f64 / known as f64
    );
    for stack in outcome.stacks.iter().filter(|stack| stack.frames[1].starts_with("[incomplete")).take(5) {
        println!("    {} {}", stack.count, stack.frames.join(";"));
    }
    assert!(known > 500, "{name}: too few samples");
    // Two seconds is what learning may take; it takes a few samples.
    assert!(outcome.learning < outcome.user / 4, "{name}: {} samples while learning", outcome.learning);
    assert!(whole as f64 >= rooted * known as f64, "{name}: {whole} of {known} rooted");
    assert!(of_chain > 0 || chain.is_empty(), "{name}: no sample of the chain");
    assert!(exact as f64 >= 0.99 * of_chain as f64, "{name}: {exact} of {of_chain} show the chain");
}

fn frames(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// `main` and 30 levels below it, then the loop.
fn c_chain() -> Vec<String> {
    let levels = (1..=30).map(|level| format!("level_{level:02}"));
    frames(&["main"]).into_iter().chain(levels).chain(frames(&["spin_to_deadline", "spin"])).collect()
}

fn repeated(name: &str, times: usize) -> Vec<String> {
    vec![name.to_owned(); times]
}

fn check_c(name: &str, kind: Native) {
    let binary = native(kind);
    let plugin = native(Native::CPlugin);
    let (binary, plugin) = (binary.to_string_lossy(), plugin.to_string_lossy());
    let mode = |mode: &str, further: &[&str], leaf: &str, chain: Vec<String>| {
        let command: Vec<&str> = [binary.as_ref(), mode, SECONDS].into_iter().chain(further.iter().copied()).collect();
        check(&format!("{name} {mode}"), &command, 0.999, leaf, &chain);
    };
    mode("chain", &[], "spin", c_chain());
    let deep =
        frames(&["main"]).into_iter().chain(repeated("descend", 500)).chain(frames(&["spin_to_deadline", "spin"]));
    mode("deep", &["500"], "spin", deep.collect());
    mode("sort", &[], "compare", frames(&["main", "sort_to_deadline"]));
    mode("signal", &[], "spin", frames(&["on_signal", "in_handler", "spin"]));
    mode("linkage", &[], "call_through_linkage_table", frames(&["main", "call_through_linkage_table"]));
    mode("vdso", &[], "ask_the_vdso", frames(&["main", "ask_the_vdso"]));
    mode("threads", &[], "spin", frames(&["thread_main", "work_in_thread", "spin_to_deadline", "spin"]));
    if kind == Native::C {
        let chain = ["main", "use_plugin", "plugin_work", "inside_plugin", "called_back", "spin_to_deadline", "spin"];
        mode("plugin", &[&plugin], "spin", frames(&chain));
    }
}

/// C without frame pointers, in every shape of stack.
#[test]
fn c_stacks_are_whole() {
    if kernel_is_usable() {
        check_c("c", Native::C);
    }
}

/// The same without shared libraries, at an address of the kernel's choice.
#[test]
fn static_pie_stacks_are_whole() {
    if kernel_is_usable() {
        check_c("static-pie", Native::CStaticPie);
    }
}

/// The same with musl, which says nothing about its frames: its functions' rules are guessed from their code.
#[test]
fn musl_stacks_are_whole() {
    if kernel_is_usable() {
        check_c("musl", Native::CMusl);
    }
}

/// C++: deep virtual calls, exceptions under way, a pool of threads.
#[test]
fn cpp_stacks_are_whole() {
    if !kernel_is_usable() {
        return;
    }
    let binary = native(Native::Cpp);
    let binary = binary.to_string_lossy();
    let levels = (0..=30).rev().map(|level| format!("Level<{level}>::go()"));
    let chain: Vec<String> = frames(&["main"]).into_iter().chain(levels).chain(frames(&["spin()"])).collect();
    check("c++ chain", &[&binary, "chain", SECONDS], 0.999, "spin()", &chain);
    // While an exception lands, libgcc overwrites its own frame with the registers of the frame it lands in: about
    // two samples in a thousand of a program that does nothing else.
    check("c++ exceptions", &[&binary, "exceptions", SECONDS], 0.995, "", &[]);
    check("c++ pool", &[&binary, "pool", SECONDS], 0.999, "spin()", &frames(&["job()", "spin()"]));
}

/// Rust as cargo's release profile compiles it, on the main thread and on another.
#[test]
fn rust_stacks_are_whole() {
    if !kernel_is_usable() {
        return;
    }
    let binary = native(Native::Rust);
    let step = [
        "shapes::descend",
        "<shapes::Odd as shapes::Step>::go",
        "shapes::descend",
        "<shapes::Even as shapes::Step>::go",
    ];
    let chain: Vec<String> =
        frames(&step.repeat(7)).into_iter().chain(frames(&["shapes::descend", "shapes::spin"])).collect();
    check("rust chain", &[&binary.to_string_lossy(), SECONDS], 0.999, "shapes::spin", &chain);
}

/// Go with and without symbols: its own table has the rules for its frames.
#[test]
fn go_stacks_are_whole() {
    if !kernel_is_usable() {
        return;
    }
    for kind in [Native::Go, Native::GoStripped] {
        let binary = native(kind);
        let binary = binary.to_string_lossy();
        let chain = |depth| {
            let levels = repeated("main.descend", depth).into_iter().chain(frames(&["main.spin"]));
            if kind == Native::Go { levels.collect::<Vec<_>>() } else { Vec::new() }
        };
        check(&format!("{kind:?} chain"), &[&binary, "chain", SECONDS], 0.999, "main.spin", &chain(30));
        check(&format!("{kind:?} goroutines"), &[&binary, "goroutines", SECONDS], 0.999, "main.spin", &chain(10));
        // A goroutine that is preempted or whose stack grows ends on the scheduler's stack, by name.
        check(&format!("{kind:?} allocate"), &[&binary, "allocate", SECONDS], 0.99, "", &[]);
    }
}

/// Interpreters' own frames, and code made at run time between them.
#[test]
fn interpreters_are_whole() {
    if !kernel_is_usable() {
        return;
    }
    // A version manager's wrapper would be profiled instead.
    let python = run(Command::new("python3").args(["-c", "import sys; print(sys.executable)"]));
    let script = format!(
        "
import time
end = time.time() + {SECONDS}
while time.time() < end:
    sorted([str(sum(range(50))) for _ in range(100)], key=len)
"
    );
    check("python3", &[stdout(&python).trim(), "-c", &script], 0.999, "", &[]);
    let script = format!(
        "
const end = Date.now() + {SECONDS}000;
function f(n) {{ return n < 2 ? 1 : f(n - 1) + f(n - 2) }}
while (Date.now() < end) {{
    f(18);
    JSON.parse(JSON.stringify({{a: [1, 2, 3, 'x'.repeat(100)]}}));
    [3, 1, 2].map(x => x * 2).sort();
    'abc'.replace(/b/g, 'c');
}}"
    );
    check("node", &["node", "-e", &script], 0.999, "", &[]);
}

/// 1,000 frames come out whole; of 5,000 the innermost are kept, and the stack says that it was cut.
#[test]
fn deep_stacks_are_whole_or_say_that_they_are_not() {
    if !kernel_is_usable() {
        return;
    }
    for further in [&[][..], &["--walk-in-parts"]] {
        let binary = native(Native::C);
        let record_deep = |depth: &str| {
            let arguments = [further, &["--frequency", FREQUENCY, "--output", "-", "--"]].concat();
            let output = run(record(&arguments).arg(&binary).args(["deep", "3", depth]));
            assert!(output.status.success(), "{}", stderr(&output));
            let mut stacks = folded(&stdout(&output));
            stacks.retain(|stack| stack.frames.last().is_some_and(|leaf| leaf == "spin"));
            stacks.retain(|stack| !LEARNING.contains(&stack.frames[1].as_str()));
            stacks
        };
        let stacks = record_deep("1000");
        let chain: Vec<String> = frames(&["main"]).into_iter().chain(repeated("descend", 1000)).collect();
        let all = total(&stacks, |_| true);
        let whole = total(&stacks, |stack| stack.frames.windows(chain.len()).any(|window| window == chain));
        println!("{further:?}: {whole} of {all} stacks of 1,000 frames are whole");
        assert!(all > 300 && whole as f64 >= 0.99 * all as f64);
        let stacks = record_deep("5000");
        let all = total(&stacks, |_| true);
        let cut = total(&stacks, |stack| {
            stack.frames[1] == "[incomplete: depth limit]"
                && stack.frames.iter().filter(|frame| *frame == "descend").count() >= 1000
        });
        println!("{further:?}: {cut} of {all} stacks of 5,000 frames say that they were cut");
        assert!(all > 300 && cut as f64 >= 0.99 * all as f64);
    }
}

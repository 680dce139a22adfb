//! Is the memory of unwind tables kept within its budget?

use std::{
    fmt::Write as _,
    fs,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{Background, agent, eventually, free_port, kernel_is_usable, metric, run, scratch, stderr};

const EXECUTABLES: usize = 100;
const BUDGET_MIB: f64 = 8.0;
const MIB: f64 = 1024.0 * 1024.0;

/// A hundred programs whose tables need several times the budget: it is kept, what is not used makes room, stacks
/// without their table say so, and no sample is lost.
#[test]
fn the_budget_of_unwind_tables_is_kept() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("budget");
    // Thousands of functions with a few rows each; linked to different addresses, every table is another.
    let mut source = "#include <time.h>\n#include <stdlib.h>\nvolatile unsigned long sink;\n".to_owned();
    const FUNCTIONS: usize = 6_000;
    for index in 0..FUNCTIONS {
        let _ = writeln!(
            source,
            "__attribute__((noinline)) int f{index}(int a, int b, int c) {{ int x[{}]; for (int i = 0; i < {}; i++) \
             x[i] = a * b + c; sink += x[a & 1]; int r = rand(); sink += b; return r + a * c + x[b & 1]; }}",
            2 + index % 5,
            2 + index % 5
        );
    }
    source.push_str("int (*table[])(int, int, int) = {");
    for index in 0..FUNCTIONS {
        let _ = write!(source, "f{index},");
    }
    source.push_str(
        "};\nint main(int c, char **v) { time_t end = time(0) + atoi(v[1]); \
         while (time(0) < end) { for (int i = 0; i < sizeof table / sizeof *table; i++) table[i](i, c, 3); \
         struct timespec t = {0, 100000000}; nanosleep(&t, 0); } }\n",
    );
    let (file, object) = (folder.join("many.c"), folder.join("many.o"));
    fs::write(&file, source).expect("a source file");
    let compiled = run(Command::new("gcc").args(["-O1", "-w", "-c", "-o"]).arg(&object).arg(&file));
    assert!(compiled.status.success(), "{}", stderr(&compiled));
    let programs: Vec<_> = (0..EXECUTABLES)
        .map(|index| {
            let program = folder.join(format!("many-{index}"));
            let place = format!("-Wl,-Ttext-segment={:#x}", 0x1000_0000 + index * 0x10_0000);
            let linked = run(Command::new("gcc").args(["-no-pie", &place, "-o"]).arg(&program).arg(&object));
            assert!(linked.status.success(), "{}", stderr(&linked));
            program
        })
        .collect();

    let status = free_port();
    let agent = Background::start(
        Command::new(agent())
            .args(["run", "--frequency", "499", "--window", "2s", "--unwind-table-mib", "8"])
            .args(["--endpoint", &format!("http://127.0.0.1:{}", free_port())])
            .args(["--status-listen", &format!("127.0.0.1:{status}")]),
    );
    eventually("the daemon", Duration::from_secs(5), || {
        metric(status, "profiler_agent_cpus_sampled").filter(|&cpus| cpus > 0.0)
    });
    let running: Vec<_> = programs.iter().map(|program| Background::start(Command::new(program).arg("20"))).collect();
    // A hundred programs compete with the daemon for the CPUs: it may take a moment to answer.
    let value =
        |name: &str| eventually(name, Duration::from_secs(10), || metric(status, &format!("profiler_agent_{name}")));
    let (mut most, mut resident) = (0.0f64, 0.0f64);
    let deadline = Instant::now() + Duration::from_secs(18);
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(500));
        most = most.max(value("unwind_table_bytes"));
        resident = resident.max(value("resident_memory_bytes"));
    }
    let (built, evicted) = (value("unwind_tables_built_total"), value("unwind_tables_evicted_total"));
    let over_budget = value("unwind_tables_over_budget_total");
    let refused = value("stack_ends_total{reason=\"table over budget\"}");
    let rooted = value("stack_ends_total{reason=\"root\"}");
    drop(running);
    agent.signal(Signal::SIGTERM);
    let output = agent.finish();
    println!(
        "rows took at most {:.1} MiB, {:.1} MiB resident; {built} tables built, {evicted} evicted, {over_budget} refused; \
         {rooted} samples rooted, {refused} without their table",
        most / MIB,
        resident / MIB
    );
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    assert!(output.status.success());
    assert!(most <= BUDGET_MIB * MIB, "{:.1} MiB of rows", most / MIB);
    assert!(resident <= 64.0 * MIB, "{:.1} MiB resident", resident / MIB);
    assert!(built >= EXECUTABLES as f64 / 2.0 && evicted + over_budget > 0.0);
    assert!(refused > 0.0 && rooted > 100.0);
}

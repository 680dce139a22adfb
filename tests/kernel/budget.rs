//! What do unwind tables cost, and is their memory kept within its budget?

use std::{
    fmt::Write as _,
    fs,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, agent, eventually, free_port, kernel_is_usable, metric, run, scratch, stderr, workspace,
};

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
            .args(["run", "--budget-cpu", "100%", "--frequency", "499", "--window", "2s", "--unwind-table-mib", "8"])
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

/// The libraries and programs with the most rows that machines commonly run.
const LARGEST: [&str; 4] = ["librustc_driver", "libLLVM", "node", "libjvm.so"];

/// The largest tables there are take less than a second of CPU time together, and with all of them in use, and their
/// programs' frames named, the daemon stays within its memory.
#[test]
fn the_largest_tables_are_cheap() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("largest");
    let status = free_port();
    let log = folder.join("agent.log");
    let agent = Background(
        Command::new(agent())
            .args(["run", "--budget-cpu", "100%", "--log-level", "debug"])
            .args(["--endpoint", &format!("http://127.0.0.1:{}", free_port())])
            .args(["--status-listen", &format!("127.0.0.1:{status}")])
            .stderr(fs::File::create(&log).expect("a log"))
            .spawn()
            .expect("the daemon"),
    );
    eventually("the daemon", Duration::from_secs(5), || {
        metric(status, "profiler_agent_cpus_sampled").filter(|&cpus| cpus > 0.0)
    });
    let rust = workspace().join("tests/workloads/native/shapes.rs");
    let compile = format!("rustc -C opt-level=3 --edition 2024 -o {}/shapes {}", folder.display(), rust.display());
    let again = |command: &str| format!("while :; do {command} > /dev/null || exit; done");
    let script =
        "const f = n => n < 2 ? 1 : f(n - 1) + f(n - 2); for (;;) { f(20); JSON.parse(JSON.stringify([1, {}])) }";
    // Each ends when it is killed between two rounds; what it started ends by itself.
    let mut running: Vec<_> = [again(&compile), again("java --list-modules"), format!("exec node -e '{script}'")]
        .iter()
        .map(|command| Background::start(Command::new("bash").args(["-c", command])))
        .collect();
    // Lines end in: PATH: ROWS rows built in TIME ms of CPU time.
    let built = |name: &str| {
        let log = fs::read_to_string(&log).ok()?;
        log.lines().find_map(|line| {
            let (path, rest) = line.split_once("unwind table of ")?.1.split_once(": ")?;
            path.rsplit('/').next().filter(|file| file.starts_with(name))?;
            let (rows, rest) = rest.split_once(" rows built in ")?;
            Some((path.to_owned(), rows.parse::<u64>().ok()?, rest.split_once(" ms")?.0.parse::<f64>().ok()?))
        })
    };
    let mut sum = 0.0;
    for name in LARGEST {
        let (path, rows, milliseconds) = eventually(name, Duration::from_secs(40), || built(name));
        println!("{rows:8} rows in {milliseconds:6.1} ms of CPU time: {path}");
        assert!(rows > 50_000, "{path}: {rows} rows");
        sum += milliseconds / 1e3;
    }
    // Two windows at least: their frames are named and encoded, too.
    std::thread::sleep(Duration::from_secs(35));
    let value =
        |name: &str| eventually(name, Duration::from_secs(10), || metric(status, &format!("profiler_agent_{name}")));
    let (tables, rows, bytes) = (value("unwind_tables"), value("unwind_table_rows"), value("unwind_table_bytes"));
    let (total, built) = (value("unwind_table_build_seconds_total"), value("unwind_table_rows_built_total"));
    let (evicted, refused) = (value("unwind_tables_evicted_total"), value("unwind_tables_over_budget_total"));
    let rooted = value("stack_ends_total{reason=\"root\"}");
    let memory = |field: &str| {
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB")?.parse().ok());
        kib.map_or(f64::MAX, |kib: f64| kib / 1024.0)
    };
    let (resident, most) = (memory("VmRSS:"), memory("VmHWM:"));
    for program in &mut running {
        assert!(program.0.try_wait().expect("a child").is_none(), "a program ended by itself");
    }
    drop(running);
    agent.signal(Signal::SIGTERM);
    assert!(agent.finish().status.success());
    println!("{sum:.3} s of CPU time for these, {total:.3} s for all tables ({built} rows)");
    println!("{tables} tables of {rows} rows in {:.1} MiB of kernel memory; {rooted} samples rooted", bytes / MIB);
    println!("{resident:.1} MiB resident, {most:.1} MiB at most");
    assert!(sum < 1.0, "{sum:.3} s of CPU time");
    assert!(most <= 64.0, "{most:.1} MiB resident");
    assert!(evicted == 0.0 && refused == 0.0 && rooted > 1000.0);
}

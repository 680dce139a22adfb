//! What the tests share: the agent under test, the programs it profiles, and what it prints.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

pub mod cluster;
pub mod container;
pub mod programs;
pub mod receiver;
pub mod recorded;
pub mod stopped;
pub mod yaml;

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// The agent under test: the release binary, as users run it.
pub fn agent() -> PathBuf {
    let path = workspace().join("target/release/profiler-agent");
    assert!(path.is_file(), "{} is missing: run `cargo xtask test`, which builds it", path.display());
    path
}

/// Whether tests that need the kernel can run. Where `cargo xtask test` found that they can, one that cannot
/// is a failure.
pub fn kernel_is_usable() -> bool {
    let usable = run(Command::new(agent()).arg("check")).status.success();
    if !usable {
        assert!(
            std::env::var_os("PROFILER_REQUIRE_KERNEL").is_none(),
            "this machine can sample, but `profiler-agent check` says otherwise now"
        );
        eprintln!("SKIPPED: this machine cannot sample");
    }
    usable
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Standard error of a finished command, as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output of a finished command, as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A folder for a test's files, emptied first.
pub fn scratch(test: &str) -> PathBuf {
    let folder = workspace().join("target/test-scratch").join(test);
    // It may not exist yet.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    folder
}

/// Compiles a program of `tests/workloads` with frame pointers in every function.
pub fn workload(name: &str) -> PathBuf {
    let folder = workspace().join("target/workloads");
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let binary = folder.join(name);
    let output = run(Command::new("gcc")
        .args(["-O1", "-g", "-fno-omit-frame-pointer", "-mno-omit-leaf-frame-pointer", "-fno-optimize-sibling-calls"])
        .args(["-fno-inline", "-pthread", "-o"])
        .arg(&binary)
        .arg(workspace().join("tests/workloads").join(name).with_extension("c")));
    assert!(output.status.success(), "{name} does not compile: {}", stderr(&output));
    binary
}

/// How a program of `tests/workloads/native` is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Native {
    /// C, without frame pointers, linked dynamically and lazily.
    C,
    /// The same as a position-independent executable without any library.
    CStaticPie,
    /// The same with another C library, which has no unwind tables.
    CMusl,
    /// The library that the C program loads.
    CPlugin,
    /// C that waits in known places.
    Waits,
    /// C++ without frame pointers.
    Cpp,
    /// Rust, as cargo's release profile compiles it.
    Rust,
    /// Go.
    Go,
    /// Go without symbols.
    GoStripped,
}

/// Compiles a program of `tests/workloads/native`.
pub fn native(kind: Native) -> PathBuf {
    const C_FLAGS: &[&str] = &["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-pthread"];
    let (program, arguments, source): (&str, &[&str], &str) = match kind {
        Native::C => ("gcc", &["-Wl,-z,lazy"], "shapes.c"),
        Native::CStaticPie => ("gcc", &["-static-pie", "-w"], "shapes.c"),
        Native::CMusl => ("musl-gcc", &["-static"], "shapes.c"),
        Native::CPlugin => ("gcc", &["-fPIC", "-shared"], "plugin.c"),
        Native::Waits => ("gcc", &[], "waits.c"),
        Native::Cpp => ("g++", &[], "shapes.cpp"),
        Native::Rust => ("rustc", &["-C", "opt-level=3", "--edition", "2024"], "shapes.rs"),
        Native::Go => ("go", &["build"], "shapes.go"),
        Native::GoStripped => ("go", &["build", "-ldflags", "-s -w"], "shapes.go"),
    };
    let folder = workspace().join("target/workloads/native");
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let binary = folder.join(format!("shapes-{kind:?}").to_lowercase());
    let mut compile = Command::new(program);
    if program.ends_with("gcc") || program == "g++" {
        compile.args(C_FLAGS);
    }
    compile.args(arguments).arg("-o").arg(&binary).arg(workspace().join("tests/workloads/native").join(source));
    let output = run(&mut compile);
    assert!(output.status.success(), "{kind:?} does not compile: {}", stderr(&output));
    binary
}

/// What `record` said when it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Books {
    /// Samples the kernel saw.
    pub seen: u64,
    /// Samples in the output.
    pub exported: u64,
    /// Samples counted as lost.
    pub lost: u64,
}

/// Reads the books from a recording's last line.
pub fn books(record: &Output) -> Books {
    let text = stderr(record);
    let of = |before| stopped::number(&text, before);
    let parsed = || Some(Books { seen: of("seen ")?, exported: of("= exported ")?, lost: of("+ lost ")? });
    parsed().unwrap_or_else(|| panic!("no books in {text:?}"))
}

/// One folded stack, root first, and its count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folded {
    /// Process, then frames.
    pub frames: Vec<String>,
    /// Samples.
    pub count: u64,
}

/// Parses folded stacks.
pub fn folded(text: &str) -> Vec<Folded> {
    text.lines()
        .map(|line| {
            let (stack, count) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no count in {line:?}"));
            Folded {
                frames: stack.split(';').map(str::to_owned).collect(),
                count: count.parse().unwrap_or_else(|_| panic!("no count in {line:?}")),
            }
        })
        .collect()
}

/// Adds up the counts of the stacks that `matches` accepts.
pub fn total(stacks: &[Folded], matches: impl Fn(&Folded) -> bool) -> u64 {
    stacks.iter().filter(|stack| matches(stack)).map(|stack| stack.count).sum()
}

/// A program that runs beside the test and ends with it.
pub struct Background(pub Child);

impl Background {
    /// Starts it with its output readable.
    pub fn start(command: &mut Command) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Self(child.unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// Its PID.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Waits until it has printed a line that contains `text`; returns the line.
    pub fn wait_for_line(&mut self, text: &str) -> String {
        let mut reader = BufReader::new(self.0.stdout.as_mut().expect("standard output is piped"));
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            let read = reader.read_line(&mut line).expect("standard output is readable");
            assert!(read > 0, "it ended before it printed {text:?}");
        }
        line
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("a PID");
        kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("{signal}: {error}"));
    }

    /// Waits for its end and returns everything it printed.
    pub fn finish(mut self) -> Output {
        let mut output = Output { status: Default::default(), stdout: Vec::new(), stderr: Vec::new() };
        if let Some(mut stdout) = self.0.stdout.take() {
            stdout.read_to_end(&mut output.stdout).expect("standard output is readable");
        }
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_end(&mut output.stderr).expect("standard error is readable");
        }
        output.status = self.0.wait().expect("a child");
        output
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The most memory that a process had resident so far, MiB; zero once it has ended.
pub fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(0u64) / 1024
}

/// A TCP port that nothing listens on now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// Fetches a page of the status endpoint; `None` while nothing answers. The first line is the status.
pub fn http_get(port: u16, path: &str) -> Option<String> {
    use std::io::Write as _;
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    Some(page)
}

/// A metric's value on the metrics page.
pub fn metric(port: u16, name: &str) -> Option<f64> {
    let page = http_get(port, "/metrics")?;
    // Labels may hold spaces.
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.parse().ok()
}

/// Asks again and again until there is an answer.
pub fn eventually<T>(what: &str, within: Duration, ask: impl FnMut() -> Option<T>) -> T {
    ask_within(within, ask).unwrap_or_else(|| panic!("{what}: not within {within:?}"))
}

/// The same, where no answer in time is for the caller to explain.
pub fn ask_within<T>(within: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + within;
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() >= deadline {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An agent's `record`, with standard output as the destination unless the arguments say otherwise.
pub fn record<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let mut command = Command::new(agent());
    command.arg("record").args(arguments).env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    command
}

//! Are stripped programs named by what a debuginfod server has?

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest, common::v1::any_value::Value,
};
use profiler_tests::{
    Background, agent, books, eventually, folded, free_port, kernel_is_usable, run, scratch, stderr, stdout, workspace,
};
use prost::Message as _;

/// Seconds that each program runs for.
const SECONDS: &str = "4";
/// Longer than anything here takes.
const GUARD: Duration = Duration::from_secs(180);

/// What Python is busy with: C code in the interpreter, in its modules and in the C library.
const PYTHON: &str = "
import json, re, sys, time
end = time.monotonic() + float(sys.argv[1])
data = {str(i): [i, i / 3, 'text %d' % i] for i in range(2000)}
while time.monotonic() < end:
    text = json.dumps(data, indent=1)
    json.loads(text)
    re.findall(r'(\\w+) (\\d+)', text)
    sorted(text.split(), key=lambda word: word[::-1])
    ''.join(reversed(text)).encode().hex()
";

/// A folder that looks like a system of its own, with stripped programs in it, and a folder with what was stripped off.
struct System {
    root: PathBuf,
    debug: PathBuf,
    /// An empty folder, which takes the place of the one where the agent looks by itself.
    nothing: PathBuf,
}

impl System {
    /// A distribution's Python and C library, and a C++ and a Rust program; `None` where there are no packages of those.
    fn make(folder: &Path) -> Option<Self> {
        let distribution = workspace().join("target/distribution");
        if !distribution.is_dir() {
            eprintln!("SKIPPED: this machine's packages have no stripped Python and its debug files");
            return None;
        }
        let system = Self { root: folder.join("root"), debug: folder.join("debug"), nothing: folder.join("nothing") };
        check(Command::new("cp").arg("-a").arg(distribution.join("root")).arg(&system.root));
        for made in [&system.debug, &system.nothing] {
            fs::create_dir(made).expect("a folder");
        }
        let sources = workspace().join("tests/workloads/native");
        let cpp = ["-O2", "-g", "-fomit-frame-pointer", "-pthread", "-o"];
        system.add("shapes-cpp", Command::new("g++").args(cpp), &sources.join("shapes.cpp"));
        let rust = ["-C", "opt-level=3", "-C", "debuginfo=2", "--edition", "2024", "-o"];
        system.add("shapes-rust", Command::new("rustc").args(rust), &sources.join("shapes.rs"));
        Some(system)
    }

    /// Compiles a program, splits off what it says about itself, and leaves nothing of that in it.
    fn add(&self, name: &str, compile: &mut Command, source: &Path) {
        let binary = self.root.join(name);
        check(compile.arg(&binary).arg(source));
        let split = self.debug.join(name).with_extension("debug");
        check(Command::new("objcopy").arg("--only-keep-debug").arg(&binary).arg(&split));
        check(Command::new("strip").arg(&binary));
    }

    /// The distribution's Python.
    fn python(&self) -> String {
        let programs = fs::read_dir(self.root.join("usr/bin")).expect("programs").flatten();
        let mut names = programs.map(|program| program.file_name().to_string_lossy().into_owned());
        let name = names.find(|name| name.starts_with("python3.")).expect("a Python");
        format!("/usr/bin/{name}")
    }

    /// Records a program of the system, where the agent finds no debug file by itself.
    fn record(&self, options: &[&str], program: &str, arguments: &[&str]) -> Output {
        self.record_trusting(None, options, program, arguments)
    }

    /// The same with certificates that are trusted instead of the system's.
    fn record_trusting(
        &self,
        certificates: Option<&Path>,
        options: &[&str],
        program: &str,
        arguments: &[&str],
    ) -> Output {
        let hide = r#"if [ -d /usr/lib/debug ]; then mount --bind "$0" /usr/lib/debug; fi && exec "$@""#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", hide]).arg(&self.nothing).arg(agent());
        command.args(["record", "--frequency", "499"]).args(options);
        command.args(["--", "chroot"]).arg(&self.root).arg(program).args(arguments);
        command.env_remove("SSL_CERT_FILE").envs(certificates.map(|file| ("SSL_CERT_FILE", file)));
        let outcome = run(&mut command);
        assert!(outcome.status.success(), "{}", stderr(&outcome));
        outcome
    }
}

fn check(command: &mut Command) -> String {
    let outcome = run(command);
    assert!(outcome.status.success(), "{command:?}: {}", stderr(&outcome));
    stdout(&outcome)
}

/// The share of a program's user frames that have names, weighed by samples, and what has none.
fn named(outcome: &Output, program: &str) -> (f64, Vec<(String, u64)>) {
    let comm = program.rsplit('/').next().unwrap_or(program);
    let (mut all, mut nameless) = (0, std::collections::BTreeMap::<String, u64>::new());
    for stack in folded(&stdout(outcome)).iter().filter(|stack| stack.frames[0].starts_with(comm)) {
        for frame in stack.frames[1..].iter().filter(|frame| !frame.ends_with("_[k]")) {
            if frame.starts_with("[incomplete") {
                continue;
            }
            all += stack.count;
            if frame.contains("+0x") || frame.starts_with('[') {
                *nameless.entry(frame.clone()).or_default() += stack.count;
            }
        }
    }
    assert!(all > 1000, "{program}: only {all} frames: {}", stderr(outcome));
    let missing: u64 = nameless.values().sum();
    let mut nameless: Vec<_> = nameless.into_iter().collect();
    nameless.sort_unstable_by_key(|&(_, count)| std::cmp::Reverse(count));
    nameless.truncate(10);
    (100.0 - 100.0 * missing as f64 / all as f64, nameless)
}

/// A running debuginfod.
struct Server {
    _process: Background,
    url: String,
}

impl Server {
    /// Starts one that serves the folders, and waits until it has the files of these programs.
    fn start(scratch: &Path, folders: &[&Path], programs: &[PathBuf]) -> Self {
        let port = free_port();
        let log = File::create(scratch.join("debuginfod.log")).expect("a file");
        let mut command = Command::new("debuginfod");
        command.args(["--scan-file-dir", "--disable-source-scan", "--port", &port.to_string(), "--database"]);
        command.arg(scratch.join("debuginfod.sqlite")).args(folders);
        // It would ask others for what it does not have.
        command.env_remove("DEBUGINFOD_URLS").stdout(Stdio::null()).stderr(log);
        let process = Background(command.spawn().expect("debuginfod is installed"));
        for program in programs {
            let path = format!("/buildid/{}/debuginfo", build_id(program));
            eventually(&path, GUARD, || has_page(port, &path).then_some(()));
        }
        Self { _process: process, url: format!("http://127.0.0.1:{port}") }
    }
}

fn build_id(file: &Path) -> String {
    let notes = check(Command::new("readelf").arg("--notes").arg(file));
    let id = notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: "));
    id.unwrap_or_else(|| panic!("{} has no build ID", file.display())).to_owned()
}

/// Whether a server has a page, which may be large.
fn has_page(port: u16, path: &str) -> bool {
    let mut status = [0; 12];
    let mut ask = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        stream.read_exact(&mut status)
    };
    ask().is_ok() && &status[9..] == b"200"
}

/// A distribution's Python, a C++ and a Rust program, all stripped: 99 of 100 frames have names with a server, most have
/// none without (but for the functions that Python lets modules call), and what was fetched once is there when the server is
/// gone.
#[test]
fn stripped_programs_are_named_by_a_server() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("debuginfod");
    let Some(system) = System::make(&folder) else { return };
    let python = system.python();
    // What programs tell of themselves, most percent of frames.
    let programs: [(&str, &[&str], f64); 3] = [
        (&python, &["-S", "-c", PYTHON, SECONDS], 80.0),
        ("/shapes-cpp", &["chain", SECONDS], 20.0),
        ("/shapes-rust", &[SECONDS], 20.0),
    ];
    let paths = [&python, "/shapes-cpp", "/shapes-rust", "/lib/x86_64-linux-gnu/libc.so.6"]
        .map(|path| fs::canonicalize(system.root.join(&path[1..])).expect("a program"));
    let debug = workspace().join("target/distribution/debug");
    let server = Server::start(&folder, &[&debug, &system.debug], &paths);
    let cache = folder.join("cache");
    let cache = cache.to_string_lossy();
    let url = server.url.clone();
    let with_server = ["--output", "-", "--debuginfod-url", &url, "--debuginfod-cache", &cache];
    for (program, arguments, exported) in programs {
        let without = named(&system.record(&["--output", "-"], program, arguments), program).0;
        let outcome = system.record(&with_server, program, arguments);
        let (with, nameless) = named(&outcome, program);
        println!("{program}: {without:.1} % of frames have names without a server, {with:.2} % with one");
        assert!(with >= 99.0, "{program}: {nameless:?} {}", stderr(&outcome));
        assert!(without < exported, "{program} is not stripped");
    }
    drop(server);
    for (program, arguments, _) in programs {
        let outcome = system.record(&with_server, program, arguments);
        let (with, nameless) = named(&outcome, program);
        println!("{program}: {with:.2} % from what was kept, with the server gone");
        assert!(with >= 99.0, "{program}: {nameless:?} {}", stderr(&outcome));
    }
}

/// What a server behind TLS is made of here: a file of Python's standard library, as many sites have it.
const TLS_SERVER: &str = "
import http.server, ssl, sys
folder, certificate, key = sys.argv[1:]
handler = lambda *given: http.server.SimpleHTTPRequestHandler(*given, directory=folder)
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
server.socket = context.wrap_socket(server.socket, server_side=True)
print('port', server.server_port, flush=True)
server.serve_forever()
";

/// Certificates are checked: what a trusted server sends is used, and nothing is asked of another.
#[test]
fn servers_have_to_be_trusted() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("debuginfod-tls");
    let Some(system) = System::make(&folder) else { return };
    let (certificate, key) = (folder.join("certificate.pem"), folder.join("key.pem"));
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]);
    make.args(["subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE", "-out"]);
    check(make.arg(&certificate).arg("-keyout").arg(&key));
    let page = folder.join("pages/buildid").join(build_id(&system.root.join("shapes-rust")));
    fs::create_dir_all(&page).expect("a folder");
    fs::copy(system.debug.join("shapes-rust.debug"), page.join("debuginfo")).expect("a copy");
    let log = File::create(folder.join("server.log")).expect("a file");
    let mut command = Command::new("python3");
    command.args(["-c", TLS_SERVER]).arg(folder.join("pages")).arg(&certificate).arg(&key);
    let mut server = Background(command.stdout(Stdio::piped()).stderr(log).spawn().expect("Python"));
    let port = server.wait_for_line("port").split_whitespace().last().expect("a port").to_owned();
    let url = format!("https://localhost:{port}");
    let cache = folder.join("cache");
    let cache = cache.to_string_lossy();
    let options = ["--output", "-", "--debuginfod-url", &url, "--debuginfod-cache", &cache];
    let distrusting = system.record(&options, "/shapes-rust", &[SECONDS]);
    let (without, _) = named(&distrusting, "/shapes-rust");
    let trusting = system.record_trusting(Some(&certificate), &options, "/shapes-rust", &[SECONDS]);
    let (with, nameless) = named(&trusting, "/shapes-rust");
    println!("TLS: {without:.1} % of frames have names from a server that is not trusted, {with:.2} % if it is");
    // (It has nothing of the C library, which has three frames in most stacks.)
    assert!(with >= 90.0, "{nameless:?} {}", stderr(&trusting));
    assert!(without < 20.0);
}

/// A server that accepts and never answers: the recording ends, the books balance, and frames say what they wait for.
#[test]
fn a_server_that_hangs_delays_nothing() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("debuginfod-hangs");
    let Some(system) = System::make(&folder) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://user:secret@{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || listener.incoming().collect::<Vec<_>>());
    let (cache, output) = (folder.join("cache"), folder.join("hangs.otlp"));
    let (cache, file) = (cache.to_string_lossy(), output.to_string_lossy());
    let options = ["--log-level", "debug", "--output", &file, "--debuginfod-url", &url, "--debuginfod-cache", &cache];
    let begin = Instant::now();
    let outcome = system.record(&options, "/shapes-cpp", &["chain", SECONDS]);
    println!("recorded in {:.1} s", begin.elapsed().as_secs_f64());
    assert!(begin.elapsed() < GUARD);
    assert!(!stderr(&outcome).contains("secret"), "{}", stderr(&outcome));
    let books = books(&outcome);
    assert_eq!(books.seen, books.exported + books.lost);
    let reasons = nameless_reasons(&output);
    println!("why frames have no names: {reasons:?}");
    assert!(reasons.contains("debug file pending"), "{reasons:?}");
}

/// Why frames of an OTLP recording have no names.
fn nameless_reasons(file: &Path) -> HashSet<String> {
    let bytes = fs::read(file).expect("a recording");
    let dictionary = ExportProfilesServiceRequest::decode(&*bytes).expect("OTLP").dictionary.expect("a dictionary");
    let key = dictionary.string_table.iter().position(|text| text == "profiler.frame.nameless");
    let Some(key) = key.and_then(|key| i32::try_from(key).ok()) else { return HashSet::new() };
    let values = dictionary.attribute_table.iter().filter(|attribute| attribute.key_strindex == key);
    let values = values.filter_map(|attribute| match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        _ => None,
    });
    values.collect()
}

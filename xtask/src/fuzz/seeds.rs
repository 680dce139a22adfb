//! What fuzzing starts from: pieces of this machine's files, and of a small program made for it.
//!
//! In: a folder. Out: `seeds/TARGET/NAME` in it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    Outcome,
    process::{output, run},
};

/// A program that has a bit of everything and fits into two kilobytes.
const PROGRAM: &str = "\
int depth;
__attribute__((noinline)) int down(int *by) { int room[40]; room[depth & 31] = *by; depth++; return room[*by & 31]; }
void _start(void) { for (int by = 3; by > 0; by = down(&by)) { } __builtin_trap(); }
";
/// One with functions that are inlined in others.
const INLINED: &str = "\
int depth, room[40];
static inline __attribute__((always_inline)) int inner(int by) { return room[by & 31] + depth; }
static inline __attribute__((always_inline)) int outer(int by) { depth += by; return inner(by) * inner(by + 1); }
void _start(void) { for (int by = 3; by > 0; by = outer(by)) { } __builtin_trap(); }
";
/// Files with rows, names and code that compilers wrote.
const LIBRARIES: [&str; 2] = ["/lib/x86_64-linux-gnu/libc.so.6", "/usr/lib/x86_64-linux-gnu/libstdc++.so.6"];
/// Bytes of a large section that are taken.
const PIECE: usize = 400;

/// Makes the seeds of every target.
pub(super) fn make(folder: &Path) -> Outcome {
    let seeds = Seeds { folder: folder.join("seeds") };
    let program = compile(folder, "program", PROGRAM, &["-fasynchronous-unwind-tables"])?;
    let debug_program = compile(folder, "debug-program", PROGRAM, &["-fno-asynchronous-unwind-tables", "-g1"])?;
    let file = fs::read(&program).map_err(|error| format!("{}: {error}", program.display()))?;
    let lines = compile(folder, "lines-program", INLINED, &["-g2", "-fno-asynchronous-unwind-tables"])?;
    let file_with_lines = fs::read(&lines).map_err(|error| format!("{}: {error}", lines.display()))?;
    let text = address(&lines, ".text").unwrap_or_default();
    let addresses = halves(&[text, text + 16, text + 32, text + 48]);
    seeds.add("debug_info", "program", &[addresses, file_with_lines].concat())?;
    for target in ["elf", "executable"] {
        seeds.add(target, "program", &file)?;
    }
    let code = address(&program, ".text").unwrap_or_default();
    seeds.add("symbols", "program", &[halves(&[code, code + 16, code + 32, code + 48]), file.clone()].concat())?;
    let section_of = |program: &Path, name: &str| {
        section(program, name, folder).ok_or_else(|| format!("{} has no {name}", program.display()))
    };
    let (eh_frame, text) = (section_of(&program, ".eh_frame")?, section_of(&program, ".text")?);
    let debug_frame = section_of(&debug_program, ".debug_frame")?;
    seeds.add("eh_frame", "program", &[&[0; 16], &eh_frame[..]].concat())?;
    seeds.add("debug_frame", "program", &debug_frame)?;
    seeds.add("guessed_code", "program", &[&[0; 12], &text[..]].concat())?;
    for (index, library) in LIBRARIES.iter().map(Path::new).filter(|library| library.is_file()).enumerate() {
        let name = format!("library{index}");
        let piece = |part: &str| -> Vec<u8> {
            section(library, part, folder).unwrap_or_default().into_iter().take(PIECE).collect()
        };
        seeds.add("eh_frame", &name, &[&[0; 16], &piece(".eh_frame")[..]].concat())?;
        seeds.add("guessed_code", &name, &[&[0; 12], &piece(".text")[..]].concat())?;
        let symbols = output(Command::new("nm").arg("-D").arg(library)).unwrap_or_default();
        let names = symbols.lines().filter_map(|line| line.split_ascii_whitespace().last()).step_by(40).take(100);
        for (number, symbol) in names.enumerate() {
            seeds.add("demangle", &format!("{name}-{number}"), symbol.as_bytes())?;
        }
    }
    let rust = ["_RNvCs1234_7mycrate3foo", "_RNvMs_Cs4_3fooINtB4_3BarINtNtCs5_4core6option6OptionmEE3new"];
    for (number, symbol) in rust.into_iter().enumerate() {
        seeds.add("demangle", &format!("rust-{number}"), symbol.as_bytes())?;
    }
    for (number, table) in [go_table_1_18(), go_table_1_2()].iter().enumerate() {
        seeds.add("go_table", &number.to_string(), table)?;
        seeds.add("go_lines", &number.to_string(), &[&[16][..], &[0; 16], table].concat())?;
        let parts = [(".text", 0x1000, 1, &text[..]), (".gopclntab", 0x9000, 0, table)];
        seeds.add("sections", &format!("go-{number}"), &sections(&parts))?;
    }
    let place = |program: &Path, name: &str| address(program, name).unwrap_or_default();
    let parts = [
        (".text", place(&program, ".text"), 1, &text[..]),
        (".eh_frame", place(&program, ".eh_frame"), 0, &eh_frame),
        (".plt", 0x800, 1, &[0; 64]),
    ];
    seeds.add("sections", "eh_frame", &sections(&parts))?;
    let parts = [(".text", place(&debug_program, ".text"), 1, &text[..]), (".debug_frame", 0, 0, &debug_frame)];
    // The second piece of code begins in the first, and has a signal trampoline there.
    let trampoline = [&[0x53, 0x50, 0x58, 0x5b, 0xc3][..], &[0xcc; 11], &[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 5]];
    let trampoline = [&trampoline.concat()[..], &[0x90; 64]].concat();
    let overlapping = [(".text", 0x1_0000, 1, &[0x53, 0xc3].repeat(32)[..]), (".init", 0x1_0020, 1, &trampoline)];
    seeds.add("sections", "overlapping", &sections(&overlapping))?;
    seeds.add("sections", "debug_frame", &sections(&parts))?;
    seeds.add("btf", "struct", &btf())?;
    for name in ["maps", "stat"] {
        let text = fs::read(format!("/proc/self/{name}")).map_err(|error| format!("/proc/self/{name}: {error}"))?;
        for (number, line) in text.split(|&byte| byte == b'\n').enumerate() {
            seeds.add("proc_text", &format!("{name}-{number}"), line)?;
        }
    }
    let settings =
        "sampling:\n  frequency: 49\nunwind:\n  table_mib: 8\nexport:\n  window: 1m\nstatus:\n  listen: 127.0.0.1:1\n";
    seeds.add("config", "settings", settings.as_bytes())?;
    let servers = "symbolize:\n  debuginfod:\n    urls: ['https://a:b@c:1/d']\n    cache: /e\n    cache_mib: 16\n";
    seeds.add("config", "servers", servers.as_bytes())?;
    let destinations = "export:\n  destinations:\n    - {endpoint: 'https://c:1', name: d, headers: {e: f}, timeout: 9s, \
                        protocol: grpc, tls: {ca_file: g}}\n  spool: {folder: /h}\n";
    seeds.add("config", "destinations", destinations.as_bytes())?;
    let schedule = "schedule:\n  every: 1m\n  collect: 9s\n  nodes: {of: 20, member: a-1}\n  \
                    replicas: {of: 3}\n  probability: 0.5\n";
    seeds.add("config", "schedule", schedule.as_bytes())?;
    let rule = "{name: a, memory_growth: 64, for: 9s, capture: {duration: 9s, frequency: 49, event: both}}";
    seeds.add("config", "capture", format!("capture:\n  cooldown: 9s\n  rules:\n    - {rule}\n").as_bytes())?;
    let request =
        r#"{"scope":{"pids":[1],"containers":["a*"]},"capture":{"duration":"9s","event":"both"},"reason":"b"}"#;
    seeds.add("capture_request", "process", request.as_bytes())?;
    let scope =
        "scope:\n  include: [{executables: [a*], cgroups: [/b]}]\n  exclude: [{pids: [1]}, {containers: [c]}]\n";
    seeds.add("config", "scope", scope.as_bytes())?;
    let texts = ["a*e", "/bin/app", "/kubepods/pod1", "0123456789ab", "shop", "front"];
    let texts: Vec<u8> = texts.iter().flat_map(|text| [&[text.len() as u8], text.as_bytes()].concat()).collect();
    seeds.add("scope", "texts", &texts)?;
    seeds.add("pod", "deployment", &[b"\xff", POD.as_bytes()].concat())?;
    seeds.add("pod", "static", &[b"\x07", STATIC_POD.as_bytes()].concat())?;
    answers(&seeds)?;
    records(&seeds)
}

/// A list of a pod that a Deployment made, whose container was restarted.
const POD: &str = r#"{"metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":"a-5d-x","namespace":"n","uid":"u",
"labels":{"pod-template-hash":"5d","app.kubernetes.io/name":"b"},"annotations":{"resource.opentelemetry.io/service.name":"c"},
"ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"a-5d","controller":true}]},
"spec":{"containers":[{"name":"d","image":"r:1/i:2@sha256:0"}]},"status":{"containerStatuses":[{"name":"d",
"containerID":"x://1","imageID":"r/i@sha256:0","lastState":{"terminated":{"containerID":"x://2"}}}]}}]}"#;

/// A list of a static pod, and of one that a CronJob's Job made.
const STATIC_POD: &str = r#"{"items":[{"metadata":{"uid":"u","annotations":{"kubernetes.io/config.hash":"h"},
"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":"n"}]},"status":{"initContainerStatuses":[{"name":"d",
"containerID":"x://1","imageID":"sha256:0"}]}},{"metadata":{"uid":"v","ownerReferences":[{"apiVersion":"batch/v1",
"kind":"Job","name":"j-12345678"}]}}],"metadata":{"resourceVersion":"1"}}"#;

/// What receivers answer: protocol, status, six headers, trailers of gRPC, and a body.
fn answers(seeds: &Seeds) -> Outcome {
    let answer = |kind: u8, status: u32, headers: &[[&str; 6]], body: &[u8]| {
        let mut bytes = vec![kind];
        bytes.extend(status.to_le_bytes());
        for header in headers.iter().flatten() {
            bytes.push(header.len() as u8);
            bytes.extend(header.as_bytes());
        }
        bytes.extend(body);
        bytes
    };
    // A partial success: one profile, and why.
    let partial = [0x0a, 6, 0x08, 1, 0x12, 2, b'n', b'o'];
    seeds.add("otlp_answer", "http", &answer(0, 200, &[["application/x-protobuf", "", "", "", "", ""]], &partial))?;
    let busy = [["text/plain; charset=utf-8", "", "Fri, 31 Dec 9999 23:59:59 GMT", "", "", ""]];
    seeds.add("otlp_answer", "http-busy", &answer(0, 503, &busy, b"come again"))?;
    let framed = [&[0, 0, 0, 0, partial.len() as u8][..], &partial].concat();
    let (headers, end) = (["application/grpc", "", "", "", "", ""], ["", "", "", "0", "", ""]);
    seeds.add("otlp_answer", "grpc", &answer(3, 200, &[headers, end], &framed))?;
    // `google.rpc.Status` with a `RetryInfo` of nine seconds.
    let details = "GjAKKHR5cGUuZ29vZ2xlYXBpcy5jb20vZ29vZ2xlLnJwYy5SZXRyeUluZm8SBAoCCAk";
    let busy = ["application/grpc", "", "", "8", "too%20fast", details];
    seeds.add("otlp_answer", "grpc-busy", &answer(1, 200, &[busy], b""))
}

/// Seeds of records, whose numbers mean little.
fn records(seeds: &Seeds) -> Outcome {
    // Process and thread, start, length, offset, device, inode.
    seeds.add("mmap_record", "file", &halves(&[7, 8, 0x1000, 0, 0x2000, 0, 0x3000, 0, 0xfe, 1, 99, 0]))?;
    // Count, process, two names, a kernel frame and two user frames of an on-CPU sample that ends at the root.
    let mut sample = halves(&[1, 0, 7, 0, 8, 0]);
    sample.extend(b"name\0\0\0\0\0\0\0\0\0\0\0\0thread\0\0\0\0\0\0\0\0\0\0");
    sample.extend([1, 0, 2, 0, 1, 1, 0, 0]);
    sample.extend(halves(&[1, 2, 3, 4, 5, 6]));
    seeds.add("raw_sample", "two-frames", &sample)?;
    let mut told = Vec::new();
    for kind in 1..=5 {
        // A notice: kind, process, child.
        told.extend([4, 40]);
        told.extend(halves(&[kind, 0, 7, 1, 8, 0, 9, 1, 8, 0]));
    }
    // A mapping that nothing backs, a sample, what changed, and the end of a drain.
    told.extend([1, 7]);
    told.extend(halves(&[0x1000, 0x2000, 0, 0]));
    told.extend([0, 2, sample.len() as u8]);
    told.extend(&sample);
    told.extend([3, 0]);
    seeds.add("notices", "all", &told)?;
    let mut made = Vec::new();
    let (one, other) = ("a".repeat(64), "b".repeat(64));
    for (id, path) in [format!("/docker/{one}"), format!("/docker/{other}/docker/{one}")].iter().enumerate() {
        made.push(16 + path.len() as u8);
        made.extend(halves(&[id as u32 + 1, 0, 1, path.len() as u32]));
        made.extend(path.as_bytes());
    }
    made.push(16);
    made.extend(halves(&[1, 0, 2, 0]));
    seeds.add("cgroups", "nested", &made)?;
    let look = |number: u32| {
        format!(
            "usage_usec {0}000000\nnr_periods {0}00\nnr_throttled {0}0\nthrottled_usec {0}\ninactive_file {0}00000000\n\
             some avg10=1.00 total={0}000000\n{0}\n",
            number
        )
    };
    seeds.add("cgroup_usage", "second", (1..4).map(look).collect::<Vec<_>>().join("\0").as_bytes())?;
    seeds.add(
        "cgroup_usage",
        "first",
        b"nr_periods 5\nnr_throttled 4\nthrottled_time 9\n\x00123456789 987654321 12\n",
    )?;
    seeds.add("perf_map", "lines", b"\x08\x01\x10\x40100 20 one\n0x110 8 two\n7f0000001000 1f three (x.js:1)\n")?;
    seeds.add("jitdump", "records", &jitdump())?;
    seeds.add("redact", "source", b"\x06/opt/*JS:*spin file:///opt/x.js:3:14")?;
    seeds.add("redact", "log", b"\x09/srv/a.so/srv/a.so: no symbols")?;
    seeds.add("mappings", "overlapping", &[0, 60, 0, 0, 10, 10, 5, 1, 15, 20, 1, 2, 5, 8, 2, 1])?;
    seeds.add("spool", "request", &stored_request())?;
    let mut table = halves(&[0x1000, 0x4_0000]);
    table.extend([100, 0, 0, 0, 2, 8, 0, 0, 3, 0, 0, 1, 4, 0, 0, 2, 0, 1, 0, 0, 5]);
    seeds.add("table", "pages", &table)?;
    // Registers, no saved one, eight rules, memory.
    let mut walk: Vec<u8> = (0..21u64).flat_map(|word| (0x7000 + 8 * word).to_le_bytes()).collect();
    walk.extend([0, 8]);
    for kind in 0..8 {
        walk.extend([kind, kind % 4, 0, 0, 16, 0, 0, 0, 0xf0, 0xff, 3, 0]);
    }
    walk.extend((0..32u64).flat_map(|word| (0x7100 + 16 * word).to_le_bytes()));
    seeds.add("unwind_step", "rules", &walk)
}

/// Where seeds go.
struct Seeds {
    folder: PathBuf,
}

impl Seeds {
    fn add(&self, target: &str, name: &str, bytes: &[u8]) -> Outcome {
        let folder = self.folder.join(target);
        let path = folder.join(name);
        let write = || fs::create_dir_all(&folder).and_then(|()| fs::write(&path, bytes));
        write().map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// Compiles the small program, with tables as the flags say.
fn compile(folder: &Path, name: &str, program: &str, tables: &[&str]) -> Result<PathBuf, String> {
    let (source, path) = (folder.join("program.c"), folder.join(name));
    fs::write(&source, program).map_err(|error| format!("{}: {error}", source.display()))?;
    run(Command::new("gcc")
        .args(["-Os", "-nostdlib", "-static", "-fno-ident", "-fcf-protection=none"])
        .args(tables)
        .args(["-Wl,--nmagic,--build-id=sha1,-Ttext-segment=0x10000", "-o"])
        .arg(&path)
        .arg(&source))?;
    Ok(path)
}

/// The contents of a section.
fn section(file: &Path, name: &str, folder: &Path) -> Option<Vec<u8>> {
    let contents = folder.join("section");
    // What an earlier call left.
    let _ = fs::remove_file(&contents);
    let dump = format!("{name}={}", contents.display());
    output(Command::new("objcopy").arg("--dump-section").arg(dump).arg(file).arg(folder.join("copy")))?;
    fs::read(contents).ok()
}

/// The address of a section, as `readelf` prints it after the section's name and type.
fn address(file: &Path, name: &str) -> Option<u32> {
    let sections = output(Command::new("readelf").args(["--sections", "--wide"]).arg(file))?;
    let (_, line) = sections.split_once(&format!(" {name} "))?;
    u32::from_str_radix(line.split_ascii_whitespace().nth(1)?, 16).ok()
}

/// An input of the target `sections`: name, address, flags and contents of some of them.
fn sections(parts: &[(&str, u32, u8, &[u8])]) -> Vec<u8> {
    const NAMES: [&str; 10] = [
        ".text",
        ".init",
        ".eh_frame",
        ".debug_frame",
        ".gopclntab",
        ".plt",
        ".plt.sec",
        ".data",
        ".rela.dyn",
        ".symtab",
    ];
    let mut bytes = 0x1000u32.to_le_bytes().to_vec();
    let parts = NAMES
        .map(|name| parts.iter().find(|part| part.0 == name).map_or((0, 0, &[][..]), |part| (part.1, part.2, part.3)));
    for (address, flags, contents) in parts {
        bytes.extend(address.to_le_bytes());
        bytes.extend((contents.len() as u16).to_le_bytes());
        bytes.push(flags);
    }
    bytes.extend(parts.iter().flat_map(|part| part.2));
    bytes
}

/// Names and stack depths of two functions of a Go program: up by 1 for 4 bytes, up by 24 for 12, down by 24 for 16.
const GO_NAMES: &[u8] = b"main.main\0runtime.goexit.abi0\0";
const GO_DEPTHS: &[u8] = &[2, 4, 48, 12, 47, 16, 0, 0];

fn words(words: &[usize]) -> Vec<u8> {
    words.iter().flat_map(|&word| (word as u64).to_le_bytes()).collect()
}

fn halves(halves: &[u32]) -> Vec<u8> {
    halves.iter().flat_map(|half| half.to_le_bytes()).collect()
}

/// A table as Go 1.18 and later write it.
fn go_table_1_18() -> Vec<u8> {
    const HEADER: usize = 8 + 8 * 8;
    let depths = HEADER + GO_NAMES.len();
    let functions = depths + GO_DEPTHS.len();
    let mut bytes = vec![0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8];
    bytes.extend(words(&[2, 0, 0x1000, HEADER, 0, 0, depths, functions]));
    bytes.extend(GO_NAMES.iter().chain(GO_DEPTHS));
    bytes.extend(halves(&[0, 24, 0x20, 44, 0x40, 0]));
    bytes.extend(halves(&[0, 0, 0, 0, 0, 0, 10, 0, 0, 0]));
    bytes
}

/// A table as Go 1.2 to 1.15 write it.
fn go_table_1_2() -> Vec<u8> {
    const FUNCTIONS: usize = 16;
    const RECORD: usize = FUNCTIONS + 24;
    let mut bytes = vec![0xfb, 0xff, 0xff, 0xff, 0, 0, 1, 8];
    bytes.extend(words(&[1, 0x1000, RECORD, 0x1020]));
    bytes.extend(words(&[0x1000]));
    let names = RECORD + 24;
    bytes.extend(halves(&[names as u32, 0, 0, (names + GO_NAMES.len()) as u32]));
    bytes.extend(GO_NAMES.iter().chain(GO_DEPTHS));
    bytes
}

/// A stored request of 16 bytes, but for its checksums: the target makes them right.
fn stored_request() -> Vec<u8> {
    // Text twice, as gzip writes it.
    let deflated = [0x2b, 0x28, 0xca, 0x4f, 0xcb, 0xcc, 0x49, 0x55, 0x28, 0x80, 0xd2, 0];
    let compressed = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3], &deflated[..], &[0xcb, 0xe8, 0x22, 0xaf, 16, 0, 0, 0]];
    let compressed = compressed.concat();
    let mut bytes = b"OTLPSPL\x01".to_vec();
    // Two checksums, two lengths, profiles, samples, time off the CPU, and when the window was closed.
    bytes.extend(halves(&[0, 0, compressed.len() as u32, 16, 1, 7, 0, 8, 0, 9, 0]));
    bytes.extend(compressed);
    bytes
}

/// A jitdump of a function that is made, another that takes a part of its place, and a move of the first.
fn jitdump() -> Vec<u8> {
    let mut bytes = vec![7, 64, 1, 200];
    bytes.extend(halves(&[0x4a69_5444, 1, 40, 62, 0, 7, 1, 0, 0, 0]));
    for (address, name) in [(0x1000, b"one\0"), (0x1008, b"two\0")] {
        // Kind, length, time, process, thread, two addresses, size, number.
        bytes.extend(halves(&[0, 76, 1, 0, 7, 7, address, 0, address, 0, 16, 0, 1, 0]));
        bytes.extend(name);
        bytes.extend([0xcc; 16]);
    }
    bytes.extend(halves(&[2, 24, 1, 0, 0, 0]));
    bytes.extend(halves(&[1, 64, 1, 0, 7, 7, 0x2000, 0, 0x1000, 0, 0x2000, 0, 8, 0, 1, 0]));
    bytes.extend(halves(&[3, 16, 1, 0]));
    bytes
}

/// Type information of a struct with a member in an unnamed union.
fn btf() -> Vec<u8> {
    let strings = b"\0task_struct\0stack\0b\0a\0bpf_loop\0";
    let types = [
        1,
        4 << 24 | 2,
        16,
        13,
        0,
        0,
        0,
        2,
        64, // struct task_struct { stack; union; }
        0,
        5 << 24 | 1,
        8,
        19,
        0,
        32, // union { b; }
        21,
        4 << 24 | 1,
        8,
        0,
        2,
        0, // struct a { union; }
        23,
        12 << 24,
        0, // function bpf_loop
        0,
        1 << 24,
        4,
        32, // an integer
    ];
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    bytes.extend(halves(&[24, 0, types.len() as u32 * 4, types.len() as u32 * 4, strings.len() as u32]));
    bytes.extend(halves(&types));
    bytes.extend(strings);
    bytes
}

//! Programs that run, in files that lie: the agent ends in time and in peace, within its memory, and names what is
//! honest.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use profiler_tests::{
    Background, ask_within, kernel_is_usable, peak_memory, record,
    recorded::{Sample, samples},
    run, scratch, stderr, workspace,
};

const MIB: u64 = 1 << 20;
/// Most memory the agent may take, whatever it is given: 64 MiB are for names, and about as much, for a moment, is taken
/// by the unwind table of one file that is being built.
const MOST_RESIDENT_MIB: u64 = 192;
/// How long it may take to name and write the recording, once it is asked to end; a hang guard.
const END: Duration = Duration::from_secs(60);
/// Longest name that is written, bytes.
const MAX_NAME: usize = 1024;
/// A symbol's type: a function of every other file, too.
const FUNCTION: u8 = 0x12;

/// A section header, as a file states it.
#[derive(Clone, Copy, Default)]
struct Section {
    name: &'static str,
    kind: u32,
    flags: u64,
    address: u64,
    offset: u64,
    size: u64,
    link: u32,
}

impl Section {
    const SYMBOLS: u32 = 2;
    const STRINGS: u32 = 3;
    const CONTENTS: u32 = 1;
    const DYNAMIC_SYMBOLS: u32 = 11;
    const EXECUTABLE: u64 = 4;
    const COMPRESSED: u64 = 1 << 11;
}

/// An executable without sections that is given others.
struct Forged {
    path: PathBuf,
    bytes: Vec<u8>,
    sections: Vec<Section>,
    /// Stated address and bytes of its code.
    code: (u64, u64),
}

impl Forged {
    /// A copy of an executable; its first section is the code.
    fn new(program: &Path, name: &str) -> Self {
        let bytes = fs::read(program).expect("a program");
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let headers = (0..usize::from(bytes[56])).map(|index| word(32) as usize + 56 * index);
        // PT_LOAD that may be executed: type and flags are the first two words.
        let code = headers.filter(|&at| bytes[at] == 1 && bytes[at + 4] & 1 != 0);
        let code = code.map(|at| (word(at + 16), word(at + 40))).next().expect("code");
        let mut forged = Self { path: program.with_file_name(name), bytes, sections: vec![Section::default()], code };
        let (kind, flags) = (Section::CONTENTS, Section::EXECUTABLE);
        forged.add(Section { name: ".text", kind, flags, address: code.0, size: code.1, ..Section::default() });
        forged
    }

    /// Adds a section that is somewhere else, or nowhere. Returns its number.
    fn add(&mut self, section: Section) -> u32 {
        self.sections.push(section);
        self.sections.len() as u32 - 1
    }

    /// Appends contents, and a section of them.
    fn append(&mut self, section: Section, contents: &[u8]) -> u32 {
        let (offset, size) = (self.bytes.len() as u64, contents.len() as u64);
        self.bytes.extend_from_slice(contents);
        self.add(Section { offset, size, ..section })
    }

    /// A symbol table and its names, of which every place may be one.
    fn symbols(&mut self, symbols: &[u8], names: &[u8]) {
        let link = self.append(Section { name: ".strtab", kind: Section::STRINGS, ..Section::default() }, names);
        self.append(Section { name: ".symtab", kind: Section::SYMBOLS, link, ..Section::default() }, symbols);
    }

    /// A symbol of the code.
    fn symbol(name: u32, address: u64, size: u64) -> [u8; 24] {
        let mut symbol = [0; 24];
        symbol[..4].copy_from_slice(&name.to_le_bytes());
        (symbol[4], symbol[6]) = (FUNCTION, 1);
        symbol[8..16].copy_from_slice(&address.to_le_bytes());
        symbol[16..].copy_from_slice(&size.to_le_bytes());
        symbol
    }

    /// Writes the file; `claim`: how many sections it says it has.
    fn write(mut self, claim: Option<u16>) -> PathBuf {
        let mut names = vec![0];
        let places: Vec<u32> = self
            .sections
            .iter()
            .map(|section| {
                let place = names.len() as u32;
                names.extend(section.name.bytes().chain([0]));
                place
            })
            .chain([0])
            .collect();
        let last = self.append(Section { kind: Section::STRINGS, ..Section::default() }, &names);
        let table = self.bytes.len() as u64;
        for (section, name) in self.sections.iter().zip(places) {
            let Section { kind, flags, address, offset, size, link, .. } = *section;
            let words = [u64::from(name) | u64::from(kind) << 32, flags, address, offset, size, u64::from(link), 1, 24];
            self.bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        let count = claim.unwrap_or(self.sections.len() as u16);
        self.bytes[40..48].copy_from_slice(&table.to_le_bytes());
        self.bytes[58..60].copy_from_slice(&64u16.to_le_bytes());
        self.bytes[60..62].copy_from_slice(&count.to_le_bytes());
        self.bytes[62..64].copy_from_slice(&(last as u16).to_le_bytes());
        // (In place, so that it may be executed.)
        fs::copy(self.path.with_file_name("stripped"), &self.path).expect("a copy");
        fs::write(&self.path, &self.bytes).expect("a program");
        self.path
    }
}

/// Numbers that look random.
fn noise(bytes: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

/// Compresses a GiB of zeros.
const DEFLATE: &str = "import sys, zlib; sys.stdout.buffer.write(zlib.compress(bytes(1 << 30), 1))";

/// Call frame information, for either section, of so many functions of 64 bytes.
fn frames(start: u64, count: u64, is_debug: bool) -> Vec<u8> {
    // A common entry (version 1, no augmentation), then functions that change their frame with every byte.
    let id = if is_debug { u32::MAX } else { 0 };
    let mut frames = [12, id].map(u32::to_le_bytes).concat();
    frames.extend([1, 0, 1, 0x78, 16, 0x0c, 7, 8]);
    for index in 0..count {
        let place = frames.len() as u32 + 4;
        frames.extend([36, if is_debug { 0 } else { place }].map(u32::to_le_bytes).concat());
        frames.extend([start + index * 64, 64].map(u64::to_le_bytes).concat());
        frames.extend([0x41, 0x0e, 16, 0x41, 0x0e, 24, 0x41, 0x0e, 32, 0x41, 0x0e, 40, 0x41, 0x0e, 48, 0]);
    }
    frames
}

/// A table of Go 1.18 with a million functions that are nowhere.
fn go_table(bytes: u64) -> Vec<u8> {
    let mut table = noise(bytes);
    let words = [1_000_000u64, 1, 0x40_1000, 72, 72, 72, 72, 72];
    table[..8].copy_from_slice(&[0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8]);
    table[8..72].copy_from_slice(&words.map(u64::to_le_bytes).concat());
    for index in 0..1_000_001usize {
        let at = 72 + 8 * index;
        table[at..at + 4].copy_from_slice(&(index as u32 * 16).to_le_bytes());
    }
    table
}

/// Every section that is looked for, each as `place` says.
fn everything(program: &Path, name: &str, place: impl Fn(u32) -> (u64, u64, u32)) -> PathBuf {
    let mut forged = Forged::new(program, name);
    let kinds = [
        (".symtab", Section::SYMBOLS),
        (".dynsym", Section::DYNAMIC_SYMBOLS),
        (".strtab", Section::STRINGS),
        (".gnu_debugdata", Section::CONTENTS),
        (".gopclntab", Section::CONTENTS),
        (".go.module", Section::CONTENTS),
        (".eh_frame", Section::CONTENTS),
        (".debug_frame", Section::CONTENTS),
        (".debug_info", Section::CONTENTS),
        (".debug_line", Section::CONTENTS),
        (".debug_abbrev", Section::CONTENTS),
        (".debug_str", Section::CONTENTS),
        (".gnu_debuglink", Section::CONTENTS),
        (".gnu_debugaltlink", Section::CONTENTS),
        (".plt", Section::CONTENTS),
        (".note.gnu.build-id", 7),
    ];
    for (name, kind) in kinds {
        let (offset, size, link) = place(forged.sections.len() as u32);
        let address = forged.code.0;
        forged.add(Section { name, kind, flags: Section::EXECUTABLE, address, offset, size, link });
    }
    forged.write(None)
}

/// Files with lies of one kind each.
fn forgeries(program: &Path) -> Vec<PathBuf> {
    let size = fs::metadata(program).expect("a program").len();
    let code = Forged::new(program, "").code;
    let whole = |name: u32| Forged::symbol(name, code.0, code.1);
    let with_symbols = |name, symbols: &[u8], names: &[u8], claim| {
        let mut forged = Forged::new(program, name);
        forged.symbols(symbols, names);
        forged.write(claim)
    };
    let numbered = |count: u32| (0..count).flat_map(|index| whole(1 + 2 * index)).collect::<Vec<_>>();
    // (Most symbols of noise are none of code.)
    let random_places: Vec<u8> = noise(8 * MIB)
        .chunks_exact(8)
        .flat_map(|word| {
            let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            Forged::symbol(word as u32, code.0 + word % code.1, word >> 40)
        })
        .collect();
    let nested = format!("\0_ZN{}E\0", "1a".repeat(8000));
    // A GiB of zeros, in 150 KiB.
    let bomb = run(Command::new("sh").args(["-c", "head -c 1G /dev/zero | xz -0 --stdout"])).stdout;
    let mut mini = Forged::new(program, "bomb");
    mini.append(Section { name: ".gnu_debugdata", kind: Section::CONTENTS, ..Section::default() }, &bomb);
    // (A million functions each, in code that is much less; more are refused at once.)
    let mut tables = Forged::new(program, "tables");
    tables.sections[1].size = 1 << 30;
    let section = |name| Section { name, kind: Section::CONTENTS, ..Section::default() };
    tables.append(section(".eh_frame"), &frames(code.0, 1_000_000, false));
    tables.append(section(".debug_frame"), &frames(code.0, 1_000_000, true));
    tables.append(section(".gopclntab"), &go_table(60 * MIB));
    let mut go_tables = Forged::new(program, "go-tables");
    go_tables.append(section(".gopclntab"), &go_table(60 * MIB));
    go_tables.append(section(".go.module"), &noise(15 * MIB));
    let mut compressed = Forged::new(program, "compressed");
    let header = [1u64, 1 << 40, 1].iter().flat_map(|word| word.to_le_bytes());
    let deflated = run(Command::new("python3").args(["-c", DEFLATE])).stdout;
    let contents: Vec<u8> = header.chain(deflated).collect();
    compressed.append(Section { flags: Section::COMPRESSED, ..section(".debug_frame") }, &contents);
    vec![
        tables.write(None),
        go_tables.write(None),
        compressed.write(None),
        everything(program, "huge", |_| (0, u64::MAX, u32::MAX)),
        everything(program, "beyond", |_| (u64::MAX - 8, 4096, 7)),
        everything(program, "overlapping", |own| (0, size, own)),
        everything(program, "loop", |own| (64, size - 64, own ^ 1)),
        with_symbols("garbage-100m", &noise(100 * MIB), &noise(MIB), None),
        with_symbols("garbage-90m", &noise(90 * MIB), &noise(MIB), None),
        with_symbols("garbage-20m", &random_places, &noise(MIB), None),
        with_symbols("headers", &whole(1), b"\0name\0", Some(u16::MAX)),
        with_symbols("aliases", &numbered(1_000_000), &b"\0a".repeat(1_000_100), None),
        with_symbols("too-many", &numbered(1_200_000), &b"\0a".repeat(1_200_100), None),
        with_symbols("endless", &numbered(1000), &vec![b'x'; 8 << 20], None),
        with_symbols("nested", &whole(1), nested.as_bytes(), None),
        with_symbols("control", &whole(1), b"\0a;b\n\x1b[31mc\0", None),
        with_symbols("no-text", &whole(1), b"\0a\xff\xfe\0", None),
        mini.write(None),
    ]
}

/// Stretches the notes of a program over a build ID of this many bytes.
fn with_build_id(program: &Path, name: &str, id: &[u8], claim: u32) -> PathBuf {
    let path = program.with_file_name(name);
    let mut bytes = fs::read(program).expect("a program");
    let place = bytes.len() as u64;
    for word in [4u32, claim, 3] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(b"GNU\0");
    bytes.extend(id);
    let table = u64::from_le_bytes(bytes[32..40].try_into().expect("8 bytes")) as usize;
    for at in
        (0..usize::from(bytes[56])).map(|index| table + 56 * index).filter(|at| bytes[*at] == 4).collect::<Vec<_>>()
    {
        bytes[at + 8..at + 16].copy_from_slice(&place.to_le_bytes());
        bytes[at + 32..at + 40].copy_from_slice(&(16 + id.len() as u64).to_le_bytes());
    }
    fs::copy(program, &path).expect("a copy");
    fs::write(&path, bytes).expect("a program");
    path
}

/// A program without libraries, and the same without symbols.
fn program(folder: &Path) -> (PathBuf, PathBuf) {
    let (honest, stripped) = (folder.join("honest"), folder.join("stripped"));
    let mut compile = Command::new("gcc");
    compile.args(["-O1", "-static", "-fno-optimize-sibling-calls", "-DPLACE=honest", "-o"]);
    let compiled = run(compile.arg(&honest).arg(workspace().join("tests/workloads/job.c")));
    assert!(compiled.status.success(), "{}", stderr(&compiled));
    assert!(run(Command::new("strip").arg("-o").arg(&stripped).arg(&honest)).status.success());
    (honest, stripped)
}

/// Records the programs together, checks what it costs, and that an honest one beside them has its names.
fn check(folder: &Path, honest: &Path, programs: &[PathBuf], debug_files: &str) -> Vec<Sample> {
    let recording = folder.join("hostile.otlp");
    let agent = record(&["--frequency", "499", "--duration", "60s", "--output"]);
    // The agent sees debug files of its own making, the rest of the machine does not.
    let script = format!("set -e; mount -t tmpfs none /usr/lib/debug; {debug_files} exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).arg(agent.get_program()).args(agent.get_args());
    let agent = Background::start(command.arg(&recording));
    std::thread::sleep(Duration::from_secs(2));
    let started: Vec<_> = programs
        .iter()
        .map(|program| Background::start(Command::new(program).arg("4")))
        .chain([Background::start(Command::new(honest).arg("4"))])
        .collect();
    for (program, path) in started.into_iter().zip(programs.iter().map(PathBuf::as_path).chain([honest])) {
        assert!(program.finish().status.success(), "{} does not run", path.display());
    }
    agent.signal(Signal::SIGINT);
    let asked = Instant::now();
    let mut most = 0;
    let mut agent = agent;
    let ended = ask_within(END, || {
        most = most.max(peak_memory(agent.pid()));
        agent.0.try_wait().expect("a child")
    });
    assert!(ended.is_some(), "the agent has not ended for {END:?}");
    let output = agent.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    println!("{}", stderr(&output).lines().last().unwrap_or_default());
    println!("ended in {:.1} s, {most} MiB resident at most", asked.elapsed().as_secs_f64());

    let samples = samples(&fs::read(&recording).expect("the recording"));
    for path in programs.iter().map(PathBuf::as_path).chain([honest]) {
        let name = path.file_name().expect("a name").to_string_lossy();
        let (mut named, mut nameless) = (0, 0);
        let mut example = None;
        for sample in samples.iter().filter(|sample| sample.process == name) {
            for frame in sample.frames.iter().filter(|frame| frame.kind == "native") {
                *if frame.name.is_some() { &mut named } else { &mut nameless } += sample.count;
                example = example.or(frame.name.as_ref().or(frame.nameless.as_ref()));
            }
        }
        let example: String = example.map(|text| text.chars().take(40).collect()).unwrap_or_default();
        println!("{name:16} {named:6} frames with names, {nameless:6} without: {example:?}");
        assert!(named + nameless > 5, "{name} was not seen");
        assert!(path != honest || nameless * 20 < named, "{nameless} honest frames have no name");
    }
    assert!(most <= MOST_RESIDENT_MIB, "{most} MiB");
    samples
}

/// Section headers and symbol tables that lie, in every way that somebody thought of.
#[test]
fn lying_sections_and_symbols() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("hostile-symbols");
    let (honest, stripped) = program(&folder);
    let samples = check(&folder, &honest, &forgeries(&stripped), "");
    // Names have nothing that a terminal would obey.
    let mut names = samples.iter().flat_map(|sample| &sample.frames).filter_map(|frame| frame.name.as_deref());
    assert!(names.all(|name| !name.contains(char::is_control) && name.len() <= MAX_NAME));
    // Half a gigabyte.
    fs::remove_dir_all(&folder).expect("its folder");
}

/// Build IDs of odd lengths, and pipes, devices, links in a circle, folders, and lies where a debug file is looked for.
#[test]
fn lying_build_ids_and_debug_files() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("hostile-debug-files");
    let (honest, stripped) = program(&folder);
    let id = |kind: u8| [vec![kind], vec![0xee; 19]].concat();
    let own_id = with_build_id(&stripped, "lie", &id(5), 20);
    let mut lie = Forged::new(&own_id, "lie.debug");
    let symbols: Vec<u8> = (0..1_000_000u32)
        .flat_map(|index| Forged::symbol(index, lie.code.0 + u64::from(index % 64), 1 << 40))
        .collect();
    lie.symbols(&symbols, &noise(MIB));
    let lie = lie.write(None);
    // Terabytes of nothing, that begin like the file which is looked for.
    let sparse = with_build_id(&stripped, "sparse", &id(6), 20);
    let endless = folder.join("sparse.debug");
    fs::copy(&sparse, &endless).expect("a copy");
    let file = fs::OpenOptions::new().write(true).open(&endless).expect("a file");
    file.set_len(4 << 40).expect("a sparse file");
    file.write_all_at(&u64::MAX.to_le_bytes(), 40).expect("a header");
    let programs = vec![
        with_build_id(&stripped, "id-1", &[1], 1),
        with_build_id(&stripped, "id-7", &[7; 7], 7),
        with_build_id(&stripped, "id-65", &[65; 68], 65),
        with_build_id(&stripped, "id-lies", &[0; 4], u32::MAX),
        with_build_id(&stripped, "pipe", &id(1), 20),
        with_build_id(&stripped, "device", &id(2), 20),
        with_build_id(&stripped, "terminal", &id(3), 20),
        with_build_id(&stripped, "circle", &id(4), 20),
        own_id,
        sparse,
    ];
    let place = |kind: u8| format!("/usr/lib/debug/.build-id/{kind:02x}/{}.debug", "ee".repeat(19));
    let commands = format!(
        "for id in 01 02 03 04 05 06; do mkdir -p /usr/lib/debug/.build-id/$id; done; mkfifo {}; mknod {} c 1 5; \
         mknod {} c 5 2; ln -s {} {}; cp {} {}; ln -s {} {}; mkdir -p /usr/lib/debug/.build-id/01/.debug;",
        place(1),
        place(2),
        place(3),
        place(4),
        place(4),
        lie.display(),
        place(5),
        endless.display(),
        place(6),
    );
    check(&folder, &honest, &programs, &commands);
}

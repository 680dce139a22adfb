//! Do two profilers that work differently agree on where a program's time goes?

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    sys::signal::Signal,
    unistd::{SysconfVar, sysconf},
};
use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest, common::v1::any_value::Value,
};
use profiler_tests::{Background, eventually, kernel_is_usable, record, run, scratch, stderr, stdout};
use prost::Message as _;

/// Samples per second: perf's and ours.
const PERF_FREQUENCY: u32 = 499;
const FREQUENCY: u32 = 997;
/// CPU time that is recorded of each program: a share of a half is known to 0.6 points then by perf, to 0.4 by us.
const SECONDS: f64 = 15.0;
/// Bytes of the stack that perf copies with each sample, and frames that it unwinds from them later: as many as we do.
/// While g++ collects its garbage it is a thousand frames deep. Of its stacks 94 % reach their root from 16 KiB, 95 %
/// from 32, 96 % from 48 and from 64, which is the limit; at twice the frequency that slows the program by half.
const STACK_BYTES: u32 = 48 << 10;
const MAX_FRAMES: u32 = 1024;
/// Functions compared, at most, and the least share that makes one worth comparing.
const TOP: usize = 20;
const LEAST_SHARE: f64 = 0.5;
/// Most points that the shares may differ by, on average.
const TOLERANCE: f64 = 1.5;

/// Inclusive samples by function.
#[derive(Default)]
struct Inclusive {
    samples: u64,
    rooted: u64,
    functions: BTreeMap<Function, u64>,
    names: BTreeMap<Function, String>,
}

/// What is counted as one function.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Function {
    /// By file and start. perf finds names in debug files where we do not look, and most of a stripped file has none
    /// at all: the start is known either way.
    InFile(String, u64),
    /// By name.
    InKernel(String),
    /// Code outside of files, all of it.
    Elsewhere,
}

impl Inclusive {
    /// Adds samples of one stack.
    fn add(&mut self, frames: impl IntoIterator<Item = (Function, String)>, is_rooted: bool, count: u64) {
        self.samples += count;
        self.rooted += if is_rooted { count } else { 0 };
        let mut seen = BTreeSet::new();
        for (function, name) in frames {
            if !name.is_empty() {
                self.names.entry(function.clone()).or_insert(name);
            }
            if seen.insert(function.clone()) {
                *self.functions.entry(function).or_default() += count;
            }
        }
    }

    /// A function's share, in percent.
    fn share(&self, function: &Function) -> f64 {
        100.0 * self.functions.get(function).copied().unwrap_or_default() as f64 / self.samples.max(1) as f64
    }

    fn name(&self, function: &Function) -> &str {
        self.names.get(function).map_or("-", String::as_str)
    }
}

/// What an ELF file says about where it is loaded and where its functions start.
#[derive(Default)]
struct Layout {
    /// Offset, size and stated address of what is loaded.
    parts: Vec<(u64, u64, u64)>,
    /// Stated addresses, sorted.
    functions: Vec<u64>,
    /// Stated address of the first instruction.
    entry: u64,
}

impl Layout {
    /// Reads the program headers and the index of unwind entries (`.eh_frame_hdr`), which files without symbols have,
    /// too. Empty for what is no such file.
    fn read(path: &str) -> Self {
        fs::read(path).ok().and_then(|file| Self::parse(&file)).unwrap_or_default()
    }

    fn parse(file: &[u8]) -> Option<Self> {
        const LOAD: u64 = 1;
        const UNWIND_INDEX: u64 = 0x6474_e550;
        /// Version, then encodings: pointer relative to itself, a 4-byte count, pairs relative to the index.
        const INDEX_FORMAT: [u8; 4] = [1, 0x1b, 3, 0x3b];
        let number = |offset: u64, size: usize| {
            let offset = usize::try_from(offset).ok()?;
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(file.get(offset..offset.checked_add(size)?)?);
            Some(u64::from_le_bytes(bytes))
        };
        if file.get(..4)? != b"\x7fELF" {
            return None;
        }
        let (headers, header_size, header_count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut layout = Self { entry: number(24, 8)?, ..Self::default() };
        for header in (0..header_count).map(|index| headers + index * header_size) {
            let (offset, address, size) = (number(header + 8, 8)?, number(header + 16, 8)?, number(header + 32, 8)?);
            match number(header, 4)? {
                LOAD => layout.parts.push((offset, size, address)),
                UNWIND_INDEX => {
                    let start = usize::try_from(offset).ok()?;
                    assert_eq!(file.get(start..start + 4)?, INDEX_FORMAT, "another format of .eh_frame_hdr");
                    for entry in 0..number(offset + 8, 4)? {
                        let relative = number(offset + 12 + entry * 8, 4)? as u32 as i32;
                        layout.functions.push(address.wrapping_add_signed(i64::from(relative)));
                    }
                }
                _ => {}
            }
        }
        layout.functions.sort_unstable();
        Some(layout)
    }

    /// The stated address of a place in the file.
    fn address(&self, place: u64) -> u64 {
        let part = self.parts.iter().find(|&&(offset, size, _)| (offset..offset + size).contains(&place));
        part.map_or(place, |(offset, _, address)| place - offset + address)
    }

    /// Where the function around a stated address starts.
    fn start(&self, address: u64) -> u64 {
        let after = self.functions.partition_point(|&start| start <= address);
        after.checked_sub(1).map_or(0, |index| self.functions[index])
    }
}

/// Layouts of the files met so far.
#[derive(Default)]
struct Layouts(HashMap<String, Layout>);

impl Layouts {
    fn of(&mut self, path: &str) -> &Layout {
        self.0.entry(path.to_owned()).or_insert_with(|| Layout::read(path))
    }
}

/// What `perf script` says: for each sample a line of its own, a line for each frame, leaf first, and an empty line.
fn read_perf(script: &str, layouts: &mut Layouts) -> Inclusive {
    let mut inclusive = Inclusive::default();
    for sample in script.split("\n\n").filter(|sample| !sample.trim().is_empty()) {
        let lines = sample.lines().filter(|line| line.starts_with('\t'));
        let frames: Vec<_> = lines.map(|line| perf_frame(line.trim(), layouts)).collect();
        let is_rooted = frames.last().is_some_and(|(function, _)| is_first(function, layouts));
        inclusive.add(frames, is_rooted, 1);
    }
    inclusive
}

/// A frame of perf's: `OFFSET NAME (FILE)`, or the address and `[kernel.kallsyms]` in the kernel.
fn perf_frame(line: &str, layouts: &mut Layouts) -> (Function, String) {
    let parts = || {
        let (place, rest) = line.split_once(' ')?;
        let (name, file) = rest.rsplit_once(" (")?;
        Some((u64::from_str_radix(place, 16).ok()?, name, file.strip_suffix(')')?))
    };
    let (place, name, file) = parts().unwrap_or_else(|| panic!("not a frame of perf's: {line:?}"));
    // Names of versions follow an `@`.
    let name = if name == "[unknown]" { "" } else { name.split('@').next().unwrap_or(name) };
    if file == "[kernel.kallsyms]" {
        return (Function::InKernel(name.to_owned()), String::new());
    }
    if !file.starts_with('/') {
        return (Function::Elsewhere, String::new());
    }
    let layout = layouts.of(file);
    (Function::InFile(file.to_owned(), layout.start(layout.address(place))), name.to_owned())
}

/// Whether a function is where a program begins.
fn is_first(function: &Function, layouts: &mut Layouts) -> bool {
    let Function::InFile(file, start) = function else { return false };
    let layout = layouts.of(file);
    layout.start(layout.entry) == *start
}

/// What the agent says, as an OTLP request: unlike folded stacks it has addresses.
fn read_agent(request: &[u8], layouts: &mut Layouts) -> Inclusive {
    let request = ExportProfilesServiceRequest::decode(request).expect("an OTLP request");
    let tables = request.dictionary.as_ref().expect("a dictionary");
    let at = |index: i32| usize::try_from(index).expect("an index");
    let text = |index: i32| tables.string_table[at(index)].as_str();
    let attribute = |indices: &[i32], key: &str| {
        let attribute = indices.iter().map(|&index| &tables.attribute_table[at(index)]);
        let value = attribute.clone().find(|attribute| text(attribute.key_strindex) == key)?.value.as_ref()?;
        match value.value.as_ref()? {
            Value::StringValue(value) => Some(value.clone()),
            _ => None,
        }
    };
    let mut frame = |&index: &i32| {
        let location = &tables.location_table[at(index)];
        let name = location.lines.first().map_or("", |line| {
            let function = &tables.function_table[at(line.function_index)];
            text(function.name_strindex)
        });
        if attribute(&location.attribute_indices, "profile.frame.type").as_deref() == Some("kernel") {
            return (Function::InKernel(name.to_owned()), String::new());
        }
        let file = text(tables.mapping_table[at(location.mapping_index)].filename_strindex);
        if !file.starts_with('/') {
            return (Function::Elsewhere, String::new());
        }
        (Function::InFile(file.to_owned(), layouts.of(file).start(location.address)), name.to_owned())
    };
    let mut inclusive = Inclusive::default();
    let scopes = request.resource_profiles.iter().flat_map(|resource| &resource.scope_profiles);
    for sample in scopes.flat_map(|scope| &scope.profiles).flat_map(|profile| &profile.samples) {
        let frames: Vec<_> =
            tables.stack_table[at(sample.stack_index)].location_indices.iter().map(&mut frame).collect();
        let is_rooted = attribute(&sample.attribute_indices, "profiler.stack.end").is_none();
        inclusive.add(frames, is_rooted, sample.values.iter().sum::<i64>().unsigned_abs());
    }
    inclusive
}

/// State and CPU seconds of a process.
fn progress(pid: u32) -> (char, f64) {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Its name is in parentheses and may hold anything.
    let fields: Vec<&str> = text.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    (fields.first().and_then(|state| state.chars().next()).unwrap_or('Z'), (ticks(11) + ticks(12)) / per_second)
}

/// Whether a process has opened the events it samples with.
fn samples(recorder: &Background) -> Option<()> {
    let mut descriptors = fs::read_dir(format!("/proc/{}/fd", recorder.pid())).ok()?.flatten();
    descriptors.find(|descriptor| {
        fs::read_link(descriptor.path()).is_ok_and(|target| target.to_string_lossy().contains("perf_event"))
    })?;
    Some(())
}

/// Records the same seconds of one process with both, and compares.
///
/// The program is stopped while the recorders start and end. It is attached to after `execve`: perf remembers the
/// place of a library from the image in which it meets it first, and unwinds wrongly through it in another.
///
/// All samples count, on both sides, whether or not their stack is whole.
fn check(name: &str, folder: &Path, program: &mut Command) {
    let program = Background::start(program.current_dir(folder));
    program.signal(Signal::SIGSTOP);
    let pid = program.pid().to_string();
    let (perf_file, agent_file) = (folder.join("perf.data"), folder.join("agent.otlp"));
    let perf = Background::start(
        Command::new("perf")
            .args(["record", "--quiet", "--event", "cpu-clock", "--freq", &PERF_FREQUENCY.to_string()])
            .args(["--call-graph", &format!("dwarf,{STACK_BYTES}"), "--mmap-pages", "16M", "--pid", &pid, "--output"])
            .arg(&perf_file),
    );
    let agent = Background::start(
        record(&["--frequency", &FREQUENCY.to_string(), "--duration", "5m", "--pid", &pid, "--output"])
            .arg(&agent_file),
    );
    for recorder in [&perf, &agent] {
        eventually("a recorder", Duration::from_secs(20), || samples(recorder));
    }
    std::thread::sleep(Duration::from_secs(1));
    let (_, before) = progress(program.pid());
    program.signal(Signal::SIGCONT);
    let seconds = eventually("CPU time", Duration::from_secs(90), || {
        let (state, seconds) = progress(program.pid());
        (state == 'Z' || seconds - before >= SECONDS).then_some(seconds - before)
    });
    program.signal(Signal::SIGSTOP);
    for recorder in [perf, agent] {
        recorder.signal(Signal::SIGINT);
        let output = recorder.finish();
        assert!(output.status.success() || output.status.code().is_none(), "{name}: {}", stderr(&output));
    }
    let mut script = Command::new("perf");
    script.args([
        "script",
        "--no-inline",
        "--max-stack",
        &MAX_FRAMES.to_string(),
        "--fields",
        "comm,ip,sym,dso",
        "--input",
    ]);
    let script = run(script.arg(&perf_file));
    assert!(script.status.success(), "{name}: {}", stderr(&script));
    let mut layouts = Layouts::default();
    let theirs = read_perf(&stdout(&script), &mut layouts);
    let ours = read_agent(&fs::read(&agent_file).expect("the recording"), &mut layouts);
    drop(program);
    compare(name, seconds, &theirs, &ours);
    // It has a copy of the stack of every sample.
    fs::remove_file(&perf_file).expect("perf's recording");
}

/// Prints the shares of the functions that have the largest on either side, and checks them.
fn compare(name: &str, seconds: f64, theirs: &Inclusive, ours: &Inclusive) {
    let larger = |function: &Function| theirs.share(function).max(ours.share(function));
    let mut top: Vec<&Function> = theirs.functions.keys().chain(ours.functions.keys()).collect();
    top.sort_unstable_by(|a, b| larger(b).total_cmp(&larger(a)).then_with(|| a.cmp(b)));
    top.dedup();
    top.retain(|function| larger(function) >= LEAST_SHARE);
    top.truncate(TOP);
    let rooted = |side: &Inclusive| 100.0 * side.rooted as f64 / side.samples.max(1) as f64;
    for (who, side, frequency) in [("perf has", theirs, PERF_FREQUENCY), ("we have", ours, FREQUENCY)] {
        let expected = seconds * f64::from(frequency);
        println!("{name}: {who} {} samples, expected {expected:.0}, {:.2} % rooted", side.samples, rooted(side));
        assert!(side.samples as f64 > 0.9 * expected && expected > 2_500.0, "{name}: too few samples");
    }
    println!("    perf %   ours %  difference  name of perf's / of ours");
    let (mut sum, mut most, mut named, mut same) = (0.0, 0.0f64, 0, 0);
    for function in &top {
        let difference = ours.share(function) - theirs.share(function);
        sum += difference.abs();
        most = most.max(difference.abs());
        let label = match function {
            Function::InFile(file, start) => {
                let (their_name, our_name) = (theirs.name(function), ours.name(function));
                if their_name != "-" && our_name != "-" {
                    named += 1;
                    // Ours has parameters where perf's has none.
                    same += u32::from(our_name.contains(their_name));
                }
                let file = Path::new(file).file_name().unwrap_or_default().to_string_lossy();
                let mut label = String::new();
                let _ = write!(label, "{their_name} / {our_name} ({file} {start:#x})");
                label
            }
            Function::InKernel(name) => format!("{name} (kernel)"),
            Function::Elsewhere => "outside of files".to_owned(),
        };
        println!("    {:6.2}   {:6.2}      {difference:+6.2}  {label}", theirs.share(function), ours.share(function));
    }
    let mean = sum / top.len().max(1) as f64;
    println!(
        "    {name}: {mean:.2} points on average over {} functions, {most:.2} at most; {same} of {named} names are the same",
        top.len()
    );
    assert!(top.len() >= 5, "{name}: nothing to compare");
    assert!(mean <= TOLERANCE, "{name}: {mean:.2} points");
    // Of several names of one place either may be picked.
    assert!(10 * same >= 9 * named, "{name}: names differ");
}

/// A large C++ source, preprocessed: containers, algorithms and closures of many types.
fn cpp_source(folder: &Path) -> PathBuf {
    let mut source =
        "#include <algorithm>\n#include <functional>\n#include <map>\n#include <string>\n#include <vector>\n"
            .to_owned();
    for unit in 0..80 {
        let _ = writeln!(
            source,
            "struct Item{unit} {{ int key; std::string name; double weight[{}];
                bool operator<(const Item{unit} &other) const {{ return key < other.key; }} }};
            double work{unit}(std::vector<Item{unit}> &items, std::map<int, std::vector<Item{unit}>> &index) {{
                std::sort(items.begin(), items.end());
                double sum = {unit};
                for (auto &item : items) {{
                    index[item.key % {}].push_back(item);
                    for (double weight : item.weight) sum += weight * item.key;
                }}
                std::function<double(double)> scaled = [&](double x) {{ return x > {unit} ? sum : x * sum; }};
                for (auto &[key, found] : index) sum += scaled(key) + found.size();
                return sum;
            }}",
            unit % 7 + 1,
            unit + 3
        );
    }
    let (file, preprocessed) = (folder.join("large.cpp"), folder.join("large.ii"));
    fs::write(&file, source).expect("a source file");
    let output = run(Command::new("g++").args(["-std=c++17", "-E", "-o"]).arg(&preprocessed).arg(&file));
    assert!(output.status.success(), "{}", stderr(&output));
    preprocessed
}

/// A compiler: deep stacks, many functions.
#[test]
fn agrees_with_perf_on_a_compiler() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("agreement_compiler");
    let source = cpp_source(&folder);
    // The driver only waits for it.
    let compiler = run(Command::new("g++").arg("-print-prog-name=cc1plus"));
    let mut command = Command::new(stdout(&compiler).trim());
    command.args(["-fpreprocessed", "-std=c++17", "-O2", "-quiet", "-o", "/dev/null"]).arg(source);
    check("cc1plus", &folder, &mut command);
}

/// A compressor: shallow stacks, and most functions have no name.
#[test]
fn agrees_with_perf_on_a_compressor() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("agreement_compressor");
    let mut state = 1u64;
    let mut next = || {
        // Knuth's generator, of which the upper bits are good.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    let words: Vec<String> = (0..5_000)
        .map(|_| (0..2 + next() % 9).map(|_| char::from(b'a' + (next() % 26) as u8)).collect::<String>() + " ")
        .collect();
    let text: String = (0..1_500_000).map(|_| words[next() % words.len()].as_str()).collect();
    fs::write(folder.join("words"), text).expect("a file to compress");
    let mut command = Command::new("xz");
    command.args(["--threads=1", "--keep", "--force"]).args(["words"; 20]);
    check("xz", &folder, &mut command);
}

/// Text is split and counted, graphs are searched, objects sorted and written down.
const PYTHON: &str = r#"
import collections, heapq, json, random, re
random.seed(3)
text = " ".join("w%d" % random.randrange(5000) for _ in range(20000))
graph = {i: [((i * 7 + k * 13) % 3000, (i * k) % 17 + 1) for k in range(5)] for i in range(3000)}

def count(words):
    return sorted(collections.Counter(words).items(), key=lambda item: (-item[1], item[0]))

def distances(start):
    known, queue = {start: 0}, [(0, start)]
    while queue:
        cost, node = heapq.heappop(queue)
        if cost > known[node]:
            continue
        for other, weight in graph[node]:
            if cost + weight < known.get(other, 1 << 30):
                known[other] = cost + weight
                heapq.heappush(queue, (cost + weight, other))
    return sum(known.values())

class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __add__(self, other):
        return Point(self.x + other.x, self.y + other.y)
    def __lt__(self, other):
        return (self.x, self.y) < (other.x, other.y)

while True:
    json.loads(json.dumps(count(re.findall(r"\w+", text))))
    distances(0)
    total = Point(0, 0)
    for point in sorted(Point(random.random(), i) for i in range(2000)):
        total = total + point
    re.sub(r"(\d)(\d)", lambda match: match[2] + match[1], text[:20000])
"#;

/// An interpreter: native functions that call each other through it.
#[test]
fn agrees_with_perf_on_an_interpreter() {
    if !kernel_is_usable() {
        return;
    }
    // A version manager's wrapper would be stopped instead.
    let python = run(Command::new("python3").args(["-c", "import sys; print(sys.executable)"]));
    let mut command = Command::new(stdout(&python).trim());
    check("python3", &scratch("agreement_interpreter"), command.args(["-c", PYTHON]));
}

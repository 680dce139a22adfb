//! `profiler-agent symbolize`: names addresses by hand, in the way that samples are named.

use std::{
    io::{BufRead as _, BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::{Args, ValueHint};
use tracing::info;

use super::record::check_pid;
use crate::{
    config::dwarf_bytes,
    process::{ProcessTable, open_executable},
    profile::{Executable, FileOffset, Frame, FrameName, FunctionName, LocatedSample, Location, SourceLine, printable},
    symbolize::{FrameNamer, NoSource, SourceOptions},
};

const NAMES_BYTES: usize = 64 << 20;
/// Addresses that are named together.
const PIECE: usize = 4096;
/// The lowest address of the kernel.
const KERNEL_START: u64 = 1 << 63;
/// What stands for what is not known.
/// How long a file may take to be read.
const PATIENCE: Duration = Duration::from_secs(60);
const UNKNOWN: &str = "-";

/// Name addresses of a process, or of a file, as recordings name them.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The process whose memory the addresses are in (the kernel's addresses are understood too).
    #[arg(long, conflicts_with = "file", required_unless_present = "file")]
    pid: Option<u32>,
    /// The ELF file that the numbers are places in. No privileges are needed for this.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// The numbers are addresses as the file states them, as nm and objdump print them, not offsets in the file.
    #[arg(long, requires = "file")]
    addresses: bool,
    /// Print source files and lines.
    #[arg(long)]
    lines: bool,
    /// Print what the compiler inlined at an address, innermost first, each on a line of its own.
    #[arg(long)]
    inlines: bool,
    /// Print functions' names as the files have them.
    #[arg(long)]
    mangled: bool,
    /// Most memory for debug information, MiB [default: 256].
    #[arg(long, value_name = "MIB")]
    dwarf_mib: Option<u32>,
    /// Hexadecimal numbers, with or without 0x; without any, standard input has one on each line.
    #[arg(value_name = "ADDRESS", value_parser = parse_address)]
    numbers: Vec<u64>,
}

const EXAMPLES: &str = "\
Each address has a line of columns separated by tabs: the address, the function, its
file+0xADDRESS (as the file states it), what named it, and with --lines its file:line.
What is not known is a dash, and then the reason stands for what named it. With --inlines,
lines of inlined functions come first, named by `inlined`.

Examples:
  profiler-agent symbolize --pid 1234 7f2a4c0291f0 0x55d0c8a01234
  profiler-agent symbolize --file /usr/bin/app --lines --inlines 0x1f40
  profiler-agent symbolize --file /usr/bin/app --addresses 0x401f40
  nm app | cut -d' ' -f1 | profiler-agent symbolize --file app --addresses

Addresses are looked up as they are: of a return address, give the one before.";

/// A number to name, and what it is.
struct Query {
    number: u64,
    /// `None`: the file has no code there.
    location: Option<Location>,
}

/// What the numbers are places in.
enum Target {
    Process { table: Box<ProcessTable>, pid: u32 },
    File { executable: Arc<Executable>, by_address: bool },
}

pub(super) fn main(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let source =
        SourceOptions { lines: arguments.lines, inlines: arguments.inlines, bytes: dwarf_bytes(arguments.dwarf_mib)? };
    let target = match (arguments.pid, arguments.file) {
        (Some(pid), _) => {
            check_pid(pid)?;
            Target::Process { table: Box::default(), pid }
        }
        (None, Some(path)) => {
            let file = open_executable(&path).with_context(|| format!("{} cannot be read", path.display()))?;
            let executable = file.with_context(|| format!("{} is no ELF file for x86_64", path.display()))?;
            Target::File { executable, by_address: arguments.addresses }
        }
        (None, None) => bail!("name a process by --pid or a file by --file"),
    };
    let mut printer = Printer {
        target,
        namer: FrameNamer::new(NAMES_BYTES, None, source, Arc::default()),
        lines: arguments.lines,
        mangled: arguments.mangled,
        out: BufWriter::new(std::io::stdout().lock()),
    };
    if arguments.numbers.is_empty() {
        let mut numbers = Vec::with_capacity(PIECE);
        for line in std::io::stdin().lock().lines() {
            let line = line.context("standard input cannot be read")?;
            if !line.trim().is_empty() {
                numbers.push(parse_address(line.trim()).map_err(anyhow::Error::msg)?);
            }
            if numbers.len() == PIECE {
                printer.print(&numbers)?;
                numbers.clear();
            }
        }
        printer.print(&numbers)?;
    }
    for numbers in arguments.numbers.chunks(PIECE) {
        printer.print(numbers)?;
    }
    printer.out.flush().context("standard output cannot be written")?;
    for (reason, files) in NoSource::ALL.iter().zip(printer.namer.stats().source.by_reason) {
        if files != 0 {
            info!("files without source lines: {files} ({})", reason.label());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn parse_address(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|_| format!("{text:?} is no hexadecimal number of 64 bits"))
}

impl Target {
    /// What the numbers are.
    fn locate(&mut self, numbers: &[u64]) -> anyhow::Result<Vec<Query>> {
        let locations: Vec<Option<Location>> = match self {
            Self::Process { table, pid } => {
                let found = table.locate_now(*pid, numbers);
                let found = found.with_context(|| format!("the mappings of process {pid} cannot be read"))?;
                found.into_iter().map(Some).collect()
            }
            Self::File { executable, by_address } => numbers
                .iter()
                .map(|&number| {
                    let segment = if *by_address {
                        executable.segment_at(number)
                    } else {
                        executable.segment(FileOffset(number))
                    };
                    let offset = match segment? {
                        segment if *by_address => number - segment.address.0 + segment.offset.0,
                        _ => number,
                    };
                    Some(Location::File { executable: Arc::clone(executable), offset: FileOffset(offset) })
                })
                .collect(),
        };
        let is_kernel = |number| matches!(self, Self::Process { .. }) && number >= KERNEL_START;
        let query = |(&number, location)| Query {
            number,
            location: if is_kernel(number) { Some(Location::Kernel(number)) } else { location },
        };
        Ok(numbers.iter().zip(locations).map(query).collect())
    }
}

/// Names numbers and prints what they are.
struct Printer<W> {
    target: Target,
    namer: FrameNamer,
    lines: bool,
    mangled: bool,
    out: W,
}

impl<W: Write> Printer<W> {
    fn print(&mut self, numbers: &[u64]) -> anyhow::Result<()> {
        let queries = self.target.locate(numbers)?;
        let locations = queries.iter().filter_map(|query| query.location.clone()).collect();
        let mut frames = self.namer.name(&[LocatedSample::of_locations(locations)], PATIENCE).into_iter().flatten();
        for query in &queries {
            let printed = match query.location.as_ref().and_then(|location| Some((location, frames.next()?))) {
                Some((location, frame)) => self.print_frame(query.number, location, &frame),
                None => self.print_line(query.number, UNKNOWN, UNKNOWN, "no code", None),
            };
            printed.context("standard output cannot be written")?;
        }
        Ok(())
    }

    fn print_frame(&mut self, number: u64, location: &Location, frame: &Frame) -> std::io::Result<()> {
        let place = match &frame.executable {
            Some(executable) => format!("{}+{:#x}", printable(executable.name()), frame.address),
            None => UNKNOWN.to_owned(),
        };
        for inlined in &frame.inlined {
            let name = self.name(&inlined.name);
            self.print_line(number, &name, &place, "inlined", inlined.place.as_ref())?;
        }
        let source = self.namer.source_of(location);
        let (name, source) = match &frame.name {
            FrameName::Function(name) => (self.name(name), source),
            FrameName::Unnamed(reason) => (UNKNOWN.to_owned(), reason.label()),
            FrameName::Unmapped => (UNKNOWN.to_owned(), "not mapped"),
        };
        self.print_line(number, &name, &place, source, frame.place.as_ref())
    }

    fn name(&self, name: &FunctionName) -> String {
        printable(if self.mangled { name.system() } else { &name.readable })
    }

    fn print_line(
        &mut self,
        number: u64,
        name: &str,
        place: &str,
        source: &str,
        line: Option<&SourceLine>,
    ) -> std::io::Result<()> {
        write!(self.out, "{number:#x}\t{name}\t{place}\t{source}")?;
        if self.lines {
            match line {
                Some(line) => write!(self.out, "\t{}:{}", or_unknown(&printable(&line.file)), line.line)?,
                None => write!(self.out, "\t{UNKNOWN}")?,
            }
        }
        writeln!(self.out)
    }
}

fn or_unknown(text: &str) -> &str {
    if text.is_empty() { UNKNOWN } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With and without the prefix, and what is no number.
    #[test]
    fn reads_addresses() {
        assert_eq!(parse_address("0x1f40"), Ok(0x1f40));
        assert_eq!(parse_address("FFFFFFFF81000000"), Ok(0xffff_ffff_8100_0000));
        for text in ["", "0x", "1 2", "-1", "main", "10000000000000000"] {
            assert!(parse_address(text).is_err(), "{text:?}");
        }
    }
}

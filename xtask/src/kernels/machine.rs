//! A VM's disk, which is memory the kernel is handed at its start, and the VM itself.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::verdict::Run;
use crate::{
    Outcome,
    process::{find, output, run},
};

/// What one VM may take, from its start to its end.
const PATIENCE: Duration = Duration::from_secs(600);
/// Lines of a console that are shown of a VM that was ended.
const TAIL: usize = 30;
const INIT: &str = include_str!("init.sh");

/// A file system for the VMs: busybox, the agent, programs to record, and what to do with them.
pub(super) struct Disk {
    image: PathBuf,
}

impl Disk {
    pub(super) fn new(folder: &Path, agent: &Path, workloads: &[PathBuf], runs: &[Run]) -> Result<Self, String> {
        let root = folder.join("root");
        // There is none before the first time.
        let _ = fs::remove_dir_all(&root);
        for directory in ["bin", "proc", "sys", "dev", "tmp"] {
            create_folder(&root.join(directory))?;
        }
        let busybox = find("busybox").ok_or("busybox is missing")?;
        install(&busybox, &root, "bin/busybox")?;
        install(agent, &root, "profiler-agent")?;
        for workload in workloads {
            install(workload, &root, &workload.file_name().unwrap_or_default().to_string_lossy())?;
        }
        let lines: String = runs.iter().map(|run| run.line() + "\n").collect();
        write(&root.join("runs"), &lines)?;
        write(&root.join("init"), INIT)?;
        run(Command::new("chmod").arg("755").arg(root.join("init")))?;
        let image = folder.join("root.cpio");
        let archive = "find . | busybox cpio -o -H newc >\"$0\" 2>/dev/null";
        run(Command::new("sh").args(["-c", archive]).arg(&image).current_dir(&root))?;
        Ok(Self { image })
    }

    /// Boots a kernel, waits for its end, and returns what its console showed.
    pub(super) fn boot(&self, kernel: &Path, log: &Path) -> Result<String, String> {
        // An older console must not be taken for this one.
        let _ = fs::remove_file(log);
        let monitor = log.with_extension("monitor");
        let _ = fs::remove_file(&monitor);
        let machine = Command::new("qemu-system-x86_64")
            // KVM is not everywhere, and where it is nested it may hang.
            .args(["-accel", "tcg", "-smp", "2", "-m", "1536"])
            // QEMU 7.2's emulated cmpxchg16b may leave half a pointer in the flags register, and Linux 6.12 dies in its
            // allocator in one boot of three. Kernels do without the instruction where the CPU has none.
            .args(["-cpu", "max,-cx16"])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial"])
            .arg(format!("file:{}", log.display()))
            .arg("-monitor")
            .arg(format!("unix:{},server,nowait", monitor.display()))
            // Without a trusted time stamp counter the vDSO could only make system calls.
            .args(["-append", "console=ttyS0 quiet panic=-1 tsc=reliable", "-kernel"])
            .arg(kernel)
            .arg("-initrd")
            .arg(&self.image)
            .stdin(Stdio::null())
            .spawn();
        let machine = machine.map_err(|error| format!("qemu cannot be started: {error}"))?;
        let ended = wait(machine, &monitor);
        let console = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).replace('\r', "");
        ended.map(|()| console.clone()).map_err(|error| {
            let lines: Vec<&str> = console.lines().collect();
            let stuck = lines.iter().position(|line| line.starts_with("STUCK")).unwrap_or(lines.len());
            let tail = lines[stuck.min(lines.len().saturating_sub(TAIL))..].iter().map(|line| shorten(line));
            format!("{error}; its console ends with\n    | {}", tail.collect::<Vec<_>>().join("\n    | "))
        })
    }
}

/// Waits for a VM to switch itself off, and ends it where it does not.
fn wait(mut machine: Child, monitor: &Path) -> Outcome {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        match machine.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("qemu ended with {status}")),
            Ok(None) => thread::sleep(Duration::from_millis(200)),
            Err(error) => return Err(format!("qemu cannot be waited for: {error}")),
        }
    }
    let registers = registers(monitor);
    // It may have ended by itself just now.
    let _ = machine.kill();
    let _ = machine.wait();
    Err(format!("the VM was not done after {} s and was ended; its CPUs: {registers}", PATIENCE.as_secs()))
}

/// Where the CPUs of a VM are, as its monitor says; three times, since what hangs stays where it is.
fn registers(monitor: &Path) -> String {
    let ask = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(monitor)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        for _ in 0..3 {
            stream.write_all(b"info registers -a\n")?;
            thread::sleep(Duration::from_millis(500));
        }
        let mut said = Vec::new();
        // It ends by the timeout.
        let _ = stream.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        let words = said
            .split_whitespace()
            .filter(|word| ["CPU#", "RIP=", "RSP=", "RFL="].iter().any(|name| word.starts_with(name)));
        Ok(words.collect::<Vec<_>>().join(" "))
    };
    ask().unwrap_or_else(|error| format!("the monitor does not answer: {error}"))
}

/// Copies a program, and the shared libraries it needs, to the places where it looks for them.
fn install(program: &Path, root: &Path, name: &str) -> Outcome {
    copy(program, &root.join(name))?;
    // A program without shared libraries makes ldd fail.
    let libraries = output(Command::new("ldd").arg(program).stderr(Stdio::null())).unwrap_or_default();
    for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        copy(Path::new(path), &root.join(path.trim_start_matches('/')))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Outcome {
    create_folder(to.parent().unwrap_or(to))?;
    fs::copy(from, to).map(|_| ()).map_err(|error| format!("{} cannot be copied: {error}", from.display()))
}

fn create_folder(folder: &Path) -> Outcome {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

fn write(path: &Path, text: &str) -> Outcome {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// A line of at most as many characters as a terminal is wide.
fn shorten(line: &str) -> String {
    line.chars().take(200).collect()
}

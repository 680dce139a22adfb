//! `cargo xtask setup`: finds what building and testing need, and installs what is missing.
//!
//! Installing happens on Debian and Ubuntu as root; elsewhere the exact commands are printed.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use crate::{
    Outcome, cluster,
    process::{cargo, find, is_root, output, run},
    receivers,
    suite::{self, Suite},
    toolchain::{Compiler, Toolchain, find_compiler, find_linker},
};

/// bpf-linker's version; it has to know the LLVM of the compiler.
const BPF_LINKER: &str = "0.13.0";
/// Package pairs that bring a rustc with precompiled `core` for BPF, the best first.
const RUSTC_PACKAGES: &[(&str, &str)] = &[("rustc-web", "libstd-rust-web-dev-bpf"), ("rustc", "libstd-rust-dev-bpf")];
/// Programs the tests use, and the packages that bring them on one system or another.
const TEST_PROGRAMS: &[(&str, &[&str])] = &[
    ("gcc", &["gcc"]),
    ("g++", &["g++"]),
    ("musl-gcc", &["musl-tools"]),
    ("qemu-system-x86_64", &["qemu-system-x86"]),
    ("node", &["nodejs"]),
    ("java", &["default-jre-headless"]),
    ("jcmd", &["default-jdk-headless"]),
    ("python3", &["python3"]),
    ("go", &["golang-go"]),
    ("perf", &["linux-perf", "linux-tools-generic"]),
    ("xz", &["xz-utils"]),
    ("debuginfod", &["debuginfod"]),
    ("openssl", &["openssl"]),
    ("setpriv", &["util-linux"]),
    ("script", &["bsdutils"]),
    ("pgrep", &["procps"]),
    ("containerd", &["containerd"]),
    ("runc", &["runc"]),
    ("busybox", &["busybox-static"]),
    ("objcopy", &["binutils"]),
    ("redis-server", &["redis-server"]),
    ("redis-benchmark", &["redis-tools"]),
    ("nginx", &["nginx-light", "nginx"]),
    ("ab", &["apache2-utils"]),
    ("pg_ctlcluster", &["postgresql"]),
    ("etcd", &["etcd-server"]),
];
/// Suites whose C library runs what this machine compiles, and is another than its own: the first that is not this
/// machine's suite is what containers of tests are made of.
const CONTAINER_SUITES: [&str; 2] = ["trixie", "sid"];

/// Pythons that a distribution may have, the oldest first.
const PYTHONS: &[&str] = &["3.11", "3.12", "3.13", "3.14"];

pub(crate) fn main(workspace: &Path, arguments: &[String]) -> Outcome {
    if let Some(unknown) = arguments.first() {
        return Err(format!("setup takes no argument {unknown:?}"));
    }
    for_build(workspace)?;
    for_tests(workspace)?;
    programs(workspace)
}

/// What building needs: a compiler with `core` for BPF, and bpf-linker.
pub(crate) fn for_build(workspace: &Path) -> Outcome {
    if Toolchain::find(workspace).is_err() {
        let compiler = match find_compiler() {
            Some(compiler) => compiler,
            None => {
                install_compiler()?;
                find_compiler().ok_or("the installed compiler has no `core` for BPF")?
            }
        };
        if find_linker(workspace).is_none() {
            install_linker(workspace, &compiler)?;
        }
    }
    let toolchain = Toolchain::find(workspace).map_err(|missing| missing.to_string())?;
    eprintln!("xtask: kernel programs are built by {toolchain}");
    Ok(())
}

/// What the tests need besides: compilers, runtimes and servers to profile, Python with the OTLP types, Go's pprof, VMs,
/// containers.
pub(crate) fn for_tests(workspace: &Path) -> Outcome {
    let missing: Vec<&[&str]> =
        TEST_PROGRAMS.iter().filter(|(program, _)| find(program).is_none()).map(|(_, packages)| *packages).collect();
    if !missing.is_empty() {
        update_package_lists();
        let first = |packages: &[&'static str]| {
            packages.iter().copied().find(|package| is_available(package)).or(packages.first().copied())
        };
        install_packages(&missing.into_iter().filter_map(first).collect::<Vec<_>>())?;
    }
    for (tool, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if output(cargo(workspace).args([tool, "--version"])).is_none() {
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    let venv = workspace.join("target/venv");
    let python = venv.join("bin/python");
    let has_types = |python: &Path| {
        output(Command::new(python).args(["-c", "import grpc, opentelemetry.proto.collector.profiles.v1development"]))
            .is_some()
    };
    if !has_types(&python) {
        let create = || run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
        if create().is_err() {
            install_packages(&["python3-venv"])?;
            create()?;
        }
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(["grpcio", "opentelemetry-proto>=1.40"]))?;
    }
    unpack_python(&workspace.join("target/distribution"))?;
    container_root(workspace)
}

/// The programs that tests talk to: receivers, Kubernetes. They take minutes to build, and Go alone.
pub(crate) fn programs(workspace: &Path) -> Outcome {
    receivers::build(workspace)?;
    cluster::build(workspace)
}

/// The C library of another suite, in a folder that containers of tests have as their root.
fn container_root(workspace: &Path) -> Outcome {
    let folder = workspace.join("target/container");
    let root = folder.join("root");
    if root.is_dir() {
        return Ok(());
    }
    if let Err(obstacle) = suite::mirror() {
        eprintln!("xtask: SKIPPED: {obstacle}; no container is profiled");
        return Ok(());
    }
    let own = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let is_own = |suite: &&str| own.lines().any(|line| line.strip_prefix("VERSION_CODENAME=") == Some(*suite));
    let name = CONTAINER_SUITES.iter().find(|suite| !is_own(suite)).copied().unwrap_or_default();
    let suite = Suite::open(folder.join("apt"), name)?;
    let unpacked = folder.join("unpacked");
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    // One that was interrupted may be there.
    let _ = fs::remove_dir_all(&unpacked);
    // Debian's own layout of a root; packages still have files in both places.
    for (link, place) in [("lib", "usr/lib"), ("lib64", "usr/lib64"), ("bin", "usr/bin"), ("sbin", "usr/sbin")] {
        fs::create_dir_all(unpacked.join(place)).map_err(failed)?;
        symlink(place, unpacked.join(link)).map_err(failed)?;
    }
    suite.unpack("libc6", &unpacked)?;
    fs::rename(&unpacked, &root).map_err(failed)
}

/// Unpacks a distribution's stripped Python with its libraries into `root`, and the debug files of the same versions into
/// `debug`: installed, the agent would find them by itself.
fn unpack_python(folder: &Path) -> Outcome {
    if folder.is_dir() {
        return Ok(());
    }
    update_package_lists();
    let debug_package = |version: &&&str| is_available(&format!("python{version}-dbg"));
    let Some(version) = PYTHONS.iter().find(debug_package) else {
        eprintln!("xtask: SKIPPED: this system's packages have no debug files of Python; no server is asked for them");
        return Ok(());
    };
    let expat = if is_available("libexpat1") { "libexpat1" } else { "libexpat1t64" };
    let programs = ["libc6", "zlib1g", "libgcc-s1", "libstdc++6", expat].map(str::to_owned).into_iter().chain(
        ["python{}-minimal", "libpython{}-minimal", "libpython{}-stdlib"].map(|name| name.replace("{}", version)),
    );
    let debug_files = ["libc6-dbg".to_owned(), format!("python{version}-dbg")];
    let begun = folder.with_extension("begun");
    // What was begun and not finished.
    let _ = fs::remove_dir_all(&begun);
    let failed = |error: std::io::Error| format!("{}: {error}", begun.display());
    for (part, packages) in [("root", programs.collect::<Vec<_>>()), ("debug", debug_files.to_vec())] {
        let (archives, unpacked) = (begun.join(format!("{part}-archives")), begun.join(part));
        fs::create_dir_all(&archives).map_err(failed)?;
        fs::create_dir_all(&unpacked).map_err(failed)?;
        run(Command::new("apt-get").args(["-qq", "download"]).args(&packages).current_dir(&archives))?;
        for archive in fs::read_dir(&archives).map_err(failed)?.flatten() {
            run(Command::new("dpkg").arg("-x").arg(archive.path()).arg(&unpacked))?;
        }
        fs::remove_dir_all(&archives).map_err(failed)?;
    }
    fs::rename(&begun, folder).map_err(failed)
}

fn install_compiler() -> Outcome {
    update_package_lists();
    let (rustc, core) = RUSTC_PACKAGES.iter().find(|(_, core)| is_available(core)).ok_or(
        "this system's packages have no Rust `core` for BPF; install rustup's nightly with rust-src instead: \
         `rustup toolchain install nightly --component rust-src` and `cargo install bpf-linker`",
    )?;
    install_packages(&[rustc, core])
}

/// Builds bpf-linker against the LLVM that the compiler was built with.
fn install_linker(workspace: &Path, compiler: &Compiler) -> Outcome {
    let mut rustc = match compiler {
        Compiler::NightlyBuildStd => {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", "nightly", "rustc"]);
            rustup
        }
        Compiler::PrecompiledCore { rustc } => Command::new(rustc),
    };
    let version = output(rustc.arg("-vV")).unwrap_or_default();
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .and_then(|version| version.split('.').next())
        .ok_or("the compiler does not tell its LLVM version")?
        .to_owned();
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&prefix).join("include/llvm-c").is_dir() {
        install_packages(&[&format!("llvm-{llvm}-dev")])?;
    }
    run(cargo(workspace)
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--no-default-features"])
        .args(["--features", &format!("llvm-{llvm}"), "--root"])
        .arg(workspace.join("target/tools"))
        .env("LLVM_PREFIX", prefix))
}

fn is_available(package: &str) -> bool {
    output(Command::new("apt-cache").args(["policy", package]))
        .is_some_and(|policy| policy.lines().any(|line| line.contains("Candidate:") && !line.contains("(none)")))
}

fn update_package_lists() {
    if find("apt-get").is_some() && is_root() {
        // Old lists may do; if not, the installation says so.
        let _ = run(Command::new("apt-get").args(["update", "-qq"]));
    }
}

pub(crate) fn install_packages(packages: &[&str]) -> Outcome {
    let command = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if find("apt-get").is_none() {
        return Err(format!("missing: {}; on Debian or Ubuntu, `{command}` installs it", packages.join(", ")));
    }
    if !is_root() {
        return Err(format!("missing: {}; run `sudo {command}`, then try again", packages.join(", ")));
    }
    let install = || {
        run(Command::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"))
    };
    install().or_else(|_| {
        update_package_lists();
        install()
    })
}

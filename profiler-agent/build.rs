//! Builds the kernel programs from source and names their object for `include_bytes!`.

#[path = "../profiler-ebpf/toolchain.rs"]
mod toolchain;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use self::toolchain::{Compiler, TARGET, Toolchain};

const PACKAGE: &str = "profiler-ebpf";

fn main() -> Result<(), String> {
    let manifest_dir = PathBuf::from(required("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().ok_or("profiler-agent has no parent folder")?;
    for input in ["profiler-ebpf", "profiler-common", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo::rerun-if-env-changed=PATH");

    let target_dir = PathBuf::from(required("OUT_DIR")?).join("bpf");
    let toolchain = Toolchain::find(workspace).map_err(|missing| missing.to_string())?;
    build(&toolchain, workspace, &target_dir, &required("CARGO_CFG_TARGET_ARCH")?)?;
    let object = target_dir.join(TARGET).join("release").join(PACKAGE);
    println!("cargo::rustc-env=PROFILER_EBPF_OBJECT={}", object.display());
    Ok(())
}

fn required(variable: &str) -> Result<String, String> {
    env::var(variable).map_err(|_| format!("cargo did not set {variable}"))
}

/// Builds the kernel programs with a cargo of their own, into a target folder of their own.
fn build(toolchain: &Toolchain, workspace: &Path, target_dir: &Path, bpf_arch: &str) -> Result<(), String> {
    let flags = [
        format!("--cfg=bpf_target_arch=\"{bpf_arch}\""),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", toolchain.linker.display()),
    ];
    let mut cargo = match &toolchain.compiler {
        Compiler::NightlyBuildStd => {
            let mut cargo = Command::new("rustup");
            cargo.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
            cargo.env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
            cargo
        }
        Compiler::PrecompiledCore { rustc } => {
            let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            // The programs use asm_experimental_arch: core has no atomic add for BPF.
            cargo.arg("build").env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
            cargo
        }
    };
    // What the outer cargo set for its own compiler must not reach this one.
    for variable in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTDOC", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(variable);
    }
    let status = cargo
        .current_dir(workspace)
        .args(["--release", "--package", PACKAGE, "--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .status()
        .map_err(|error| format!("cargo could not be started: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("building the kernel programs failed ({status}); toolchain: {toolchain}"))
    }
}

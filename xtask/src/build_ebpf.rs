//! Compiling `agent-ebpf` to the object that the agent takes into its binary.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;

use crate::run;
use crate::toolchain::{Compiler, TARGET, linker};
use crate::workspace::{bpf_build, bpf_object, root};

/// Options of `cargo xtask build-ebpf`.
#[derive(Debug, Default, Args)]
pub(crate) struct Arguments {
    /// Optimise less, for reading what the programs became.
    #[arg(long)]
    debug: bool,
}

/// Crates that may use unstable features: aya's for inline assembly, ours for atomics.
const UNSTABLE: &str = "aya_ebpf,dunlin_bpf";

const REMEDY: &str = "run `cargo xtask setup`, which installs what is missing, and try again";

/// Runs the verb.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    println!("{}", build(arguments)?);
    Ok(())
}

/// Builds the object, if its sources have changed; returns what there is to say.
pub(crate) fn build(arguments: &Arguments) -> Result<String> {
    let compiler = Compiler::find().ok_or_else(|| anyhow!("no Rust compiler for {TARGET}: {REMEDY}"))?;
    let linker = linker().ok_or_else(|| anyhow!("no bpf-linker of the pinned version: {REMEDY}"))?;
    let llvm = compiler
        .llvm()
        .ok_or_else(|| anyhow!("the compiler's LLVM library, which bpf-linker must load, was not found: {REMEDY}"))?;
    let build = bpf_build();
    let llvm = only_this(&llvm, &build.join("llvm"))?;
    let profile = if arguments.debug { "bpf-debug" } else { "release" };
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
        // Atomic fetch-and-or needs the third version of the instruction set (Linux 5.12).
        "-Ctarget-cpu=v3".to_owned(),
    ];
    let mut command = compiler.cargo_build(UNSTABLE);
    command
        .current_dir(root())
        .args(["--profile", profile, "--package", "dunlin-ebpf", "--features", "bpf", "--bin", "dunlin-bpf"])
        .arg("--target-dir")
        .arg(&build)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("LD_LIBRARY_PATH", llvm)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET");
    run::run(&mut command).context("the BPF programs did not compile; the compiler's words are above")?;

    let built = build.join(TARGET).join(profile).join("dunlin-bpf");
    let bytes = fs::read(&built).with_context(|| format!("{} was not built", built.display()))?;
    // The section's name, or the end of `.rel.BTF` with which linkers share it.
    if !bytes.windows(5).any(|window| window == b".BTF\0") {
        bail!("{} has no type information: bpf-linker did not honour --btf; {REMEDY}", built.display());
    }
    install(&bytes, &bpf_object())?;
    Ok(format!("{} ({} KiB, {profile})", relative(&bpf_object()).display(), bytes.len().div_ceil(1024)))
}

/// A folder in which `library` is the only one: bpf-linker loads whichever LLVM it meets first.
fn only_this(library: &Path, folder: &Path) -> Result<PathBuf> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| format!("{} could not be made", folder.display()))?;
    std::os::unix::fs::symlink(library, folder.join("libLLVM.so"))
        .with_context(|| format!("a link to {} could not be made", library.display()))?;
    Ok(folder.to_owned())
}

/// Puts the object in place at once, and only if it differs, so that the agent is not built again for nothing.
fn install(bytes: &[u8], object: &Path) -> Result<()> {
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let folder = object.parent().unwrap_or(root());
    fs::create_dir_all(folder).with_context(|| format!("{} could not be made", folder.display()))?;
    let fresh = bpf_build().join("dunlin.bpf.o.fresh");
    fs::write(&fresh, bytes).with_context(|| format!("{} could not be written", fresh.display()))?;
    fs::rename(&fresh, object).with_context(|| format!("{} could not be replaced", object.display()))
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix(root()).unwrap_or(path)
}

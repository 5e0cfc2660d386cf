//! Finding a Rust that compiles for BPF, the linker, and the LLVM that the linker must load. By trial: what is found is
//! what really answers.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run;

/// The BPF target: little-endian, as the hosts are.
pub(crate) const TARGET: &str = "bpfel-unknown-none";
/// The linker's version; its LLVM bindings follow the compiler's.
pub(crate) const LINKER_VERSION: &str = "0.10.2";

/// A compiler for BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Compiler {
    /// A compiler with a prebuilt `core` for BPF, such as Debian's `rustc-web` with `libstd-rust-web-dev-bpf`.
    Prebuilt {
        /// Its `rustc`.
        rustc: PathBuf,
        /// The `cargo` beside it.
        cargo: PathBuf,
    },
    /// A rustup nightly with `rust-src`, which builds `core` itself.
    Nightly,
}

impl Compiler {
    /// The first compiler that is there.
    pub(crate) fn find() -> Option<Self> {
        let (rustc, cargo) = (PathBuf::from("/usr/bin/rustc"), PathBuf::from("/usr/bin/cargo"));
        if cargo.is_file() && has_core(&rustc) {
            return Some(Self::Prebuilt { rustc, cargo });
        }
        let sysroot = run::output("rustup", &["run", "nightly", "rustc", "--print", "sysroot"])?;
        Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file().then_some(Self::Nightly)
    }

    /// The `cargo build` to which the caller adds package and target folder. `bootstrap` names the crates that may use
    /// unstable features.
    pub(crate) fn cargo_build(&self, bootstrap: &str) -> Command {
        match self {
            Self::Prebuilt { rustc, cargo } => {
                let mut command = Command::new(cargo);
                command.args(["build", "--target", TARGET]);
                command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", bootstrap);
                command
            }
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core", "--target", TARGET]);
                command.env_remove("RUSTC");
                command
            }
        }
    }

    /// The LLVM library that this compiler itself uses: the linker must read exactly its bitcode.
    pub(crate) fn llvm(&self) -> Option<PathBuf> {
        let ask = |arguments: &[&str]| match self {
            Self::Prebuilt { rustc, .. } => run::output(rustc, arguments),
            Self::Nightly => run::output("rustup", &[&["run", "nightly", "rustc"], arguments].concat()),
        };
        let version = ask(&["-vV"])?;
        let version = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
        let mut numbers = version.split('.');
        let (major, minor) = (numbers.next()?, numbers.next()?);
        let wanted = [format!("libLLVM.so.{major}.{minor}"), format!("libLLVM-{major}")];
        let lib = Path::new(&ask(&["--print", "sysroot"])?).join("lib");
        let multiarch = lib.join(format!("{}-linux-gnu", std::env::consts::ARCH));
        let active = run::output("rustc", &["--print", "sysroot"]).map(|sysroot| Path::new(&sysroot).join("lib"));
        [Some(multiarch), Some(lib), active].into_iter().flatten().find_map(|folder| {
            let files = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
            let mut files: Vec<PathBuf> = files.filter(|file| is_library(file, &wanted)).collect();
            files.sort_by_key(|file| std::cmp::Reverse(size(file)));
            files.into_iter().next()
        })
    }
}

/// A library that is wanted, and no text script that only names one.
fn is_library(file: &Path, wanted: &[String]) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    wanted.iter().any(|prefix| name.starts_with(prefix.as_str())) && size(file) > 1 << 20
}

fn size(file: &Path) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.len())
}

fn has_core(rustc: &Path) -> bool {
    let Some(folder) = run::output(rustc, &["--print", "target-libdir", "--target", TARGET]) else { return false };
    std::fs::read_dir(folder).is_ok_and(|mut files| {
        files.any(|file| file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libcore-")))
    })
}

/// The linker, if the wanted version is there.
pub(crate) fn linker() -> Option<PathBuf> {
    let linker = run::find("bpf-linker")?;
    (run::output(&linker, &["--version"])?.split(' ').nth(1) == Some(LINKER_VERSION)).then_some(linker)
}

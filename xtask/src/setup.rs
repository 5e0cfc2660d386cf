//! Installing what is missing. The table below says what each thing is for and how it is known to be there.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::run;
use crate::toolchain::{Compiler, LINKER_VERSION, linker};

/// Options of `cargo xtask setup`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only print what is missing and how it would be installed; fails if anything is.
    #[arg(long)]
    check: bool,
}

/// Debian packages that bring a compiler for BPF with a prebuilt `core`.
const COMPILER_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// Programs that the tests run: program, Debian package, why.
const TEST_TOOLS: [(&str, &str, &str); 11] = [
    ("qemu-system-x86_64", "qemu-system-x86", "the test guest boots under QEMU too, and QEMU is the peer of benches"),
    ("ip", "iproute2", "network namespaces of the tests"),
    ("bridge", "iproute2", "forwarding tables of the tests' bridges"),
    ("ping", "iputils-ping", "packets of the tests' clients"),
    ("setpriv", "util-linux", "tests of what may be done without root"),
    ("tcpdump", "tcpdump", "looking into a test's network"),
    ("tc", "iproute2", "delay and loss on the tests' links"),
    ("mkfs.ext4", "e2fsprogs", "disks of the tests' Linux guests"),
    ("xz", "xz-utils", "compressed modules of distributions' kernels"),
    ("zstd", "zstd", "the same"),
    ("tshark", "tshark", "an independent reader of announced frames"),
];

/// One thing that is missing, and the way to get it.
#[derive(Debug)]
struct Missing {
    what: String,
    why: &'static str,
    way: Way,
}

#[derive(Debug)]
enum Way {
    /// Debian packages (needs root).
    Packages(Vec<&'static str>),
    /// A rustup nightly with the sources of `core`.
    Nightly,
    /// The BPF linker from its registry.
    Linker,
}

/// Runs the verb.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        eprintln!("Everything is there: nothing to install.");
        return Ok(());
    }
    announce(&missing);
    if arguments.check {
        bail!("{} missing; `cargo xtask setup` installs what is listed above", count(&missing));
    }
    install(&missing)
}

/// Installs what is missing; says what first, and nothing when all is there.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    announce(&missing);
    install(&missing)
}

fn missing() -> Result<Vec<Missing>> {
    let mut missing = Vec::new();
    if Compiler::find().is_none() {
        let what = "a Rust compiler for the BPF target".to_owned();
        let way = if run::find("apt-get").is_some() {
            Way::Packages(COMPILER_PACKAGES.to_vec())
        } else if run::find("rustup").is_some() {
            Way::Nightly
        } else {
            bail!(
                "no Rust compiler for the BPF target, and neither apt-get nor rustup to install one with: install \
                 rustup, then `rustup toolchain install nightly --component rust-src`"
            );
        };
        missing.push(Missing { what, why: "compiles the BPF programs", way });
    }
    if linker().is_none() {
        let what = format!("bpf-linker {LINKER_VERSION}");
        missing.push(Missing { what, why: "links the BPF programs (compiling it takes minutes)", way: Way::Linker });
    }
    for (program, package, why) in TEST_TOOLS {
        if run::find(program).is_none() {
            missing.push(Missing { what: program.to_owned(), why, way: Way::Packages(vec![package]) });
        }
    }
    if sharer().is_none() {
        // Debian 12 has it in QEMU's common files, later ones in a package of its own.
        let package = if run::output("apt-cache", &["show", "virtiofsd"]).is_some_and(|text| !text.is_empty()) {
            "virtiofsd"
        } else {
            "qemu-system-common"
        };
        let why = "shares this host's files with the test machine, read only";
        missing.push(Missing { what: "virtiofsd".into(), why, way: Way::Packages(vec![package]) });
    }
    Ok(missing)
}

/// Where a distribution puts the program that shares files: QEMU's own in C, or its successor.
const SHARERS: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd"];

/// The program that shares files.
pub(crate) fn sharer() -> Option<PathBuf> {
    SHARERS.iter().map(PathBuf::from).find(|path| path.is_file()).or_else(|| run::find("virtiofsd"))
}

fn count(missing: &[Missing]) -> String {
    if let [one] = missing { format!("{} is", one.what) } else { format!("{} things are", missing.len()) }
}

fn announce(missing: &[Missing]) {
    eprintln!("To be installed:");
    for Missing { what, why, way } in missing {
        eprintln!("  {what}: {why}\n    by {}", way.describe());
    }
}

impl Way {
    fn describe(&self) -> String {
        match self {
            Self::Packages(packages) => format!("`apt-get install {}` (as root)", packages.join(" ")),
            Self::Nightly => run::words(&nightly()),
            Self::Linker => run::words(&cargo_install_linker()),
        }
    }
}

fn install(missing: &[Missing]) -> Result<()> {
    let packages: Vec<&str> = missing
        .iter()
        .flat_map(|missing| if let Way::Packages(packages) = &missing.way { packages.as_slice() } else { &[] })
        .copied()
        .collect();
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    for Missing { way, .. } in missing {
        match way {
            Way::Packages(_) => {}
            Way::Nightly => run::run(&mut nightly()).context(NIGHTLY_HELP)?,
            Way::Linker => run::run(&mut cargo_install_linker())
                .context("bpf-linker could not be built: it needs the crates registry and a C compiler")?,
        }
    }
    eprintln!("Everything is there.");
    Ok(())
}

const NIGHTLY_HELP: &str = "rustup could not install a nightly with rust-src; where Debian's packages `rustc-web cargo-web \
                            libstd-rust-web-dev-bpf` exist, install those instead";

fn install_packages(packages: &[&str]) -> Result<()> {
    if run::output("id", &["-u"]).as_deref() != Some("0") {
        bail!("installing Debian packages needs root: run `sudo apt-get install {}` and try again", packages.join(" "));
    }
    let known = |package: &&&str| run::output("apt-cache", &["show", package]).is_some_and(|text| !text.is_empty());
    if packages.iter().filter(known).count() < packages.len() {
        run::run(Command::new("apt-get").arg("update").stdin(Stdio::null()))
            .context("the package lists could not be fetched: check the network and /etc/apt")?;
    }
    let unknown: Vec<&str> = packages.iter().filter(|package| !known(package)).copied().collect();
    if unknown.is_empty() {
        let mut command = Command::new("apt-get");
        command.args(["install", "--yes", "--no-install-recommends"]).args(packages);
        return run::run(command.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()));
    }
    let only_compiler_unknown = unknown.iter().all(|package| COMPILER_PACKAGES.contains(package));
    if only_compiler_unknown && run::find("rustup").is_some() {
        eprintln!("This distribution has no {}: taking a rustup nightly instead.", unknown.join(", "));
        run::run(&mut nightly()).context(NIGHTLY_HELP)?;
        let rest: Vec<&str> = packages.iter().filter(|p| !COMPILER_PACKAGES.contains(p)).copied().collect();
        return if rest.is_empty() { Ok(()) } else { install_packages(&rest) };
    }
    bail!("this distribution has no package {}: install what it stands for by hand", unknown.join(", "))
}

fn nightly() -> Command {
    let mut command = Command::new("rustup");
    command.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
    command
}

fn cargo_install_linker() -> Command {
    let mut command = Command::new("cargo");
    command.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"]);
    command
}

//! `demo` and `soak`: build what they need, then become the program that shows it (`tests/src/bin/dunlin-demo`).
//!
//! Becomes, not starts: Ctrl-C then goes to the one process that has things to take down.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::build_ebpf;
use crate::build_guest;
use crate::run;
use crate::setup;
use crate::workspace::root;

/// Options of `cargo xtask demo` and `soak`: passed on to the program.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Options of the program; `--help` lists them.
    #[arg(allow_hyphen_values = true, trailing_var_arg = true, value_name = "OPTIONS")]
    rest: Vec<String>,
}

/// Runs the verb; returns only if it could not.
pub(crate) fn run(verb: &str, arguments: &Arguments) -> Result<bool> {
    let asks_help = arguments.rest.iter().any(|option| option == "--help" || option == "-h");
    if !asks_help {
        if run::output("id", &["-u"]).as_deref() != Some("0") {
            bail!("`cargo xtask {verb}` makes network namespaces and VMs: run it as root");
        }
        if !Path::new("/dev/kvm").exists() {
            bail!("no /dev/kvm: load the kernel's module for this CPU (kvm_intel, kvm_amd), or enable nested VMs");
        }
    }
    let release = root().join("target/release");
    if !asks_help || !release.join("dunlin-demo").is_file() {
        setup::ensure()?;
        eprintln!("Building the BPF programs, dunlin and the test guest, where they are not up to date ...");
        build_ebpf::build(&build_ebpf::Arguments::default())?;
        build_guest::run()?;
        // No choice of packages: a feature that one of them switches on must not rebuild the others next time.
        let packages = ["--package", "dunlin", "--package", "dunlin-tests"];
        run::run(Command::new("cargo").args(["build", "--release", "--bins"]).args(packages).current_dir(root()))?;
    }
    let mut command = Command::new(release.join("dunlin-demo"));
    command.arg(verb).args(&arguments.rest).env("DUNLIN_BIN", release.join("dunlin"));
    Err(command.exec()).with_context(|| format!("{} could not be started", run::words(&command)))
}

//! Shows and proves live migration on this one machine: `demo` tells the story once, `soak` repeats it.
//!
//! Started by `cargo xtask demo` and `cargo xtask soak`, which build what it needs. Apart from xtask so that a change in the
//! agent, or a broken one, never keeps xtask itself from building.

mod demo;
mod judge;
mod soak;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use dunlin_tests::interrupt;

/// Live migration between two network namespaces of this machine. Needs root and /dev/kvm.
#[derive(Debug, Parser)]
#[command(name = "dunlin-demo")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Move a VM once and show everything that matters.
    Demo(demo::Arguments),
    /// Move a VM back and forth many times and count every error.
    Soak(soak::Arguments),
}

/// What a shell calls "ended by Ctrl-C".
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if interrupt::is_set() => {
            eprintln!("interrupted; everything was taken down");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let cli = Cli::parse();
    ensure!(rustix::process::geteuid().is_root(), "this makes network namespaces and VMs: run it as root");
    interrupt::install().context("take Ctrl-C")?;
    match cli.verb {
        Verb::Demo(arguments) => demo::run(&arguments),
        Verb::Soak(arguments) => soak::run(&arguments),
    }
}

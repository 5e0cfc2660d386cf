//! Build and test tasks; see `cargo xtask --help`. One file a verb; each calls the verbs that it needs.

mod bench;
mod build_ebpf;
mod build_guest;
mod demo;
mod ignored;
mod interrupt;
mod process;
mod qmp;
mod run;
mod setup;
mod summary;
mod test;
mod test_vm;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of the Dunlin workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Install what building and testing need: says what first, does nothing when all is there.
    Setup(setup::Arguments),
    /// Compile the BPF programs to target/bpf/dunlin.bpf.o.
    BuildEbpf(build_ebpf::Arguments),
    /// Build the test guest, and put it where the agent takes it into its binary.
    BuildGuest,
    /// Move a VM between two network namespaces and show what happens (needs root and /dev/kvm).
    #[command(disable_help_flag = true)]
    Demo(demo::Arguments),
    /// Move a VM back and forth many times and count every error (needs root and /dev/kvm).
    #[command(disable_help_flag = true)]
    Soak(demo::Arguments),
    /// Build everything, check formatting and lints, run all tests.
    Test(test::Arguments),
    /// Run suites on distributions' kernels, in a machine of their own (needs root and QEMU).
    TestVm(test_vm::Arguments),
    /// Measure Dunlin beside its peers in the same run; prints a table, or JSON.
    Bench(bench::Arguments),
    /// The receiving end of a bench's raw TCP peer.
    #[command(name = bench::RECEIVER_VERB, hide = true)]
    RawTcpReceiver,
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Setup(arguments) => setup::run(&arguments).map(|()| true),
        Verb::BuildEbpf(arguments) => build_ebpf::run(&arguments).map(|()| true),
        Verb::BuildGuest => build_guest::run().map(|()| true),
        Verb::Demo(arguments) => demo::run("demo", &arguments),
        Verb::Soak(arguments) => demo::run("soak", &arguments),
        Verb::Test(arguments) => test::run(&arguments),
        Verb::TestVm(arguments) => test_vm::run(&arguments),
        Verb::Bench(arguments) => bench::run(&arguments).map(|()| true),
        Verb::RawTcpReceiver => bench::receiver().map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

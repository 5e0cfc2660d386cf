//! Everything that must hold before a change is kept: the build, formatting, lints, all tests.
//!
//! No test is skipped for what the host lacks: a missing KVM, BPF or network namespace fails the tests that need it, on a
//! developer's machine as under CI.

use std::io;
use std::process::{Command, Output};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::build_ebpf;
use crate::build_guest;
use crate::ignored;
use crate::run;
use crate::setup;
use crate::summary::{Runner, Totals};
use crate::test_vm;
use crate::workspace::root;

/// Where proptest reads the seed that its cases are drawn from.
const SEED_VARIABLE: &str = "PROPTEST_RNG_SEED";
/// What it is under CI: a change is to be judged by what it changes.
const CI_SEED: &str = "1";

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Run the tests only: no formatting, no lints.
    #[arg(long)]
    tests_only: bool,
    /// Boot every pinned kernel in the test machine, not only the first, and run all suites there, also those that this host runs.
    #[arg(long)]
    all: bool,
    /// Leave the test machine out.
    #[arg(long, conflicts_with = "all")]
    no_vm: bool,
    /// Passed on to the test runner, after `--`.
    #[arg(last = true)]
    runner: Vec<String>,
}

/// Runs the verb; false when a test failed.
pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    setup::ensure()?;
    build_ebpf::run(&build_ebpf::Arguments::default())?;
    let guest = root().join("tests/guest");
    let has_guest = guest.join("Cargo.toml").is_file();
    if has_guest {
        build_guest::run()?;
    }
    if !arguments.tests_only {
        check(&["fmt", "--all", "--check"], "run `cargo fmt --all`")?;
    }
    // Binaries that the integration suites start, and the tests beside them: apart, the library would be built twice, since the
    // features of what it uses are not the same without the tests' own dependencies.
    run::run(Command::new("cargo").args(["build", "--workspace", "--all-targets"]).current_dir(root()))?;

    let mut totals = Totals::default();
    let mut fine = true;
    if has_guest && guest.join("src/lib.rs").is_file() {
        let mut command = Command::new("cargo");
        command.args(["test", "--lib"]).current_dir(&guest);
        fine &= run::watched(&mut command, |line| totals.read(Runner::Libtest, line))?;
    }
    let (runner, words): (_, &[&str]) = if run::output("cargo", &["nextest", "--version"]).is_some() {
        (Runner::Nextest, &["nextest", "run"])
    } else {
        (Runner::Libtest, &["test"])
    };
    let mut command = Command::new("cargo");
    // Without --no-fail-fast the summary would not count what did not run.
    command.args(words).args(["--workspace", "--no-fail-fast"]);
    command.args(&arguments.runner).current_dir(root());
    if std::env::var_os("CI").is_some() && std::env::var_os(SEED_VARIABLE).is_none() {
        println!(
            "property tests begin from one seed under CI ({SEED_VARIABLE}={CI_SEED}); elsewhere each run has its own"
        );
        command.env(SEED_VARIABLE, CI_SEED);
    }
    fine &= run::watched(&mut command, |line| totals.read(runner, line))?;
    if fine && totals.passed == 0 {
        bail!("the test runner succeeded without running a test");
    }
    if !fine && totals.failed == 0 {
        // No totals: they would say that nothing failed.
        bail!("the test runner itself failed, so not all tests have run; its words are above");
    }
    let lints = (!arguments.tests_only).then(Lints::begin);
    let (left_out, in_vm): (Vec<_>, Vec<_>) = ignored::list(root())?.into_iter().partition(|test| !test.runs_in_vm());
    if arguments.no_vm {
        println!("left out: the test machine, and with it {} tests (--no-vm)", in_vm.len());
    } else {
        for machine in [test_vm::Arguments::of_test(arguments.all), test_vm::Arguments::of_self_test()] {
            let machine = test_vm::test(&machine)?;
            fine &= machine.failed == 0;
            totals.add(machine);
        }
        // The host's runner has counted them as skipped; they have just been run.
        totals.skipped = totals.skipped.saturating_sub(in_vm.len() as u64);
    }
    if let Some(lints) = lints {
        fine &= lints.end()?;
    }
    for test in left_out {
        println!("{test}");
    }
    println!("{totals}");
    Ok(fine)
}

/// The lints, looked at beside the test machine, which has work for one processor and goes first.
struct Lints(JoinHandle<io::Result<Output>>);

impl Lints {
    fn begin() -> Self {
        println!("lints: cargo clippy goes on beside what follows");
        let words = ["-n", "19", "cargo", "clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        Self(thread::spawn(move || Command::new("nice").args(words).current_dir(root()).output()))
    }

    /// Waits for them; false if there is something to be said.
    fn end(self) -> Result<bool> {
        let Ok(output) = self.0.join() else { bail!("the thread that waits for cargo clippy panicked") };
        let output = output.context("cargo clippy could not be started")?;
        if output.status.success() {
            println!("lints: none");
            return Ok(true);
        }
        println!("{}", String::from_utf8_lossy(&output.stderr));
        println!("lints: FAILED; see above; `cargo clippy --fix` helps with some");
        Ok(false)
    }
}

fn check(arguments: &[&str], remedy: &str) -> Result<()> {
    if let Err(error) = run::run(Command::new("cargo").args(arguments).current_dir(root())) {
        bail!("{error}: {remedy}");
    }
    Ok(())
}

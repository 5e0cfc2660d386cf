//! The command line: arguments in, human text or JSON out. One file a subcommand; calls [`crate::service`], has no logic.

mod announce;
mod dirty_rate;
mod doctor;
mod migrate;
mod places;
mod resolve;
mod signals;
mod vm;

use clap::{Parser, Subcommand};

/// Watches how KVM guests write memory, tames the writers, moves a running VM, and proves that the network followed.
#[derive(Debug, Parser)]
#[command(name = "dunlin", version, about, long_about = None, propagate_version = true)]
pub struct Cli {
    /// Print one JSON object a line instead of text.
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Announce(announce::AnnounceArgs),
    Migrate(migrate::MigrateArgs),
    Resolve(resolve::ResolveArgs),
    #[command(subcommand)]
    Vm(vm::VmCommand),
    DirtyRate(dirty_rate::DirtyRateArgs),
    Doctor(doctor::DoctorArgs),
}

impl Cli {
    /// Runs the command and returns its exit code (see [`crate::model::outcome::exit`]).
    ///
    /// # Errors
    /// What went wrong, with context; the caller prints it and exits with code 1.
    pub fn run(self) -> anyhow::Result<u8> {
        match self.command {
            Command::Announce(arguments) => arguments.run(self.json),
            Command::Migrate(arguments) => arguments.run(self.json),
            Command::Resolve(arguments) => arguments.run(self.json),
            Command::Vm(command) => command.run(self.json),
            Command::DirtyRate(arguments) => arguments.run(self.json),
            Command::Doctor(arguments) => arguments.run(self.json),
        }
    }
}

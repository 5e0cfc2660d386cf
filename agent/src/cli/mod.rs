//! The command line: arguments in, human text or JSON out. One file a subcommand; calls [`crate::service`], has no logic.

mod addresses;
mod agent;
mod announce;
mod dirty_rate;
mod doctor;
mod exits;
mod heat;
#[cfg(test)]
mod json_doc;
mod migrate;
mod network;
mod pki;
mod places;
mod predict;
mod profiling;
mod record;
mod reducers;
mod replay;
mod report;
mod resolve;
mod rogue;
mod signals;
mod stun;
mod top;
mod tunnel;
mod vm;
mod watch;
mod wws;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::model::outcome::exit;
use crate::service::config::{self, Config};
use crate::service::out::complain;

/// Watches how KVM guests write memory, tames the writers, moves a running VM, and proves that the network followed.
#[derive(Debug, Parser)]
#[command(name = "dunlin", version, about, long_about = None, propagate_version = true)]
pub struct Cli {
    /// Print one JSON object a line instead of text.
    #[arg(long, global = true)]
    pub json: bool,

    /// Read this configuration file, which must exist [default: /etc/dunlin/dunlin.toml, if there is one].
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Announce(announce::AnnounceArgs),
    Addresses(addresses::AddressesArgs),
    Migrate(migrate::MigrateArgs),
    Report(report::ReportArgs),
    Resolve(resolve::ResolveArgs),
    #[command(subcommand)]
    Tunnel(tunnel::TunnelCommand),
    #[command(subcommand)]
    Vm(vm::VmCommand),
    DirtyRate(dirty_rate::DirtyRateArgs),
    Record(record::RecordArgs),
    Replay(replay::ReplayArgs),
    Top(top::TopArgs),
    Exits(exits::ExitsArgs),
    Wws(wws::WwsArgs),
    Heat(heat::HeatArgs),
    Rogue(rogue::RogueArgs),
    Predict(predict::PredictArgs),
    Stun(stun::StunArgs),
    #[command(hide = true)]
    StunHolder,
    Agent(agent::AgentArgs),
    #[command(subcommand)]
    Pki(pki::PkiCommand),
    Doctor(doctor::DoctorArgs),
}

impl Cli {
    /// Runs the command and returns its exit code (see [`crate::model::outcome::exit`]).
    ///
    /// # Errors
    /// What went wrong, with context; the caller prints it and exits with code 1.
    pub fn run(self) -> anyhow::Result<u8> {
        let json = self.json;
        // A process that a receiver starts is told everything by it.
        let config = match &self.command {
            Command::Vm(command) if command.is_told_everything() => Config::default(),
            Command::StunHolder => Config::default(),
            _ => match config::load(self.config.as_deref()) {
                Ok(config) => config,
                Err(error) => {
                    complain!("dunlin: {error}");
                    return Ok(exit::USAGE);
                }
            },
        };
        match self.command {
            Command::Announce(arguments) => arguments.run(json, &config),
            Command::Addresses(arguments) => arguments.run(json, &config),
            Command::Migrate(arguments) => arguments.run(json, &config),
            Command::Report(arguments) => arguments.run(json),
            Command::Resolve(arguments) => arguments.run(json, &config),
            Command::Tunnel(command) => command.run(json, &config),
            Command::Vm(command) => command.run(json, &config),
            Command::DirtyRate(arguments) => arguments.run(json, &config),
            Command::Record(arguments) => arguments.run(json, &config),
            Command::Replay(arguments) => arguments.run(json),
            Command::Top(arguments) => arguments.run(json, &config),
            Command::Exits(arguments) => arguments.run(json, &config),
            Command::Wws(arguments) => arguments.run(json, &config),
            Command::Heat(arguments) => arguments.run(json, &config),
            Command::Rogue(arguments) => arguments.run(json, &config),
            Command::Predict(arguments) => arguments.run(json, &config),
            Command::Stun(arguments) => arguments.run(json, &config),
            Command::StunHolder => stun::hold(),
            Command::Agent(arguments) => arguments.run(json, &config),
            Command::Pki(command) => command.run(json),
            Command::Doctor(arguments) => arguments.run(json, &config),
        }
    }
}

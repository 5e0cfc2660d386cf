//! `dunlin vm …`: machines hosted by Dunlin itself.

pub(super) mod balloon;
pub(super) mod orders;
pub(super) mod receive;
pub(super) mod run;

use clap::Subcommand;

use crate::service::config::Config;

/// Run, list, look at and steer the VMs that Dunlin hosts itself.
#[derive(Debug, Subcommand)]
pub(super) enum VmCommand {
    Run(run::RunArgs),
    Receive(receive::ReceiveArgs),
    List(orders::ListArgs),
    Info(orders::InfoArgs),
    Pause(orders::PauseArgs),
    Resume(orders::ResumeArgs),
    Stop(orders::StopArgs),
    Console(orders::ConsoleArgs),
    Balloon(balloon::BalloonArgs),
}

impl VmCommand {
    /// Whether the process that started this one says where everything is.
    pub(super) fn is_told_everything(&self) -> bool {
        matches!(self, Self::Run(arguments) if arguments.is_incoming())
    }

    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        match self {
            Self::Run(arguments) => arguments.run(json, config),
            Self::Receive(arguments) => arguments.run(json, config),
            Self::List(arguments) => arguments.run(json, config),
            Self::Info(arguments) => arguments.run(json, config),
            Self::Pause(arguments) => arguments.run(json, config),
            Self::Resume(arguments) => arguments.run(json, config),
            Self::Stop(arguments) => arguments.run(json, config),
            Self::Console(arguments) => arguments.run(json, config),
            Self::Balloon(arguments) => arguments.run(json, config),
        }
    }
}

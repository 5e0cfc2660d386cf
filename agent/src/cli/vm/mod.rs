//! `dunlin vm …`: machines hosted by Dunlin itself.

mod orders;
mod receive;
mod run;

use clap::Subcommand;

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
}

impl VmCommand {
    pub(super) fn run(self, json: bool) -> anyhow::Result<u8> {
        match self {
            Self::Run(arguments) => arguments.run(json),
            Self::Receive(arguments) => arguments.run(json),
            Self::List(arguments) => arguments.run(json),
            Self::Info(arguments) => arguments.run(json),
            Self::Pause(arguments) => arguments.run(json),
            Self::Resume(arguments) => arguments.run(json),
            Self::Stop(arguments) => arguments.run(json),
            Self::Console(arguments) => arguments.run(json),
        }
    }
}

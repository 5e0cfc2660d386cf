//! `dunlin doctor`.

use clap::Args;

use super::places::{RunDir, StateDir};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::service::config::Config;
use crate::service::doctor::{DoctorReport, Paths, ResultKind, Tier, examine};
use crate::service::out::{bytes, say};

/// Find out what this host can do, by really trying each thing
///
/// Says for everything that is missing whether the kernel lacks it or a policy forbids it, what it is for, and what to do.
/// Leaves nothing behind. Fails (1) only if something is missing without which no VM can run or move.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  dunlin doctor\n  dunlin doctor --json")]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

impl DoctorArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let DoctorArgs { run_dir, state_dir } = self;
        let report = examine(&Paths { run_dir: run_dir.path(config), state_dir: state_dir.path(config) });
        if json {
            say!("{}", serde_json::to_string(&report.tagged())?);
        } else {
            bytes(text(&report).as_bytes());
        }
        Ok(if report.ready { exit::DONE } else { exit::ERROR })
    }
}

fn text(report: &DoctorReport) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let mut tier = None;
    let mut checks: Vec<_> = report.checks.iter().collect();
    checks.sort_by_key(|check| check.tier as u8);
    for check in checks {
        if tier != Some(check.tier) {
            tier = Some(check.tier);
            let _ = writeln!(out, "{}", title(check.tier));
        }
        let word = match check.result {
            ResultKind::Works => "works",
            ResultKind::Missing => "MISSING",
            ResultKind::Refused => "REFUSED",
        };
        let _ = writeln!(out, "  {word:<8}{:<22}{}", check.name, check.detail);
        if let Some(remedy) = &check.remedy {
            let _ = writeln!(out, "{:32}for: {}\n{:32}do:  {remedy}", "", check.why, "");
        }
    }
    let verdict = if report.ready { "ready" } else { "NOT READY: something required is missing" };
    let _ = writeln!(out, "Linux {}: {verdict}", report.kernel);
    out
}

const fn title(tier: Tier) -> &'static str {
    match tier {
        Tier::Required => "Required, to run and move VMs",
        Tier::Network => "For the VM's network",
        Tier::Tracking => "For tracking",
        Tier::Optional => "Better where it is there",
    }
}

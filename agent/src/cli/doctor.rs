//! `dunlin doctor`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;

use super::places::{RunDir, StateDir};
use super::signals::cancel_on_signals;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::service::config::Config;
use crate::service::doctor::{DoctorReport, Finding, Paths, ResultKind, Tier, examine};
use crate::service::out::{bytes, complain, say};
use crate::service::prove::{Figure, ProofReport, ProveError, ProveRequest, prove};

/// Find out what this host can do, by really trying each thing
///
/// Says for everything that is missing whether the kernel lacks it or a policy forbids it, what it is for, and what to do.
/// Leaves nothing behind. Fails (1) only if something is missing without which no VM can run or move.
///
/// With --prove the test guest runs here, is watched and moved, for at most a minute: what worked, how far tracking was from
/// the truth, and what it cost.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin doctor\n  dunlin doctor --json\n  dunlin doctor --prove")]
pub(super) struct DoctorArgs {
    /// Run the test guest on this host, and measure.
    #[arg(long)]
    prove: bool,

    /// The test guest's ELF, instead of the one in this binary.
    #[arg(long, value_name = "FILE", requires = "prove")]
    guest: Option<PathBuf>,

    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

impl DoctorArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let DoctorArgs { prove, guest, run_dir, state_dir } = self;
        if prove {
            return proven(guest, json);
        }
        let report = examine(&Paths { run_dir: run_dir.path(config), state_dir: state_dir.path(config) });
        if json {
            say!("{}", serde_json::to_string(&report.tagged())?);
        } else {
            bytes(text(&report).as_bytes());
        }
        Ok(if report.ready { exit::DONE } else { exit::ERROR })
    }
}

fn proven(guest: Option<PathBuf>, json: bool) -> anyhow::Result<u8> {
    let cancel = cancel_on_signals()?;
    match prove(&ProveRequest { guest, show_progress: true }, &cancel) {
        Ok(report) => {
            if json {
                say!("{}", serde_json::to_string(&report.tagged())?);
            } else {
                bytes(proof_text(&report).as_bytes());
            }
            Ok(if report.proven { exit::DONE } else { exit::ERROR })
        }
        Err(error) => {
            complain!("dunlin: {error}");
            Ok(match error {
                ProveError::Cancelled => exit::CANCELLED,
                ProveError::NoGuest => exit::REFUSED,
                ProveError::File { .. } => exit::ERROR,
            })
        }
    }
}

fn text(report: &DoctorReport) -> String {
    let mut out = String::new();
    let mut tier = None;
    let mut checks: Vec<_> = report.checks.iter().collect();
    checks.sort_by_key(|check| check.tier as u8);
    for check in checks {
        if tier != Some(check.tier) {
            tier = Some(check.tier);
            let _ = writeln!(out, "{}", title(check.tier));
        }
        line(&mut out, check);
    }
    let verdict = if report.ready { "ready" } else { "NOT READY: something required is missing" };
    let _ = writeln!(out, "Linux {}: {verdict}", report.kernel);
    out
}

fn line(out: &mut String, check: &Finding) {
    let word = match check.result {
        ResultKind::Works => "works",
        ResultKind::Missing => "MISSING",
        ResultKind::Refused => "REFUSED",
        ResultKind::Failed => "FAILED",
    };
    let _ = writeln!(out, "  {word:<8}{:<22}{}", check.name, check.detail);
    if let Some(remedy) = &check.remedy {
        let _ = writeln!(out, "{:32}for: {}\n{:32}do:  {remedy}", "", check.why, "");
    }
}

fn proof_text(report: &ProofReport) -> String {
    let mut out = String::new();
    for proof in &report.checks {
        line(&mut out, &proof.finding);
        for figure in &proof.figures {
            let Figure { name, unit, median, least, most, samples } = figure;
            let value = |value: f64| shown(value, unit);
            let range = if *samples > 1 {
                format!(" ({} to {}, n={samples})", value(*least), value(*most))
            } else {
                String::new()
            };
            let _ = writeln!(out, "{:12}{name:<28}{}{range}", "", value(*median));
        }
    }
    let took = report.duration_ns as f64 / 1e9;
    let verdict = if report.proven { "VMs run and move here" } else { "NOT PROVEN: something required did not work" };
    let _ = writeln!(out, "Linux {}: {verdict} ({took:.1} s)", report.kernel);
    out
}

/// A figure with its unit.
fn shown(value: f64, unit: &str) -> String {
    match unit {
        "ns" => format!("{:.2} ms", value / 1e6),
        "percent" => format!("{value:.2} %"),
        "ratio" => format!("{value:.3}"),
        "pages_per_second" => format!("{value:.0} pages/s"),
        other => format!("{value:.0} {other}"),
    }
}

const fn title(tier: Tier) -> &'static str {
    match tier {
        Tier::Required => "Required, to run and move VMs",
        Tier::Network => "For the VM's network",
        Tier::Tracking => "For tracking",
        Tier::Optional => "Better where it is there",
    }
}

//! `dunlin vm balloon`: how much of its memory a guest has, is to have, and does not need.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;

use super::super::places::RunDir;
use super::super::signals::cancel_on_signals;
use crate::model::VmRef;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_bytes, parse_duration, parse_size_bytes};
use crate::service::balloon::BalloonReport;
use crate::service::config::Config;
use crate::service::control::{Outcome, ask_balloon, give_order};
use crate::service::out::{complain, say};
use crate::service::registry::Registry;

/// How often progress is told, at most.
const TELLING: Duration = Duration::from_secs(1);

/// Show a VM's balloon, or change how much memory its guest has.
///
/// With --size, waits until the guest has followed. Ctrl-C ends the wait; the guest goes on.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin vm balloon web1
  dunlin vm balloon web1 --size 512MiB --timeout 30s
  dunlin vm balloon web1 --ask-free --json

Exit codes: 0 done; 1 the guest did not follow in time; 2 wrong arguments; 3 refused; 6 the wait was cancelled.")]
pub(in crate::cli) struct BalloonArgs {
    /// The VM: NAME, uuid:U or pid:P.
    vm: VmRef,

    /// What the guest is to have of its memory.
    #[arg(long, value_name = "SIZE", value_parser = parse_size_bytes)]
    size: Option<u64>,

    /// How long the guest may take to follow.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,

    /// Ask the guest once which of its pages are free.
    #[arg(long)]
    ask_free: bool,

    #[command(flatten)]
    run_dir: RunDir,
}

impl BalloonArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let registry = Registry::new(self.run_dir.path(config));
        let entry = match registry.find(&self.vm) {
            Ok(entry) => entry,
            Err(error) => return refuse(error.to_string(), json),
        };
        let (observe, act) = (registry.served(&entry, "observe"), registry.served(&entry, "control"));
        if self.ask_free
            && let Err(error) = give_order(&act, "/v1/balloon/ask-free", &[])
        {
            return refuse(error.to_string(), json);
        }
        let mut code = exit::DONE;
        if let Some(size) = self.size {
            if let Err(error) = give_order(&act, &format!("/v1/balloon?size_bytes={size}"), &[]) {
                return refuse(error.to_string(), json);
            }
            code = follow(&observe, self.timeout)?;
        }
        match ask_balloon(&observe, None, true) {
            Ok(report) if json => say!("{}", serde_json::to_string(&report.tagged())?),
            Ok(report) => show(&report),
            Err(error) => return refuse(error.to_string(), json),
        }
        Ok(code)
    }
}

fn refuse(error: String, json: bool) -> anyhow::Result<u8> {
    if json {
        say!("{}", serde_json::to_string(&Outcome { error }.tagged())?);
    } else {
        complain!("dunlin: {error}");
    }
    Ok(exit::REFUSED)
}

/// Waits until the guest has as much memory as it is to have, and tells how far it is.
fn follow(observe: &Path, timeout: Duration) -> anyhow::Result<u8> {
    let cancel = cancel_on_signals()?;
    let start = Instant::now();
    let mut told = start;
    let mut seen = None;
    loop {
        let report = ask_balloon(observe, seen, false)?;
        if report.has_followed() {
            return Ok(exit::DONE);
        }
        if cancel.is_set() {
            return Ok(exit::CANCELLED);
        }
        if start.elapsed() >= timeout {
            let missing = if report.driver { "" } else { ": its driver does not run the balloon" };
            complain!("dunlin: the guest has not followed within {timeout:?}{missing}");
            return Ok(exit::ERROR);
        }
        if told.elapsed() >= TELLING {
            told = Instant::now();
            let (has, wants) = (display_bytes(report.actual_bytes), display_bytes(report.target_bytes));
            complain!("the guest has {has}, on its way to {wants}");
        }
        seen = Some(report.progress);
    }
}

fn show(report: &BalloonReport) {
    let size = display_bytes;
    say!("memory       {}, the host keeps {}", size(report.memory_bytes), size(report.resident_bytes));
    say!("guest has    {}", size(report.actual_bytes));
    say!("target       {}", size(report.target_bytes));
    say!(
        "given back   {} by the balloon, {} reported as free",
        size(report.inflated_bytes),
        size(report.reported_bytes)
    );
    let able = [(report.reporting, "reports free pages"), (report.hinting, "names them when asked")];
    let able: Vec<_> = able.iter().filter(|(able, _)| *able).map(|(_, what)| *what).collect();
    match (report.driver, able.is_empty()) {
        (false, _) => say!("driver       none runs it"),
        (true, true) => say!("driver       runs"),
        (true, false) => say!("driver       {}", able.join(", ")),
    }
    if report.poisoned {
        say!("poison       free pages keep a pattern, so reported ones are not given back");
    }
    if report.held {
        say!("held         pages are only acknowledged at the moment");
    }
    if let Some(hints) = &report.hints {
        let complete = if hints.complete { "" } else { ", not all" };
        say!("free pages   {} named in round {}{complete}", hints.pages, hints.command_id);
    }
    let Some(guest) = &report.guest else { return };
    for (name, value) in [
        ("total", guest.total_bytes),
        ("free", guest.free_bytes),
        ("available", guest.available_bytes),
        ("disk cache", guest.disk_cache_bytes),
        ("swapped in", guest.swap_in_bytes),
        ("swapped out", guest.swap_out_bytes),
    ] {
        if let Some(value) = value {
            say!("guest says   {name} {}", size(value));
        }
    }
    if let (Some(major), Some(minor)) = (guest.major_faults, guest.minor_faults) {
        say!("guest says   page faults {major} with I/O, {minor} without");
    }
}

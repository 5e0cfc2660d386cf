//! `dunlin addresses`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use super::places::RunDir;
use crate::model::addresses::{AddressBook, KnownVm, LeftVm};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_duration, parse_duration};
use crate::service::addresses::{Keeper, of_agent};
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};

/// Which VM has which Ethernet and IP addresses at this host, whence it came and where those have gone that were here.
///
/// `dunlin agent` keeps this; where none runs, it is found out in passing. Two VMs on one bridge that share an address are named, and the exit code is 1.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin addresses
  dunlin addresses --json
  dunlin addresses --watch
  dunlin addresses --watch --interval 5s --json

Exit codes: 0 no address is shared; 1 one is; 2 wrong arguments.")]
pub(super) struct AddressesArgs {
    /// Print it again whenever it has changed, until Ctrl-C.
    #[arg(long)]
    watch: bool,

    /// How often it is looked whether it has (with --watch).
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration, requires = "watch")]
    interval: Duration,

    #[command(flatten)]
    run_dir: RunDir,
}

impl AddressesArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let run_dir = self.run_dir.path(config);
        let interrupt = Interrupt::install()?;
        let mut before: Option<AddressBook> = None;
        let mut keeper = None;
        let shared = loop {
            let (book, by_agent) = match of_agent(&run_dir) {
                Ok(book) => (book, true),
                Err(error) => {
                    tracing::debug!("no agent: {error}");
                    let keeper = keeper.get_or_insert_with(|| Keeper::beside(&run_dir));
                    (Arc::unwrap_or_clone(keeper.look_around()), false)
                }
            };
            let shared = !book.conflicts.is_empty();
            let is_news =
                before.as_ref().is_none_or(|before| AddressBook { unix_ms: book.unix_ms, ..before.clone() } != book);
            if is_news {
                if json {
                    say!("{}", serde_json::to_string(&book.tagged())?);
                } else {
                    say!("{}", describe(&book, by_agent).trim_end());
                }
            }
            before = Some(book);
            if !self.watch || interrupt.wait_until(Instant::now() + self.interval.max(SHORTEST)) {
                break shared;
            }
        };
        for conflict in before.iter().flat_map(|book| &book.conflicts) {
            complain!("dunlin addresses: {}", conflict.sentence());
        }
        Ok(if shared { exit::ERROR } else { exit::DONE })
    }
}

/// It is not looked more often.
const SHORTEST: Duration = Duration::from_millis(50);

fn describe(book: &AddressBook, by_agent: bool) -> String {
    let how = if by_agent { "kept by the agent" } else { "found in passing: no agent runs" };
    let plural = if book.vms.len() == 1 { "" } else { "s" };
    let mut text = format!("{} VM{plural} at {} ({how})\n", book.vms.len(), book.host);
    for vm in &book.vms {
        text += &describe_vm(vm, book.unix_ms);
    }
    for left in &book.left {
        text += &describe_left(left, book.unix_ms);
    }
    text
}

fn describe_vm(vm: &KnownVm, now_ms: u64) -> String {
    let came = match (&vm.came_by, &vm.came_from) {
        (Some(migration), Some(host)) => format!(", from {host} by migration {migration}"),
        (Some(migration), None) => format!(", by migration {migration}"),
        _ => String::new(),
    };
    let kind = if vm.is_hosted { "" } else { ", another VMM's" };
    let mut text = format!("{} (pid {}{kind}) for {}{came}\n", vm.vm_name, vm.pid, ago(vm.since_unix_ms, now_ms));
    if let Some(problem) = &vm.problem {
        text += &format!("  its cards are not known: {problem}\n");
    }
    for card in &vm.cards {
        let bridge = card.bridge.as_ref().map_or_else(String::new, |bridge| format!(" of {bridge}"));
        let vlan = card.vlan.map_or_else(String::new, |vlan| format!(", VLAN {vlan}"));
        text += &format!("  {} on {}{bridge}{vlan} (by {})\n", card.mac, card.tap, card.from);
        if card.ips.is_empty() {
            text += "    no IP address is known\n";
        }
        for found in &card.ips {
            text += &format!("    {} (by {})\n", found.ip, found.from);
        }
    }
    text
}

fn describe_left(left: &LeftVm, now_ms: u64) -> String {
    let went = match (&left.went_to, &left.went_by) {
        (Some(host), Some(migration)) => format!("went to {host} by migration {migration}"),
        _ => "ended here".to_owned(),
    };
    let macs: Vec<String> = left.macs.iter().map(ToString::to_string).collect();
    format!("{} {went}, {} ago ({})\n", left.vm_name, ago(left.left_unix_ms, now_ms), macs.join(", "))
}

/// A time until now, in whole seconds.
fn ago(then_ms: u64, now_ms: u64) -> String {
    display_duration(Duration::from_secs(now_ms.saturating_sub(then_ms) / 1000))
}

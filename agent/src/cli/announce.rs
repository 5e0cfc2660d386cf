//! `dunlin announce`: tells the network where a VM's addresses are now.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::signals::cancel_on_signals;
use crate::announce::Schedule;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_duration, parse_duration};
use crate::model::{AnnounceRound, MacAddress, Station};
use crate::service::announce::{AnnounceOrder, announce};
use crate::service::config::Config;
use crate::service::out::{complain, say};

/// Announce where a VM's addresses are now, so that switches and neighbours relearn them.
///
/// Each round sends a RARP frame, and for every address a gratuitous ARP request and reply (IPv4) or an unsolicited
/// neighbour advertisement (IPv6). The first round is sent at once; the gap after round k is initial + k·step, at most max.
/// The defaults are QEMU's: 0, 50, 200, 450 and 800 ms.
///
/// A tap under a bridge leads to the VM: the frames are then sent on its bridge, whose own table is set as well.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin announce --interface br0 --mac 52:54:00:12:34:56
  dunlin announce --interface tap0 --mac 52:54:00:12:34:56 --ip 10.0.0.7 --ip fd00::7 --json
  ip netns exec blue dunlin announce --interface eth0 --mac 52:54:00:12:34:56 --rounds 1

Exit codes: 0 all frames sent, 1 some were not, 2 wrong arguments, 3 refused before anything was sent, 6 cancelled.
Needs CAP_NET_RAW, and CAP_NET_ADMIN when a tap is named.")]
pub(super) struct AnnounceArgs {
    /// Interface to announce on, in this network namespace: a bridge, a NIC, or the VM's tap.
    #[arg(long, value_name = "I")]
    interface: String,

    /// Ethernet address of the VM.
    #[arg(long, value_name = "M")]
    mac: MacAddress,

    /// IPv4 or IPv6 address of the VM; may be given several times.
    #[arg(long = "ip", value_name = "A")]
    ips: Vec<IpAddr>,

    /// Number of rounds, 1 to 1000 [default: 5].
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,

    /// Gap after the first round [default: 50ms].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    initial: Option<Duration>,

    /// How much each gap is longer than the one before [default: 100ms].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    step: Option<Duration>,

    /// Longest gap [default: 550ms].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max: Option<Duration>,
}

impl AnnounceArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// Signals cannot be caught, or output cannot be written.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let configured = &config.announce;
        let schedule = match Schedule::new(
            self.initial.unwrap_or(configured.initial()),
            self.step.unwrap_or(configured.step()),
            self.max.unwrap_or(configured.max()),
            self.rounds.unwrap_or(configured.rounds()),
        ) {
            Ok(schedule) => schedule,
            Err(error) => {
                complain!("dunlin announce: {error}");
                return Ok(exit::USAGE);
            }
        };
        let cancel = cancel_on_signals().context("catching signals")?.as_atomic();
        let order = AnnounceOrder {
            interface: self.interface,
            stations: vec![Station { mac: self.mac, ips: self.ips }],
            schedule,
        };
        let mut print = |round: &AnnounceRound| print_round(round, json);
        let report = match announce(&order, &cancel, &mut print) {
            Ok(report) => report,
            Err(error) => {
                complain!("dunlin announce: {:#}", anyhow::Error::new(error));
                return Ok(exit::REFUSED);
            }
        };
        if json {
            say!("{}", serde_json::to_string(&report.tagged())?);
        } else {
            let stopped = if report.cancelled { "; cancelled" } else { "" };
            say!(
                "announced {} on {}: {} in {} of {} rounds{stopped}",
                self.mac,
                report.sent_on,
                frames(report.frames_sent),
                report.rounds_done,
                report.rounds_planned
            );
        }
        Ok(match report {
            report if report.frames_failed > 0 => exit::ERROR,
            report if report.cancelled => exit::CANCELLED,
            _ => exit::DONE,
        })
    }
}

fn frames(count: u32) -> String {
    format!("{count} frame{}", if count == 1 { "" } else { "s" })
}

fn print_round(round: &AnnounceRound, json: bool) {
    if json {
        match serde_json::to_string(&round.tagged()) {
            Ok(line) => say!("{line}"),
            Err(error) => complain!("dunlin announce: {error}"),
        }
        return;
    }
    let failed = match round.frames_failed {
        0 => String::new(),
        n => format!(", {n} failed"),
    };
    let after = display_duration(Duration::from_nanos(round.after_first_ns));
    say!("round {} after {after}: {}{failed}", round.round, frames(round.frames_sent));
    if let Some(error) = &round.error {
        complain!("dunlin announce: {error}");
    }
}

//! `dunlin announce`: tells the network where a VM's addresses are now.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::places::RunDir;
use super::signals::cancel_on_signals;
use crate::announce::{Schedule, ScheduleError};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_duration, parse_duration};
use crate::model::{AnnounceRound, MacAddress, Station, VlanTags};
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
  dunlin announce --interface bond0 --mac 52:54:00:12:34:56 --ip 10.0.0.7 --vlan 100.42
  dunlin announce --interface br0 --station mac=52:54:00:12:34:56,ip=10.0.0.7 --station mac=52:54:00:12:34:57,router=fe80::1
  dunlin announce --interface br0 --stations arrived.txt --frames-per-second 500 --jitter 100ms

Exit codes: 0 all frames sent, 1 some were not, 2 wrong arguments, 3 refused before anything was sent, 6 cancelled.
Needs CAP_NET_RAW, and CAP_NET_ADMIN when a tap is named.")]
pub(super) struct AnnounceArgs {
    /// Interface to announce on, in this network namespace: a bridge, a NIC, or the VM's tap.
    #[arg(long, value_name = "I")]
    interface: String,

    /// Ethernet address of the VM.
    #[arg(long, value_name = "M", required_unless_present_any = ["stations", "file"])]
    mac: Option<MacAddress>,

    /// IPv4 or IPv6 address of the VM; may be given several times.
    #[arg(long = "ip", value_name = "A", requires = "mac")]
    ips: Vec<IpAddr>,

    /// IPv6 address of a VM that routes, which its advertisements then say; may be given several times.
    #[arg(long = "router", value_name = "A", requires = "mac")]
    routers: Vec<Ipv6Addr>,

    /// VLAN tags of the frames: N (802.1Q), or OUTER.INNER (802.1ad outside).
    #[arg(long, value_name = "V", requires = "mac")]
    vlan: Option<VlanTags>,

    /// Another network card, mac=M[,ip=A]...[,router=A]...[,vlan=V]; may be given several times.
    #[arg(long = "station", value_name = "SPEC")]
    stations: Vec<Station>,

    /// A file with one such network card a line; empty lines and those that begin with # are skipped.
    #[arg(long = "stations", value_name = "FILE")]
    file: Option<PathBuf>,

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

    /// Each round after the first is up to so much later, at random [default: 0s].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    jitter: Option<Duration>,

    /// What all who announce at this host may send together [default: no limit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    frames_per_second: Option<u32>,

    #[command(flatten)]
    run_dir: RunDir,
}

impl AnnounceArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// Signals cannot be caught, or output cannot be written.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let schedule = match self.schedule(&config.announce.schedule) {
            Ok(schedule) => schedule,
            Err(error) => {
                complain!("dunlin announce: {error}");
                return Ok(exit::USAGE);
            }
        };
        let stations = match self.all_stations() {
            Ok(stations) => stations,
            Err(error) => {
                complain!("dunlin announce: {error:#}");
                return Ok(exit::USAGE);
            }
        };
        let cancel = cancel_on_signals().context("catching signals")?.as_atomic();
        let order = AnnounceOrder {
            interface: self.interface,
            stations,
            schedule,
            frames_per_second: self.frames_per_second.or(config.announce.frames_per_second),
            run_dir: self.run_dir.path(config),
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
                names(&report.stations),
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

impl AnnounceArgs {
    fn schedule(&self, configured: &Schedule) -> Result<Schedule, ScheduleError> {
        let schedule = Schedule::new(
            self.initial.unwrap_or(configured.initial()),
            self.step.unwrap_or(configured.step()),
            self.max.unwrap_or(configured.max()),
            self.rounds.unwrap_or(configured.rounds()),
        )?;
        let jitter = self.jitter.unwrap_or(configured.jitter());
        Ok(schedule.with_jitter(jitter)?.seeded(uuid::Uuid::new_v4().as_u64_pair().1))
    }

    /// All that the arguments name.
    fn all_stations(&self) -> anyhow::Result<Vec<Station>> {
        let mut stations = Vec::new();
        if let Some(mac) = self.mac {
            let mut station = Station { vlan: self.vlan, ..Station::new(mac, self.ips.clone()) };
            self.routers.iter().for_each(|&router| station.add_router(router));
            stations.push(station);
        }
        stations.extend(self.stations.iter().cloned());
        if let Some(file) = &self.file {
            stations.extend(read_stations(file)?);
        }
        anyhow::ensure!(!stations.is_empty(), "the file names no station");
        Ok(stations)
    }
}

fn read_stations(file: &Path) -> anyhow::Result<Vec<Station>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(at, line)| line.parse().with_context(|| format!("{}, line {at}", file.display())))
        .collect()
}

/// The addresses of a few stations; the number of many.
fn names(stations: &[Station]) -> String {
    match stations {
        [] => "nobody".to_owned(),
        [station] => station.mac.to_string(),
        [first, rest @ ..] => format!("{} and {} more", first.mac, rest.len()),
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

//! `dunlin announce`: tells the network where a VM's addresses are now.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgGroup, Args};

use super::places::{RunDir, StateDir};
use super::signals::cancel_on_signals;
use crate::announce::conflict::OnConflict;
use crate::announce::{Schedule, ScheduleError};
use crate::model::network::{Followed, FoundVm, ProbeReport, Seen, Verdict};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_duration, parse_duration};
use crate::model::{AnnounceReport, AnnounceRound, MacAddress, Station, VlanTags, VmId, VmRef};
use crate::service::announce::find::{self, FindCards};
use crate::service::announce::follow::{self, Follow};
use crate::service::announce::{AnnounceError, AnnounceOrder, News, Place, announce, probe};
use crate::service::config::Config;
use crate::service::out::{complain, say};

/// How long after the last round a bridge may take to relearn.
const AFTER_LAST_ROUND: Duration = Duration::from_secs(1);
/// How long somebody else's announcement is waited for.
const ONLY_WATCHING: Duration = Duration::from_secs(10);

/// Announce where a VM's addresses are now, so that switches and neighbours relearn them.
///
/// Each round sends a RARP frame, and for every address a gratuitous ARP request and reply (IPv4) or an unsolicited
/// neighbour advertisement (IPv6). The first round is sent at once; the gap after round k is initial + k·step, at most max.
/// The defaults are QEMU's: 0, 50, 200, 450 and 800 ms.
///
/// With a VM its taps, Ethernet and IP addresses are found out; else an interface and the addresses are named. A tap under a bridge leads to the VM: the frames are
/// then sent on its bridge, whose own table is set as well.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("where").required(true).multiple(true).args(["vm", "interface", "watch"]),
    after_help = "\
Examples:
  dunlin announce web-1
  dunlin announce pid:4711 --ip 10.0.0.7 --listen 0s
  dunlin announce --interface br0 --mac 52:54:00:12:34:56
  dunlin announce --interface tap0 --mac 52:54:00:12:34:56 --ip 10.0.0.7 --ip fd00::7 --json
  dunlin announce --interface bond0 --mac 52:54:00:12:34:56 --ip 10.0.0.7 --vlan 100.42
  dunlin announce --interface br0 --station mac=52:54:00:12:34:56,ip=10.0.0.7 --station mac=52:54:00:12:34:57,router=fe80::1
  dunlin announce --interface br0 --stations arrived.txt --frames-per-second 500 --jitter 100ms
  dunlin announce web-1 --watch br0 --on-conflict refuse
  dunlin announce --interface br0 --mac 52:54:00:12:34:56 --ip 10.0.0.7 --probe
  dunlin announce --watch sw0=port7 --mac 52:54:00:12:34:56 --within 30s
  ip netns exec blue dunlin announce --interface eth0 --mac 52:54:00:12:34:56 --rounds 1

Exit codes: 0 all frames sent, and relearned where it was watched; 1 some were not sent, or a table has not followed; 2 wrong arguments; 3 refused before anything was \
sent, or --probe has found a conflict; 6 cancelled.
Needs CAP_NET_RAW, and CAP_NET_ADMIN when a tap is named; of another VMM's VM also CAP_SYS_PTRACE.")]
pub(super) struct AnnounceArgs {
    /// The VM: NAME, uuid:U or pid:P.
    #[arg(conflicts_with_all = ["interface", "mac", "stations", "file"])]
    vm: Option<VmRef>,

    /// Interface to announce on, in this network namespace: a bridge, a NIC, or the VM's tap. Without it and without a VM nothing is sent, and --watch only watches.
    #[arg(long, value_name = "I")]
    interface: Option<String>,

    /// Ethernet address of the VM.
    #[arg(long, value_name = "M", required_unless_present_any = ["vm", "stations", "file"])]
    mac: Option<MacAddress>,

    /// IPv4 or IPv6 address of the VM; may be given several times.
    #[arg(long = "ip", value_name = "A")]
    ips: Vec<IpAddr>,

    /// IPv6 address of a VM that routes, which its advertisements then say; may be given several times.
    #[arg(long = "router", value_name = "A")]
    routers: Vec<Ipv6Addr>,

    /// VLAN tags of the frames: N (802.1Q), or OUTER.INNER (802.1ad outside).
    #[arg(long, value_name = "V")]
    vlan: Option<VlanTags>,

    /// Another network card, mac=M[,ip=A]...[,router=A]...[,vlan=V]; may be given several times.
    #[arg(long = "station", value_name = "SPEC")]
    stations: Vec<Station>,

    /// A file with one such network card a line; empty lines and those that begin with # are skipped.
    #[arg(long = "stations", value_name = "FILE")]
    file: Option<PathBuf>,

    /// For how long the VM's taps are listened to for its addresses; 0s: not at all.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "2s", requires = "vm")]
    listen: Duration,

    /// Monitor of the VM's QEMU, which knows its network cards: a Unix socket of its own.
    #[arg(long, value_name = "SOCKET", requires = "vm")]
    qmp: Option<PathBuf>,

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

    /// Watch whether a bridge of this network namespace relearns: BRIDGE, or BRIDGE=PORT where it is known behind which port; may be given several times.
    #[arg(long, value_name = "BRIDGE[=PORT]")]
    watch: Vec<Follow>,

    /// How long after the first round a table may take [default: until 1 s after the last; 10s where nothing is sent].
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "watch")]
    within: Option<Duration>,

    /// Only ask whether somebody else has the addresses; announce nothing.
    #[arg(long)]
    probe: bool,

    /// Ask before announcing, and if somebody else has the addresses: refuse, warn, or off (do not ask) [default: off].
    #[arg(long, value_name = "POLICY", conflicts_with = "probe")]
    on_conflict: Option<OnConflict>,

    /// For how long answers are waited for.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "300ms")]
    probe_for: Duration,

    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

impl AnnounceArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// Signals cannot be caught, or output cannot be written.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let usage = |error: anyhow::Error| {
            complain!("dunlin announce: {error:#}");
            Ok(exit::USAGE)
        };
        let schedule = match self.schedule(&config.announce.schedule) {
            Ok(schedule) => schedule,
            Err(error) => return usage(error.into()),
        };
        let stations = match self.all_stations() {
            Ok(stations) => stations,
            Err(error) => return usage(error),
        };
        let cancel = cancel_on_signals().context("catching signals")?.as_atomic();
        let run_dir = self.run_dir.path(config);
        let (vm, places) = match (self.vm, self.interface) {
            (Some(vm), _) => {
                let (listen, qmp, ips, routers, vlan) = (self.listen, self.qmp, self.ips, self.routers, self.vlan);
                let wanted = FindCards { run_dir: run_dir.clone(), vm, listen, qmp, ips, routers, vlan };
                match find::find(&wanted, &cancel) {
                    Ok((found, places)) => {
                        print_found(&found, json)?;
                        (Some(found.vm_id), places)
                    }
                    Err(error) => return Ok(refused(error.into())),
                }
            }
            (None, Some(interface)) => (None, vec![Place { interface, stations }]),
            (None, None) => {
                let within = self.within.unwrap_or(ONLY_WATCHING);
                let print = |news: News<'_>| print_news(news, json);
                return match follow::only(&stations, &self.watch, within, &cancel, &print) {
                    Ok(followed) => print_followed(&followed, json, is_set(&cancel)),
                    Err(error) => Ok(refused(error.into())),
                };
            }
        };
        if self.probe {
            return ask(&places, self.probe_for, &cancel, json);
        }
        let last = schedule.instants().last().unwrap_or_default();
        let order = AnnounceOrder {
            places,
            schedule,
            frames_per_second: self.frames_per_second.or(config.announce.frames_per_second),
            run_dir,
            on_conflict: self.on_conflict.or(config.announce.on_conflict).unwrap_or_default(),
            probe_for: self.probe_for,
            follow: self.watch,
            within: self.within.unwrap_or(last + AFTER_LAST_ROUND),
            vm: vm.map(|vm: VmId| (vm, self.state_dir.path(config))),
        };
        let print = |news: News<'_>| print_news(news, json);
        let announced = match announce(&order, &cancel, &print) {
            Ok(announced) => announced,
            Err(error) => return Ok(refused(error)),
        };
        let report = announced.report;
        print_report(&report, json)?;
        let followed = print_followed(&announced.followed, json, false)?;
        Ok(match report {
            report if report.frames_failed > 0 => exit::ERROR,
            report if report.cancelled => exit::CANCELLED,
            _ => followed,
        })
    }

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
        anyhow::ensure!(self.vm.is_some() || !stations.is_empty(), "the file names no station");
        anyhow::ensure!(
            self.mac.is_some()
                || self.vm.is_some()
                || (self.ips.is_empty() && self.routers.is_empty() && self.vlan.is_none()),
            "--ip, --router and --vlan belong to --mac; write --station mac=M,ip=A for others"
        );
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

fn is_set(flag: &AtomicBool) -> bool {
    flag.load(std::sync::atomic::Ordering::Acquire)
}

fn refused(error: AnnounceError) -> u8 {
    complain!("dunlin announce: {:#}", anyhow::Error::new(error));
    exit::REFUSED
}

/// Asks, and says what was answered.
fn ask(places: &[Place], patience: Duration, cancel: &AtomicBool, json: bool) -> anyhow::Result<u8> {
    let mut conflicts = 0;
    for place in places {
        match probe::probe(place, patience, cancel) {
            Ok(report) => {
                print_probe(&report, json)?;
                conflicts += report.conflicts.len();
            }
            Err(error) => return Ok(refused(error)),
        }
    }
    Ok(match conflicts {
        _ if is_set(cancel) => exit::CANCELLED,
        0 => exit::DONE,
        _ => exit::REFUSED,
    })
}

fn print_news(news: News<'_>, json: bool) {
    let printed = match news {
        News::Round(round) => print_round(round, json),
        News::Seen(seen) => print_seen(seen, json),
        News::Probed(report) => print_probe(report, json),
    };
    if let Err(error) = printed {
        complain!("dunlin announce: {error}");
    }
}

fn print_json(object: &impl Schema) -> serde_json::Result<()> {
    say!("{}", serde_json::to_string(&object.tagged())?);
    Ok(())
}

fn print_round(round: &AnnounceRound, json: bool) -> serde_json::Result<()> {
    if json {
        return print_json(round);
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
    Ok(())
}

fn print_report(report: &AnnounceReport, json: bool) -> serde_json::Result<()> {
    if json {
        return print_json(report);
    }
    let stopped = if report.cancelled { "; cancelled" } else { "" };
    say!(
        "announced {} on {}: {} in {} of {} rounds{stopped}",
        names(&report.stations),
        report.sent_on,
        frames(report.frames_sent),
        report.rounds_done,
        report.rounds_planned
    );
    Ok(())
}

fn print_found(found: &FoundVm, json: bool) -> serde_json::Result<()> {
    if json {
        return print_json(found);
    }
    let heard = match found.listened_ns {
        0 => String::new(),
        time => {
            format!(", {} heard in {}", frames(found.frames_heard as u32), display_duration(Duration::from_nanos(time)))
        }
    };
    say!("{} (pid {}){heard}", found.vm_name, found.pid);
    for card in &found.cards {
        let vlan = card.vlan.map_or_else(String::new, |vlan| format!(", VLAN {vlan}"));
        say!("  {} on {} (by {}{vlan})", card.mac, card.tap, card.from);
        for found in &card.ips {
            let router = match (found.ip, found.router) {
                (IpAddr::V4(_), _) => "",
                (_, Some(true)) => ", a router",
                (_, Some(false)) => ", a host",
                (_, None) => ", announced as a host; if it routes, say --router",
            };
            say!("    {} (by {}{router})", found.ip, found.from);
        }
    }
    Ok(())
}

fn print_seen(seen: &Seen, json: bool) -> serde_json::Result<()> {
    if json {
        return print_json(seen);
    }
    let after = display_duration(Duration::from_nanos(seen.after_first_ns));
    match (&seen.bridge, &seen.port, seen.ip) {
        (Some(bridge), Some(port), _) => say!("{bridge} has {} behind {port} after {after}", seen.mac),
        (_, _, Some(ip)) => say!("this host has {} for {ip} after {after}", seen.mac),
        _ => {}
    }
    Ok(())
}

fn print_probe(report: &ProbeReport, json: bool) -> serde_json::Result<()> {
    if json {
        return print_json(report);
    }
    let waited = display_duration(Duration::from_nanos(report.waited_ns));
    let addresses = format!("{} address{}", report.addresses, if report.addresses == 1 { "" } else { "es" });
    say!("asked on {} for {addresses}, waited {waited}", report.asked_on);
    for ip in &report.own_answers {
        say!("  the VM itself answers for {ip}: it runs in this network");
    }
    for conflict in &report.conflicts {
        complain!("dunlin announce: {conflict}");
    }
    if report.conflicts.is_empty() {
        say!("  nobody else has them");
    }
    Ok(())
}

/// Says what became of the stations, and which exit code that has.
fn print_followed(followed: &[Followed], json: bool, cancelled: bool) -> anyhow::Result<u8> {
    for one in followed {
        if json {
            print_json(one)?;
            continue;
        }
        let Followed { bridge, mac, .. } = one;
        let port = one.port.as_deref().unwrap_or("no port");
        match one.verdict {
            Verdict::Relearned => {
                let after = one.after_first_ns.map(|ns| display_duration(Duration::from_nanos(ns)));
                let after = after.map_or_else(String::new, |after| format!(" after {after}"));
                say!("{bridge} relearned {mac} behind {port}{after}");
            }
            Verdict::WasThere => say!("{bridge} had {mac} behind {port} before"),
            Verdict::Unchanged => say!("{bridge} has {mac} behind {port}, as before"),
            Verdict::NotRelearned => {
                let wanted = one.expected_port.as_ref().map_or_else(String::new, |port| format!(", not behind {port}"));
                complain!("dunlin announce: {bridge} has {mac} behind {port}{wanted}");
                for cause in &one.causes {
                    complain!("  {}: {}", cause.sentence, cause.remedy);
                }
            }
        }
    }
    Ok(match followed.iter().any(|one| one.verdict == Verdict::NotRelearned) {
        _ if cancelled => exit::CANCELLED,
        true => exit::ERROR,
        false => exit::DONE,
    })
}

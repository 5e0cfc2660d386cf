//! `dunlin migrate`: moves a running VM to another host.

use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use super::network;
use super::places::{Plaintext, RunDir, TlsFileArgs};
use super::reducers::ReducerArgs;
use super::signals::cancel_on_signals;
use super::watch::Watch;
use crate::link::Address;
use crate::migrate::{OnStuck, Safety, SourceOptions, Strategy};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{ParseQuantityError, display_bytes, display_duration, parse_duration};
use crate::model::{
    BytesPerSecond, Ending, Foretold, ForetoldFrom, MigrationReport, MigrationStatus, TunnelKind, TunnelSpec, VmRef,
};
use crate::service::config::Config;
use crate::service::control::Outcome;
use crate::service::foresight::Foresee;
use crate::service::migration::{BeginError, MigrateRequest, RecoverRequest, migrate, recover};
use crate::service::out::{bytes, complain, say};
use crate::service::steering::{SteerError, ask_status, cancel_migration, finish_migration, set_bandwidth};

/// Move a running VM to another host, where `dunlin vm receive` waits for it.
///
/// Pre-copy sends memory in rounds while the VM runs and pauses it when what is left fits the downtime target, or when
/// rounds no longer shrink. Until the target has everything and this host has journaled that it lets go, any failure and
/// Ctrl-C leave the VM running here at full speed.
///
/// While it runs, --status, --set, --finish and --cancel show and steer it from other terminals.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin migrate web1 --to tls://host-b.example:4460
  dunlin migrate web1 --to tcp://192.0.2.7:4460 --insecure-plaintext
  dunlin migrate web1 --to tcp://127.0.0.1:4460 --bandwidth 1Gbit --downtime 50ms --json
  dunlin migrate web1 --to tcp://127.0.0.1:4460 --on-stuck stun
  dunlin migrate uuid:6ba7b810-9dad-41d1-80b4-00c04fd430c8 --to tcp://[fd00::7]:4460 --strategy stop-and-copy --verify
  dunlin migrate web1 --to tcp://127.0.0.1:4460 --strategy post-copy --safe-post-copy
  dunlin migrate web1 --to tls://198.51.100.7:4460 --tunnel vxlan
  dunlin migrate web1 --to tls://198.51.100.7:4460 --tunnel wireguard
  dunlin migrate web1 --status
  dunlin migrate web1 --set bandwidth=200Mbit
  dunlin migrate web1 --cancel
  dunlin migrate web1 --finish
  dunlin migrate web1 --recover

Exit codes: 0 it runs there, 1 the VM died, 2 wrong arguments, 3 refused, 4 failed and it runs here, 5 in doubt (see
`dunlin resolve`), 6 cancelled and it runs here. Of --status, --set, --finish and --cancel: 0 done, 3 refused, there is no migration
or it is too late, else how the migration ended.")]
pub(super) struct MigrateArgs {
    /// The VM: NAME, uuid:U or pid:P.
    vm: VmRef,

    /// The target: tls://ADDR:PORT, or tcp://ADDR:PORT in the clear.
    #[arg(long, value_name = "ADDRESS", required_unless_present_any = WITHOUT_TARGET)]
    to: Option<Address>,

    /// Go on with a migration that was left in doubt here: its manager died, or could not reach the target any more. Pages that the VM is owed are sent; without --to to where it
    /// was released to.
    #[arg(long, conflicts_with_all = ["strategy", "predict", "downtime", "max_rounds", "hybrid_rounds", "on_stuck", "verify", "safe_post_copy", "tunnel"], conflicts_with_all = STEERING)]
    recover: bool,

    /// Show how far the migration of the VM is.
    #[arg(long, conflicts_with_all = BEGINNING, conflicts_with_all = ["set", "cancel"])]
    status: bool,

    /// Change the migration of the VM: bandwidth=RATE, or bandwidth=none for as much as the link carries.
    #[arg(long, value_name = "WHAT", conflicts_with_all = BEGINNING, conflicts_with = "cancel")]
    set: Option<Setting>,

    /// Have a migration by demand-paging send what its target has not asked for, so that it ends.
    #[arg(long, conflicts_with_all = BEGINNING, conflicts_with_all = ["status", "set", "cancel"])]
    finish: bool,

    /// Cancel the migration of the VM, wait until it has ended, and say how.
    #[arg(long, conflicts_with_all = BEGINNING)]
    cancel: bool,

    /// pre-copy, stop-and-copy, demand-paging, post-copy, hybrid, or auto: what is foretold to keep to the downtime, after a look at how the VM writes. With demand-paging, post-copy and hybrid the VM
    /// runs at the target before its memory is there: if either host is lost before all has moved, so is the VM; if only the link or a manager is, it waits where it touches what is missing, until
    /// `--recover` has gone on.
    #[arg(long, default_value = "pre-copy")]
    strategy: StrategyArg,

    /// Measure how the VM writes first, for some 2 s, so that the report has a prediction from that beside what it took.
    #[arg(long)]
    predict: bool,

    /// The most that all page streams together may send, for example 1Gbit or 100MiB/s; or MIN..MAX: begins at MIN, follows what the VM dirties, and sends what is left while it stands at MAX.
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<BandwidthArg>,

    /// The blackout to stay below, fixed costs included [default: 30ms].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    downtime: Option<Duration>,

    /// Page streams, 1 to 64, each a TCP connection and a thread [default: 2].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    streams: Option<u16>,

    /// Give up pre-copy after so many rounds, 1 to 1000, and stop the VM for the rest [default: 30].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_rounds: Option<u32>,

    /// Rounds of `hybrid` before the VM moves, 1 to 30.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=30))]
    hybrid_rounds: u32,

    /// What to do when pre-copy does not end by itself: stop (pause the VM for the rest), stun (slow the writers that keep it from ending), post-copy
    /// (move the VM at once, what is left follows it) or cancel [default: stop].
    #[arg(long, value_name = "ACTION")]
    on_stuck: Option<OnStuck>,

    /// While the VM runs at the target and is owed pages, have it send back what it does, so that it can go on here if the target, its manager or the link is lost: at most the last increment is lost
    /// then, and nobody has seen anything of that. What the VM sends and writes to disks waits until it is safe. For demand-paging, post-copy, hybrid and --on-stuck post-copy.
    #[arg(long)]
    safe_post_copy: bool,

    /// With --safe-post-copy: for how long the VM is lent at a time, 500ms to 60s. So long after contact is lost it goes on here.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse_duration, requires = "safe_post_copy")]
    lease: Duration,

    /// With --safe-post-copy: how often the target sends what the VM has done, at most, 5ms to 10s. What the VM sends waits about so long.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = parse_duration, requires = "safe_post_copy")]
    increment_every: Duration,

    #[command(flatten)]
    reducers: ReducerArgs,

    /// Hash all memory at both ends while the VM is paused, and compare. The blackout is then not worth quoting.
    #[arg(long)]
    verify: bool,

    /// When contact is lost during the handover: how long to dial the target before the VM is left in doubt.
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = parse_duration)]
    doubt: Duration,

    /// For how long frames that still reach the VM's ports here are carried to it, at most; 0s: they are not. It ends earlier when none comes for 200 ms.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    relay: Duration,

    /// Have the VM keep its addresses at a host in another subnet, by a tunnel between the hosts: vxlan or wireguard (encrypted), and [,remote=IP][,local=IP][,port=N][,vni=N]. This host's bridge answers for
    /// the VM and carries its traffic until `dunlin tunnel drop`. The target must allow it (`dunlin vm receive --tunnel`), and UDP port 4789, or 51820 for wireguard, must pass between the hosts.
    #[arg(long, value_name = "TUNNEL")]
    tunnel: Option<TunnelSpec>,

    #[command(flatten)]
    tls: TlsFileArgs,

    /// Of tls:// links: the name or address that the target's certificate must have [default: that of the address].
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,

    #[command(flatten)]
    plaintext: Plaintext,

    #[command(flatten)]
    watch: Watch,

    #[command(flatten)]
    run_dir: RunDir,
}

/// With these no target need be named.
const WITHOUT_TARGET: [&str; 5] = ["status", "set", "finish", "cancel", "recover"];
/// Options that begin nothing.
const STEERING: [&str; 4] = ["status", "set", "finish", "cancel"];
/// Options of a migration that is to begin.
const BEGINNING: [&str; 32] = [
    "to",
    "strategy",
    "predict",
    "bandwidth",
    "downtime",
    "streams",
    "max_rounds",
    "hybrid_rounds",
    "on_stuck",
    "safe_post_copy",
    "lease",
    "increment_every",
    "zero_pages",
    "compress",
    "delta",
    "dedup",
    "skip_hot",
    "free_pages",
    "balloon_before",
    "balloon_limit",
    "verify",
    "doubt",
    "relay",
    "tunnel",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "tls_crl",
    "tls_name",
    "insecure_plaintext",
    "stall",
    "events",
];

/// A limit that stays, or one that rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BandwidthArg {
    pub(super) least: BytesPerSecond,
    pub(super) most: Option<BytesPerSecond>,
}

impl FromStr for BandwidthArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rate = |text: &str| text.parse::<BytesPerSecond>().map_err(|error| error.to_string());
        let Some((least, most)) = text.split_once("..") else { return Ok(Self { least: rate(text)?, most: None }) };
        let (least, most) = (rate(least)?, rate(most)?);
        if least > most {
            return Err(format!("{least} is more than {most}; write MIN..MAX, for example 100Mbit..1Gbit"));
        }
        Ok(Self { least, most: Some(most) })
    }
}

/// A strategy, or whichever is best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StrategyArg {
    Auto,
    Given(Strategy),
}

impl FromStr for StrategyArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text.parse().map(Self::Given).map_err(|error| format!("{error}, or auto")),
        }
    }
}

/// What can be changed of a migration under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    /// The most that all page streams together may send.
    Bandwidth(Option<BytesPerSecond>),
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some(("bandwidth", "none")) => Ok(Self::Bandwidth(None)),
            Some(("bandwidth", rate)) => rate
                .parse()
                .map(|rate| Self::Bandwidth(Some(rate)))
                .map_err(|error: ParseQuantityError| error.to_string()),
            _ => Err("write bandwidth=RATE, for example bandwidth=200Mbit, or bandwidth=none".to_owned()),
        }
    }
}

impl MigrateArgs {
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        if self.recover {
            return self.go_on(json, config);
        }
        let Some(to) = self.to.clone() else { return self.steer(json, config) };
        let cancel = cancel_on_signals()?;
        let configured = &config.migrate;
        let (strategy, foresee) = match self.strategy {
            StrategyArg::Auto => (Strategy::PreCopy, Foresee::Choose(config.track.clone())),
            StrategyArg::Given(strategy) if self.predict => (strategy, Foresee::Measure(config.track.clone())),
            StrategyArg::Given(strategy) => (strategy, Foresee::AsItGoes),
        };
        let (squeeze_to, squeeze_limit) = self.reducers.squeeze();
        let options = SourceOptions {
            strategy,
            bandwidth: self.bandwidth.map(|bandwidth| bandwidth.least).or(configured.bandwidth),
            bandwidth_max: self.bandwidth.and_then(|bandwidth| bandwidth.most),
            downtime: self.downtime.unwrap_or(configured.downtime),
            hybrid_rounds: self.hybrid_rounds,
            max_rounds: self.max_rounds.unwrap_or(configured.max_rounds),
            on_stuck: self.on_stuck.unwrap_or(configured.on_stuck),
            safety: self.safe_post_copy.then_some(Safety { lease: self.lease, every: self.increment_every }),
            streams: self.streams.unwrap_or(configured.streams),
            reducers: self.reducers.reducers(),
            squeeze_to,
            squeeze_limit,
            verify: self.verify,
            stall: self.watch.stall.unwrap_or(configured.stall),
            doubt: self.doubt,
            relay: self.relay,
            stun: config.stun.policy(),
            ..SourceOptions::default()
        };
        if let Some(problem) = options.safety.and_then(|safety| unsafe_because(&options, safety)) {
            complain!("dunlin: {problem}");
            return Ok(exit::USAGE);
        }
        if options.may_run_owing() {
            let how = match options.strategy {
                Strategy::PreCopy => "--on-stuck post-copy".to_owned(),
                strategy => strategy.to_string(),
            };
            if options.verify {
                complain!(
                    "dunlin: --verify hashes all memory while the VM stands; by {how} it never is in one place then"
                );
                return Ok(exit::USAGE);
            }
            if !json && options.safety.is_none() {
                complain!(
                    "by {how} the VM runs there before its memory has moved: if either host is lost before all has, so is the VM; without the link it waits"
                );
            }
        }
        match self.tunnel.map(|tunnel| tunnel.kind) {
            Some(TunnelKind::Vxlan) if !json => complain!(
                "the tunnel carries the VM's own traffic as a LAN does, not encrypted: let only the two hosts send to its UDP port"
            ),
            Some(TunnelKind::Wireguard) if !json && !to.is_encrypted() => complain!(
                "the link to the target is not encrypted: whoever can change what passes there can put himself between the ends of the tunnel, too; tls:// prevents that"
            ),
            _ => {}
        }
        let request = MigrateRequest {
            vm: self.vm,
            to,
            options,
            foresee,
            announce: config.announce.clone(),
            never_stunned: config.stun.never.clone(),
            run_dir: self.run_dir.path(config),
            insecure_plaintext: self.plaintext.is_allowed(config),
            tls: self.tls.options(config, self.tls_name),
            tunnel: self.tunnel,
            events: self.watch.events,
            show_progress: !json,
            hold: self.watch.hold_at,
        };
        tell(migrate(request, cancel), json, "the VM was not touched")
    }
}

/// Why a VM cannot be kept safe as asked.
fn unsafe_because(options: &SourceOptions, safety: Safety) -> Option<String> {
    let outside = |range: &std::ops::RangeInclusive<Duration>| {
        format!("between {} and {}", display_duration(*range.start()), display_duration(*range.end()))
    };
    if !options.may_run_owing() {
        return Some(
            "--safe-post-copy is for a VM that runs there before its memory has moved: add --strategy post-copy, hybrid or demand-paging, or --on-stuck post-copy"
                .to_owned(),
        );
    }
    if !Safety::LEASES.contains(&safety.lease) {
        return Some(format!("--lease {} is not {}", display_duration(safety.lease), outside(&Safety::LEASES)));
    }
    if !Safety::INTERVALS.contains(&safety.every) {
        let every = display_duration(safety.every);
        return Some(format!("--increment-every {every} is not {}", outside(&Safety::INTERVALS)));
    }
    None
}

impl MigrateArgs {
    /// Goes on with a migration that was left in doubt.
    fn go_on(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let cancel = cancel_on_signals()?;
        let configured = &config.migrate;
        let options = SourceOptions {
            bandwidth: self.bandwidth.map(|bandwidth| bandwidth.least).or(configured.bandwidth),
            streams: self.streams.unwrap_or(configured.streams),
            stall: self.watch.stall.unwrap_or(configured.stall),
            doubt: self.doubt,
            ..SourceOptions::default()
        };
        let request = RecoverRequest {
            vm: self.vm,
            to: self.to,
            options,
            announce: config.announce.clone(),
            run_dir: self.run_dir.path(config),
            insecure_plaintext: self.plaintext.is_allowed(config),
            tls: self.tls.options(config, self.tls_name),
            events: self.watch.events,
            show_progress: !json,
            hold: self.watch.hold_at,
        };
        tell(recover(request, cancel), json, "everything is as it was")
    }

    /// Shows or changes a migration that another process does.
    fn steer(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let run_dir = self.run_dir.path(config);
        let done: Result<anyhow::Result<u8>, SteerError> = if self.cancel {
            cancel_migration(&run_dir, &self.vm).map(|report| {
                print_report(&report, json)?;
                Ok(match report.ending {
                    Ending::Cancelled => exit::DONE,
                    Ending::Moved => {
                        complain!("dunlin: it was too late to cancel");
                        exit::REFUSED
                    }
                    other => other.exit_code(),
                })
            })
        } else if self.finish {
            finish_migration(&run_dir, &self.vm).map(|()| {
                if json {
                    say!("{}", serde_json::to_string(&Outcome { error: String::new() }.tagged())?);
                } else {
                    say!("{}: everything that it is owed is sent from now on", self.vm);
                }
                Ok(exit::DONE)
            })
        } else if let Some(Setting::Bandwidth(limit)) = self.set {
            set_bandwidth(&run_dir, &self.vm, limit).map(|()| {
                if json {
                    say!("{}", serde_json::to_string(&Outcome { error: String::new() }.tagged())?);
                } else {
                    let limit = limit.map_or_else(
                        || "no bandwidth limit".to_owned(),
                        |limit| format!("{}/s", display_bytes(limit.0)),
                    );
                    say!("{}: {limit} from now on", self.vm);
                }
                Ok(exit::DONE)
            })
        } else {
            ask_status(&run_dir, &self.vm).map(|status| {
                if json {
                    say!("{}", serde_json::to_string(&status.tagged())?);
                } else {
                    bytes(describe_status(&status).as_bytes());
                }
                Ok(exit::DONE)
            })
        };
        match done {
            Ok(code) => code,
            Err(error) => {
                complain!("dunlin: {error}");
                Ok(if matches!(error, SteerError::Exchange(_)) { exit::ERROR } else { exit::REFUSED })
            }
        }
    }
}

/// Prints how it ended, or why it did not begin and what is true then; the exit code.
fn tell(done: Result<MigrationReport, BeginError>, json: bool, otherwise: &str) -> anyhow::Result<u8> {
    match done {
        Ok(report) => {
            print_report(&report, json)?;
            Ok(report.ending.exit_code())
        }
        Err(error) => {
            complain!("dunlin: refused: {error}; {otherwise}");
            Ok(match error {
                BeginError::Events { .. } => exit::ERROR,
                BeginError::Interrupted => exit::CANCELLED,
                _ => exit::REFUSED,
            })
        }
    }
}

fn print_report(report: &MigrationReport, json: bool) -> anyhow::Result<()> {
    if json {
        say!("{}", serde_json::to_string(&report.tagged())?);
    } else {
        bytes(describe(report).as_bytes());
    }
    Ok(())
}

/// How far it is, as a person reads it.
fn describe_status(status: &MigrationStatus) -> String {
    let ns = |ns: u64| display_duration(Duration::from_nanos(ns));
    let rate = |bytes: u64| format!("{}/s", display_bytes(bytes));
    let mut text = format!(
        "VM {} ({}) is being moved to {} for {}\n  migration  {} by {}, pid {}\n  step       {} ({})",
        status.vm_name,
        status.vm_id,
        status.target,
        ns(status.elapsed_ns),
        status.migration_id,
        status.strategy,
        status.pid,
        status.step,
        status.stage,
    );
    text += if status.can_be_cancelled { "\n" } else { ", too late to cancel\n" };
    if let Some(chosen) = &status.chosen {
        text += &format!("  auto       {}: {}\n", chosen.plan, chosen.reason);
    }
    if status.round > 0 {
        text += &format!("  round {:<4} {} of {} pages sent\n", status.round, status.sent_pages, status.due_pages);
    }
    text += &format!(
        "  sent       {} in all for {} of RAM\n  goodput    {}, limit {}\n",
        display_bytes(status.sent_bytes),
        display_bytes(status.memory_bytes),
        rate(status.goodput_bytes_per_second),
        status.bandwidth_bytes_per_second.map_or_else(|| "none".to_owned(), rate)
    );
    if let Some(last) = &status.last_round {
        text += &format!(
            "  dirtied    {} pages in round {}, which took {}\n",
            last.dirtied_pages,
            last.round,
            ns(last.duration_ns)
        );
    }
    for vcpu in status.throttle.iter().filter(|throttle| throttle.stunned).flat_map(|throttle| &throttle.vcpus) {
        if let Some(limit) = vcpu.limit_pages_per_second {
            text += &format!(
                "  stunned    vCPU {}: {:.0} of {limit:.0} pages/s, {} lost\n",
                vcpu.vcpu,
                vcpu.pages_per_second,
                ns(vcpu.held_ns)
            );
        }
    }
    if let Some(round) = status.round_ends_in_ns {
        text += &format!("  round ends in {}\n", ns(round));
    }
    match (status.pauses_in_ns, status.expected_blackout_ns, status.ends_in_ns) {
        (Some(pause), Some(blackout), Some(end)) => {
            text += &format!(
                "  pauses in  {}, for {} (target {}); ends in {}\n",
                ns(pause),
                ns(blackout),
                ns(status.downtime_target_ns),
                ns(end)
            );
        }
        (None, Some(blackout), _) => text += &format!("  stands     for {} more\n", ns(blackout)),
        _ if status.last_round.is_some() && status.round_ends_in_ns.is_some() => text += "  no end is in sight\n",
        _ => {}
    }
    text
}

/// A reason behind what it is for, if there is one.
fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

/// The report as a person reads it.
fn describe(report: &MigrationReport) -> String {
    let ns = |ns: u64| display_duration(Duration::from_nanos(ns));
    let ending = match report.ending {
        Ending::Moved => "moved: it runs at the target",
        Ending::Refused => "refused: it runs here",
        Ending::Failed => "failed: it runs here",
        Ending::Cancelled => "cancelled: it runs here",
        Ending::Lost => "lost: its machine process died",
        Ending::InDoubt if report.post_copy.is_some() => {
            "in doubt: it runs at the target, and is owed pages that are here"
        }
        Ending::InDoubt => "in doubt: it runs nowhere until this is resolved",
    };
    let mut text = format!("VM {} ({}) {ending}\n", report.vm_name, report.vm_id);
    if !report.reason.is_empty() {
        text += &format!("  reason     {}\n", report.reason);
    }
    text += &format!("  migration  {} by {}, {} streams\n", report.migration_id, report.strategy, report.streams);
    for round in &report.rounds {
        let kind = if round.paused { "paused" } else { "live" };
        text += &format!(
            "  round {:<4} {:<6} {:>9} pages ({} zero), {} in {}; {} dirtied meanwhile\n",
            round.round,
            kind,
            round.pages,
            round.zero_pages,
            display_bytes(round.wire_bytes),
            ns(round.duration_ns),
            round.dirtied_pages
        );
    }
    for reducer in &report.reducers {
        text += &format!(
            "  {:<10} {:>9} pages, {} saved, {} of CPU{}\n",
            reducer.name,
            reducer.pages,
            display_bytes(reducer.saved_bytes),
            ns(reducer.cpu_ns),
            because(&reducer.reason)
        );
    }
    if let Some(squeeze) = &report.squeeze {
        text += &format!(
            "  balloon    the guest went on with {} instead of {}: {} pages, {} spared, in {}{}\n",
            display_bytes(squeeze.after_bytes),
            display_bytes(squeeze.before_bytes),
            squeeze.spared_pages,
            display_bytes(squeeze.spared_bytes),
            ns(squeeze.duration_ns),
            because(&squeeze.reason)
        );
    }
    text += &format!(
        "  total      {} for {} of RAM, {} on the wire, state {}\n",
        ns(report.total_ns),
        display_bytes(report.memory_bytes),
        display_bytes(report.wire_bytes),
        display_bytes(report.state_bytes)
    );
    if report.blackout_ns > 0 {
        text += &format!(
            "  blackout   {} (target {}), by the source's clock from the order to pause to the target's `running`\n",
            ns(report.blackout_ns),
            ns(report.downtime_target_ns)
        );
        for entry in &report.blackout.phases {
            let phase = serde_json::to_string(&entry.phase).unwrap_or_default();
            text += &format!("    {:<18} {}\n", phase.trim_matches('"'), ns(entry.duration_ns));
        }
    }
    if let Some(owed) = &report.post_copy {
        text += &format!(
            "  owed       {} pages when it ran there; {} sent ({} zero), {} because they were asked for, {} in {}\n",
            owed.owed_pages,
            owed.sent_pages,
            owed.zero_pages,
            owed.asked_pages,
            display_bytes(owed.wire_bytes),
            ns(owed.duration_ns)
        );
        if owed.recoveries > 0 {
            text += &format!(
                "  recovered  {} times contact was lost, and it went on over another connection\n",
                owed.recoveries
            );
        }
        let waits = &owed.waits;
        text += &format!(
            "  waits      {} pages were waited for: median {}, 99 of 100 within {}, at most {}, {} in all\n",
            waits.count,
            ns(waits.p50_ns),
            ns(waits.p99_ns),
            ns(waits.max_ns),
            ns(waits.sum_ns)
        );
    }
    if let Some(loan) = &report.loan {
        text += &format!(
            "  on loan    for {}: {} increments, {} pages, {} sent back; the guest stood {} for them, {} at most\n  held       what it sent and wrote until an increment was safe: {} in the median, {} at most\n",
            ns(loan.lasted_ns),
            loan.increments,
            loan.pages,
            display_bytes(loan.wire_bytes),
            ns(loan.stood_ns),
            ns(loan.longest_stand_ns),
            ns(loan.safe_p50_ns),
            ns(loan.safe_max_ns),
        );
    }
    if let Some(relay) = &report.relay {
        text += &format!(
            "  relayed    {} frames ({}) that came here when it had left, {} of them when it ran there; {} dropped, in {}{}\n",
            relay.frames,
            display_bytes(relay.bytes),
            relay.late_frames,
            relay.dropped_frames,
            ns(relay.lasted_ns),
            because(&relay.error)
        );
    }
    if let Some(network) = &report.network {
        text += &network::describe(network);
    }
    if let Some(tunnel) = &report.tunnel {
        text += &format!(
            "  tunnel     {} ({}) {} to {}, MTU {}, round trip {}; {}\n",
            tunnel.id,
            tunnel.kind,
            tunnel.local,
            tunnel.remote,
            tunnel.mtu_bytes,
            ns(tunnel.rtt_ns),
            if tunnel.stays { "it stays until `dunlin tunnel drop`" } else { "it was taken down" }
        );
    }
    for vcpu in report.stun.iter().flat_map(|stun| &stun.vcpus) {
        text += &format!(
            "  stunned    vCPU {}: {:.0} pages/s, held to {:.0} (at least {:.0}) for {}; {} of guest time lost\n",
            vcpu.vcpu,
            vcpu.free_pages_per_second,
            vcpu.limited_pages_per_second,
            vcpu.least_limit_pages_per_second,
            ns(vcpu.limited_ns),
            ns(vcpu.held_ns)
        );
    }
    if let Some(why) = report.stun.as_ref().map(|stun| &stun.gave_up).filter(|why| !why.is_empty()) {
        text += &format!("  stunned    no longer: {why}\n");
    }
    if let Some(link) = &report.link {
        let rate = |bytes: u64| format!("{}/s", display_bytes(bytes));
        let before =
            link.other_before_bytes_per_second.map_or_else(String::new, |other| format!("; before {}", rate(other)));
        let secured = match link.encryption.as_str() {
            "none" => "in the clear",
            how => how,
        };
        let parts: Vec<&str> = [link.interface.as_str(), secured].into_iter().filter(|part| !part.is_empty()).collect();
        let link_of_it = parts.join(", ");
        text += &match link.other_bytes_per_second {
            Some(other) => format!("  link       {link_of_it}: others sent {} meanwhile{before}\n", rate(other)),
            None if link.interface.is_empty() => format!("  link       {link_of_it}\n"),
            None => format!("  link       {link_of_it}: what others send cannot be told apart\n"),
        };
    }
    if let Some(chosen) = &report.chosen {
        text += &format!("  auto       {}: {}\n", chosen.plan, chosen.reason);
    }
    if let Some(expected) = &report.prediction {
        text += &describe_prediction(expected, report);
    }
    if report.verified_pages > 0 {
        text += &format!("  verified   {} pages, all equal\n", report.verified_pages);
    }
    text
}

/// What had been expected, beside what it took.
fn describe_prediction(expected: &Foretold, report: &MigrationReport) -> String {
    let time =
        |ns: Option<u64>| ns.map_or_else(|| "no end".to_owned(), |ns| display_duration(Duration::from_nanos(ns)));
    let off = |percent: Option<f64>| percent.map_or_else(String::new, |percent| format!(" ({percent:+.1} %)"));
    let from = match expected.from {
        ForetoldFrom::Curve => "how the VM wrote before",
        ForetoldFrom::FirstRound => "the first round",
        ForetoldFrom::Memory => "what its memory held",
    };
    format!(
        "  expected   of {}, from {from}: total {}{}, blackout {}{}, {} on the wire{}\n    taken              total {}, blackout {}, {}\n    fixed cost         {}, \
         {}\n",
        expected.plan,
        time(expected.total_ns),
        off(expected.total_error_percent),
        time(expected.blackout_ns),
        off(expected.blackout_error_percent),
        display_bytes(expected.wire_bytes),
        off(expected.wire_error_percent),
        time(Some(report.total_ns)),
        time(Some(report.blackout_ns)),
        display_bytes(report.wire_bytes),
        time(Some(expected.fixed_cost_ns)),
        expected.fixed_cost_from.words()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_changed_is_taken() {
        assert_eq!("bandwidth=200Mbit".parse(), Ok(Setting::Bandwidth(Some(BytesPerSecond(25_000_000)))));
        assert_eq!("bandwidth=none".parse(), Ok(Setting::Bandwidth(None)));
        for wrong in ["", "bandwidth", "bandwidth=", "bandwidth=fast", "downtime=3ms", "=none"] {
            assert!(wrong.parse::<Setting>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_bandwidth_is_a_rate_or_a_range() {
        let of = |least, most| Ok(BandwidthArg { least: BytesPerSecond(least), most });
        assert_eq!("1Gbit".parse(), of(125_000_000, None));
        assert_eq!("100Mbit..1Gbit".parse(), of(12_500_000, Some(BytesPerSecond(125_000_000))));
        for wrong in ["", "..", "1Gbit..", "..1Gbit", "2Gbit..1Gbit", "1Gbit..2", "1Gbit..2Gbit..3Gbit"] {
            assert!(wrong.parse::<BandwidthArg>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_migration_is_begun_or_steered_never_both() {
        use clap::Parser;
        let parses = |words: &str| crate::cli::Cli::try_parse_from(words.split(' ')).is_ok();
        for right in ["--to tcp://127.0.0.1:1", "--status", "--cancel", "--set bandwidth=1Gbit --run-dir r --json"] {
            assert!(parses(&format!("dunlin migrate a {right}")), "{right}");
        }
        let one = ["--to tcp://127.0.0.1:1", "--status", "--cancel", "--set bandwidth=1Gbit"];
        for (index, first) in one.iter().enumerate() {
            let begins = ["--bandwidth 1Gbit", "--verify", "--events f", "--insecure-plaintext", "--tls-name b"];
            let others = one.iter().skip(index + 1).chain(begins.iter().filter(|_| index > 0));
            for other in others {
                assert!(!parses(&format!("dunlin migrate a {first} {other}")), "{first} {other}");
            }
        }
        assert!(!parses("dunlin migrate a"));
    }
}

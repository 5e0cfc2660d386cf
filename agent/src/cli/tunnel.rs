//! `dunlin tunnel`: the tunnels by which VMs keep their addresses at hosts in other subnets.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::places::RunDir;
use crate::model::WireguardTraffic;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_bytes, display_duration};
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};
use crate::service::tunnel::list::{
    DropOptions, TunnelDropped, TunnelError, TunnelView, Which, drop_tunnels, drop_when_moved, list,
};
use crate::time::unix_ms;

/// Show and drop the tunnels by which VMs keep their addresses at hosts in other subnets.
///
/// `dunlin migrate --tunnel` makes them. Each host has its own end, and lists and drops that.
#[derive(Debug, Subcommand)]
pub(super) enum TunnelCommand {
    List(ListArgs),
    Drop(DropArgs),
}

impl TunnelCommand {
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        match self {
            Self::List(arguments) => arguments.run(json, config),
            Self::Drop(arguments) => arguments.run(json, config),
        }
    }
}

/// Show this host's ends of tunnels: whose, where to, what they have carried, and whether they are answered.
///
/// At the host that the VM has left, the manager at the other end and the VM itself are asked through the tunnel; that takes up to some seconds if they do not answer.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin tunnel list
  dunlin tunnel list --no-ask --json

Exit codes: 0 done, 1 failed, 2 wrong arguments.")]
pub(super) struct ListArgs {
    /// Ask nobody: show only what this host knows.
    #[arg(long)]
    no_ask: bool,

    #[command(flatten)]
    run_dir: RunDir,
}

/// Take down this host's ends of tunnels. At the VM's former host nobody answers for it any more; at its new one its tap goes back to the bridge that it was taken from.
///
/// Drop a tunnel when the VM's addresses have been moved: when the guest has other ones, or when its network is routed to its new host. With --when-moved this waits, at the former host, until that is seen:
/// look after look, nobody behind a tunnel that works answers for any of the addresses, or somebody else does in the LAN.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin tunnel drop web1
  dunlin tunnel drop 3fa2b1 --force       # at the new host, with the VM there
  dunlin tunnel drop web1 --when-moved
  dunlin tunnel drop --all

Exit codes: 0 done, 1 something could not be taken down, 2 wrong arguments, 3 refused: there is no such tunnel, or it is needed; 6 interrupted.")]
pub(super) struct DropArgs {
    /// Which: the tunnel's ID, or its VM: NAME or uuid:U.
    #[arg(value_name = "ID|VM", required_unless_present = "all")]
    which: Option<String>,

    /// All tunnels of this host.
    #[arg(long, conflicts_with = "which")]
    all: bool,

    /// Also where the VM is here and has no other way to its LAN, or is about to leave by it.
    #[arg(long, conflicts_with = "when_moved")]
    force: bool,

    /// Wait until the VM's addresses are no more behind the tunnel, and drop it then.
    #[arg(long)]
    when_moved: bool,

    /// Take off the list what was made in a network namespace that is gone.
    #[arg(long, conflicts_with = "when_moved")]
    forget: bool,

    #[command(flatten)]
    run_dir: RunDir,
}

impl ListArgs {
    fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let tunnels = list(&self.run_dir.path(config), !self.no_ask)?;
        if !json && tunnels.is_empty() {
            say!("no tunnels");
        }
        for tunnel in &tunnels {
            if json {
                say!("{}", serde_json::to_string(&tunnel.tagged())?);
            } else {
                say!("{}", describe(tunnel).trim_end());
            }
        }
        Ok(exit::DONE)
    }
}

impl DropArgs {
    fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let run_dir = self.run_dir.path(config);
        let which = self.which.map_or(Which::All, Which::One);
        let mut dropped = Vec::new();
        let result = if self.when_moved {
            let interrupt = Interrupt::install()?;
            drop_when_moved(&run_dir, &which, &interrupt, |one| {
                tell(&one, json);
                dropped.push(one);
            })
        } else {
            let options = DropOptions { force: self.force, forget: self.forget };
            drop_tunnels(&run_dir, &which, options).map(|all| {
                for one in &all {
                    tell(one, json);
                }
                dropped = all;
            })
        };
        match result {
            Ok(()) => {
                if !json && dropped.is_empty() {
                    say!("no tunnels");
                }
                Ok(if dropped.iter().all(|one| one.left.is_empty()) { exit::DONE } else { exit::ERROR })
            }
            Err(error @ TunnelError::Wire(_)) => Err(error.into()),
            Err(error) => {
                complain!("dunlin: {error}");
                Ok(if matches!(error, TunnelError::Interrupted) { exit::CANCELLED } else { exit::REFUSED })
            }
        }
    }
}

fn tell(dropped: &TunnelDropped, json: bool) {
    if json {
        say!("{}", serde_json::to_string(&dropped.tagged()).unwrap_or_default());
        return;
    }
    say!("tunnel {} of {} is dropped here; {}", dropped.id, dropped.vm_name, dropped.other_end);
    for left in &dropped.left {
        complain!("dunlin: left behind: {left}");
    }
}

/// How long ago the two ends last agreed on keys.
fn handshake(traffic: &WireguardTraffic, now_unix_ms: u64) -> String {
    let ago_s = traffic.last_handshake_unix_ms.map(|at| now_unix_ms.saturating_sub(at) / 1000);
    ago_s.map_or_else(|| "no handshake yet".to_owned(), |ago_s| format!("last handshake {ago_s} s ago"))
}

fn describe(tunnel: &TunnelView) -> String {
    let entry = &tunnel.entry;
    let note = if tunnel.note.is_empty() { String::new() } else { format!(": {}", tunnel.note) };
    let mut text = format!(
        "{} {} ({} host), {}{note}\n  {:9} {} to {}, UDP port {}, MTU {} inside\n",
        entry.id,
        entry.vm_name,
        entry.side,
        tunnel.state.name(),
        tunnel.kind.name(),
        entry.local,
        entry.remote,
        entry.port,
        entry.mtu_bytes
    );
    if let (Some(end), Some(traffic)) = (&entry.wireguard, &tunnel.wireguard_traffic) {
        text += &format!(
            "  secret    {}: {} to {} inside; {}, {} in, {} out\n",
            end.device,
            end.local,
            end.remote,
            handshake(traffic, unix_ms()),
            display_bytes(traffic.received_bytes),
            display_bytes(traffic.sent_bytes)
        );
    }
    for line in &entry.lines {
        let ips: Vec<String> = line.ips.iter().map(ToString::to_string).collect();
        let ips = if ips.is_empty() { "no address known".to_owned() } else { ips.join(" ") };
        let from = if line.taken_from.is_empty() { String::new() } else { format!(", from {}", line.taken_from) };
        text += &format!(
            "  port      {} {ips}: {} (VNI {}) in {}, tap {}{from}\n",
            line.mac, line.device, line.vni, line.bridge, line.tap
        );
    }
    let traffic = &tunnel.traffic;
    text += &format!(
        "  carried   {} packets ({}) in, {} ({}) out, {} lost\n",
        traffic.received_packets,
        display_bytes(traffic.received_bytes),
        traffic.sent_packets,
        display_bytes(traffic.sent_bytes),
        traffic.lost_packets
    );
    let answer = |answers: Option<bool>| match answers {
        Some(true) => "answers",
        Some(false) => "does not answer",
        None => "was not asked",
    };
    let rtt =
        tunnel.rtt_ns.map_or_else(String::new, |ns| format!(" in {}", display_duration(Duration::from_nanos(ns))));
    if tunnel.far_end_answers.is_some() {
        text += &format!("  far end   {}{rtt}; the VM {}\n", answer(tunnel.far_end_answers), answer(tunnel.vm_answers));
    }
    text
}

//! What a client of a VM sees of its moves between two hosts on a LAN of namespaces: frames lost, doubled, turned round, and for how long nothing comes.
//!
//! Started by `cargo xtask bench network`, which reads the lines that it prints and says what they mean.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dunlin::migrate::Strategy;
use dunlin_tests::client::{EchoClient, Pinger};
use dunlin_tests::{HopOptions, Rig, VmSpec, guest};

/// Pings and TCP requests each come this often.
const EVERY: Duration = Duration::from_millis(1);
/// How long clients may take to hear of the VM.
const LIMIT: Duration = Duration::from_secs(10);
/// Answers before each move.
const BEFORE: u64 = 200;

/// Moves a VM there and back, and says what became of what was sent to it. Needs /dev/kvm, and the right to make network namespaces.
#[derive(Debug, Parser)]
#[command(name = "dunlin-bench-network")]
struct Cli {
    /// Moves, there and back by turns.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    moves: u32,
    /// How memory moves.
    #[arg(long, default_value_t = Strategy::PreCopy)]
    strategy: Strategy,
    /// For how long what still comes to the former place is carried on; 0s is not at all.
    #[arg(long, default_value = "2s")]
    relay: String,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let spec = VmSpec { guest: "dunlin.wl0=ws:16M,rate:2000,fill:random".to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec)?;
    let more = vec!["--relay".to_owned(), cli.relay.clone()];
    let options = HopOptions { strategy: cli.strategy, more, ..HopOptions::default() };
    let mut out = std::io::stdout().lock();
    for _ in 0..cli.moves {
        let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), EVERY))?;
        let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), EVERY))?;
        echo.wait_answers(BEFORE, LIMIT)?;
        pinger.restart_measurement();
        echo.restart_measurement();
        let hop = rig.hop(&options)?;
        ensure!(hop.exit_code == Some(0), "the VM did not move: {}", hop.report.reason);
        echo.wait_answers(BEFORE, LIMIT)?;
        let (pings, requests) = (pinger.finish(Duration::from_secs(1)), echo.finish(LIMIT));
        ensure!(requests.fault.is_none(), "the connection did not live on: {:?}", requests.fault);
        let relay = hop.report.relay.clone().unwrap_or_default();
        let line = serde_json::json!({
            "blackout_ns": hop.report.blackout_ns,
            "pings": pings.sent,
            "lost": pings.unanswered.len(),
            "doubled": pings.duplicates,
            "turned_round": pings.reordered,
            "ping_gap_ns": pings.largest_gap.length_ns,
            "tcp_gap_ns": requests.largest_gap.length_ns,
            "relayed": relay.frames,
            "relay_dropped": relay.dropped_frames,
            "announced_first": hop.announced_before_running(),
        });
        writeln!(out, "{line}").and_then(|()| out.flush()).context("writing a line")?;
    }
    let errors = guest::errors(&rig.counters()?);
    ensure!(errors.is_empty(), "the guest found errors: {errors:?}");
    ensure!(rig.stop()?.success(), "the VM did not end as it should");
    Ok(())
}

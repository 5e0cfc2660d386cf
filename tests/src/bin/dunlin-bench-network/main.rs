//! What clients of a VM see of its moves between two hosts on a LAN of namespaces: frames lost, doubled, turned round, and for how long nothing comes.
//!
//! Started by `cargo xtask bench network`, which reads the lines that it prints and says what they mean.

use std::io::Write as _;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dunlin::migrate::Strategy;
use dunlin::model::{BlackoutPhase, PAGE_SIZE, PageCount, PageRun, RegionId, RegionKind, RegionSpec};
use dunlin::port::Region as _;
use dunlin::shm::{RamRegion, ram_file};
use dunlin_tests::client::{BulkClient, EchoClient, Gap, PingReport, Pinger, Split};
use dunlin_tests::{HopOptions, Rig, VmSpec, guest, interrupt};

/// Packets of UDP and TCP requests each come this often.
const EVERY: Duration = Duration::from_millis(1);
/// Bytes of bulk that the guest sends each millisecond.
const BULK_BYTES_PER_MS: u64 = 2000;
/// How long clients may take to hear of the VM.
const LIMIT: Duration = Duration::from_secs(10);
/// Answers, and bytes of bulk, before each move and after it.
const AROUND: u64 = 200;
/// Answers of the time without a move that a move is compared with: it takes about as long.
const QUIET: u64 = 500;
/// For how long the VM stands where it is, to compare with: about a blackout.
const STAND: Duration = Duration::from_millis(4);
/// Memory that is taken and given back right before each move: more than the target takes.
const TAKEN_BYTES: u64 = 512 << 20;
/// How long after the end of the sending an answer may come.
const LATE: Duration = Duration::from_secs(1);

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
    /// Nobody announces the VM.
    #[arg(long)]
    no_announce: bool,
}

/// All that speak with the guest, from one place: UDP of both families, TCP requests and bulk.
struct Clients {
    packets: [Pinger; 2],
    requests: EchoClient,
    bulk: BulkClient,
}

impl Clients {
    fn start() -> Result<Self> {
        let udp = |ip| Pinger::start_udp(SocketAddr::new(ip, 7), EVERY);
        Ok(Self {
            packets: [udp(Rig::guest_ip())?, udp(Rig::guest_ip6())?],
            requests: EchoClient::start(Rig::echo_address(), EVERY)?,
            bulk: BulkClient::start(Rig::bulk_address())?,
        })
    }

    /// Waits until each of them has heard more.
    fn wait(&self) -> Result<()> {
        let answered = || self.packets.each_ref().map(|client| client.report().answered);
        let (before, bulk) = (answered(), self.bulk.report().bytes);
        self.requests.wait_answers(AROUND, LIMIT)?;
        let all = || {
            let packets = answered().iter().zip(before).all(|(now, before)| *now >= before + AROUND);
            Ok((packets && self.bulk.report().bytes >= bulk + AROUND * BULK_BYTES_PER_MS).then_some(()))
        };
        interrupt::wait(LIMIT, all)?.with_context(|| format!("no answers: {:?}, {:?}", answered(), self.bulk.report()))
    }

    /// The gaps while the VM was handed over, and besides it: of UDP (the longer one of both families), of requests and of bulk.
    fn gaps_at(&self, handed_over_ns: &RangeInclusive<u64>) -> [Split; 3] {
        let split = |longest: Vec<Gap>| Split::at(&longest, handed_over_ns);
        let [first, second] = self.packets.each_ref().map(|client| split(client.longest_gaps()));
        let longer = |one: Gap, other: Gap| if one.length_ns >= other.length_ns { one } else { other };
        let packets =
            Split { within: longer(first.within, second.within), besides: longer(first.besides, second.besides) };
        [packets, split(self.requests.longest_gaps()), split(self.bulk.longest_gaps())]
    }

    /// The longest gap of UDP and of requests while nothing moves.
    fn quiet_gap_ns(&self) -> Result<u64> {
        self.restart_measurement();
        self.requests.wait_answers(QUIET, LIMIT)?;
        let [first, second] = self.packets.each_ref().map(|client| client.report().largest_gap.length_ns);
        Ok(first.max(second).max(self.requests.report().largest_gap.length_ns))
    }

    fn restart_measurement(&self) {
        self.packets.iter().for_each(Pinger::restart_measurement);
        self.requests.restart_measurement();
        self.bulk.restart_measurement();
    }
}

/// For how long UDP hears nothing of a VM that stands and goes nowhere, and for how long it stands.
fn paused_gap_ns(rig: &Rig, clients: &Clients) -> Result<(u64, u64)> {
    clients.restart_measurement();
    let stood = rig.stand(STAND)?;
    clients.wait()?;
    let [udp, ..] = clients.gaps_at(&stood);
    Ok((udp.within.length_ns, stood.end() - stood.start()))
}

/// Has a hypervisor beneath bring back what it took of this host's free memory, as the target takes it: that may cost 4 ms for each 2 MiB, during which one of the host's CPUs stands,
/// and is nothing of the move.
fn recall_free_memory() -> Result<()> {
    let pages = PageCount(TAKEN_BYTES / PAGE_SIZE as u64);
    let file = ram_file(TAKEN_BYTES).context("a file for free memory")?;
    let region = RamRegion::new(RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages }, file)
        .context("taking free memory")?;
    region.prepare_for_write(PageRun::new(0, pages.0 as u32));
    Ok(())
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    // It prints nothing: half a kilobyte through a serial port takes ten milliseconds, in which the same vCPU answers nobody.
    let guest = "dunlin.wl0=ws:16M,rate:2000,fill:random dunlin.heartbeat=0 dunlin.stat=0";
    let spec = VmSpec { guest: guest.to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec)?;
    if cli.no_announce {
        rig.receive_more = vec!["--no-announce".to_owned()];
    }
    let more = vec!["--relay".to_owned(), cli.relay.clone()];
    let options = HopOptions { strategy: cli.strategy, more, ..HopOptions::default() };
    let mut out = std::io::stdout().lock();
    for _ in 0..cli.moves {
        let clients = rig.client.enter(Clients::start)?;
        clients.wait()?;
        let quiet_gap_ns = clients.quiet_gap_ns()?;
        let (paused_gap_ns, stood_ns) = paused_gap_ns(&rig, &clients)?;
        recall_free_memory()?;
        rig.get("/reset-gap")?;
        clients.restart_measurement();
        let hop = rig.hop(&options)?;
        ensure!(hop.exit_code == Some(0), "the VM did not move: {}", hop.report.reason);
        clients.wait()?;
        let guest_gap_ns = guest::max_gap_ns(&rig.counters()?);
        // Not when the guest goes on by its own clock, which nobody outside sees, but within a millisecond of it.
        let arrived_ns = hop.frames.first().context("no frame of the VM was seen at its new place")?.at_monotonic_ns;
        let [udp, tcp, bulk_gaps] = clients.gaps_at(&(arrived_ns - hop.report.blackout_ns..=arrived_ns));
        let Clients { packets, requests, bulk } = clients;
        let packets = packets.map(|client| client.finish(LATE));
        let (requests, bulk) = (requests.finish(LIMIT), bulk.report());
        let faults = (&requests.fault, &bulk.fault);
        ensure!(faults == (&None, &None), "a connection did not live on: {faults:?}");
        let relay = hop.report.relay.clone().unwrap_or_default();
        let waits = hop.report.post_copy.clone().unwrap_or_default().waits;
        let sum = |of: fn(&PingReport) -> u64| packets.iter().map(of).sum::<u64>();
        let announcing = [BlackoutPhase::Announce, BlackoutPhase::Resume];
        let announcing = hop.report.blackout.phases.iter().filter(|entry| announcing.contains(&entry.phase));
        let line = serde_json::json!({
            "blackout_ns": hop.report.blackout_ns,
            "packets": sum(|one| one.sent),
            "lost": sum(|one| one.unanswered.len() as u64),
            "doubled": sum(|one| one.duplicates),
            "turned_round": sum(|one| one.reordered),
            "udp_gap_ns": udp.within.length_ns,
            "tcp_gap_ns": tcp.within.length_ns,
            "bulk_gap_ns": bulk_gaps.within.length_ns,
            "copying_gap_ns": udp.besides.length_ns.max(tcp.besides.length_ns),
            "quiet_gap_ns": quiet_gap_ns,
            "paused_gap_ns": paused_gap_ns,
            "stood_ns": stood_ns,
            "guest_gap_ns": guest_gap_ns,
            "waits": waits.count,
            "waited_ns": waits.sum_ns,
            "announce_ns": announcing.map(|entry| entry.duration_ns).sum::<u64>(),
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

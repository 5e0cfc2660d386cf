//! The demo: one VM, one client, one move, and the source is gone.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use dunlin::model::units::display_bytes;
use dunlin::model::{BlackoutLedger, RoundReport};
use dunlin_tests::client::{EchoClient, Pinger};
use dunlin_tests::rig::VM_NAME;
use dunlin_tests::stats::time;
use dunlin_tests::topology::SWITCH;
use dunlin_tests::{HopOptions, Rig, VmSpec, guest, interrupt};
use serde::{Deserialize, Serialize};

use crate::judge::{Checks, relearned_after_announcement_ns};

/// Options of `demo`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Print one JSON object (schema dunlin.demo/v1) instead of text.
    #[arg(long)]
    json: bool,
}

const ECHO_INTERVAL: Duration = Duration::from_millis(2);
const PING_INTERVAL: Duration = Duration::from_millis(10);
const LIMIT: Duration = Duration::from_secs(20);
/// How long the client's gaps are measured without any move, to show what is noise.
const QUIET: Duration = Duration::from_secs(1);
/// How long everything must go on without the source.
const AFTERWARDS: Duration = Duration::from_secs(2);
const HEARTBEAT_NS: u64 = 5_000_000;

/// What `dunlin dirty-rate` prints, as far as it is shown here.
#[derive(Debug, Default, Serialize, Deserialize)]
struct DirtyRate {
    pages_per_second: f64,
    bytes_per_second: f64,
    unique_pages: u64,
    interval_ns: u64,
    is_lower_bound: bool,
    source: String,
    regime: String,
    meaning: String,
}

/// The report.
#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    ok: bool,
    checks: Checks,
    memory_bytes: u64,
    cpus: u32,
    dirty_rate: DirtyRate,
    rounds: Vec<RoundReport>,
    wire_bytes: u64,
    total_ns: u64,
    blackout_ns: u64,
    blackout: BlackoutLedger,
    guest_gap_ns: u64,
    heartbeat_gap_ns: u64,
    heartbeat_interval_ns: u64,
    client_gap_ns: u64,
    client_largest_gap_ns: u64,
    client_quiet_gap_ns: u64,
    pings_sent: u64,
    pings_unanswered: u64,
    echo_lines_answered: u64,
    relearned_after_announcement_ns: Option<u64>,
    relearned_after_last_answer_ns: Option<u64>,
    verified_pages: u64,
    guest_verified_pages: u64,
    forwarding_before: Vec<String>,
    forwarding_after: Vec<String>,
    how: serde_json::Value,
}

/// Prints what happens as it happens: to the reader, or beside the JSON.
struct Teller {
    json: bool,
}

impl Teller {
    fn say(&self, line: impl AsRef<str>) {
        if self.json { eprintln!("{}", line.as_ref()) } else { println!("{}", line.as_ref()) }
    }
}

/// Runs it; false if a check did not hold.
pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    let teller = Teller { json: arguments.json };
    let report = play(&teller)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(report.ok)
}

fn play(teller: &Teller) -> Result<Report> {
    let mut checks = Checks::default();
    let spec = VmSpec {
        memory_bytes: 512 << 20,
        disk_bytes: Some(64 << 20),
        guest: "dunlin.wl=ws:96M,rate:10000,pattern:random,share:30 dunlin.spin=1 dunlin.blk=rate:100,span:16M \
                dunlin.heartbeat=5ms"
            .to_owned(),
        ..VmSpec::default()
    };
    teller.say(format!(
        "Two hosts, a switch and a client, each a network namespace of its own; a VM with {} vCPUs and {} boots at host-a.",
        spec.cpus,
        display_bytes(spec.memory_bytes)
    ));
    let mut rig = Rig::boot(&spec)?;
    teller.say(format!("  guest: {}", rig.ready()));

    teller.say("The client opens one TCP connection to the guest, and pings it.");
    let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), ECHO_INTERVAL))?;
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), PING_INTERVAL))?;
    echo.wait_answers(100, LIMIT)?;

    teller.say(format!("`dunlin dirty-rate {VM_NAME} --arm` watches how it writes its memory:"));
    let dirty_rate = dirty_rate(&rig)?;
    let seconds = dirty_rate.interval_ns as f64 / 1e9;
    teller.say(format!(
        "  {:.0} pages/s ({:.1} MiB/s), {:.0} unique pages/s; counted on {}, {}",
        dirty_rate.pages_per_second,
        dirty_rate.bytes_per_second / f64::from(1 << 20),
        dirty_rate.unique_pages as f64 / seconds,
        dirty_rate.source,
        dirty_rate.regime
    ));
    checks.add(
        "dirty tracking sees the writers",
        dirty_rate.unique_pages > 0,
        format!("{} unique pages", dirty_rate.unique_pages),
    );

    teller.say("Rehearsal: there and back with `--verify`, which hashes all memory at both ends.");
    let mut verified_pages = 0;
    for _ in 0..2 {
        let options = HopOptions { verify: true, ..HopOptions::default() };
        let hop = rig.hop(&options).context("rehearsal")?;
        teller.say(format!("  now behind {}: {} pages compared, all equal", hop.port, hop.report.verified_pages));
        verified_pages += hop.report.verified_pages.min(hop.verified_pages);
        echo.wait_answers(50, LIMIT)?;
    }
    let expected = 2 * spec.memory_bytes / 4096;
    checks.add(
        "memory is the same at both ends",
        verified_pages == expected,
        format!("{verified_pages} of {expected} pages compared in two moves"),
    );

    echo.restart_measurement();
    interrupt::sleep(QUIET)?;
    let client_quiet_gap_ns = echo.report().largest_gap.length_ns;

    let forwarding_before = table(&rig)?;
    teller.say(format!("The switch's forwarding table before the move (the guest is {}):", Rig::mac()));
    for line in &forwarding_before {
        teller.say(format!("  {line}"));
    }

    teller.say("Pre-copy moves the VM from host-a to host-b while it writes.");
    rig.get("/reset-gap")?;
    echo.restart_measurement();
    let hop = rig.hop(&HopOptions::default()).context("the move")?;
    echo.wait_answers(100, LIMIT)?;
    let client_largest_gap = echo.report().largest_gap;
    let client_gap = hop.relearned_at_monotonic_ns.and_then(|at_ns| echo.gap_at(at_ns)).unwrap_or(client_largest_gap);
    let counters = rig.counters()?;
    let guest_gap_ns = guest::max_gap_ns(&counters);
    let heartbeat_gap_ns = rig.heartbeat_gap_of_last_hop_ns()?;
    let forwarding_after = table(&rig)?;
    teller.say("The switch's forwarding table after the move:");
    for line in &forwarding_after {
        teller.say(format!("  {line}"));
    }

    let behind = |lines: &[String], port: &str| {
        let mac = Rig::mac().to_string();
        lines.iter().any(|line| line.starts_with(&mac) && line.split_whitespace().any(|word| word == port))
    };
    checks.add(
        "the switch relearned",
        behind(&forwarding_before, "host-a")
            && behind(&forwarding_after, "host-b")
            && !behind(&forwarding_after, "host-a"),
        "the guest's address was behind host-a and is behind host-b",
    );
    checks.add(
        "announced before the guest's first instruction",
        hop.announced_before_running(),
        "RARP and gratuitous ARP came in at the switch before any frame of the guest, and stand before `running` in the log",
    );

    teller.say("The source's namespace is deleted: its bridge, its cables, everything.");
    let deleted = rig.delete_other_host();
    checks.add(
        "nothing of the VM was left at the source",
        deleted.is_ok(),
        deleted.err().map_or("no process in its namespace, which is gone".to_owned(), |error| format!("{error:#}")),
    );
    let (answered_before, pings_before) = (echo.report().answered, pinger.report().answered);
    interrupt::sleep(AFTERWARDS)?;
    let (answered, pings) = (echo.report().answered - answered_before, pinger.report().answered - pings_before);
    teller.say(format!(
        "  in the {} after that: {answered} answers on the same connection, {pings} pings answered",
        time(AFTERWARDS.as_nanos() as u64)
    ));
    checks.add(
        "the guest goes on without the source",
        answered > 0 && pings > 0,
        format!("{answered} answers and {pings} pings"),
    );

    let inside = rig.verify_inside();
    let counters = rig.counters()?;
    let errors = guest::errors(&counters);
    let guest_verified_pages = *inside.as_ref().unwrap_or(&0);
    checks.add(
        "the guest finds its pages as it wrote them",
        inside.is_ok(),
        inside.map_or_else(|error| format!("{error:#}"), |pages| format!("{pages} pages checked by the guest")),
    );
    checks.add(
        "the guest counted no error",
        errors.is_empty(),
        if errors.is_empty() { format!("all of {} are zero", guest::ERRORS.join(", ")) } else { errors.join(" ") },
    );

    let echo = echo.finish(LIMIT);
    let ping = pinger.finish(Duration::from_secs(1));
    checks.add(
        "one TCP connection all along, each line answered once and in order",
        echo.fault.is_none() && echo.answered == echo.sent,
        echo.fault.clone().unwrap_or_else(|| format!("{} lines", echo.answered)),
    );
    checks.add(
        "no ping answered twice",
        ping.duplicates == 0,
        format!("{} sent, {} unanswered", ping.sent, ping.unanswered.len()),
    );
    let ended = rig.stop()?;
    checks.add("the VM ends when told to", ended.success(), ended.to_string());

    Ok(Report {
        schema: "dunlin.demo/v1",
        ok: checks.all_hold(),
        checks,
        memory_bytes: spec.memory_bytes,
        cpus: spec.cpus,
        dirty_rate,
        wire_bytes: hop.report.wire_bytes,
        total_ns: hop.report.total_ns,
        blackout_ns: hop.report.blackout_ns,
        blackout: hop.report.blackout.clone(),
        guest_gap_ns,
        heartbeat_gap_ns,
        heartbeat_interval_ns: HEARTBEAT_NS,
        client_gap_ns: client_gap.length_ns,
        client_largest_gap_ns: client_largest_gap.length_ns,
        client_quiet_gap_ns,
        pings_sent: ping.sent,
        pings_unanswered: ping.unanswered.len() as u64,
        echo_lines_answered: echo.answered,
        relearned_after_announcement_ns: relearned_after_announcement_ns(&hop),
        relearned_after_last_answer_ns: hop
            .relearned_at_monotonic_ns
            .and_then(|at| at.checked_sub(client_gap.from_monotonic_ns)),
        rounds: hop.report.rounds,
        verified_pages,
        guest_verified_pages,
        forwarding_before,
        forwarding_after,
        how: how(),
    })
}

/// How each figure was obtained.
fn how() -> serde_json::Value {
    serde_json::json!({
        "dirty_rate": "`dunlin dirty-rate --arm`, BPF counters in the kernel, second of two intervals; nothing in the guest helps",
        "rounds": "the source manager's own count, each round from its first byte to the target's word that it arrived",
        "wire_bytes": "bytes that the source wrote to its sockets, headers and state included",
        "total_ns": "source's clock, from the offer to the target's `running`, reservation included",
        "blackout_ns": "source's clock, from the order to pause to the target's `running`: an upper bound of what the guest lost",
        "blackout": "each side times its own phases; `wire` is what they leave over",
        "guest_gap_ns": "the guest's own time stamp counter: vCPU 0 spins, this is the longest time it did not run",
        "heartbeat_gap_ns": "time stamps of the last heartbeat on the old console and the first on the new one (one each 5 ms)",
        "client_gap_ns": "time between the two answers on the client's TCP connection around the relearning, a line sent each 2 ms",
        "client_largest_gap_ns": "the longest such time from before the first round to 100 answers after the move: what copying costs besides",
        "client_quiet_gap_ns": "the same in one second without a move: the noise of this machine",
        "relearned_after_announcement_ns": "from the kernel's stamp on the first frame at the switch's port to the bridge's notification as it was read",
        "relearned_after_last_answer_ns": "from the client's last answer before that gap to the bridge's notification, one clock",
        "verified_pages": "two moves under --verify before the measured one: both ends hash every page while the VM is paused",
        "guest_verified_pages": "the guest checks tag, sequence and body of each page that it wrote, after the source is gone",
        "pings_unanswered": "echo requests without a reply over the whole run: frames that reached the old place during three blackouts",
    })
}

fn dirty_rate(rig: &Rig) -> Result<DirtyRate> {
    let mut command = rig.dunlin_here(&["dirty-rate", VM_NAME, "--arm", "--interval", "1s", "--count", "2", "--json"]);
    let output = rig.host(rig.at()).netns.output(&mut command)?;
    anyhow::ensure!(output.status.success(), "dunlin dirty-rate: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().context("dunlin dirty-rate printed nothing")?).context("dirty-rate")
}

/// The stations that the switch has learned, as `bridge fdb` prints them.
fn table(rig: &Rig) -> Result<Vec<String>> {
    let text = rig.switch.run(&format!("bridge fdb show br {SWITCH} dynamic"))?;
    Ok(text.lines().map(|line| line.trim().to_owned()).collect())
}

fn text(report: &Report) -> String {
    let how = |field: &str| report.how[field].as_str().unwrap_or_default().to_owned();
    let mut text = String::from("\nReport\n");
    let mut line = |what: &str, value: String, field: &str| {
        text += &format!("  {what:<24}{value}\n  {:<24}  ({})\n", "", how(field));
    };
    line("rounds", report.rounds.len().to_string(), "rounds");
    line("bytes", display_bytes(report.wire_bytes), "wire_bytes");
    line("total time", time(report.total_ns), "total_ns");
    line("blackout, manager", time(report.blackout_ns), "blackout_ns");
    line("blackout, guest", time(report.guest_gap_ns), "guest_gap_ns");
    line("blackout, heartbeat", time(report.heartbeat_gap_ns), "heartbeat_gap_ns");
    line("gap seen by the client", time(report.client_gap_ns), "client_gap_ns");
    line("  largest of the move", time(report.client_largest_gap_ns), "client_largest_gap_ns");
    line("  without a move", time(report.client_quiet_gap_ns), "client_quiet_gap_ns");
    let or_never = |ns: Option<u64>| ns.map_or("never".to_owned(), time);
    line("bridge relearned", or_never(report.relearned_after_announcement_ns), "relearned_after_announcement_ns");
    line("  after last answer", or_never(report.relearned_after_last_answer_ns), "relearned_after_last_answer_ns");
    line("pages verified, hosts", report.verified_pages.to_string(), "verified_pages");
    line("pages verified, guest", report.guest_verified_pages.to_string(), "guest_verified_pages");
    line("pings unanswered", format!("{} of {}", report.pings_unanswered, report.pings_sent), "pings_unanswered");
    text += "Rounds\n";
    for round in &report.rounds {
        text += &format!(
            "  {:>3} {:<7}{:>8} pages ({} zero), {} in {}; {} written meanwhile\n",
            round.round,
            if round.paused { "paused" } else { "live" },
            round.pages,
            round.zero_pages,
            display_bytes(round.wire_bytes),
            time(round.duration_ns),
            round.dirtied_pages
        );
    }
    text += &format!("Blackout by phase ({})\n", how("blackout"));
    for entry in &report.blackout.phases {
        let phase = serde_json::to_value(entry.phase).unwrap_or_default();
        text += &format!("  {:<18}{}\n", phase.as_str().unwrap_or_default(), time(entry.duration_ns));
    }
    text += "Checks\n";
    text += &report.checks.text();
    text += if report.ok { "All checks hold.\n" } else { "NOT ALL CHECKS HOLD.\n" };
    text
}

//! The soak: as many moves with `--verify` and as many without, every error counted, every blackout measured.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use dunlin::migrate::Strategy;
use dunlin::model::DirtyLogKind;
use dunlin_tests::client::{EchoClient, Pinger};
use dunlin_tests::stats::{Spread, time};
use dunlin_tests::{HopOptions, Rig, VmSpec, guest, interrupt};
use serde::Serialize;

use crate::judge::{Checks, relearned_after_announcement_ns};

/// Options of `soak`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Moves with --verify, and again as many without.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    migrations: u32,
    /// Pages that the guest writes per second.
    #[arg(long, default_value_t = 50_000)]
    pages_per_second: u64,
    /// MiB that it writes over.
    #[arg(long, default_value_t = 256)]
    working_set_mib: u64,
    /// bitmap or ring.
    #[arg(long, default_value = "bitmap")]
    dirty_log: DirtyLogKind,
    /// pre-copy or stop-and-copy.
    #[arg(long, default_value_t = Strategy::PreCopy)]
    strategy: Strategy,
    /// Print one JSON object (schema dunlin.soak/v1) instead of text.
    #[arg(long)]
    json: bool,
}

const CPUS: u32 = 2;
const ECHO_INTERVAL: Duration = Duration::from_millis(2);
const PING_INTERVAL: Duration = Duration::from_millis(10);
/// The rounds of a move that took longer than this are shown one by one.
const SLOW_NS: u64 = 2_000_000_000;
const LIMIT: Duration = Duration::from_secs(20);

/// What the moves of one kind cost.
#[derive(Debug, Default, Serialize)]
struct Costs {
    migrations: u64,
    blackout: Spread,
    guest_gap: Spread,
    client_gap: Spread,
    client_largest_gap: Spread,
    total: Spread,
    rounds_max: u64,
    relearned_after_announcement: Spread,
    wire_bytes: u64,
    verified_pages: u64,
    /// The guest's counters of errors after the last move.
    errors: Vec<String>,
}

/// The report.
#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    ok: bool,
    checks: Checks,
    strategy: String,
    dirty_log: DirtyLogKind,
    memory_bytes: u64,
    working_set_bytes: u64,
    pages_per_second: u64,
    pages_written: u64,
    dropped_pages: u64,
    blocks_written: u64,
    errors: Vec<String>,
    with_verify: Costs,
    without_verify: Costs,
    echo_lines_answered: u64,
    pings_sent: u64,
    pings_unanswered: u64,
    elapsed_ns: u64,
    how: serde_json::Value,
}

/// Runs it; false if a check did not hold.
pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    let report = play(arguments)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(report.ok)
}

fn play(arguments: &Arguments) -> Result<Report> {
    let began = Instant::now();
    let mut checks = Checks::default();
    let spec = VmSpec {
        cpus: CPUS,
        memory_bytes: (arguments.working_set_mib + 128) << 20,
        dirty_log: arguments.dirty_log,
        disk_bytes: Some(64 << 20),
        guest: format!(
            "dunlin.wl=ws:{}K,rate:{},fill:random dunlin.spin=1 dunlin.blk=rate:100,span:16M dunlin.heartbeat=10ms",
            arguments.working_set_mib * 1024 / u64::from(CPUS),
            arguments.pages_per_second / u64::from(CPUS)
        ),
        ..VmSpec::default()
    };
    let mut rig = Rig::boot(&spec)?;
    eprintln!("{}", rig.ready());
    let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), ECHO_INTERVAL))?;
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), PING_INTERVAL))?;
    echo.wait_answers(100, LIMIT)?;

    let with_verify = moves(arguments, &mut rig, &echo, true)?;
    let without_verify = moves(arguments, &mut rig, &echo, false)?;

    let inside = rig.verify_inside();
    let counters = rig.counters()?;
    let errors = guest::errors(&counters);
    let echo = echo.finish(LIMIT);
    let ping = pinger.finish(Duration::from_secs(1));
    let beats = rig.heartbeats()?.report();
    let dropped_pages = counters["vcpus"]
        .as_array()
        .map_or(0, |vcpus| vcpus.iter().filter_map(|vcpu| vcpu["workload"]["dropped_pages"].as_u64()).sum());
    let expected = with_verify.migrations * (spec.memory_bytes / 4096);
    checks.add(
        "memory is the same at both ends",
        with_verify.verified_pages == expected,
        format!("{} of {expected} pages compared under --verify", with_verify.verified_pages),
    );
    checks.add(
        "no corrupt page or block, no lost or doubled interrupt",
        errors.is_empty(),
        if errors.is_empty() {
            format!("{} are zero in the guest", guest::ERRORS.join(", "))
        } else {
            errors.join(" ")
        },
    );
    checks.add(
        "the guest finds its pages as it wrote them",
        inside.is_ok(),
        inside.map_or_else(
            |error| format!("{error:#}"),
            |pages| format!("{pages} pages checked by the guest at the end"),
        ),
    );
    checks.add(
        "one TCP connection all along, each line answered once and in order",
        echo.fault.is_none() && echo.answered == echo.sent,
        echo.fault.clone().unwrap_or_else(|| format!("{} lines", echo.answered)),
    );
    checks.add(
        "heartbeats go on without a hole",
        (beats.lost, beats.repeated, beats.tsc_went_back) == (0, 0, 0),
        format!("{} beats over all consoles, {} lost, {} repeated", beats.beats, beats.lost, beats.repeated),
    );
    checks.add("no ping answered twice", ping.duplicates == 0, format!("{} pings", ping.sent));
    let ended = rig.stop()?;
    checks.add("the VM ends when told to", ended.success(), ended.to_string());
    Ok(Report {
        schema: "dunlin.soak/v1",
        ok: checks.all_hold(),
        checks,
        strategy: arguments.strategy.to_string(),
        dirty_log: arguments.dirty_log,
        memory_bytes: spec.memory_bytes,
        working_set_bytes: arguments.working_set_mib << 20,
        pages_per_second: arguments.pages_per_second,
        pages_written: guest::sum(&counters, "pages_written"),
        dropped_pages,
        blocks_written: guest::sum(&counters, "blocks_written"),
        errors,
        with_verify,
        without_verify,
        echo_lines_answered: echo.answered,
        pings_sent: ping.sent,
        pings_unanswered: ping.unanswered.len() as u64,
        elapsed_ns: began.elapsed().as_nanos() as u64,
        how: how(),
    })
}

fn moves(arguments: &Arguments, rig: &mut Rig, echo: &EchoClient, verify: bool) -> Result<Costs> {
    let options = HopOptions { strategy: arguments.strategy, verify, ..HopOptions::default() };
    let mut costs = Costs::default();
    let (mut blackouts, mut guest_gaps, mut client_gaps) = (Vec::new(), Vec::new(), Vec::new());
    let (mut totals, mut relearned, mut largest_gaps) = (Vec::new(), Vec::new(), Vec::new());
    for number in 1..=arguments.migrations {
        interrupt::check()?;
        let kind = if verify { "verified" } else { "measured" };
        rig.get("/reset-gap")?;
        echo.restart_measurement();
        let hop = rig.hop(&options).with_context(|| format!("{kind} move {number}"))?;
        echo.wait_answers(50, LIMIT).with_context(|| format!("{kind} move {number}"))?;
        let counters = rig.counters()?;
        let errors = guest::errors(&counters);
        if errors != costs.errors {
            // Told when it happens, and judged at the end: one error must not hide what else there is.
            eprintln!("{kind} move {number}: the guest counts {}", errors.join(" "));
            eprintln!("  net {}\n  block {}", counters["net"], counters["block"]);
            costs.errors = errors;
        }
        anyhow::ensure!(hop.announced_before_running(), "{kind} move {number}: announced late: {:?}", hop.frames);
        let report = &hop.report;
        let relearned_at_ns = hop.relearned_at_monotonic_ns.context("the switch did not relearn")?;
        let largest_gap = echo.report().largest_gap;
        let client_gap = echo.gap_at(relearned_at_ns).unwrap_or(largest_gap).length_ns;
        let guest_gap = guest::max_gap_ns(&counters);
        eprintln!(
            "{kind} {number}/{}: {} rounds, total {}, blackout {}, guest {}, client {}, behind {}",
            arguments.migrations,
            report.rounds.len(),
            time(report.total_ns),
            time(report.blackout_ns),
            time(guest_gap),
            time(client_gap),
            hop.port
        );
        if report.total_ns > SLOW_NS {
            for round in &report.rounds {
                eprintln!(
                    "  round {}: {} pages in {}, {} written meanwhile",
                    round.round,
                    round.pages,
                    time(round.duration_ns),
                    round.dirtied_pages
                );
            }
        }
        blackouts.push(report.blackout_ns);
        guest_gaps.push(guest_gap);
        client_gaps.push(client_gap);
        largest_gaps.push(largest_gap.length_ns);
        totals.push(report.total_ns);
        relearned.push(relearned_after_announcement_ns(&hop).context("the switch did not relearn")?);
        costs.migrations += 1;
        costs.rounds_max = costs.rounds_max.max(report.rounds.len() as u64);
        costs.wire_bytes += report.wire_bytes;
        costs.verified_pages += report.verified_pages.min(hop.verified_pages);
    }
    costs.blackout = Spread::of(blackouts);
    costs.guest_gap = Spread::of(guest_gaps);
    costs.client_gap = Spread::of(client_gaps);
    costs.client_largest_gap = Spread::of(largest_gaps);
    costs.total = Spread::of(totals);
    costs.relearned_after_announcement = Spread::of(relearned);
    Ok(costs)
}

/// How each figure was obtained.
fn how() -> serde_json::Value {
    serde_json::json!({
        "errors": "the guest's own counters: each page, block, interrupt and address space is checked by the guest that made it",
        "verified_pages": "both ends hash every page while the VM is paused, and compare",
        "blackout": "source's clock, from the order to pause to the target's `running`",
        "guest_gap": "the guest's time stamp counter: vCPU 0 spins, the longest time it did not run, reset before each move",
        "client_gap": "time between the two answers on the one TCP connection around the relearning, a line sent each 2 ms",
        "client_largest_gap": "the longest such time from before the first round to 50 answers after the move",
        "relearned_after_announcement": "from the kernel's stamp on the first frame at the switch's port to the bridge's notification as it was read",
        "total": "source's clock, from the offer to the target's `running`, reservation included",
        "dropped_pages": "writes that the guest's writer did not catch up on after pauses above 20 ms",
        "pings_unanswered": "echo requests without a reply over the whole run: frames that reached the old place in a blackout",
    })
}

fn text(report: &Report) -> String {
    let how = |field: &str| report.how[field].as_str().unwrap_or_default().to_owned();
    let mut text = format!(
        "{} with the {} dirty log, {} pages/s over {} MiB; {} pages and {} blocks written in {}\n",
        report.strategy,
        serde_json::to_value(report.dirty_log).unwrap_or_default().as_str().unwrap_or_default(),
        report.pages_per_second,
        report.working_set_bytes >> 20,
        report.pages_written,
        report.blocks_written,
        time(report.elapsed_ns)
    );
    for (name, costs) in [("with --verify", &report.with_verify), ("without --verify", &report.without_verify)] {
        text += &format!(
            "{} moves {name}{}\n",
            costs.migrations,
            if name == "with --verify" { " (blackouts hash all memory: not to be quoted)" } else { "" }
        );
        text += &format!("  blackout    {}  ({})\n", costs.blackout, how("blackout"));
        text += &format!("  guest gap   {}  ({})\n", costs.guest_gap, how("guest_gap"));
        text += &format!("  client gap  {}  ({})\n", costs.client_gap, how("client_gap"));
        text += &format!(
            "  relearned   {}  ({})\n",
            costs.relearned_after_announcement,
            how("relearned_after_announcement")
        );
        text += &format!("  total       {}  ({})\n", costs.total, how("total"));
        text += &format!("  rounds      at most {}\n", costs.rounds_max);
    }
    text += &format!(
        "pings unanswered {} of {} ({})\n",
        report.pings_unanswered,
        report.pings_sent,
        how("pings_unanswered")
    );
    text += "Checks\n";
    text += &report.checks.text();
    text += if report.ok { "All checks hold.\n" } else { "NOT ALL CHECKS HOLD.\n" };
    text
}

//! Writers that are slowed are at their full rate again whatever becomes of who slowed them; while they are slowed it shows everywhere; and a writer that is not where it was,
//! or not there all the time, is held as one that stays.
//!
//! Rates are the guest's own counts over the guest's own time.
#![cfg(target_arch = "x86_64")]

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use dunlin::model::{DirtyLogKind, Ending};
use dunlin_tests::agent::Agent;
use dunlin_tests::rig::Receiver;
use dunlin_tests::wait::wait_for;
use dunlin_tests::{HopOptions, OwnProcess, Rig, VmSpec, guest};
use rustix::process::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// How long rates are measured over: a look at a limited vCPU that comes late by a millisecond must not count for much.
const SAMPLE: Duration = Duration::from_millis(40);
const SLOWED_FOR: Duration = Duration::from_millis(300);

/// vCPU 0 writes little and answers, vCPU 1 writes as fast as it can.
fn boot(dirty_log: DirtyLogKind) -> Rig {
    let guest = "dunlin.wl0=ws:8M,rate:20 dunlin.wl1=ws:96M,rate:max".to_owned();
    Rig::boot(&VmSpec { cpus: 2, dirty_log, guest, ..VmSpec::default() }).unwrap()
}

/// The throttle, once the rogue has been held for most of the last 300 ms, and for a second in all: at the beginning of a migration it may be let go again.
fn stunned(rig: &Rig) -> Value {
    let (mut first, mut since) = (None, None);
    wait_for("the rogue to be slowed", LIMIT, || {
        let throttle = rig.info().unwrap()["throttle"].clone();
        let held = throttle["vcpus"][1]["held_ns"].as_f64().unwrap_or(0.0) / 1e9;
        let in_all = held - *first.get_or_insert(held);
        let is_limited = throttle["vcpus"][1]["limit_pages_per_second"].is_f64();
        let (began, before): (Instant, f64) = *since.get_or_insert((Instant::now(), held));
        let passed = began.elapsed();
        if !is_limited || passed >= SLOWED_FOR {
            since = None;
        }
        let is_held = passed >= SLOWED_FOR && held - before > passed.as_secs_f64() * 0.6;
        (is_limited && is_held && in_all > 1.0).then_some(throttle)
    })
    .unwrap()
}

/// A look at the guest: when it was over, the guest's time, pages that the rogue wrote.
struct Look(Instant, f64, f64);

fn look(rig: &Rig) -> Look {
    let counters = rig.counters().unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    Look(Instant::now(), number(&counters["uptime_ns"]) / 1e9, number(&counters["vcpus"][1]["pages_written"]))
}

fn rate(rig: &Rig, time: Duration) -> f64 {
    let before = look(rig);
    std::thread::sleep(time);
    let after = look(rig);
    (after.2 - before.2) / (after.1 - before.1)
}

/// When the rogue was let go, and when it was at its full rate: when the first sample begins in which it writes more than a tenth of what it writes freely, which no limit lets it, and
/// more than half of that: first each page is written once that the log had protected.
fn let_go(rig: &Rig, began: Instant, free: f64) -> [Duration; 2] {
    let mut before = look(rig);
    let mut let_go = None;
    loop {
        std::thread::sleep(SAMPLE);
        let after = look(rig);
        let rate = (after.2 - before.2) / (after.1 - before.1);
        let at = before.0.saturating_duration_since(began);
        if rate > free / 10.0 {
            let_go.get_or_insert(at);
        }
        if let (Some(let_go), true) = (let_go, rate > free / 2.0) {
            return [let_go, at];
        }
        assert!(began.elapsed() < LIMIT, "it is held for ever");
        before = after;
    }
}

/// A migration over a link so narrow that its writers are slowed for seconds.
fn migrate(rig: &mut Rig) -> (Receiver, OwnProcess) {
    let receiver = rig.receive().unwrap();
    let more = ["--bandwidth", "160Mbit", "--downtime", "40ms", "--on-stuck", "stun"].map(str::to_owned).to_vec();
    let manager = rig.start_migration(&receiver.address, &HopOptions { more, ..HopOptions::default() }).unwrap();
    (receiver, manager)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Cancelled,
    TargetKilled,
    ManagerKilled,
    ManagerStopped,
}

/// Slows a VM's rogue by a migration, ends that, and looks when the rogue is let go.
fn end(rig: &mut Rig, end: End, free: f64) {
    let (receiver, mut manager) = migrate(rig);
    // Between two rounds it may be let go for a moment, and what is dirty already it may write again.
    let is_held = || {
        let (throttle, held) = (stunned(rig), rate(rig, Duration::from_millis(200)));
        (held < free / 20.0).then_some((throttle, held))
    };
    let (throttle, held) = wait_for("the rogue to write little", LIMIT, is_held).unwrap();
    assert!(throttle["stunned"] == true && throttle["holder"]["migration_id"].is_string(), "{throttle:#}");
    let began = Instant::now();
    match end {
        End::Cancelled => manager.signal(Signal::INT).unwrap(),
        End::TargetKilled => receiver.process.signal(Signal::KILL).unwrap(),
        End::ManagerKilled => manager.signal(Signal::KILL).unwrap(),
        End::ManagerStopped => manager.signal(Signal::STOP).unwrap(),
    }
    let [after, full] = let_go(rig, began, free);
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "shows {end:?}: held to {held:.0} of {free:.0} pages/s, let go after {:.0} ms at the latest, at its full rate after {:.0} ms",
        ms(after),
        ms(full)
    );
    let allowed = match end {
        End::Cancelled | End::TargetKilled => Duration::from_millis(100),
        End::ManagerKilled | End::ManagerStopped => Duration::from_secs(1),
    };
    assert!(after <= allowed + 2 * SAMPLE, "{end:?}: let go after {after:?}");
    assert!(full <= after + Duration::from_secs(1), "{end:?}: let go after {after:?}, at its full rate after {full:?}");
    if end == End::ManagerStopped {
        // It was lifted by itself, and goes on when it may.
        assert_eq!(rig.info().unwrap()["throttle"]["stunned"], false);
        manager.signal(Signal::CONT).unwrap();
        stunned(rig);
        manager.signal(Signal::INT).unwrap();
    }
    if end == End::ManagerKilled {
        manager.wait_for(LIMIT).unwrap().unwrap();
    } else {
        let (report, code) = rig.end_of_migration(&mut manager).unwrap();
        let wanted = if end == End::TargetKilled { Ending::Failed } else { Ending::Cancelled };
        assert_eq!((report.ending, code), (wanted, Some(i32::from(wanted.exit_code()))), "{report:?}");
        // Who, how far, how long, at what loss.
        let stun = report.stun.unwrap();
        let [rogue] = stun.vcpus.as_slice() else { panic!("only the rogue was slowed: {stun:#?}") };
        assert!(rogue.vcpu == 1 && rogue.held_ns > 0 && rogue.limited_ns > 0 && stun.stunned_ns > 0, "{stun:#?}");
        assert!(rogue.limit_pages_per_second > 0.0 && rogue.free_pages_per_second > 0.0, "{stun:#?}");
    }
    drop(receiver);
    // Nobody is held, the log is off, what was lost is still known.
    let after = rig.info().unwrap();
    assert_eq!((&after["throttle"]["stunned"], &after["dirty_log_on"]), (&false.into(), &false.into()), "{after:#}");
    assert!(after["throttle"].get("holder").is_none(), "{after:#}");
    assert!(after["throttle"]["guest_time_lost_ns"].as_u64() >= throttle["guest_time_lost_ns"].as_u64());
    wait_for("the rogue's full rate", LIMIT, || (rate(rig, Duration::from_millis(300)) > free / 2.0).then_some(()))
        .unwrap();
}

fn ends(dirty_log: DirtyLogKind, all: [End; 2]) {
    let mut rig = boot(dirty_log);
    let free = rate(&rig, Duration::from_millis(500));
    for one in all {
        end(&mut rig, one, free);
    }
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    rig.verify_inside().unwrap();
    // Each was written down: when it began, with whom, and what it cost.
    let log = fs::read_to_string(rig.state_dir(rig.at()).join("audit.log")).unwrap();
    let actions: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told = |after: &str, words: &str| {
        let fits = |action: &&Value| {
            let what = action["what"].as_str().unwrap_or_default();
            action["after"] == after && what.starts_with("migrate --on-stuck stun") && what.contains(words)
        };
        actions.iter().filter(fits).count()
    };
    let begun = told("stunned", "vCPU 1 to ");
    assert!(begun >= all.len() && told("running", "guest time lost: vCPU 1") == begun, "{log}");
    println!("shows {}", log.lines().filter(|line| line.contains("stun")).collect::<Vec<_>>().join("\nshows "));
    assert!(rig.stop().unwrap().success());
}

#[test]
fn a_migration_that_is_cancelled_or_loses_its_target_lets_go() {
    ends(DirtyLogKind::Ring, [End::Cancelled, End::TargetKilled]);
}

#[test]
fn a_migration_whose_manager_is_killed_or_stopped_lets_go() {
    ends(DirtyLogKind::Bitmap, [End::ManagerKilled, End::ManagerStopped]);
}

fn said(rig: &Rig, words: &[&str]) -> (Option<i32>, String) {
    let output = rig.dunlin_here(words).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

/// `dunlin stun` at work.
fn slow(rig: &Rig, target: &str) -> OwnProcess {
    let mut command = rig.dunlin_here(&["stun", "wader", "--target", target, "--json"]);
    OwnProcess::new(command.stdout(Stdio::null()).spawn().unwrap())
}

fn interrupt(mut process: OwnProcess) {
    process.signal(Signal::INT).unwrap();
    assert_eq!(process.wait_for(LIMIT).unwrap().unwrap().code(), Some(0));
}

#[test]
fn of_two_who_would_slow_a_vm_the_later_is_refused_and_so_are_targets_that_are_none() {
    let mut rig = boot(DirtyLogKind::Ring);
    for target in ["0", "0MiB/s", "0.0001bit", "-5MiB/s", "NaN", "NaNMiB/s", "inf", "infMiB/s", "1e99MiB/s", ""] {
        let (code, words) = said(&rig, &["stun", "wader", &format!("--target={target}")]);
        assert!(code == Some(2) && words.contains("target"), "{target}: {code:?} {words}");
    }
    // First a command, then a migration.
    let free = rate(&rig, Duration::from_millis(500));
    let process = slow(&rig, "40MiB/s");
    let throttle = stunned(&rig);
    assert!(throttle["holder"]["who"].as_str().unwrap().contains(&format!("pid={}", process.id())), "{throttle:#}");
    assert!(throttle["holder"].get("migration_id").is_none(), "{throttle:#}");
    let receiver = rig.receive().unwrap();
    let to = receiver.address.clone();
    for more in [&["--on-stuck", "stun"][..], &[]] {
        let (code, words) = said(&rig, &[&["migrate", "wader", "--to", &to, "--insecure-plaintext"], more].concat());
        assert!(code == Some(3) && words.contains("slows its writers; end that first"), "{code:?} {words}");
    }
    assert!(rate(&rig, Duration::from_millis(500)) < free / 10.0, "the first one goes on");
    interrupt(process);
    drop(receiver);
    // First a migration, then a command.
    let (receiver, mut manager) = migrate(&mut rig);
    let throttle = stunned(&rig);
    let (code, words) = said(&rig, &["stun", "wader", "--target", "400MiB/s", "--for", "1s"]);
    assert!(code == Some(1) && words.contains("while a migration has the VM"), "{code:?} {words}");
    let now = stunned(&rig);
    assert_eq!(now["holder"], throttle["holder"]);
    assert!(rate(&rig, Duration::from_millis(500)) < free / 10.0, "the migration goes on");
    manager.signal(Signal::INT).unwrap();
    let (report, _) = rig.end_of_migration(&mut manager).unwrap();
    assert_eq!(report.ending, Ending::Cancelled, "{report:?}");
    drop(receiver);
    // And one that the operator has excepted.
    let config = rig.state_dir(rig.at()).join("dunlin.toml");
    fs::write(&config, "version = 1\n[stun]\nnever = [\"wader\"]\n").unwrap();
    let config = config.display().to_string();
    let receiver = rig.receive().unwrap();
    let words = ["migrate", "wader", "--to", &receiver.address, "--insecure-plaintext", "--on-stuck", "stun"];
    let (code, words) = said(&rig, &[&words[..], &["--config", &config]].concat());
    assert!(code == Some(3) && words.contains("never slowed") && words.contains("not touched"), "{code:?} {words}");
    let (code, words) = said(&rig, &["stun", "wader", "--target", "40MiB/s", "--config", &config]);
    assert!(code == Some(3) && words.contains("never slowed"), "{code:?} {words}");
    assert_eq!(rig.info().unwrap()["dirty_log_on"], false);
    assert!(rig.stop().unwrap().success());
}

#[test]
fn a_stunned_vm_shows_in_info_list_top_and_metrics() {
    let mut rig = boot(DirtyLogKind::Ring);
    let pid = rig.info().unwrap()["pid"].as_u64().unwrap() as u32;
    let run_dir = rig.run_dir(rig.at());
    let agent = Agent::start(&run_dir, "200ms", 0.5, &["--vcpu-metrics"]).unwrap();
    let metric = |name: &str, labels: &[&str]| agent.metric(name, labels).unwrap();
    wait_for("a VM that nobody slows", LIMIT, || (metric("dunlin_vm_stunned", &[]) == Some(0.0)).then_some(()))
        .unwrap();
    assert_eq!(metric("dunlin_vm_guest_time_lost_seconds_total", &[]), Some(0.0));
    assert_eq!(metric("dunlin_vcpu_limit_bytes_per_second", &[]), None);
    let process = slow(&rig, "40MiB/s");
    stunned(&rig);
    wait_for("the metrics of a stunned VM", LIMIT, || {
        let limit = metric("dunlin_vcpu_limit_bytes_per_second", &["vcpu=\"1\""])?;
        let shown = metric("dunlin_vm_stunned", &[]) == Some(1.0) && limit > 0.0 && limit <= (40 << 20) as f64;
        (shown && metric("dunlin_vm_guest_time_lost_seconds_total", &[])? > 0.0).then_some(())
    })
    .unwrap();
    let throttle = agent.vm(pid).unwrap()["throttle"].clone();
    assert!(throttle["stunned"] == true && throttle["vcpus"][0]["held_ns"] == 0, "{throttle:#}");
    let (code, text) = said(&rig, &["vm", "info", "wader"]);
    assert!(
        code == Some(0) && text.contains("slowed by `dunlin stun`") && text.contains("of guest time lost"),
        "{text}"
    );
    let (_, list) = said(&rig, &["vm", "list"]);
    assert!(list.contains("stunned"), "{list}");
    let (_, top) = said(&rig, &["top", "--once", "--interval", "300ms"]);
    assert!(
        top.contains(", 1 stunned") && top.contains("STUNNED, ") && top.contains("stunned by `dunlin stun`"),
        "{top}"
    );
    println!("shows\n{text}{list}{top}");
    interrupt(process);
    wait_for("the metrics of a VM that was let go", LIMIT, || {
        (metric("dunlin_vm_stunned", &[]) == Some(0.0)).then_some(())
    })
    .unwrap();
    let lost = metric("dunlin_vm_guest_time_lost_seconds_total", &[]).unwrap();
    assert!(lost > 0.0 && metric("dunlin_vcpu_limit_bytes_per_second", &[]).is_none());
    let log = fs::read_to_string(rig.state_dir(rig.at()).join("audit.log")).unwrap();
    assert!(log.contains("s of guest time lost"), "{log}");
    assert!(rig.stop().unwrap().success());
}

/// What all vCPUs wrote by the guest's count, what each was held, and the guest's time.
fn totals(rig: &Rig) -> (f64, Vec<f64>, f64) {
    let held = rig.info().unwrap()["throttle"]["vcpus"].as_array().unwrap().clone();
    let counters = rig.counters().unwrap();
    let vcpus = counters["vcpus"].as_array().unwrap();
    let pages = vcpus.iter().map(|vcpu| vcpu["pages_written"].as_f64().unwrap()).sum();
    let held = held.iter().map(|vcpu| vcpu["held_ns"].as_f64().unwrap() / 1e9).collect();
    (pages, held, counters["uptime_ns"].as_f64().unwrap() / 1e9)
}

/// A rogue that changes its vCPU, and one that writes in bursts: all together they keep to the target, and who hardly writes is never held.
#[test]
fn a_writer_that_wanders_or_writes_in_bursts_keeps_to_the_target() {
    const TARGET_PAGES: f64 = 10_240.0;
    const EACH: Duration = Duration::from_millis(50);
    let mut rig = Rig::boot(&VmSpec {
        cpus: 3,
        guest: "dunlin.wl0=ws:8M,rate:100 dunlin.wl1=ws:48M,rate:0 dunlin.wl2=ws:48M,rate:0".to_owned(),
        dirty_log: DirtyLogKind::Ring,
        ..VmSpec::default()
    })
    .unwrap();
    let set = |cpu: u32, rate: &str| drop(rig.get(&format!("/set?cpu={cpu}&rate={rate}")).unwrap());
    // What each vCPU writes in turn: vCPU 0 is who answers.
    let wandering: [&[(u32, &str)]; 2] = [&[(2, "0"), (1, "max")], &[(1, "0"), (2, "max")]];
    let bursts: [&[(u32, &str)]; 2] = [&[(1, "max")], &[(1, "0")]];
    for (name, turns) in [("wanders", wandering), ("bursts", bursts)] {
        let process = slow(&rig, "40MiB/s");
        let mut longest = Duration::ZERO;
        let mut swap_for = |time: Duration| {
            let (began, mut due, mut count) = (Instant::now(), Instant::now(), 0);
            for orders in turns.iter().cycle() {
                for &(cpu, rate) in *orders {
                    set(cpu, rate);
                }
                count += 1;
                longest = longest.max(Instant::now().saturating_duration_since(due));
                due = (due + EACH).max(Instant::now());
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                if began.elapsed() >= time {
                    return (count, began.elapsed());
                }
            }
            unreachable!("turns go round")
        };
        // The first looks, and the ramp.
        swap_for(Duration::from_millis(1500));
        let before = totals(&rig);
        let (count, took) = swap_for(Duration::from_secs(4));
        let after = totals(&rig);
        let rate = (after.0 - before.0) / (after.2 - before.2);
        let held: Vec<f64> = after.1.iter().zip(&before.1).map(|(after, before)| after - before).collect();
        println!(
            "shows a writer that {name}, {count} turns in {:.1} s (orders took {:.0} ms at most): {rate:.0} of {TARGET_PAGES} pages/s, held {held:.2?} s",
            took.as_secs_f64(),
            longest.as_secs_f64() * 1e3
        );
        // On a busy host the looks come late, and no debt is longer than two seconds.
        assert!(rate < TARGET_PAGES * 1.3, "{name}: {rate}");
        // Held at all, the bystander never.
        assert!(held[0] == 0.0 && held[1] > 0.0, "{name}: {held:?}");
        // What a vCPU wrote between two looks it may owe into the other's turn, and no longer: who does not write any more is not held any more.
        set(1, "0");
        set(2, "0");
        let is_calm = || {
            let before = totals(&rig).1;
            std::thread::sleep(Duration::from_millis(300));
            (totals(&rig).1 == before).then_some(())
        };
        wait_for("those that do not write to be let be", LIMIT, is_calm).unwrap();
        interrupt(process);
    }
    let counters = rig.counters().unwrap();
    assert_eq!(guest::errors(&counters), Vec::<String>::new(), "{counters:#}");
    rig.verify_inside().unwrap();
    assert!(rig.stop().unwrap().success());
}

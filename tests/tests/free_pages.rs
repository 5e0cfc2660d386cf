//! What a guest can do without is not sent: pages that it says are free, and what it gives up before it moves. Whatever it does with them meanwhile is kept, and it has all of it again afterwards.
//!
//! The guest's pool is memory full of noise that it does not use; with churn it uses and frees pages of it all the time, also those that it has just named as free, and checks each before it frees it.
#![cfg(target_arch = "x86_64")]

use std::time::Duration;

use dunlin::model::outcome::exit;
use dunlin::model::{DirtyLogKind, Ending, MigrationReport, ReducerReport, SqueezeReport};
use dunlin::service::machine::RunState;
use dunlin_tests::hosted::{TestHost, VM};
use dunlin_tests::rig::{Receiver, Side};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{Hop, HopOptions, OwnProcess, Rig, VmSpec, dunlin, guest};
use rustix::process::Signal;
use serde_json::Value;

const MEMORY: u64 = 192 << 20;
/// The guest's pool, in pages of 96 MiB.
const POOL_PAGES: u64 = (96 << 20) / 4096;
/// How long the guest may take for what it is asked for.
const LIMIT: Duration = Duration::from_secs(30);

/// A guest with two small writers and a pool.
fn spec(dirty_log: DirtyLogKind, pool: &str) -> VmSpec {
    VmSpec {
        memory_bytes: MEMORY,
        dirty_log,
        more: vec!["--balloon".to_owned()],
        guest: format!("dunlin.wl=ws:8M,rate:2000 dunlin.pool=size:96M{pool}"),
        ..VmSpec::default()
    }
}

fn options(more: &[&str]) -> HopOptions {
    HopOptions { more: more.iter().map(|&word| word.to_owned()).collect(), ..HopOptions::default() }
}

/// What the guest says of its pool.
fn pool(rig: &Rig, name: &str) -> u64 {
    let counters = rig.counters().unwrap();
    counters["balloon"][name].as_u64().unwrap_or_else(|| panic!("{name} in {counters:#}"))
}

/// No page is lost, and no error counted.
fn assert_whole(rig: &Rig) {
    rig.verify_inside().unwrap();
    let counters = rig.counters().unwrap();
    assert_eq!(guest::errors(&counters), Vec::<String>::new(), "{counters:#}");
}

/// Moves, and looks at everything.
fn hop(rig: &mut Rig, options: &HopOptions) -> Hop {
    let side = rig.at().other();
    let hop = rig.hop(options).unwrap();
    println!("shows {}", serde_json::to_string(&hop.report).unwrap());
    assert_eq!((hop.exit_code, rig.at()), (Some(0), side), "{hop:#?}");
    assert_whole(rig);
    hop
}

fn free(report: &MigrationReport) -> &ReducerReport {
    let named = report.reducers.iter().find(|reducer| reducer.name == "free-pages");
    named.unwrap_or_else(|| panic!("{report:#?}"))
}

fn squeeze(report: &MigrationReport) -> &SqueezeReport {
    report.squeeze.as_ref().unwrap_or_else(|| panic!("{report:#?}"))
}

/// `dunlin vm balloon` where the VM is.
fn balloon(rig: &Rig) -> Value {
    let mut command = rig.dunlin_here(&["vm", "balloon", "wader", "--json"]);
    let output = rig.host(rig.at()).netns.output(&mut command).unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The guest has all of its memory, by the device's word and its own.
fn await_all_given_back(rig: &Rig) {
    let given_back = || {
        let found = balloon(rig);
        let is_whole = ["target_bytes", "actual_bytes"].iter().all(|name| found[*name] == MEMORY);
        (is_whole && pool(rig, "given_pages") == 0).then_some(())
    };
    wait_for("the guest's memory", LIMIT, given_back).unwrap_or_else(|error| panic!("{error}: {:#}", balloon(rig)));
}

#[test]
fn free_pages_are_not_sent() {
    let mut rig = Rig::boot(&spec(DirtyLogKind::Bitmap, "")).unwrap();
    let plain = hop(&mut rig, &options(&[]));
    assert!(plain.report.wire_bytes > POOL_PAGES * 4096, "{:#?}", plain.report);
    // There and back: what was named for the first is named anew for the second.
    for (turn, dedup) in [(1, &["--free-pages"][..]), (2, &["--free-pages", "--dedup", "--delta", "32MiB"])] {
        let moved = hop(&mut rig, &HopOptions { verify: true, ..options(dedup) });
        let free = free(&moved.report);
        assert_eq!((free.reason.as_str(), moved.report.verified_pages), ("", MEMORY / 4096));
        // Of a page that was left out once the target has nothing.
        let held = if turn == 1 { POOL_PAGES * 9 / 10 * 4096 } else { 0 };
        assert!(free.pages > POOL_PAGES * 9 / 10 && free.saved_bytes >= held, "{free:?}");
        assert!(moved.report.wire_bytes < plain.report.wire_bytes / 2, "{:#?}", moved.report);
        assert!(pool(&rig, "rounds") >= turn);
    }
    assert!(rig.stop().unwrap().success());
}

#[test]
fn a_guest_that_uses_what_it_has_named_as_free_loses_nothing() {
    let cases = [
        (DirtyLogKind::Bitmap, "pre-copy", ""),
        (DirtyLogKind::Ring, "hybrid", ""),
        (DirtyLogKind::Bitmap, "hybrid", ",report:1"),
    ];
    for (kind, strategy, more) in cases {
        let mut rig = Rig::boot(&spec(kind, &format!(",churn:20000{more}"))).unwrap();
        for _ in 0..2 {
            let before = pool(&rig, "used_named");
            let more = ["--free-pages", "--bandwidth", "400Mbit", "--max-rounds", "6", "--hybrid-rounds", "2"];
            let moved = hop(&mut rig, &HopOptions { strategy: strategy.parse().unwrap(), ..options(&more) });
            assert!(free(&moved.report).pages > POOL_PAGES / 4, "{:#?}", moved.report);
            assert!(pool(&rig, "used_named") > before + 100, "nothing that was named was used at once");
            let used = pool(&rig, "freed");
            wait_for("all of it to have been checked", LIMIT, || {
                (pool(&rig, "freed") > used + 2 * POOL_PAGES).then_some(())
            })
            .unwrap();
            assert_whole(&rig);
        }
        assert!(rig.stop().unwrap().success());
    }
}

#[test]
fn what_a_guest_gives_up_before_it_moves_is_not_sent_and_it_has_it_again_there() {
    let mut rig = Rig::boot(&spec(DirtyLogKind::Bitmap, "")).unwrap();
    for strategy in ["pre-copy", "stop-and-copy", "post-copy"] {
        let more = ["--balloon-before", "112MiB"];
        let moved = hop(&mut rig, &HopOptions { strategy: strategy.parse().unwrap(), ..options(&more) });
        let squeeze = squeeze(&moved.report);
        assert_eq!((squeeze.before_bytes, squeeze.after_bytes, squeeze.reason.as_str()), (MEMORY, 112 << 20, ""));
        assert_eq!((squeeze.spared_pages, squeeze.spared_bytes), ((80 << 20) / 4096, 80 << 20));
        assert!(moved.report.wire_bytes < 48 << 20, "{:#?}", moved.report);
        await_all_given_back(&rig);
        assert_whole(&rig);
    }
    assert!(rig.stop().unwrap().success());
}

#[test]
fn while_pages_are_owed_a_guest_that_gives_up_and_reports_memory_loses_nothing() {
    let mut rig = Rig::boot(&spec(DirtyLogKind::Bitmap, ",churn:20000,report:1")).unwrap();
    let more = ["--balloon-before", "140MiB", "--bandwidth", "200Mbit", "--free-pages"];
    for strategy in ["post-copy", "hybrid", "post-copy"] {
        let reported = pool(&rig, "reported");
        let moved = hop(&mut rig, &HopOptions { strategy: strategy.parse().unwrap(), ..options(&more) });
        assert!(moved.report.post_copy.as_ref().unwrap().owed_pages > 0);
        assert!(pool(&rig, "reported") > reported);
        await_all_given_back(&rig);
        assert_eq!(balloon(&rig)["held"], false);
        assert_whole(&rig);
    }
    assert!(rig.stop().unwrap().success());
}

#[test]
fn a_balloon_gives_nothing_back_while_pages_are_owed() {
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let workload = "dunlin.wl0=ws:8M,rate:1000 dunlin.pool=size:48M,churn:2000,report:1";
    let _vm = source.boot_with("96MiB", workload, &["--balloon"]).unwrap();
    let balloon = |host: &TestHost| -> Value {
        let words = ["vm", "balloon", VM, "--json", "--run-dir"];
        serde_json::from_slice(&dunlin().args(words).arg(host.run_dir()).output().unwrap().stdout).unwrap()
    };
    let reports = |host: &TestHost| balloon(host)["reported_bytes"].as_u64().filter(|&bytes| bytes > 0);
    wait_for("reports", LIMIT, || reports(&source)).unwrap();
    let receiver = target.receive(&[]).unwrap();
    let mut manager = source.migrate(&receiver.address, &["--strategy", "demand-paging"]).unwrap();
    let owed = || target.info().filter(|info| info.state == RunState::Running && info.owed_pages > Some(0));
    wait_for("a VM that is owed pages", LIMIT, owed).unwrap();
    for _ in 0..5 {
        target.serial().await_beat().unwrap();
    }
    let found = balloon(&target);
    assert!(found["held"] == true && found["reported_bytes"] == 0 && owed().is_some(), "{found:#}");
    assert_eq!(source.finish_migration().unwrap(), 0);
    assert_eq!(manager.exit_code(LIMIT).unwrap(), Some(0), "{}", manager.output.text());
    wait_for("reports", LIMIT, || reports(&target)).unwrap();
    assert_eq!(balloon(&target)["held"], false);
}

#[test]
fn what_the_guest_does_not_give_up_in_time_is_sent() {
    let mut rig = Rig::boot(&spec(DirtyLogKind::Bitmap, "")).unwrap();
    // More than its pool has.
    let moved = hop(&mut rig, &options(&["--balloon-before", "32MiB", "--balloon-limit", "3s"]));
    let found = squeeze(&moved.report);
    assert!(found.reason.contains("3s") && found.spared_pages > POOL_PAGES / 2, "{found:?}");
    await_all_given_back(&rig);
    assert!(rig.stop().unwrap().success());
    // One that cannot be asked moves all the same.
    let mut rig = Rig::boot(&VmSpec { memory_bytes: 64 << 20, guest: String::new(), ..VmSpec::default() }).unwrap();
    let moved = rig.hop(&options(&["--free-pages", "--balloon-before", "32MiB"])).unwrap();
    let why = [&free(&moved.report).reason, &squeeze(&moved.report).reason];
    assert!(why.iter().all(|reason| reason.contains("--balloon")), "{why:?}");
    assert!(rig.stop().unwrap().success());
}

/// A slow migration with everything asked of the guest, that has come to its first round.
fn begun() -> (Rig, Receiver, OwnProcess) {
    let mut rig = Rig::boot(&spec(DirtyLogKind::Bitmap, ",churn:5000")).unwrap();
    let receiver = rig.receive().unwrap();
    let more = ["--balloon-before", "140MiB", "--free-pages", "--bandwidth", "20Mbit"];
    let manager = rig.start_migration(&receiver.address, &options(&more)).unwrap();
    let begun = || {
        let mut command = rig.dunlin_here(&["migrate", "wader", "--status", "--json"]);
        let output = rig.host(Side::A).netns.output(&mut command).unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        (status["round"].as_u64()? > 0 && status["sent_pages"].as_u64()? > 0).then_some(())
    };
    wait_for("the first round", LIMIT, begun).unwrap();
    assert!(pool(&rig, "given_pages") > 0 && pool(&rig, "rounds") > 0);
    (rig, receiver, manager)
}

#[test]
fn a_cancelled_migration_gives_everything_back() {
    let (mut rig, _receiver, mut manager) = begun();
    let output =
        rig.host(Side::A).netns.output(&mut rig.dunlin_here(&["migrate", "wader", "--cancel", "--json"])).unwrap();
    assert_eq!(output.status.code(), Some(exit::DONE.into()), "{output:?}");
    let (report, code) = rig.end_of_migration(&mut manager).unwrap();
    assert_eq!((report.ending, code), (Ending::Cancelled, Some(exit::CANCELLED.into())), "{report:#?}");
    await_all_given_back(&rig);
    assert_whole(&rig);
    // It can be asked again.
    let rounds = pool(&rig, "rounds");
    let moved = hop(&mut rig, &options(&["--free-pages"]));
    assert!(free(&moved.report).pages > POOL_PAGES / 4 && pool(&rig, "rounds") > rounds, "{:#?}", moved.report);
    assert!(rig.stop().unwrap().success());
}

#[test]
fn a_manager_that_dies_leaves_a_guest_that_has_everything_again() {
    let (mut rig, _receiver, mut manager) = begun();
    manager.signal(Signal::KILL).unwrap();
    assert!(manager.wait_for(LIMIT).unwrap().is_some());
    await_all_given_back(&rig);
    assert_whole(&rig);
    assert!(rig.stop().unwrap().success());
}

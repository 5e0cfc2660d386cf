//! A VM runs at its target before its memory is there, and nothing of it is lost: real KVM, real faults, real sockets. What the guest itself checks before each write is
//! that a page holds what it wrote there last.
#![cfg(target_arch = "x86_64")]

use std::time::Duration;

use dunlin::migrate::Strategy;
use dunlin::model::{DirtyLogKind, PostCopyReport};
use dunlin_tests::client::EchoClient;
use dunlin_tests::hosted::TestHost;
use dunlin_tests::rig::Side;
use dunlin_tests::wait::wait_for;
use dunlin_tests::{Hop, HopOptions, Rig, VmSpec, dunlin, guest};

const LIMIT: Duration = Duration::from_secs(30);

fn options(strategy: Strategy, more: &[&str]) -> HopOptions {
    HopOptions { strategy, more: more.iter().map(|&word| word.to_owned()).collect(), ..HopOptions::default() }
}

fn owed(hop: &Hop) -> &PostCopyReport {
    hop.report.post_copy.as_ref().unwrap()
}

/// Moves there and back under a client's eyes; returns both moves.
fn there_and_back(spec: &VmSpec, options: &HopOptions) -> [Hop; 2] {
    let mut rig = Rig::boot(spec).unwrap();
    let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), Duration::from_millis(2))).unwrap();
    echo.wait_answers(50, LIMIT).unwrap();
    let hops = [Side::B, Side::A].map(|side| {
        let hop = rig.hop(options).unwrap();
        println!("shows {}", serde_json::to_string(&hop.report).unwrap());
        assert_eq!((hop.exit_code, hop.source_exit_code, rig.at()), (Some(0), Some(0), side), "{hop:#?}");
        assert_eq!(hop.report.blackout.total_ns(), hop.report.blackout_ns, "the ledger adds up");
        let owed = owed(&hop);
        // Each page once, and none twice.
        assert_eq!(owed.sent_pages, owed.owed_pages, "{owed:?}");
        assert!(owed.asked_pages <= owed.requests, "{owed:?}");
        let counters = rig.counters().unwrap();
        assert_eq!(guest::errors(&counters), Vec::<String>::new(), "{counters:#}");
        rig.verify_inside().unwrap();
        hop
    });
    echo.wait_answers(100, LIMIT).unwrap();
    let echo = echo.finish(LIMIT);
    assert_eq!((&echo.fault, echo.answered), (&None, echo.sent));
    assert!(rig.stop().unwrap().success());
    hops
}

#[test]
fn post_copy_there_and_back_with_disk_and_two_vcpus() {
    for hop in there_and_back(&VmSpec::busy(2, DirtyLogKind::Ring), &options(Strategy::PostCopy, &[])) {
        let [ahead] = hop.report.rounds.as_slice() else { panic!("{:#?}", hop.report) };
        assert!(!ahead.paused && (1..=512).contains(&ahead.pages), "what lies around its hot pages: {ahead:?}");
        let owed = owed(&hop);
        let pages = hop.report.memory_bytes / 4096;
        assert!((1..pages).contains(&owed.owed_pages), "what it never touched is not owed: {owed:?} of {pages}");
        assert_eq!(owed.sent_pages, owed.owed_pages);
        assert!(owed.waits.count > 0 && owed.waits.p50_ns > 0, "a guest that runs touches memory: {owed:?}");
    }
}

#[test]
fn hybrid_there_and_back_owes_what_a_round_left() {
    for kind in [DirtyLogKind::Bitmap, DirtyLogKind::Ring] {
        for hop in there_and_back(&VmSpec::busy(1, kind), &options(Strategy::Hybrid, &[])) {
            let [round] = hop.report.rounds.as_slice() else { panic!("{:#?}", hop.report) };
            assert!(!round.paused && owed(&hop).owed_pages < hop.report.memory_bytes / 4096 / 2, "{:#?}", hop.report);
        }
    }
}

/// A writer that no pre-copy ends with: each page moves once, however fast it writes.
#[test]
fn a_vm_that_writes_without_end_moves_in_one_pass() {
    let spec = VmSpec {
        cpus: 2,
        dirty_log: DirtyLogKind::Bitmap,
        guest: "dunlin.wl0=ws:16M,rate:100 dunlin.wl1=ws:96M,rate:max".to_owned(),
        ..VmSpec::default()
    };
    for hop in there_and_back(&spec, &options(Strategy::PostCopy, &["--bandwidth", "1Gbit"])) {
        let owed = owed(&hop);
        let full = owed.sent_pages - owed.zero_pages;
        let ideal_ns = full * 4096 * 8;
        println!(
            "shows total {:.2} of ideal, {} waits, {owed:?}",
            hop.report.total_ns as f64 / ideal_ns as f64,
            owed.waits.count
        );
        assert!(full > 24_000 && hop.report.wire_bytes < full * 4096 * 11 / 10 + (8 << 20), "{:#?}", hop.report);
    }
}

/// The same writer under pre-copy, which is seen not to end and goes on as post-copy: the VM stands for the switch alone, though what is left takes a second.
#[test]
fn pre_copy_that_is_stuck_lets_the_rest_follow() {
    let spec = VmSpec {
        cpus: 2,
        dirty_log: DirtyLogKind::Bitmap,
        guest: "dunlin.wl0=ws:16M,rate:100 dunlin.wl1=ws:96M,rate:max,fill:random".to_owned(),
        ..VmSpec::default()
    };
    let stuck = ["--bandwidth", "800Mbit", "--on-stuck", "post-copy", "--streams", "1"];
    for hop in there_and_back(&spec, &options(Strategy::PreCopy, &stuck)) {
        let report = &hop.report;
        assert!(report.reason.contains("pre-copy gave up") && report.reason.contains("by post-copy"), "{report:#?}");
        assert_eq!((report.streams, report.rounds.iter().any(|round| round.paused)), (2, false), "one is for requests");
        // What is left takes a second to send.
        let left = owed(&hop).owed_pages;
        assert!(report.rounds.len() <= 3 && left > 20_000 && report.blackout_ns < 300_000_000, "{report:#?}");
    }
}

/// One that ends by itself never runs in two places.
#[test]
fn pre_copy_that_ends_owes_nothing() {
    let spec = VmSpec { guest: "dunlin.wl0=ws:16M,rate:1000".to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    let hop = rig.hop(&options(Strategy::PreCopy, &["--on-stuck", "post-copy"])).unwrap();
    assert_eq!((hop.exit_code, &hop.report.post_copy, hop.report.reason.as_str()), (Some(0), &None, ""));
    let mut refused =
        rig.dunlin_here(&["migrate", "wader", "--to", "tcp://127.0.0.1:9", "--on-stuck", "post-copy", "--verify"]);
    let output = refused.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(rig.stop().unwrap().success());
}

/// What it does not touch stays where it was until somebody asks for the end.
#[test]
fn demand_paging_brings_what_is_touched_and_the_rest_when_it_is_finished() {
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot_with("96MiB", "dunlin.wl=ws:16M,rate:2000", &[]).unwrap();
    let receiver = target.receive(&[]).unwrap();
    let mut migrate = source.migrate(&receiver.address, &["--strategy", "demand-paging"]).unwrap();
    let owed = |host: &TestHost| host.info().and_then(|info| info.owed_pages);
    wait_for("the VM to run there", LIMIT, || owed(&target)).unwrap();
    // It works there, with what it has.
    for _ in 0..3 {
        target.serial().await_beat().unwrap();
    }
    let still = owed(&target).unwrap();
    println!("shows {still} pages of 24576 are still owed");
    assert!(still > 1_000 && still < 12_288, "of 96 MiB it uses 16: {still}");
    assert_eq!(source.finish_migration().unwrap(), 0);
    assert_eq!(migrate.exit_code(LIMIT).unwrap(), Some(0), "{}", migrate.output.text());
    let report = migrate.report().unwrap();
    let moved = report.post_copy.as_ref().unwrap();
    println!("shows {} of {} pages were asked for, {:?}", moved.asked_pages, moved.owed_pages, moved.waits);
    assert_eq!((report.strategy.as_str(), moved.sent_pages), ("demand-paging", moved.owed_pages));
    assert!(
        moved.owed_pages > still
            && moved.asked_pages > 0
            && moved.waits.histogram.iter().map(|bucket| bucket.count).sum::<u64>() > 0
    );
    assert_eq!(owed(&target), None);
    target.serial().check_guest().unwrap();
}

/// Whoever moved it on would read zeros where pages are missing.
#[test]
fn a_vm_to_which_pages_are_owed_is_not_moved_on() {
    let spec =
        VmSpec { dirty_log: DirtyLogKind::Ring, guest: "dunlin.wl0=ws:128M,rate:100".to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    let receiver = rig.receive().unwrap();
    let slow = options(Strategy::PostCopy, &["--bandwidth", "200Mbit"]);
    let mut manager = rig.start_migration(&receiver.address, &slow).unwrap();
    let there = rig.run_dir(rig.at().other());
    let refused = wait_for("the VM to run there", LIMIT, || {
        let mut command = dunlin();
        command.args(["migrate", "wader", "--to", "tcp://127.0.0.1:9", "--run-dir"]).arg(&there);
        let output = command.output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        words.contains("still at its former host").then_some((output.status.code(), words))
    });
    println!("shows {refused:?}");
    assert_eq!(refused.unwrap().0, Some(3));
    let (report, code) = rig.end_of_migration(&mut manager).unwrap();
    let moved = report.post_copy.unwrap();
    assert_eq!((code, moved.sent_pages), (Some(0), moved.owed_pages));
    assert!(moved.owed_pages > 32_768, "its 128 MiB: {moved:?}");
}

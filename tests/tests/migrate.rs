//! A VM moves between two hosts, end to end: real KVM, real namespaces, the real binary; its memory, disk, interrupts and
//! connections are watched from inside by the guest and from outside by a client.
//!
//! Every wait is for an event, with a deadline that only a failure reaches. No figure of time is asserted that a busy
//! machine could miss, but for the bandwidth limit.
#![cfg(target_arch = "x86_64")]

use std::process::{Command, Stdio};
use std::time::Duration;

use dunlin::migrate::Strategy;
use dunlin::model::DirtyLogKind;
use dunlin_tests::client::{EchoClient, Pinger};
use dunlin_tests::rig::Side;
use dunlin_tests::stats::Spread;
use dunlin_tests::{Hop, HopOptions, OwnProcess, Rig, VmSpec, guest};

const LIMIT: Duration = Duration::from_secs(30);
const ECHO_INTERVAL: Duration = Duration::from_millis(2);
const PING_INTERVAL: Duration = Duration::from_millis(5);

fn start_clients(rig: &Rig) -> (EchoClient, Pinger) {
    let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), ECHO_INTERVAL)).unwrap();
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), PING_INTERVAL)).unwrap();
    echo.wait_answers(50, LIMIT).unwrap();
    (echo, pinger)
}

/// What every move must keep.
fn check_hop(hop: &Hop, options: &HopOptions) {
    assert_eq!(hop.exit_code, Some(0));
    assert_eq!(hop.source_exit_code, Some(0), "a machine that moved away ends with 0");
    assert!(hop.relearned_at_monotonic_ns.is_some(), "the switch did not relearn: {hop:#?}");
    assert!(hop.announced_before_running(), "announcements came late: {:?} {:?}", hop.target_steps, hop.frames);
    let report = &hop.report;
    assert_eq!(report.blackout.total_ns(), report.blackout_ns, "the ledger adds up");
    assert_eq!(report.rounds.iter().filter(|round| round.paused).count(), 1);
    if options.verify {
        assert_eq!(report.verified_pages, report.memory_bytes / 4096);
        assert_eq!(hop.verified_pages, report.verified_pages);
    }
}

/// The guest's own counters show no error, and its work goes on.
fn check_guest(rig: &Rig) {
    let before = rig.counters().unwrap();
    assert_eq!(guest::errors(&before), Vec::<String>::new(), "{before:#}");
    rig.verify_inside().unwrap();
    let after = rig.counters().unwrap();
    assert_eq!(guest::errors(&after), Vec::<String>::new(), "{after:#}");
    assert!(guest::sum(&after, "pages_written") > guest::sum(&before, "pages_written"));
    assert!(guest::sum(&after, "ticks") > guest::sum(&before, "ticks"));
}

/// It begins at the least that is allowed, follows what the guest dirties, and what is left goes at the most while the VM stands.
#[test]
fn an_adaptive_limit_follows_what_is_dirtied() {
    let guest = "dunlin.wl=ws:64M,rate:20000,pattern:random,fill:random".to_owned();
    let options =
        HopOptions { more: ["--bandwidth", "160Mbit..1600Mbit"].map(str::to_owned).to_vec(), ..HopOptions::default() };
    let hop = one_move(VmSpec { cpus: 1, guest, ..VmSpec::default() }, options);
    let limits: Vec<u64> = hop.report.rounds.iter().map(|round| round.limit_bytes_per_second.unwrap()).collect();
    println!("shows {limits:?}; {:?}", hop.report.link);
    assert!(limits.len() >= 3 && limits[0] == 20_000_000 && limits[1] > limits[0], "{:#?}", hop.report);
    assert_eq!(limits.last(), Some(&200_000_000));
    let first = &hop.report.rounds[0];
    assert!(first.wire_bytes * 1_000_000_000 / first.duration_ns <= 21_000_000, "{first:?}");
    // Next to nobody else sends between the two hosts.
    let link = hop.report.link.unwrap();
    assert!(!link.interface.is_empty() && link.other_bytes_per_second.unwrap() < 2_000_000, "{link:?}");
}

/// One move with everything watched, then the guest is ended.
fn one_move(spec: VmSpec, options: HopOptions) -> Hop {
    let mut rig = Rig::boot(&spec).unwrap();
    let (echo, pinger) = start_clients(&rig);
    let hop = rig.hop(&options).unwrap();
    assert_eq!(rig.at(), Side::B);
    check_hop(&hop, &options);
    echo.wait_answers(100, LIMIT).unwrap();
    check_guest(&rig);
    let blocks = rig.counters().unwrap()["block"]["blocks_written"].as_u64();
    assert_eq!(blocks.is_some_and(|blocks| blocks > 0), spec.disk_bytes.is_some());
    let echo = echo.finish(LIMIT);
    assert_eq!((&echo.fault, echo.answered), (&None, echo.sent));
    let ping = pinger.finish(Duration::from_secs(2));
    assert_eq!(ping.duplicates, 0, "{ping:?}");
    let beats = rig.heartbeats().unwrap().report();
    assert_eq!((beats.repeated, beats.tsc_went_back, beats.lost), (0, 0, 0), "{beats:?}");
    println!("{}", serde_json::to_string(&hop.report.blackout).unwrap());
    println!(
        "blackout {} ms, client's largest gap {} ms, {} of {} pings unanswered",
        hop.report.blackout_ns / 1_000_000,
        echo.largest_gap.length_ns / 1_000_000,
        ping.unanswered.len(),
        ping.sent
    );
    assert!(rig.stop().unwrap().success());
    hop
}

#[test]
fn pre_copy_with_the_bitmap_and_one_vcpu() {
    let hop = one_move(VmSpec::busy(1, DirtyLogKind::Bitmap), HopOptions::default());
    assert!(hop.report.rounds.len() > 1);
}

#[test]
fn pre_copy_with_the_bitmap_two_vcpus_and_verify() {
    one_move(VmSpec::busy(2, DirtyLogKind::Bitmap), HopOptions { verify: true, ..HopOptions::default() });
}

#[test]
fn pre_copy_with_the_ring_and_one_vcpu_and_verify() {
    one_move(VmSpec::busy(1, DirtyLogKind::Ring), HopOptions { verify: true, ..HopOptions::default() });
}

#[test]
fn pre_copy_with_the_ring_and_two_vcpus() {
    let hop = one_move(VmSpec::busy(2, DirtyLogKind::Ring), HopOptions::default());
    assert!(hop.report.rounds.len() > 1);
}

#[test]
fn stop_and_copy_with_the_bitmap_two_vcpus_and_verify() {
    let options = HopOptions { strategy: Strategy::StopAndCopy, verify: true, ..HopOptions::default() };
    let hop = one_move(VmSpec::busy(2, DirtyLogKind::Bitmap), options);
    assert_eq!(hop.report.rounds.len(), 1);
}

#[test]
fn stop_and_copy_with_the_ring_and_one_vcpu() {
    let options = HopOptions { strategy: Strategy::StopAndCopy, ..HopOptions::default() };
    one_move(VmSpec::busy(1, DirtyLogKind::Ring), options);
}

/// What the guest was booted from moves, too: it is no part of its memory.
#[test]
fn a_guest_that_resets_after_a_move_boots_again() {
    let mut rig = Rig::boot(&VmSpec::default()).unwrap();
    // Two moves: what was sent along is sent on.
    for _ in 0..2 {
        let hop = rig.hop(&HopOptions::default()).unwrap();
        assert!(hop.report.image_bytes > 64 << 10, "{hop:#?}");
    }
    let console = rig.console(2);
    rig.get("/reset").unwrap();
    let booted = dunlin_tests::interrupt::wait(LIMIT, || {
        Ok(std::fs::read_to_string(&console).unwrap_or_default().contains("\nREADY ").then_some(()))
    });
    booted.unwrap().expect("a guest that boots at the target");
    rig.verify_inside().unwrap();
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    assert!(rig.stop().unwrap().success());
}

/// `--bandwidth` holds within a tenth, as a whole over both streams.
#[test]
fn the_bandwidth_limit_is_honoured() {
    let spec = VmSpec { cpus: 1, guest: "dunlin.wl=ws:96M,rate:200,fill:random".to_owned(), ..VmSpec::default() };
    let options = HopOptions { more: vec!["--bandwidth".to_owned(), "400Mbit".to_owned()], ..HopOptions::default() };
    let hop = one_move(spec, options);
    let first = &hop.report.rounds[0];
    assert!(first.wire_bytes > 96 << 20, "{first:?}");
    let rate = first.wire_bytes as f64 / (first.duration_ns as f64 / 1e9);
    println!("{:.1} MB/s of 50", rate / 1e6);
    assert!((45e6..=55e6).contains(&rate), "{rate} bytes per second: {first:?}");
}

/// A big guest with a hole below 4 GiB, mostly empty: zero pages travel as marks.
#[test]
fn six_gibibytes_boot_and_move() {
    let spec = VmSpec {
        memory_bytes: 6 << 30,
        guest: "dunlin.wl=ws:32M,rate:2000 dunlin.heartbeat=10ms".to_owned(),
        ..VmSpec::default()
    };
    let hop = one_move(spec, HopOptions::default());
    let first = &hop.report.rounds[0];
    assert_eq!(hop.report.memory_bytes, 6 << 30);
    assert!(first.pages >= (6 << 30) / 4096 && first.zero_pages > first.pages * 9 / 10, "{first:?}");
    assert!(hop.report.wire_bytes < 512 << 20, "{} bytes for a mostly empty guest", hop.report.wire_bytes);
}

/// There and back again while 50 000 pages a second are written over 256 MiB: verified moves, then as many whose blackout
/// counts. `DUNLIN_MIGRATIONS` says how many of each.
#[test]
fn back_and_forth_under_write_load() {
    let count: u32 = std::env::var("DUNLIN_MIGRATIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(6);
    let spec = VmSpec {
        memory_bytes: 384 << 20,
        disk_bytes: Some(64 << 20),
        guest: "dunlin.wl=ws:128M,rate:25000 dunlin.spin=1 dunlin.blk=rate:100,span:16M dunlin.heartbeat=10ms"
            .to_owned(),
        ..VmSpec::default()
    };
    let mut rig = Rig::boot(&spec).unwrap();
    let (echo, pinger) = start_clients(&rig);
    for verify in [true, false] {
        let options = HopOptions { verify, ..HopOptions::default() };
        let mut blackouts_ns = Vec::new();
        for _ in 0..count {
            let hop = rig.hop(&options).unwrap();
            check_hop(&hop, &options);
            blackouts_ns.push(hop.report.blackout_ns);
            echo.wait_answers(20, LIMIT).unwrap();
        }
        println!("blackout {}: {}", if verify { "with --verify" } else { "without" }, Spread::of(blackouts_ns));
    }
    check_guest(&rig);
    let echo = echo.finish(LIMIT);
    assert_eq!((&echo.fault, echo.answered), (&None, echo.sent));
    assert_eq!(pinger.finish(Duration::from_secs(2)).duplicates, 0);
    let beats = rig.heartbeats().unwrap().report();
    assert_eq!((beats.repeated, beats.tsc_went_back, beats.lost), (0, 0, 0), "{beats:?}");
    assert!(rig.stop().unwrap().success());
}

/// The same ELF is a plain PVH kernel.
#[test]
fn the_guest_boots_under_qemu_too() {
    let folder = tempfile::tempdir().unwrap();
    let console = folder.path().join("console");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities", "-M", "microvm,acpi=off,rtc=off,x-option-roms=off"])
        .args(["-bios", "qboot.rom", "-m", "256", "-smp", "2", "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial", &format!("file:{}", console.display()), "-kernel"])
        .arg(guest::elf().unwrap())
        .args(["-append", "dunlin.cpus=2 dunlin.wl=ws:16M,rate:2000"])
        .stdin(Stdio::null());
    let child = command.spawn().expect("qemu-system-x86_64 is installed (`cargo xtask setup`)");
    let mut qemu = OwnProcess::new(child);
    let text = dunlin_tests::interrupt::wait(Duration::from_secs(120), || {
        assert!(qemu.wait_for(Duration::ZERO)?.is_none(), "QEMU ended");
        let text = std::fs::read_to_string(&console).unwrap_or_default();
        Ok(text.lines().rev().skip(1).any(|line| line.starts_with("STAT ")).then_some(text))
    });
    let text = text.unwrap().expect("a guest that is ready and counts");
    let last = text.lines().rev().find(|line| line.starts_with("STAT ")).unwrap();
    for name in guest::ERRORS {
        assert_eq!(guest::field(last, name).unwrap_or("0"), "0", "{last}");
    }
    assert!(text.contains("\nREADY ") && text.contains("\nHB "));
}

//! A stock Linux in a hosted VM: it boots, uses every device by its own drivers, and is moved. `cargo xtask test-vm` runs these.
//!
//! In software nothing is asserted of speed. The host's clock and the guest's are compared from the host's own bridge, so that the delay
//! on the links does not blur the comparison.
#![cfg(target_arch = "x86_64")]

use std::time::Duration;

use dunlin_tests::client::EchoClient;
use dunlin_tests::linux::{self, ClockOffset, LinuxGuest, ask, writers};
use dunlin_tests::rig::Side;
use dunlin_tests::stats::Spread;
use dunlin_tests::topology::{MIGRATION_LINK, UPLINK};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{HopOptions, OwnProcess, Rig, VmSpec, dunlin};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// What the issue asks of a moved guest's clock.
const CLOCK_LIMIT_NS: u64 = 10_000_000;
/// Questions to the guest's time service, of which the fastest counts.
const LOOKS: u32 = 30;
/// The file that the guest copies.
const FILE_BYTES: u64 = 64 << 20;

fn spec(linux: &LinuxGuest, cpus: u32) -> VmSpec {
    VmSpec {
        cpus,
        memory_bytes: 192 << 20,
        disk_bytes: Some(256 << 20),
        linux: Some(linux.clone()),
        guest: String::new(),
        ..VmSpec::default()
    }
}

fn state(rig: &Rig) -> Value {
    ask(&rig.host(rig.at()).netns, Rig::guest_ip(), "/state").unwrap()
}

/// What must be true of any Linux guest at any time.
fn check(state: &Value) {
    assert_eq!(state["complaints"], serde_json::json!([]), "the guest's kernel complains: {state:#}");
    for clock in ["monotonic_went_back", "tsc_went_back"] {
        assert_eq!(state["clock"][clock], 0, "{state:#}");
    }
    assert_eq!((writers(state, "page_mismatches"), &state["copy_errors"]), (0, &0.into()), "{state:#}");
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn stock_kernels_boot_with_one_and_two_cpus_and_restart_and_switch_off() {
    for linux in LinuxGuest::all().unwrap() {
        for cpus in [1, 2] {
            let spec = VmSpec { guest: "dunlin.copy=1M".into(), ..spec(&linux, cpus) };
            let mut rig = Rig::boot(&spec).unwrap();
            let first = state(&rig);
            check(&first);
            assert_eq!(first["identity"]["cpus"], cpus, "{first:#}");
            println!(
                "shows {} with {cpus} vCPUs: {} after {} ms, clocksource {}",
                linux.label, first["identity"]["kernel"], first["uptime_ms"], first["identity"]["clocksource"]
            );
            ask(&rig.host(Side::A).netns, Rig::guest_ip(), "/reboot").unwrap();
            rig.wait_ready_again().unwrap();
            check(&state(&rig));
            ask(&rig.host(Side::A).netns, Rig::guest_ip(), "/poweroff").unwrap();
            assert_eq!(rig.wait_machine_end().unwrap().code(), Some(0));
        }
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux, and netem: `cargo xtask test-vm` runs it"]
fn a_working_linux_is_moved_twenty_times_under_delay_and_loss_and_loses_nothing() {
    let linux = LinuxGuest::all().unwrap().remove(0);
    let guest = format!("dunlin.wl=ws:4M,rate:200 dunlin.wl=ws:2M,rate:50 dunlin.copy={FILE_BYTES},rate:1M");
    let spec = VmSpec { guest, ..spec(&linux, 2) };
    let mut rig = Rig::boot(&spec).unwrap();
    for side in [Side::A, Side::B] {
        for link in [MIGRATION_LINK, UPLINK] {
            // Half of it in each direction: the round trip takes 20 ms.
            let netem = format!("tc qdisc add dev {link} root netem delay 10ms loss 0.1%");
            rig.host(side).netns.run(&netem).unwrap();
        }
    }
    let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), Duration::from_millis(20))).unwrap();
    echo.wait_answers(20, LIMIT).unwrap();
    let before = state(&rig);
    check(&before);
    // A guest's clock begins as late as its timer does (half a second, in software), and NTP or the like sets it once; from then on
    // only moves could make it wrong.
    let booted = ClockOffset::measure(&rig.host(Side::A).netns, Rig::guest_ip(), LOOKS).unwrap();
    let corrected = ClockOffset::correct(&rig.host(Side::A).netns, Rig::guest_ip(), LOOKS).unwrap();
    println!("shows the guest's clock beside the host's: {booted} after its boot, set to {corrected}");
    // Several round trips are within any blackout here; several streams, since each lost frame halves only one.
    let options = HopOptions {
        more: ["--downtime", "500ms", "--streams", "4"].map(str::to_owned).to_vec(),
        ..HopOptions::default()
    };
    let moves = linux::moves();
    let (mut blackouts, mut totals, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    let look = |rig: &Rig| ClockOffset::measure(&rig.host(rig.at()).netns, Rig::guest_ip(), LOOKS).unwrap();
    for hop in 1..=moves {
        let was = look(&rig);
        let moved = rig.hop(&options).unwrap_or_else(|error| panic!("move {hop}: {error:#}"));
        assert!(moved.relearned_at_monotonic_ns.is_some(), "move {hop}: the switch did not relearn: {moved:#?}");
        // One frame of the announcement may be among the lost ones; not all of them.
        let announced = moved.says_announced_before_running() && moved.first_announcement_ns().is_some();
        assert!(announced, "move {hop}: {moved:#?}");
        // Asked by its network card, it also says so itself.
        let itself = || (rig.info().unwrap()["ports"][0]["guest_announcements"].as_u64() > Some(0)).then_some(());
        wait_for("the guest's own announcement", LIMIT, itself).unwrap();
        echo.wait_answers(5, LIMIT).unwrap();
        check(&state(&rig));
        let offset = look(&rig);
        // A guest of an emulated machine may set its clock late; what counts is what the move did to it.
        let changed_ns = (offset.ahead_ns - was.ahead_ns).unsigned_abs();
        let allowed_ns = CLOCK_LIMIT_NS + was.uncertain_ns + offset.uncertain_ns;
        assert!(changed_ns < allowed_ns, "move {hop}: {was} before, {offset} after");
        blackouts.push(moved.report.blackout_ns);
        totals.push(moved.report.total_ns);
        offsets.push(changed_ns);
    }
    let after = state(&rig);
    check(&after);
    assert!(writers(&after, "pages_written") > writers(&before, "pages_written"), "{after:#}");
    let copied = |state: &Value| state["copied_bytes"].as_u64().unwrap();
    assert!(copied(&after) > copied(&before), "{after:#}");
    let file = ask(&rig.host(rig.at()).netns, Rig::guest_ip(), "/verify").unwrap();
    assert_eq!((&file["ok"], &file["bytes"]), (&true.into(), &FILE_BYTES.into()));
    let report = echo.finish(LIMIT);
    assert_eq!((&report.fault, report.answered), (&None, report.sent));
    println!("shows {moves} moves: total {}, blackout {}", Spread::of(totals), Spread::of(blackouts));
    println!("shows what each move did to the guest's clock beside the host's: {}", Spread::of(offsets));
    println!(
        "shows {} lines of one TCP connection, {} MiB copied, {} copies compared, {} pages written and checked",
        report.answered,
        copied(&after) >> 20,
        after["copies"],
        writers(&after, "pages_written")
    );
    println!(
        "shows the guest's own largest gap: {} ms",
        after["clock"]["largest_gap_ns"].as_u64().unwrap() / 1_000_000
    );
    rig.stop().unwrap();
}

/// `dunlin vm balloon`, with further options.
fn balloon(rig: &Rig, more: &[&str]) -> Value {
    let mut command = rig.dunlin_here(&["vm", "balloon", "wader", "--json"]);
    let output = rig.host(rig.at()).netns.output(command.args(more)).unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{more:?}: {words}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(text.trim()).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn entropy_and_balloon_work_by_stock_drivers_and_move_along() {
    for linux in LinuxGuest::all().unwrap() {
        let more = ["--rng", "--balloon"].map(str::to_owned).to_vec();
        let mut rig = Rig::boot(&VmSpec { more, guest: "dunlin.wl=ws:4M,rate:100".into(), ..spec(&linux, 1) }).unwrap();
        let bytes = |value: &Value, name: &str| value[name].as_u64().unwrap_or_else(|| panic!("{name} in {value:#}"));
        for step in ["where it booted", "after a move"] {
            assert!(state(&rig)["rng"].as_str().unwrap().starts_with("virtio_rng"), "{step}: {:#}", state(&rig));
            let entropy = || ask(&rig.host(rig.at()).netns, Rig::guest_ip(), "/entropy").unwrap();
            assert_ne!(entropy(), entropy(), "{step}");

            let smaller = balloon(&rig, &["--size", "160MiB", "--timeout", "100s"]);
            assert_eq!(bytes(&smaller, "actual_bytes"), 160 << 20, "{step}: {smaller:#}");
            let free = state(&rig)["memory_kib"]["free"].as_u64().unwrap();
            let full = balloon(&rig, &["--size", "192MiB", "--timeout", "100s"]);
            assert!(bytes(&full, "inflated_bytes") >= 32 << 20, "{step}: {full:#}");
            let more_free = state(&rig)["memory_kib"]["free"].as_u64().unwrap();
            assert!(more_free > free + (16 << 10), "{step}: {free} KiB free, then {more_free}");

            if rig.at() == Side::A {
                // Linux reports blocks of 2 MiB and more, some seconds after they became free.
                ask(&rig.host(rig.at()).netns, Rig::guest_ip(), "/grab/32M").unwrap();
                let mut last = Value::Null;
                let reported = wait_for("pages that the guest reports as free", LIMIT, || {
                    last = balloon(&rig, &[]);
                    (bytes(&last, "reported_bytes") >= 32 << 20).then_some(())
                });
                assert!(reported.is_ok(), "{step}: {last:#}; {:#}", state(&rig));
            }
            let named = balloon(&rig, &["--ask-free"]);
            println!(
                "shows {} {step}: {} MiB reported as free, {} pages named when asked (all: {})",
                linux.label,
                bytes(&named, "reported_bytes") >> 20,
                named["hints"]["pages"],
                named["hints"]["complete"]
            );
            assert!(bytes(&named["hints"], "pages") > 1000, "{named:#}");
            check(&state(&rig));
            if rig.at() == Side::A {
                let verified = HopOptions { verify: true, ..HopOptions::default() };
                let moved = rig.hop(&verified).unwrap();
                assert_eq!(moved.verified_pages, (192 << 20) / 4096);
            }
        }
        rig.stop().unwrap();
    }
}

/// What the stock driver names as free is left out, what it gives up is not sent, and its guest has all of it again at the target.
#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn free_pages_by_the_stock_driver_are_not_sent() {
    for linux in LinuxGuest::all().unwrap() {
        let (more, guest) = (vec!["--balloon".to_owned()], "dunlin.wl=ws:4M,rate:100".to_owned());
        let (memory_bytes, mut named) = (320 << 20, 0);
        let mut rig = Rig::boot(&VmSpec { more, guest, memory_bytes, ..spec(&linux, 1) }).unwrap();
        for turn in 0..2 {
            // Used, and free again.
            ask(&rig.host(rig.at()).netns, Rig::guest_ip(), "/grab/128M").unwrap();
            let more = ["--free-pages", "--balloon-before", "304MiB", "--balloon-limit", "100s"];
            let more = more.map(str::to_owned).to_vec();
            let moved = rig.hop(&HopOptions { verify: true, more, ..HopOptions::default() }).unwrap();
            let free = moved.report.reducers.iter().find(|reducer| reducer.name == "free-pages").unwrap();
            let squeezed = moved.report.squeeze.as_ref().unwrap();
            let sent = moved.report.wire_bytes >> 20;
            println!("shows {}, move {turn}: {sent} MiB sent, {free:?}, {squeezed:?}", linux.label);
            // Whole blocks of 4 MiB (VIRTIO_BALLOON_HINT_BLOCK_ORDER), and of those only what was used and is named before it is sent: a few, in the second move now and then none.
            assert!(free.reason.is_empty() && free.pages.is_multiple_of(1024), "{free:?}");
            named += free.pages;
            assert_eq!((squeezed.after_bytes, squeezed.reason.as_str()), (304 << 20, ""), "{squeezed:?}");
            let given_back = || (balloon(&rig, &[])["actual_bytes"] == memory_bytes).then_some(());
            wait_for("what it gave up", LIMIT, given_back).unwrap();
            // Where it kept back what it had named it would not have so much.
            let left = state(&rig)["memory_kib"]["free"].as_u64().unwrap();
            let enough = || (state(&rig)["memory_kib"]["free"].as_u64() > Some(60 << 10)).then_some(());
            assert!(wait_for("what it named", LIMIT, enough).is_ok(), "{left} KiB free at once: {:#}", state(&rig));
            check(&state(&rig));
        }
        assert!(named >= 1024, "the driver named nothing that was used");
        rig.stop().unwrap();
    }
}

#[test]
#[ignore = "needs a distribution's kernel image: `cargo xtask test-vm` runs it"]
fn a_truncated_kernel_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    for linux in LinuxGuest::all().unwrap() {
        let image = std::fs::read(&linux.kernel).unwrap();
        // The end that the boot protocol promises (Documentation/arch/x86/boot.rst: setup_sects, syssize); a signature may follow.
        let setup_sectors = usize::from(image[0x1f1]);
        let paragraphs = u32::from_le_bytes(image[0x1f4..0x1f8].try_into().unwrap()) as usize;
        let end = (setup_sectors + 1) * 512 + paragraphs * 16;
        for length in [0, 100, 600, 4096, end / 2, end - 1] {
            let cut = folder.path().join("cut");
            std::fs::write(&cut, &image[..length]).unwrap();
            let said = folder.path().join("said");
            let mut command = dunlin();
            command.args(["vm", "run", "--name", "cut", "--memory", "192MiB", "--kernel"]).arg(&cut);
            command.arg("--initrd").arg(&linux.initrd);
            command.args(["--run-dir".as_ref(), folder.path().join("run").as_os_str()]);
            command.args(["--state-dir".as_ref(), folder.path().join("state").as_os_str()]);
            let child = command.stderr(std::fs::File::create(&said).unwrap()).spawn().unwrap();
            // One that boots after all would run for ever.
            let status = OwnProcess::new(child).wait_for(LIMIT).unwrap();
            let words = std::fs::read_to_string(&said).unwrap();
            assert_eq!(
                status.and_then(|status| status.code()),
                Some(1),
                "{} cut to {length} bytes: {words}",
                linux.label
            );
            assert!(words.contains("kernel"), "{words}");
        }
    }
}

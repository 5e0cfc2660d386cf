//! What `dunlin predict` says of real VMs beside what moving them then takes.
#![cfg(target_arch = "x86_64")]

use std::time::Duration;

use dunlin::migrate::Strategy;
use dunlin::model::{CostFrom, ForetoldFrom};
use dunlin_tests::moving::{MovingVm, Pair};
use dunlin_tests::{HopOptions, Rig, VmSpec, dunlin};
use serde_json::Value;

/// What the switch and the client's LAN leave of this is not measured: the limit is far below what they carry.
const BANDWIDTH: &str = "400Mbit";
const DOWNTIME: &str = "50ms";

fn predicted(rig: &Rig) -> Value {
    let words = ["predict", "wader", "--json", "--bandwidth", BANDWIDTH, "--downtime", DOWNTIME, "--rtt", "300us"];
    let output = rig.dunlin_here(&words).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn way<'a>(report: &'a Value, plan: &str) -> &'a Value {
    report["strategies"].as_array().unwrap().iter().find(|way| way["plan"] == plan).unwrap()
}

/// Predicts, moves, and says both; whether pre-copy alone gets there must be foretold, and how long it takes.
fn predict_and_move(guest: &str, plan: &str, more: &[&str]) -> (Value, dunlin_tests::Hop) {
    let spec = VmSpec { cpus: 1, guest: guest.to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    let report = predicted(&rig);
    assert_eq!((&report["schema"], &report["vmm"]), (&"dunlin.predict/v1".into(), &"dunlin".into()));
    let more = [&["--bandwidth", BANDWIDTH, "--downtime", DOWNTIME], more].concat();
    let options = HopOptions { more: more.iter().map(|&word| word.to_owned()).collect(), ..HopOptions::default() };
    let hop = rig.hop(&options).unwrap();
    let expected = &way(&report, plan)["expected"];
    let ms = |ns: f64| ns / 1e6;
    let (total, blackout) = (expected["total_ns"].as_f64().unwrap(), expected["blackout_ns"].as_f64().unwrap());
    let (did, stood) = (hop.report.total_ns as f64, hop.report.blackout_ns as f64);
    println!(
        "shows {guest}, {plan}: total {:.0} ms predicted, {:.0} ms taken; blackout {:.1} ms predicted, {:.1} ms taken; {} rounds predicted, {} made; \
         {:.1} MiB predicted, {:.1} MiB sent; chosen {}; {}",
        ms(total),
        ms(did),
        ms(blackout),
        ms(stood),
        expected["rounds"],
        hop.report.rounds.len() - 1,
        expected["wire_bytes"].as_f64().unwrap() / f64::from(1 << 20),
        hop.report.wire_bytes as f64 / f64::from(1 << 20),
        report["chosen"],
        hop.report.reason
    );
    assert_eq!(expected["converges"], hop.report.reason.is_empty(), "{report:#} {:#?}", hop.report);
    // A verdict that hangs on a page more or less may come a round earlier or later.
    let made = hop.report.rounds.len() as f64 - 1.0;
    let other_round = (expected["rounds"].as_f64().unwrap() - made).abs().min(1.0);
    let longest = hop.report.rounds.iter().map(|round| round.duration_ns).max().unwrap() as f64;
    assert!((total - did).abs() <= 0.25 * did + other_round * longest, "{report:#} {:#?}", hop.report);
    assert!(rig.stop().unwrap().success());
    (report, hop)
}

#[test]
fn a_paced_writer_is_foretold_to_converge_and_does() {
    let (report, hop) = predict_and_move("dunlin.wl=ws:16M,rate:2000,fill:random", "pre-copy", &[]);
    assert_eq!(report["chosen"]["plan"], "pre-copy", "{report:#}");
    assert_eq!(way(&report, "pre-copy")["meets_downtime"], true);
    assert!(hop.report.blackout_ns <= 50_000_000, "{:#?}", hop.report);
}

#[test]
fn an_unthrottled_writer_is_foretold_to_keep_the_vm_standing_and_that_is_known_after_two_rounds() {
    let (report, hop) = predict_and_move("dunlin.wl=ws:48M,rate:max,fill:random", "pre-copy", &[]);
    // The set is rewritten faster than it is sent: the VM stands for about as long as all of it takes, a second.
    assert!(hop.report.rounds.len() <= 4, "{:#?}", hop.report);
    assert_eq!(way(&report, "pre-copy")["meets_downtime"], false);
    let blackout = way(&report, "pre-copy")["expected"]["blackout_ns"].as_f64().unwrap();
    assert!((blackout / hop.report.blackout_ns as f64 - 1.0).abs() <= 0.25, "{report:#} {:#?}", hop.report);
    assert_eq!(report["chosen"]["plan"], "pre-copy-stun", "{report:#}");
}

#[test]
fn what_slowing_its_writers_takes_is_foretold() {
    let stun = ["--on-stuck", "stun"];
    predict_and_move("dunlin.wl=ws:48M,rate:max,fill:random", "pre-copy-stun", &stun);
}

/// Left to itself a migration takes what was foretold to fit, and says why; what it was is kept, and the next one knows the cost of a switch.
#[test]
fn auto_takes_what_fits_and_the_next_migration_knows_more() {
    let spec = VmSpec { cpus: 1, guest: "dunlin.wl=ws:48M,rate:max,fill:random".to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    let more = ["--bandwidth", BANDWIDTH, "--downtime", DOWNTIME].map(str::to_owned).to_vec();
    let state = rig.state_dir(rig.at());
    let hop = rig.hop(&HopOptions { auto: true, more, ..HopOptions::default() }).unwrap();
    let (chosen, told) = (hop.report.chosen.unwrap(), hop.report.prediction.unwrap());
    println!("shows {chosen:?} {told:?}");
    assert_eq!((hop.exit_code, chosen.plan.as_str(), told.plan.as_str()), (Some(0), "pre-copy-stun", "pre-copy-stun"));
    assert!(chosen.meets_downtime && chosen.reason.contains("allowed"), "{chosen:?}");
    assert_eq!((told.from, told.fixed_cost_from), (ForetoldFrom::Curve, CostFrom::Default));
    // How far off is the bench's affair: here that it is said.
    assert!(told.total_error_percent.is_some() && told.blackout_error_percent.is_some(), "{told:?}");
    // The source's log has it, and what is predicted next at that host rests on it.
    let history = |words: &[&str]| {
        let output = dunlin().args(words).arg("--state-dir").arg(&state).output().unwrap();
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let kept = history(&["predict", "--history", "--json"]);
    println!("shows {kept}");
    assert_eq!((&kept["errors"][0]["plan"], &kept["damaged_lines"]), (&"pre-copy-stun".into(), &0.into()));
    let cost = kept["migrations"][0]["fixed_cost_ns"].as_u64().unwrap();
    assert!((100_000..30_000_000).contains(&cost), "{kept:#}");
    let there = rig.run_dir(rig.at()).display().to_string();
    let words = ["predict", "wader", "--json", "--bandwidth", BANDWIDTH, "--downtime", DOWNTIME, "--run-dir", &there];
    let next = history(&words);
    assert_eq!((&next["fixed_cost_from"], &next["fixed_cost_ns"]), (&"other-peers".into(), &cost.into()), "{next:#}");
    assert!(rig.stop().unwrap().success());
}

/// More rounds before the VM moves, and a limit that begins low: both are foretold, by the command and by the migration itself.
#[test]
fn rounds_of_hybrid_and_a_limit_that_follows_are_foretold() {
    let guest = "dunlin.wl=ws:32M,rate:2000,pattern:random,fill:random".to_owned();
    let mut rig = Rig::boot(&VmSpec { cpus: 1, guest, ..VmSpec::default() }).unwrap();
    let asked = ["--bandwidth", "200Mbit..800Mbit", "--hybrid-rounds", "2", "--downtime", DOWNTIME];
    let output = rig.dunlin_here(&[&["predict", "wader", "--json"], &asked[..]].concat()).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["least_bytes_per_second"], &report["hybrid_rounds"]), (&25_000_000.into(), &2.into()));
    let hybrid = way(&report, "hybrid");
    let command = hybrid["commands"][0].as_str().unwrap();
    assert!(command.contains("--bandwidth 200Mbit..800Mbit ") && command.contains("--hybrid-rounds 2"), "{command}");
    for strategy in [Strategy::Hybrid, Strategy::PreCopy] {
        let mut more: Vec<String> = asked.iter().map(|&word| word.to_owned()).collect();
        more.push("--predict".to_owned());
        let hop = rig.hop(&HopOptions { strategy, more, ..HopOptions::default() }).unwrap();
        let told = hop.report.prediction.as_ref().unwrap();
        println!("shows {told:?} {} ms taken, {:?}", hop.report.total_ns / 1_000_000, hop.report.rounds);
        assert_eq!((hop.exit_code, told.from), (Some(0), ForetoldFrom::Curve));
        assert_eq!((&told.plan, told.bandwidth_bytes_per_second), (&strategy.to_string(), 100_000_000), "{told:?}");
        if strategy == Strategy::Hybrid {
            assert_eq!((told.rounds, hop.report.rounds.len()), (2, 2));
            assert!(told.wire_error_percent.unwrap().abs() < 25.0, "{told:?}");
        }
        // Nearly all goes at the least, 40 ns a byte; at the most it would take 10.
        assert!(told.total_ns.unwrap() > told.wire_bytes * 20, "{told:?}");
    }
    assert!(rig.stop().unwrap().success());
}

/// A VM that QEMU runs and moves itself.
fn predict_and_have_qemu_move(workload: &str) -> (Value, Option<Value>) {
    let mut vm = MovingVm::boot(&Pair { memory_mib: 128, workload, accelerator: "kvm" }).unwrap();
    let pid = format!("pid:{}", vm.source.pid());
    let state = vm.folder().join("state");
    let words = [
        "predict",
        &pid,
        "--json",
        "--bandwidth",
        "20MiB/s",
        "--link",
        "10Gbit",
        "--downtime",
        "300ms",
        "--rtt",
        "300us",
    ];
    let mut command = dunlin();
    command.args(words).args(["--allow-read-memory", "--allow-soft-dirty", "--state-dir"]).arg(state);
    let output = command.output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["vmm"], "qemu");
    vm.migrate(20 << 20, 300).unwrap();
    if way(&report, "qemu-pre-copy")["expected"]["converges"] == true {
        let info = vm.await_end(Duration::from_secs(60)).unwrap();
        return (report, Some(info));
    }
    // Round after round, and no end in sight.
    let info = vm.await_round(6, Duration::from_secs(60)).unwrap();
    println!("shows {workload}: QEMU is in its round 6 and has {} bytes left", info["ram"]["remaining"]);
    vm.source.order("migrate_cancel", serde_json::json!({})).unwrap();
    (report, None)
}

#[test]
fn what_qemu_takes_is_foretold() {
    let (report, info) = predict_and_have_qemu_move("dunlin.wl0=ws:32M,rate:1000,fill:random");
    let info = info.unwrap_or_else(|| panic!("{report:#}"));
    let expected = &way(&report, "qemu-pre-copy")["expected"];
    let total = expected["total_ns"].as_f64().unwrap() / 1e6;
    println!(
        "shows QEMU: total {total:.0} ms predicted, {} ms taken; blackout {:.1} ms predicted, {} ms taken; {} rounds predicted, {} made; {} bytes predicted, {} sent",
        info["total-time"],
        expected["blackout_ns"].as_f64().unwrap() / 1e6,
        info["downtime"],
        expected["rounds"],
        info["ram"]["dirty-sync-count"],
        expected["wire_bytes"],
        info["ram"]["transferred"]
    );
    assert!((total / info["total-time"].as_f64().unwrap() - 1.0).abs() <= 0.25, "{report:#} {info:#}");
    let command = report["strategies"][0]["commands"][0].as_str().unwrap();
    assert!(command.starts_with("virsh migrate --live --bandwidth 20 "), "{command}");
}

#[test]
fn that_qemu_does_not_end_is_foretold() {
    let (report, info) = predict_and_have_qemu_move("dunlin.wl0=ws:48M,rate:max,fill:random");
    assert_eq!(info, None, "{report:#}");
    let plan = &report["chosen"]["plan"];
    assert!(plan == "qemu-auto-converge" || plan == "qemu-post-copy", "{report:#}");
}

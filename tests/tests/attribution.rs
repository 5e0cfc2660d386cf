//! Who writes in a stock Linux, and how fast a VM writes that another VMM is migrating. `cargo xtask test-vm` runs these.
#![cfg(target_arch = "x86_64")]

use std::process::Command;
use std::time::Duration;

use dunlin_tests::foreign::ForeignVm;
use dunlin_tests::linux::{LinuxGuest, ask, writers};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{Rig, VmSpec, dunlin};
use serde_json::{Value, json};

/// Where Linux's own half of an address space begins.
const KERNEL_HALF: u64 = 1 << 63;

/// What user code of an address space writes, in different pages per second, by a report of `dunlin rogue`.
fn user_rate(report: &Value, address_space: &Value) -> f64 {
    let writers = report["ranking"]["writers"].as_array().unwrap().iter().map(|ranked| (ranked, &ranked["writer"]));
    let code = writers.filter(|(_, writer)| {
        writer["kind"] == "code"
            && writer["address_space"] == *address_space
            && writer["first"].as_u64().unwrap() < KERNEL_HALF
    });
    code.map(|(ranked, _)| ranked["pages_per_second"].as_f64().unwrap()).sum()
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn two_processes_of_a_linux_guest_are_named_with_what_each_writes() {
    let linux = LinuxGuest::all().unwrap().remove(0);
    let spec = VmSpec {
        cpus: 1,
        memory_bytes: 256 << 20,
        linux: Some(linux),
        guest: "dunlin.wl=ws:40M,rate:1000 dunlin.wl=ws:12M,rate:300".to_owned(),
        ..VmSpec::default()
    };
    let mut rig = Rig::boot(&spec).unwrap();
    let state = |rig: &Rig| ask(&rig.host(rig.at()).netns, Rig::guest_ip(), "/state").unwrap();
    // A page that a process touches for the first time is written first by the kernel, which clears it: wait until each has been round.
    wait_for("both writers to have been round once", Duration::from_secs(60), || {
        let state = state(&rig);
        let count = |writer: usize| state["writers"][writer]["pages_written"].as_u64().unwrap();
        (count(0) > 40 * 256 && count(1) > 12 * 256).then_some(())
    })
    .unwrap();
    let before = state(&rig);
    // One window of 8 s, in which no page is written twice, and a downtime that leaves as long for memory: the rates are over that window.
    let terms = ["--bandwidth", "1Gbit", "--downtime", "8006ms", "--switch-cost", "5ms", "--rtt", "1ms"];
    let output = rig
        .dunlin_here(&["rogue", "wader", "--json", "--window", "8s", "--looks", "1", "--protect-one-in", "1"])
        .args(terms)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let after = state(&rig);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ranked = report["ranking"]["writers"].as_array().unwrap();
    let seconds = seconds_between(&before, &after);
    let told = after["writers"].as_array().unwrap().iter().zip(before["writers"].as_array().unwrap());
    for (after, before) in told {
        let count = |state: &Value| state["pages_written"].as_u64().unwrap();
        let rate = (count(after) - count(before)) as f64 / seconds;
        let space =
            ranked.iter().map(|ranked| &ranked["writer"]).find(|writer| writer["process"]["pid"] == after["pid"]);
        let space = space.unwrap_or_else(|| panic!("process {} was not found: {report:#}", after["pid"]));
        let seen = user_rate(&report, &space["address_space"]);
        let name = space["process"]["name"].as_str().unwrap();
        println!(
            "shows `{name}` (pid {}): {seen:.1} pages/s by its address space, {rate:.1} by its own count",
            after["pid"]
        );
        assert!(name.starts_with("writer"), "{report:#}");
        // The guest's count is over somewhat longer than the window. A writer catches up a pause of up to 200 ms, which may lie just before
        // the window, and none that is longer: each is 2.5 % of a window.
        assert!((seen - rate).abs() <= 0.05 * rate, "{seen} pages/s seen of `{name}`, {rate} told: {report:#}");
    }
    rig.stop().unwrap();
}

/// One report of a command on a foreign VM.
fn reports(words: &[&str], pid: u32) -> Vec<Value> {
    let mut command: Command = dunlin();
    let output = command.args(words).arg(format!("pid:{pid}")).arg("--json").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The time between two states of a guest, by its own clock.
fn seconds_between(first: &Value, last: &Value) -> f64 {
    let at = |state: &Value| state["monotonic_ns"].as_u64().unwrap();
    (at(last) - at(first)) as f64 / 1e9
}

/// Pages a second that a guest's writers say they wrote between two of its states.
fn written_per_second(first: &Value, last: &Value) -> f64 {
    (writers(last, "pages_written") - writers(first, "pages_written")) as f64 / seconds_between(first, last)
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn a_vm_that_qemu_is_migrating_is_measured_while_qemu_itself_refuses_to() {
    let linux = &LinuxGuest::all().unwrap()[0];
    let mut vm = ForeignVm::boot(linux, "dunlin.wl=ws:16M,rate:1000").unwrap();
    // So much less than what the guest writes that the migration does not end while this host's one CPU has other work. A page shows once
    // in each round, in which all of them are sent.
    let (early, late) = (vm.next_state().unwrap(), vm.next_state().unwrap());
    let sent = 0.6 * written_per_second(&early, &late);
    // Its memory goes at about what it was told to write: at less the first round would take minutes.
    vm.order("migrate-set-parameters", json!({ "max-bandwidth": 4_150_000, "downtime-limit": 1 })).unwrap();
    vm.order("migrate", json!({ "uri": "exec:cat >/dev/null" })).unwrap();
    let round = |vm: &mut ForeignVm, number: u64| {
        wait_for("a round of the migration", Duration::from_secs(120), || {
            let info = vm.order("query-migrate", json!({})).unwrap();
            assert!(["setup", "active"].map(Some).contains(&info["status"].as_str()), "{info}");
            (info["ram"]["dirty-sync-count"].as_u64() >= Some(number)).then_some(())
        })
        .unwrap();
    };
    round(&mut vm, 2);
    vm.order("migrate-set-parameters", json!({ "max-bandwidth": (sent * 4096.0) as u64 })).unwrap();
    round(&mut vm, 4);
    let qemu = vm.order("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-bitmap" }));
    println!(
        "shows QEMU, asked for its dirty rate meanwhile: {}",
        qemu.map_or_else(|e| format!("{e:#}"), |v| v.to_string())
    );
    let first = vm.next_state().unwrap();
    let logged = reports(&["dirty-rate", "--interval", "2s", "--count", "4"], vm.pid());
    let last = vm.next_state().unwrap();
    assert_eq!(vm.order("query-migrate", json!({})).unwrap()["status"], "active", "the migration ended meanwhile");
    let sampled = reports(&["wws", "--regime", "sampled", "--allow-read-memory"], vm.pid());
    vm.order("migrate_cancel", json!({})).unwrap();
    let written = written_per_second(&first, &last);
    let later = &logged[1..];
    let sum = |field: &str| later.iter().map(|report| report[field].as_f64().unwrap()).sum::<f64>();
    let seen = sum("unique_pages") / (sum("interval_ns") / 1e9);
    let point = sampled[0]["curve"]["points"].as_array().unwrap().last().unwrap();
    let number = |name: &str| point[name].as_f64().unwrap() / (point["interval_ns"].as_f64().unwrap() / 1e9);
    println!(
        "shows {written:.0} pages/s by the guest's count, {seen:.0} seen under QEMU's log, {:.0} sampled ({:.0} to {:.0})",
        number("unique_pages"),
        number("low_pages"),
        number("high_pages")
    );
    assert!(later.iter().all(|report| report["regime"] == "logged"), "{later:#?}");
    // The guest's kernel writes too, some tens of pages a second.
    let least = 0.8 * written.min(sent);
    assert!(seen >= least && seen <= 1.1 * written + 100.0, "{seen} seen, {written} written, {sent} sent");
}

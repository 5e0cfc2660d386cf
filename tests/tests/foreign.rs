//! VMs that are not ours, with Linux in them: what is seen of them from outside, beside what the guest and its VMM say themselves.
//! `cargo xtask test-vm` runs these. Of the ways that later parts build on (soft-dirty, control groups) they show that the kernel has them.
#![cfg(target_arch = "x86_64")]

use std::fs;
use std::io::{BufRead, Read, Seek, SeekFrom};
use std::process::Stdio;
use std::time::{Duration, Instant};

use dunlin_tests::dunlin;
use dunlin_tests::foreign::ForeignVm;
use dunlin_tests::linux::{LinuxGuest, writers};
use serde_json::{Value, json};

/// Two processes of the guest that write, each over more memory than it writes in a test: every page is a new one.
const WRITERS: &str = "dunlin.wl=ws:48M,rate:1000 dunlin.wl=ws:24M,rate:300";

fn boot() -> ForeignVm {
    ForeignVm::boot(&LinuxGuest::all().unwrap()[0], WRITERS).unwrap()
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn the_rate_seen_while_qemu_logs_is_the_rate_at_which_the_guest_writes() {
    let mut vm = boot();
    // QEMU's own measurement switches its dirty log on for that long; dunlin only looks (it never fetches a foreign log).
    vm.order("calc-dirty-rate", json!({ "calc-time": 20, "mode": "dirty-bitmap" })).unwrap();
    let mut child = dunlin()
        .args(["dirty-rate", &format!("pid:{}", vm.pid()), "--json", "--interval", "3s", "--count", "4"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut reports: Vec<Value> = Vec::new();
    let (mut first, mut last) = (Value::Null, Value::Null);
    for line in lines {
        reports.push(serde_json::from_str(&line.unwrap()).unwrap());
        // The guest's own count over the same three intervals, from the report that opens them to the one that closes them.
        match reports.len() {
            1 => first = vm.next_state().unwrap(),
            4 => last = vm.next_state().unwrap(),
            _ => {}
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let seconds = (last["monotonic_ns"].as_u64().unwrap() - first["monotonic_ns"].as_u64().unwrap()) as f64 / 1e9;
    let written = (writers(&last, "pages_written") - writers(&first, "pages_written")) as f64 / seconds;
    let sum = |field: &str| reports[1..].iter().map(|report| report[field].as_f64().unwrap()).sum::<f64>();
    let seen = sum("unique_pages") / (sum("interval_ns") / 1e9);
    println!("shows {written:.0} pages/s written by the guest's count, {seen:.0} different pages/s seen by dunlin");
    assert_eq!(sum_lost(&reports), 0, "{reports:#?}");
    // The guest's kernel writes too (its own data, page tables): a little more is seen than the processes write.
    assert!(seen >= written * 0.9 && seen <= written * 1.35, "{seen} pages/s seen, {written} written: {reports:#?}");
    // Each exit from guest code is counted: every page was a fault.
    let exits: f64 = reports[1..]
        .iter()
        .flat_map(|report| report["threads"].as_array().unwrap())
        .map(|thread| thread["guest_exits_per_second"].as_f64().unwrap())
        .sum();
    assert!(exits / 3.0 >= seen * 0.9, "{exits}");
    assert_eq!(last["complaints"], json!([]), "{last:#}");
}

fn sum_lost(reports: &[Value]) -> u64 {
    reports.iter().map(|report| report["lost_events"]["total"].as_u64().unwrap()).sum()
}

/// Bit 55 of an entry of `/proc/PID/pagemap` (Documentation/admin-guide/mm/soft-dirty.rst).
fn soft_dirty_pages(pid: u32, range: std::ops::Range<u64>) -> u64 {
    let mut file = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    file.seek(SeekFrom::Start(range.start / 4096 * 8)).unwrap();
    let mut entries = vec![0; ((range.end - range.start) / 4096 * 8) as usize];
    file.read_exact(&mut entries).unwrap();
    entries.chunks_exact(8).filter(|entry| u64::from_le_bytes((*entry).try_into().unwrap()) >> 55 & 1 == 1).count()
        as u64
}

#[test]
#[ignore = "needs a KVM that runs Linux, and soft-dirty: `cargo xtask test-vm` runs it"]
fn soft_dirty_shows_what_a_foreign_guest_writes_with_no_help_from_its_vmm() {
    let vm = boot();
    fs::write(format!("/proc/{}/clear_refs", vm.pid()), "4").unwrap();
    let first = vm.next_state().unwrap();
    let (start, began) = (soft_dirty_pages(vm.pid(), vm.ram().unwrap()), Instant::now());
    let mut last = first.clone();
    while began.elapsed() < Duration::from_secs(4) {
        last = vm.next_state().unwrap();
    }
    let seen = soft_dirty_pages(vm.pid(), vm.ram().unwrap()) - start;
    let written = writers(&last, "pages_written") - writers(&first, "pages_written");
    println!(
        "shows {written} pages written by the guest's count, {seen} pages soft-dirty (at the granularity of QEMU's mappings)"
    );
    assert!(written > 1000 && seen as f64 >= written as f64 * 0.9, "{seen} seen, {written} written");
}

/// Nanoseconds that a thread has run.
fn ran_ns(thread: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{thread}/schedstat")).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs a KVM that runs Linux, and the CPU controller of cgroup v2: `cargo xtask test-vm` runs it"]
fn one_vcpu_thread_of_a_foreign_vm_can_be_held_back_by_a_threaded_control_group() {
    // A writer that wants a whole CPU.
    let mut vm = ForeignVm::boot(&LinuxGuest::all().unwrap()[0], "dunlin.wl=ws:8M,rate:1000000").unwrap();
    let thread = vm.vcpu_threads().unwrap()[0];
    // Beside the group that QEMU stands in, which the bed made for this test. Threads of a process are spread below a domain that has no
    // process of its own besides.
    let own = fs::read_to_string(format!("/proc/{}/cgroup", vm.pid())).unwrap();
    let root = std::path::Path::new("/sys/fs/cgroup").join(own.trim().trim_start_matches("0::/"));
    let vm_group = root.with_file_name(format!("dunlin-foreign-{}", vm.pid()));
    fs::create_dir(&vm_group).unwrap();
    let slow = vm_group.join("vcpu0");
    let held = (|| -> std::io::Result<(u64, u64)> {
        fs::write(vm_group.join("cgroup.procs"), vm.pid().to_string())?;
        fs::create_dir(&slow)?;
        fs::write(slow.join("cgroup.type"), "threaded")?;
        fs::write(vm_group.join("cgroup.subtree_control"), "+cpu")?;
        fs::write(slow.join("cpu.max"), "1000 10000")?;
        let of = |before: u64, began: Instant| (ran_ns(thread) - before) * 100 / began.elapsed().as_nanos() as u64;
        let (before, began) = (ran_ns(thread), Instant::now());
        let _ = vm.next_state();
        let _ = vm.next_state();
        let free = of(before, began);
        fs::write(slow.join("cgroup.threads"), thread.to_string())?;
        let (before, began) = (ran_ns(thread), Instant::now());
        let _ = vm.next_state();
        let held = of(before, began);
        fs::write(vm_group.join("cgroup.threads"), thread.to_string())?;
        Ok((free, held))
    })();
    drop(vm);
    let _ = fs::remove_dir(&slow);
    let gone = dunlin_tests::wait::wait_for("the end of the group", Duration::from_secs(10), || {
        fs::remove_dir(&vm_group).ok()
    });
    let (free, held) = held.unwrap();
    gone.unwrap();
    println!("shows the vCPU's thread ran {free} % of the time, and {held} % under cpu.max 10 %");
    assert!(held <= 15 && free > 2 * held, "{free} % free, {held} % held");
}

//! Writes that no event of KVM shows: from samples of a VM's memory, and from the kernel's soft-dirty marks, beside the guest's own count.
#![cfg(target_arch = "x86_64")]

use std::time::Duration;

use dunlin::foreign::{ProcessMemory, guess_ram};
use dunlin::port::GuestMemory;
use dunlin::service::clock::MonotonicClock;
use dunlin::track::{SampledCurve, Sampler, SamplingOptions, WindowEstimate};
use dunlin_tests::bare::{Accelerator, BareVm, Ram, has_huge_pages};
use dunlin_tests::dunlin;
use dunlin_tests::guest;
use dunlin_tests::hosted::{TestHost, VM};
use dunlin_tests::serial::SerialLog;
use dunlin_tests::wait::wait_for;

/// Goes through 64 MiB in 3.3 s: in windows that are shorter each page that is written is another one.
const WORKLOAD: &str = "dunlin.wl0=ws:64M,rate:5000,pattern:seq";
/// Pages that the guest writes besides: stacks, counters, page tables.
const OTHER_PAGES: f64 = 24.0;
/// For how long a guest may stand still on a busy host, and then catch up: what it writes in one window is that much off its mean.
const HELD_OFF_S: f64 = 0.05;
/// Measurements before one must agree: a busy host may hold the guest off for longer.
const TRIES: u32 = 3;

fn open(pid: u32) -> ProcessMemory {
    ProcessMemory::of_pid(pid, &guess_ram(pid).unwrap().slots).unwrap()
}

fn sample(pid: u32, options: SamplingOptions) -> SampledCurve {
    Sampler::new(open(pid), MonotonicClock, options).unwrap().measure().unwrap()
}

/// The estimate, its interval, and what the guest says, for the log.
fn show(label: &str, estimate: &WindowEstimate, truth: f64) {
    println!(
        "shows {label}: in {:.1} ms {} pages ({} to {}; {} of {} changed in {} windows), {truth:.0} by the guest's count",
        estimate.effective_interval_ns as f64 / 1e6,
        estimate.unique_pages,
        estimate.unique_pages_low,
        estimate.unique_pages_high,
        estimate.changed_pages,
        estimate.sampled_pages,
        estimate.windows,
    );
}

/// Whether what is written at a rate of `least` to `most` pages a second, in windows as long as they truly were, lies within twice the
/// estimate's interval: within the interval itself it does in 19 of 20 cases, and a test must not fail in one of them.
fn agrees(estimate: &WindowEstimate, least: f64, most: f64) -> bool {
    let held_off_s = HELD_OFF_S / estimate.windows as f64;
    let least = least * (estimate.shortest_interval_ns as f64 / 1e9 - held_off_s);
    let most = most * (estimate.longest_interval_ns as f64 / 1e9 + held_off_s) + OTHER_PAGES;
    let middle = estimate.unique_pages as f64;
    let low = middle - 2.0 * (middle - estimate.unique_pages_low as f64);
    let high = middle + 2.0 * (estimate.unique_pages_high as f64 - middle);
    low <= most && least <= high
}

/// The last `STAT` line: uptime in nanoseconds and pages written.
fn stat(serial: &SerialLog) -> Option<(u64, u64)> {
    let lines = serial.lines();
    let line = lines.iter().rev().find(|line| line.starts_with("STAT "))?;
    let number = |key| guest::field(line, key)?.parse().ok();
    Some((number("uptime_ns")?, number("pages_written")?))
}

fn next_stat(serial: &SerialLog) -> (u64, u64) {
    let now = stat(serial);
    wait_for("the guest's next STAT line", Duration::from_secs(20), || stat(serial).filter(|next| Some(*next) != now))
        .unwrap()
}

/// Samples a VM with the test guest, and compares each window with the rate at which the guest says that it wrote meanwhile.
fn compare(label: &str, pid: u32, serial: &SerialLog) -> SampledCurve {
    let mut seed = 0;
    loop {
        seed += 1;
        let before = next_stat(serial);
        let curve = sample(pid, SamplingOptions { cpu_share: 0.1, seed: seed.into(), ..SamplingOptions::default() });
        let after = next_stat(serial);
        let rate = (after.1 - before.1) as f64 * 1e9 / (after.0 - before.0) as f64;
        for estimate in &curve.windows {
            show(label, estimate, rate * estimate.effective_interval_ns as f64 / 1e9);
        }
        if curve.windows.iter().all(|estimate| agrees(estimate, rate, rate)) {
            return curve;
        }
        assert!(seed < TRIES, "{label}: {rate} pages/s written, {curve:#?}");
    }
}

#[test]
fn a_hosted_vms_memory_file_shows_the_rate_at_which_it_is_written() {
    let host = TestHost::new().unwrap();
    let vm = host.boot_with("128MiB", WORKLOAD, &[]).unwrap();
    let pid = vm.process.id();
    let curve = compare("hosted", pid, &host.serial());
    assert_eq!(curve.population_pages, 128 << 8);
    assert!(curve.unreadable_ranges.is_empty() && curve.windows.iter().all(|window| window.unreadable_pages == 0));
    // It was asked to take a tenth of a core.
    assert!(curve.read_ns as f64 <= 0.12 * curve.elapsed_ns as f64, "{curve:#?}");
    let memory = open(pid);
    drop(vm);
    let mut byte = [0];
    wait_for("the end of the VM", Duration::from_secs(10), || memory.read(memory.ranges()[0].start, &mut byte).err())
        .unwrap();
}

#[test]
fn memory_of_qemu_is_read_whatever_it_is_made_of() {
    let mut kinds = vec![Ram::Anonymous, Ram::MemoryFile, Ram::PrivateMemoryFile];
    if has_huge_pages() {
        kinds.push(Ram::HugePages);
    } else {
        println!("left out: RAM of huge pages, of which this host has not enough set aside");
    }
    for ram in kinds {
        let vm = BareVm::boot(Accelerator::Kvm, ram, WORKLOAD).unwrap();
        let before = resident(vm.pid());
        compare(&format!("QEMU on KVM, {ram:?}"), vm.pid(), &vm.serial());
        // The guest writes to all of its 64 MiB meanwhile; sampling reads the other half too, of which nothing may become memory.
        let grown = resident(vm.pid()).saturating_sub(before);
        assert!(grown < 66 << 20, "{ram:?}: {grown} bytes more are resident");
    }
}

#[test]
fn a_vm_without_kvm_is_sampled_all_the_same() {
    let vm = BareVm::boot(Accelerator::Tcg, Ram::Anonymous, WORKLOAD).unwrap();
    let guessed = guess_ram(vm.pid()).unwrap();
    assert_eq!((guessed.slots.len(), guessed.slots[0].start.0), (1, 0));
    assert_eq!(guessed.meaning, "addresses are offsets in the process's largest mapping");
    compare("QEMU under TCG", vm.pid(), &vm.serial());
}

/// Resident bytes of a process.
fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// What the development host's kernel lacks.
mod with_marks {
    use std::sync::atomic::Ordering;

    use dunlin::foreign::{KvmProcess, Permission, SoftDirty, SoftDirtyError};
    use dunlin::model::{Gpa, PAGE_SIZE, RamSlot};
    use dunlin::port::Arm;
    use dunlin::shm::{Mapping, memory_file};
    use dunlin_tests::foreign::ForeignVm;
    use dunlin_tests::linux::{LinuxGuest, writers};
    use rustix::fs::MemfdFlags;
    use serde_json::{Value, json};

    use super::*;

    const HUGE_PAGE: usize = 2 << 20;

    fn permission() -> Permission {
        Permission::granted("a test")
    }

    fn slot_of(ram: &Mapping, start: u64, first_page: usize, pages: usize) -> RamSlot {
        let host_address = ram.as_ptr() as u64 + (first_page * PAGE_SIZE) as u64;
        RamSlot { start: Gpa(start), bytes: (pages * PAGE_SIZE) as u64, host_address }
    }

    #[test]
    #[ignore = "needs soft-dirty marks, and the process to itself: `cargo xtask test-vm` runs it"]
    fn marks_are_those_of_the_pages_that_were_written() {
        const PAGES: usize = 1400;
        let file = memory_file("ram", (PAGES * PAGE_SIZE) as u64).unwrap();
        let ram = Mapping::of(file, PAGES * PAGE_SIZE).unwrap();
        // The last lies where no set of pages reaches.
        let slots = [(0x1000, 0, 300), (1 << 30, 300, 1099), (1 << 50, 1399, 1)];
        let slots = slots.map(|(start, first, pages)| slot_of(&ram, start, first, pages));
        let mut marks = SoftDirty::of_pid(std::process::id(), &slots, permission()).unwrap();
        let write = |page: usize| ram.bytes()[page * PAGE_SIZE].store(1, Ordering::Relaxed);
        (0..PAGES).for_each(write);
        assert_eq!(marks.granularity().unwrap().to_string(), "4 KiB");
        marks.arm().unwrap();
        for written in [vec![0, 7, 299, 300, 1398, 1399], vec![5], (300..1399).collect()] {
            for &page in &written {
                write(page);
            }
            let mut pages = marks.empty_pages();
            let found = marks.read(&mut pages).unwrap();
            let count =
                |range: std::ops::Range<usize>| written.iter().filter(|page| range.contains(page)).count() as u64;
            let counts: Vec<u64> = found.iter().map(|slot| slot.pages.0).collect();
            assert_eq!(counts, [count(0..300), count(300..1399), count(1399..1400)]);
            assert_eq!(found[2].out_of_range.0, count(1399..1400));
            assert_eq!(pages.contains(1), written.contains(&0));
            assert_eq!(pages.contains((1 << 18) + 1098), written.contains(&1398));
            assert_eq!(pages.count().0, count(0..1399));
            assert_eq!(found[1].whole_huge_blocks > 0, written.len() == 1099);
            marks.rearm().unwrap();
        }
        marks.disarm().unwrap();
    }

    #[test]
    #[ignore = "needs soft-dirty marks, and sets huge pages aside: `cargo xtask test-vm` runs it"]
    fn memory_of_hugetlbfs_is_refused_for_marks_and_read_without_filling_holes() {
        let setting = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
        let before = std::fs::read_to_string(setting).unwrap();
        std::fs::write(setting, "4").unwrap();
        let file = rustix::fs::memfd_create("ram", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
        rustix::fs::ftruncate(&file, 2 * HUGE_PAGE as u64).unwrap();
        let ram = Mapping::of(file.try_clone().unwrap(), 2 * HUGE_PAGE).unwrap();
        ram.bytes()[5].store(7, Ordering::Relaxed);
        let slots = [slot_of(&ram, 0, 0, 2 * HUGE_PAGE / PAGE_SIZE)];
        let refused = SoftDirty::of_pid(std::process::id(), &slots, permission()).unwrap_err();
        assert!(matches!(refused, SoftDirtyError::HugeTlb { page_bytes: 0x20_0000, .. }), "{refused}");
        let memory = ProcessMemory::of_pid(std::process::id(), &slots).unwrap();
        let blocks = rustix::fs::fstat(&file).unwrap().st_blocks;
        let mut all = vec![0xee; 2 * HUGE_PAGE];
        memory.read(Gpa(0), &mut all).unwrap();
        assert_eq!((all[5], all.iter().map(|&byte| u64::from(byte)).sum::<u64>()), (7, 7));
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_blocks, blocks);
        drop((ram, file));
        std::fs::write(setting, before).unwrap();
    }

    /// All that the guest may write, its kernel too, in parts of what its writer does.
    const KERNEL_TOO: f64 = 1.35;

    fn rate(first: &Value, last: &Value) -> f64 {
        let ns = last["monotonic_ns"].as_u64().unwrap() - first["monotonic_ns"].as_u64().unwrap();
        written(first, last) * 1e9 / ns as f64
    }

    fn written(first: &Value, last: &Value) -> f64 {
        (writers(last, "pages_written") - writers(first, "pages_written")) as f64
    }

    fn watch_linux(label: &str, more: &[&str]) -> dunlin::foreign::Granularity {
        let vm = ForeignVm::boot_with(&LinuxGuest::all().unwrap()[0], "dunlin.wl=ws:16M,rate:1000", more).unwrap();
        let process = KvmProcess::open(vm.pid()).unwrap();
        let slots = guess_ram(vm.pid()).unwrap().slots;

        let windows = [320, 1280].map(Duration::from_millis).to_vec();
        let memory = ProcessMemory::of(&process, &slots).unwrap();
        let options = SamplingOptions { windows, cpu_share: 0.2, ..SamplingOptions::default() };
        let mut sampler = Sampler::new(memory, MonotonicClock, options).unwrap();
        let first = vm.next_state().unwrap();
        let curve = sampler.measure().unwrap();
        let rate = rate(&first, &vm.next_state().unwrap());
        for estimate in &curve.windows {
            show(label, estimate, rate * estimate.effective_interval_ns as f64 / 1e9);
            assert!(agrees(estimate, rate, rate * KERNEL_TOO + 100.0), "{label}: {rate} pages/s written, {curve:#?}");
        }

        let marks = SoftDirty::of(&process, &slots, permission()).unwrap();
        let mut arm: Box<dyn Arm> = Box::new(marks.clone());
        let first = vm.next_state().unwrap();
        arm.arm().unwrap();
        vm.next_state().unwrap();
        let last = vm.next_state().unwrap();
        let mut pages = marks.empty_pages();
        let found = marks.read(&mut pages).unwrap();
        let seen: u64 = found.iter().map(|slot| slot.pages.0).sum();
        let (granularity, written) = (marks.granularity().unwrap(), written(&first, &last));
        println!(
            "shows {label}: {written} pages written by the guest's count, {seen} soft-dirty ({granularity}), {} whole blocks of 2 MiB",
            found[0].whole_huge_blocks
        );
        assert!(written > 1000.0 && seen as f64 >= written * 0.9, "{seen} seen, {written} written");
        assert_eq!(pages.count().0, seen);
        arm.rearm().unwrap();
        let mut again = marks.empty_pages();
        marks.read(&mut again).unwrap();
        println!("shows {label}: {} of {seen} marks right after they were cleared", again.count().0);
        // Where pages are huge, a few writes mark much of memory.
        if granularity.huge_mapped_bytes == 0 {
            assert!(seen as f64 <= written * KERNEL_TOO + 200.0, "{seen} seen, {written} written");
            assert!(again.count().0 < seen / 2, "{} of {seen} marks are left", again.count().0);
        }
        arm.disarm().unwrap();
        assert_eq!(vm.next_state().unwrap()["complaints"], json!([]));

        drop(vm);
        assert!(matches!(marks.read(&mut pages), Err(SoftDirtyError::Gone(_))));
        assert!(arm.disarm().is_err() && arm.arm().is_err());
        granularity
    }

    #[test]
    #[ignore = "needs a KVM that runs Linux, and soft-dirty marks: `cargo xtask test-vm` runs it"]
    fn a_linux_guests_writes_are_seen_by_samples_and_by_marks() {
        let backend = "memory-backend-memfd,id=ram,size=192M,share=on";
        let shared = ["-machine", "memory-backend=ram", "-object", backend];
        let granularity = watch_linux("QEMU with a memory file", &shared);
        assert_eq!((granularity.largest_bytes, granularity.huge_mapped_bytes), (4096, 0));
    }

    #[test]
    #[ignore = "needs a KVM that runs Linux, and soft-dirty marks: `cargo xtask test-vm` runs it"]
    fn huge_pages_make_marks_coarse_and_that_is_said() {
        let granularity = watch_linux("QEMU with anonymous memory", &[]);
        println!("shows granularity of anonymous memory: {granularity}");
        assert_eq!(granularity.largest_bytes, HUGE_PAGE as u64, "QEMU asks for huge pages");
    }
}

/// One object of a command on a hosted VM; its exit code and what it said besides.
fn told(host: &TestHost, words: &[&str]) -> (Option<i32>, serde_json::Value, String) {
    let mut command = dunlin();
    command.args(words).arg("--run-dir").arg(host.run_dir()).arg("--state-dir").arg(host.state_dir()).arg("--json");
    let output = command.output().unwrap();
    let object = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), object, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn samples_show_where_a_vm_writes_as_write_protection_does() {
    // All of it within each window, and the rest of memory not at all.
    const WHOLE: u64 = 500;
    let host = TestHost::new().unwrap();
    let _vm = host.boot_with("256MiB", "dunlin.wl0=ws:32M,rate:20000,pattern:seq", &[]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let drawing = folder.path().join("heat.svg");
    let (code, armed, said) = told(&host, &["heat", VM, "--regime", "armed"]);
    assert_eq!(code, Some(0), "{said}");
    let plot = drawing.display().to_string();
    let (code, sampled, said) = told(&host, &["heat", VM, "--regime", "sampled", "--plot", &plot]);
    assert_eq!(code, Some(0), "{said}");
    assert!(std::fs::read_to_string(&drawing).unwrap().contains("sampled ("));
    let number = |value: &serde_json::Value, name: &str| value[name].as_u64().unwrap();
    let heat = &sampled["sampled"]["heat"];
    let regions = heat["regions"].as_array().unwrap();
    println!(
        "shows {} regions of {} bytes, {} pages sampled",
        regions.len(),
        heat["region_bytes"],
        regions.iter().map(|region| number(region, "sampled_pages")).sum::<u64>()
    );
    // 2 MiB where the host had the time to read enough pages, else a multiple.
    let region_bytes = number(heat, "region_bytes");
    assert!(region_bytes.is_multiple_of(2 << 20) && region_bytes <= 16 << 20, "{heat:#}");
    let parts = armed["heat"].as_array().unwrap();
    let wholly = parts.iter().filter(|part| number(part, "unique_pages") >= WHOLE).count();
    let mut outside = Vec::new();
    for region in regions {
        let start = number(&region["range"], "start");
        let within = start..start + region_bytes;
        let parts = parts.iter().filter(|part| within.contains(&number(&part["range"], "start")));
        let truth: u64 = parts.map(|part| number(part, "unique_pages")).sum();
        // Two windows that are not the same: the guest's own few pages differ.
        let (low, high) = (number(region, "unique_pages_low"), number(region, "unique_pages_high"));
        if truth + 8 < low || truth > high + 8 {
            outside.push((start, truth, low, high));
        }
    }
    println!("shows {wholly} regions that are written wholly; outside of the interval: {outside:?}");
    assert!(wholly >= 14, "{armed:#}");
    assert!(outside.len() * 10 <= regions.len(), "{outside:?}");
    // Regions are ranked, and nobody is named.
    let rogue = ["rogue", VM, "--regime", "sampled", "--looks", "1", "--bandwidth", "1Mbit"];
    let (code, report, said) = told(&host, &rogue);
    assert_eq!(code, Some(3), "{said}");
    let ranked = report["ranking"]["writers"].as_array().unwrap();
    let kinds: std::collections::BTreeSet<_> =
        ranked.iter().map(|ranked| ranked["writer"]["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["region", "vm"].into(), "{report:#}");
    assert_eq!(report["rogues"], serde_json::json!([]));
    // Who writes cannot be had so: refused, and at once.
    let began = std::time::Instant::now();
    let (code, object, said) = told(&host, &["wws", VM, "--names", "--regime", "sampled"]);
    assert!(code == Some(3) && object.is_null() && said.contains("not by which vCPU"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(2), "nothing was measured: {:?}", began.elapsed());
}

#[test]
fn an_unthrottled_vm_is_measured_by_a_part_of_its_pages_and_a_slow_one_by_all() {
    const WRITTEN: f64 = 16384.0;
    let host = TestHost::new().unwrap();
    let _vm = host.boot_with("256MiB", "dunlin.wl0=ws:64M,rate:max,pattern:random", &[]).unwrap();
    let armed = |more: &[&str]| {
        let (code, profile, said) =
            told(&host, &[&["wws", VM, "--regime", "armed", "--window", "640ms"], more].concat());
        assert_eq!(code, Some(0), "{said}");
        let last = profile["curve"]["points"].as_array().unwrap().last().unwrap().clone();
        let [low, high] = ["low_pages", "high_pages"].map(|edge| last[edge].as_f64().unwrap());
        println!(
            "shows one page of {} protected: {} pages ({low:.0} to {high:.0}), at most {} ns of the guest's time",
            profile["protected_one_in"], last["unique_pages"], profile["guest_time_lost_ns"]
        );
        (profile, low, high)
    };
    // All of its working set is written in a window, many times over.
    let (part, low, high) = armed(&[]);
    assert!(part["protected_one_in"].as_u64().unwrap() > 1, "{part:#}");
    assert!(part["exact_unique_pages"].is_null(), "what a part says is not exact");
    assert!(low <= WRITTEN + OTHER_PAGES && WRITTEN <= high, "{low} to {high}");
    assert!(part["rest_ns"].as_u64().unwrap() > 1_000_000_000, "{part:#}");
    let (all, ..) = armed(&["--protect-one-in", "1"]);
    let exact = all["exact_unique_pages"].as_f64().unwrap();
    // A host with other work may not let it write all of them in this window.
    assert!((0.9 * WRITTEN..=WRITTEN + 4.0 * OTHER_PAGES).contains(&exact), "{exact}");

    let host = TestHost::new().unwrap();
    let _vm = host.boot_with("64MiB", "dunlin.wl0=ws:16M,rate:500,pattern:seq", &[]).unwrap();
    let (code, slow, said) = told(&host, &["wws", VM, "--regime", "armed", "--window", "640ms"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(slow["protected_one_in"], 1, "{slow:#}");
    assert!(slow["exact_unique_pages"].as_f64().unwrap() >= 250.0, "{slow:#}");
    let (code, _, said) = told(&host, &["wws", VM, "--protect-one-in", "3"]);
    assert!(code == Some(2) && said.contains("power of two"), "{said}");
}

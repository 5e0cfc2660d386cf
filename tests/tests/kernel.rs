//! What only a distribution's kernel with a KVM of real hardware page tables shows: `cargo xtask test-vm` runs it there.
//!
//! The kernel's own tracing (tracefs, histogram triggers) counts the same events as our programs, in the same window: the window is
//! between two moments at which the VM, a thread of this very process, stands.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use dunlin::model::{DirtyLogKind, PageCount};
use dunlin::port::{EventSample, EventSource, ThreadEvents};
use dunlin::probe::{Attach, Gives, KernelCounters, LoadOptions, ProbeOptions, Probes, Tiers};
use dunlin::trial::tiny_vm::{FIRST_FRAME, TinyVm};

const TRACEFS: &str = "/sys/kernel/tracing";
const FRAMES: PageCount = PageCount(4096);

fn thread() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get() as u32
}

/// Counts events of this thread by the kernel's own tracing, in an instance of its own.
struct Histograms {
    instance: PathBuf,
    events: Vec<&'static str>,
}

impl Histograms {
    fn start(events: &[&'static str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("dunlin-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let instance = PathBuf::from(TRACEFS).join("instances").join(name);
        fs::create_dir(&instance).unwrap_or_else(|e| panic!("{}: {e}", instance.display()));
        let histograms = Self { instance, events: events.to_vec() };
        for event in events {
            // Field 2 of each event is the thread that was running.
            let trigger = format!("hist:keys=common_pid if common_pid == {}", thread());
            fs::write(histograms.file(event, "trigger"), trigger).unwrap_or_else(|e| panic!("{event}: {e}"));
        }
        histograms
    }

    fn file(&self, event: &str, name: &str) -> PathBuf {
        self.instance.join("events").join(event).join(name)
    }

    /// The events of this thread so far.
    fn count(&self, event: &str) -> u64 {
        let text = fs::read_to_string(self.file(event, "hist")).unwrap();
        let counts = text.lines().filter_map(|line| line.split_once("hitcount:")?.1.trim().parse::<u64>().ok());
        counts.sum()
    }
}

impl Drop for Histograms {
    fn drop(&mut self) {
        for event in &self.events {
            let _ = fs::write(self.file(event, "trigger"), "!hist:keys=common_pid");
        }
        let _ = fs::remove_dir(&self.instance);
    }
}

fn attach() -> KernelCounters {
    KernelCounters::attach(ProbeOptions { pid: std::process::id(), frames: FRAMES, log: false }).unwrap()
}

fn look(counters: &mut KernelCounters) -> EventSample {
    counters.sample(&mut counters.empty_pages()).unwrap()
}

/// Each test counts a process, so it needs one to itself: nextest and the bed give it.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
#[ignore = "needs a KVM that emits kvm_exit, and tracefs with histograms: `cargo xtask test-vm` runs it"]
fn exits_counted_by_bpf_are_those_that_tracefs_counts() {
    let _alone = ALONE.lock();
    let mut vm = TinyVm::new(PageCount(512), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(512)).unwrap();
    let mut counters = attach();
    let exits = "kvm/kvm_exit";
    let userspace = "kvm/kvm_userspace_exit";
    let spte = ["kvmmmu/kvm_mmu_set_spte", "kvmmmu/fast_page_fault"];
    let histograms = Histograms::start(&[exits, userspace, spte[0], spte[1]]);
    let before = look(&mut counters);
    let started = [exits, userspace].map(|event| histograms.count(event));
    for _ in 0..40 {
        vm.set_logging(false).unwrap();
        vm.set_logging(true).unwrap();
        vm.write_pages(PageCount(500)).unwrap();
    }
    let after = look(&mut counters);
    let of = |sample: &EventSample| sample.threads.get(&thread()).cloned().unwrap_or_default();
    let (before, after) = (of(&before), of(&after));
    let sum = |events: &ThreadEvents| events.exits.values().map(|times| times.count).sum::<u64>();
    let ours = after.guest_exits - before.guest_exits;
    let kernels = histograms.count(exits) - started[0];
    let ours_userspace = sum(&after) - sum(&before);
    let kernels_userspace = histograms.count(userspace) - started[1];
    println!(
        "shows kvm_exit: {ours} by BPF, {kernels} by tracefs; kvm_userspace_exit: {ours_userspace} and {kernels_userspace}"
    );
    // 500 pages, 40 times, each a fault.
    assert!(kernels >= 20_000, "tracefs counted {kernels} exits");
    let percent = |ours: u64, kernels: u64| ours.abs_diff(kernels) * 100 <= kernels;
    assert!(percent(ours, kernels), "kvm_exit: BPF {ours}, tracefs {kernels}");
    assert!(
        percent(ours_userspace, kernels_userspace),
        "exits to user space: BPF {ours_userspace}, tracefs {kernels_userspace}"
    );
    let faults: u64 = spte.iter().map(|event| histograms.count(event)).sum();
    let pages = after.pages_made_writable - before.pages_made_writable;
    // Not every entry that is set turns writable, nor every fast fault: the kernel's counts are the upper bound.
    assert!(pages >= 20_000 && pages <= faults, "{pages} pages turned writable in {faults} events");
}

/// Counts what KVM logs while a VM writes 200 pages, with programs attached in some ways only: how, why not faster, and how many.
fn pages_logged(vm: &mut TinyVm, without: Vec<Attach>) -> (Option<Attach>, Option<String>, u64) {
    let pid = std::process::id();
    let wanted = vec![Gives::Pages, Gives::HardwareLog];
    let options =
        LoadOptions { only: Some(pid), capacity: FRAMES, wanted, attribute: false, single_writes: None, log: false };
    let probes = Probes::load_with(&options, Tiers { without, useless_too: true }).unwrap();
    let way = probes.ways().into_iter().find(|way| way.hook.gives == Gives::HardwareLog);
    let mut counters = KernelCounters::track(&Arc::new(Mutex::new(probes)), pid, FRAMES).unwrap();
    vm.set_logging(false).unwrap();
    vm.set_logging(true).unwrap();
    vm.write_pages(PageCount(200)).unwrap();
    let logged = look(&mut counters).threads.get(&thread()).map_or(0, |events| events.pages_logged);
    (way.as_ref().map(|way| way.attach), way.and_then(|way| way.slower_because), logged)
}

#[test]
#[ignore = "needs a kernel with function entries and kernel probes: `cargo xtask test-vm` runs it"]
fn a_functions_entry_and_a_kernel_probe_count_the_same_and_one_stands_in_for_the_other() {
    let _alone = ALONE.lock();
    let mut vm = TinyVm::new(PageCount(256), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(256)).unwrap();
    let entry = pages_logged(&mut vm, Vec::new());
    let probe = pages_logged(&mut vm, vec![Attach::FunctionEntry]);
    let neither = pages_logged(&mut vm, vec![Attach::FunctionEntry, Attach::KernelProbe]);
    println!("shows {} pages logged by function entry, {} by kernel probe", entry.2, probe.2);
    assert_eq!((entry.0, &entry.1), (Some(Attach::FunctionEntry), &None));
    assert_eq!(probe.0, Some(Attach::KernelProbe));
    assert!(probe.1.is_some_and(|why| why.contains("left out")), "nobody says why it is slower");
    assert_eq!((neither.0, neither.2), (None, 0));
    assert!(entry.2 >= 200 && entry.2 == probe.2, "{} and {}", entry.2, probe.2);
}

#[test]
#[ignore = "needs a kernel whose type information can be hidden: `cargo xtask test-vm` runs it"]
fn without_type_information_counting_goes_on_and_says_what_is_lost() {
    let _alone = ALONE.lock();
    // Only this process sees the empty folder: the bed gives each test a process, and a mount namespace is one's own.
    // SAFETY: the namespace of file systems of this thread alone; nothing else in this process depends on it.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS).unwrap() };
    let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    rustix::mount::mount("none", "/sys/kernel/btf", "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let mut vm = TinyVm::new(PageCount(128), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(128)).unwrap();
    let mut counters = attach();
    vm.set_logging(true).unwrap();
    vm.write_pages(PageCount(100)).unwrap();
    let mut pages = counters.empty_pages();
    let sample = counters.sample(&mut pages).unwrap();
    let events = sample.threads.get(&thread()).cloned().unwrap_or_default();
    let seen = (FIRST_FRAME..FIRST_FRAME + 100).filter(|&frame| pages.contains(frame)).count() as u64;
    println!("shows {seen} pages seen, {} faults whose frame could not be read", sample.lost.unreadable);
    assert!(seen + sample.lost.unreadable >= 100, "{events:?} {:?}", sample.lost);
}

#[test]
#[ignore = "needs a KVM that emits kvm_exit: `cargo xtask test-vm` runs it"]
fn exits_have_the_processors_reasons_and_times() {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn(move || {
        let mut vm = TinyVm::new(PageCount(200), DirtyLogKind::Bitmap).unwrap();
        let mut faults = 0u64;
        while stopped.try_recv().is_err() {
            vm.set_logging(false).unwrap();
            vm.set_logging(true).unwrap();
            vm.write_pages(PageCount(200)).unwrap();
            faults += 200;
        }
        faults
    });
    let output = dunlin_tests::dunlin()
        .args(["exits", &format!("pid:{}", std::process::id()), "--json", "--interval", "2s", "--count", "2"])
        .output()
        .unwrap();
    stop.send(()).unwrap();
    let faults = writer.join().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let last = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    let report: serde_json::Value = serde_json::from_str(&last).unwrap();
    assert_eq!(report["backend"], "svm", "{report:#}");
    let row = |to: &str, reason: &str| {
        let rows = report["exits"].as_array().unwrap().iter();
        rows.clone()
            .find(|row| row["to"] == to && row["reason"] == reason)
            .unwrap_or_else(|| panic!("{to} {reason}: {report:#}"))
            .clone()
    };
    let (fault, bell) = (row("kvm", "npf"), row("vmm", "mmio"));
    let number = |row: &serde_json::Value, name: &str| row[name].as_f64().unwrap();
    println!(
        "shows nested page faults: {} in 2 s, mean {:.1} µs, 99 % within {:.1} µs; bells: {}, mean {:.1} µs in the VMM",
        fault["count"],
        number(&fault, "mean_ns") / 1e3,
        number(&fault, "p99_ns") / 1e3,
        bell["count"],
        number(&bell, "mean_ns") / 1e3
    );
    // 200 faults for each bell, and the bell's own page; the last pass of the interval may be cut.
    let (count, bells) = (number(&fault, "count"), number(&bell, "count"));
    assert!(
        count >= 200.0 * (bells - 1.0) && count <= 205.0 * (bells + 1.0),
        "{count} faults, {bells} bells, {faults} in all"
    );
    for row in [&fault, &bell] {
        assert!(
            number(row, "p50_ns") <= number(row, "p99_ns") && number(row, "p99_ns") <= number(row, "longest_ns") * 2.0,
            "{row}"
        );
        assert!(number(row, "total_ns") > 0.0 && number(row, "time_share") < 1.01, "{row}");
    }
}

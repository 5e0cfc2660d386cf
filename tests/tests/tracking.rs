//! The BPF programs, loaded into the running kernel, against VMs whose writes are known to the page; and `dunlin
//! dirty-rate` and `dunlin doctor` as an operator runs them.
#![cfg(target_arch = "x86_64")]

use std::io::BufRead;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use dunlin::foreign::KvmProcess;
use dunlin::model::{AddressSpace, DirtyLogKind, Gpa, Gva, KvmDescriptors, PageBitmap, PageCount, PageRun};
use dunlin::port::{EventSample, EventSource};
use dunlin::probe::{Gives, KernelCounters, LoadOptions, ProbeOptions, Probes};
use dunlin::trial::tiny_vm::{self, FIRST_FRAME, TinyVm};
use dunlin_tests::client::gap::monotonic_ns;
use dunlin_tests::dunlin;
use serde_json::Value;

/// Frames that the programs are told to tell apart: more than any VM here has.
const FRAMES: PageCount = PageCount(4096);

/// The counters of this very process. Tests run side by side, so that each counts its own thread only.
fn attach(frames: PageCount) -> KernelCounters {
    KernelCounters::attach(ProbeOptions { pid: std::process::id(), frames, log: false }).unwrap_or_else(|error| {
        let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        panic!("{error}{source}")
    })
}

/// What one thread of this process did between two looks, and the pages that turned writable.
struct Watch {
    counters: KernelCounters,
    thread: u32,
    before: EventSample,
}

impl Watch {
    fn new(frames: PageCount) -> Self {
        Self::of(attach(frames))
    }

    fn of(counters: KernelCounters) -> Self {
        let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let mut watch = Self { counters, thread, before: EventSample::default() };
        watch.look();
        watch
    }

    fn look(&mut self) -> Seen {
        let mut pages = self.counters.empty_pages();
        let now = self.counters.sample(&mut pages).unwrap();
        let of = |sample: &EventSample| sample.threads.get(&self.thread).cloned().unwrap_or_default();
        let (before, after) = (of(&self.before), of(&now));
        // Where the hardware walks the guest's own tables, it writes to them too (see `TinyVm::fetch_log`).
        let own = (0..FIRST_FRAME).filter(|&frame| pages.contains(frame)).count() as u64;
        (0..FIRST_FRAME).for_each(|frame| pages.remove(frame));
        let seen = Seen {
            pages,
            events: after.pages_made_writable - before.pages_made_writable - own,
            pushes: after.dirty_ring_pushes - before.dirty_ring_pushes,
            mmio: after.exits.get("mmio").map_or(0, |t| t.count) - before.exits.get("mmio").map_or(0, |t| t.count),
            lost: now.lost.since(&self.before.lost).total(),
        };
        self.before = now;
        seen
    }
}

struct Seen {
    pages: PageBitmap,
    events: u64,
    pushes: u64,
    mmio: u64,
    lost: u64,
}

impl Seen {
    fn runs(&self) -> Vec<PageRun> {
        self.pages.runs(u32::MAX).collect()
    }
}

/// Each test here counts a whole process, so it needs one to itself: nextest gives it, `cargo test` does not.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn with_a_log_every_pass_shows_exactly_the_pages_that_it_wrote() {
    let _alone = alone();
    for kind in [DirtyLogKind::Bitmap, DirtyLogKind::Ring] {
        let mut vm = TinyVm::new(PageCount(300), kind).unwrap();
        vm.write_pages(PageCount(300)).unwrap();
        let mut watch = Watch::new(FRAMES);
        for pages in [100, 1, 300, 77] {
            // Off and on again: every page is write-protected anew.
            vm.set_logging(false).unwrap();
            vm.set_logging(true).unwrap();
            vm.write_pages(PageCount(pages)).unwrap();
            let seen = watch.look();
            assert_eq!(seen.runs(), [PageRun::new(FIRST_FRAME, pages as u32)], "{kind:?}");
            assert_eq!((seen.events, seen.lost, seen.mmio), (pages, 0, 1), "{kind:?}");
            assert_eq!(seen.pushes > 0, kind == DirtyLogKind::Ring);
            assert!(seen.pushes == 0 || seen.pushes >= pages);
            // A second pass over the same pages finds them writable: nothing is seen without protection.
            vm.write_pages(PageCount(pages)).unwrap();
            assert_eq!(watch.look().events, 0, "{kind:?}");
        }
    }
}

#[test]
fn fetching_the_bitmap_arms_again() {
    let _alone = alone();
    let mut vm = TinyVm::new(PageCount(128), DirtyLogKind::Bitmap).unwrap();
    vm.set_logging(true).unwrap();
    vm.write_pages(PageCount(128)).unwrap();
    let mut watch = Watch::new(FRAMES);
    for pages in [128, 5] {
        vm.fetch_log().unwrap();
        vm.write_pages(PageCount(pages)).unwrap();
        let seen = watch.look();
        assert_eq!(seen.pages.count(), PageCount(pages));
        // The kernel's own log says the same.
        let logged: u32 = vm.fetch_log().unwrap().iter().map(|word| word.count_ones()).sum();
        assert_eq!(u64::from(logged), pages);
        vm.write_pages(PageCount(pages)).unwrap();
        watch.look();
    }
}

#[test]
fn without_a_log_a_page_is_seen_once_and_never_again() {
    let _alone = alone();
    let mut watch = Watch::new(FRAMES);
    let mut vm = TinyVm::new(PageCount(300), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(300)).unwrap();
    let first = watch.look();
    // At least what was written: a page that only holds the running code may be mapped writable too.
    assert!(first.runs().contains(&PageRun::new(FIRST_FRAME, 300)), "{:?}", first.runs());
    for _ in 0..3 {
        vm.write_pages(PageCount(300)).unwrap();
        let again = watch.look();
        assert_eq!((again.events, again.pages.count(), again.mmio), (0, PageCount(0), 1));
    }
}

#[test]
fn pages_beyond_the_tracked_range_are_counted_as_lost() {
    let _alone = alone();
    let mut vm = TinyVm::new(PageCount(300), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(300)).unwrap();
    vm.set_logging(true).unwrap();
    let mut watch = Watch::new(PageCount(128));
    vm.write_pages(PageCount(300)).unwrap();
    let seen = watch.look();
    let inside = 128 - FIRST_FRAME;
    assert_eq!((seen.events, seen.pages.count().0, seen.lost), (300, inside, 300 - inside));
}

#[test]
fn another_process_is_not_counted() {
    let _alone = alone();
    let mut counters = KernelCounters::attach(ProbeOptions { pid: 1, frames: FRAMES, log: false }).unwrap();
    let mut vm = TinyVm::new(PageCount(64), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(64)).unwrap();
    let mut pages = counters.empty_pages();
    let sample = counters.sample(&mut pages).unwrap();
    assert!(sample.threads.is_empty() && pages.is_empty() && sample.lost.total() == 0);
}

/// A VM of this process that, told a number of pages, writes them with its log armed, and answers.
struct Writer {
    order: Sender<u64>,
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start() -> Self {
        let (order, orders) = channel::<u64>();
        let (answer, done) = channel();
        let thread = std::thread::spawn(move || {
            let mut vm = TinyVm::new(PageCount(512), DirtyLogKind::Bitmap).unwrap();
            vm.write_pages(PageCount(512)).unwrap();
            answer.send(()).unwrap();
            for pages in orders {
                vm.set_logging(false).unwrap();
                vm.set_logging(true).unwrap();
                vm.write_pages(PageCount(pages)).unwrap();
                answer.send(()).unwrap();
            }
        });
        done.recv().unwrap();
        Self { order, done, thread }
    }

    fn write(&self, pages: u64) {
        self.order.send(pages).unwrap();
        self.done.recv().unwrap();
    }

    fn stop(self) {
        drop(self.order);
        self.thread.join().unwrap();
    }
}

/// `dunlin dirty-rate` on this process, its reports as they come.
fn dirty_rate(arguments: &[&str]) -> (Child, impl Iterator<Item = Value> + use<>) {
    let mut child = dunlin()
        .args(["dirty-rate", &format!("pid:{}", std::process::id()), "--json"])
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()))
}

#[test]
fn the_command_shows_a_foreign_vms_pages_and_what_they_mean() {
    let _alone = alone();
    let writer = Writer::start();
    let (mut child, mut reports) = dirty_rate(&["--interval", "300ms", "--count", "8"]);
    // The first report says that it is attached; what is written from now on falls into later intervals.
    let first = reports.next().unwrap();
    assert_eq!(first["schema"], "dunlin.dirty-rate/v1");
    assert_eq!(first["vm"]["pid"], std::process::id());
    writer.write(200);
    let rest: Vec<Value> = reports.collect();
    let sum = |field: &str| rest.iter().map(|report| report[field].as_u64().unwrap()).sum::<u64>();
    // Where the hardware walks the guest's three page tables, it writes to them too.
    let unique = sum("unique_pages");
    assert!((200..=203).contains(&unique), "{rest:?}");
    let pages: f64 = rest
        .iter()
        .map(|report| report["pages_per_second"].as_f64().unwrap() * report["interval_ns"].as_f64().unwrap() / 1e9)
        .sum();
    assert!((pages - unique as f64).abs() < 0.01, "{pages}");
    // Someone else has its log on, as the kernel's structures tell.
    assert!(rest.iter().all(|report| report["regime"] == "logged" && report["is_lower_bound"] == false));
    assert!(rest.iter().all(|report| report["lost_events"]["total"] == 0));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    writer.stop();
}

#[test]
fn ctrl_c_ends_the_command_in_good_order() {
    let _alone = alone();
    let writer = Writer::start();
    let (mut child, mut reports) = dirty_rate(&["--interval", "50ms"]);
    reports.next().unwrap();
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    writer.stop();
}

#[test]
fn a_reader_that_goes_ends_the_command_too() {
    let _alone = alone();
    let writer = Writer::start();
    let (mut child, mut reports) = dirty_rate(&["--interval", "20ms"]);
    reports.next().unwrap();
    drop(reports);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    writer.stop();
}

/// A VM that `dunlin vm run` runs, with the test guest in it; gone on drop.
struct Hosted {
    child: dunlin_tests::OwnProcess,
    folder: tempfile::TempDir,
}

impl Hosted {
    fn start(kind: &str, cmdline: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/target/release/dunlin-guest");
        let serial = folder.path().join("serial");
        let child = dunlin()
            .args(["vm", "run", "--name", "tracked", "--kernel", kernel, "--memory", "128MiB", "--cpus", "1"])
            .args(["--dirty-log", kind, "--cmdline", cmdline, "--serial", &format!("file={}", serial.display())])
            .arg("--run-dir")
            .arg(folder.path().join("run"))
            .arg("--state-dir")
            .arg(folder.path().join("state"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let hosted = Self { child: dunlin_tests::OwnProcess::new(child), folder };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !std::fs::read_to_string(&serial).unwrap_or_default().contains("\nREADY ") {
            assert!(
                std::time::Instant::now() < deadline,
                "the guest did not come up; build it with `cargo xtask test`"
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        hosted
    }

    fn dirty_rate(&self, arguments: &[&str]) -> Vec<Value> {
        let output = dunlin()
            .args(["dirty-rate", "tracked", "--json", "--run-dir"])
            .arg(self.folder.path().join("run"))
            .args(arguments)
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0));
        output.stdout.lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    }
}

#[test]
fn a_hosted_vm_is_armed_and_let_go_again() {
    for kind in ["bitmap", "ring"] {
        // 512 pages, each written about ten times a second.
        let mut vm = Hosted::start(kind, "dunlin.cpus=1 dunlin.wl0=ws:2M,rate:5000");
        let armed = vm.dirty_rate(&["--arm", "--interval", "500ms", "--count", "3"]);
        for report in &armed[1..] {
            let unique = report["unique_pages"].as_u64().unwrap();
            assert!((512..512 + 128).contains(&unique), "{kind}: {report:#}");
            assert_eq!((&report["regime"], &report["is_lower_bound"]), (&"armed".into(), &false.into()));
            assert_eq!(report["threads"][0]["name"], "vcpu0");
            assert_eq!(report["lost_events"]["total"], 0);
        }
        // The first passive interval may still hold pages that were protected when the log went off.
        let passive = vm.dirty_rate(&["--interval", "300ms", "--count", "3"]);
        assert_eq!(passive[2]["unique_pages"], 0, "{kind}: the log is still on: {:#}", passive[2]);
        assert_eq!(
            (&passive[2]["regime"], &passive[2]["dirty_ring_pushes_per_second"]),
            (&"passive".into(), &0.0.into())
        );
        vm.child.signal(rustix::process::Signal::TERM).unwrap();
        assert!(vm.child.wait_for(std::time::Duration::from_secs(20)).unwrap().is_some());
    }
}

#[test]
fn a_recording_of_a_hosted_vm_replays_byte_for_byte() {
    let vm = Hosted::start("ring", "dunlin.cpus=1 dunlin.wl0=ws:8M,rate:5000,pattern:random");
    let file = vm.folder.path().join("recording.jsonl");
    let live = dunlin()
        .args(["record", "tracked", "--json", "--interval", "200ms", "--count", "4", "--arm", "--writes", "--run-dir"])
        .arg(vm.folder.path().join("run"))
        .arg(&file)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert_eq!(live.status.code(), Some(0));
    drop(vm.child);
    let writes = dunlin().args(["replay", "--json", "--writes"]).arg(&file).stderr(Stdio::inherit()).output().unwrap();
    let replay = dunlin().args(["replay", "--json"]).arg(&file).stderr(Stdio::inherit()).output().unwrap();
    assert_eq!(replay.status.code(), Some(0));
    let lines = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    assert_eq!(lines(&replay.stdout), lines(&live.stdout));
    let (mut told, mut reports) = (0, 0);
    for line in lines(&writes.stdout).lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        if line["schema"] == "dunlin.guest-write/v1" {
            told += 1;
            continue;
        }
        let kept = line["single_writes"].as_u64().unwrap();
        assert!(kept == std::mem::take(&mut told) && kept > 100, "{line:#}");
        let pages = line["pages_per_second"].as_f64().unwrap() * line["interval_ns"].as_f64().unwrap() / 1e9;
        // The counters are read first, and the guest writes on until the ring is.
        assert!((pages - kept as f64).abs() < 20.0 + 0.1 * pages, "{line:#}");
        reports += 1;
    }
    assert_eq!(reports, 4);
    let last: Value = serde_json::from_str(lines(&live.stdout).lines().last().unwrap()).unwrap();
    assert!(last["unique_pages"].as_u64().unwrap() > 100 && last["regime"] == "armed", "{last:#}");
    // A disk that was full, a machine that lost power: what is whole is shown, and what is not is said.
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 20]).unwrap();
    let cut = dunlin().args(["replay", "--json"]).arg(&file).output().unwrap();
    assert_eq!((cut.status.code(), lines(&cut.stdout).lines().count()), (Some(0), 3));
    assert!(lines(&cut.stderr).contains("ends within a line"), "{}", lines(&cut.stderr));
    let again = dunlin().args(["record", "pid:1"]).arg(&file).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
}

#[test]
fn what_is_no_vm_is_refused_with_a_way_on() {
    // Any process that we may look at; process 1 may be another's.
    let sleeper = dunlin_tests::OwnProcess::new(std::process::Command::new("sleep").arg("60").spawn().unwrap());
    let no_vm = format!("pid:{}", sleeper.id());
    for (vm, words) in [
        (no_vm.as_str(), "holds no VM"),
        ("pid:4194304", "no process"),
        ("nobody", "vm list"),
        ("uuid:00000000-0000-4000-8000-000000000000", "vm list"),
    ] {
        let run_dir = tempfile::tempdir().unwrap();
        let output = dunlin().args(["dirty-rate", vm, "--run-dir"]).arg(run_dir.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(words), "{vm}: {text}");
    }
    let output = dunlin().args(["dirty-rate", "pid:1", "--interval", "1us"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn doctor_finds_on_this_host_what_the_other_tests_use() {
    let folder = tempfile::tempdir().unwrap();
    let output = dunlin()
        .args(["doctor", "--json", "--run-dir"])
        .arg(folder.path())
        .arg("--state-dir")
        .arg(folder.path())
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema"], "dunlin.doctor/v1");
    let result = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name}"))["result"].clone()
    };
    for name in ["kvm", "kvm-guest", "memory-file", "run-dir", "netns", "tap", "raw-socket", "bpf-map", "bpf-programs"]
    {
        assert_eq!(result(name), "works", "{name}: {report:#}");
    }
    assert_eq!(output.status.success(), report["ready"] == true);
    let broken = dunlin().args(["doctor", "--state-dir", "/proc/none"]).output().unwrap();
    assert_eq!(broken.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&broken.stdout).contains("NOT READY"));
}

/// This process's KVM descriptors, as `/proc` shows them.
fn own_descriptors() -> KvmDescriptors {
    KvmProcess::open(std::process::id()).unwrap().descriptors
}

#[test]
fn writes_are_those_of_an_address_space_an_instruction_and_a_moment() {
    let _alone = alone();
    let mut vm = TinyVm::new(PageCount(300), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(300)).unwrap();
    let mut watch = Watch::new(FRAMES);
    // Before the vCPU is known, a write is counted and nobody's, unless the backend's exits have told.
    vm.set_logging(true).unwrap();
    vm.write_pages(PageCount(50)).unwrap();
    assert_eq!(watch.look().events, 50);
    let mut probes = watch.counters.probes();
    let vms = probes.inventory(&[own_descriptors()]).unwrap().remove(0).unwrap();
    probes.set_vcpus(&vms).unwrap();
    drop(probes);
    vm.set_logging(false).unwrap();
    vm.set_logging(true).unwrap();
    watch.counters.armed(true);
    let before = watch.before.threads[&watch.thread].clone();
    let unattributed = watch.before.lost.unattributed;
    vm.write_pages(PageCount(200)).unwrap();
    watch.look();
    watch.counters.armed(false);
    let new = watch.before.threads[&watch.thread].since(&before);
    assert_eq!(watch.before.lost.unattributed, unattributed);
    // With nested paging the walk of the guest's own tables is among them, which any instruction may cause.
    let own = new.pages_made_writable - 200;
    assert!(own <= 3, "{own}");
    let space = &new.spaces[&AddressSpace(tiny_vm::ROOT)];
    assert_eq!(space.pages_made_writable, 200 + own, "{new:?}");
    let at_write = new.code[&(AddressSpace(tiny_vm::ROOT), Gva(tiny_vm::WRITE))];
    assert!((200..=200 + own).contains(&at_write), "{new:?}");
    for bins in [&new.first_writes, &space.first_writes] {
        assert_eq!(u64::from(bins.iter().sum::<u32>()), 200 + own);
        // All in far less than the ten seconds that this may take on any host.
        let last = bins.iter().rposition(|&pages| pages > 0).unwrap() as u32;
        assert!(dunlin_ebpf::first_write_bin_start_ns(last) < 10_000_000_000);
    }
}

#[test]
fn each_write_is_told_by_itself_and_a_flood_is_counted() {
    let _alone = alone();
    let mut vm = TinyVm::new(PageCount(300), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(300)).unwrap();
    let pid = std::process::id();
    let watch = |bytes: u32| {
        let wanted = vec![Gives::Pages];
        let single_writes = Some(bytes);
        let options =
            LoadOptions { only: Some(pid), capacity: FRAMES, wanted, attribute: true, single_writes, log: false };
        let probes = Arc::new(Mutex::new(Probes::load(&options).unwrap()));
        let counters = KernelCounters::track(&probes, pid, FRAMES).unwrap();
        let mut locked = counters.probes();
        let vms = locked.inventory(&[own_descriptors()]).unwrap().remove(0).unwrap();
        locked.set_vcpus(&vms).unwrap();
        drop(locked);
        Watch::of(counters)
    };
    for (ring_bytes, room) in [(1 << 16, None), (1, Some(4096 / 56))] {
        let mut watch = watch(ring_bytes);
        vm.set_logging(true).unwrap();
        watch.counters.armed(true);
        let mut writes = Vec::new();
        watch.look();
        watch.counters.take_writes(&mut writes);
        writes.clear();
        let began = monotonic_ns();
        vm.write_pages(PageCount(200)).unwrap();
        let ended = monotonic_ns();
        let before = watch.before.clone();
        let seen = watch.look();
        watch.counters.take_writes(&mut writes);
        let before_of_thread = before.threads.get(&watch.thread).cloned().unwrap_or_default();
        let new = watch.before.threads[&watch.thread].since(&before_of_thread);
        let lost = watch.before.lost.since(&before.lost);
        // All are counted; each is told, or counted as not told.
        assert_eq!((seen.events, seen.lost), (200, 0));
        assert_eq!(writes.len() as u64 + lost.writes_full, new.pages_made_writable, "{lost:?}");
        assert_eq!(lost.writes_full > 0, room.is_some());
        assert!(room.is_none_or(|room| writes.len() <= room && writes.len() > room / 2), "{}", writes.len());
        assert!(writes.is_sorted_by_key(|write| write.at_ns));
        // The guest's own page tables are written too where the hardware walks them.
        writes.retain(|write| write.gfn.0 >= FIRST_FRAME);
        for (write, gfn) in writes.iter().zip(FIRST_FRAME..) {
            assert!((began..=ended).contains(&write.at_ns), "{write:?}");
            let of = (write.thread_id, write.gfn.0, write.pages, write.fresh);
            assert_eq!(of, (watch.thread, gfn, 1, 1), "{write:?}");
            assert_eq!(write.address_space, Some(AddressSpace(tiny_vm::ROOT)));
            assert_eq!(write.instruction, Some(Gva(tiny_vm::WRITE)));
        }
        // What was taken makes room again.
        writes.clear();
        vm.set_logging(false).unwrap();
        vm.set_logging(true).unwrap();
        vm.write_pages(PageCount(5)).unwrap();
        watch.counters.take_writes(&mut writes);
        writes.retain(|write| write.gfn.0 >= FIRST_FRAME);
        let again: Vec<_> = writes.iter().map(|write| (write.gfn.0, write.fresh)).collect();
        assert_eq!(again, [0, 1, 2, 3, 4].map(|page| (FIRST_FRAME + page, 1)));
        vm.set_logging(false).unwrap();
    }
}

#[test]
fn the_kernels_own_structures_show_a_vms_slots_and_vcpus() {
    let _alone = alone();
    let mut vm = TinyVm::new(PageCount(300), DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(PageCount(300)).unwrap();
    let descriptors = own_descriptors();
    let pid = descriptors.pid;
    let options = LoadOptions {
        only: Some(pid),
        capacity: FRAMES,
        wanted: Vec::new(),
        attribute: false,
        single_writes: None,
        log: false,
    };
    let mut probes = Probes::load(&options).unwrap();
    for log in [false, true] {
        vm.set_logging(log).unwrap();
        let vms = probes.inventory(std::slice::from_ref(&descriptors)).unwrap().remove(0).unwrap();
        let [found] = vms.as_slice() else { panic!("{vms:?}") };
        let [slot] = found.slots.as_slice() else { panic!("{found:?}") };
        assert_eq!(
            (slot.range.start, slot.range.bytes, slot.dirty_log, slot.read_only),
            (Gpa(0), (300 + FIRST_FRAME) * 4096, log, false)
        );
        let [(vcpu, address)] = found.vcpus.as_slice() else { panic!("{found:?}") };
        let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        assert_eq!((vcpu.index, vcpu.thread_id), (0, Some(thread)));
        assert_ne!(*address, 0);
    }
    // A process that is no more, and one whose descriptors are others.
    let gone = KvmDescriptors { pid: 4_194_303, ..descriptors.clone() };
    let wrong = KvmDescriptors { machines: vec![0, 1_000_000], ..descriptors };
    let answers = probes.inventory(&[gone, wrong]).unwrap();
    assert!(answers.iter().all(Result::is_err), "{answers:?}");
}

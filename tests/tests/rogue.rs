//! Rogues named in random trials: of two vCPUs, and of two address spaces on one vCPU, the one that writes more than the link carries;
//! nobody, where nobody does. `dunlin rogue` and its service as an operator has them, on real VMs.
#![cfg(target_arch = "x86_64")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dunlin::model::{AddressSpace, BytesPerSecond, DirtyLogKind, PageCount, Random, VmRef, Writer};
use dunlin::service::config::TrackConfig;
use dunlin::service::guest_names::GuestFiles;
use dunlin::service::interrupt::Interrupt;
use dunlin::service::profile::{Allowed, How, ProfileRequest};
use dunlin::service::rogues::{RogueReport, rogues};
use dunlin::track::{DEFAULT_MARGIN, Terms};
use dunlin::trial::tiny_vm::{OTHER_ROOT, ROOT, TinyVm};
use dunlin_tests::rig::{Rig, VmSpec};
use dunlin_tests::wait::wait_for;
use serde_json::Value;

/// Trials unless `DUNLIN_TRIALS` says how many.
const TRIALS: u64 = 24;
/// Of the trials, every fourth has no rogue.
const WITHOUT: u64 = 4;
/// Trials that may be judged wrongly.
const WRONG: u64 = 1;
/// What the link carries, in pages of 4 KiB per second.
const LINK_PAGES: u64 = 4000;

fn trials() -> u64 {
    std::env::var("DUNLIN_TRIALS").ok().and_then(|text| text.parse().ok()).unwrap_or(TRIALS)
}

/// What two writers do in a trial, and which of them is to be named.
#[derive(Debug)]
struct Trial {
    rates: [u64; 2],
    rogue: Option<usize>,
}

impl Trial {
    fn next(random: &mut Random, number: u64) -> Self {
        let mut between = |from: u64, to: u64| from + random.below(to - from);
        let mut rates = [between(100, 800), between(100, 800)];
        if number.is_multiple_of(WITHOUT) {
            return Self { rates, rogue: None };
        }
        let rogue = between(0, 2) as usize;
        rates[rogue] = between(3 * LINK_PAGES, 6 * LINK_PAGES);
        Self { rates, rogue: Some(rogue) }
    }
}

/// One after the other, where the runner does not see to it (see `.config/nextest.toml`).
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn judge(wrong: &[String]) {
    println!("shows {} of {} trials judged rightly {wrong:#?}", trials() - wrong.len() as u64, trials());
    assert!(wrong.len() as u64 <= WRONG, "{wrong:#?}");
}

#[test]
fn of_two_vcpus_the_one_that_writes_too_much_is_named() {
    let _alone = alone();
    let mut rig = Rig::boot(&VmSpec {
        memory_bytes: 128 << 20,
        cpus: 2,
        guest: "dunlin.wl=ws:32M,rate:0".to_owned(),
        ..VmSpec::default()
    })
    .unwrap();
    let mut random = Random(1);
    let mut wrong = Vec::new();
    for number in 0..trials() {
        let trial = Trial::next(&mut random, number);
        for (cpu, rate) in trial.rates.iter().enumerate() {
            rig.get(&format!("/set?cpu={cpu}&rate={rate}")).unwrap();
        }
        wait_for("both writers to take over their rates", Duration::from_secs(20), || {
            let counters = rig.counters().unwrap();
            counters["vcpus"].as_array().unwrap().iter().all(|cpu| cpu["workload"]["settled"] == true).then_some(())
        })
        .unwrap();
        let bandwidth = format!("{}KiB/s", LINK_PAGES * 4);
        let output = rig
            .dunlin_here(&["rogue", "wader", "--json", "--bandwidth", &bandwidth, "--downtime", "66ms"])
            .args(["--window", "60ms", "--duty", "100", "--no-names"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&report["schema"], &report["regime"]), (&"dunlin.rogue/v1".into(), &"armed".into()));
        let named: Vec<u64> = report["rogues"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|rogue| rogue["writer"]["kind"] == "vcpu")
            .map(|rogue| rogue["writer"]["index"].as_u64().unwrap())
            .collect();
        let right: Vec<u64> = trial.rogue.iter().map(|&index| index as u64).collect();
        if named != right {
            wrong.push(format!("{trial:?}: named {named:?}: {}", report["ranking"]));
        }
    }
    judge(&wrong);
    rig.stop().unwrap();
}

/// A VM in this process whose one vCPU writes in two address spaces, with its dirty log on and fetched again and again, as a migrating
/// VMM does it.
struct TwoSpaces {
    rates: Arc<[AtomicU64; 2]>,
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Pages of each address space.
const PAGES_EACH: u64 = 4096;

impl TwoSpaces {
    fn start() -> Self {
        let rates: Arc<[AtomicU64; 2]> = Arc::default();
        let ended = Arc::new(AtomicBool::new(false));
        let (up, is_up) = std::sync::mpsc::channel();
        let thread = std::thread::spawn({
            let (rates, ended) = (Arc::clone(&rates), Arc::clone(&ended));
            move || {
                let mut vm = TinyVm::new(PageCount(2 * PAGES_EACH), DirtyLogKind::Bitmap).unwrap();
                vm.write_pages(PageCount(2 * PAGES_EACH)).unwrap();
                vm.set_logging(true).unwrap();
                up.send(()).unwrap();
                write(&mut vm, &rates, &ended);
            }
        });
        is_up.recv().unwrap();
        Self { rates, ended, thread: Some(thread) }
    }
}

impl Drop for TwoSpaces {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Each address space writes its own pages one after the other, as many as are due.
fn write(vm: &mut TinyVm, rates: &[AtomicU64; 2], ended: &AtomicBool) {
    let (mut next, mut last) = ([0u64; 2], [Instant::now(); 2]);
    let mut fetched = Instant::now();
    while !ended.load(Ordering::Relaxed) {
        for (index, root) in [ROOT, OTHER_ROOT].into_iter().enumerate() {
            let due = (last[index].elapsed().as_secs_f64() * rates[index].load(Ordering::Relaxed) as f64) as u64;
            if due == 0 {
                continue;
            }
            last[index] = Instant::now();
            let at = next[index] % PAGES_EACH;
            let pages = due.min(PAGES_EACH - at);
            next[index] += pages;
            vm.load_root(root).unwrap();
            vm.write_from(index as u64 * PAGES_EACH + at, PageCount(pages)).unwrap();
        }
        if fetched.elapsed() > Duration::from_millis(10) {
            vm.fetch_log().unwrap();
            fetched = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn of_two_address_spaces_on_one_vcpu_the_one_that_writes_too_much_is_named() {
    let _alone = alone();
    let vm = TwoSpaces::start();
    let folder = tempfile::tempdir().unwrap();
    let interrupt = Interrupt::install().unwrap();
    let request = ProfileRequest {
        run_dir: folder.path().join("run"),
        state_dir: folder.path().join("state"),
        vm: VmRef::Pid(std::process::id()),
        how: How::Logged,
        allowed: Allowed::default(),
        config: TrackConfig::default(),
        window: Duration::from_millis(30),
        windows: 1,
        duty: 1.0,
        protect_one_in: None,
        max_slowdown: 1.0,
        names: false,
        guest_files: GuestFiles::default(),
        who: false,
        probe_log: false,
    };
    let terms = Terms {
        bandwidth: BytesPerSecond(LINK_PAGES * 4096),
        downtime: Duration::from_millis(36),
        switch_cost: Duration::from_millis(5),
        rtt: Duration::from_millis(1),
    };
    let mut random = Random(2);
    let mut wrong = Vec::new();
    for number in 0..trials() {
        let trial = Trial::next(&mut random, number);
        for (rate, &wanted) in vm.rates.iter().zip(&trial.rates) {
            rate.store(wanted, Ordering::Relaxed);
        }
        let report = rogues(&request, &terms, DEFAULT_MARGIN, 4, &interrupt, &mut |_, _| {}).unwrap();
        let named = spaces(&report);
        let right: Vec<AddressSpace> = trial.rogue.iter().map(|&i| AddressSpace([ROOT, OTHER_ROOT][i])).collect();
        if named != right {
            wrong.push(format!("{trial:?}: named {named:?}: {:?}", report.ranking));
        }
    }
    judge(&wrong);
}

fn spaces(report: &RogueReport) -> Vec<AddressSpace> {
    let spaces = report.rogues.iter().filter_map(|rogue| match &rogue.writer {
        Writer::AddressSpace { address_space, .. } => Some(*address_space),
        _ => None,
    });
    spaces.collect()
}

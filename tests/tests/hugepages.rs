//! VMs whose RAM is of huge pages that hosts set aside: the memory file, its faults, and every way of moving.
#![cfg(target_arch = "x86_64")]

use std::sync::atomic::Ordering;
use std::time::Duration;

use dunlin::kvm::memory::Memory;
use dunlin::migrate::Strategy;
use dunlin::model::{DirtyLogKind, HUGE_PAGE_BYTES, PAGE_SIZE, PageCount, PageRun, RegionId, RegionKind, RegionSpec};
use dunlin::port::{FaultError, Faults, Region};
use dunlin::shm::hugetlb::{HugePagesError, block_pages, check, huge_pages_file, zero};
use dunlin::shm::{MappedAt, Mapping, RamRegion, UserFaults, memory_file};
use dunlin_tests::client::EchoClient;
use dunlin_tests::hosted::TestHost;
use dunlin_tests::hugepages::SetAside;
use dunlin_tests::rig::Side;
use dunlin_tests::wait::wait_for;
use dunlin_tests::{HopOptions, Rig, VmSpec, guest};

const LIMIT: Duration = Duration::from_secs(30);
const BLOCK: u64 = HUGE_PAGE_BYTES / PAGE_SIZE as u64;

#[test]
fn what_is_zeroed_stays_in_memory_and_its_neighbours_stay() {
    let pages = SetAside::pages(3).unwrap();
    let bytes = 3 * HUGE_PAGE_BYTES;
    let file = huge_pages_file(bytes).unwrap();
    assert_eq!((block_pages(&file).unwrap(), block_pages(memory_file("x", 4096).unwrap()).unwrap()), (512, 1));
    let mapping = Mapping::of(&file, bytes as usize).unwrap();
    let second = HUGE_PAGE_BYTES as usize;
    let places = [0, PAGE_SIZE, 2 * PAGE_SIZE, second - 1, second, 2 * second - 1];
    for at in places {
        mapping.bytes()[at].store(7, Ordering::Relaxed);
    }
    let left = pages.free().unwrap();
    zero(&file, PAGE_SIZE as u64, PAGE_SIZE as u64).unwrap();
    // All of the second, which is not given back, and all of the third, which is not made.
    zero(&file, HUGE_PAGE_BYTES, 2 * HUGE_PAGE_BYTES).unwrap();
    let values = places.map(|at| mapping.bytes()[at].load(Ordering::Relaxed));
    assert_eq!((values, pages.free().unwrap()), ([7, 0, 7, 7, 0, 0], left));
}

#[test]
fn too_few_are_told_with_how_many_there_should_be() {
    let _pages = SetAside::pages(2).unwrap();
    let Err(HugePagesError::TooFew { needed, free, total }) = check(1 << 50) else { panic!("so many are free?") };
    assert!(needed == (1 << 50) / HUGE_PAGE_BYTES && free <= total && total >= 2, "{needed} {free} {total}");
    let error = HugePagesError::TooFew { needed: 128, free: 3, total: 8 }.to_string();
    assert!(error.contains("sysctl vm.nr_hugepages=133"), "{error}");
}

/// Nobody else gets them, also those that a guest has not touched, or has given back.
#[test]
fn memory_of_huge_pages_is_reserved_and_stays_so() {
    let pages = SetAside::pages(4).unwrap();
    let before = pages.free().unwrap();
    let memory = Memory::of_huge_pages(4 * HUGE_PAGE_BYTES).unwrap();
    assert!(matches!(check((before - 3) * HUGE_PAGE_BYTES), Err(HugePagesError::TooFew { .. })));
    memory.give_back(PageRun::new(0, 4 * BLOCK as u32)).unwrap();
    memory.clear().unwrap();
    assert!(matches!(check((before - 3) * HUGE_PAGE_BYTES), Err(HugePagesError::TooFew { .. })));
    drop(memory);
    check(before * HUGE_PAGE_BYTES).unwrap();
}

/// A block is mapped whole, where the guest misses it, with no copy; and only when it is in memory.
#[test]
fn a_block_is_waited_for_and_is_there_without_a_copy() {
    let _pages = SetAside::pages(4).unwrap();
    let bytes = 4 * HUGE_PAGE_BYTES;
    let file = huge_pages_file(bytes).unwrap();
    let guest = Mapping::of(&file, bytes as usize).unwrap();
    let spec = RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages: PageCount(4 * BLOCK) };
    let ours = RamRegion::new(spec, file).unwrap();
    let part = MappedAt { first_page: 0, pages: 4 * BLOCK, address: guest.as_ptr() as u64 };
    let faults = UserFaults::register(vec![part], ours.block_pages()).unwrap();
    assert_eq!(faults.block_pages(), BLOCK);
    let fault = || {
        let mut pages = Vec::new();
        while pages.is_empty() {
            faults.next(&mut pages, LIMIT).unwrap();
        }
        pages[0] / BLOCK
    };
    let block = |index: u64| PageRun::new(index * BLOCK, BLOCK as u32);
    let place = |page: u64| &guest.bytes()[page as usize * PAGE_SIZE];
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| [BLOCK + 5, 2 * BLOCK + 511].map(|page| place(page).load(Ordering::Relaxed)));
        assert_eq!(fault(), 1);
        assert!(matches!(faults.map(block(1)), Err(FaultError::NotThere)), "nothing of it is in memory");
        ours.bytes(PageRun::new(BLOCK + 5, 1))[0].store(7, Ordering::Relaxed);
        faults.map(block(1)).unwrap();
        assert_eq!(fault(), 2);
        // Zeros get their memory first.
        ours.prepare_for_write(block(2));
        faults.map(block(2)).unwrap();
        assert_eq!(waiting.join().unwrap(), [7, 0]);
    });
    // Some of these are mapped already.
    ours.prepare_for_write(block(3));
    faults.map(PageRun::new(BLOCK, 3 * BLOCK as u32)).unwrap();
    faults.end().unwrap();
    assert_eq!(place(0).load(Ordering::Relaxed), 0, "afterwards nobody waits");
}

fn spec(cpus: u32, dirty_log: DirtyLogKind) -> VmSpec {
    VmSpec {
        memory_bytes: 128 << 20,
        guest: "dunlin.wl=ws:24M,rate:8000,pattern:random dunlin.heartbeat=5ms".to_owned(),
        more: vec!["--hugepages".to_owned()],
        ..VmSpec::busy(cpus, dirty_log)
    }
}

/// Both hosts are this one: each has a VM's worth of pages set aside.
fn there_and_back(spec: &VmSpec, strategy: Strategy, more: &[&str]) {
    let _pages = SetAside::pages(2 * (spec.memory_bytes / HUGE_PAGE_BYTES) + 2).unwrap();
    let mut rig = Rig::boot(spec).unwrap();
    let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), Duration::from_millis(2))).unwrap();
    echo.wait_answers(50, LIMIT).unwrap();
    let verify = matches!(strategy, Strategy::PreCopy | Strategy::StopAndCopy);
    let options = HopOptions {
        strategy,
        verify,
        more: more.iter().map(|&word| word.to_owned()).collect(),
        ..HopOptions::default()
    };
    for side in [Side::B, Side::A] {
        let hop = rig.hop(&options).unwrap();
        println!("shows {}", serde_json::to_string(&hop.report).unwrap());
        assert_eq!((hop.exit_code, hop.source_exit_code, rig.at()), (Some(0), Some(0), side), "{hop:#?}");
        if let Some(owed) = &hop.report.post_copy {
            assert_eq!(owed.sent_pages, owed.owed_pages, "{owed:?}");
        }
        assert_eq!((hop.verified_pages > 0, hop.report.post_copy.is_none()), (verify, verify));
        let counters = rig.counters().unwrap();
        assert_eq!(guest::errors(&counters), Vec::<String>::new(), "{counters:#}");
        rig.verify_inside().unwrap();
    }
    echo.wait_answers(100, LIMIT).unwrap();
    let echo = echo.finish(LIMIT);
    assert_eq!((&echo.fault, echo.answered), (&None, echo.sent));
    assert!(rig.stop().unwrap().success());
}

#[test]
fn stop_and_copy_moves_huge_pages() {
    there_and_back(&spec(1, DirtyLogKind::Bitmap), Strategy::StopAndCopy, &[]);
}

#[test]
fn pre_copy_moves_huge_pages_with_either_log() {
    for kind in [DirtyLogKind::Bitmap, DirtyLogKind::Ring] {
        there_and_back(&spec(2, kind), Strategy::PreCopy, &[]);
    }
}

#[test]
fn post_copy_brings_huge_pages_block_by_block() {
    there_and_back(&spec(2, DirtyLogKind::Ring), Strategy::PostCopy, &["--bandwidth", "1Gbit"]);
}

#[test]
fn hybrid_owes_the_blocks_that_a_round_left_pages_of() {
    there_and_back(&spec(2, DirtyLogKind::Bitmap), Strategy::Hybrid, &["--bandwidth", "2Gbit"]);
}

/// What it does not touch stays where it was until somebody asks for the end; what it touches comes with its block.
#[test]
fn demand_paging_brings_the_blocks_that_are_touched() {
    let _pages = SetAside::pages(2 * 48 + 2).unwrap();
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot_with("96MiB", "dunlin.wl=ws:16M,rate:2000", &["--hugepages"]).unwrap();
    let receiver = target.receive(&[]).unwrap();
    let mut migrate = source.migrate(&receiver.address, &["--strategy", "demand-paging"]).unwrap();
    let owed = |host: &TestHost| host.info().and_then(|info| info.owed_pages);
    wait_for("the VM to run there", LIMIT, || owed(&target)).unwrap();
    for _ in 0..3 {
        target.serial().await_beat().unwrap();
    }
    let still = owed(&target).unwrap();
    println!("shows {still} pages of 24576 are still owed");
    assert!(still > 8_000 && still < 24_576 && target.info().unwrap().hugepages, "{still}");
    assert_eq!(source.finish_migration().unwrap(), 0);
    assert_eq!(migrate.exit_code(LIMIT).unwrap(), Some(0), "{}", migrate.output.text());
    let report = migrate.report().unwrap();
    let moved = report.post_copy.as_ref().unwrap();
    println!("shows {} of {} pages were asked for, {:?}", moved.asked_pages, moved.owed_pages, moved.waits);
    assert_eq!((moved.sent_pages, moved.owed_pages), (24_576, 24_576));
    assert!(moved.asked_pages >= moved.requests * BLOCK / 2, "blocks are asked for whole: {moved:?}");
    target.serial().check_guest().unwrap();
}

/// A host that has too few says how many there should be, and nothing has happened.
#[test]
fn a_host_with_too_few_refuses() {
    let pages = SetAside::pages(33).unwrap();
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot(&["--hugepages"]).unwrap();
    let receiver = target.receive(&[]).unwrap();
    let mut migrate = source.migrate(&receiver.address, &[]).unwrap();
    assert_eq!(migrate.exit_code(LIMIT).unwrap(), Some(3), "{}", migrate.output.text());
    let words = migrate.output.text();
    assert!(words.contains("--hugepages") && words.contains("sysctl vm.nr_hugepages="), "{words}");
    assert!(source.info().unwrap().hugepages && pages.free().is_ok());
    source.serial().await_beat().unwrap();
    // Nor is one booted.
    let mut other = target.start_vm(&dunlin_tests::hosted::guest(), &["--hugepages"]).unwrap();
    assert_eq!(other.exit_code(LIMIT).unwrap(), Some(1), "{}", other.output.text());
    assert!(other.output.text().contains("sysctl vm.nr_hugepages="), "{}", other.output.text());
}

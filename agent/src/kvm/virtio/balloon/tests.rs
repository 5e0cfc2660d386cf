//! The balloon against the driver of the tests, and guests that mean no good.

use std::cell::Cell;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::config::{COMMAND_DONE, COMMAND_STOP};
use super::{BalloonBackend, BalloonError, GuestStats, HintRound, VirtioBalloon, feature as balloon};
use crate::kvm::bus::{Device, MmioDevice};
use crate::kvm::memory::{HIGH_RAM_START, HOLE_START, Memory, MemoryOptions};
use crate::kvm::virtio::driver::Driver;
use crate::kvm::virtio::interrupt::CONFIGURATION;
use crate::kvm::virtio::mmio::{Transport, feature, register, status};
use crate::model::{PageBitmap, PageCount};

const SIZE: u16 = 64;
const RAM_BYTES: u64 = 64 << 20;
/// What Linux accepts as a rule.
const LINUX: u64 = feature::VERSION_1 | (balloon::ALL & !balloon::PAGE_POISON);
const ALL: u64 = feature::VERSION_1 | balloon::ALL;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINT: usize = 3;
const REPORT: usize = 4;
/// Where requests lie that are read.
const WORDS: u64 = 1 << 20;
/// Pages that the tests give up; a piece's worth and more.
const PAGES: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(5);

fn memory() -> Memory {
    Memory::new(RAM_BYTES, MemoryOptions { huge_pages: false }).unwrap()
}

fn balloon_of(memory: &Memory) -> VirtioBalloon {
    let device = VirtioBalloon::new(memory).unwrap();
    device.resume().unwrap();
    device
}

fn driver<'a>(device: &'a dyn MmioDevice, memory: &'a Memory) -> Driver<'a> {
    Driver::new(device, memory.ram(), 5, SIZE)
}

fn marked(memory: &Memory) -> Vec<u64> {
    let mut seen = PageBitmap::new(memory.pages());
    memory.dirty().take(&mut seen);
    seen.runs(u32::MAX).flat_map(|run| run.indices()).collect()
}

fn fill(memory: &Memory, at: u64, bytes: u64) {
    memory.ram().write_slice(&vec![0x5a; bytes as usize], GuestAddress(at)).unwrap();
}

fn byte(memory: &Memory, at: u64) -> u8 {
    memory.ram().read_obj(GuestAddress(at)).unwrap()
}

/// One request that names page numbers.
fn name_pages(driver: &mut Driver<'_>, memory: &Memory, queue: usize, pages: &[u32]) {
    let words: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    memory.ram().write_slice(&words, GuestAddress(WORDS)).unwrap();
    driver.post(queue, &[(WORDS, words.len() as u32, false)]);
    driver.kick(queue);
    assert_eq!(driver.wait(queue).1, 0);
}

fn report(driver: &mut Driver<'_>, pieces: &[(u64, u32, bool)]) {
    driver.post(REPORT, pieces);
    driver.kick(REPORT);
    assert_eq!(driver.wait(REPORT).1, 0);
}

fn announce(driver: &mut Driver<'_>, memory: &Memory, id: u32) {
    memory.ram().write_obj(id.to_le(), GuestAddress(WORDS)).unwrap();
    driver.post(HINT, &[(WORDS, 4, false)]);
    driver.kick(HINT);
    driver.wait(HINT);
}

fn hint(driver: &mut Driver<'_>, at: u64, bytes: u32) {
    driver.post(HINT, &[(at, bytes, true)]);
    driver.kick(HINT);
    driver.wait(HINT);
}

/// The words of the configuration space: target, actual, command, poison.
fn config(device: &dyn MmioDevice) -> [u32; 4] {
    [0, 4, 8, 12].map(|offset| {
        let mut word = [0; 4];
        device.read(register::CONFIG + offset, &mut word);
        u32::from_le_bytes(word)
    })
}

fn taken(device: &VirtioBalloon, memory: &Memory) -> (Vec<u64>, Option<HintRound>) {
    let mut pages = PageBitmap::new(memory.pages());
    let round = device.take_hints(&mut pages);
    (pages.runs(u32::MAX).flat_map(|run| run.indices()).collect(), round)
}

#[test]
fn what_is_put_into_the_balloon_goes_back_to_the_host_and_is_marked() {
    let memory = memory();
    let device = balloon_of(&memory);
    let mut driver = driver(&device, &memory);
    assert_eq!(driver.start(LINUX), 15);
    fill(&memory, PAGES, 1 << 20);
    marked(&memory);
    let kept = memory.resident_bytes().unwrap();
    let first = (PAGES / 4096) as u32;
    // In any order, some of them twice.
    name_pages(&mut driver, &memory, INFLATE, &[first + 9, first + 1, first, first + 2, first + 1]);
    assert!(memory.resident_bytes().unwrap() <= kept - 3 * 4096, "the host keeps what was given back");
    let gone = [0, 1, 2, 9].map(|page| u64::from(first) + page);
    let marks = marked(&memory);
    assert!(gone.iter().all(|page| marks.contains(page)), "{marks:x?}");
    assert!(!marks.contains(&(u64::from(first) + 3)), "a neighbour was marked");
    for page in 0..12 {
        let expected = if gone.contains(&(u64::from(first) + page)) { 0 } else { 0x5a };
        assert_eq!(byte(&memory, PAGES + page * 4096 + 77), expected, "page {page}");
    }
    assert_eq!(device.status().inflated, PageCount(4));
    // Out of it again: nothing to do but to acknowledge.
    name_pages(&mut driver, &memory, DEFLATE, &[first, first + 9]);
    assert_eq!(device.status().inflated, PageCount(4));
}

#[test]
fn the_target_reaches_the_guest_and_the_guests_answer_the_host() {
    let memory = memory();
    let device = balloon_of(&memory);
    let driver_view = &device as &dyn MmioDevice;
    // Before there is a driver: it finds the target when it comes.
    device.set_target(PageCount(7)).unwrap();
    assert_eq!(config(driver_view), [7, 0, 0, 0]);
    let mut driver = driver(&device, &memory);
    driver.start(LINUX);
    assert_eq!(config(driver_view)[0], 7, "a driver's reset forgot what the host wants");
    assert_eq!(driver.load(register::INTERRUPT_STATUS), 0);
    let generation = driver.load(register::CONFIG_GENERATION);
    device.set_target(PageCount(100)).unwrap();
    assert_eq!(driver.load(register::INTERRUPT_STATUS), CONFIGURATION);
    assert_ne!(driver.load(register::CONFIG_GENERATION), generation);
    driver.store(register::INTERRUPT_ACK, CONFIGURATION);
    device.set_target(PageCount(100)).unwrap();
    assert_eq!(driver.load(register::INTERRUPT_STATUS), 0, "nothing changed");

    let seen = device.wait_progress(0, Duration::ZERO);
    driver.store(register::CONFIG + 4, 60);
    assert!(device.wait_progress(seen, LIMIT) > seen);
    assert_eq!((device.status().target, device.status().actual), (PageCount(100), PageCount(60)));
    assert_eq!(driver.load(register::INTERRUPT_STATUS), 0, "its own store came back as news");
    // A guest that says more than it can have, or writes what is not its own.
    driver.store(register::CONFIG + 4, (RAM_BYTES / 4096) as u32 + 1);
    driver.store(register::CONFIG, 1);
    driver.store(register::CONFIG + 8, 1);
    device.write(register::CONFIG + 4, &[1]);
    assert_eq!(config(driver_view), [100, 60, 0, 0]);
    let all = memory.pages();
    assert_eq!(device.set_target(PageCount(all.0 + 1)), Err(BalloonError::Target(PageCount(all.0 + 1), all)));
    device.set_target(all).unwrap();

    // The driver goes: what the host wants stays, what was in the balloon is the guest's.
    driver.store(register::STATUS, 0);
    assert_eq!(config(driver_view), [all.0 as u32, 0, 0, 0]);
    assert!(!device.status().driver);
    device.pause().unwrap();
    device.reset().unwrap();
    assert_eq!(config(driver_view), [0; 4], "a machine's reset is power-on");
}

#[test]
fn reported_pages_go_back_to_the_host_and_only_those() {
    let memory = memory();
    let device = balloon_of(&memory);
    let mut driver = driver(&device, &memory);
    driver.start(LINUX);
    fill(&memory, PAGES, 12 << 20);
    marked(&memory);
    let kept = memory.resident_bytes().unwrap();
    report(&mut driver, &[(PAGES, 2 << 20, true), (PAGES + (4 << 20), 4 << 20, true)]);
    assert_eq!(kept - memory.resident_bytes().unwrap(), 6 << 20);
    let first = PAGES / 4096;
    let marks: Vec<_> = marked(&memory).into_iter().filter(|page| *page >= first).collect();
    assert_eq!(marks, (first..first + 512).chain(first + 1024..first + 2048).collect::<Vec<_>>());
    assert_eq!(device.status().reported.bytes(), 6 << 20);
    // Unaligned: only whole pages. Overlapping: no harm.
    report(&mut driver, &[(PAGES + (8 << 20) + 1, 8191, true), (PAGES, 4096, true), (PAGES, 8192, true)]);
    assert_eq!([0, 4096].map(|page| byte(&memory, PAGES + (8 << 20) + page)), [0x5a, 0]);
    // The guest uses them again.
    fill(&memory, PAGES, 4096);
    assert_eq!(byte(&memory, PAGES), 0x5a);
}

#[test]
fn with_a_pattern_that_counts_reported_pages_stay_and_hints_are_refused() {
    for (poison, stays) in [(0xaaaa_aaaa_u32, true), (0, false)] {
        let memory = memory();
        let device = balloon_of(&memory);
        let mut driver = driver(&device, &memory);
        driver.start(ALL);
        driver.store(register::CONFIG + 12, poison);
        fill(&memory, PAGES, 8192);
        report(&mut driver, &[(PAGES, 4096, true)]);
        assert_eq!(byte(&memory, PAGES) == 0x5a, stays, "poison {poison:#x}");
        assert_eq!(device.status().poisoned, stays);
        // The driver itself fills a page that leaves the balloon.
        name_pages(&mut driver, &memory, INFLATE, &[(PAGES / 4096) as u32 + 1]);
        assert_eq!(byte(&memory, PAGES + 4096), 0);
        assert_eq!(device.start_hint(), Err(BalloonError::Poisoned));
    }
    // A pattern without the feature means nothing.
    let memory = memory();
    let device = balloon_of(&memory);
    let mut driver = driver(&device, &memory);
    driver.start(LINUX);
    driver.store(register::CONFIG + 12, 0xaaaa_aaaa);
    fill(&memory, PAGES, 4096);
    report(&mut driver, &[(PAGES, 4096, true)]);
    assert_eq!((byte(&memory, PAGES), device.status().poisoned), (0, false));
}

#[test]
fn while_it_is_held_pages_are_acknowledged_and_stay() {
    let memory = memory();
    let device = balloon_of(&memory);
    let mut driver = driver(&device, &memory);
    driver.start(LINUX);
    fill(&memory, PAGES, 8192);
    marked(&memory);
    let page = (PAGES / 4096) as u32;
    device.hold(true);
    report(&mut driver, &[(PAGES, 4096, true)]);
    name_pages(&mut driver, &memory, INFLATE, &[page + 1]);
    assert_eq!([byte(&memory, PAGES), byte(&memory, PAGES + 4096)], [0x5a; 2]);
    assert!(!marked(&memory).contains(&u64::from(page)));
    let held = device.status();
    assert_eq!((held.held, held.reported, held.inflated), (true, PageCount(0), PageCount(0)));
    device.hold(false);
    report(&mut driver, &[(PAGES, 4096, true)]);
    assert_eq!(byte(&memory, PAGES), 0);
}

#[test]
fn hints_count_only_for_the_round_that_asked_for_them() {
    let memory = memory();
    let device = balloon_of(&memory);
    assert_eq!(device.start_hint(), Err(BalloonError::NoDriver));
    let mut driver = driver(&device, &memory);
    driver.start(feature::VERSION_1);
    assert_eq!(device.start_hint(), Err(BalloonError::NoHints));
    driver.start(LINUX);
    assert_eq!(taken(&device, &memory), (vec![], None));
    let page = PAGES / 4096;
    fill(&memory, PAGES, 8192);

    let id = device.start_hint().unwrap();
    assert_eq!((id, config(&device)[2]), (2, 2));
    assert_eq!(driver.load(register::INTERRUPT_STATUS) & CONFIGURATION, CONFIGURATION);
    hint(&mut driver, PAGES, 4096);
    announce(&mut driver, &memory, id + 1);
    hint(&mut driver, PAGES, 4096);
    assert_eq!(taken(&device, &memory).0, Vec::<u64>::new(), "hints of no round, and of another, were taken");
    let seen = device.wait_progress(0, Duration::ZERO);
    announce(&mut driver, &memory, id);
    hint(&mut driver, PAGES, 8192);
    hint(&mut driver, PAGES + 8192, 4 << 20);
    let all = HintRound { id, hinted: PageCount(1026), complete: false };
    assert_eq!(taken(&device, &memory), ((page..page + 1026).collect(), Some(all)));
    assert_eq!(taken(&device, &memory), (vec![], Some(all)), "hints were there twice");
    assert_eq!(byte(&memory, PAGES), 0x5a, "a hinted page was touched");
    announce(&mut driver, &memory, COMMAND_STOP);
    assert!(device.wait_progress(seen, LIMIT) > seen);
    assert!(device.status().round.unwrap().complete);

    // After the stop nothing more counts, whatever the guest says it belongs to.
    device.stop_hint();
    assert_eq!(config(&device)[2], COMMAND_STOP);
    announce(&mut driver, &memory, id);
    hint(&mut driver, PAGES, 4096);
    assert_eq!(taken(&device, &memory).0, Vec::<u64>::new());
    let second = device.start_hint().unwrap();
    assert_eq!(second, id + 1);
    hint(&mut driver, PAGES, 4096);
    announce(&mut driver, &memory, second);
    hint(&mut driver, PAGES + 4096, 4096);
    device.finish_hint();
    assert_eq!(config(&device)[2], COMMAND_DONE);
    hint(&mut driver, PAGES, 4096);
    assert_eq!(taken(&device, &memory).0, [page + 1]);
    // A driver that starts anew knows of no round, and the ids go on.
    driver.start(LINUX);
    assert_eq!((config(&device)[2], device.status().round), (COMMAND_STOP, None));
    assert_eq!(device.start_hint().unwrap(), id + 2);
}

#[test]
fn statistics_are_asked_for_and_the_buffer_stays_with_the_ring() {
    let memory = memory();
    let device = balloon_of(&memory);
    assert_eq!(device.ask_stats(LIMIT), None, "without a driver");
    let mut driver = driver(&device, &memory);
    driver.start(LINUX);
    let give = |driver: &mut Driver<'_>, free: u64| {
        let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes = [entry(4, free), entry(5, 1 << 30), entry(99, 1), entry(3, 17), vec![1, 2, 3]].concat();
        memory.ram().write_slice(&bytes, GuestAddress(WORDS)).unwrap();
        driver.post(STATS, &[(WORDS, bytes.len() as u32, false)]);
        driver.kick(STATS);
    };
    let expected = |free| GuestStats {
        free_bytes: Some(free),
        total_bytes: Some(1 << 30),
        minor_faults: Some(17),
        ..GuestStats::default()
    };
    let seen = device.wait_progress(0, Duration::ZERO);
    give(&mut driver, 5000);
    device.wait_progress(seen, LIMIT);
    assert_eq!(device.status().stats, Some(expected(5000)));
    assert_eq!(driver.completed(STATS), None, "the driver has its buffer back though nobody asked");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| device.ask_stats(LIMIT));
        assert_eq!(driver.wait(STATS), (0, 0), "getting the buffer back is how it is asked");
        give(&mut driver, 6000);
        assert_eq!(asked.join().unwrap(), Some(expected(6000)));
    });
    assert_eq!(driver.completed(STATS), None);
    // The buffer moves with the ring.
    device.pause().unwrap();
    let target = VirtioBalloon::new(&memory).unwrap();
    target.restore(&device.save().unwrap()).unwrap();
    target.resume().unwrap();
    let mut driver = driver.moved_to(&target, memory.ram());
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| target.ask_stats(LIMIT));
        assert_eq!(driver.wait(STATS), (1, 0));
        give(&mut driver, 7000);
        assert_eq!(asked.join().unwrap(), Some(expected(7000)));
    });
    // A guest that does not answer costs no more than the patience.
    assert_eq!(target.ask_stats(Duration::from_millis(1)), None);
}

/// What a driver has that does not accept every feature: Linux leaves no gaps in the numbers, the specification does.
#[test]
fn queues_are_found_by_either_numbering() {
    for queue in [2, REPORT] {
        let memory = memory();
        let device = balloon_of(&memory);
        let mut driver = driver(&device, &memory);
        driver.negotiate(feature::VERSION_1 | balloon::REPORTING);
        for ready in [INFLATE, DEFLATE, queue] {
            assert!(driver.set_up(ready as u32, SIZE.into(), Driver::place(ready)));
        }
        let running = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        driver.store(register::STATUS, running.into());
        fill(&memory, PAGES, 4096);
        driver.post(queue, &[(PAGES, 4096, true)]);
        driver.kick(queue);
        driver.wait(queue);
        assert_eq!(byte(&memory, PAGES), 0, "queue {queue}");
    }
}

#[test]
fn guests_that_mean_no_good_hurt_themselves_at_most() {
    let memory = Memory::new(HOLE_START + (16 << 20), MemoryOptions { huge_pages: false }).unwrap();
    let device = balloon_of(&memory);
    let mut driver = driver(&device, &memory);
    driver.start(LINUX);
    let top = (HIGH_RAM_START + (16 << 20)) / 4096;
    let last = HIGH_RAM_START + (16 << 20) - 4096;
    fill(&memory, last, 4096);
    fill(&memory, PAGES, 4096);
    // Page numbers in the hole, beyond RAM, beyond everything; and the last page, which is one.
    let hole = (HOLE_START / 4096) as u32;
    name_pages(&mut driver, &memory, INFLATE, &[hole, hole + 5, top as u32, u32::MAX, top as u32 - 1]);
    assert_eq!(byte(&memory, last), 0);
    assert_eq!(device.status().inflated, PageCount(1));
    // Half a page number, none, far too many.
    for len in [0, 3, 5] {
        driver.post(INFLATE, &[(PAGES, len, false)]);
        driver.kick(INFLATE);
        driver.wait(INFLATE);
    }
    driver.post(INFLATE, &[(HOLE_START / 2, 1 << 30, false)]);
    driver.kick(INFLATE);
    driver.wait(INFLATE);
    // The wrong direction, both directions, outside RAM, across its end.
    for (queue, pieces) in [
        (INFLATE, vec![(PAGES, 4, true)]),
        (INFLATE, vec![(PAGES, 4, false), (PAGES, 4, true)]),
        (DEFLATE, vec![(PAGES, 4, true)]),
        (REPORT, vec![(PAGES, 4096, false)]),
        (REPORT, vec![(PAGES + 4096, 4, false), (PAGES, 4096, true)]),
        (REPORT, vec![(PAGES, 4096, true), (PAGES, 4096, false)]),
        (REPORT, vec![(HOLE_START, 4096, true)]),
        (REPORT, vec![(last, 8192, true)]),
        (REPORT, vec![(u64::MAX - 4095, 4096, true)]),
        (REPORT, vec![(PAGES, 4096, true), (u64::MAX - 4095, 4096, true)]),
        (REPORT, vec![(PAGES, 0, true)]),
        (HINT, vec![(PAGES, 2, false)]),
        (HINT, vec![(PAGES, 4096, true), (PAGES, 4, false)]),
    ] {
        driver.post(queue, &pieces);
        driver.kick(queue);
        assert_eq!(driver.wait(queue).1, 0, "{queue} {pieces:?}");
        assert_eq!(byte(&memory, PAGES), 0x5a, "{queue} {pieces:?}");
    }
    assert_eq!(device.status().reported, PageCount(0));
    assert_eq!(driver.load(register::STATUS), 15);
}

/// A report of most of memory: the pieces are small, and the rest is not looked at.
#[test]
fn a_long_request_is_given_up_between_pieces_and_done_again() {
    let memory = Memory::new(HOLE_START, MemoryOptions { huge_pages: false }).unwrap();
    let backend = BalloonBackend::new(memory.clone(), std::sync::Arc::default());
    let transport = Transport::new("balloon0", memory.ram().clone(), backend).unwrap();
    let mut driver = driver(&transport, &memory);
    driver.start(LINUX);
    driver.post(REPORT, &[(PAGES, 512 << 20, true), (PAGES, 512 << 20, true), (PAGES, 2 << 30, true)]);
    let asked = Cell::new(0);
    let served = transport.serve(&|| {
        asked.set(asked.get() + 1);
        asked.get() > 20
    });
    assert!(served.more);
    assert_eq!(driver.completed(REPORT), None);
    assert!(marked(&memory).len() > 1024, "nothing was done before it was given up");
    let saved = transport.save();
    let target = Transport::new(
        "balloon0",
        memory.ram().clone(),
        BalloonBackend::new(memory.clone(), std::sync::Arc::default()),
    )
    .unwrap();
    target.restore(&saved).unwrap();
    let mut driver = driver.moved_to(&target, memory.ram());
    asked.set(0);
    target.serve(&|| {
        asked.set(asked.get() + 1);
        false
    });
    assert!((256..300).contains(&asked.get()), "{} pieces", asked.get());
    assert_eq!(driver.completed(REPORT), Some((0, 0)));
    assert_eq!(target.with_backend(|backend| backend.reported).bytes(), 1 << 30);
}

#[test]
fn a_balloon_moves_with_what_is_in_it_and_a_round_of_hints_ends_there() {
    let memory = memory();
    let device = balloon_of(&memory);
    let mut driver = driver(&device, &memory);
    driver.start(ALL & !balloon::PAGE_POISON);
    device.set_target(PageCount(50)).unwrap();
    driver.store(register::CONFIG + 4, 40);
    let id = device.start_hint().unwrap();
    announce(&mut driver, &memory, id);
    hint(&mut driver, PAGES, 4096);
    driver.store(register::INTERRUPT_ACK, 3);
    device.pause().unwrap();
    let state = device.save().unwrap();

    let target = VirtioBalloon::new(&memory).unwrap();
    target.restore(&state).unwrap();
    assert_eq!(target.save().unwrap(), state, "a state changed by being restored");
    assert_eq!(config(&target), [50, 40, id, 0]);
    target.resume().unwrap();
    // The guest holds the pages back that it named to a host which is gone.
    assert_eq!(config(&target), [50, 40, COMMAND_DONE, 0]);
    let mut driver = driver.moved_to(&target, memory.ram());
    assert_eq!(driver.load(register::INTERRUPT_STATUS) & CONFIGURATION, CONFIGURATION);
    hint(&mut driver, PAGES, 4096);
    assert_eq!(taken(&target, &memory), (vec![], None), "hints that another host asked for");
    assert_eq!(target.start_hint().unwrap(), id + 1, "an id that the guest has seen");
    // The one that stays behind goes on as it was.
    device.resume().unwrap();
    assert_eq!(config(&device)[2], id);
}

/// Whoever squeezed it may be gone: the machine that has it lets it have again what it had.
#[test]
fn a_squeezed_guest_has_its_memory_again_here_or_at_another_host() {
    let memory = memory();
    let device = balloon_of(&memory);
    assert_eq!(device.squeeze(PageCount(50)), Err(BalloonError::NoDriver));
    let mut driver = driver(&device, &memory);
    driver.start(LINUX);
    device.set_target(PageCount(10)).unwrap();
    assert!(matches!(device.squeeze(PageCount(RAM_BYTES)), Err(BalloonError::Target(..))));
    device.squeeze(PageCount(50)).unwrap();
    device.squeeze(PageCount(70)).unwrap();
    driver.store(register::INTERRUPT_ACK, 3);
    device.pause().unwrap();
    let state = device.save().unwrap();
    let target = VirtioBalloon::new(&memory).unwrap();
    target.restore(&state).unwrap();
    assert_eq!((target.save().unwrap(), target.status().target), (state, PageCount(70)));
    target.resume().unwrap();
    assert_eq!(target.status().target, PageCount(10));
    let driver = driver.moved_to(&target, memory.ram());
    assert_eq!(driver.load(register::INTERRUPT_STATUS) & CONFIGURATION, CONFIGURATION);
    // The one that stays behind is told when it is over there.
    device.resume().unwrap();
    assert_eq!(device.status().target, PageCount(70));
    device.relax();
    assert_eq!(device.status().target, PageCount(10));
    device.relax();
    assert_eq!(device.status().target, PageCount(10));
}

#[test]
fn states_that_are_none_of_this_balloon_are_refused() {
    let memory = memory();
    let device = balloon_of(&memory);
    device.set_target(PageCount(RAM_BYTES / 4096)).unwrap();
    device.pause().unwrap();
    let small = Memory::new(RAM_BYTES / 2, MemoryOptions { huge_pages: false }).unwrap();
    let other = VirtioBalloon::new(&small).unwrap();
    let error = other.restore(&device.save().unwrap()).unwrap_err().to_string();
    assert!(error.contains("balloon0") && error.contains("16384 of them wanted"), "{error}");
    assert_eq!(config(&other), [0; 4]);
}

//! The target's part of post-copy: a VM that runs while pages are still owed to it.
//!
//! Owns who may write which page. A page is claimed before its bytes arrive and mapped when they are complete, so that nothing that comes late or twice overwrites what the
//! guest has written. Faults of the VM become requests, once a page; pages that were sent before (in rounds, or as zeros) are mapped at once. Where RAM is of huge pages all of that is
//! as ever but for the mapping: the guest gets a block when its last page has come, and asks for all of it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::marks::Marks;
use super::target::TargetError;
use crate::model::{PAGE_SIZE, PageBitmap, PageRun, RegionId, WaitReport};
use crate::port::{Bell, BulkReceiver, BulkSender, BytesView, Clock, FaultError, Faults, LinkError, Place, Region};

/// How often whoever waits looks around.
const TICK: Duration = Duration::from_millis(100);
/// Pages mapped with one request ahead of the guest: as many as the largest block has.
const MAP_PAGES: u32 = 512;
/// The most pages that are looked at together for data: 1 GiB.
pub(super) const LOOK_PAGES: u32 = 1 << 18;

/// For so long from its going on, the VM, which has much to catch up with, is to find the link and the processors free: only what it is likely to touch is pushed.
pub const GUEST_FIRST: Duration = Duration::from_millis(20);

/// What the VM is owed.
pub(super) struct Owed<'a> {
    region: &'a dyn Region,
    faults: Arc<dyn Faults>,
    clock: &'a dyn Clock,
    requests: Mutex<Requests>,
    /// On its way, or here.
    claimed: Marks,
    /// When a page was asked for, by when it came: what the guest waited.
    asked: Mutex<Waits>,
    left: AtomicU64,
    /// Nothing came before what is owed: memory holds nothing else.
    is_fresh: bool,
    over: AtomicBool,
    runs: AtomicBool,
    /// Until then (nanoseconds; 0 before it runs) the guest may wait for what the push has sent already.
    first_until: AtomicU64,
    /// Requests do not get out.
    cut: AtomicBool,
    /// Why faults are not served any more.
    failure: Mutex<Option<TargetError>>,
    /// Rung when the last has come, when the guest runs, when requests do not get out, and when nobody serves it any more.
    pub(super) changed: Bell,
}

/// How requests get to the source.
#[derive(Default)]
struct Requests {
    way: Way,
    /// Which way it is: whoever comes back from one that was lost meanwhile lets it go.
    number: u64,
    /// Pages to be asked for by whoever has the stream.
    due: VecDeque<u64>,
}

#[derive(Default)]
enum Way {
    /// There is none; what is asked for is asked for anew when there is.
    #[default]
    Lost,
    Free(Box<dyn BulkSender>),
    /// Somebody sends: what is sent must not wait under a lock.
    Taken,
}

#[derive(Default)]
struct Waits {
    since: std::collections::BTreeMap<u64, Duration>,
    took_ns: Vec<u64>,
}

impl<'a> Owed<'a> {
    /// A VM that is owed the pages of `owed`; requests go out through `requests`.
    pub(super) fn new(
        region: &'a dyn Region,
        faults: Arc<dyn Faults>,
        clock: &'a dyn Clock,
        owed: &PageBitmap,
        requests: Box<dyn BulkSender>,
    ) -> Self {
        let all = PageBitmap::full(region.spec().pages);
        for (here, (all, owed)) in faults.here().iter().zip(all.words().iter().zip(owed.words())) {
            here.store(all & !owed, Ordering::Release);
        }
        let new = Self::left_by_another(region, faults, clock);
        unpoisoned(&new.requests).way = Way::Free(requests);
        new
    }

    /// The same where nothing was sent before: memory is made to hold nothing, as what is not owed does.
    pub(super) fn onto_nothing(mut self) -> Self {
        self.region.spec().pages.windows(LOOK_PAGES).for_each(|window| self.empty(window));
        self.is_fresh = true;
        self
    }

    fn empty(&self, run: PageRun) {
        self.region.data_within(run).into_iter().for_each(|data| self.region.zero(data));
    }

    /// A VM whose manager died: what had come is marked, and there is no way to the source yet.
    pub(super) fn left_by_another(region: &'a dyn Region, faults: Arc<dyn Faults>, clock: &'a dyn Clock) -> Self {
        let claimed = Marks::of(faults.here().iter().map(|word| word.load(Ordering::Acquire)));
        let new = Self {
            region,
            faults,
            clock,
            requests: Mutex::default(),
            claimed,
            asked: Mutex::default(),
            left: AtomicU64::new(0),
            is_fresh: false,
            over: AtomicBool::new(false),
            runs: AtomicBool::new(false),
            first_until: AtomicU64::new(0),
            cut: AtomicBool::new(false),
            failure: Mutex::default(),
            changed: Bell::default(),
        };
        new.left.store(new.missing().count().0, Ordering::Release);
        new
    }

    /// The pages that are mapped with this one.
    fn block(&self, page: u64) -> PageRun {
        let pages = self.faults.block_pages();
        PageRun::new(page / pages * pages, pages as u32)
    }

    /// Whether all pages of a block are here.
    fn is_here(&self, block: PageRun) -> bool {
        match block.count {
            1 => self.present().is_set(block.first.0),
            _ => (block.first.0..block.end()).step_by(64).all(|page| self.present().word(page) == u64::MAX),
        }
    }

    /// Here, and fit to be mapped.
    fn present(&self) -> Marks<&[AtomicU64]> {
        Marks::within(self.faults.here())
    }

    /// The pages that are still owed.
    pub(super) fn missing(&self) -> PageBitmap {
        let mut missing = PageBitmap::new(self.region.spec().pages);
        for (index, here) in self.faults.here().iter().enumerate() {
            missing.or_word(index, !here.load(Ordering::Acquire));
        }
        missing
    }

    /// Whether the guest waits for a page.
    pub(super) fn is_waited_for(&self) -> bool {
        !unpoisoned(&self.asked).since.is_empty()
    }

    /// Whether requests do not get out.
    pub(super) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// There is no way to the source any more, and no stream fills pages: what had not come whole is nobody's again. Requests wait.
    pub(super) fn lose_way(&self) {
        let mut requests = unpoisoned(&self.requests);
        *requests = Requests { number: requests.number + 1, ..Requests::default() };
        drop(requests);
        self.claimed.become_like(&self.present());
    }

    /// There is a way again: everything that the guest waits for is asked for anew.
    pub(super) fn find_way(&self, mut requests: Box<dyn BulkSender>) -> Result<(), LinkError> {
        self.cut.store(false, Ordering::Release);
        let mut told = BTreeSet::new();
        loop {
            let fresh: Vec<u64> = {
                let asked = unpoisoned(&self.asked);
                let fresh: Vec<u64> = asked.since.keys().copied().filter(|page| !told.contains(page)).collect();
                if fresh.is_empty() {
                    // Whoever is asked for from now on finds it.
                    unpoisoned(&self.requests).way = Way::Free(requests);
                    return Ok(());
                }
                fresh
            };
            for page in fresh {
                requests.want(self.region.spec().id, self.block(page))?;
                told.insert(page);
            }
        }
    }

    /// Asks for a page's block. While there is no way the request waits with the others; while another thread sends, that one sends it.
    fn ask(&self, page: u64) {
        let (mut stream, number) = {
            let mut requests = unpoisoned(&self.requests);
            match std::mem::take(&mut requests.way) {
                Way::Lost => return,
                Way::Taken => {
                    requests.way = Way::Taken;
                    requests.due.push_back(page);
                    return;
                }
                Way::Free(stream) => {
                    requests.way = Way::Taken;
                    (stream, requests.number)
                }
            }
        };
        let mut next = page;
        loop {
            let sent = stream.want(self.region.spec().id, self.block(next));
            let mut requests = unpoisoned(&self.requests);
            if requests.number != number {
                return;
            }
            if let Err(error) = sent {
                tracing::debug!("requests do not get out: {error}");
                requests.way = Way::Lost;
                self.cut.store(true, Ordering::Release);
                drop(requests);
                self.changed.ring();
                return;
            }
            match requests.due.pop_front() {
                Some(page) => next = page,
                None => {
                    requests.way = Way::Free(stream);
                    return;
                }
            }
        }
    }

    /// The memory.
    pub(super) fn region(&self) -> &'a dyn Region {
        self.region
    }

    /// Where its faults come in.
    pub(super) fn faults(&self) -> Arc<dyn Faults> {
        Arc::clone(&self.faults)
    }

    /// Faults are served no more.
    pub(super) fn fail(&self, error: TargetError) {
        unpoisoned(&self.failure).get_or_insert(error);
        self.changed.ring();
    }

    /// Why faults are served no more.
    pub(super) fn check(&self) -> Result<(), TargetError> {
        unpoisoned(&self.failure).take().map_or(Ok(()), Err)
    }

    /// How many are still owed.
    pub(super) fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// Nobody serves it any more.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Release);
        self.changed.ring();
    }

    /// The guest runs.
    pub(super) fn runs(&self) {
        self.first_until.store((self.clock.now() + GUEST_FIRST).as_nanos() as u64, Ordering::Release);
        self.runs.store(true, Ordering::Release);
        self.changed.ring();
    }

    /// All is here: the guest waits for nothing any more.
    pub(super) fn end(&self) -> Result<(), TargetError> {
        self.faults.end().map_err(|error| gone(&error))
    }

    /// Where whoever takes in the push is to stand. While only what the guest is likely to touch is pushed it may wait for that, once it runs.
    pub(super) fn place_of_push(&self) -> Place {
        let until = Duration::from_nanos(self.first_until.load(Ordering::Acquire));
        if self.clock.now() < until { Place::InFront } else { Place::Among }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Takes pages from a stream. What was claimed before goes nowhere.
    pub(super) fn take_pages(
        &self,
        run: PageRun,
        receiver: &mut dyn BulkReceiver,
        keep_waiting: &mut dyn FnMut() -> bool,
    ) -> Result<(), TargetError> {
        let mine: Vec<bool> = run.indices().map(|page| self.claimed.set(page)).collect();
        let bytes = self.region.bytes(run);
        if mine.iter().all(|&mine| mine) {
            receiver.read_into(bytes, keep_waiting)?;
        } else {
            // Sent twice: the bytes are taken off the stream, and only pages that are nobody's yet are filled with them.
            let scratch: Vec<_> = (0..bytes.len()).map(|_| std::sync::atomic::AtomicU8::new(0)).collect();
            receiver.read_into(&scratch, keep_waiting)?;
            let pages = bytes.chunks(PAGE_SIZE).zip(scratch.chunks(PAGE_SIZE)).zip(&mine);
            pages.filter(|(_, mine)| **mine).for_each(|((to, from), _)| copy(to, from));
        }
        self.arrived(run, &mine)
    }

    /// Takes pages that are zero. They get memory when the guest touches them.
    pub(super) fn take_zeros(&self, run: PageRun) -> Result<(), TargetError> {
        let mine: Vec<bool> = run.indices().map(|page| self.claimed.set(page)).collect();
        if !self.is_fresh {
            // What an earlier round brought is stale.
            runs_of(run, &mine).for_each(|part| self.empty(part));
        }
        self.mark_present(run, &mine);
        for page in self.no_longer_asked(run) {
            self.map(self.block(page))?;
        }
        self.count(&mine);
        Ok(())
    }

    /// The pages of a run that are `mine` are here: they are mapped, and nobody waits for them any more.
    fn arrived(&self, run: PageRun, mine: &[bool]) -> Result<(), TargetError> {
        self.mark_present(run, mine);
        for part in runs_of(run, mine) {
            self.map(part)?;
        }
        self.no_longer_asked(run);
        self.count(mine);
        Ok(())
    }

    fn mark_present(&self, run: PageRun, mine: &[bool]) {
        for part in runs_of(run, mine) {
            part.indices().for_each(|page| _ = self.present().set(page));
        }
    }

    /// Counts pages that have come.
    fn count(&self, mine: &[bool]) {
        let count = mine.iter().filter(|&&mine| mine).count() as u64;
        if count > 0 && self.left.fetch_sub(count, Ordering::AcqRel) == count {
            self.changed.ring();
        }
    }

    /// Those blocks of a run, by their first pages, that the guest waited for and that are here: it does not any more.
    fn no_longer_asked(&self, run: PageRun) -> Vec<u64> {
        let mut asked = unpoisoned(&self.asked);
        let Waits { since, took_ns } = &mut *asked;
        let asked = since.range(self.block(run.first.0).first.0..run.end()).map(|(&page, _)| page);
        let pages: Vec<u64> = asked.filter(|&page| self.is_here(self.block(page))).collect();
        let now = self.clock.now();
        for page in &pages {
            if let Some(when) = since.remove(page) {
                took_ns.push(now.saturating_sub(when).as_nanos() as u64);
            }
        }
        pages
    }

    /// Maps those pages of a run that are here.
    fn map(&self, run: PageRun) -> Result<(), TargetError> {
        if self.faults.block_pages() > 1 {
            return self.map_blocks(run);
        }
        match self.faults.map(run) {
            Ok(()) => return Ok(()),
            Err(FaultError::NotThere) => {}
            Err(error) => return Err(gone(&error)),
        }
        // Some of them are zeros that have no memory yet; or claimed by another stream, and not here.
        for page in run.indices().filter(|&page| self.present().is_set(page)) {
            let one = PageRun::new(page, 1);
            match self.faults.map(one) {
                Err(FaultError::NotThere) => self.faults.map_zero(one).map_err(|error| gone(&error))?,
                other => other.map_err(|error| gone(&error))?,
            }
        }
        Ok(())
    }

    /// Maps those blocks that a run touches and that are here.
    fn map_blocks(&self, run: PageRun) -> Result<(), TargetError> {
        let mut next = run.first.0;
        while next < run.end() {
            let block = self.block(next);
            next = block.end();
            if self.is_here(block) {
                match self.faults.map(block) {
                    Err(FaultError::NotThere) => {
                        // Zeros that have no memory yet.
                        self.region.prepare_for_write(block);
                        self.faults.map(block).map_err(|error| gone(&error))?;
                    }
                    other => other.map_err(|error| gone(&error))?,
                }
            }
        }
        Ok(())
    }

    /// Serves the VM's faults until nothing is owed any more; any number of threads may.
    pub(super) fn serve_faults(&self) -> Result<(), TargetError> {
        self.clock.stand(Place::InFront);
        let mut pages = Vec::new();
        while !self.is_over() {
            self.faults.next(&mut pages, TICK).map_err(|error| gone(&error))?;
            for &page in &pages {
                let block = self.block(page);
                let page = block.first.0;
                if self.is_here(block) {
                    self.map(block)?;
                    self.map_around(page)?;
                    continue;
                }
                let now = self.clock.now();
                let is_first = match unpoisoned(&self.asked).since.entry(page) {
                    Entry::Vacant(place) => {
                        place.insert(now);
                        true
                    }
                    Entry::Occupied(_) => false,
                };
                // It may have come between the look and the note.
                if self.is_here(block) {
                    self.map(block)?;
                    unpoisoned(&self.asked).since.remove(&page);
                } else if is_first {
                    self.ask(page);
                }
            }
        }
        Ok(())
    }

    /// Maps what earlier rounds brought, ahead of the guest, until all is mapped or nobody serves any more. Zeros without memory are left out. Half of its time it stands aside: the
    /// guest, its faults and the streams want the processors, too.
    pub(super) fn map_ahead(&self) -> Result<(), TargetError> {
        while !self.is_over() && !self.runs.load(Ordering::Acquire) {
            let seen = self.changed.rings();
            if !self.runs.load(Ordering::Acquire) {
                self.clock.wait(&self.changed, seen, TICK);
            }
        }
        if self.is_fresh {
            return Ok(());
        }
        let mut took = Duration::ZERO;
        for window in self.region.spec().pages.windows(MAP_PAGES) {
            if self.is_over() {
                break;
            }
            self.clock.sleep(took);
            let began = self.clock.now();
            self.map_window(window)?;
            took = self.clock.now().saturating_sub(began);
        }
        Ok(())
    }

    /// Maps what is here of a window.
    fn map_window(&self, window: PageRun) -> Result<(), TargetError> {
        if self.faults.block_pages() > 1 {
            // It is one block.
            return if self.is_here(window) { self.map_if_in_memory(window) } else { Ok(()) };
        }
        for data in self.region.data_within(window) {
            let mut start = data.first.0;
            while start < data.end() {
                let is_here = self.present().is_set(start);
                let end =
                    (start..data.end()).find(|&page| self.present().is_set(page) != is_here).unwrap_or(data.end());
                if is_here {
                    self.map_if_in_memory(PageRun::new(start, (end - start) as u32))?;
                }
                start = end;
            }
        }
        Ok(())
    }

    /// Maps what earlier rounds brought next to a page, among the 64 that share a word of marks: whoever touched that one will soon touch those.
    fn map_around(&self, page: u64) -> Result<(), TargetError> {
        if self.is_fresh || self.faults.block_pages() > 1 {
            return Ok(());
        }
        let (here, at) = (self.present().word(page), page % 64);
        let below = (here << (63 - at)).leading_ones().saturating_sub(1);
        let above = (here >> at).trailing_ones().saturating_sub(1);
        self.map_if_in_memory(PageRun::new(page + 1, above))?;
        self.map_if_in_memory(PageRun::new(page - u64::from(below), below))
    }

    fn map_if_in_memory(&self, run: PageRun) -> Result<(), TargetError> {
        match self.faults.map(run) {
            Ok(()) | Err(FaultError::NotThere) => Ok(()),
            Err(error) => Err(gone(&error)),
        }
    }

    /// How long the VM waited for pages that it asked for.
    pub(super) fn waits(&self) -> WaitReport {
        let mut took = std::mem::take(&mut unpoisoned(&self.asked).took_ns);
        WaitReport::of(&mut took)
    }
}

fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those parts of a run that are `mine`.
fn runs_of(run: PageRun, mine: &[bool]) -> impl Iterator<Item = PageRun> {
    let mut at = run.first.0;
    mine.chunk_by(|one, next| one == next).filter_map(move |part| {
        let part_run = PageRun::new(at, part.len() as u32);
        at = part_run.end();
        part[0].then_some(part_run)
    })
}

fn copy(to: BytesView<'_>, from: BytesView<'_>) {
    for (to, from) in to.iter().zip(from) {
        to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

fn gone(error: &FaultError) -> TargetError {
    TargetError::Faults(error.to_string())
}

/// The pages of `words` (little-endian, one bit a page), if they are of a region of `pages`.
pub(super) fn owed_pages(words: &[u8], pages: crate::model::PageCount) -> Result<PageBitmap, LinkError> {
    let wrong = || LinkError::Protocol("what is owed does not fit the memory".to_owned());
    let mut owed = PageBitmap::new(pages);
    if words.len() != owed.words().len() * 8 {
        return Err(wrong());
    }
    for (index, word) in words.chunks_exact(8).enumerate() {
        let word = u64::from_le_bytes(std::array::from_fn(|byte| word[byte]));
        let pages = pages.0 - index as u64 * 64;
        if pages < 64 && word >> pages != 0 {
            return Err(wrong());
        }
        owed.or_word(index, word);
    }
    Ok(owed)
}

/// As [`owed_pages`] takes them.
pub(super) fn owed_words(owed: &PageBitmap) -> Vec<u8> {
    owed.words().iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The only region that there is.
pub(super) fn check_run(region: &dyn Region, id: RegionId, run: PageRun) -> Result<(), LinkError> {
    let spec = region.spec();
    if id == spec.id && run.fits(spec.pages) {
        Ok(())
    } else {
        Err(LinkError::Protocol(format!("{run:?} of {id:?} lies outside of {:?}", spec.pages)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::owed_testing::{Caught, Memory, Recorder, Script, Still, bits};
    use crate::model::{Packing, PageCount};

    const PAGES: u64 = 200;

    #[test]
    fn what_comes_twice_overwrites_nothing_and_is_counted_once() {
        let (memory, faults, clock) = (Memory::of(PAGES), Arc::new(Caught::of(PAGES)), Still);
        let owed =
            Owed::new(&memory, faults.clone(), &clock, &bits(PAGES, &[3, 4, 5, 9]), Box::new(Recorder::default()));
        owed.take_pages(PageRun::new(4, 1), &mut Script::filled(7), &mut || true).unwrap();
        // The guest writes it; then it comes again, with a neighbour, and one that was here before the VM was.
        memory.fill(PageRun::new(4, 1), 99);
        owed.take_pages(PageRun::new(3, 4), &mut Script::filled(8), &mut || true).unwrap();
        assert_eq!([2, 3, 4, 5, 6].map(|page| memory.byte(page)), [0, 8, 99, 8, 0]);
        assert_eq!((owed.left(), faults.mapped()), (1, vec![3, 4, 5]));
        owed.take_zeros(PageRun::new(8, 3)).unwrap();
        assert_eq!((owed.left(), faults.mapped()), (0, vec![3, 4, 5]), "zeros get memory when they are touched");
    }

    #[test]
    fn a_page_is_asked_for_once_and_one_that_is_here_is_mapped_with_its_neighbours() {
        let (memory, faults, clock) = (Memory::of(PAGES), Arc::new(Caught::of(PAGES)), Still);
        let asked = Recorder::default();
        let owed = Owed::new(&memory, faults.clone(), &clock, &bits(PAGES, &[3, 4, 97, 103]), Box::new(asked.clone()));
        faults.happen(&[3, 3, 100, 128]);
        faults.then_stop();
        assert!(matches!(owed.serve_faults(), Err(TargetError::Faults(_))), "the machine has ended");
        let near: Vec<u64> = (98..103).chain(128..192).collect();
        assert_eq!((asked.wants(), faults.mapped()), (vec![3], near), "no page that is missing, nor any beyond one");
        owed.take_zeros(PageRun::new(3, 1)).unwrap();
        assert_eq!((owed.waits().count, faults.mapped()[0]), (1, 3), "who waits for a zero gets it at once");
    }

    #[test]
    fn where_nothing_was_sent_before_memory_is_empty_and_nothing_is_mapped_ahead() {
        let (memory, faults, clock) = (Memory::of(PAGES), Arc::new(Caught::of(PAGES)), Still);
        memory.fill(PageRun::new(0, PAGES as u32), 7);
        let owing = bits(PAGES, &[3, 9]);
        let owed = Owed::new(&memory, faults.clone(), &clock, &owing, Box::new(Recorder::default())).onto_nothing();
        assert_eq!([0, 3, 199].map(|page| memory.byte(page)), [0, 0, 0]);
        owed.take_pages(PageRun::new(3, 1), &mut Script::filled(8), &mut || true).unwrap();
        owed.take_zeros(PageRun::new(9, 1)).unwrap();
        owed.runs();
        owed.map_ahead().unwrap();
        assert_eq!((owed.left(), memory.byte(3), faults.mapped()), (0, 8, vec![3]));
    }

    /// Sends nothing until it is let.
    struct Held {
        entered: std::sync::mpsc::Sender<()>,
        go_on: std::sync::mpsc::Receiver<()>,
        asked: Recorder,
    }

    impl BulkSender for Held {
        fn start_round(&mut self, round: u32, digested: bool) -> Result<u64, LinkError> {
            self.asked.start_round(round, digested)
        }

        fn pages(&mut self, id: RegionId, run: PageRun, bytes: BytesView<'_>) -> Result<u64, LinkError> {
            self.asked.pages(id, run, bytes)
        }

        fn copied(&mut self, id: RegionId, run: PageRun, bytes: &[u8]) -> Result<u64, LinkError> {
            self.asked.copied(id, run, bytes)
        }

        fn packed(&mut self, id: RegionId, run: PageRun, how: Packing, bytes: &[u8]) -> Result<u64, LinkError> {
            self.asked.packed(id, run, how, bytes)
        }

        fn zeros(&mut self, id: RegionId, run: PageRun) -> Result<u64, LinkError> {
            self.asked.zeros(id, run)
        }

        fn end_round(&mut self, round: u32) -> Result<u64, LinkError> {
            self.asked.end_round(round)
        }

        fn want(&mut self, id: RegionId, run: PageRun) -> Result<u64, LinkError> {
            self.entered.send(()).unwrap();
            match self.go_on.recv() {
                Ok(()) => self.asked.want(id, run),
                Err(_) => Err(LinkError::Protocol("cut".to_owned())),
            }
        }

        fn flush(&mut self) -> Result<(), LinkError> {
            Ok(())
        }

        fn answers(&mut self) -> Result<Box<dyn BulkReceiver>, LinkError> {
            self.asked.answers()
        }
    }

    #[test]
    fn who_finds_the_stream_taken_is_not_forgotten() {
        let (memory, faults, clock) = (Memory::of(PAGES), Arc::new(Caught::of(PAGES)), Still);
        let (asked, (entered, seen), (go, go_on)) =
            (Recorder::default(), std::sync::mpsc::channel(), std::sync::mpsc::channel());
        let held = Held { entered, go_on, asked: asked.clone() };
        let owed = Owed::new(&memory, faults, &clock, &bits(PAGES, &[3, 4, 5]), Box::new(held));
        std::thread::scope(|scope| {
            scope.spawn(|| owed.ask(3));
            seen.recv().unwrap();
            owed.ask(4);
            owed.ask(5);
            (0..3).for_each(|_| go.send(()).unwrap());
        });
        assert_eq!(asked.wants(), [3, 4, 5]);
        assert!(matches!(unpoisoned(&owed.requests).way, Way::Free(_)));
    }

    #[test]
    fn a_stream_that_was_lost_meanwhile_is_let_go() {
        let (memory, faults, clock) = (Memory::of(PAGES), Arc::new(Caught::of(PAGES)), Still);
        let (asked, (entered, seen), (go, go_on)) =
            (Recorder::default(), std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
        let held = Held { entered, go_on, asked: Recorder::default() };
        let owed = Owed::new(&memory, faults, &clock, &bits(PAGES, &[3, 4]), Box::new(held));
        std::thread::scope(|scope| {
            scope.spawn(|| owed.ask(3));
            seen.recv().unwrap();
            owed.ask(4);
            owed.lose_way();
            owed.find_way(Box::new(asked.clone())).unwrap();
            // Its error comes when there is another way already.
            drop(go);
        });
        owed.ask(5);
        assert_eq!((asked.wants(), owed.is_cut()), (vec![5], false));
    }

    #[test]
    fn several_threads_ask_for_every_page_once() {
        let (memory, faults, clock) = (Memory::of(PAGES), Arc::new(Caught::of(PAGES)), Still);
        let (asked, all) = (Recorder::default(), (0..PAGES).collect::<Vec<_>>());
        let owed = Owed::new(&memory, faults.clone(), &clock, &bits(PAGES, &all), Box::new(asked.clone()));
        std::thread::scope(|scope| {
            let handlers: Vec<_> = (0..4).map(|_| scope.spawn(|| owed.serve_faults())).collect();
            for &page in &all {
                faults.happen(&[page, page]);
            }
            faults.then_stop();
            assert!(handlers.into_iter().all(|handler| handler.join().unwrap().is_err()), "the machine has ended");
        });
        let mut wants = asked.wants();
        wants.sort_unstable();
        assert_eq!(wants, all);
    }

    #[test]
    fn a_block_is_asked_for_whole_and_mapped_when_its_last_page_has_come() {
        const BLOCK: u64 = 128;
        let (memory, faults, clock) = (Memory::of(BLOCK * 3), Arc::new(Caught::in_blocks(BLOCK * 3, BLOCK)), Still);
        let mut owing = PageBitmap::new(PageCount(BLOCK * 3));
        for page in [3, 4, 63, 140] {
            owing.insert(page);
        }
        let asked = Recorder::default();
        let owed = Owed::new(&memory, faults.clone(), &clock, &owing, Box::new(asked.clone()));
        faults.happen(&[5, 0, 2 * BLOCK + 2]);
        faults.then_stop();
        assert!(owed.serve_faults().is_err(), "the machine has ended");
        assert_eq!(asked.wants(), (0..BLOCK).collect::<Vec<_>>());
        let third: Vec<u64> = (2 * BLOCK..3 * BLOCK).collect();
        assert_eq!(faults.mapped(), third, "what is here whole is mapped at once");
        owed.take_pages(PageRun::new(63, 1), &mut Script::filled(7), &mut || true).unwrap();
        owed.take_zeros(PageRun::new(3, 1)).unwrap();
        assert_eq!((faults.mapped(), owed.waits().count), (third.clone(), 0), "one page of it is missing");
        // What another stream brings twice overwrites nothing, and is not what is waited for.
        owed.take_pages(PageRun::new(63, 1), &mut Script::filled(8), &mut || true).unwrap();
        owed.take_pages(PageRun::new(4, 1), &mut Script::filled(9), &mut || true).unwrap();
        let both: Vec<u64> = (0..BLOCK).chain(third).collect();
        assert_eq!((faults.mapped(), owed.waits().count, owed.left()), (both, 1, 1));
        assert_eq!([3, 4, 63].map(|page| memory.byte(page)), [0, 9, 7]);
    }

    #[test]
    fn what_is_owed_is_as_large_as_memory() {
        let pages = PageCount(PAGES);
        let owed = bits(PAGES, &[0, 63, 64, 199]);
        assert_eq!(owed_pages(&owed_words(&owed), pages).unwrap().words(), owed.words());
        assert!(owed_pages(&[0; 24], pages).is_err() && owed_pages(&[0; 40], pages).is_err());
        assert!(owed_pages(&[0xff; 32], pages).is_err(), "bits behind the last page");
    }
}

//! The source's part of post-copy: pages of a VM that runs elsewhere, sent as it asks for them and, in between, around what it asked for last.
//!
//! Each page is sent once: whoever sends it takes it first. Requests have a stream of their own, which never queues behind the push. The push goes on from the latest request in
//! both directions, a run up, a run down (pre-paging: Hines, Deshpande, Gopalan, "Post-Copy Live Migration of Virtual Machines", SIGOPS OSR 43(3), 2009).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::observe::Observer;
use super::owed::{GUEST_FIRST, check_run};
use super::pacer::{Pacer, kernel_pace};
use super::pieces::{Holes, pieces};
use super::source::SourceError;
use super::zeros::zero_bits;
use crate::model::{PAGE_SIZE, PageBitmap, PageRun, PostCopyReport};
use crate::port::{Bell, BulkItem, BulkReceiver, BulkSender, Clock, LinkError, Place, Region};

/// What a run of the push may take at the rate so far.
const RUN_TIME: Duration = Duration::from_millis(1);
/// How often a push that waits looks whether it may go on.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The shortest run that the push is cut to, in pages.
const SHORTEST_RUN: u32 = 8;
/// The longest run of what lies around pages that go first: a millisecond at 1 Gbit/s.
const NEAR_RUN: u32 = 32;

/// How long at most that the VM goes on is waited for, from the handover.
const UNTIL_IT_RUNS: Duration = Duration::from_millis(100);
/// While the guest goes first so many runs follow each request: up and down.
const RUNS_AROUND: u64 = 2;
/// What lies around pages that go first follows them: blocks of so many pages, and how many blocks (2 MiB, as much as goes first at most).
pub(super) const BLOCK: u64 = 64;
const MOST_BLOCKS: usize = 8;

/// What nobody has sent yet, and where the push goes on: all of it lies from `up` on, or below `down`.
#[derive(Debug)]
struct Unsent {
    pages: PageBitmap,
    /// Blocks around what goes first, the next one last.
    near: Vec<u64>,
    /// The next page upwards, and one above the next downwards.
    up: u64,
    down: u64,
    goes_down: bool,
}

impl Unsent {
    fn take(&mut self, run: PageRun) -> PageRun {
        run.indices().for_each(|page| self.pages.remove(page));
        run
    }

    /// Takes what of `run` nobody has sent; the push goes on around it.
    fn take_asked(&mut self, run: PageRun) -> Vec<PageRun> {
        (self.up, self.down, self.goes_down) = (run.end(), run.first.0, false);
        let asked: Vec<PageRun> = self.pages.runs_within(run.first.0, run.end(), u32::MAX).collect();
        asked.into_iter().map(|run| self.take(run)).collect()
    }

    /// Takes the next run of what lies around the pages that go first, of at most `longest` pages.
    fn take_near(&mut self, longest: u32) -> Option<PageRun> {
        while let Some(block) = self.near.last() {
            let run = self.pages.runs_within(block * BLOCK, (block + 1) * BLOCK, longest).next();
            if let Some(run) = run {
                return Some(self.take(run));
            }
            self.near.pop();
        }
        None
    }

    /// Takes the next run of the push, of at most `longest` pages.
    fn take_next(&mut self, longest: u32) -> Option<PageRun> {
        let up = || self.pages.runs_within(self.up, self.pages.len().0, longest).next();
        let run = if self.goes_down { self.below(longest).or_else(up) } else { up().or_else(|| self.below(longest)) }?;
        if run.first.0 < self.down {
            self.down = run.first.0;
        } else {
            self.up = run.end();
        }
        self.goes_down = !self.goes_down;
        Some(self.take(run))
    }

    /// The last run below `down`.
    fn below(&self, longest: u32) -> Option<PageRun> {
        let words = self.pages.words().get(..(self.down.div_ceil(64)) as usize)?;
        let (index, bits) = words.iter().enumerate().rev().find_map(|(index, &word)| {
            let end = self.down - index as u64 * 64;
            let bits = if end < 64 { word & !(u64::MAX << end) } else { word };
            (bits != 0).then_some((index as u64, bits))
        })?;
        let last = index * 64 + 63 - u64::from(bits.leading_zeros());
        let least = (last + 1).saturating_sub(longest.into());
        let first = (least..last).rev().take_while(|&page| self.pages.contains(page)).last().unwrap_or(last);
        Some(PageRun::new(first, (last + 1 - first) as u32))
    }
}

/// Pages that are owed to a VM at its target.
pub(super) struct Push<'a> {
    region: &'a dyn Region,
    pacer: &'a Pacer<'a>,
    clock: &'a dyn Clock,
    observer: &'a dyn Observer,
    /// The owed phase's number on the streams.
    round: u32,
    longest_run: u32,
    began: Duration,
    unsent: Mutex<Unsent>,
    /// What goes first.
    first: Mutex<Vec<u64>>,
    /// Until then (nanoseconds) what is left only follows requests: [`RUNS_AROUND`] runs each, of which so many were taken.
    follows_until: AtomicU64,
    followed: AtomicU64,
    /// Rung when that may have changed.
    may_go_on: Bell,
    due: u64,
    over: AtomicBool,
    sent: AtomicU64,
    zero: AtomicU64,
    asked: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
    failure: Mutex<Option<SourceError>>,
}

impl<'a> Push<'a> {
    pub(super) fn new(
        region: &'a dyn Region,
        pacer: &'a Pacer<'a>,
        clock: &'a dyn Clock,
        observer: &'a dyn Observer,
        (round, longest_run): (u32, u32),
        owed: &PageBitmap,
    ) -> Self {
        Self {
            region,
            pacer,
            clock,
            observer,
            round,
            longest_run,
            began: clock.now(),
            unsent: Mutex::new(Unsent { pages: owed.clone(), near: Vec::new(), up: 0, down: 0, goes_down: false }),
            first: Mutex::default(),
            follows_until: AtomicU64::new(0),
            followed: AtomicU64::new(0),
            may_go_on: Bell::default(),
            due: owed.count().0,
            over: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            failure: Mutex::new(None),
        }
    }

    /// The push of a VM that is being handed over, which goes first: [`GUEST_FIRST`].
    pub(super) fn of_handover(self) -> Self {
        self.lets_guest_go_first_until(self.began + UNTIL_IT_RUNS);
        self
    }

    /// The VM that is being handed over runs.
    pub(super) fn guest_runs(&self) {
        self.lets_guest_go_first_until(self.clock.now() + GUEST_FIRST);
        self.may_go_on.ring();
    }

    fn lets_guest_go_first_until(&self, until: Duration) {
        self.follows_until.store(until.as_nanos() as u64, Ordering::Release);
    }

    /// What limits it.
    pub(super) fn pacer(&self) -> &'a Pacer<'a> {
        self.pacer
    }

    /// These pages go first, the last of them before the others; what lies around them is next.
    pub(super) fn put_first(&self, pages: &[u64]) {
        let mut unsent = self.unsent();
        let len = unsent.pages.len().0;
        unsent.near = blocks_around(pages);
        let pages = pages.iter().copied().filter(|&page| page < len);
        *self.first.lock().unwrap_or_else(PoisonError::into_inner) = pages.collect();
    }

    /// Takes the next of the pages that go first, if nobody has sent it yet: who asks for one of them need not wait for the others.
    fn next_first(&self) -> Option<PageRun> {
        loop {
            let page = self.first.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            let mut unsent = self.unsent();
            if unsent.pages.contains(page) {
                return Some(unsent.take(PageRun::new(page, 1)));
            }
        }
    }

    /// Nobody is to send any more.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Release);
        self.may_go_on.ring();
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Why a stream has failed.
    pub(super) fn failure(&self) -> Option<SourceError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn fail(&self, error: SourceError) {
        if !self.is_over() {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    fn unsent(&self) -> MutexGuard<'_, Unsent> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest run of the push: what the guest touches while it is on its way it waits for until all of it is there.
    fn run_pages(&self) -> u32 {
        let seconds = self.clock.now().saturating_sub(self.began).as_secs_f64();
        let rate = self.bytes.load(Ordering::Relaxed) as f64 / seconds.max(1e-6);
        let pages = rate * RUN_TIME.as_secs_f64() / PAGE_SIZE as f64;
        (pages as u32).clamp(SHORTEST_RUN, self.longest_run.max(SHORTEST_RUN))
    }

    /// Waits while the VM goes first, unless it has asked for something around which nobody has gone on yet.
    fn let_guest_go_first(&self) {
        while !self.is_over() {
            let seen = self.may_go_on.rings();
            let until = Duration::from_nanos(self.follows_until.load(Ordering::Acquire));
            let left = until.saturating_sub(self.clock.now());
            let may = self.requests.load(Ordering::Relaxed) * RUNS_AROUND;
            let take = |taken| (taken < may).then_some(taken + 1);
            if left.is_zero() || self.followed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
                return;
            }
            self.clock.wait(&self.may_go_on, seen, left);
        }
    }

    /// Takes the next run of the push, once it may go.
    fn next_run(&self) -> Option<PageRun> {
        if let Some(run) = self.next_first() {
            return Some(run);
        }
        while self.pacer.waits_until_asked() && !self.is_over() && self.left() > 0 {
            self.clock.sleep(LOOK_EVERY);
        }
        self.pacer.await_turn();
        let near = self.unsent().take_near(NEAR_RUN.min(self.longest_run.max(SHORTEST_RUN)));
        if near.is_some() {
            return near;
        }
        self.let_guest_go_first();
        self.unsent().take_next(self.run_pages())
    }

    /// How many pages nobody has sent yet.
    fn left(&self) -> u64 {
        self.unsent().pages.count().0
    }

    /// Sends a run that was taken.
    fn send(&self, run: PageRun, stream: &mut dyn BulkSender) -> Result<(), LinkError> {
        let id = self.region.spec().id;
        pieces(
            self.region,
            run,
            Holes::Asked,
            || run.count,
            zero_bits,
            |part, is_zero| -> Result<(), LinkError> {
                let bytes = if is_zero {
                    self.zero.fetch_add(part.count.into(), Ordering::Relaxed);
                    stream.zeros(id, part)?
                } else {
                    // What was taken is sent at once: the guest may be waiting for it. The push waits for its turn before it takes anything.
                    self.pacer.ahead(part.byte_len() as u64);
                    stream.pages(id, part, self.region.bytes(part))?
                };
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            },
        )?;
        let sent = self.sent.fetch_add(run.count.into(), Ordering::Relaxed) + u64::from(run.count);
        self.observer.progress(self.round, sent, self.due);
        Ok(())
    }

    /// Pushes over one stream until nothing is unsent.
    pub(super) fn push(&self, stream: &mut dyn BulkSender) {
        let mut work = || -> Result<(), LinkError> {
            stream.start_round(self.round, true)?;
            let mut paced = None;
            while !self.is_over()
                && let Some(run) = self.next_run()
            {
                let limit = self.pacer.limit();
                if paced != Some(limit) {
                    paced = Some(limit);
                    stream.pace(kernel_pace(limit, 1));
                }
                self.send(run, stream)?;
                stream.flush()?;
            }
            stream.end_round(self.round)?;
            Ok(())
        };
        if let Err(error) = work() {
            self.fail(error.into());
        }
    }

    /// Answers requests over the stream that is theirs, until nobody asks any more.
    pub(super) fn answer(&self, stream: &mut dyn BulkSender, requests: &mut dyn BulkReceiver) {
        self.clock.stand(Place::InFront);
        let mut work = || -> Result<(), LinkError> {
            // What the guest waits for is held back by nobody.
            stream.pace(None);
            stream.start_round(self.round, true)?;
            stream.flush()?;
            loop {
                let item = match requests.next(&mut || !self.is_over()) {
                    Ok(item) => item,
                    Err(_) if self.is_over() => return Ok(()),
                    Err(error) => return Err(error),
                };
                let BulkItem::Want(id, run) = item else {
                    return Err(LinkError::Protocol(format!("{item:?} among requests")));
                };
                check_run(self.region, id, run)?;
                self.requests.fetch_add(1, Ordering::Relaxed);
                // What is not among them is on its way already.
                let asked = self.unsent().take_asked(run);
                for run in asked {
                    self.asked.fetch_add(run.count.into(), Ordering::Relaxed);
                    self.send(run, stream)?;
                }
                stream.flush()?;
                self.may_go_on.ring();
            }
        };
        if let Err(error) = work() {
            self.fail(error.into());
        }
    }

    /// What was sent.
    pub(super) fn report(&self) -> PostCopyReport {
        PostCopyReport {
            owed_pages: self.due,
            sent_pages: self.sent.load(Ordering::Relaxed),
            zero_pages: self.zero.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            asked_pages: self.asked.load(Ordering::Relaxed),
            wire_bytes: self.bytes.load(Ordering::Relaxed),
            ..PostCopyReport::default()
        }
    }
}

/// The blocks in which the last of some pages lie, that of the last page last.
pub(super) fn blocks_around(pages: &[u64]) -> Vec<u64> {
    let mut blocks = Vec::new();
    for block in pages.iter().rev().map(|page| page / BLOCK) {
        if blocks.len() < MOST_BLOCKS && !blocks.contains(&block) {
            blocks.push(block);
        }
    }
    blocks.reverse();
    blocks
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::migrate::observe::Quiet;
    use crate::migrate::owed_testing::{Memory, Recorder, Script, Still};
    use crate::migrate::pacer::Pace;

    const PAGES: u64 = 300;

    /// A clock that only waiting for a bell moves.
    #[derive(Default)]
    struct Waits(AtomicU64);

    impl Clock for Waits {
        fn now(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::Relaxed))
        }

        fn sleep(&self, _: Duration) {}

        fn wait(&self, _: &Bell, _: u64, timeout: Duration) {
            self.0.fetch_add(timeout.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    /// Everything that two push streams and one for requests send, by page, how often; `asked` are requests.
    fn sent(owed: &PageBitmap, asked: &[u64]) -> (BTreeMap<u64, u32>, PostCopyReport) {
        let (memory, clock) = (Memory::of(PAGES), Still);
        let pacer = Pacer::new(&clock, Pace::default());
        let push = Push::new(&memory, &pacer, &clock, &Quiet, (1, 64), owed);
        push.put_first(&asked.iter().map(|page| page * 2).collect::<Vec<_>>());
        let mut streams = [Recorder::default(), Recorder::default(), Recorder::default()];
        std::thread::scope(|scope| {
            let [urgent, first, second] = &mut streams;
            let push = &push;
            let wants = asked.iter().map(|&page| BulkItem::Want(memory.spec().id, PageRun::new(page, 1))).collect();
            scope.spawn(move || push.answer(urgent, &mut Script::of(wants)));
            scope.spawn(move || push.push(first));
            scope.spawn(move || push.push(second));
        });
        let mut counts = BTreeMap::new();
        for run in streams.iter().flat_map(|stream| &stream.sent) {
            run.indices().for_each(|page| *counts.entry(page).or_insert(0) += 1);
        }
        (counts, push.report())
    }

    proptest! {
        /// Whoever sends it, and whenever it is asked for.
        #[test]
        fn each_page_that_is_owed_is_sent_once_and_no_other(
            pages in prop::collection::btree_set(0..PAGES, 0..200), asked in prop::collection::vec(0..PAGES, 0..50),
        ) {
            let mut owed = PageBitmap::new(crate::model::PageCount(PAGES));
            for &page in &pages {
                owed.insert(page);
            }
            let (counts, report) = sent(&owed, &asked);
            prop_assert_eq!(counts, pages.iter().map(|&page| (page, 1)).collect::<BTreeMap<_, _>>());
            prop_assert_eq!((report.owed_pages, report.sent_pages), (pages.len() as u64, pages.len() as u64));
        }
    }

    #[test]
    fn the_push_goes_on_around_what_was_asked_for_last() {
        let (memory, clock) = (Memory::of(PAGES), Still);
        let pacer = Pacer::new(&clock, Pace::default());
        let push =
            Push::new(&memory, &pacer, &clock, &Quiet, (1, 8), &PageBitmap::full(crate::model::PageCount(PAGES)));
        assert_eq!(push.next_run(), Some(PageRun::new(0, 8)));
        push.answer(
            &mut Recorder::default(),
            &mut Script::of(vec![BulkItem::Want(memory.spec().id, PageRun::new(100, 1))]),
        );
        let next: Vec<_> = (0..4).filter_map(|_| push.next_run()).collect();
        assert_eq!(next, [PageRun::new(101, 8), PageRun::new(92, 8), PageRun::new(109, 8), PageRun::new(84, 8)]);
    }

    /// A handover is followed by what goes first, what lies around that, and what lies around requests; the rest waits.
    #[test]
    fn while_the_guest_goes_first_only_what_it_is_likely_to_touch_follows() {
        let (memory, clock) = (Memory::of(PAGES), Waits::default());
        let pacer = Pacer::new(&clock, Pace::default());
        let owed = PageBitmap::full(crate::model::PageCount(PAGES));
        let push = Push::new(&memory, &pacer, &clock, &Quiet, (1, 8), &owed).of_handover();
        push.put_first(&[295, 290]);
        push.answer(
            &mut Recorder::default(),
            &mut Script::of(vec![BulkItem::Want(memory.spec().id, PageRun::new(100, 1))]),
        );
        let next: Vec<_> = (0..4).filter_map(|_| push.next_run()).collect();
        let run = PageRun::new;
        assert_eq!(next, [run(290, 1), run(295, 1), run(256, 8), run(264, 8)]);
        let next: Vec<_> = (0..8).filter_map(|_| push.next_run()).collect();
        assert_eq!(next[2..6], [run(288, 2), run(291, 4), run(296, 4), run(101, 8)], "{next:?}");
        assert_eq!(next[6..7], [run(92, 8)]);
        assert_eq!((clock.now(), next[7]), (UNTIL_IT_RUNS, run(109, 8)), "that it runs was not heard");
        push.guest_runs();
        for next in [84, 117, 76] {
            assert_eq!(push.next_run(), Some(run(next, 8)));
            assert_eq!(clock.now(), UNTIL_IT_RUNS + GUEST_FIRST, "the first waits, from then on nothing does");
        }
    }

    #[test]
    fn what_lies_around_pages_are_the_blocks_of_the_last_ones() {
        let near = blocks_around(&(0..20).map(|block| block * BLOCK + 5).collect::<Vec<_>>());
        let pages = PageBitmap::full(crate::model::PageCount(19 * BLOCK + 12));
        let mut unsent = Unsent { pages, near, up: 0, down: 0, goes_down: false };
        let found: Vec<_> = std::iter::from_fn(|| unsent.take_near(8)).collect();
        assert_eq!(found.len(), (MOST_BLOCKS - 1) * 8 + 2);
        assert_eq!(found[..2], [PageRun::new(19 * BLOCK, 8), PageRun::new(19 * BLOCK + 8, 4)]);
        assert_eq!(found[found.len() - 1], PageRun::new(12 * BLOCK + 56, 8));
    }

    #[test]
    fn a_request_beyond_memory_ends_it_with_an_error() {
        let (memory, clock) = (Memory::of(PAGES), Still);
        let pacer = Pacer::new(&clock, Pace::default());
        let push =
            Push::new(&memory, &pacer, &clock, &Quiet, (1, 8), &PageBitmap::full(crate::model::PageCount(PAGES)));
        for bad in [BulkItem::Want(memory.spec().id, PageRun::new(PAGES, 1)), BulkItem::EndRound(1)] {
            push.answer(&mut Recorder::default(), &mut Script::of(vec![bad]));
            assert!(matches!(push.failure(), Some(SourceError::Link(LinkError::Protocol(_)))));
        }
    }
}

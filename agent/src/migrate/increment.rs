//! Increments of a VM that runs on loan: what it has written since the one before, cut while it stands for a moment, carried back to the source, and taken in there as one.
//!
//! Owns the pages at both ends. Must not know leases, nor who orders an increment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::bytes::copy_out;
use super::digest::{copy_digest, run_digest, zeros_digest};
use super::message::Increment;
use super::owed::check_run;
use super::source::SourceError;
use crate::model::{PAGE_SIZE, PageBitmap, PageCount, PageRun};
use crate::port::{Bell, BulkItem, BulkReceiver, BulkSender, Clock, LinkError, MachineError, Region};

/// Pages of an increment that are copied while the VM stands (64 MiB). If it has written more, it stands until what is too much has been sent: so little memory is enough for any writer.
const COPIED_PAGES: u64 = 16 << 10;
/// Pages sent before the sender looks around: what it owes others meanwhile must not wait.
const PIECE_PAGES: u32 = 64;

/// An increment at the target, from when it was cut until it is sent.
#[derive(Default)]
pub(super) struct Flight {
    number: u32,
    /// What is copied, and how much of it is sent.
    runs: Vec<PageRun>,
    sent_runs: usize,
    /// The bytes of `runs`. Kept for the next: memory that is there costs the VM no time.
    copies: Vec<u8>,
    sent_bytes: usize,
    state: Vec<u8>,
    pages: u64,
    digest: u64,
    began: bool,
}

impl Flight {
    /// Begins increment `number` of the VM, which stands: `state`, and `pages` of `region`.
    ///
    /// # Errors
    /// What is too much to be copied cannot be sent over `stream`.
    pub(super) fn cut(
        &mut self,
        number: u32,
        region: &dyn Region,
        pages: &PageBitmap,
        state: Vec<u8>,
        stream: &mut dyn BulkSender,
    ) -> Result<(), LinkError> {
        self.runs.clear();
        (self.number, self.state, self.pages, self.digest) = (number, state, pages.count().0, 0);
        (self.sent_runs, self.sent_bytes, self.began) = (0, 0, false);
        let mut at = 0;
        let mut too_much = Vec::new();
        for run in pages.runs(PIECE_PAGES) {
            if (at / PAGE_SIZE) as u64 + u64::from(run.count) > COPIED_PAGES {
                too_much.push(run);
                continue;
            }
            let end = at + run.byte_len();
            if self.copies.len() < end {
                self.copies.resize(end, 0);
            }
            copy_out(region.bytes(run), &mut self.copies[at..end]);
            self.runs.push(run);
            at = end;
        }
        if !too_much.is_empty() {
            self.begin(stream)?;
        }
        for run in too_much {
            let bytes = region.bytes(run);
            self.digest = self.digest.wrapping_add(run_digest(run, bytes));
            stream.pages(region.spec().id, run, bytes)?;
        }
        Ok(())
    }

    fn begin(&mut self, stream: &mut dyn BulkSender) -> Result<(), LinkError> {
        if !self.began {
            self.began = true;
            stream.start_round(self.number, true)?;
        }
        Ok(())
    }

    /// Sends some of it. Its end, once all is sent.
    ///
    /// # Errors
    /// The link.
    pub(super) fn send_some(
        &mut self,
        region: &dyn Region,
        stream: &mut dyn BulkSender,
    ) -> Result<Option<Increment>, LinkError> {
        self.begin(stream)?;
        if let Some(&run) = self.runs.get(self.sent_runs) {
            let end = self.sent_bytes + run.byte_len();
            let copy = &self.copies[self.sent_bytes..end];
            self.digest = self.digest.wrapping_add(copy_digest(run, copy));
            stream.copied(region.spec().id, run, copy)?;
            (self.sent_runs, self.sent_bytes) = (self.sent_runs + 1, end);
            return Ok(None);
        }
        stream.end_round(self.number)?;
        stream.flush()?;
        Ok(Some(Increment {
            number: self.number,
            state: std::mem::take(&mut self.state),
            pages: self.pages,
            digest: self.digest,
            stood_ns: 0,
            safe_ns: 0,
        }))
    }
}

/// The source's end: pages of the next increment come into staging memory, where nobody looks at them before all are there.
pub(super) struct Gathering<'a> {
    staging: &'a dyn Region,
    gathered: Mutex<Gathered>,
    over: AtomicBool,
    /// Rung when an increment's pages are complete, and when nothing comes any more.
    pub(super) changed: Bell,
}

struct Gathered {
    /// Whose pages these are; 0 before the first.
    number: u32,
    pages: PageBitmap,
    count: u64,
    digest: u64,
    wire_bytes: u64,
    is_complete: bool,
    failure: Option<SourceError>,
}

impl<'a> Gathering<'a> {
    pub(super) fn new(staging: &'a dyn Region) -> Self {
        let pages = staging.spec().pages;
        let gathered = Gathered::of(0, pages);
        Self { staging, gathered: Mutex::new(gathered), over: AtomicBool::new(false), changed: Bell::default() }
    }

    fn gathered(&self) -> MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody wants any more.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// Why nothing comes any more.
    pub(super) fn failure(&self) -> Option<SourceError> {
        self.gathered().failure.take()
    }

    /// Takes what comes, until nobody wants it any more.
    pub(super) fn gather(&self, receiver: &mut dyn BulkReceiver) {
        let is_over = || self.over.load(Ordering::Acquire);
        while !is_over() {
            if let Err(error) = self.take(receiver) {
                if !is_over() {
                    self.gathered().failure = Some(error.into());
                }
                break;
            }
        }
        self.changed.ring();
    }

    fn take(&self, receiver: &mut dyn BulkReceiver) -> Result<(), LinkError> {
        let keep = &mut || !self.over.load(Ordering::Acquire);
        let early = |what: &str| LinkError::Protocol(format!("{what} at the wrong time among increments"));
        match receiver.next(keep)? {
            BulkItem::StartRound { round, .. } => {
                let mut gathered = self.gathered();
                if gathered.is_complete || round <= gathered.number {
                    return Err(early("the start of an increment"));
                }
                *gathered = Gathered::of(round, self.staging.spec().pages);
            }
            BulkItem::Pages(region, run) => {
                check_run(self.staging, region, run)?;
                if self.gathered().is_complete {
                    return Err(early("pages"));
                }
                let bytes = self.staging.bytes(run);
                receiver.read_into(bytes, keep)?;
                self.gathered().add(run, run_digest(run, bytes), run.byte_len() as u64);
            }
            BulkItem::Zeros(region, run) => {
                check_run(self.staging, region, run)?;
                if self.gathered().is_complete {
                    return Err(early("pages"));
                }
                self.staging.zero(run);
                self.gathered().add(run, zeros_digest(run), 0);
            }
            BulkItem::EndRound(round) => {
                let mut gathered = self.gathered();
                if gathered.is_complete || round != gathered.number {
                    return Err(early("the end of an increment"));
                }
                gathered.is_complete = true;
                drop(gathered);
                self.changed.ring();
            }
            other => return Err(LinkError::Protocol(format!("{other:?} among increments"))),
        }
        Ok(())
    }

    /// If the pages of `end` are complete and what it says: has the VM here advance to it, by `advance`. How many bytes came for them. `None`: they are not there yet.
    ///
    /// # Errors
    /// They are not what `end` says, or could not be taken in; nothing has changed.
    pub(super) fn take_in(
        &self,
        end: &Increment,
        advance: impl FnOnce(&PageBitmap, &[u8]) -> Result<(), MachineError>,
    ) -> Result<Option<u64>, SourceError> {
        let mut gathered = self.gathered();
        if !gathered.is_complete {
            return Ok(None);
        }
        if (gathered.number, gathered.count, gathered.digest) != (end.number, end.pages, end.digest) {
            let what = format!(
                "increment {} is of {} pages, digest {:016x}; what came is increment {} of {} pages, digest {:016x}",
                end.number, end.pages, end.digest, gathered.number, gathered.count, gathered.digest
            );
            return Err(LinkError::Protocol(what).into());
        }
        // Taken out meanwhile: what waits for a machine must not hold a lock.
        let pages = std::mem::replace(&mut gathered.pages, PageBitmap::new(PageCount(0)));
        let bytes = gathered.wire_bytes;
        drop(gathered);
        advance(&pages, &end.state)?;
        self.gathered().is_complete = false;
        Ok(Some(bytes))
    }

    /// Waits until pages are complete, or nothing comes any more.
    pub(super) fn await_change(&self, clock: &dyn Clock, timeout: Duration) {
        let seen = self.changed.rings();
        let settled = {
            let gathered = self.gathered();
            gathered.is_complete || gathered.failure.is_some()
        };
        if !settled {
            clock.wait(&self.changed, seen, timeout);
        }
    }
}

impl Gathered {
    fn of(number: u32, pages: PageCount) -> Self {
        let pages = PageBitmap::new(pages);
        Self { number, pages, count: 0, digest: 0, wire_bytes: 0, is_complete: false, failure: None }
    }

    fn add(&mut self, run: PageRun, digest: u64, bytes: u64) {
        self.pages.insert_run(run);
        self.count += u64::from(run.count);
        self.digest = self.digest.wrapping_add(digest);
        self.wire_bytes += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::owed_testing::{Memory, Recorder, Script, bits};
    use crate::model::RegionId;

    const PAGES: u64 = 300;

    /// What the VM writes behind the cut is no part of it.
    #[test]
    fn an_increment_is_what_memory_held_when_it_was_cut() {
        let memory = Memory::of(PAGES);
        memory.fill(PageRun::new(0, 300), 7);
        let (mut flight, mut stream) = (Flight::default(), Recorder::default());
        let digest = |value: u8| {
            [3, 64, 65]
                .map(|page| copy_digest(PageRun::new(page, 1), &[value; PAGE_SIZE]))
                .into_iter()
                .fold(0, u64::wrapping_add)
        };
        flight.cut(4, &memory, &bits(PAGES, &[3, 64, 65]), vec![1, 2], &mut stream).unwrap();
        memory.fill(PageRun::new(0, 300), 9);
        let end = loop {
            if let Some(end) = flight.send_some(&memory, &mut stream).unwrap() {
                break end;
            }
        };
        assert_eq!((end.number, end.state, end.pages, end.digest), (4, vec![1, 2], 3, digest(7)));
        assert_eq!(stream.sent, [PageRun::new(3, 1), PageRun::new(64, 2)]);
    }

    fn end(number: u32, pages: u64, digest: u64) -> Increment {
        Increment { number, state: vec![5], pages, digest, stood_ns: 0, safe_ns: 0 }
    }

    #[test]
    fn only_what_is_complete_and_as_it_was_sent_is_taken_in() {
        let staging = Memory::of(PAGES);
        let gathering = Gathering::new(&staging);
        let taken = |end: &Increment| {
            let mut got = None;
            let done = gathering.take_in(end, |pages, state| {
                got = Some((pages.count().0, state.to_vec()));
                Ok(())
            });
            done.map(|_| got).map_err(|error| error.to_string())
        };
        let start = BulkItem::StartRound { round: 2, digested: true };
        let pages = BulkItem::Pages(RegionId::RAM, PageRun::new(8, 2));
        gathering.gather(&mut Script::of(vec![start, pages]));
        let digest = staging_digest(&staging, &[8, 9]);
        assert_eq!(taken(&end(2, 2, digest)), Ok(None), "it has not ended");
        gathering.gather(&mut Script::of(vec![BulkItem::EndRound(2)]));
        assert!(taken(&end(2, 2, digest + 1)).is_err() && taken(&end(3, 2, digest)).is_err());
        assert_eq!(taken(&end(2, 2, digest)), Ok(Some((2, vec![5]))));
        assert_eq!(taken(&end(2, 2, digest)), Ok(None), "and once");
    }

    fn staging_digest(staging: &Memory, pages: &[u64]) -> u64 {
        let digest = |&page: &u64| {
            let run = PageRun::new(page, 1);
            run_digest(run, staging.bytes(run))
        };
        pages.iter().map(digest).fold(0, u64::wrapping_add)
    }

    #[test]
    fn what_a_target_must_not_send_ends_it() {
        let start = |round| BulkItem::StartRound { round, digested: true };
        let outside = BulkItem::Pages(RegionId::RAM, PageRun::new(PAGES, 1));
        let inside = BulkItem::Zeros(RegionId::RAM, PageRun::new(0, 1));
        for items in [
            vec![start(0)],
            vec![start(1), outside],
            vec![start(1), BulkItem::EndRound(2)],
            vec![start(1), BulkItem::EndRound(1), start(2)],
            vec![start(1), BulkItem::EndRound(1), inside],
            vec![start(2), start(1)],
            vec![BulkItem::Want(RegionId::RAM, PageRun::new(0, 1))],
        ] {
            let staging = Memory::of(PAGES);
            let gathering = Gathering::new(&staging);
            gathering.gather(&mut Script::of(items.clone()));
            let failure = gathering.failure();
            assert!(matches!(failure, Some(SourceError::Link(LinkError::Protocol(_)))), "{items:?}: {failure:?}");
        }
    }
}

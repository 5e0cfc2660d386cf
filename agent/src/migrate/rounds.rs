//! Sends one round of pages over all streams.
//!
//! Streams draw windows of memory from a common counter. Rounds are barriers (the source waits for the target's word
//! that a round has arrived), so a page may travel on another stream in the next round.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::digest::{run_digest, zeros_digest};
use super::meter::Meter;
use super::observe::{CancelFlag, Observer};
use super::order::Order;
use super::pacer::{Pacer, kernel_pace};
use super::pieces::{Holes, pieces};
use super::reduce::{Gain, Outlet, Reducing};
use super::source::SourceError;
use super::steward::{LOOK_EVERY, Sent};
use super::zeros::zero_bits;
use crate::model::{BytesPerSecond, PAGE_SIZE, PageBitmap, PageCount, PageRun};
use crate::port::{Bell, BulkSender, Clock, Job, Machine, Place, Region};

/// The most pages that one stream takes at a time, and that are protected with one order: 32 MiB.
const WINDOW_PAGES: u64 = 8192;
/// The fewest: an order costs some tens of microseconds.
const LEAST_WINDOW_PAGES: u64 = 256;
/// How many a round begins with, before anything is known of the link.
const FIRST_WINDOW_PAGES: u64 = 2048;
/// How long sending what one stream has taken should last: what is written between being protected and being sent is sent twice.
const WINDOW_TIME: Duration = Duration::from_millis(50);
/// Pages in one write to the stream: 2 MiB.
const LONGEST_RUN: u32 = 512;

/// What a round has come to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) wire_bytes: u64,
    pub(super) digest: u64,
    /// CPU time that looking for zeros took.
    pub(super) scanned: Duration,
    /// What leaving out free pages came to.
    pub(super) free: Gain,
    /// When the last of it had been written to its stream, by the clock.
    pub(super) sent_at: Duration,
}

/// The paused machine's state, and when it was complete, by the clock.
pub(super) struct Saved {
    pub(super) state: Vec<u8>,
    pub(super) at: Duration,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.wire_bytes += other.wire_bytes;
        self.digest = self.digest.wrapping_add(other.digest);
        self.scanned += other.scanned;
        self.free.add(other.free);
        self.sent_at = self.sent_at.max(other.sent_at);
    }
}

/// One round as it is to be sent.
pub(super) struct Round<'a> {
    pub(super) number: u32,
    /// The VM is paused: hash what is sent, and protect nothing.
    pub(super) last: bool,
    pub(super) region: &'a dyn Region,
    pub(super) due: &'a PageBitmap,
    /// What would be due as well, but that the guest does not use it: the target has zeros there from now on.
    pub(super) free: &'a PageBitmap,
    /// The order in which it goes.
    pub(super) order: &'a Order,
    /// Whether pages of zeros go as a mark.
    pub(super) marks_zeros: bool,
    pub(super) pacer: &'a Pacer<'a>,
    pub(super) clock: &'a dyn Clock,
    pub(super) observer: &'a dyn Observer,
    pub(super) cancel: &'a CancelFlag,
    /// Streams that share the bandwidth limit.
    pub(super) streams: u16,
    /// What of it has been sent.
    pub(super) sent: &'a Sent,
}

/// The page streams, and what each does so that fewer bytes travel.
pub(super) type Lanes<'a> = (&'a mut [Box<dyn BulkSender>], &'a mut [Reducing]);

/// What looks at the writers while a round is sent.
type Look<'a> = &'a mut (dyn FnMut() + Send);

/// The longest run for a bandwidth limit: of all streams together at most 20 ms worth, which is how long the end of a round waits for those that
/// are being paced when one has failed or somebody cancels.
pub(super) fn longest_run(limit: Option<BytesPerSecond>, streams: u16) -> u32 {
    let pages = |limit: BytesPerSecond| limit.0 / 50 / u64::from(streams.max(1)) / PAGE_SIZE as u64;
    limit.map_or(LONGEST_RUN, |limit| pages(limit).clamp(1, u64::from(LONGEST_RUN)) as u32)
}

/// How many pages to take after a window of `pages` that took so long.
fn next_window_pages(pages: u64, took: Duration) -> u64 {
    let next = if took > WINDOW_TIME {
        (pages as f64 * WINDOW_TIME.as_secs_f64() / took.as_secs_f64()) as u64
    } else if took < WINDOW_TIME / 2 {
        pages * 2
    } else {
        pages
    };
    // KVM is asked about groups of 64.
    (next / 64 * 64).clamp(LEAST_WINDOW_PAGES, WINDOW_PAGES)
}

impl Round<'_> {
    /// Sends the round over all streams: the last on the calling thread, each other on a thread of its own.
    pub(super) fn send(&self, machine: &Mutex<&mut dyn Machine>, lanes: Lanes<'_>) -> Result<Tally, SourceError> {
        self.send_beside(machine, lanes, None, None)
    }

    /// The same; `look` is called every [`LOOK_EVERY`] until the last page is sent.
    pub(super) fn send_watched(
        &self,
        machine: &Mutex<&mut dyn Machine>,
        lanes: Lanes<'_>,
        look: Look<'_>,
    ) -> Result<Tally, SourceError> {
        self.send_beside(machine, lanes, None, Some(look))
    }

    /// Sends the last round, and saves the paused machine's state beside it.
    pub(super) fn send_and_save(
        &self,
        machine: &Mutex<&mut dyn Machine>,
        lanes: Lanes<'_>,
    ) -> Result<(Tally, Saved), SourceError> {
        let mut saved = None;
        let save = || saved = Some(self.save(machine));
        let tally = self.send_beside(machine, lanes, Some(Box::new(save)), None)?;
        Ok((tally, saved.ok_or(SourceError::Cancelled)??))
    }

    /// Saves the paused machine's state.
    pub(super) fn save(&self, machine: &Mutex<&mut dyn Machine>) -> Result<Saved, SourceError> {
        let state = machine.lock().unwrap_or_else(PoisonError::into_inner).save_state()?;
        Ok(Saved { state, at: self.clock.now() })
    }

    /// Sends the round over all streams beside `lead`; without one the calling thread serves the last stream.
    fn send_beside(
        &self,
        machine: &Mutex<&mut dyn Machine>,
        (streams, reducing): Lanes<'_>,
        lead: Option<Job<'_>>,
        look: Option<Look<'_>>,
    ) -> Result<Tally, SourceError> {
        let (sending, ended) = (AtomicUsize::new(streams.len()), Bell::default());
        let next_window = AtomicU64::new(0);
        let sent = AtomicU64::new(0);
        let send = |stream: &mut Box<dyn BulkSender>, reducing: &mut Reducing| {
            let share = self.send_share(&next_window, &sent, machine, (stream.as_mut(), reducing));
            if share.is_err() {
                // The round has failed: the others need not send what is left of it.
                next_window.store(self.due.len().0, Ordering::Relaxed);
            }
            share
        };
        let mut shares: Vec<Result<Tally, SourceError>> = streams.iter().map(|_| Ok(Tally::default())).collect();
        let send = &send;
        {
            let mut jobs: Vec<Job<'_>> = Vec::new();
            let (sending, ended) = (&sending, &ended);
            if let Some(look) = look {
                jobs.push(Box::new(move || {
                    loop {
                        let seen = ended.rings();
                        if sending.load(Ordering::Acquire) == 0 {
                            break;
                        }
                        self.clock.wait(ended, seen, LOOK_EVERY);
                        look();
                    }
                }));
            }
            for ((stream, reducing), share) in streams.iter_mut().zip(reducing).zip(&mut shares) {
                jobs.push(Box::new(move || {
                    // Once the VM stands it waits for this.
                    if self.last {
                        self.clock.stand(Place::InFront);
                    }
                    *share = send(stream, reducing);
                    // The last of them may be the calling thread's.
                    self.clock.stand(Place::Among);
                    sending.fetch_sub(1, Ordering::Release);
                    ended.ring();
                }));
            }
            if let Some(lead) = lead.or_else(|| jobs.pop()) {
                self.clock.run_beside(jobs, lead);
            }
        }
        let mut total = Tally::default();
        for share in shares {
            total.add(&share?);
        }
        Ok(total)
    }

    /// The longest run that one write may carry at present.
    fn longest_run(&self) -> u32 {
        longest_run(self.pacer.limit(), self.streams)
    }

    fn send_share(
        &self,
        next_window: &AtomicU64,
        sent: &AtomicU64,
        machine: &Mutex<&mut dyn Machine>,
        (stream, reducing): (&mut dyn BulkSender, &mut Reducing),
    ) -> Result<Tally, SourceError> {
        let due_pages = self.due.count().0;
        let all_pages = self.due.len().0;
        let (mut pages, mut paced) = (FIRST_WINDOW_PAGES, None);
        let mut tally = Tally { wire_bytes: stream.start_round(self.number, self.last)?, ..Tally::default() };
        let (mut scan, mut freeing) = (Meter::default(), Meter::default());
        reducing.begin_round(self.number, self.due);
        reducing.free(self.free);
        loop {
            let first = next_window.fetch_add(pages, Ordering::Relaxed);
            if self.cancel.is_set() {
                return Err(SourceError::Cancelled);
            }
            if first >= all_pages {
                break;
            }
            let limit = self.pacer.limit();
            if paced != Some(limit) {
                paced = Some(limit);
                stream.pace(kernel_pace(limit, self.streams));
            }
            let (before, began) = (tally.pages, self.clock.now());
            for window in self.order.pages(first, pages) {
                freeing.time(self.clock, 1, || self.leave_out(window, (stream, reducing), &mut tally))?;
                if self.due.runs_within(window.first.0, window.end(), u32::MAX).next().is_none() {
                    continue;
                }
                if !self.last {
                    let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
                    machine.protect(self.region.spec().id, window)?;
                }
                self.send_window(window, (stream, reducing), &mut scan, &mut tally)?;
            }
            if tally.pages == before {
                continue;
            }
            let sent = sent.fetch_add(tally.pages - before, Ordering::Relaxed);
            pages = next_window_pages(pages, self.clock.now().saturating_sub(began));
            self.observer.progress(self.number, sent, due_pages);
        }
        tally.scanned = scan.total();
        tally.free.cpu = freeing.total();
        tally.wire_bytes += stream.end_round(self.number)?;
        tally.sent_at = self.clock.now();
        Ok(tally)
    }

    /// Tells the target what is free of one window: an earlier round may have brought it something else.
    fn leave_out(
        &self,
        window: PageRun,
        (stream, reducing): (&mut dyn BulkSender, &mut Reducing),
        tally: &mut Tally,
    ) -> Result<(), SourceError> {
        for run in self.free.runs_within(window.first.0, window.end(), u32::MAX) {
            tally.wire_bytes += stream.zeros(self.region.spec().id, run)?;
            reducing.zeros(run);
            // What was never written would not have been sent either.
            let held: u64 = self.region.data_within(run).iter().map(|part| u64::from(part.count)).sum();
            tally.free.pages += u64::from(run.count);
            tally.free.saved_bytes += PageCount(held).bytes();
        }
        Ok(())
    }

    /// Sends what is due of one window.
    fn send_window(
        &self,
        window: PageRun,
        (stream, reducing): (&mut dyn BulkSender, &mut Reducing),
        scan: &mut Meter,
        tally: &mut Tally,
    ) -> Result<(), SourceError> {
        // From the second round on what is due was written: only the first one meets holes worth asking for.
        let holes = match (self.marks_zeros, self.number) {
            (false, _) => Holes::Filled,
            (true, 1) => Holes::Asked,
            (true, _) => Holes::Ignored,
        };
        for run in self.due.runs_within(window.first.0, window.end(), u32::MAX) {
            tally.pages += u64::from(run.count);
            pieces(
                self.region,
                run,
                holes,
                || self.longest_run(),
                |bytes| scan.time(self.clock, (bytes.len() / PAGE_SIZE) as u64, || zero_bits(bytes)),
                |piece, is_zero| self.send_piece(piece, is_zero, (stream, reducing), tally),
            )?;
        }
        Ok(())
    }

    fn send_piece(
        &self,
        run: PageRun,
        is_zero: bool,
        (stream, reducing): (&mut dyn BulkSender, &mut Reducing),
        tally: &mut Tally,
    ) -> Result<(), SourceError> {
        if self.cancel.is_set() {
            return Err(SourceError::Cancelled);
        }
        let count = u64::from(run.count);
        if is_zero {
            tally.wire_bytes += stream.zeros(self.region.spec().id, run)?;
            reducing.zeros(run);
            tally.zero_pages += count;
            self.sent.add(count, count);
            if self.last {
                tally.digest = tally.digest.wrapping_add(zeros_digest(run));
            }
            return Ok(());
        }
        let outlet = Outlet { region: self.region, pacer: self.pacer, clock: self.clock };
        tally.wire_bytes += reducing.send(run, stream, &outlet)?;
        self.sent.add(count, 0);
        if self.last {
            tally.digest = tally.digest.wrapping_add(run_digest(run, self.region.bytes(run)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_last_for_a_while_on_any_link() {
        let ms = Duration::from_millis;
        // 1 Gbit/s over two streams: 15 259 pages a second each.
        let mut pages = FIRST_WINDOW_PAGES;
        for _ in 0..5 {
            pages = next_window_pages(pages, ms(pages * 1000 / 15_259));
        }
        assert!((640..=768).contains(&pages), "{pages}");
        assert_eq!(next_window_pages(WINDOW_PAGES, ms(1)), WINDOW_PAGES);
        assert_eq!(next_window_pages(2048, ms(1)), 4096);
        assert_eq!(next_window_pages(256, ms(100_000)), LEAST_WINDOW_PAGES);
        assert_eq!(next_window_pages(512, ms(30)), 512);
    }

    #[test]
    fn all_streams_together_wait_for_20_ms_at_most() {
        let limit = BytesPerSecond(40_000_000);
        for streams in [1, 2, 8, 64] {
            let all = u64::from(longest_run(Some(limit), streams)) * u64::from(streams) * PAGE_SIZE as u64;
            assert!(limit.time_for(all) <= Duration::from_millis(20), "{streams} streams");
        }
        assert_eq!((longest_run(Some(BytesPerSecond(1)), 64), longest_run(None, 64)), (1, LONGEST_RUN));
        assert_eq!(longest_run(Some(BytesPerSecond(u64::MAX)), 1), LONGEST_RUN);
    }
}

//! What the guest can do without: before the first round it is squeezed, and before a round that takes its time it is asked which of its pages are free.
//!
//! A free page is left out of a round only if its writes were logged before the guest was asked: whatever the guest does with it from then on is due in the next round. The target is told that
//! it has zeros there, since an earlier round may have brought what the page held then. The asking is over before the round begins, and so before the last harvest.

use std::time::Duration;

use super::{PINGS, Progress, Source, SourceError, Way};
use crate::model::units::display_bytes;
use crate::model::{BytesPerSecond, PageBitmap, PageCount, PageRun, SqueezeReport};
use crate::port::MachineError;

/// The longest that a guest is waited for to name its free pages: Linux names some gigabytes in that.
const LONGEST_ASKING: Duration = Duration::from_millis(250);
/// Asking for less than this is not worth it.
const SHORTEST_ASKING: Duration = Duration::from_millis(5);
/// The part of the time that a round is expected to take for which the guest is waited for.
const ASKING_SHARE: u32 = 10;
/// Pages that are protected with one order: 32 MiB.
const PROTECT_PAGES: u32 = 8192;
/// Runs of pages that are named to the machine at most.
const MOST_RUNS: usize = 1 << 16;
/// How long a guest that gives up memory is waited for before everything else is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often it is told how far the guest is.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// How long to wait for the guest's answer before so many pages are sent; `None`: it is not to be asked. Nothing is known of the link before the first round, which is the longest.
fn patience(due: PageCount, goodput: BytesPerSecond) -> Option<Duration> {
    if goodput == BytesPerSecond(0) {
        return Some(LONGEST_ASKING);
    }
    let patience = (goodput.time_for(due.bytes()) / ASKING_SHARE).min(LONGEST_ASKING);
    (patience >= SHORTEST_ASKING).then_some(patience)
}

impl Way<'_> {
    /// Everything that is due is sent.
    pub(super) fn leave_out_none(&mut self) {
        self.free.clear();
        self.left_out.subtract(&self.due);
    }

    /// What of it is `named` is not sent: the target is told that it has zeros there.
    fn leave_out(&mut self, named: &PageBitmap) {
        self.leave_out_none();
        self.free = self.due.both(named);
        self.due.subtract(&self.free);
        self.left_out.union(&self.free);
    }
}

impl Source<'_> {
    /// Takes out of what is due what the guest says it does not use.
    pub(super) fn leave_out_free(&mut self, progress: &mut Progress, way: &mut Way<'_>) -> Result<(), SourceError> {
        way.leave_out_none();
        if !self.options.reducers.free_pages || !progress.spared.may_ask() {
            return Ok(());
        }
        let Some(patience) = patience(way.due.count(), progress.goodput) else { return Ok(()) };
        self.protect_due(&way.due)?;
        let mut named = PageBitmap::new(way.due.len());
        match self.machine.name_free_pages(&mut named, patience) {
            Ok(()) => way.leave_out(&named),
            Err(MachineError::Refused { reason, .. }) => {
                tracing::warn!(vm = %self.shape.name, migration = %self.id, "free pages are sent like others: {reason}");
                progress.spared.cannot_ask(reason);
            }
            Err(gone) => return Err(gone.into()),
        }
        // The rest is protected again right before it is sent: what is written until then goes with it. Of what is too scattered to be named, that is sent once more.
        let rest: Vec<PageRun> = way.due.runs(u32::MAX).take(MOST_RUNS).collect();
        Ok(self.machine.disregard(self.region.spec().id, &rest)?)
    }

    /// Logs writes to everything that is due.
    fn protect_due(&mut self, due: &PageBitmap) -> Result<(), SourceError> {
        for run in due.len().windows(PROTECT_PAGES) {
            if due.runs_within(run.first.0, run.end(), 1).next().is_some() {
                self.machine.protect(self.region.spec().id, run)?;
            }
        }
        Ok(())
    }

    /// Has the guest give up memory, if that was asked for: what it used it for, its cache above all, need not be sent. Goes on with what was got when the time for it is over.
    pub(super) fn squeeze_guest(&mut self, progress: &mut Progress, way: &Way<'_>) -> Result<(), SourceError> {
        let Some(wanted) = self.options.squeeze_to else { return Ok(()) };
        let began = self.clock.now();
        let mut report = SqueezeReport { asked_bytes: wanted.bytes(), ..SqueezeReport::default() };
        match self.squeeze(progress, way, wanted, &mut report) {
            Ok(()) => {}
            Err(SourceError::Machine(MachineError::Refused { reason, .. })) => report.reason = reason,
            Err(error) => return Err(error),
        }
        report.duration_ns = self.clock.now().saturating_sub(began).as_nanos() as u64;
        report.spared_bytes = report.before_bytes.saturating_sub(report.after_bytes);
        report.spared_pages = PageCount::covering(report.spared_bytes).0;
        if !report.reason.is_empty() {
            tracing::warn!(vm = %self.shape.name, migration = %self.id, "the guest gave up less than asked: {}", report.reason);
        }
        self.observer.step(progress.step, &describe(&report));
        progress.squeeze = Some(report);
        Ok(())
    }

    fn squeeze(
        &mut self,
        progress: &Progress,
        way: &Way<'_>,
        wanted: PageCount,
        report: &mut SqueezeReport,
    ) -> Result<(), SourceError> {
        let began = self.clock.now();
        let had = self.machine.guest_pages(Duration::ZERO)?;
        (report.before_bytes, report.after_bytes) = (had.bytes(), had.bytes());
        if had <= wanted {
            return Ok(());
        }
        self.machine.squeeze_guest(wanted)?;
        let (mut told_at, mut number) = (began, PINGS);
        loop {
            let has = self.machine.guest_pages(LOOK_EVERY)?;
            report.after_bytes = has.bytes();
            let now = self.clock.now();
            if has <= wanted {
                return Ok(());
            }
            if now.saturating_sub(began) >= self.options.squeeze_limit {
                report.reason = format!("it did not follow within {:?}", self.options.squeeze_limit);
                return Ok(());
            }
            if now.saturating_sub(told_at) >= TELL_EVERY {
                told_at = now;
                self.observer.step(progress.step, &describe(report));
            }
            // The target is to know that somebody is here; cancelling is looked at, too.
            number = number.wrapping_add(1);
            self.ping(way.control.as_ref(), number, self.options.stall)?;
        }
    }
}

/// How far the guest is, for an event.
fn describe(report: &SqueezeReport) -> String {
    let [before, after, asked] = [report.before_bytes, report.after_bytes, report.asked_bytes].map(display_bytes);
    let why = if report.reason.is_empty() { String::new() } else { format!(": {}", report.reason) };
    format!("the guest had {before}, has {after}, and is to have {asked}{why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rounds_that_take_their_time_are_asked_for() {
        let gigabit = BytesPerSecond(125_000_000);
        let of_round = |ms: u64| PageCount(gigabit.0 * ms / 1000 / 4096);
        assert_eq!(patience(PageCount(1), BytesPerSecond(0)), Some(LONGEST_ASKING));
        assert_eq!(patience(of_round(40), gigabit), None);
        assert_eq!(patience(of_round(100_000), gigabit), Some(LONGEST_ASKING));
        let second = patience(of_round(1000), gigabit).unwrap();
        assert!((Duration::from_millis(99)..=Duration::from_millis(100)).contains(&second), "{second:?}");
        assert_eq!(patience(PageCount(u64::MAX >> 20), BytesPerSecond(1)), Some(LONGEST_ASKING));
    }
}

//! The source of a VM that runs at its target before its memory is there: hands it over, and sends what is owed through as many connections as that takes.
//!
//! From `running` on the VM is the target's, and its missing pages are only here: whatever fails, they are kept until the target has said that it has all.

use std::sync::Arc;
use std::time::Duration;

use super::lending::{Lending, Lent};
use super::{PAUSED_STALL, PINGS, Progress, Source, SourceError, TICK, Way, peers_reason, unexpected};
use crate::migrate::increment::Gathering;
use crate::migrate::message::{ControlMessage, Handed};
use crate::migrate::options::{Safety, Strategy};
use crate::migrate::owed::{LOOK_PAGES, owed_pages, owed_words};
use crate::migrate::pacer::Pacer;
use crate::migrate::protect::protect_all;
use crate::migrate::push::{BLOCK, Push, blocks_around};
use crate::migrate::rounds::longest_run;
use crate::model::{
    BlackoutLedger, BlackoutPhase, Ending, MigrationReport, PageBitmap, PostCopyReport, Step, WaitReport,
};
use crate::port::{BulkReceiver, BulkSender, Job, LinkError, Region};

/// How often a target that is owed pages is asked whether it is there.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// What comes over new streams counts as their first round.
pub(super) const FIRST_ROUND: u32 = 1;

/// What of the VM is still here when it runs at the target.
#[derive(Clone, Copy)]
pub(super) enum Rest<'p> {
    /// Nothing.
    None,
    /// These pages, which are being pushed.
    Pushed(&'p Push<'p>),
    /// The target knows.
    AskTarget,
}

impl Source<'_> {
    /// The VM moves before its memory has. Up to `released` everything can be undone.
    pub(super) fn move_owing(&mut self, progress: &mut Progress, mut way: Way<'_>) -> (Ending, String) {
        if self.options.strategy == Strategy::DemandPaging {
            self.pace.wait_until_asked();
        }
        let handed = self.way_for_increments(&mut way).and_then(|safe| {
            if progress.rounds.is_empty() {
                self.owe_only_data(progress, &mut way.due)?;
            }
            // Of demand-paging nothing follows that is not asked for.
            let pure = self.options.strategy == Strategy::DemandPaging;
            let mut first = if pure { Vec::new() } else { self.hot_pages(&mut way.due)? };
            if !pure && progress.rounds.is_empty() {
                self.send_ahead(progress, &mut way, &first)?;
            }
            let (requests, essential) = self.hand_owing(progress, &mut way)?;
            // The last of them goes first.
            first.retain(|page| !essential.contains(page));
            first.extend(essential);
            Ok(((requests, first), safe))
        });
        let ((requests, first), safe) = match handed {
            Ok(handed) => handed,
            Err(error) => return self.roll_back(progress, &error),
        };
        let round = progress.rounds.len() as u32;
        let pacer = Pacer::for_push(self.clock, self.pace.clone());
        let push = self.push_of(round + 1, &pacer, &way.due).of_handover();
        push.put_first(&first);
        let control = Arc::clone(&way.control);
        let patience = self.options.stall.min(PAUSED_STALL);
        let Some((safety, increments, staging)) = safe else {
            return self.beside_push(&push, &mut way.streams, requests, None, |source| {
                match source.await_prepared(progress, control.as_ref(), round, patience) {
                    Ok(ledger) => source.hand_over(progress, ledger, Rest::Pushed(&push)),
                    Err(error) => source.roll_back(progress, &error),
                }
            });
        };
        let gathering = Gathering::new(staging.as_ref());
        let mut lending = Lending::new(safety, self.clock.now());
        let back = Some((&gathering, increments));
        let lent = self.beside_push(&push, &mut way.streams, requests, back, |source| {
            match source.await_prepared(progress, control.as_ref(), round, patience) {
                Ok(ledger) => source.lend(progress, ledger, (&push, &gathering), &mut lending),
                Err(error) => Lent::Settled(source.roll_back(progress, &error)),
            }
        });
        self.follow_loan(progress, lent, &mut lending, &pacer)
    }

    /// Where nothing was sent yet what holds no data is not owed: the target's memory is as empty. What gets some from now on the log tells.
    fn owe_only_data(&mut self, progress: &mut Progress, due: &mut PageBitmap) -> Result<(), SourceError> {
        if !progress.logs {
            self.start_log(progress)?;
        }
        protect_all(self.machine, self.region)?;
        due.clear();
        for window in self.region.spec().pages.windows(LOOK_PAGES) {
            self.region.data_within(window).into_iter().for_each(|data| due.insert_run(data));
        }
        Ok(())
    }

    /// Sends what lies around the pages that the VM writes most, as a round while it still runs here: most of what it touches first where it goes on is there by then, and has memory. What
    /// it writes meanwhile follows it like all else.
    fn send_ahead(&mut self, progress: &mut Progress, way: &mut Way<'_>, hot: &[u64]) -> Result<(), SourceError> {
        let mut ahead = PageBitmap::new(way.due.len());
        for block in blocks_around(hot) {
            way.due.runs_within(block * BLOCK, (block + 1) * BLOCK, u32::MAX).for_each(|run| ahead.insert_run(run));
        }
        if ahead.is_empty() {
            return Ok(());
        }
        let mut later = std::mem::replace(&mut way.due, ahead);
        later.subtract(&way.due);
        self.round_of_due(progress, way)?;
        way.due.union(&later);
        Ok(())
    }

    /// Where increments come in, and where their pages are gathered, if the VM is to be kept safe.
    fn way_for_increments(&mut self, way: &mut Way<'_>) -> Result<Option<SafeWay>, SourceError> {
        match self.options.safety {
            Some(safety) => Ok(Some((safety, increments(&mut way.streams)?, self.machine.staging()?))),
            None => Ok(None),
        }
    }

    /// What sends the pages that are `due` to a VM that runs, as the streams' round of that number.
    pub(super) fn push_of<'p>(&self, round: u32, pacer: &'p Pacer<'p>, due: &PageBitmap) -> Push<'p>
    where
        Self: 'p,
    {
        let run = longest_run(self.pace.limit(), self.options.streams);
        Push::new(self.region, pacer, self.clock, self.observer, (round, run), due)
    }

    /// Does `work` while pages are pushed, requests answered and increments gathered; then nobody does any more.
    pub(super) fn beside_push<R: Send>(
        &mut self,
        push: &Push<'_>,
        streams: &mut [Box<dyn BulkSender>],
        mut requests: Box<dyn BulkReceiver>,
        back: Option<(&Gathering<'_>, Box<dyn BulkReceiver>)>,
        work: impl FnOnce(&mut Self) -> R + Send,
    ) -> R {
        let mut jobs: Vec<Job<'_>> = Vec::new();
        let last = streams.len().saturating_sub(1);
        for (index, stream) in streams.iter_mut().enumerate() {
            if index < last {
                jobs.push(Box::new(move || push.push(stream.as_mut())));
            } else {
                let requests = requests.as_mut();
                jobs.push(Box::new(move || push.answer(stream.as_mut(), requests)));
                break;
            }
        }
        let mut gathering = None;
        if let Some((gathers, mut increments)) = back {
            gathering = Some(gathers);
            jobs.push(Box::new(move || gathers.gather(increments.as_mut())));
        }
        let (clock, mut result) = (self.clock, None);
        let lead = || {
            result = Some(work(self));
            push.stop();
            if let Some(gathering) = gathering {
                gathering.stop();
            }
        };
        clock.run_beside(jobs, Box::new(lead));
        match result {
            Some(result) => result,
            None => unreachable!("the lead has returned"),
        }
    }

    /// Pauses the VM and sends its state and which pages are to follow. Returns where requests for them come in, and the pages that it cannot do without.
    fn hand_owing(
        &mut self,
        progress: &mut Progress,
        way: &mut Way<'_>,
    ) -> Result<(Box<dyn BulkReceiver>, Vec<u64>), SourceError> {
        let requests = answers(&mut way.streams)?;
        let control = Arc::clone(&way.control);
        let tell = |message: &ControlMessage| {
            control.send(message).map_err(|error| peers_reason(control.as_ref(), error.into()))
        };
        tell(&match self.options.safety {
            None => ControlMessage::PostCopy,
            Some(Safety { lease, every }) => {
                ControlMessage::SafePostCopy { lease_ms: lease.as_millis() as u64, every_ms: every.as_millis() as u64 }
            }
        })?;
        match self.expect(way.control.as_ref(), self.options.stall, "the target's catching of faults")? {
            ControlMessage::FaultsCaught => {}
            other => return Err(unexpected(&other, "faults-caught")),
        }
        let mut lap = self.pause(progress, way)?;
        let state = self.machine.save_state()?;
        let essential = self.machine.essential_pages()?;
        progress.ledger.add(BlackoutPhase::SaveState, lap.next());
        progress.state_bytes = state.len() as u64;
        progress.handed = true;
        tell(&ControlMessage::Owing(owed_words(&way.due)))?;
        let round = progress.rounds.len() as u32;
        let handed = Handed { state, round, digest: 0, chunk_hashes: Vec::new() };
        tell(&ControlMessage::Handed(Box::new(handed)))?;
        self.pass(progress, Step::StateMoved, &format!("{} pages are owed", way.due.count().0));
        Ok((requests, essential))
    }

    /// The VM runs at the target: sends it what is still here, dialling anew as often as contact is lost.
    ///
    /// # Errors
    /// For as long as a target in doubt is dialled nobody has answered; nothing is lost.
    pub(super) fn send_the_rest(&mut self, progress: &mut Progress, rest: Rest<'_>) -> Result<(), SourceError> {
        let began = self.clock.now();
        let result = match rest {
            Rest::None => return Ok(()),
            Rest::AskTarget => {
                let pacer = Pacer::for_push(self.clock, self.pace.clone());
                self.dial_and_send(progress, &pacer, false)
            }
            Rest::Pushed(push) => match self.await_complete(push) {
                Ok(waits) => {
                    note(progress, push.report(), waits);
                    Ok(())
                }
                Err(error) => {
                    push.stop();
                    note(progress, push.report(), WaitReport::default());
                    if matches!(error, SourceError::PeerCancelled(_)) {
                        Err(error)
                    } else {
                        let what = format!("contact is lost while pages are owed: {error}");
                        tracing::warn!(vm = %self.shape.name, migration = %self.id, "{what}");
                        self.observer.step(Step::Running, &format!("{what}; dialling"));
                        self.dial_and_send(progress, push.pacer(), true)
                    }
                }
            },
        };
        let now = self.clock.now();
        progress.ended_at = Some(now);
        if let Some(report) = &mut progress.post_copy {
            report.duration_ns = now.saturating_sub(began).as_nanos() as u64;
        }
        result
    }

    /// Dials until the target has all, or until it has not been reached for as long as a target in doubt is dialled.
    fn dial_and_send(
        &mut self,
        progress: &mut Progress,
        pacer: &Pacer<'_>,
        mut redial: bool,
    ) -> Result<(), SourceError> {
        let sent_so_far = |progress: &Progress| progress.post_copy.as_ref().map_or(0, |report| report.sent_pages);
        let mut until = self.clock.now() + self.options.doubt;
        loop {
            let sent = sent_so_far(progress);
            let Err(error) = self.go_on(progress, pacer, redial) else { return Ok(()) };
            if matches!(error, SourceError::Refused(_) | SourceError::PeerCancelled(_) | SourceError::Machine(_)) {
                return Err(error);
            }
            tracing::debug!(migration = %self.id, "not gone on: {error}");
            redial = true;
            let now = self.clock.now();
            if sent_so_far(progress) > sent {
                until = now + self.options.doubt;
            }
            if now >= until {
                return Err(error);
            }
            self.clock.sleep(TICK);
        }
    }

    /// Asks the target what it is owed, over a new connection if the present one is lost, and sends that.
    fn go_on(&mut self, progress: &mut Progress, pacer: &Pacer<'_>, redial: bool) -> Result<(), SourceError> {
        if redial {
            self.link.redial()?;
        }
        let deadline = self.clock.now() + self.options.stall;
        let (due, mut streams) = match self.ask_what_is_owed(progress, deadline)? {
            GoOn::With(due, streams) => (due, streams),
            GoOn::Whole(waits) => {
                note(progress, PostCopyReport::default(), waits);
                return Ok(());
            }
        };
        let requests = answers(&mut streams)?;
        let push = self.push_of(FIRST_ROUND, pacer, &due);
        let ended = self.beside_push(&push, &mut streams, requests, None, |source| source.await_complete(&push));
        let waits = ended.as_ref().map_or_else(|_| WaitReport::default(), Clone::clone);
        note(progress, push.report(), waits);
        ended.map(drop)
    }

    /// Asks the target over a new connection what it is owed, and opens streams for that.
    pub(super) fn ask_what_is_owed(
        &mut self,
        progress: &mut Progress,
        deadline: Duration,
    ) -> Result<GoOn, SourceError> {
        let control = self.link.control();
        let count = self.options.streams.max(2);
        control.send(&ControlMessage::Recover { migration: self.id, streams: count })?;
        let due = loop {
            match self.expect_quietly(deadline)? {
                ControlMessage::Complete(waits) => return Ok(GoOn::Whole(waits)),
                ControlMessage::Owing(words) => break owed_pages(&words, self.region.spec().pages)?,
                ControlMessage::Refuse(reason) => return Err(SourceError::Refused(reason)),
                ControlMessage::Cancel(reason) => return Err(SourceError::PeerCancelled(reason)),
                // It may have been said twice.
                ControlMessage::Running(_) | ControlMessage::State(_) => {}
                other => return Err(unexpected(&other, "owing")),
            }
        };
        let streams = self.open_streams(count)?;
        if let Some(report) = &mut progress.post_copy {
            report.recoveries += 1;
        }
        self.observer.step(progress.step, &format!("going on with {} pages that are owed", due.count().0));
        Ok(GoOn::With(due, streams))
    }

    /// The VM runs at the target: waits until it has every page. How long its guest waited for them.
    fn await_complete(&mut self, push: &Push<'_>) -> Result<WaitReport, SourceError> {
        let control = self.link.control();
        let (mut asked_at, mut heard_at, mut number) = (self.clock.now(), self.clock.now(), PINGS);
        loop {
            let message = control.recv(TICK)?;
            let now = self.clock.now();
            if message.is_some() {
                heard_at = now;
            }
            match message {
                Some(ControlMessage::Complete(waits)) => return Ok(waits),
                Some(ControlMessage::Cancel(reason)) => return Err(SourceError::PeerCancelled(reason)),
                Some(ControlMessage::Running(_) | ControlMessage::State(_) | ControlMessage::Pong(_)) | None => {}
                Some(other) => {
                    if let Some(other) = self.hear_network(other) {
                        return Err(unexpected(&other, "complete"));
                    }
                }
            }
            if now.saturating_sub(heard_at) > self.options.stall {
                let doing = "waiting for the target to have every page";
                return Err(LinkError::Stalled { doing, after: self.options.stall }.into());
            }
            // Where nothing is asked for nothing moves: both ends are to know that the other is there.
            if now.saturating_sub(asked_at) >= ASK_EVERY {
                (asked_at, number) = (now, number.wrapping_add(1));
                control.send(&ControlMessage::Ping(number))?;
            }
            if let Some(error) = push.failure() {
                return Err(peers_reason(control.as_ref(), error));
            }
        }
    }

    /// Takes the place of a manager that died, or gave up in doubt, after `released`: asks the target what it knows, and goes on from there.
    pub fn recover(mut self) -> MigrationReport {
        let started = self.clock.now();
        let mut progress = Progress { step: Step::Released, handed: true, ..Progress::new() };
        let why = "this manager takes the place of another one";
        let (ending, reason) = self.settle(&mut progress, &BlackoutLedger::default(), why, Rest::AskTarget);
        self.report(progress, started, ending, reason)
    }
}

/// How a VM is kept safe, where increments come in, and where their pages are gathered.
type SafeWay = (Safety, Box<dyn BulkReceiver>, Arc<dyn Region>);

/// What a target says that is asked what it is owed.
pub(super) enum GoOn {
    /// These pages; they go over these streams.
    With(PageBitmap, Vec<Box<dyn BulkSender>>),
    /// Nothing; its guest waited so long for what it was.
    Whole(WaitReport),
}

/// What the first stream's other end sends back: increments.
pub(super) fn increments(streams: &mut [Box<dyn BulkSender>]) -> Result<Box<dyn BulkReceiver>, LinkError> {
    match streams {
        [first, _, ..] => first.answers(),
        _ => Err(LinkError::Protocol("no stream for increments".to_owned())),
    }
}

/// What the last stream's other end sends back.
pub(super) fn answers(streams: &mut [Box<dyn BulkSender>]) -> Result<Box<dyn BulkReceiver>, LinkError> {
    match streams.last_mut() {
        Some(last) => last.answers(),
        None => Err(LinkError::Protocol("no stream for requests".to_owned())),
    }
}

/// Adds what one connection carried.
pub(super) fn note(progress: &mut Progress, report: PostCopyReport, waits: WaitReport) {
    match &mut progress.post_copy {
        None => progress.post_copy = Some(PostCopyReport { waits, ..report }),
        Some(so_far) => {
            so_far.sent_pages += report.sent_pages;
            so_far.zero_pages += report.zero_pages;
            so_far.requests += report.requests;
            so_far.asked_pages += report.asked_pages;
            so_far.wire_bytes += report.wire_bytes;
            so_far.waits = waits;
        }
    }
}

//! The source of a VM that runs at its target on loan while pages of it are owed: lends it for a little longer as often as it is asked, takes in the increments that come back, and takes the VM back when
//! the target, its manager or the link is lost.
//!
//! Contract: between `lent` and `released` the VM goes on here from the last increment, and only when the target certainly runs it no more: it has said so, or the lease is over by this host's clock.

use std::time::Duration;

use super::owing::{FIRST_ROUND, GoOn, Rest, answers, increments, note};
use super::{Progress, Source, SourceError, TICK, peers_reason, unexpected};
use crate::migrate::increment::Gathering;
use crate::migrate::lease::lender_end;
use crate::migrate::message::{ControlMessage, Increment, TargetState};
use crate::migrate::options::Safety;
use crate::migrate::pacer::Pacer;
use crate::migrate::push::Push;
use crate::model::{
    BlackoutLedger, BlackoutPhase, Ending, LoanReport, MigrationReport, PostCopyReport, Step, WaitReport,
};
use crate::port::{Fate, LinkError};

/// What is known of a loan.
pub(super) struct Lending {
    /// When the VM certainly stands at the target, unless it is lent again.
    ends_at: Duration,
    safety: Safety,
    began: Duration,
    /// The last increment that was taken in.
    last: u32,
    report: LoanReport,
    /// How many took until they were safe up to 2^index microseconds.
    safe: [u64; 64],
}

/// How a loan went on over one connection.
pub(super) enum Lent {
    /// It is over, and so is the migration.
    Settled((Ending, String)),
    /// Contact, or the target, is lost.
    Lost(SourceError),
}

impl Lending {
    pub(super) fn new(safety: Safety, now: Duration) -> Self {
        let report = LoanReport {
            lease_ns: safety.lease.as_nanos() as u64,
            every_ns: safety.every.as_nanos() as u64,
            ..LoanReport::default()
        };
        Self { ends_at: lender_end(now, safety.lease), safety, began: now, last: 0, report, safe: [0; 64] }
    }

    /// The VM is about to be lent anew.
    fn lend(&mut self, now: Duration) {
        self.ends_at = lender_end(now, self.safety.lease);
    }

    fn advanced(&mut self, end: &Increment, page_bytes: u64) {
        self.last = end.number;
        let report = &mut self.report;
        report.increments += 1;
        report.pages += end.pages;
        report.wire_bytes += page_bytes + end.state.len() as u64;
        report.stood_ns = report.stood_ns.saturating_add(end.stood_ns);
        report.longest_stand_ns = report.longest_stand_ns.max(end.stood_ns);
        if end.safe_ns > 0 {
            report.safe_max_ns = report.safe_max_ns.max(end.safe_ns);
            let bucket = end.safe_ns.div_ceil(1000).checked_next_power_of_two().map_or(63, u64::trailing_zeros);
            self.safe[bucket as usize] += 1;
        }
    }

    fn report(&mut self, now: Duration) -> LoanReport {
        let all: u64 = self.safe.iter().sum();
        let mut so_far = 0;
        let median = self.safe.iter().position(|&count| {
            so_far += count;
            all > 0 && so_far * 2 >= all
        });
        self.report.safe_p50_ns = median.map_or(0, |bucket| (1u64 << bucket).saturating_mul(1000));
        self.report.lasted_ns = now.saturating_sub(self.began).as_nanos() as u64;
        self.report.clone()
    }
}

impl Source<'_> {
    /// The target holds the VM, and `push` sends it what is owed: lends the VM, and goes on doing so until the target has all.
    pub(super) fn lend(
        &mut self,
        progress: &mut Progress,
        target: BlackoutLedger,
        (push, gathering): (&Push<'_>, &Gathering<'_>),
        lending: &mut Lending,
    ) -> Lent {
        if self.cancel.is_set() {
            return Lent::Settled(self.roll_back(progress, &SourceError::Cancelled));
        }
        let asked = self.clock.now();
        if let Err(error) = self.machine.lend(self.id, &self.options.peer, lending.safety.lease) {
            // A dead machine cannot go on with it: it is the target's for good, and what it is owed follows it.
            return Lent::Settled(if self.machine.fate() == Fate::Dead {
                self.hand_over(progress, target, Rest::Pushed(push))
            } else {
                self.roll_back(progress, &error.into())
            });
        }
        progress.ledger.add(BlackoutPhase::JournalReleased, self.clock.now().saturating_sub(asked));
        if let Err(error) = self.send_lend(progress, lending, target) {
            return Lent::Lost(error);
        }
        push.guest_runs();
        self.beside_relay(progress, |source, progress| source.keep_lending(progress, (push, gathering), lending))
    }

    /// Has the target run the VM on loan.
    fn send_lend(
        &mut self,
        progress: &mut Progress,
        lending: &mut Lending,
        mut target: BlackoutLedger,
    ) -> Result<(), SourceError> {
        let now = self.clock.now();
        lending.lend(now);
        self.commit(progress, &ControlMessage::Lend)?;
        match self.expect_quietly((now + self.options.stall).min(lending.ends_at))? {
            ControlMessage::Running(activation) => {
                target.phases.extend(activation.phases);
                self.note_running(progress, &target);
                self.pass(progress, Step::Lent, "the VM runs at the target, on loan");
                Ok(())
            }
            ControlMessage::State(TargetState::NeverOwner) => Err(never_ran()),
            ControlMessage::Cancel(reason) => Err(SourceError::PeerCancelled(reason)),
            other => Err(unexpected(&other, "running")),
        }
    }

    /// Lends the VM anew whenever it is asked, and takes increments in.
    fn keep_lending(
        &mut self,
        progress: &mut Progress,
        (push, gathering): (&Push<'_>, &Gathering<'_>),
        lending: &mut Lending,
    ) -> Lent {
        match self.lend_on(push, gathering, lending) {
            Ok(waits) => {
                note(progress, push.report(), waits);
                // Before the streams have ended: what the VM sends is held until it has heard.
                Lent::Settled(self.give_for_good(progress))
            }
            // Nobody is left here to take it back: it is the target's from now on, and what it is owed follows it.
            Err(SourceError::Machine(_)) if self.machine.fate() == Fate::Dead => {
                let rest = Rest::Pushed(push);
                Lent::Settled(self.hand_over(progress, BlackoutLedger::default(), rest))
            }
            Err(error) => {
                note(progress, push.report(), WaitReport::default());
                Lent::Lost(error)
            }
        }
    }

    fn lend_on(
        &mut self,
        push: &Push<'_>,
        gathering: &Gathering<'_>,
        lending: &mut Lending,
    ) -> Result<WaitReport, SourceError> {
        let control = self.link.control();
        let mut pending: Option<Box<Increment>> = None;
        let mut looked_at = self.clock.now();
        loop {
            if self.cancel.is_set() {
                return Err(SourceError::Cancelled);
            }
            if pending.is_some() {
                gathering.await_change(self.clock, TICK);
            }
            let message = control.recv(if pending.is_some() { Duration::ZERO } else { TICK })?;
            let now = self.clock.now();
            match message {
                Some(ControlMessage::Renew(number)) => {
                    lending.lend(now);
                    control.send(&ControlMessage::Granted(number))?;
                }
                Some(ControlMessage::Increment(end)) if pending.is_none() && end.number > lending.last => {
                    pending = Some(end);
                }
                Some(ControlMessage::Complete(waits)) => return Ok(waits),
                Some(ControlMessage::Cancel(reason)) => return Err(SourceError::PeerCancelled(reason)),
                Some(ControlMessage::State(TargetState::NeverOwner)) => return Err(never_ran()),
                Some(ControlMessage::Running(_) | ControlMessage::State(_) | ControlMessage::Pong(_)) | None => {}
                Some(other) => {
                    if let Some(other) = self.hear_network(other) {
                        return Err(unexpected(&other, "complete"));
                    }
                }
            }
            if let Some(end) = &pending
                && let Some(bytes) = gathering.take_in(end, |pages, state| self.machine.advance(pages, state))?
            {
                if lending.last == 0 {
                    self.observer.step(Step::Lent, "the first increment is safe");
                }
                lending.advanced(end, bytes);
                control.send(&ControlMessage::Safe(end.number))?;
                pending = None;
            }
            if let Some(error) = gathering.failure().or_else(|| push.failure()) {
                return Err(peers_reason(control.as_ref(), error));
            }
            if now >= lending.ends_at {
                let doing = "waiting for the target to ask for a longer loan";
                return Err(LinkError::Stalled { doing, after: lending.safety.lease }.into());
            }
            if now.saturating_sub(looked_at) >= TICK {
                looked_at = now;
                self.check_loan()?;
            }
        }
    }

    /// Whether the loan is still this manager's business.
    fn check_loan(&mut self) -> Result<(), SourceError> {
        let gone = |reason: &str| {
            let (action, reason) = ("keep a VM on loan", reason.to_owned());
            SourceError::Machine(crate::port::MachineError::Gone { action, reason })
        };
        match self.machine.fate() {
            Fate::Waiting => Ok(()),
            Fate::Dead => Err(gone("its process has ended")),
            Fate::Resolved(_) => Err(gone("an operator has decided whose the VM is")),
        }
    }

    /// What follows the loan over one connection: as often as contact is lost, it goes on over another one, for as long as the loan lasts; then the VM goes on here.
    pub(super) fn follow_loan(
        &mut self,
        progress: &mut Progress,
        mut so_far: Lent,
        lending: &mut Lending,
        pacer: &Pacer<'_>,
    ) -> (Ending, String) {
        loop {
            let error = match so_far {
                Lent::Settled(ended) => return self.settle_loan(progress, lending, ended),
                Lent::Lost(error) => error,
            };
            let is_final = matches!(
                error,
                SourceError::Cancelled
                    | SourceError::PeerCancelled(_)
                    | SourceError::Refused(_)
                    | SourceError::Machine(_)
            );
            if is_final || self.clock.now() >= lending.ends_at {
                let ended = self.take_back_loan(progress, lending, &error);
                return self.settle_loan(progress, lending, ended);
            }
            tracing::warn!(vm = %self.shape.name, migration = %self.id, "contact is lost while the VM is on loan: {error}; dialling");
            self.observer.step(Step::Lent, &format!("contact is lost: {error}; dialling"));
            so_far = loop {
                match self.lend_anew(progress, lending, pacer) {
                    Ok(so_far) => break so_far,
                    Err(SourceError::Link(again)) if self.clock.now() < lending.ends_at && !self.cancel.is_set() => {
                        tracing::debug!(migration = %self.id, "not gone on: {again}");
                        self.clock.sleep(TICK);
                    }
                    Err(again) => break Lent::Lost(again),
                }
            };
        }
    }

    /// The target has all.
    fn give_for_good(&mut self, progress: &mut Progress) -> (Ending, String) {
        progress.ended_at = Some(self.clock.now());
        self.hand_over(progress, BlackoutLedger::default(), Rest::None)
    }

    fn settle_loan(
        &mut self,
        progress: &mut Progress,
        lending: &mut Lending,
        ended: (Ending, String),
    ) -> (Ending, String) {
        let loan = lending.report(progress.ended_at.unwrap_or_else(|| self.clock.now()));
        if let Some(owed) = &mut progress.post_copy {
            owed.duration_ns = owed.duration_ns.max(loan.lasted_ns);
        }
        progress.loan = Some(loan);
        ended
    }

    /// Goes on with the loan over another connection.
    fn lend_anew(
        &mut self,
        progress: &mut Progress,
        lending: &mut Lending,
        pacer: &Pacer<'_>,
    ) -> Result<Lent, SourceError> {
        self.check_loan()?;
        self.link.redial()?;
        let control = self.link.control();
        control.send(&ControlMessage::Query(self.id))?;
        let deadline = (self.clock.now() + self.options.stall).min(lending.ends_at);
        match self.expect_quietly(deadline)? {
            // Whether it has heard that the VM is lent to it is not known here.
            ControlMessage::State(TargetState::Prepared) if !progress.ran => {
                self.send_lend(progress, lending, BlackoutLedger::default())?;
            }
            ControlMessage::State(TargetState::Prepared) => {}
            ControlMessage::State(TargetState::NeverOwner) => return Err(never_ran()),
            ControlMessage::State(TargetState::Owner) => {
                // An operator there was faster than the lease.
                return Ok(Lent::Settled(self.hand_over(progress, BlackoutLedger::default(), Rest::AskTarget)));
            }
            other => return Err(unexpected(&other, "state")),
        }
        let (due, mut streams) = match self.ask_what_is_owed(progress, deadline)? {
            GoOn::With(due, streams) => (due, streams),
            GoOn::Whole(waits) => {
                note(progress, PostCopyReport::default(), waits);
                return Ok(Lent::Settled(self.give_for_good(progress)));
            }
        };
        let requests = answers(&mut streams)?;
        let increments = increments(&mut streams)?;
        let staging = self.machine.staging()?;
        let gathering = Gathering::new(staging.as_ref());
        let push = self.push_of(FIRST_ROUND, pacer, &due);
        Ok(self.beside_push(&push, &mut streams, requests, Some((&gathering, increments)), |source| {
            source.keep_lending(progress, (&push, &gathering), lending)
        }))
    }

    /// The VM goes on here, from the last increment: when the target has let go of it, or the lease is over.
    fn take_back_loan(
        &mut self,
        progress: &mut Progress,
        lending: &mut Lending,
        error: &SourceError,
    ) -> (Ending, String) {
        match self.machine.fate() {
            Fate::Waiting => {}
            // Nobody is left here to take it back: it is the target's.
            Fate::Dead => return self.hand_over(progress, BlackoutLedger::default(), Rest::AskTarget),
            Fate::Resolved(_) => {
                return (Ending::InDoubt, format!("an operator has decided whose the VM is; before that: {error}"));
            }
        }
        tracing::warn!(vm = %self.shape.name, migration = %self.id, "the VM is taken back: {error}");
        let lost_at = self.clock.now();
        let let_go = matches!(error, SourceError::PeerCancelled(_))
            || (self.link.control().send(&ControlMessage::Cancel(error.to_string())).is_ok()
                && self.has_let_go(lending.ends_at));
        while !let_go && self.clock.now() < lending.ends_at {
            self.clock.sleep(TICK.min(lending.ends_at.saturating_sub(self.clock.now())));
        }
        let taken = self.machine.take_back(self.id).and_then(|()| self.run_here_again());
        let now = self.clock.now();
        progress.ended_at = Some(now);
        lending.report.taken_back_increment = Some(lending.last.into());
        let from = match lending.last {
            0 => "as it was when it was paused".to_owned(),
            number => format!("from increment {number}"),
        };
        let stood = now.saturating_sub(lost_at);
        let mut reason = format!("at {}: {error}; after {stood:?} the VM went on here, {from}", progress.step);
        match taken {
            Ok(()) if let_go => {}
            Ok(()) => {
                if !self.tell_of_rollback(progress, error) {
                    reason += &format!(
                        "; the target could not be told and may hold a copy, which stands and must not run: `dunlin resolve {} --owner there` on it lets it go",
                        self.shape.name
                    );
                }
            }
            Err(lost) if self.machine.fate() == Fate::Dead => {
                return (Ending::Lost, format!("{reason}; no: the machine here has died: {lost}"));
            }
            Err(stuck) => {
                let advice = format!("`dunlin resolve {} --owner here` lets it run", self.shape.name);
                return (
                    Ending::InDoubt,
                    format!("at {}: {error}; it could not be taken back: {stuck}; {advice}", progress.step),
                );
            }
        }
        let ending = if matches!(error, SourceError::Cancelled) { Ending::Cancelled } else { Ending::Failed };
        (ending, reason)
    }

    /// Takes the place of a manager that died while the VM was on loan: goes on with it if the target can be reached while a whole lease lasts, or else takes it back.
    pub fn recover_loan(mut self, lease: Duration) -> MigrationReport {
        let started = self.clock.now();
        let mut progress = Progress { step: Step::Lent, handed: true, ran: true, ..Progress::new() };
        let pacer = Pacer::for_push(self.clock, self.pace.clone());
        // The manager before may have lent it just before it died.
        let mut lending = Lending::new(Safety { lease, ..self.options.safety.unwrap_or_default() }, started);
        let why = LinkError::Protocol("this manager takes the place of another one".to_owned());
        let (ending, reason) = self.follow_loan(&mut progress, Lent::Lost(why.into()), &mut lending, &pacer);
        self.report(progress, started, ending, reason)
    }
}

fn never_ran() -> SourceError {
    SourceError::PeerCancelled("it has journaled that it never owned the VM".to_owned())
}

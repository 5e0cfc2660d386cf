//! The target of a VM that runs before its memory is here: serves its faults until the last page has come, through as many connections as that takes.
//!
//! When contact is lost both ends keep what they have. The VM goes on and waits where it touches a page that is still at the source; faults that can be served here are. Whoever
//! takes the place of a manager that died finds in the machine's marks which pages had come.

use std::sync::Arc;
use std::time::Duration;

use super::{
    ANNOUNCE_EVERY, Arrived, Borrowing, GREETING_LIMIT, Inflow, MAX_STREAMS, RelayPhase, SILENCE, TICK, Target,
    TargetError,
};
use crate::migrate::message::{ControlMessage, Handed, Offer, TargetState};
use crate::migrate::owed::{Owed, owed_words};
use crate::model::{BlackoutLedger, BlackoutPhase, MigrationId, Owner, Step, VmId};
use crate::port::{BulkReceiver, Fate, Job, LinkError, Machine, Region};

/// How long a machine whose faults cannot be served any more may take to be seen dead.
const DEATH_LIMIT: Duration = Duration::from_secs(1);

/// The most threads that serve a VM's faults: what they ask for goes out over one stream, and each takes a processor from the guest and from the streams that fill its memory.
const MOST_HANDLERS: u32 = 4;

/// A machine whose manager died after `prepared`.
pub struct Orphan {
    /// The migration that brought it.
    pub migration_id: MigrationId,
    /// The VM.
    pub vm_id: VmId,
    /// The machine.
    pub machine: Box<dyn Machine>,
    /// Its RAM.
    pub region: Arc<dyn Region>,
    /// Its vCPUs.
    pub cpus: u32,
}

impl Target<'_> {
    /// Takes the place of a manager that died: waits for the source's word if that is still due, runs the VM, and gets it what it is owed. The connection is the source's, and
    /// nothing has been read from it.
    ///
    /// # Errors
    /// Why the VM is not here, or not whole.
    pub fn recover(mut self, orphan: Orphan) -> Result<Arrived, TargetError> {
        let Orphan { migration_id, vm_id, mut machine, region, cpus } = orphan;
        let mut ledger = BlackoutLedger::default();
        let runs = machine.fate() == Fate::Resolved(Owner::Here);
        let caught = machine.caught_faults()?;
        match caught {
            None if runs => {}
            None => self.until_it_runs(migration_id, machine.as_mut(), &mut ledger, &mut None)?,
            Some(faults) => {
                let owed = Arc::new(Owed::left_by_another(region.as_ref(), faults, self.clock));
                self.serve_beside(&owed, cpus, |target| {
                    if !runs {
                        target.until_it_runs(migration_id, machine.as_mut(), &mut ledger, &mut None)?;
                    }
                    owed.runs();
                    let gone = LinkError::Protocol("its manager was replaced".to_owned());
                    target.until_nothing_is_owed(migration_id, Err(gone.into()), &owed, machine.as_mut(), &mut None)
                })?;
            }
        }
        Ok(Arrived { migration_id, vm_id, machine, ledger, verified_pages: 0 })
    }

    /// The VM is restored, becomes ours and runs, while its faults are served and pages come that it is owed; until the last of them is here.
    pub(super) fn run_owing(
        &mut self,
        offer: &Offer,
        (inflow, owed): (&Inflow<'_>, &Arc<Owed<'_>>),
        machine: &mut dyn Machine,
        (handed, arrived_at): (&Handed, Duration),
        (ledger, mut loan): (&mut BlackoutLedger, Option<Borrowing>),
        owes: &mut bool,
    ) -> Result<(), TargetError> {
        self.pass(offer.migration_id, Step::StateMoved, "");
        self.serve_beside(owed, offer.shape.cpus, |target| {
            machine.restore_state(&handed.state)?;
            ledger.add(BlackoutPhase::Restore, target.clock.now().saturating_sub(arrived_at));
            target.say_prepared(offer, machine, ledger)?;
            *owes = true;
            target.until_it_runs(offer.migration_id, machine, ledger, &mut loan)?;
            owed.runs();
            inflow.touch();
            let ended = target.await_the_rest(offer.migration_id, inflow, owed, machine, &mut loan);
            // Whoever is still read brings nothing that is not here; the source is told so before those readers have seen the end.
            if ended.is_err() {
                inflow.end_streams();
            }
            target.until_nothing_is_owed(offer.migration_id, ended, owed, machine, &mut loan)
        })
    }

    /// Does `work` while faults are served; then nobody serves them any more. A vCPU waits for one page at a time, so there are as many handlers as vCPUs, up to a few.
    fn serve_beside(
        &mut self,
        owed: &Arc<Owed<'_>>,
        cpus: u32,
        work: impl FnOnce(&mut Self) -> Result<(), TargetError> + Send,
    ) -> Result<(), TargetError> {
        let note = |done: Result<(), TargetError>| {
            if let Err(error) = done {
                owed.fail(error);
            }
        };
        let mut beside: Vec<Job<'_>> = vec![Box::new(|| note(owed.map_ahead()))];
        for _ in 0..cpus.clamp(1, MOST_HANDLERS) {
            beside.push(Box::new(|| note(owed.serve_faults())));
        }
        let (clock, mut result) = (self.clock, Ok(()));
        let lead = || {
            result = work(self);
            owed.stop();
        };
        clock.run_beside(beside, Box::new(lead));
        result
    }

    /// The VM runs. `ended` is how the pages of the connection so far ended: as often as contact was lost, they go on over another one.
    fn until_nothing_is_owed(
        &mut self,
        id: MigrationId,
        mut ended: Result<(), TargetError>,
        owed: &Arc<Owed<'_>>,
        machine: &mut dyn Machine,
        loan: &mut Option<Borrowing>,
    ) -> Result<(), TargetError> {
        while let Err(error) = ended {
            let left = owed.left();
            if !matches!(error, TargetError::Link(_)) {
                return Err(self.left_owing(id, left, error, machine, loan.is_some()));
            }
            tracing::warn!(migration = %id, left, "contact with the source is lost while pages are owed: {error}; waiting for it");
            owed.lose_way();
            if let Some(loan) = loan {
                loan.lose_way();
            }
            let receivers = match self.await_source(id, owed, machine, loan) {
                Ok(receivers) => receivers,
                Err(error) => return Err(self.left_owing(id, left, error, machine, loan.is_some())),
            };
            ended = self.take_the_rest(id, receivers, owed, machine, loan);
        }
        if let Err(error) = owed.end() {
            self.tell_of_death(machine, &error);
            return Err(TargetError::Owing { left: 0, reason: error.to_string() });
        }
        if let Err(error) = machine.all_is_here() {
            tracing::warn!(migration = %id, "{error}");
        }
        let waits = owed.waits();
        tracing::info!(migration = %id, waits = waits.count, "every page is here");
        if let Err(error) = self.link.control().send(&ControlMessage::Complete(waits)) {
            tracing::warn!(migration = %id, "`complete` could not be sent: {error}");
        }
        // It is whole, and still the source's: that lets go of it now, or takes it back.
        if let Some(loan) = loan {
            loan.is_whole = true;
        }
        if loan.is_some() { self.until_it_runs(id, machine, &mut BlackoutLedger::default(), loan) } else { Ok(()) }
    }

    /// Pages are owed, and do not come any more. What that means.
    fn left_owing(
        &mut self,
        id: MigrationId,
        left: u64,
        error: TargetError,
        machine: &mut dyn Machine,
        on_loan: bool,
    ) -> TargetError {
        if !on_loan {
            return TargetError::Owing { left, reason: error.to_string() };
        }
        // It was only lent: one that has died never was ours.
        if matches!(error, TargetError::Machine(_) | TargetError::Faults(_) | TargetError::LostOwned(_))
            && self.await_death(machine)
        {
            return match machine.never_owner(id) {
                Ok(()) => {
                    let _ = self.link.control().send(&ControlMessage::State(TargetState::NeverOwner));
                    TargetError::LostPrepared
                }
                Err(unwritten) => unwritten.into(),
            };
        }
        error
    }

    /// Receives over the streams of a source that has come back.
    fn take_the_rest(
        &mut self,
        id: MigrationId,
        mut receivers: Vec<Box<dyn BulkReceiver>>,
        owed: &Arc<Owed<'_>>,
        machine: &mut dyn Machine,
        loan: &mut Option<Borrowing>,
    ) -> Result<(), TargetError> {
        let none = || LinkError::Protocol("no stream for requests".to_owned());
        let requests = receivers.last_mut().ok_or_else(none)?.back()?;
        if let (Some(loan), [first, _, ..]) = (&mut *loan, &mut receivers[..]) {
            loan.find_way(first.back()?, self.clock.now());
        }
        let control = self.link.control();
        let inflow = Inflow::of_owed(owed, control.as_ref(), self.clock, self.stall, receivers.len());
        let (clock, mut ended) = (self.clock, Ok(()));
        let lead = || {
            let found = owed.find_way(requests).map_err(TargetError::from);
            ended = found.and_then(|()| self.await_the_rest(id, &inflow, owed, machine, loan));
            inflow.stop();
        };
        clock.run_beside(inflow.streams(receivers), Box::new(lead));
        ended
    }

    /// Waits until nothing is owed.
    fn await_the_rest(
        &mut self,
        id: MigrationId,
        inflow: &Inflow<'_>,
        owed: &Owed<'_>,
        machine: &mut dyn Machine,
        loan: &mut Option<Borrowing>,
    ) -> Result<(), TargetError> {
        let ended = self.watch_the_rest(id, inflow, owed, machine, loan);
        if let Err(error) = &ended
            && !matches!(error, TargetError::Link(_))
            && loan.is_none()
        {
            self.tell_of_death(machine, error);
        }
        ended
    }

    /// Whether a machine that does not answer any more is soon seen dead.
    fn await_death(&self, machine: &mut dyn Machine) -> bool {
        let until = self.clock.now() + DEATH_LIMIT;
        while machine.fate() != Fate::Dead && self.clock.now() < until {
            self.clock.sleep(TICK);
        }
        machine.fate() == Fate::Dead
    }

    /// Whoever has pages of a machine that has died is to know that, before its streams end.
    fn tell_of_death(&self, machine: &mut dyn Machine, error: &TargetError) {
        if self.await_death(machine) {
            let _unheard = self.link.control().send(&ControlMessage::Cancel(error.to_string()));
        }
    }

    /// The same; nobody is told of a machine that dies.
    fn watch_the_rest(
        &mut self,
        id: MigrationId,
        inflow: &Inflow<'_>,
        owed: &Owed<'_>,
        machine: &mut dyn Machine,
        loan: &mut Option<Borrowing>,
    ) -> Result<(), TargetError> {
        let mut announced = self.clock.now();
        loop {
            self.announce_now_and_then(id, machine, &mut announced);
            let seen = owed.changed.rings();
            if owed.left() == 0 {
                return Ok(());
            }
            owed.check()?;
            inflow.check()?;
            if owed.is_cut() {
                return Err(LinkError::Protocol("requests for pages do not get out".to_owned()).into());
            }
            let pause = if loan.is_some() {
                self.keep_borrowing(id, machine, (owed, inflow), loan)?
            } else {
                check_alive(machine)?;
                // What comes through the VM's port waits for the relay: that is what is waited for here, too.
                if self.relay == RelayPhase::On {
                    self.answer_source(id, machine, inflow, self.relay.pause())?;
                    continue;
                }
                self.answer_source(id, machine, inflow, Duration::ZERO)?;
                TICK
            };
            self.clock.wait(&owed.changed, seen, pause.min(TICK).min(self.relay.pause()));
        }
    }

    /// Takes what the source says, once `wait` has passed or something has come: tells it that somebody is here if it asks.
    fn answer_source(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        inflow: &Inflow<'_>,
        mut wait: Duration,
    ) -> Result<(), LinkError> {
        let control = self.link.control();
        while let Some(message) = control.recv(std::mem::take(&mut wait))? {
            inflow.touch();
            if let Some(ControlMessage::Ping(number)) = self.hear_relay(id, message, machine) {
                control.send(&ControlMessage::Pong(number))?;
            }
        }
        Ok(())
    }

    /// Whoever has us waits with the regular announcements until all is here.
    fn announce_now_and_then(&mut self, id: MigrationId, machine: &mut dyn Machine, announced: &mut Duration) {
        if self.clock.now().saturating_sub(*announced) >= ANNOUNCE_EVERY {
            *announced = self.clock.now();
            self.announce(id, machine);
        }
    }

    /// Waits for a source that wants to go on, tells it what is owed, and takes its streams.
    fn await_source(
        &mut self,
        id: MigrationId,
        owed: &Owed<'_>,
        machine: &mut dyn Machine,
        loan: &mut Option<Borrowing>,
    ) -> Result<Vec<Box<dyn BulkReceiver>>, TargetError> {
        let (mut reachable, mut heard_at, mut announced) = (true, self.clock.now(), self.clock.now());
        loop {
            self.announce_now_and_then(id, machine, &mut announced);
            owed.check()?;
            self.look_after(id, machine, loan)?;
            if let Some(streams) = loan.as_mut().and_then(Borrowing::comes_back) {
                match self.take_streams(id, streams, owed) {
                    Ok(receivers) => return Ok(receivers),
                    Err(_) => reachable = false,
                }
            }
            // The machine keeps everything: somebody else may take this place.
            if self.cancel.is_set() {
                return Err(TargetError::Cancelled);
            }
            if !reachable {
                reachable = self.link.reaccept(TICK);
                heard_at = self.clock.now();
                continue;
            }
            let control = self.link.control();
            let message = control.recv(TICK);
            if matches!(message, Ok(Some(_))) {
                heard_at = self.clock.now();
            }
            match message {
                Ok(Some(ControlMessage::Query(asked))) if asked == id && loan.is_none() => {
                    reachable = control.send(&ControlMessage::State(TargetState::Owner)).is_ok();
                }
                Ok(Some(ControlMessage::Recover { migration, streams })) if migration == id => {
                    match self.take_streams(id, streams, owed) {
                        Ok(receivers) => return Ok(receivers),
                        Err(error) => {
                            tracing::warn!(migration = %id, "the source did not come back: {error}");
                            reachable = false;
                        }
                    }
                }
                Ok(Some(other)) => match loan {
                    Some(borrowing) => match self.hear(id, other, machine, borrowing) {
                        Err(TargetError::Link(_)) => reachable = false,
                        heard => heard?,
                    },
                    None => {
                        if let Some(other) = self.hear_relay(id, other, machine) {
                            tracing::warn!(migration = %id, got = other.name(), "ignored while pages are owed");
                        }
                    }
                },
                // A connection may be dead without a sign of it: a source that dials anew takes its place.
                Ok(None) if self.clock.now().saturating_sub(heard_at) >= SILENCE => {
                    if self.link.reaccept(Duration::ZERO) {
                        heard_at = self.clock.now();
                    }
                }
                Ok(None) => {}
                Err(_) => reachable = false,
            }
        }
    }

    fn take_streams(
        &mut self,
        id: MigrationId,
        streams: u16,
        owed: &Owed<'_>,
    ) -> Result<Vec<Box<dyn BulkReceiver>>, LinkError> {
        if !(2..=MAX_STREAMS).contains(&streams) {
            return Err(LinkError::Protocol(format!("{streams} streams are not between 2 and {MAX_STREAMS}")));
        }
        self.link.control().send(&ControlMessage::Owing(owed_words(&owed.missing())))?;
        self.link.accept_bulk(id, streams, GREETING_LIMIT.min(self.stall))
    }
}

pub(super) fn check_alive(machine: &mut dyn Machine) -> Result<(), TargetError> {
    if machine.fate() == Fate::Dead {
        return Err(TargetError::LostOwned("its process ended while pages were still owed to it".to_owned()));
    }
    Ok(())
}

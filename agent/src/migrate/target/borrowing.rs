//! The target of a VM that runs here on loan while it is owed pages: asks for longer loans, and sends back in increments what the VM has done, so that the source can go on with it.
//!
//! The machine stands by itself when the loan is over; this manager only asks it to. What the VM sends and writes stays in the machine until the increment that holds its cause is safe.

use std::collections::VecDeque;
use std::time::Duration;

use super::owing::check_alive;
use super::{Inflow, TICK, Target, TargetError};
use crate::migrate::increment::Flight;
use crate::migrate::lap::Lap;
use crate::migrate::lease::{borrower_end, renew_after};
use crate::migrate::message::{ControlMessage, TargetState};
use crate::migrate::options::Safety;
use crate::migrate::owed::Owed;
use crate::migrate::protect::protect_all;
use crate::model::{BlackoutLedger, MigrationId, Owner, PageBitmap, Step};
use crate::port::{BulkSender, Clock, ControlChannel, Fate, LinkError, Machine, MachineError, Region};

/// How often an increment that is on its way, or due, is looked after.
const LOOK: Duration = Duration::from_millis(5);
/// A vCPU that waits for a page stands only when it has come, so an increment waits for that while the VM runs: up to so many times what lies between two.
const PATIENCE: u32 = 3;

/// A loan as its borrower keeps it.
pub(super) struct Borrowing {
    safety: Safety,
    /// Where increments go; nowhere while there is no way to the source.
    back: Option<Box<dyn BulkSender>>,
    /// The increment that the VM is at.
    number: u32,
    /// When it began.
    began_at: Duration,
    flight: Flight,
    on_its_way: Option<OnItsWay>,
    /// Pages that were cut into increments of which none is known to be safe.
    at_risk: PageBitmap,
    /// How long the last took to be safe, and nobody was told.
    safe_ns: u64,
    /// Questions for a longer loan that have no answer, the oldest first.
    asked: VecDeque<(u32, Duration)>,
    renewals: u32,
    /// When it was last asked for.
    asked_at: Duration,
    /// When the source was last heard.
    heard_at: Duration,
    /// The source has dialled anew, and opens so many streams.
    comes_back: Option<u16>,
    /// Every page is here.
    pub(super) is_whole: bool,
    /// The source has let go of the VM for good.
    committed: bool,
}

struct OnItsWay {
    cut_at: Duration,
    stood: Duration,
    /// All of it is sent.
    is_sent: bool,
}

impl Borrowing {
    /// Makes the machine, which has not run, ready to run on loan; increments go out through `back`.
    pub(super) fn prepare(
        safety: Safety,
        machine: &mut dyn Machine,
        region: &dyn Region,
        back: Box<dyn BulkSender>,
    ) -> Result<Self, MachineError> {
        machine.start_log()?;
        protect_all(machine, region)?;
        machine.hold_output()?;
        Ok(Self {
            safety,
            back: Some(back),
            number: 1,
            began_at: Duration::ZERO,
            flight: Flight::default(),
            on_its_way: None,
            at_risk: PageBitmap::new(region.spec().pages),
            safe_ns: 0,
            asked: VecDeque::new(),
            renewals: 0,
            asked_at: Duration::ZERO,
            heard_at: Duration::ZERO,
            comes_back: None,
            is_whole: false,
            committed: false,
        })
    }

    /// The VM was lent in answer to what was sent at `asked_at`. False if that loan is over already.
    fn begin(&mut self, machine: &mut dyn Machine, asked_at: Duration, now: Duration) -> Result<bool, MachineError> {
        (self.asked_at, self.began_at, self.heard_at) = (asked_at, now, now);
        Self::run_until(borrower_end(asked_at, self.safety.lease), machine, now)
    }

    /// Has the machine run until then. False if it is too late for that.
    fn run_until(until: Duration, machine: &mut dyn Machine, now: Duration) -> Result<bool, MachineError> {
        if until <= now {
            return Ok(false);
        }
        match machine.run_until(until) {
            Err(MachineError::Refused { reason, .. }) => {
                tracing::warn!("the VM does not run on loan: {reason}");
                Ok(false)
            }
            other => other.map(|()| true),
        }
    }

    /// There is no way to the source any more: what was on its way is at risk, and goes with the next increment.
    pub(super) fn lose_way(&mut self) {
        (self.back, self.on_its_way) = (None, None);
        self.asked.clear();
    }

    /// There is a way again.
    pub(super) fn find_way(&mut self, back: Box<dyn BulkSender>, now: Duration) {
        (self.back, self.asked_at, self.heard_at) = (Some(back), Duration::ZERO, now);
    }

    /// How many streams a source opens that has come back, once.
    pub(super) fn comes_back(&mut self) -> Option<u16> {
        self.comes_back.take()
    }

    /// How long nothing needs to be done.
    pub(super) fn pause(&self, now: Duration) -> Duration {
        if self.on_its_way.as_ref().is_some_and(|flight| !flight.is_sent) {
            return Duration::ZERO;
        }
        if self.on_its_way.is_some() || self.committed || now >= self.began_at + self.safety.every {
            return LOOK;
        }
        (self.began_at + self.safety.every).saturating_sub(now).min(renew_after(self.safety.lease))
    }

    /// Does what is due: asks for a longer loan, sends some of an increment, cuts one.
    pub(super) fn work(
        &mut self,
        machine: &mut dyn Machine,
        (region, is_waited_for): (&dyn Region, bool),
        control: &dyn ControlChannel<ControlMessage>,
        clock: &dyn Clock,
    ) -> Result<(), TargetError> {
        let now = clock.now();
        if now.saturating_sub(self.asked_at) >= renew_after(self.safety.lease) {
            (self.renewals, self.asked_at) = (self.renewals + 1, now);
            self.asked.push_back((self.renewals, now));
            control.send(&ControlMessage::Renew(self.renewals))?;
        }
        let Some(back) = &mut self.back else { return Ok(()) };
        if let Some(on_its_way) = &mut self.on_its_way {
            if !on_its_way.is_sent
                && let Some(end) = self.flight.send_some(region, back.as_mut())?
            {
                on_its_way.is_sent = true;
                let (stood_ns, safe_ns) = (on_its_way.stood.as_nanos() as u64, std::mem::take(&mut self.safe_ns));
                let end = crate::migrate::Increment { stood_ns, safe_ns, ..end };
                control.send(&ControlMessage::Increment(Box::new(end)))?;
            }
        } else if now.saturating_sub(self.began_at) >= self.safety.every * if is_waited_for { PATIENCE } else { 1 } {
            self.cut(machine, region, clock)?;
        }
        Ok(())
    }

    /// Ends the increment that the VM is at, which stands for that long.
    fn cut(&mut self, machine: &mut dyn Machine, region: &dyn Region, clock: &dyn Clock) -> Result<(), TargetError> {
        let Some(back) = &mut self.back else { return Ok(()) };
        let cut_at = clock.now();
        let mut lap = Lap::since(clock, cut_at);
        machine.pause()?;
        let paused = lap.next();
        machine.harvest(&mut self.at_risk)?;
        protect_all(machine, region)?;
        let harvested = lap.next();
        let state = machine.save_state()?;
        let saved = lap.next();
        // Whatever becomes of it, the VM goes on.
        let cut = self.flight.cut(self.number, region, &self.at_risk, state, back.as_mut());
        let copied = lap.next();
        self.number += 1;
        machine.begin_increment(self.number)?;
        match machine.resume() {
            // The loan was over before it could: it goes on when it is lent anew.
            Ok(()) | Err(MachineError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.began_at = clock.now();
        let (stood, resumed) = (self.began_at.saturating_sub(cut_at), lap.next());
        tracing::debug!(
            number = self.number - 1,
            ?stood,
            ?paused,
            ?harvested,
            ?saved,
            ?copied,
            ?resumed,
            "an increment was cut"
        );
        self.on_its_way = Some(OnItsWay { cut_at, stood, is_sent: false });
        Ok(cut?)
    }

    /// The source has lent the VM for longer.
    fn granted(&mut self, number: u32, machine: &mut dyn Machine, now: Duration) -> Result<(), MachineError> {
        while let Some((asked, at)) = self.asked.pop_front() {
            if asked == number {
                return Self::run_until(borrower_end(at, self.safety.lease), machine, now).map(drop);
            }
        }
        Ok(())
    }

    /// The source goes on from increment `number` if it must.
    fn safe(&mut self, number: u32, machine: &mut dyn Machine, now: Duration) -> Result<(), MachineError> {
        let is_ours = self.on_its_way.as_ref().is_some_and(|on_its_way| on_its_way.is_sent);
        if is_ours
            && number + 1 == self.number
            && let Some(on_its_way) = self.on_its_way.take()
        {
            self.safe_ns = now.saturating_sub(on_its_way.cut_at).as_nanos() as u64;
            self.at_risk.clear();
            machine.let_out(number)?;
        }
        Ok(())
    }
}

impl Target<'_> {
    /// The source lends the VM in answer to what was sent at `asked_at`: it runs. False if that loan is over already.
    pub(super) fn run_on_loan(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        borrowing: &mut Borrowing,
        ledger: &mut BlackoutLedger,
        asked_at: Duration,
    ) -> Result<bool, TargetError> {
        if !borrowing.begin(machine, asked_at, self.clock.now())? {
            return Ok(false);
        }
        self.announce_and_run(id, machine, ledger, Step::Lent)
    }

    /// Hears the source out, and does what is due. Returns how long nothing needs to be done.
    pub(super) fn keep_borrowing(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        (owed, inflow): (&Owed<'_>, &Inflow<'_>),
        loan: &mut Option<Borrowing>,
    ) -> Result<Duration, TargetError> {
        let control = self.link.control();
        while let Some(borrowing) = loan
            && let Some(message) = control.recv(Duration::ZERO)?
        {
            inflow.touch();
            self.hear(id, message, machine, borrowing)?;
        }
        self.look_after(id, machine, loan)?;
        let Some(borrowing) = loan else { return Ok(TICK) };
        let now = self.clock.now();
        let silence = borrowing.safety.lease / 2;
        if borrowing.comes_back.is_some() || now.saturating_sub(borrowing.heard_at) > silence {
            return Err(LinkError::Stalled { doing: "running a VM on loan", after: silence }.into());
        }
        borrowing.work(machine, (owed.region(), owed.is_waited_for()), control.as_ref(), self.clock)?;
        Ok(borrowing.pause(self.clock.now()))
    }

    /// What has become of the machine, and of the loan: it is over when the VM is ours.
    pub(super) fn look_after(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        loan: &mut Option<Borrowing>,
    ) -> Result<(), TargetError> {
        let Some(borrowing) = loan else { return check_alive(machine) };
        match machine.fate() {
            Fate::Resolved(Owner::Here) => borrowing.committed = true,
            Fate::Resolved(_) => return Err(TargetError::ResolvedAway),
            Fate::Waiting | Fate::Dead => check_alive(machine)?,
        }
        if borrowing.committed && self.activate(id, machine, &mut BlackoutLedger::default(), true)? {
            *loan = None;
        }
        Ok(())
    }

    /// What a source says of a loan.
    pub(super) fn hear(
        &mut self,
        id: MigrationId,
        message: ControlMessage,
        machine: &mut dyn Machine,
        borrowing: &mut Borrowing,
    ) -> Result<(), TargetError> {
        let (control, now) = (self.link.control(), self.clock.now());
        borrowing.heard_at = now;
        match message {
            ControlMessage::Granted(number) => borrowing.granted(number, machine, now)?,
            ControlMessage::Safe(number) => borrowing.safe(number, machine, now)?,
            ControlMessage::Commit => borrowing.committed = true,
            ControlMessage::Ping(number) => control.send(&ControlMessage::Pong(number))?,
            ControlMessage::Query(asked) if asked == id => {
                control.send(&ControlMessage::State(TargetState::Prepared))?;
            }
            // It has not heard that the VM runs.
            ControlMessage::Lend => control.send(&ControlMessage::Running(BlackoutLedger::default()))?,
            ControlMessage::Recover { migration, streams } if migration == id => borrowing.comes_back = Some(streams),
            ControlMessage::Cancel(reason) => return Err(self.let_go(id, machine, reason)),
            other => {
                if let Some(other) = self.hear_relay(id, other, machine) {
                    tracing::warn!(migration = %id, got = other.name(), "ignored while the VM is on loan");
                }
            }
        }
        Ok(())
    }

    /// The source takes the VM back.
    fn let_go(&mut self, id: MigrationId, machine: &mut dyn Machine, reason: String) -> TargetError {
        match machine.discard(id) {
            Ok(()) => {
                let _ = self.link.control().send(&ControlMessage::State(TargetState::NeverOwner));
                TargetError::PeerCancelled(reason)
            }
            Err(error) => error.into(),
        }
    }
}

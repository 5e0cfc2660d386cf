//! Watches the VM's writers beside the rounds of pre-copy, and slows those that would keep it from ending in time.
//!
//! Joins what a round has come to with the policy of stunning. Must not know how a vCPU is held, nor when pre-copy stops.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::pacer::Pace;
use crate::model::{PAGE_SIZE, PageCount, PagesPerSecond, StunReport, VmWrites};
use crate::port::{Machine, MachineError};
use crate::stun::{Budget, Controller, Remaining, StunPolicy};

/// How often writers are looked at while a round is sent. Limits end by themselves when nobody has looked for ten times as long.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// So many pages sent, and so much time, say enough of the goodput: less is what buffers took.
const ENOUGH_PAGES: u64 = 64;
const ENOUGH_TIME: Duration = Duration::from_millis(50);

/// What has been sent of a round so far, told by its streams.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pages: AtomicU64,
    zero_pages: AtomicU64,
}

impl Sent {
    pub(super) fn add(&self, pages: u64, zero_pages: u64) {
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.zero_pages.fetch_add(zero_pages, Ordering::Relaxed);
    }

    fn so_far(&self) -> (f64, f64) {
        let zero = self.zero_pages.load(Ordering::Relaxed) as f64;
        (self.pages.load(Ordering::Relaxed) as f64, zero)
    }
}

/// A round as it began.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Duration,
    due: PageCount,
    /// Pages written before it, once that is known.
    written: Option<f64>,
    /// From when on its goodput is measured, and how many pages that were not zero had been sent then: its begin, or when the limit was
    /// changed last.
    measured_from: (Duration, f64),
}

/// The steward of one migration.
#[derive(Debug)]
pub(super) struct Steward {
    budget: Budget,
    controller: Controller,
    first: Option<Duration>,
    round: Option<Round>,
    /// Of what was sent so far in the first round, the part that was not zero.
    full_share: f64,
    memory: PageCount,
    goodput: PagesPerSecond,
    /// The most that may be sent.
    pace: Pace,
    /// That limit when it was looked at last.
    limit: Option<PagesPerSecond>,
    /// Why the machine would not be throttled.
    refused: Option<String>,
}

impl Steward {
    pub(super) fn new(budget: Budget, policy: StunPolicy, pace: Pace) -> Self {
        let limit = page_limit(&pace);
        Self {
            budget,
            controller: Controller::new(policy),
            first: None,
            round: None,
            full_share: 1.0,
            memory: PageCount(0),
            goodput: limit.unwrap_or_default(),
            pace,
            limit,
            refused: None,
        }
    }

    /// A round of `due` pages begins now.
    pub(super) fn begin_round(
        &mut self,
        machine: &Mutex<&mut dyn Machine>,
        due: PageCount,
        now: Duration,
    ) -> Result<(), MachineError> {
        let first = self.first.is_none();
        self.first.get_or_insert(now);
        if first {
            self.memory = due;
        }
        self.round = Some(Round { began: now, due, written: None, measured_from: (now, 0.0) });
        self.look(machine, &Sent::default(), now)
    }

    /// Looks at the writers, and limits them until the next look. A machine that refuses is not asked again.
    ///
    /// # Errors
    /// The machine is gone.
    pub(super) fn look(
        &mut self,
        machine: &Mutex<&mut dyn Machine>,
        sent: &Sent,
        now: Duration,
    ) -> Result<(), MachineError> {
        if self.refused.is_some() {
            return Ok(());
        }
        // Twice: what was written decides the limits.
        let throttle = |limits: &[_]| {
            let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
            machine.throttle(limits)
        };
        let answer = throttle(&self.controller.limits()).and_then(|writes| {
            let allowed = self.allowed(&writes, sent, now);
            let before = self.controller.limits();
            let limits = self.controller.look(&writes, allowed);
            if limits != before {
                tracing::debug!(?limits, ?allowed, "limits of the vCPUs");
                throttle(&limits)?;
            }
            Ok(())
        });
        match answer {
            Err(MachineError::Refused { reason, .. }) => {
                tracing::warn!("the VM's writers cannot be slowed: {reason}");
                self.refused = Some(reason);
                Ok(())
            }
            other => other,
        }
    }

    /// What all writers may dirty per second.
    fn allowed(&mut self, writes: &VmWrites, sent: &Sent, now: Duration) -> Option<PagesPerSecond> {
        let round = self.round.as_mut()?;
        let so_far = written(writes);
        let dirty = so_far - *round.written.get_or_insert(so_far);
        let (pages, zero) = sent.so_far();
        let limit = page_limit(&self.pace);
        if limit != self.limit {
            // What was sent under another limit says nothing of this one.
            round.measured_from = (now, pages - zero);
            self.goodput = limit.unwrap_or(self.goodput);
            self.limit = limit;
        }
        let round = *round;
        let is_first = self.first == Some(round.began);
        if is_first && pages > 0.0 {
            self.full_share = (pages - zero) / pages;
            self.memory = PageCount((round.due.0 as f64 * self.full_share) as u64);
        }
        let (from, before) = round.measured_from;
        let (full, spent) = (pages - zero - before, now.saturating_sub(from).as_secs_f64());
        if full >= ENOUGH_PAGES as f64 && spent >= ENOUGH_TIME.as_secs_f64() {
            self.goodput = PagesPerSecond(full / spent);
        }
        if let Some(limit) = self.limit
            && self.goodput > limit
        {
            self.goodput = limit;
        }
        // What is due in later rounds was written: next to none of it is zero.
        let share = if is_first { self.full_share } else { 1.0 };
        self.budget.allowed(&Remaining {
            elapsed: now.saturating_sub(self.first?),
            memory: self.memory,
            unsent: PageCount(((round.due.0 as f64 - pages).max(0.0) * share) as u64),
            dirty: PageCount(dirty.max(0.0) as u64),
            goodput: self.goodput,
        })
    }

    /// Pre-copy does not end like this: from now on writers are held as far as they may be. False: they are already.
    pub(super) fn press(&mut self) -> bool {
        let was = std::mem::replace(&mut self.budget.stretch, 0.0);
        was > 0.0 && self.refused.is_none()
    }

    /// What was done; why it could not be, if the machine refused.
    pub(super) fn report(&self) -> StunReport {
        let mut report = self.controller.report();
        if let Some(refused) = &self.refused {
            report.gave_up.clone_from(refused);
        }
        report
    }
}

fn page_limit(pace: &Pace) -> Option<PagesPerSecond> {
    pace.limit().map(|limit| PagesPerSecond(limit.0 as f64 / PAGE_SIZE as f64))
}

fn written(writes: &VmWrites) -> f64 {
    writes.vcpus.iter().map(|vcpu| vcpu.pages).sum::<f64>() + writes.others_pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BytesPerSecond, VcpuWrites};
    use crate::stun::STRETCH;

    /// What is allowed follows a limit that is changed in the middle of a round, at once, though the round's mean does not.
    #[test]
    fn a_new_limit_is_what_writers_are_judged_by() {
        let pace = Pace::new(Some(BytesPerSecond(10_000 * PAGE_SIZE as u64)));
        let budget = Budget { stretch: STRETCH, memory_time: Duration::from_millis(27) };
        let mut steward = Steward::new(budget, StunPolicy::default(), pace.clone());
        let second = Duration::from_secs(1);
        steward.first = Some(Duration::ZERO);
        steward.round = Some(Round {
            began: Duration::ZERO,
            due: PageCount(100_000),
            written: None,
            measured_from: (Duration::ZERO, 0.0),
        });
        let writes = VmWrites { vcpus: vec![VcpuWrites::default()], ..VmWrites::default() };
        let sent = Sent::default();
        sent.add(60_000, 0);
        let before = steward.allowed(&writes, &sent, second).unwrap();
        pace.set_limit(Some(BytesPerSecond(40_000 * PAGE_SIZE as u64)));
        let raised = steward.allowed(&writes, &sent, second).unwrap();
        assert!(steward.goodput == PagesPerSecond(40_000.0) && raised.0 > 2.0 * before.0, "{before:?} {raised:?}");
        sent.add(20_000, 0);
        steward.allowed(&writes, &sent, 2 * second);
        assert_eq!(steward.goodput, PagesPerSecond(20_000.0), "measured from the change on");
        pace.set_limit(Some(BytesPerSecond(1_000 * PAGE_SIZE as u64)));
        steward.allowed(&writes, &sent, 2 * second);
        assert_eq!(steward.goodput, PagesPerSecond(1_000.0));
    }
}

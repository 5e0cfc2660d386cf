//! Owns the book-keeping that tells a lost or doubled interrupt from a machine that was merely paused.
//!
//! The rule everywhere: time counts only when it was seen passing in small steps. When the whole machine was paused or moved,
//! the time stamp counter jumps between two looks, and the jump is clipped, so no bound runs out because of it.

/// A clock that counts only time in which its owner was seen running or asleep as planned.
#[derive(Clone, Copy, Debug)]
pub struct RunClock {
    last: u64,
    cycles: u64,
    slack: u64,
}

impl RunClock {
    /// Starts at `now`; a look later than planned counts at most `slack` cycles beyond the plan.
    pub fn new(now: u64, slack: u64) -> Self {
        Self { last: now, cycles: 0, slack }
    }

    /// Looks at the time. `planned` is when this look was planned (the end of a sleep), or 0 for "as soon as possible".
    pub fn look(&mut self, now: u64, planned: u64) -> u64 {
        let step = now.saturating_sub(self.last);
        let allowed = planned.saturating_sub(self.last).saturating_add(self.slack);
        self.cycles += step.min(allowed);
        self.last = self.last.max(now);
        self.cycles
    }

    /// Cycles counted so far.
    pub fn cycles(&self) -> u64 {
        self.cycles
    }
}

/// Cycles for which a vCPU wanted to run and was not seen running: from its last look, or from the planned end of its sleep,
/// to this look.
#[inline]
pub fn gap_cycles(last: u64, planned: u64, now: u64) -> u64 {
    if last == 0 { 0 } else { now.saturating_sub(last.max(planned)) }
}

/// What the sender of inter-processor interrupts may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ping {
    /// The last one was counted: send the next.
    Send,
    /// The last one is still under way.
    Wait,
}

/// Exactly-once book of one sender and one receiver: the next is sent only when the last was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct PingLedger {
    /// Sent so far.
    pub sent: u64,
    /// Counted as lost.
    pub lost: u64,
    /// Counted as received more often than sent.
    pub doubled: u64,
    sent_at_cycles: u64,
    sent_at_rounds: u64,
}

/// Rounds that a receiver must have made since an interrupt was sent, before it can count as lost.
const RECEIVER_ROUNDS: u64 = 3;

impl PingLedger {
    /// Looks at the receiver: `received` is its counter, `receiver_rounds` how often its monitor ran (an interrupt that is
    /// pending is taken before that), `run_cycles` the sender's run clock, `bound_cycles` the patience.
    ///
    /// Nothing is to be sent before the receiver's first round: until then its LAPIC may still be disabled by software, and
    /// such a LAPIC does not accept an interrupt (Intel SDM volume 3, "Local APIC State After It Has Been Software Disabled").
    pub fn look(&mut self, received: u64, receiver_rounds: u64, run_cycles: u64, bound_cycles: u64) -> Ping {
        if receiver_rounds == 0 {
            return Ping::Wait;
        }
        let expected = self.sent - self.lost + self.doubled;
        if received > expected {
            self.doubled += received - expected;
            return Ping::Send;
        }
        if received == expected {
            return Ping::Send;
        }
        let waited = run_cycles.saturating_sub(self.sent_at_cycles);
        if waited > bound_cycles && receiver_rounds >= self.sent_at_rounds + RECEIVER_ROUNDS {
            self.lost += expected - received;
            return Ping::Send;
        }
        Ping::Wait
    }

    /// Counts one as sent; call before it is sent.
    pub fn sending(&mut self, receiver_rounds: u64, run_cycles: u64) {
        self.sent += 1;
        self.sent_at_cycles = run_cycles;
        self.sent_at_rounds = receiver_rounds;
    }
}

/// Book of one device: does each progress of its used ring come with an interrupt?
#[derive(Clone, Copy, Debug, Default)]
pub struct IrqLedger {
    seen_interrupts: u64,
    unclaimed_since: Option<u64>,
    /// Progress for which no interrupt came within the bound.
    pub lost: u64,
    /// Interrupts with nothing new (legal, reported only).
    pub spurious: u64,
}

impl IrqLedger {
    /// One look at the rings. `interrupts` is the interrupt counter read *before* the rings were read, `owed_progress` says
    /// whether a ring moved that owes an interrupt, `any_progress` whether any ring moved.
    pub fn look(
        &mut self,
        interrupts: u64,
        owed_progress: bool,
        any_progress: bool,
        run_cycles: u64,
        bound_cycles: u64,
    ) {
        if interrupts != self.seen_interrupts {
            self.seen_interrupts = interrupts;
            if !any_progress && self.unclaimed_since.is_none() {
                self.spurious += 1;
            }
            self.unclaimed_since = None;
            return;
        }
        if owed_progress && self.unclaimed_since.is_none() {
            self.unclaimed_since = Some(run_cycles);
        }
        if self.unclaimed_since.is_some_and(|since| run_cycles.saturating_sub(since) > bound_cycles) {
            self.lost += 1;
            self.unclaimed_since = None;
        }
    }

    /// True when an interrupt came since the last look.
    pub fn is_new(&self, interrupts: u64) -> bool {
        interrupts != self.seen_interrupts
    }
}

/// Watches a timer that should fire again and again.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimerWatch {
    ticks: u64,
    quiet_since: u64,
    /// Times the timer was overdue beyond the bound.
    pub stalls: u64,
}

impl TimerWatch {
    /// One look: `overdue` says whether the timer's time has passed. True when it must be re-armed (one stall counted).
    pub fn look(&mut self, ticks: u64, overdue: bool, run_cycles: u64, bound_cycles: u64) -> bool {
        if ticks != self.ticks || !overdue {
            self.ticks = ticks;
            self.quiet_since = run_cycles;
            return false;
        }
        if run_cycles.saturating_sub(self.quiet_since) <= bound_cycles {
            return false;
        }
        self.stalls += 1;
        self.quiet_since = run_cycles;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_clock_counts_small_steps_and_planned_sleep_but_no_jump() {
        let mut clock = RunClock::new(0, 10);
        assert_eq!(clock.look(5, 0), 5);
        assert_eq!(clock.look(105, 100), 105);
        assert_eq!(clock.look(1_000_105, 0), 115);
        assert_eq!(clock.look(2_000_000, 1_000_200), 115 + 95 + 10);
        assert_eq!(clock.look(1_500_000, 0), clock.cycles());
    }

    #[test]
    fn gap_is_lateness_not_sleep() {
        assert_eq!(gap_cycles(0, 0, 5_000), 0);
        assert_eq!(gap_cycles(1_000, 1_990, 2_000), 10);
        assert_eq!(gap_cycles(2_000, 0, 2_050), 50);
        assert_eq!(gap_cycles(2_050, 9_000, 2_060), 0);
    }

    #[test]
    fn pings_are_exactly_once() {
        let mut book = PingLedger::default();
        assert_eq!(book.look(0, 1, 0, 100), Ping::Send);
        book.sending(1, 0);
        assert_eq!(book.look(0, 2, 50, 100), Ping::Wait);
        assert_eq!(book.look(1, 2, 60, 100), Ping::Send);
        assert_eq!((book.sent, book.lost, book.doubled), (1, 0, 0));
    }

    #[test]
    fn a_ping_is_lost_only_when_the_receiver_ran() {
        let mut book = PingLedger::default();
        book.sending(10, 0);
        assert_eq!(book.look(0, 10, 1_000, 100), Ping::Wait);
        assert_eq!(book.look(0, 13, 1_001, 100), Ping::Send);
        assert_eq!(book.lost, 1);
        book.sending(13, 1_001);
        assert_eq!(book.look(1, 14, 1_010, 100), Ping::Send);
        assert_eq!((book.lost, book.doubled), (1, 0));
    }

    #[test]
    fn nothing_is_sent_to_a_receiver_that_may_not_have_enabled_its_lapic() {
        let mut book = PingLedger::default();
        assert_eq!(book.look(0, 0, 1_000, 100), Ping::Wait);
        assert_eq!(book.look(0, 1, 1_001, 100), Ping::Send);
        assert_eq!((book.sent, book.lost), (0, 0));
    }

    #[test]
    fn a_ping_received_twice_is_doubled_once() {
        let mut book = PingLedger::default();
        book.sending(1, 0);
        assert_eq!(book.look(2, 1, 0, 100), Ping::Send);
        assert_eq!(book.doubled, 1);
        book.sending(1, 0);
        assert_eq!(book.look(2, 1, 1, 100), Ping::Wait);
        assert_eq!(book.look(3, 1, 1, 100), Ping::Send);
        assert_eq!((book.lost, book.doubled), (0, 1));
    }

    #[test]
    fn progress_with_a_late_interrupt_is_fine() {
        let mut book = IrqLedger::default();
        book.look(0, true, true, 0, 100);
        assert!(book.is_new(1) && !book.is_new(0));
        book.look(1, false, false, 50, 100);
        assert_eq!((book.lost, book.spurious), (0, 0));
        book.look(1, false, false, 500, 100);
        assert_eq!(book.lost, 0);
    }

    #[test]
    fn progress_without_interrupt_is_lost_and_interrupt_without_progress_spurious() {
        let mut book = IrqLedger::default();
        book.look(0, true, true, 0, 100);
        book.look(0, false, false, 101, 100);
        assert_eq!(book.lost, 1);
        book.look(1, false, false, 102, 100);
        assert_eq!(book.spurious, 1);
        book.look(2, false, true, 103, 100);
        assert_eq!(book.spurious, 1);
    }

    #[test]
    fn a_timer_stalls_only_after_observed_quiet_while_overdue() {
        let mut watch = TimerWatch::default();
        assert!(!watch.look(1, true, 0, 100));
        assert!(!watch.look(1, true, 100, 100));
        assert!(watch.look(1, true, 101, 100));
        assert!(!watch.look(1, true, 150, 100));
        assert!(!watch.look(1, false, 1_000, 100));
        assert!(!watch.look(1, true, 1_050, 100));
        assert_eq!(watch.stalls, 1);
    }
}

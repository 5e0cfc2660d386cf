//! How far a migration is, for whoever looks: follows its steps and rounds at the source, and tells them to a terminal.
//!
//! Owns what is remembered of them. Must not know who asks, nor how: that is [`super::steering`].

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use crate::migrate::{Eta, Going, Observer, Pace, eta};
use crate::model::id::VmName;
use crate::model::units::display_duration;
use crate::model::{
    BytesPerSecond, Chosen, MigrationId, MigrationReport, MigrationStatus, PageCount, RoundReport, Step, VmId,
};
use crate::time::unix_ms;

/// The goodput is that of so much time.
const GOODPUT_TIME: Duration = Duration::from_secs(2);
/// Looks at it are at least so far apart.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
/// Less time says nothing of it.
const LEAST_TIME: Duration = Duration::from_millis(20);

/// What is known of a migration from its begin on.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The migration.
    pub migration_id: MigrationId,
    /// The VM.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: VmName,
    /// The target's address.
    pub target: String,
    /// How what is sent is encrypted.
    pub encryption: String,
    /// The strategy's name.
    pub strategy: String,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// The blackout that is asked for as a limit.
    pub downtime: Duration,
    /// What switching over takes besides the last pages.
    pub fixed_cost: Duration,
    /// Which strategy was taken by itself, and why.
    pub chosen: Option<Chosen>,
}

/// A migration under way.
#[derive(Debug)]
pub struct Progress {
    plan: Plan,
    pace: Pace,
    began: Instant,
    since_unix_ms: u64,
    state: Mutex<State>,
    bar: Option<ProgressBar>,
    ended: watch::Sender<Option<Arc<MigrationReport>>>,
}

#[derive(Debug)]
struct State {
    step: Step,
    round: u32,
    due_pages: u64,
    sent_pages: u64,
    /// What had been sent before the round, in bytes.
    sent_before: u64,
    last_round: Option<RoundReport>,
    /// What had been sent when, the oldest first.
    samples: VecDeque<(Instant, u64)>,
    goodput: BytesPerSecond,
}

impl State {
    fn begin_round(&mut self, round: u32, due_pages: u64, sent_bytes: u64, now: Instant) {
        (self.round, self.due_pages, self.sent_pages, self.sent_before) = (round, due_pages, 0, sent_bytes);
        self.restart(sent_bytes, now);
    }

    /// From now on the goodput is another.
    fn restart(&mut self, sent_bytes: u64, now: Instant) {
        self.samples.clear();
        self.samples.push_back((now, sent_bytes));
    }

    fn sample(&mut self, sent_bytes: u64, now: Instant) {
        while self.samples.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= GOODPUT_TIME) {
            self.samples.pop_front();
        }
        if let Some((at, before)) = self.samples.front() {
            let time = now.saturating_duration_since(*at);
            if time >= LEAST_TIME {
                self.goodput = BytesPerSecond::over(sent_bytes.saturating_sub(*before), time);
            }
        }
        if self.samples.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= SAMPLE_EVERY) {
            self.samples.push_back((now, sent_bytes));
        }
    }

    /// Whether pages are being sent.
    fn is_sending(&self) -> bool {
        matches!(self.step, Step::Round | Step::Paused)
    }
}

/// Whether a migration that has passed `step` can no longer be cancelled.
fn is_released(step: Step) -> bool {
    let place = |step: Step| Step::ALL.iter().position(|other| *other == step);
    place(step) >= place(Step::Released)
}

impl Progress {
    /// A migration that begins now. Shown on a terminal if `show` and standard error is one.
    pub fn new(plan: Plan, pace: Pace, show: bool) -> Self {
        let bar = (show && io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{prefix:>10} [{bar:30}] {percent:>3}% {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(1).with_style(style)
        });
        let state = State {
            step: Step::Connected,
            round: 0,
            due_pages: 0,
            sent_pages: 0,
            sent_before: 0,
            last_round: None,
            samples: VecDeque::new(),
            goodput: BytesPerSecond(0),
        };
        Self {
            plan,
            pace,
            began: Instant::now(),
            since_unix_ms: unix_ms(),
            state: Mutex::new(state),
            bar,
            ended: watch::Sender::new(None),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of it from its begin on.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where it is, but for its throttle.
    pub fn status(&self) -> MigrationStatus {
        let mut state = self.state();
        self.look(&mut state);
        let eta = self.eta(&state);
        let ns = |time: Option<Duration>| time.map(|time| time.as_nanos() as u64);
        MigrationStatus {
            migration_id: self.plan.migration_id,
            vm_id: self.plan.vm_id,
            vm_name: self.plan.vm_name.clone(),
            pid: std::process::id(),
            target: self.plan.target.clone(),
            encryption: self.plan.encryption.clone(),
            strategy: self.plan.strategy.clone(),
            chosen: self.plan.chosen.clone(),
            since_unix_ms: self.since_unix_ms,
            elapsed_ns: self.began.elapsed().as_nanos() as u64,
            step: state.step,
            stage: state.step.stage(),
            can_be_cancelled: !is_released(state.step) && self.ended.borrow().is_none(),
            round: state.round,
            due_pages: state.due_pages,
            sent_pages: state.sent_pages,
            memory_bytes: self.plan.memory_bytes,
            sent_bytes: self.pace.sent_bytes(),
            goodput_bytes_per_second: state.goodput.0,
            bandwidth_bytes_per_second: self.pace.limit().map(|limit| limit.0),
            last_round: state.last_round.clone(),
            round_ends_in_ns: ns(eta.round),
            pauses_in_ns: ns(eta.pause),
            expected_blackout_ns: ns(eta.blackout),
            ends_in_ns: ns(eta.end),
            downtime_target_ns: self.plan.downtime.as_nanos() as u64,
            throttle: None,
        }
    }

    /// Changes the bandwidth limit; what was sent under the old one counts for the goodput no more.
    pub fn set_limit(&self, limit: Option<BytesPerSecond>) {
        self.pace.set_limit(limit);
        self.state().restart(self.pace.sent_bytes(), Instant::now());
    }

    /// Lets what waits until it is asked for go; false if nothing waited.
    pub fn finish(&self) -> bool {
        let waited = self.pace.waits_until_asked();
        self.pace.finish();
        waited
    }

    /// The bandwidth limit.
    pub fn limit(&self) -> Option<BytesPerSecond> {
        self.pace.limit()
    }

    /// It has ended.
    pub fn end(&self, report: MigrationReport) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.ended.send_replace(Some(Arc::new(report)));
    }

    /// How it ended, once it has.
    pub fn ended(&self) -> watch::Receiver<Option<Arc<MigrationReport>>> {
        self.ended.subscribe()
    }

    fn look(&self, state: &mut State) {
        if state.is_sending() {
            state.sample(self.pace.sent_bytes(), Instant::now());
        }
    }

    fn eta(&self, state: &State) -> Eta {
        if !state.is_sending() {
            return Eta::default();
        }
        eta(&Going {
            due_pages: state.due_pages,
            sent_pages: state.sent_pages,
            sent_bytes: self.pace.sent_bytes().saturating_sub(state.sent_before),
            is_paused: state.step == Step::Paused,
            goodput: state.goodput,
            last_round: state.last_round.as_ref(),
            memory_time: self.plan.downtime.saturating_sub(self.plan.fixed_cost),
            fixed_cost: self.plan.fixed_cost,
        })
    }

    /// Pages that are due in the next round, as far as it is known before it begins.
    fn next_due(&self, state: &State) -> u64 {
        state.last_round.as_ref().map_or(PageCount::covering(self.plan.memory_bytes).0, |last| last.dirtied_pages)
    }

    fn show(&self, state: &State, detail: &str) {
        let Some(bar) = &self.bar else { return };
        if !state.is_sending() {
            bar.set_prefix(state.step.name());
            bar.set_message(detail.to_owned());
            return;
        }
        bar.set_prefix(format!("round {}", state.round));
        bar.set_length(state.due_pages);
        bar.set_position(state.sent_pages);
        bar.set_message(words(state.goodput, self.eta(state)));
    }
}

/// Goodput and what is to come, for a terminal.
fn words(goodput: BytesPerSecond, eta: Eta) -> String {
    let mut words = goodput.to_string();
    let mut add = |what: &str, time: Option<Duration>| {
        if let Some(time) = time {
            words += &format!(", {what} {}", display_duration(time));
        }
    };
    add("round ends in", eta.round.filter(|_| eta.end.is_none()));
    add("pauses in", eta.pause);
    add("for", eta.blackout.filter(|_| eta.pause.is_some()));
    add("ends in", eta.end);
    words
}

impl Observer for Progress {
    fn step(&self, step: Step, detail: &str) {
        let mut state = self.state();
        state.step = step;
        if state.is_sending() {
            let (round, due) = (state.round + 1, self.next_due(&state));
            state.begin_round(round, due, self.pace.sent_bytes(), Instant::now());
        }
        self.show(&state, detail);
    }

    fn round(&self, round: &RoundReport) {
        self.state().last_round = Some(round.clone());
    }

    fn progress(&self, round: u32, sent_pages: u64, due_pages: u64) {
        let mut state = self.state();
        if state.round != round {
            state.begin_round(round, due_pages, self.pace.sent_bytes(), Instant::now());
        }
        state.due_pages = due_pages;
        // Streams tell it in no order.
        state.sent_pages = state.sent_pages.max(sent_pages);
        self.look(&mut state);
        self.show(&state, "");
    }
}

/// Tells several, in their order. An event log may hold a manager at a step: it is told last.
pub struct All<'a>(pub &'a [&'a dyn Observer]);

impl Observer for All<'_> {
    fn step(&self, step: Step, detail: &str) {
        self.0.iter().for_each(|observer| observer.step(step, detail));
    }

    fn round(&self, round: &RoundReport) {
        self.0.iter().for_each(|observer| observer.round(round));
    }

    fn progress(&self, round: u32, sent_pages: u64, due_pages: u64) {
        self.0.iter().for_each(|observer| observer.progress(round, sent_pages, due_pages));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::port::Clock;

    /// A migration of 64 MiB that has just begun.
    pub(in crate::service) fn begun(limit: Option<BytesPerSecond>) -> Progress {
        let plan = Plan {
            migration_id: MigrationId::random(),
            vm_id: VmId::random(),
            vm_name: "a".parse().unwrap(),
            target: "tcp://192.0.2.1:1".to_owned(),
            encryption: "none".to_owned(),
            strategy: "pre-copy".to_owned(),
            memory_bytes: 64 << 20,
            downtime: Duration::from_millis(30),
            fixed_cost: Duration::from_millis(3),
            chosen: None,
        };
        Progress::new(plan, Pace::new(limit), false)
    }

    #[test]
    fn rounds_are_followed() {
        let progress = begun(None);
        let at_first = progress.status();
        assert!(at_first.round == 0 && at_first.can_be_cancelled && at_first.round_ends_in_ns.is_none());
        progress.step(Step::Round, "");
        let first = progress.status();
        assert_eq!((first.round, first.due_pages, first.sent_pages), (1, 16_384, 0));
        progress.progress(1, 512, 16_384);
        progress.progress(1, 256, 16_384);
        assert_eq!(progress.status().sent_pages, 512, "news that were overtaken");
        progress.round(&RoundReport { round: 1, dirtied_pages: 77, ..RoundReport::default() });
        progress.step(Step::Round, "");
        let second = progress.status();
        assert_eq!((second.round, second.due_pages, second.sent_pages), (2, 77, 0));
        assert_eq!(second.last_round.unwrap().dirtied_pages, 77);
        progress.step(Step::Paused, "");
        progress.progress(3, 5, 9);
        let paused = progress.status();
        assert_eq!((paused.round, paused.due_pages, paused.sent_pages), (3, 9, 5));
        progress.step(Step::Prepared, "");
        assert!(progress.status().can_be_cancelled);
        for step in [Step::Released, Step::Running, Step::Discarded] {
            progress.step(step, "");
            assert!(!progress.status().can_be_cancelled, "{step}");
        }
    }

    #[test]
    fn the_goodput_is_that_of_late() {
        let mut state = State {
            step: Step::Round,
            round: 1,
            due_pages: 1,
            sent_pages: 0,
            sent_before: 0,
            last_round: None,
            samples: VecDeque::new(),
            goodput: BytesPerSecond(0),
        };
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        state.restart(0, began);
        for step in 1..=100 {
            state.sample(step * 10_000, at(step * 10));
        }
        assert_eq!(state.goodput, BytesPerSecond(1_000_000));
        // Nothing more: two seconds later nothing is left of it, and no more than that is remembered.
        for ms in 1001..4000 {
            state.sample(1_000_000, at(ms));
        }
        assert_eq!(state.goodput, BytesPerSecond(0));
        assert!(state.samples.len() <= 43, "{}", state.samples.len());
        state.restart(1_000_000, at(4000));
        state.sample(1_200_000, at(4100));
        assert_eq!(state.goodput, BytesPerSecond(2_000_000));
    }

    #[test]
    fn what_is_to_come_is_told_as_far_as_it_is_known() {
        let ms = Duration::from_millis;
        let goodput = BytesPerSecond(100 << 20);
        let first = Eta { round: Some(ms(3200)), ..Eta::default() };
        assert_eq!(words(goodput, first), "100.0 MiB/s, round ends in 3.20 s");
        let second = Eta { round: Some(ms(100)), pause: Some(ms(150)), blackout: Some(ms(8)), end: Some(ms(158)) };
        assert_eq!(words(goodput, second), "100.0 MiB/s, pauses in 150.00 ms, for 8.00 ms, ends in 158.00 ms");
        assert_eq!(words(BytesPerSecond(0), Eta::default()), "0.0 MiB/s");
    }

    #[test]
    fn a_changed_limit_is_measured_anew() {
        let progress = begun(Some(BytesPerSecond(1_000)));
        progress.step(Step::Round, "");
        progress.set_limit(None);
        assert_eq!(progress.status().bandwidth_bytes_per_second, None);
        let clock = crate::service::clock::MonotonicClock;
        let pacer = crate::migrate::Pacer::new(&clock, progress.pace.clone());
        pacer.pay(1 << 20);
        assert_eq!(progress.status().sent_bytes, 1 << 20);
        clock.sleep(LEAST_TIME);
        assert!(progress.status().goodput_bytes_per_second > 0);
    }
}

//! Who may write how much until the next look: feedback on what was written since the last.
//!
//! Owns the hysteresis and the operator's bounds. Must not know the link: what may be written in all is told ([`super::Budget`]), and how a vCPU is held is the
//! port's ([`crate::port::Throttle`]).
//!
//! The rate of each vCPU is kept exactly by its bucket, whatever the vCPU could write; the loop only decides who has a bucket and how large. So it
//! cannot oscillate by its own delay: a limit does not depend on how well the one before was kept. Who was limited is let go only after it has
//! not been held for half a second, so that a writer with pauses is not let go and caught in turn.

use std::collections::BTreeSet;
use std::time::Duration;

use super::share::{Demand, share};
use crate::model::{PagesPerSecond, StunReport, VcpuLimit, VcpuStun, VcpuWrites, VmWrites};

/// A limited vCPU that was not held for so long wants no more than its limit.
const CALM: Duration = Duration::from_millis(500);
/// So long after it was limited first a vCPU is to write what it may.
const SETTLED: Duration = Duration::from_secs(1);
/// Looks that lie closer together say nothing of rates.
const SHORTEST_LOOK: Duration = Duration::from_millis(5);

/// What an operator allows.
#[derive(Clone, Debug, PartialEq)]
pub struct StunPolicy {
    /// vCPUs that are never held.
    pub never: BTreeSet<u32>,
    /// The only vCPUs that count and may be held; empty: all.
    pub only: BTreeSet<u32>,
    /// The largest part of its time for which a vCPU may be held, 0 to 1.
    pub max_share: f64,
    /// When vCPUs have been held for so long, all together, everybody is let go for good.
    pub max_total: Duration,
    /// How long a limit takes to come down to what it is to be.
    pub ramp: Duration,
    /// Whether, within a vCPU, only the address spaces that write most are held.
    pub by_address_space: bool,
}

impl Default for StunPolicy {
    fn default() -> Self {
        Self {
            never: BTreeSet::new(),
            only: BTreeSet::new(),
            max_share: 0.99,
            max_total: Duration::from_mins(2),
            ramp: Duration::from_millis(200),
            by_address_space: true,
        }
    }
}

/// One vCPU as the controller has it.
#[derive(Clone, Debug, Default)]
struct State {
    limit: Option<f64>,
    calm: Duration,
    /// What it wrote when it was limited, and for how long it has been.
    ramp: (f64, Duration),
    /// What it writes per second of the time for which it is not held.
    speed: f64,
    done: VcpuStun,
    limited: Sums,
    /// From [`SETTLED`] on.
    settled: Sums,
}

/// What was written under limits, and what could have been.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    seconds: f64,
    pages: f64,
    allowed: f64,
}

impl Sums {
    fn add(&mut self, seconds: f64, pages: f64, limit: f64) {
        self.seconds += seconds;
        self.pages += pages;
        self.allowed += limit * seconds;
    }

    /// Per second: written, and allowed.
    fn rates(&self) -> (f64, f64) {
        let seconds = if self.seconds > 0.0 { self.seconds } else { 1.0 };
        (self.pages / seconds, self.allowed / seconds)
    }
}

/// The feedback loop of one VM.
#[derive(Clone, Debug)]
pub struct Controller {
    policy: StunPolicy,
    vcpus: Vec<State>,
    before: Option<VmWrites>,
    first_limit_ns: Option<u64>,
    last_limit_ns: u64,
    gave_up: String,
}

impl Controller {
    /// Nobody is limited.
    pub fn new(policy: StunPolicy) -> Self {
        Self { policy, vcpus: Vec::new(), before: None, first_limit_ns: None, last_limit_ns: 0, gave_up: String::new() }
    }

    /// What each vCPU may write until the next look, if all may write `allowed`; none is no limit. The first look only remembers.
    pub fn look(&mut self, now: &VmWrites, allowed: Option<PagesPerSecond>) -> Vec<Option<VcpuLimit>> {
        self.vcpus.resize_with(now.vcpus.len(), State::default);
        let before = self.before.get_or_insert_with(|| now.clone()).clone();
        let span = Duration::from_nanos(now.at_ns.saturating_sub(before.at_ns));
        if span < SHORTEST_LOOK {
            return self.limits();
        }
        let nothing = VcpuWrites::default();
        let mut demands = Vec::with_capacity(now.vcpus.len());
        for (index, (state, writes)) in self.vcpus.iter_mut().zip(&now.vcpus).enumerate() {
            let before = before.vcpus.get(index).unwrap_or(&nothing);
            let index = index as u32;
            let rate = state.see(index, writes, before, span);
            let counts = self.policy.only.is_empty() || self.policy.only.contains(&index);
            let is_exempt = !counts || self.policy.never.contains(&index);
            // Those that do not count are not taken off what the others may write.
            let rate = if counts { rate } else { 0.0 };
            demands.push(Demand {
                rate: PagesPerSecond(rate),
                is_hungry: state.limit.is_some() && state.calm < CALM,
                is_exempt,
            });
        }
        let others = if self.policy.only.is_empty() {
            (now.others_pages - before.others_pages).max(0.0) / span.as_secs_f64()
        } else {
            0.0
        };
        self.before = Some(now.clone());
        let held: u64 = now.vcpus.iter().map(|vcpu| vcpu.held_ns).sum();
        if self.gave_up.is_empty() && Duration::from_nanos(held) > self.policy.max_total {
            self.gave_up = format!(
                "vCPUs were held for {:.1} s in all, more than the {:.1} s that are allowed",
                held as f64 / 1e9,
                self.policy.max_total.as_secs_f64()
            );
        }
        let allowed = allowed.filter(|_| self.gave_up.is_empty());
        let wanted = allowed
            .map_or_else(|| vec![None; demands.len()], |allowed| share(&demands, PagesPerSecond(others), allowed));
        for (state, wanted) in self.vcpus.iter_mut().zip(wanted) {
            state.set_limit(wanted.map(|rate| rate.0), span, &self.policy);
        }
        if self.vcpus.iter().any(|state| state.limit.is_some()) {
            self.first_limit_ns.get_or_insert(now.at_ns);
            self.last_limit_ns = now.at_ns;
        }
        self.limits()
    }

    /// What each vCPU may write at present.
    pub fn limits(&self) -> Vec<Option<VcpuLimit>> {
        let by_address_space = self.policy.by_address_space;
        let limit = |state: &State| state.limit.map(|rate| VcpuLimit { rate: PagesPerSecond(rate), by_address_space });
        self.vcpus.iter().map(limit).collect()
    }

    /// Whether anybody is limited.
    pub fn is_stunning(&self) -> bool {
        self.vcpus.iter().any(|state| state.limit.is_some())
    }

    /// What was done so far.
    pub fn report(&self) -> StunReport {
        let vcpus: Vec<VcpuStun> = self
            .vcpus
            .iter()
            .filter(|state| state.done.held_ns > 0)
            .map(|state| {
                let (limited_pages_per_second, mean_limit_pages_per_second) = state.limited.rates();
                let (settled_pages_per_second, settled_limit_pages_per_second) = state.settled.rates();
                VcpuStun {
                    mean_limit_pages_per_second,
                    limited_pages_per_second,
                    settled_limit_pages_per_second,
                    settled_pages_per_second,
                    ..state.done.clone()
                }
            })
            .collect();
        StunReport {
            stunned_ns: self.first_limit_ns.map_or(0, |first| self.last_limit_ns - first),
            guest_time_lost_ns: vcpus.iter().map(|vcpu| vcpu.held_ns).sum(),
            attribution: self.before.as_ref().map(|before| before.attribution).unwrap_or_default(),
            vcpus,
            gave_up: self.gave_up.clone(),
        }
    }
}

impl State {
    /// Takes in what it wrote in `span`; returns its rate.
    fn see(&mut self, index: u32, now: &VcpuWrites, before: &VcpuWrites, span: Duration) -> f64 {
        let seconds = span.as_secs_f64();
        let pages = (now.pages - before.pages).max(0.0);
        let held_ns = now.held_ns.saturating_sub(before.held_ns);
        let rate = pages / seconds;
        let free = seconds - held_ns as f64 / 1e9;
        if free > seconds * 0.005 {
            // What it can write hardly changes, but a look may have caught little of it.
            let speed = pages / free;
            self.speed = if self.speed > 0.0 { 0.7 * self.speed + 0.3 * speed } else { speed };
        }
        self.done.vcpu = index;
        match self.limit {
            Some(limit) => {
                self.ramp.1 += span;
                if self.limited.seconds >= SETTLED.as_secs_f64() {
                    self.settled.add(seconds, pages, limit);
                }
                self.limited.add(seconds, pages, limit);
                self.done.limited_ns += span.as_nanos() as u64;
                self.done.held_ns += held_ns;
                self.done.guest_held_ns += now.guest_held_ns.saturating_sub(before.guest_held_ns);
                self.done.co_resident_held_ns += now.co_resident_held_ns.saturating_sub(before.co_resident_held_ns);
                self.calm = if now.owes || held_ns > 0 { Duration::ZERO } else { self.calm + span };
            }
            None => {
                self.calm = Duration::ZERO;
                self.ramp = (rate, Duration::ZERO);
                if self.done.limited_ns == 0 {
                    self.done.free_pages_per_second = rate;
                }
            }
        }
        rate
    }

    /// Brings the limit to what is wanted: up at once, down over the ramp, and never so low that the vCPU is held for more than is allowed.
    fn set_limit(&mut self, wanted: Option<f64>, span: Duration, policy: &StunPolicy) {
        self.limit = wanted.map(|wanted| {
            let (from, so_far) = self.ramp;
            let part = (so_far + span).as_secs_f64() / policy.ramp.as_secs_f64();
            let ramped = if wanted < from && part < 1.0 { from - (from - wanted) * part } else { wanted };
            ramped.max(self.speed * (1.0 - policy.max_share.clamp(0.0, 1.0)))
        });
        if let Some(limit) = self.limit {
            let least = &mut self.done.least_limit_pages_per_second;
            *least = if *least > 0.0 { least.min(limit) } else { limit };
            self.done.limit_pages_per_second = limit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Random;
    use crate::model::bucket::Bucket;

    const STEP: Duration = Duration::from_millis(1);
    const LOOK_STEPS: u64 = 100;

    /// vCPUs that write as fast as they want while their bucket lets them.
    struct Guest {
        now: Duration,
        want: Vec<Box<dyn Fn(u64) -> f64>>,
        buckets: Vec<Option<Bucket>>,
        writes: VmWrites,
    }

    impl Guest {
        fn new(want: Vec<Box<dyn Fn(u64) -> f64>>) -> Self {
            let count = want.len();
            let writes = VmWrites { vcpus: vec![VcpuWrites::default(); count], ..VmWrites::default() };
            Self { now: Duration::from_secs(5), want, buckets: vec![None; count], writes }
        }

        fn run(&mut self, ms: u64) {
            for _ in 0..ms {
                let at_ms = self.now.as_millis() as u64;
                for (index, want) in self.want.iter().enumerate() {
                    let vcpu = &mut self.writes.vcpus[index];
                    if let Some(bucket) = &mut self.buckets[index] {
                        let debt = bucket.debt(self.now);
                        vcpu.owes = debt > Duration::ZERO;
                        if vcpu.owes {
                            vcpu.held_ns += STEP.as_nanos() as u64;
                            continue;
                        }
                        bucket.charge(want(at_ms) / 1000.0, self.now);
                    }
                    vcpu.pages += want(at_ms) / 1000.0;
                }
                self.now += STEP;
            }
            self.writes.at_ns = self.now.as_nanos() as u64;
        }

        fn obey(&mut self, limits: &[Option<VcpuLimit>]) {
            for (bucket, limit) in self.buckets.iter_mut().zip(limits) {
                match (bucket.as_mut(), limit) {
                    (Some(bucket), Some(limit)) => bucket.set_rate(limit.rate, self.now),
                    (_, limit) => *bucket = limit.map(|limit| Bucket::new(limit.rate, self.now)),
                }
            }
        }
    }

    /// Rates of all vCPUs in each look.
    fn drive(
        guest: &mut Guest,
        controller: &mut Controller,
        looks: usize,
        allowed: impl Fn(usize) -> f64,
    ) -> Vec<Vec<f64>> {
        let mut rates = Vec::new();
        let _ = controller.look(&guest.writes, None);
        for look in 0..looks {
            let before: Vec<f64> = guest.writes.vcpus.iter().map(|vcpu| vcpu.pages).collect();
            guest.run(LOOK_STEPS);
            rates
                .push(guest.writes.vcpus.iter().zip(before).map(|(now, before)| (now.pages - before) * 10.0).collect());
            let limits = controller.look(&guest.writes, Some(PagesPerSecond(allowed(look))));
            guest.obey(&limits);
        }
        rates
    }

    fn mean(looks: &[Vec<f64>], vcpu: usize) -> f64 {
        looks.iter().map(|rates| rates[vcpu]).sum::<f64>() / looks.len() as f64
    }

    fn steady(rate: f64) -> Box<dyn Fn(u64) -> f64> {
        Box::new(move |_| rate)
    }

    #[test]
    fn a_rogue_is_at_its_quota_within_a_second_and_a_bystander_is_not_touched() {
        let mut guest = Guest::new(vec![steady(100_000.0), steady(900.0)]);
        let mut controller = Controller::new(StunPolicy::default());
        let rates = drive(&mut guest, &mut controller, 40, |_| 8000.0);
        for looks in rates[5..].chunks_exact(5) {
            assert!((mean(looks, 0) / 7100.0 - 1.0).abs() < 0.05, "{rates:?}");
        }
        assert!(rates.iter().all(|rate| (rate[1] - 900.0).abs() < 1.0), "{rates:?}");
        let report = controller.report();
        let [rogue] = report.vcpus.as_slice() else { panic!("{report:?}") };
        assert!(rogue.vcpu == 0 && (rogue.limit_pages_per_second - 7100.0).abs() < 1.0, "{report:?}");
        assert!((rogue.free_pages_per_second - 100_000.0).abs() < 1.0 && report.gave_up.is_empty());
        // It could write for 7 % of its time.
        let lost = rogue.held_ns as f64 / rogue.limited_ns as f64;
        assert!((0.88..0.96).contains(&lost), "{lost}");
    }

    #[test]
    fn who_wants_less_is_let_go_and_a_writer_with_pauses_is_not_let_go_each_time() {
        // Writes for 3 s, then hardly.
        let mut guest = Guest::new(vec![Box::new(|ms| if ms < 8000 { 50_000.0 } else { 100.0 })]);
        let mut controller = Controller::new(StunPolicy::default());
        drive(&mut guest, &mut controller, 25, |_| 5000.0);
        assert!(controller.is_stunning());
        drive(&mut guest, &mut controller, 20, |_| 5000.0);
        assert!(!controller.is_stunning());
        // 200 ms of each 400: with its pauses it stays limited.
        let mut guest = Guest::new(vec![Box::new(|ms| if ms % 400 < 200 { 50_000.0 } else { 0.0 })]);
        let mut controller = Controller::new(StunPolicy::default());
        drive(&mut guest, &mut controller, 10, |_| 5000.0);
        let rates = drive(&mut guest, &mut controller, 40, |_| 5000.0);
        assert!(controller.is_stunning() && mean(&rates, 0) < 5000.0 * 1.05, "{rates:?}");
    }

    /// One writer that changes its vCPU every 50 ms, one that writes in bursts of 30 ms: both beside one that hardly writes. Together they keep to what is allowed, limits stay
    /// where they are, and nobody is held who does not write, but for what was written before.
    #[test]
    fn a_writer_that_wanders_or_writes_in_bursts_is_held_steadily() {
        const RATE: f64 = 100_000.0;
        const ALLOWED: f64 = 8000.0;
        type Wants = fn(u64) -> bool;
        let wanders: [Wants; 2] = [|ms| ms / 50 % 2 == 0, |ms| ms / 50 % 2 == 1];
        let bursts: [Wants; 2] = [|ms| ms % 200 < 30, |_| false];
        for (turn_ms, wants) in [(100, wanders), (200, bursts)] {
            let writer =
                |wants: Wants| -> Box<dyn Fn(u64) -> f64> { Box::new(move |ms| if wants(ms) { RATE } else { 0.0 }) };
            let mut guest = Guest::new(vec![steady(100.0), writer(wants[0]), writer(wants[1])]);
            let mut controller = Controller::new(StunPolicy::default());
            drive(&mut guest, &mut controller, 20, |_| ALLOWED);
            let (mut limits, mut idle_held) = (vec![Vec::new(); 3], [0; 3]);
            let begun = guest.writes.clone();
            for _ in 0..40 {
                for _ in 0..LOOK_STEPS {
                    let (at_ms, before) = (guest.now.as_millis() as u64, guest.writes.clone());
                    guest.run(1);
                    for vcpu in [1, 2].into_iter().filter(|&vcpu: &usize| !wants[vcpu - 1](at_ms)) {
                        idle_held[vcpu] += guest.writes.vcpus[vcpu].held_ns - before.vcpus[vcpu].held_ns;
                    }
                }
                let decided = controller.look(&guest.writes, Some(PagesPerSecond(ALLOWED)));
                for (all, limit) in limits.iter_mut().zip(&decided) {
                    all.push(limit.map(|limit| limit.rate.0));
                }
                guest.obey(&decided);
            }
            let pages = |writes: &VmWrites| writes.vcpus.iter().map(|vcpu| vcpu.pages).sum::<f64>();
            let rate = (pages(&guest.writes) - pages(&begun)) / 4.0;
            assert!(rate < ALLOWED * 1.15 && rate > ALLOWED * 0.2, "{rate}");
            assert!(limits[0].iter().all(Option::is_none) && guest.writes.vcpus[0].held_ns == 0, "{limits:?}");
            // Who does not write at all has no limit; who does has the same all the time.
            for (vcpu, wants) in [(1, wants[0]), (2, wants[1])] {
                let all: Vec<f64> = limits[vcpu].iter().flatten().copied().collect();
                if !(0..200).any(wants) {
                    assert!(all.is_empty() && guest.writes.vcpus[vcpu].held_ns == 0, "{all:?}");
                    continue;
                }
                assert!(all.len() == limits[vcpu].len(), "vCPU {vcpu} was let go: {limits:?}");
                let (least, most) = all.iter().fold((f64::MAX, 0.0_f64), |(l, m), &x| (l.min(x), m.max(x)));
                assert!(most < least * 1.1, "vCPU {vcpu}: {all:?}");
                // What a step of a millisecond wrote too much is owed after the writer has gone: once in a turn.
                let debt_ns = RATE / 1000.0 / least * 1e9;
                assert!((idle_held[vcpu] as f64) < f64::from(4000 / turn_ms) * (debt_ns + 1e6), "{idle_held:?}");
            }
        }
    }

    /// Any number of vCPUs of any appetite: what all write is what is allowed, and who wants less than the water line gets it.
    #[test]
    fn up_to_64_vcpus_keep_to_what_is_allowed_without_swinging() {
        for seed in 0..60u64 {
            let mut dice = Random(seed);
            let count = 1 + dice.below(64);
            let wants: Vec<f64> = (0..count).map(|_| 10f64.powf(1.0 + dice.below(4000) as f64 / 1000.0)).collect();
            let total: f64 = wants.iter().sum();
            let allowed = total * (0.05 + dice.below(100) as f64 / 100.0);
            let mut guest = Guest::new(wants.iter().map(|&want| steady(want)).collect());
            let policy = StunPolicy { max_share: 1.0, max_total: Duration::from_hours(9), ..StunPolicy::default() };
            let mut controller = Controller::new(policy);
            let rates = drive(&mut guest, &mut controller, 60, |_| allowed);
            let line = crate::model::max_min(&wants, allowed).line.unwrap_or(f64::INFINITY);
            // A second after the start, over half-seconds: at least 16 pages are free at once.
            for looks in rates[10..].chunks(5) {
                let sum: f64 = (0..wants.len()).map(|index| mean(looks, index)).sum();
                assert!(sum <= allowed * 1.05 + 40.0 * count as f64, "seed {seed}: {sum} of {allowed}");
                for (index, &want) in wants.iter().enumerate() {
                    let fair = want.min(line);
                    let got = mean(looks, index);
                    // A step of a millisecond more or less in half a second.
                    let slack = 40.0 + want * 0.004;
                    assert!(got >= fair * 0.95 - slack, "seed {seed}: {got} of {fair}");
                }
            }
        }
    }

    #[test]
    fn an_operators_bounds_hold() {
        // Never more than half of its time.
        let policy = StunPolicy { max_share: 0.5, ..StunPolicy::default() };
        let mut guest = Guest::new(vec![steady(100_000.0)]);
        let mut controller = Controller::new(policy);
        let rates = drive(&mut guest, &mut controller, 40, |_| 1000.0);
        assert!(mean(&rates[20..], 0) > 45_000.0, "{rates:?}");
        // Never this one.
        let policy = StunPolicy { never: [0].into(), ..StunPolicy::default() };
        let mut guest = Guest::new(vec![steady(50_000.0), steady(50_000.0)]);
        let mut controller = Controller::new(policy);
        let rates = drive(&mut guest, &mut controller, 30, |_| 60_000.0);
        assert!(
            (mean(&rates[20..], 0) - 50_000.0).abs() < 1.0 && (mean(&rates[20..], 1) / 30_000.0 - 1.0).abs() < 0.05
        );
        // Only this one, to what it alone may write.
        let policy = StunPolicy { only: [1].into(), ..StunPolicy::default() };
        let mut guest = Guest::new(vec![steady(50_000.0), steady(50_000.0)]);
        let mut controller = Controller::new(policy);
        let rates = drive(&mut guest, &mut controller, 30, |_| 5000.0);
        assert!((mean(&rates[20..], 0) - 50_000.0).abs() < 1.0 && (mean(&rates[20..], 1) / 5000.0 - 1.0).abs() < 0.05);
        // And only for so long in all.
        let policy = StunPolicy { max_total: Duration::from_secs(1), ..StunPolicy::default() };
        let mut guest = Guest::new(vec![steady(100_000.0)]);
        let mut controller = Controller::new(policy);
        let rates = drive(&mut guest, &mut controller, 40, |_| 1000.0);
        let report = controller.report();
        assert!(!controller.is_stunning() && report.gave_up.contains("more than the 1.0 s"), "{report:?}");
        assert!((rates[39][0] - 100_000.0).abs() < 1.0 && report.guest_time_lost_ns < 1_300_000_000);
    }

    #[test]
    fn it_follows_what_is_allowed_and_what_devices_write() {
        let mut guest = Guest::new(vec![steady(100_000.0)]);
        let mut controller = Controller::new(StunPolicy::default());
        let rates = drive(&mut guest, &mut controller, 60, |look| if look < 30 { 20_000.0 } else { 5000.0 });
        assert!((mean(&rates[10..30], 0) / 20_000.0 - 1.0).abs() < 0.05, "{rates:?}");
        assert!((mean(&rates[40..], 0) / 5000.0 - 1.0).abs() < 0.05, "{rates:?}");
        // No limit is known: everybody is let go at once.
        guest.run(LOOK_STEPS);
        assert!(controller.look(&guest.writes, None).iter().all(Option::is_none));
        // Counters that go back, a machine that has fewer vCPUs, and a look at once: no panic, no nonsense.
        let backwards = VmWrites { at_ns: guest.writes.at_ns + 1, ..VmWrites::default() };
        let _ = controller.look(&backwards, Some(PagesPerSecond(1.0)));
        let later = VmWrites { at_ns: guest.writes.at_ns + 1_000_000_000, ..backwards };
        assert!(controller.look(&later, Some(PagesPerSecond(f64::NAN))).is_empty());
    }
}

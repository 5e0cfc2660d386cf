//! Holds vCPUs that write more than they may, and counts what each has written.
//!
//! Owns the limits, their lease, and the thread that looks. A vCPU is charged for each page that the dirty log finds newly written, whoever harvests the log:
//! with rings by its own ring; with a bitmap, which does not say who wrote, by its share of the faults that KVM resolved, or of the CPU time. What it owes
//! it pays by standing still in its run loop, on a wait that a pause ends at once; or, where the guest offers it, by the guest holding its writers itself.
//! Must not know what a limit is for.
//!
//! The thread looks every millisecond, or more seldom where a look at the log takes long, so what a vCPU writes too much between two looks is little; it is owed all the same.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::asking::Asking;
use super::dirty::{DirtyLogger, Written};
use super::hurry::Hurry;
use super::spaces::{Owed, Spaces};
use super::stats::VcpuFaults;
use super::stun_port::StunPort;
use super::sys::KvmError;
use super::vcpu::Vcpu;
use crate::model::bucket::Bucket;
use crate::model::{AddressSpace, Attribution, ThrottleStatus, VcpuLimit, VcpuWrites, VmWrites};
use crate::port::THROTTLE_LEASE;
use crate::time::{monotonic_now, thread_run_time};

/// How often the thread looks.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// A look at the log may take this part of the time between two.
const LOOK_SHARE: u32 = 50;
const SELDOM: Duration = Duration::from_millis(50);
/// How long a vCPU is held at a time: then the guest may take an interrupt, and switch to whoever owes nothing.
const HOLD: Duration = Duration::from_millis(10);
/// The same where others are on the vCPU too, unless its timer is due earlier: a device may have something for them.
const HOLD_OTHERS: Duration = Duration::from_millis(2);
/// How long it may run in between.
const BREATH: Duration = Duration::from_micros(50);
/// How long while another space is loaded than one that owes: soon enough to see that one come back.
const WATCH: Duration = Duration::from_micros(40);
/// How long it is held when no timer of its own is due at any time: its guest is about to set one, and must get there; but not for ever.
const HOLD_TIMERLESS: Duration = Duration::from_micros(100);
const TIMERLESS_IN_A_ROW: u32 = 5;
/// A vCPU that owes more than this in all, because its spaces come and go between two looks, is held whatever is loaded.
const GRACE: Duration = Duration::from_millis(100);

/// What a vCPU must do before it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    /// Stand still until then; none: it may go on at once.
    pub(super) until: Option<Instant>,
    /// Come out of guest code again so long after it has gone on.
    pub(super) again: Option<Duration>,
    /// Whether others wait on the same vCPU.
    has_others: bool,
}

/// The throttle of one machine.
pub(super) struct Throttle {
    log: Arc<DirtyLogger>,
    vcpus: Vec<Arc<Vcpu>>,
    faults: Option<Vec<VcpuFaults>>,
    guest: Arc<StunPort>,
    state: Mutex<State>,
    changed: Condvar,
    /// How often limits were lifted: whoever is held looks whether it still must.
    lifts: AtomicU64,
}

#[derive(Default)]
struct State {
    /// When the limits end by themselves; none: there are none, and nobody counts.
    until: Option<Instant>,
    served: bool,
    vcpus: Vec<One>,
    writes: VmWrites,
    /// What each vCPU's pages are reckoned by had this value at the last look.
    before: Vec<u64>,
}

/// One vCPU.
#[derive(Default)]
struct One {
    limit: Option<VcpuLimit>,
    bucket: Option<Bucket>,
    spaces: Spaces,
    asking: Asking,
    held: bool,
    /// How often in a row it was held without a timer.
    timerless: u32,
}

impl Throttle {
    /// Nobody is limited. The vCPUs must stand.
    pub(super) fn new(log: Arc<DirtyLogger>, vcpus: &[Arc<Vcpu>], guest: Arc<StunPort>) -> Self {
        let faults = vcpus.iter().map(|vcpu| VcpuFaults::open(&vcpu.fd())).collect();
        let mut state = State::default();
        state.vcpus.resize_with(vcpus.len(), One::default);
        state.writes.vcpus.resize_with(vcpus.len(), VcpuWrites::default);
        Self {
            log,
            vcpus: vcpus.to_vec(),
            faults,
            guest,
            state: Mutex::new(state),
            changed: Condvar::new(),
            lifts: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Limits vCPUs from now on for [`THROTTLE_LEASE`], and says what they have written: see [`crate::port::Throttle`].
    pub(super) fn limit(self: &Arc<Self>, limits: &[Option<VcpuLimit>]) -> io::Result<VmWrites> {
        let mut state = self.lock();
        let now = monotonic_now();
        // What was written before nobody counted.
        let is_first = state.until.is_none();
        self.look(&mut state, now, is_first).map_err(io::Error::other)?;
        if !state.served {
            let throttle = Arc::clone(self);
            std::thread::Builder::new().name("throttle".into()).spawn(move || throttle.serve())?;
            state.served = true;
        }
        let mut lifted = false;
        for (index, one) in state.vcpus.iter_mut().enumerate() {
            let limit = limits.get(index).copied().flatten();
            lifted |= limit.is_none() && one.limit.is_some();
            self.set(index, one, limit, now);
        }
        if lifted {
            self.lifts.fetch_add(1, Ordering::AcqRel);
        }
        state.until = Some(Instant::now() + THROTTLE_LEASE);
        let writes = state.writes.clone();
        drop(state);
        self.changed.notify_all();
        Ok(writes)
    }

    /// Lets everybody go, and counts no more.
    pub(super) fn lift(&self) {
        self.end(&mut self.lock());
        self.changed.notify_all();
    }

    fn end(&self, state: &mut State) {
        state.until = None;
        let now = monotonic_now();
        for (index, one) in state.vcpus.iter_mut().enumerate() {
            self.set(index, one, None, now);
        }
        self.lifts.fetch_add(1, Ordering::AcqRel);
    }

    fn set(&self, vcpu: usize, one: &mut One, limit: Option<VcpuLimit>, now: Duration) {
        one.set(limit, now);
        if limit.is_none() && one.asking.let_go(now) {
            self.guest.ask(vcpu as u32, Duration::ZERO);
        }
    }

    /// How often limits were lifted.
    pub(super) fn lifts(&self) -> u64 {
        self.lifts.load(Ordering::Acquire)
    }

    /// vCPU thread, out of guest code with nothing pending: whether it must stand still. `root` says which address space is loaded, `next_interrupt` when
    /// the guest has something to do that may switch to another.
    pub(super) fn must_hold(
        &self,
        vcpu: u32,
        root: impl FnOnce() -> Option<AddressSpace>,
        next_interrupt: impl FnOnce() -> Option<Duration>,
    ) -> Option<Hold> {
        let mut state = self.lock();
        let one = state.vcpus.get_mut(vcpu as usize)?;
        let limit = one.limit?;
        let now = monotonic_now();
        if self.is_guests(one, now) {
            return None;
        }
        let in_all = one.bucket.map_or(Duration::ZERO, |bucket| bucket.debt(now));
        let (debt, most, has_others) = match limit.by_address_space.then(root).flatten() {
            None => (in_all, HOLD, false),
            Some(space) => {
                let Owed { debt, has_others, other_owes } = one.spaces.look(space, limit.rate, now);
                // While the vCPU as a whole keeps to its limit nobody on it is held: whose pages are whose is an estimate, how many there are is not.
                let (debt, other_owes) = (debt.min(in_all), other_owes && !in_all.is_zero());
                let beyond = in_all.saturating_sub(GRACE);
                if debt.is_zero() && beyond.is_zero() {
                    return other_owes.then_some(Hold { until: None, again: Some(WATCH), has_others });
                }
                if beyond > debt {
                    (beyond, HOLD, has_others)
                } else if has_others {
                    let due = next_interrupt();
                    one.timerless = if due.is_some() { 0 } else { one.timerless.saturating_add(1) };
                    let timerless = if one.timerless <= TIMERLESS_IN_A_ROW { HOLD_TIMERLESS } else { HOLD_OTHERS };
                    (debt, due.unwrap_or(timerless).min(HOLD_OTHERS), true)
                } else {
                    (debt, HOLD, false)
                }
            }
        };
        if debt.is_zero() {
            return None;
        }
        one.held = true;
        Some(Hold { until: Some(Instant::now() + debt.min(most)), again: (debt > most).then_some(BREATH), has_others })
    }

    /// vCPU thread: it stood still for so long.
    pub(super) fn was_held(&self, vcpu: u32, hold: Hold, took: Duration) {
        let mut state = self.lock();
        let Some(one) = state.vcpus.get_mut(vcpu as usize) else { return };
        one.held = false;
        let writes = &mut state.writes.vcpus[vcpu as usize];
        writes.held_ns += took.as_nanos() as u64;
        if hold.has_others {
            writes.co_resident_held_ns += took.as_nanos() as u64;
        }
    }

    /// The thread that looks. It ends when nobody has asked for limits for the time of the lease.
    fn serve(&self) {
        // On a busy host a look that comes late lets a writer write for as long; it takes next to no time itself.
        let _hurry = Hurry::here();
        let mut state = self.lock();
        loop {
            match state.until {
                Some(until) if Instant::now() < until => {}
                until => {
                    if until.is_some() {
                        tracing::warn!("nobody has asked for the limits of the vCPUs any more: they are lifted");
                    }
                    self.end(&mut state);
                    state.served = false;
                    return;
                }
            }
            let began = Instant::now();
            if let Err(error) = self.look(&mut state, monotonic_now(), false) {
                tracing::error!("the dirty log could not be looked at, so vCPUs are let go: {error}");
                self.end(&mut state);
                continue;
            }
            for (vcpu, one) in self.vcpus.iter().zip(&state.vcpus) {
                if one.wants_look() && !self.is_guests(one, monotonic_now()) {
                    vcpu.nudge();
                }
            }
            let least = if state.vcpus.iter().any(|one| one.limit.is_some()) { LOOK_EVERY } else { SELDOM };
            let wait = (began.elapsed() * LOOK_SHARE).clamp(least, SELDOM);
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Charges each vCPU for what it has written since the last look; the first only remembers.
    fn look(&self, state: &mut State, now: Duration, first: bool) -> Result<(), KvmError> {
        let written = self.log.written()?;
        let (by, attribution): (Vec<u64>, _) = match &written {
            Written::ByVcpu(pages) => (pages.clone(), Attribution::Ring),
            Written::Together(_) => self.reckoned_by(),
        };
        if state.before.len() != by.len() || first {
            state.before.clone_from(&by);
        }
        let new: Vec<u64> = by.iter().zip(&state.before).map(|(now, before)| now.saturating_sub(*before)).collect();
        state.before = by;
        state.writes.attribution = attribution;
        state.writes.at_ns = now.as_nanos() as u64;
        if first {
            return Ok(());
        }
        let sum: u64 = new.iter().sum();
        let pages = |index: usize| match written {
            Written::ByVcpu(_) => new[index] as f64,
            Written::Together(pages) if sum > 0 => pages as f64 * new[index] as f64 / sum as f64,
            Written::Together(_) => 0.0,
        };
        if let Written::Together(pages) = written
            && sum == 0
        {
            state.writes.others_pages += pages as f64;
        }
        for (index, (one, writes)) in state.vcpus.iter_mut().zip(&mut state.writes.vcpus).enumerate().take(new.len()) {
            let pages = pages(index);
            writes.pages += pages;
            one.charge(pages, now);
            self.ask(index as u32, one, writes, now);
            writes.owes = one.owes(now);
        }
        Ok(())
    }

    /// Whether it is the guest that holds the writers of a limited vCPU, and does.
    fn is_guests(&self, one: &One, now: Duration) -> bool {
        let by_space = one.limit.is_some_and(|limit| limit.by_address_space);
        by_space && self.guest.is_offered() && !one.asking.is_shunned(now)
    }

    /// Asks the guest to hold its writers if they owe anything, and counts for how long it has.
    fn ask(&self, vcpu: u32, one: &mut One, writes: &mut VcpuWrites, now: Duration) {
        let held = one.asking.held(now).as_nanos() as u64;
        writes.held_ns += held;
        writes.guest_held_ns += held;
        if !self.is_guests(one, now) {
            return;
        }
        let (Some(limit), Some(bucket)) = (one.limit, one.bucket) else { return };
        if let Some(time) = one.asking.look(bucket.debt(now), writes.pages, limit.rate, now) {
            self.guest.ask(vcpu, time);
        } else if one.asking.is_shunned(now) {
            tracing::warn!(
                "vCPU {vcpu}: the guest was asked to hold its writers, and does not: the vCPU is held itself for a while"
            );
        }
    }

    /// What pages are put down to vCPUs by, where the log does not say.
    fn reckoned_by(&self) -> (Vec<u64>, Attribution) {
        let faults = self.faults.as_ref();
        let faults: Option<Vec<u64>> = faults.and_then(|all| all.iter().map(|one| one.count().ok()).collect());
        if let Some(faults) = faults {
            return (faults, Attribution::Faults);
        }
        let ran = |vcpu: &Arc<Vcpu>| thread_run_time(vcpu.thread_id()).unwrap_or_default().as_nanos() as u64;
        (self.vcpus.iter().map(ran).collect(), Attribution::CpuTime)
    }

    /// What holds at present, and what was written and lost by the last look.
    pub(super) fn status(&self) -> ThrottleStatus {
        let state = self.lock();
        ThrottleStatus {
            is_asked: state.until.is_some(),
            limits: state.vcpus.iter().map(|one| one.limit).collect(),
            writes: state.writes.clone(),
        }
    }
}

impl One {
    fn set(&mut self, limit: Option<VcpuLimit>, now: Duration) {
        self.limit = limit;
        match (limit, &mut self.bucket) {
            (Some(limit), Some(bucket)) => bucket.set_rate(limit.rate, now),
            (Some(limit), empty) => *empty = Some(Bucket::new(limit.rate, now)),
            (None, bucket) => {
                *bucket = None;
                self.spaces = Spaces::default();
            }
        }
    }

    fn charge(&mut self, pages: f64, now: Duration) {
        let Some(limit) = self.limit else { return };
        if let Some(bucket) = &mut self.bucket {
            bucket.charge(pages, now);
        }
        if limit.by_address_space {
            self.spaces.charge(pages);
        }
    }

    fn owes(&self, now: Duration) -> bool {
        self.held || self.asking.is_held(now) || self.bucket.is_some_and(|bucket| !bucket.debt(now).is_zero())
    }

    /// Whether it is to come out of guest code: it may owe, or somebody must see which address space is loaded.
    fn wants_look(&self) -> bool {
        let Some(limit) = self.limit else { return false };
        !self.held && (limit.by_address_space || self.owes(monotonic_now()))
    }
}

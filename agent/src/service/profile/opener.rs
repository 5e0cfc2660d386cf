//! Opening one window: how many pages it protects, when it begins, and what it takes of the VM's time.
//!
//! Owns the pilots and the order in time; `protector` protects. What windows say together is reckoned elsewhere.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::ProfileError;
use super::protector::{Armed, Protector};
use super::running::{Running, Spent};
use super::writers::Window;
use crate::model::{PageBitmap, PageSubset, Slowed};
use crate::port::{Clock, EventSample, EventSource, LostEvents, ThreadEvents};
use crate::probe::KernelCounters;
use crate::service::clock::MonotonicClock;
use crate::service::interrupt::Interrupt;
use crate::service::inventory::HostVm;

/// A number that differs from measurement to measurement, so that their subsets do.
pub(super) fn first_seed() -> u64 {
    MonotonicClock.now().as_nanos() as u64
}

/// How long before it begins a window is ordered: the log is on by then.
const LEAD: Duration = Duration::from_millis(10);
/// A window that began later than ordered by more is opened again, and ordered earlier: first writes are counted in bins that grow with time.
const LATE: Duration = Duration::from_millis(2);
/// How often that is tried, and by how much earlier each time.
const TRIES: u32 = 4;
const EARLIER: u32 = 3;

/// Windows that only show how much there is to see.
const PILOT: Duration = Duration::from_millis(20);
const PILOTS: usize = 4;
/// The part of the pages that the first of them protects: 2^-n.
const FIRST_SHIFT: u32 = 6;
/// How many times as many pages each further one protects at most, as an exponent.
const STEP: u32 = 4;
/// First writes in a pilot that say enough of the rate: within a half, for sure.
const ENOUGH: u64 = 16;
/// The part of a vCPU's time that faults may take at a window's begin, where they come most often; by the fault cost as it is measured.
const FAULT_SHARE: f64 = 0.035;
/// The part of a vCPU's idle time that they may take instead, if that is more: a guest that is idle works to a clock and makes up for it, and the
/// more pages are protected, the less is left to chance.
const FAULT_SHARE_OF_IDLE: f64 = 0.25;

/// Pages of a huge mapping.
const PAGES_OF_HUGE: u64 = 512;
/// How long a VM may take to map its memory again once its mappings have been split, and how often that is looked at.
const SETTLED_WITHIN: Duration = Duration::from_secs(1);
const SETTLING: Duration = Duration::from_millis(20);

/// What one window showed.
pub(super) struct Shown {
    pub(super) window: Window,
    /// Different pages among those that were protected.
    pub(super) seen: u64,
    /// These pages.
    pub(super) pages: PageBitmap,
    pub(super) lost: LostEvents,
    /// Whether these pages were protected, and no others.
    chosen: bool,
}

/// How much of a busy vCPU's time small mappings take: between 3 and 12 % of guests that write 256 MiB without a pause, one page after the other,
/// or at random, where guest and host both have page tables of their own.
const SMALL_MAPPINGS: f64 = 0.15;
/// The part of a VM's time that windows may take on average, unless told otherwise.
pub(super) const MAX_SLOWDOWN: f64 = 0.02;

/// How long to leave a VM alone after so much of its time was taken.
pub(super) fn rest(lost: Duration, max_slowdown: f64) -> Duration {
    lost.div_f64(max_slowdown.clamp(0.001, 1.0)).saturating_sub(lost)
}

/// Opens windows of one VM.
pub(super) struct Opener<'a> {
    vm: &'a HostVm,
    counters: &'a mut KernelCounters,
    protector: &'a mut Protector,
    interrupt: &'a Interrupt,
    /// What a fault costs.
    fault_cost: Duration,
    /// Of the next window's subset.
    pub(super) seed: u64,
    /// Faults of each thread so far.
    faults: BTreeMap<u32, u64>,
    /// The vCPUs since the log is on.
    running: Running,
}

impl<'a> Opener<'a> {
    pub(super) fn new(
        vm: &'a HostVm,
        counters: &'a mut KernelCounters,
        protector: &'a mut Protector,
        interrupt: &'a Interrupt,
        fault_cost: Duration,
        seed: u64,
    ) -> Self {
        let (faults, running) = (BTreeMap::new(), Running::begin(vm));
        Self { vm, counters, protector, interrupt, fault_cost, seed, faults, running }
    }

    /// What all this has taken, at most, of the time of any vCPU that is never idle; one that is makes up for it.
    pub(super) fn lost(&self, idle: &BTreeMap<u32, f64>) -> Duration {
        let busy =
            self.faults.iter().filter(|(thread, _)| idle.get(thread).is_none_or(|&idle| idle < Slowed::PACED_IDLE));
        let Some(most) = busy.map(|(_, &faults)| faults).max() else { return Duration::ZERO };
        self.fault_cost.mul_f64(most as f64 * Slowed::LIKELY_DEARER)
            + self.running.elapsed().mul_f64(self.longer() / 2.0)
    }

    /// By which part longer small mappings may make a vCPU's work.
    fn longer(&self) -> f64 {
        if matches!(self.protector, Protector::Log(_)) { SMALL_MAPPINGS } else { 0.0 }
    }

    /// Adds what was made writable between two looks to the faults.
    fn count_faults(&mut self, threads: &BTreeMap<u32, ThreadEvents>) {
        for (&thread, events) in threads {
            // A huge mapping is one fault.
            let pages = events.pages_made_writable.saturating_sub(events.huge_mappings * PAGES_OF_HUGE);
            *self.faults.entry(thread).or_default() += pages;
        }
    }

    /// Switches the log on, has huge mappings split, and waits until little but writes to protected pages makes events. Who split them in the
    /// window would count what is read then too, and slow the VM down where it is measured.
    pub(super) fn settle(&mut self) -> Result<(), ProfileError> {
        let Protector::Log(arm) = self.protector else { return Ok(()) };
        // Protecting one page splits the mapping that it is part of, and drops the other pages' parts of it: they come back as they are touched
        // (`kvm_mmu_slot_gfn_write_protect`, arch/x86/kvm/mmu/mmu.c), but where KVM splits eagerly.
        let each = PageSubset::one_in(PAGES_OF_HUGE.ilog2(), self.seed);
        if arm.arm_at(each, 0)?.is_none_or(|did| did.was_on || did.subset != each.raw()) {
            return Ok(());
        }
        let mut nobodys = self.counters.empty_pages();
        let mut before = self.counters.sample(&mut nobodys)?;
        let limit = Instant::now() + SETTLED_WITHIN;
        loop {
            let began = Instant::now();
            if self.interrupt.wait_until(began + SETTLING) {
                return Err(ProfileError::Interrupted);
            }
            let now = self.counters.sample(&mut nobodys)?;
            let new = since(&before, &now);
            self.count_faults(&new);
            let most = new.values().map(|events| events.pages_made_writable).max().unwrap_or(0);
            if wanted_shift(most, 1, began.elapsed(), self.fault_cost, FAULT_SHARE) == 0 || Instant::now() >= limit {
                return Ok(());
            }
            before = now;
        }
    }

    /// Which part of the pages to protect, as the exponent of [`PageSubset::one_in`]: as large a one as lets faults take no more than
    /// [`FAULT_SHARE`] of any vCPU's time, or [`FAULT_SHARE_OF_IDLE`].
    pub(super) fn choose(&mut self) -> Result<u32, ProfileError> {
        if !matches!(self.protector, Protector::Log(_)) {
            return Ok(0);
        }
        let mut shift = FIRST_SHIFT;
        for _ in 0..PILOTS {
            let shown = self.open(PILOT, shift)?;
            if !shown.chosen {
                return Ok(0);
            }
            // Since the log is on, which is longer than a pilot: less that has to do with when a guest's clock ticks.
            let idle = self.running.spent().idle;
            let (mut most, mut wanted) = (0, 0);
            for (thread, events) in &shown.window.threads {
                let seen = sum(&events.first_writes);
                let limit = (idle.get(thread).unwrap_or(&0.0) * FAULT_SHARE_OF_IDLE).max(FAULT_SHARE);
                most = most.max(seen);
                wanted = wanted.max(wanted_shift(seen + 1, 1 << shift, shown.window.length, self.fault_cost, limit));
            }
            if most >= ENOUGH || wanted >= shift || (wanted == 0 && shift <= STEP) {
                return Ok(wanted);
            }
            shift = wanted.max(shift.saturating_sub(STEP));
        }
        Ok(shift)
    }

    /// One window of one page of each `2^shift`.
    pub(super) fn open(&mut self, length: Duration, shift: u32) -> Result<Shown, ProfileError> {
        let mut lead = LEAD;
        for further in (0..TRIES).rev() {
            if let Some(shown) = self.try_open(length, shift, lead, further == 0)? {
                return Ok(shown);
            }
            lead *= EARLIER;
        }
        unreachable!("the last try takes a late begin as it is")
    }

    /// One window, ordered so long before; none if it began late and must not.
    fn try_open(
        &mut self,
        length: Duration,
        shift: u32,
        lead: Duration,
        may_be_late: bool,
    ) -> Result<Option<Shown>, ProfileError> {
        let clock = MonotonicClock;
        self.seed = self.seed.wrapping_add(1);
        let subset = PageSubset::one_in(shift, self.seed);
        let ordered = match self.protector {
            Protector::Log(_) => clock.now() + lead,
            _ => clock.now(),
        };
        let ordered_ns = ordered.as_nanos() as u64;
        let mut pages = self.counters.empty_pages();
        // From here on to the begin no page is marked, so that each is marked in the window when it is written first.
        self.counters.arm(ordered_ns, subset);
        let before = self.counters.sample(&mut pages)?;
        pages.clear();
        let mut armed = Armed { protector: self.protector, counters: self.counters };
        let did = armed.protect(subset, ordered_ns)?;
        // Pages are protected one after the other, so that on average their window begins in the middle of it.
        let after = Duration::from_nanos((did.began_ns / 2 + did.ended_ns / 2).saturating_sub(ordered_ns));
        let within = Duration::from_nanos(did.ended_ns.saturating_sub(did.began_ns) / 2);
        if !may_be_late && did.began_ns.saturating_sub(ordered_ns) > LATE.as_nanos() as u64 {
            return Ok(None);
        }
        let began = ordered + after;
        let running = Running::begin(self.vm);
        let (looked, now) = (clock.now(), Instant::now());
        let interrupted = self.interrupt.wait_until(now + (began + length).saturating_sub(looked));
        let (ended, after_window) = (clock.now(), armed.counters.sample(&mut pages)?);
        let Spent { idle, waited } = running.spent();
        let marked = match &*armed.protector {
            Protector::Marks(marks) => {
                let mut marked = marks.empty_pages();
                let writes = marks.read(&mut marked)?;
                Some((writes.iter().map(|slot| slot.pages.0).sum::<u64>(), marked))
            }
            _ => None,
        };
        drop(armed);
        if interrupted {
            return Err(ProfileError::Interrupted);
        }
        if subset != PageSubset::ALL {
            pages.retain(|page| subset.holds(page));
        }
        // Marks hold what devices and the VMM wrote too; events do not.
        let (seen, pages) = marked.unwrap_or_else(|| (pages.count().0, pages));
        let threads = since(&before, &after_window);
        self.count_faults(&threads);
        let window = Window {
            length: ended.saturating_sub(began),
            begin: (after, within),
            every: subset.every(),
            threads,
            idle,
            longer: self.longer(),
            waited,
        };
        Ok(Some(Shown {
            window,
            seen,
            pages,
            lost: after_window.lost.since(&before.lost),
            chosen: did.subset == subset.raw(),
        }))
    }
}

/// The smallest exponent with which faults take `limit` of a writer's time at most, when so many pages, each for `every`, were written in
/// `length`.
fn wanted_shift(seen: u64, every: u64, length: Duration, fault_cost: Duration, limit: f64) -> u32 {
    let share = (seen * every) as f64 / length.as_secs_f64() * fault_cost.as_secs_f64();
    ((share / limit).log2().ceil().max(0.0) as u32).min(PageSubset::MAX_SHIFT)
}

fn sum(bins: &[u32]) -> u64 {
    bins.iter().map(|&pages| u64::from(pages)).sum()
}

fn since(before: &EventSample, after: &EventSample) -> BTreeMap<u32, ThreadEvents> {
    let nothing = ThreadEvents::default();
    let threads =
        after.threads.iter().map(|(&thread, now)| (thread, now.since(before.threads.get(&thread).unwrap_or(&nothing))));
    threads.filter(|(_, new)| new.pages_made_writable + new.pages_logged > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faster_writers_have_fewer_of_their_pages_protected() {
        let cost = Duration::from_micros(2);
        let wanted = |pages_per_second: f64, every: u64| {
            wanted_shift((pages_per_second * 0.02) as u64 / every, every, Duration::from_millis(20), cost, FAULT_SHARE)
        };
        // 10 000 faults a second of 2 us are 2 % of the time; 1 000 000 are all of it, twice.
        assert_eq!([10_000.0, 50_000.0, 200_000.0, 1e6].map(|rate| wanted(rate, 1)), [0, 2, 4, 6]);
        assert_eq!(wanted(1e6, 64), 6, "the same by a part of the pages");
        assert_eq!((wanted(0.0, 1), wanted(1e12, 1)), (0, PageSubset::MAX_SHIFT));
        // Of one that is idle for half of its time all may be.
        assert_eq!(wanted_shift(1000, 1, Duration::from_millis(20), cost, 0.5 * FAULT_SHARE_OF_IDLE), 0);
    }

    #[test]
    fn a_vm_rests_until_what_it_lost_is_the_allowed_part() {
        let lost = Duration::from_millis(300);
        assert_eq!(rest(lost, 0.02), Duration::from_millis(14_700));
        assert_eq!((rest(lost, 1.0), rest(Duration::ZERO, 0.02)), (Duration::ZERO, Duration::ZERO));
    }
}

//! How many different pages a VM writes in a window of a given length, from a sample of its memory: works on any VMM and any kernel, and
//! changes nothing in the VM.
//!
//! Owns the choice, the pace and the reckoning. For each window length t it reads a random sample of pages, keeps a hash of each, reads
//! them again t later, and counts those that changed. The result is the curve U(t): the expected number of different pages written in a window of
//! that length. Must not know how memory is read: that is [`GuestMemory`].
//!
//! What it cannot see: a page that was written with what it held already, or that was changed and changed back within the window (it counts as not
//! written, and so would cost a sender of contents nothing); when in the window a page was written, or how often; who wrote it. Pages that
//! devices or the VMM wrote count as those that the guest wrote.
//!
//! The peer is QEMU's `calc-dirty-rate` in its mode `page-sampling`: 512 pages of each GiB (0.2 %), chosen with replacement, one window, no
//! interval, hashes of 32 bits, and the last page of a block never. Here the sample is stratified and without replacement, its size follows from what
//! a pilot shows, each page's own interval is t, and every figure has its interval.

mod choose;
mod heat;
mod interval;
mod result;
#[cfg(test)]
mod tests;

use std::time::Duration;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use self::choose::{Population, Sample};
use self::heat::Seen;
use self::interval::{Count, Share, Tally};
pub use self::result::{
    Compression, SampledCurve, SampledHeat, SampledRegion, UnreadableRange, WindowEstimate, ZeroPages,
};
use super::Regime;
use crate::model::{Gpa, MemoryRange, PAGE_SIZE, Random};
use crate::port::{Clock, GuestMemory, GuestMemoryError};

/// Pages that one call reads: their common time of reading is their own to within a part of a millisecond.
const BATCH: usize = 32;
/// Pages read to learn what reading costs.
const TRIAL_PAGES: u64 = 64;
/// The largest sample: bounds the memory that sampling takes to less than 100 MiB.
const MOST_PAGES: u64 = 1 << 20;
/// Changed pages that the size of a sample aims at, in parts of those that are wanted: a pilot is not exact.
const AIM: f64 = 1.1;
/// Periods of a guest's own timers that a window must not fall in step with.
const JITTER: Duration = Duration::from_millis(10);
/// Windows shorter than this are put at random distances.
const SHORT: Duration = Duration::from_millis(100);
/// How long the windows of one length take together, at least, and how many there are at most.
const SPREAD: Duration = Duration::from_millis(1280);
const MOST_SPREAD: u64 = 16;
/// Pages that are compressed.
const COMPRESSED_PAGES: usize = 512;

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// The lengths of windows; 1 ms to 60 s, at most 16 of them.
    pub windows: Vec<Duration>,
    /// Of one core's time, the part that reading may take, on average over a measurement; above 0, at most 1.
    pub cpu_share: f64,
    /// The time that one length of window may take, by which the CPU's part becomes a number of pages; a window that is longer than half of it
    /// is still taken once. Up to 10 minutes.
    pub time_per_window: Duration,
    /// Changed pages that are to be seen, where the CPU's part allows for it: 400 keep the standard error at 5 %.
    pub changed_wanted: u64,
    /// Pages of the pilot; memory that has no more is read whole. 64 to 65536.
    pub pilot_pages: u64,
    /// Chooses the sample: the same seed, the same pages.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            windows: [5, 20, 80, 320, 1280].map(Duration::from_millis).to_vec(),
            cpu_share: 0.03,
            time_per_window: Duration::from_secs(2),
            changed_wanted: 400,
            pilot_pages: 1024,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    fn check(&self) -> Result<(), SamplingError> {
        let refuse = |what| Err(SamplingError::Options(what));
        let lengths = Duration::from_millis(1)..=Duration::from_secs(60);
        if !(1..=16).contains(&self.windows.len()) || !self.windows.iter().all(|window| lengths.contains(window)) {
            return refuse("take 1 to 16 windows of 1 ms to 60 s");
        }
        if !(self.cpu_share > 0.0 && self.cpu_share <= 1.0) {
            return refuse("the CPU's part must be above 0 and at most 1 (0.03 is 3 % of a core)");
        }
        if !(Duration::from_millis(1)..=Duration::from_secs(600)).contains(&self.time_per_window) {
            return refuse("the time per window must be 1 ms to 10 min");
        }
        if !(64..=1 << 16).contains(&self.pilot_pages) || !(1..=MOST_PAGES).contains(&self.changed_wanted) {
            return refuse("the pilot must have 64 to 65536 pages, and at least one changed page be wanted");
        }
        Ok(())
    }
}

/// Why there is no curve.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// They cannot be followed.
    #[error("sampling: {0}")]
    Options(&'static str),
    /// There is no RAM, or none that can be read.
    #[error("none of the VM's memory can be read: {0}")]
    Unreadable(String),
    /// The VM ended meanwhile.
    #[error("the VM ended while its memory was sampled; {} windows were finished", .finished.len())]
    Ended {
        /// What was measured before.
        finished: Vec<WindowEstimate>,
    },
}

/// The VM has ended.
struct Gone;

/// Samples one VM.
#[derive(Debug)]
pub struct Sampler<M, C> {
    memory: M,
    clock: C,
    options: SamplingOptions,
    population: Population,
    unreadable: Vec<UnreadableRange>,
    random: Random,
    /// Time spent in reading since `began`.
    busy: Duration,
    began: Duration,
    /// What reading and hashing a page takes, in seconds: a moving mean.
    page_cost: f64,
    buffer: Vec<u8>,
}

/// What one sample showed.
struct Observed {
    sample: Sample,
    tally: Tally,
    /// By stratum, pages of zeros at the first look.
    zeros: Vec<(u64, Count)>,
    /// Pages with something in them, in random order.
    filled: Vec<u64>,
    /// By place.
    seen: Seen,
    unreadable: u64,
    intervals: Intervals,
    busy: Duration,
}

/// The real lengths of windows.
#[derive(Clone, Copy, Debug)]
struct Intervals {
    sum: Duration,
    batches: u32,
    shortest: Duration,
    longest: Duration,
}

impl Intervals {
    fn add(&mut self, interval: Duration) {
        self.sum += interval;
        self.batches += 1;
        self.shortest = self.shortest.min(interval);
        self.longest = self.longest.max(interval);
    }

    fn mean(&self) -> Duration {
        self.sum.checked_div(self.batches).unwrap_or_default()
    }
}

/// A batch that was read for the first time.
struct Base<'a> {
    pages: &'a [u64],
    at: Duration,
    hashes: Vec<Option<u128>>,
}

impl<M: GuestMemory, C: Clock> Sampler<M, C> {
    /// Looks at what can be read.
    ///
    /// # Errors
    /// The options cannot be followed, the VM has ended, or nothing can be read.
    pub fn new(memory: M, clock: C, mut options: SamplingOptions) -> Result<Self, SamplingError> {
        options.check()?;
        options.windows.sort_unstable();
        options.windows.dedup();
        let (mut readable, mut unreadable) = (Vec::new(), Vec::new());
        for &range in memory.ranges() {
            match memory.read(range.start, &mut [0]) {
                Ok(()) => readable.push(range),
                Err(GuestMemoryError::Gone) => return Err(SamplingError::Ended { finished: Vec::new() }),
                Err(error) => unreadable.push(UnreadableRange::new(range, error.to_string())),
            }
        }
        let population = Population::new(readable);
        if population.pages() == 0 {
            let reason = unreadable.first().map_or("it has no RAM", |range| &range.reason);
            return Err(SamplingError::Unreadable(reason.to_owned()));
        }
        let (random, began) = (Random(options.seed), clock.now());
        Ok(Self {
            memory,
            clock,
            options,
            population,
            unreadable,
            random,
            busy: Duration::ZERO,
            began,
            page_cost: 0.0,
            buffer: vec![0; BATCH * PAGE_SIZE],
        })
    }

    /// Measures the whole curve once. Takes about `time_per_window` for each length of window; fewer where many pages change.
    ///
    /// # Errors
    /// The VM ended meanwhile, or no page of the sample could be read.
    pub fn measure(&mut self) -> Result<SampledCurve, SamplingError> {
        (self.began, self.busy) = (self.clock.now(), Duration::ZERO);
        let mut finished = Vec::new();
        match self.measure_into(&mut finished) {
            Ok(curve) => curve,
            Err(Gone) => Err(SamplingError::Ended { finished }),
        }
    }

    fn measure_into(
        &mut self,
        finished: &mut Vec<WindowEstimate>,
    ) -> Result<Result<SampledCurve, SamplingError>, Gone> {
        self.learn_cost()?;
        let mut pilot: Option<Count> = None;
        let mut largest: Option<Observed> = None;
        let mut heat = None;
        for window in self.options.windows.clone() {
            let observed = self.observe_well(window, pilot)?;
            let Some(estimate) = self.estimate(window, &observed) else {
                let reason = "no page of the sample could be read".to_owned();
                return Ok(Err(SamplingError::Unreadable(reason)));
            };
            // Where, by the longest window: it shows most.
            let (total, windows) = (observed.tally.total().sampled, estimate.windows);
            heat = Some(observed.seen.heat(&self.population, total, estimate.effective_interval_ns, windows));
            finished.push(estimate);
            // A longer window shows no less: this one's sample is the next one's pilot.
            pilot = Some(observed.tally.total());
            if largest.as_ref().is_none_or(|other| other.sample.pages.len() < observed.sample.pages.len()) {
                largest = Some(observed);
            }
        }
        let (zero_pages, filled) = largest.map_or((None, Vec::new()), |observed| {
            (ZeroPages::new(&observed.zeros, self.population.pages()), observed.filled)
        });
        let compression = self.compress(&filled)?;
        let Some(heat) = heat else { return Ok(Err(SamplingError::Options("take 1 to 16 windows of 1 ms to 60 s"))) };
        Ok(Ok(SampledCurve {
            heat,
            windows: std::mem::take(finished),
            regime: Regime::Sampled,
            meaning: Regime::Sampled.meaning(),
            population_pages: self.population.pages(),
            unreadable_ranges: self.unreadable.clone(),
            zero_pages,
            compression,
            read_ns: self.busy.as_nanos() as u64,
            elapsed_ns: self.clock.now().saturating_sub(self.began).as_nanos() as u64,
            seed: self.options.seed,
        }))
    }

    fn learn_cost(&mut self) -> Result<(), Gone> {
        let sample = Sample::choose(self.population.pages(), TRIAL_PAGES, &mut self.random);
        for batch in sample.pages.chunks(BATCH) {
            self.hash(batch)?;
        }
        Ok(())
    }

    /// The most pages of a sample whose two readings fit the CPU's part.
    fn affordable(&self) -> u64 {
        let seconds = self.options.cpu_share * self.options.time_per_window.as_secs_f64();
        let pages = seconds / (2.0 * self.page_cost.max(1e-9));
        (pages as u64).clamp(self.options.pilot_pages, MOST_PAGES)
    }

    /// The most pages that can be read within half of a window: reading them once must leave time for waiting.
    fn fitting(&self, window: Duration) -> u64 {
        (window.as_secs_f64() / 2.0 / self.page_cost.max(1e-9)) as u64
    }

    /// Observes a sample that is large enough for what `pilot`, or one that is taken now, has shown.
    fn observe_well(&mut self, window: Duration, pilot: Option<Count>) -> Result<Observed, Gone> {
        let all = self.population.pages();
        if all <= self.options.pilot_pages {
            return self.observe(window, all);
        }
        let pilot = match pilot {
            Some(pilot) => pilot,
            None => {
                let observed = self.observe(window, self.options.pilot_pages)?;
                let count = observed.tally.total();
                if count.hits >= self.options.changed_wanted {
                    return Ok(observed);
                }
                count
            }
        };
        let wanted = needed(pilot, self.options.changed_wanted).clamp(self.options.pilot_pages, self.affordable());
        // The pilot's own pages are not kept: an estimate whose size followed from itself would be askew.
        self.observe(window, wanted)
    }

    /// Reads a sample of `wanted` pages twice, `window` apart.
    fn observe(&mut self, window: Duration, wanted: u64) -> Result<Observed, Gone> {
        let busy_before = self.busy;
        let sample = Sample::choose(self.population.pages(), wanted, &mut self.random);
        let empty: Vec<(u64, Count)> = sample.strata.iter().map(|stratum| (stratum.pages, Count::default())).collect();
        let mut observed = Observed {
            tally: Tally { strata: empty.clone(), windows: Vec::new() },
            zeros: empty,
            filled: Vec::new(),
            seen: Seen::default(),
            unreadable: 0,
            intervals: Intervals { sum: Duration::ZERO, batches: 0, shortest: Duration::MAX, longest: Duration::ZERO },
            busy: Duration::ZERO,
            sample,
        };
        let mut rest = std::mem::take(&mut observed.sample.pages);
        let pages = rest.clone();
        // All of a small memory in one window: that leaves no doubt. Of any other, windows differ: one alone may be no typical one.
        let spread = if self.population.pages() <= self.options.pilot_pages {
            1
        } else {
            (SPREAD.as_nanos() / window.as_nanos().max(1)).clamp(1, u128::from(MOST_SPREAD)) as u64
        };
        while !rest.is_empty() {
            // The cost may change on the way.
            let fits = self.fitting(window);
            let even = (pages.len() as u64).div_ceil(spread);
            let size = fits.min(even).max(BATCH as u64).min(rest.len() as u64) as usize;
            let mut group = rest.split_off(rest.len() - size);
            group.sort_unstable();
            self.wait(window);
            self.observe_group(window, &group, &mut observed)?;
        }
        observed.sample.pages = pages;
        // Sorting by address must not decide which pages are compressed.
        choose::shuffle(&mut observed.filled, &mut self.random);
        observed.busy = self.busy - busy_before;
        Ok(observed)
    }

    /// Waits before a window for as long as the CPU's part demands, and out of step with the guest.
    fn wait(&mut self, window: Duration) {
        if window < SHORT {
            let longest = (window + JITTER).as_nanos() as u64;
            self.clock.sleep(Duration::from_nanos(self.random.below(longest)));
        }
        let due = Duration::from_secs_f64(self.busy.as_secs_f64() / self.options.cpu_share);
        let elapsed = self.clock.now().saturating_sub(self.began);
        if due > elapsed {
            self.clock.sleep(due - elapsed);
        }
    }

    /// Reads a group twice: each batch again `window` after it was read first, in the same order.
    fn observe_group(&mut self, window: Duration, group: &[u64], observed: &mut Observed) -> Result<(), Gone> {
        let mut bases = Vec::with_capacity(group.len().div_ceil(BATCH));
        for pages in group.chunks(BATCH) {
            let at = self.clock.now();
            bases.push(Base { pages, at, hashes: self.hash(pages)? });
        }
        let zero = xxh3_128_with_seed(&[0; PAGE_SIZE], self.options.seed);
        let mut count = Count::default();
        for base in bases {
            let due = base.at + window;
            let now = self.clock.now();
            if due > now {
                self.clock.sleep(due - now);
            }
            observed.intervals.add(self.clock.now().saturating_sub(base.at));
            let again = self.hash(base.pages)?;
            for ((&page, before), after) in base.pages.iter().zip(base.hashes).zip(again) {
                let (Some(before), Some(after)) = (before, after) else {
                    observed.unreadable += 1;
                    continue;
                };
                let stratum = observed.sample.stratum_of(page);
                let changed = before != after;
                observed.tally.strata[stratum].1.add(changed);
                observed.zeros[stratum].1.add(before == zero);
                count.add(changed);
                observed.seen.add(self.population.address(page), changed);
                if before != zero && observed.filled.len() < MOST_PAGES as usize {
                    observed.filled.push(page);
                }
            }
        }
        observed.tally.windows.push(count);
        Ok(())
    }

    /// Reads pages, at most a batch, and hashes each; none for one that cannot be read.
    fn hash(&mut self, pages: &[u64]) -> Result<Vec<Option<u128>>, Gone> {
        let began = self.clock.now();
        let readable = self.read(pages)?;
        let bytes = self.buffer.chunks_exact(PAGE_SIZE);
        let seed = self.options.seed;
        let hashes = bytes.zip(&readable).map(|(page, &fine)| fine.then(|| xxh3_128_with_seed(page, seed))).collect();
        self.account(began, pages.len());
        Ok(hashes)
    }

    fn account(&mut self, began: Duration, pages: usize) {
        // By the clock: no less than the CPU time that it took.
        let took = self.clock.now().saturating_sub(began);
        self.busy += took;
        let cost = took.as_secs_f64() / pages.max(1) as f64;
        self.page_cost = if self.page_cost > 0.0 { self.page_cost.mul_add(0.9, cost * 0.1) } else { cost };
    }

    /// Reads pages, at most a batch, into the buffer; whether each could be read.
    fn read(&mut self, pages: &[u64]) -> Result<Vec<bool>, Gone> {
        let addresses: Vec<Gpa> = pages.iter().map(|&page| self.population.address(page)).collect();
        let mut what: Vec<(Gpa, &mut [u8])> =
            addresses.into_iter().zip(self.buffer.chunks_exact_mut(PAGE_SIZE)).collect();
        match self.memory.read_many(&mut what) {
            Ok(()) => return Ok(vec![true; pages.len()]),
            Err(GuestMemoryError::Gone) => return Err(Gone),
            Err(_) => {}
        }
        // One of them cannot be read: find out which.
        what.iter_mut()
            .map(|(at, into)| match self.memory.read(*at, into) {
                Ok(()) => Ok(true),
                Err(GuestMemoryError::Gone) => Err(Gone),
                Err(_) => Ok(false),
            })
            .collect()
    }

    /// The estimate that an observation gives; none if nothing could be read.
    fn estimate(&self, window: Duration, observed: &Observed) -> Option<WindowEstimate> {
        let (total, all) = (observed.tally.total(), self.population.pages());
        // What could not be read of the sample stands for as much of the memory.
        let looked_at = total.sampled + observed.unreadable;
        let readable = (u128::from(all) * u128::from(total.sampled) / u128::from(looked_at.max(1))) as u64;
        let Share { middle: share, low, high, variance_ratio } = observed.tally.share(readable)?;
        let pages = |share: f64| share * readable as f64;
        let ns = |duration: Duration| duration.as_nanos() as u64;
        Some(WindowEstimate {
            window_ns: ns(window),
            effective_interval_ns: ns(observed.intervals.mean()),
            shortest_interval_ns: ns(observed.intervals.shortest),
            longest_interval_ns: ns(observed.intervals.longest),
            unique_pages: pages(share).round() as u64,
            unique_pages_low: pages(low).floor() as u64,
            unique_pages_high: pages(high).ceil() as u64,
            is_exact: total.sampled == all && low >= share && high <= share,
            sampled_pages: total.sampled,
            changed_pages: total.hits,
            unreadable_pages: observed.unreadable,
            windows: observed.tally.windows.len() as u64,
            variance_ratio,
            read_ns: ns(observed.busy),
        })
    }

    /// Compresses some of `pages`, none of which was zeros.
    fn compress(&mut self, pages: &[u64]) -> Result<Option<Compression>, Gone> {
        let mut ratios = Vec::new();
        let mut out = vec![0; lz4_flex::block::get_maximum_output_size(PAGE_SIZE)];
        for batch in pages[..pages.len().min(COMPRESSED_PAGES)].chunks(BATCH) {
            self.wait(SHORT);
            let began = self.clock.now();
            let readable = self.read(batch)?;
            for (page, fine) in self.buffer.chunks_exact(PAGE_SIZE).zip(readable) {
                // The guest may have given it up since.
                if fine && page.iter().any(|&byte| byte != 0) {
                    let length = lz4_flex::block::compress_into(page, &mut out).unwrap_or(PAGE_SIZE);
                    ratios.push(length.min(PAGE_SIZE) as f64 / PAGE_SIZE as f64);
                }
            }
            self.busy += self.clock.now().saturating_sub(began);
        }
        Ok(Compression::new(&ratios))
    }
}

/// How many pages must be looked at to see `changed` of them change, by what a pilot showed less its standard error; no bound if it showed
/// nothing.
fn needed(pilot: Count, changed: u64) -> u64 {
    let share = pilot.hits as f64 / pilot.sampled.max(1) as f64;
    let error = (share * (1.0 - share) / pilot.sampled.max(1) as f64).sqrt();
    let low = (share - error).max(share / 4.0);
    if low > 0.0 { (changed as f64 * AIM / low).ceil() as u64 } else { u64::MAX }
}

impl UnreadableRange {
    fn new(range: MemoryRange, reason: String) -> Self {
        Self { start: range.start, bytes: range.bytes, reason }
    }
}

impl ZeroPages {
    fn new(zeros: &[(u64, Count)], pages: u64) -> Option<Self> {
        let mut tally = Tally { strata: zeros.to_vec(), windows: Vec::new() };
        // What is zeros hardly changes with the window: all of it is one sample.
        tally.windows.push(tally.total());
        let Share { middle: share, low, high, .. } = tally.share(pages)?;
        Some(Self { share, share_low: low, share_high: high, sampled_pages: tally.total().sampled })
    }
}

impl Compression {
    fn new(ratios: &[f64]) -> Option<Self> {
        let (ratio, low, high) = interval::mean(ratios)?;
        let (ratio_low, ratio_high) = (low.max(0.0), high.min(1.0));
        Some(Self { ratio, ratio_low, ratio_high, sampled_pages: ratios.len() as u64 })
    }
}

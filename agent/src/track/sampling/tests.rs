//! Sampling of a simulated guest in virtual time: its writes are known to the page.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::model::random::mix;

/// What reading a page takes.
const PAGE_NS: u64 = 2_000;
const PAGE: u64 = PAGE_SIZE as u64;

#[derive(Clone, Debug, Default)]
struct SimClock(Arc<AtomicU64>);

impl SimClock {
    fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn sleep(&self, duration: Duration) {
        self.advance(duration.as_nanos() as u64);
    }
}

/// In which order the guest writes its pages, over and over.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Scattered,
    Sequential,
    /// As many pages as it writes in 20 ms are written all the time, no others.
    HotSet,
}

/// A guest that writes one page after another at a steady rate, so that in any window of length t exactly rate * t different pages are written.
#[derive(Clone, Debug)]
struct SimGuest {
    clock: SimClock,
    ranges: Vec<MemoryRange>,
    pages: u64,
    pages_per_second: f64,
    order: Order,
    seed: u64,
    /// The guest writes only in every second period of this length, twice as fast.
    bursts_ns: Option<u64>,
    /// Pages from this one on are zeros and stay so.
    zeros_from: u64,
    unreadable: BTreeSet<u64>,
    ends_at: Duration,
}

impl SimGuest {
    fn new(pages: u64, pages_per_second: f64, seed: u64) -> Self {
        Self {
            clock: SimClock::default(),
            ranges: vec![MemoryRange { start: Gpa(0), bytes: pages * PAGE }],
            pages,
            pages_per_second,
            order: Order::Scattered,
            seed,
            bursts_ns: None,
            zeros_from: pages,
            unreadable: BTreeSet::new(),
            ends_at: Duration::MAX,
        }
    }

    /// Where in the writer's round a page comes: a bijection of the pages, by a Feistel network over the next power of four and walking the
    /// cycle until inside.
    fn turn(&self, page: u64) -> u64 {
        if self.order == Order::Sequential {
            return page;
        }
        let half = (64 - (self.pages - 1).leading_zeros()).div_ceil(2).max(1);
        let mask = (1u64 << half) - 1;
        let mut at = page;
        loop {
            for round in 0..4 {
                let (left, right) = (at >> half, at & mask);
                at = right << half | (left ^ (mix(right ^ self.seed << 8 ^ round << 60) & mask));
            }
            if at < self.pages {
                return at;
            }
        }
    }

    /// How often `page` has been written by now.
    fn version(&self, page: u64) -> u64 {
        let now = self.clock.0.load(Ordering::Relaxed);
        if self.order == Order::HotSet {
            return if self.turn(page) < (self.pages_per_second / 50.0) as u64 { now } else { 0 };
        }
        let busy_ns = match self.bursts_ns {
            Some(period) => now / (2 * period) * 2 * period + 2 * (now % (2 * period)).min(period),
            None => now,
        };
        let written = busy_ns as f64 * self.pages_per_second / 1e9;
        ((written + (self.pages - self.turn(page)) as f64) / self.pages as f64) as u64
    }
}

impl GuestMemory for SimGuest {
    fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.clock.advance(PAGE_NS * into.len() as u64 / PAGE);
        if self.clock.now() >= self.ends_at {
            return Err(GuestMemoryError::Gone);
        }
        let mut first = 0;
        for range in &self.ranges {
            if range.contains(at, into.len() as u64) {
                let page = first + (at.0 - range.start.0) / PAGE;
                if self.unreadable.contains(&page) {
                    return Err(GuestMemoryError::Unreadable { at, reason: "secret".to_owned() });
                }
                into.fill(0);
                if page < self.zeros_from && into.len() > 16 {
                    into[8..16].copy_from_slice(&(self.version(page) + 1).to_le_bytes());
                    into[..8].copy_from_slice(&page.to_le_bytes());
                    // A half that cannot be compressed.
                    for (index, word) in into[2048..].chunks_exact_mut(8).enumerate().take(self.noise()) {
                        word.copy_from_slice(&mix(page << 20 | index as u64).to_le_bytes());
                    }
                }
                return Ok(());
            }
            first += range.bytes / PAGE;
        }
        Err(GuestMemoryError::NotRam(at))
    }
}

impl SimGuest {
    fn noise(&self) -> usize {
        if self.zeros_from < self.pages { 256 } else { 0 }
    }

    fn sampler(&self, options: SamplingOptions) -> Sampler<Self, SimClock> {
        Sampler::new(self.clone(), self.clock.clone(), options).unwrap()
    }

    fn curve(&self, options: SamplingOptions) -> SampledCurve {
        self.sampler(options).measure().unwrap()
    }

    /// Pages that are truly written in a window as long as `estimate`'s.
    fn truth(&self, estimate: &WindowEstimate) -> f64 {
        let seconds = if self.order == Order::HotSet { 0.02 } else { estimate.effective_interval_ns as f64 / 1e9 };
        (self.pages_per_second * seconds).min(self.zeros_from as f64)
    }
}

fn options(milliseconds: &[u64], seed: u64) -> SamplingOptions {
    let windows = milliseconds.iter().map(|&length| Duration::from_millis(length)).collect();
    SamplingOptions { windows, seed, ..SamplingOptions::default() }
}

/// Pages of the guest whose estimates are judged.
const MANY: u64 = 10_000;

/// How the intervals and errors of many seeded runs lie.
#[derive(Debug, Default)]
struct Quality {
    estimates: u32,
    covered: u32,
    errors_where_wanted_seen: Vec<f64>,
}

impl Quality {
    fn add(&mut self, truth: f64, estimate: &WindowEstimate) {
        self.estimates += 1;
        // The estimate's ends are rounded outward.
        let inside = estimate.unique_pages_low as f64 <= truth && truth <= estimate.unique_pages_high as f64;
        self.covered += u32::from(inside);
        let expected = truth / MANY as f64 * estimate.sampled_pages as f64;
        if expected >= 400.0 {
            self.errors_where_wanted_seen.push((estimate.unique_pages as f64 - truth).abs() / truth);
        }
    }

    fn coverage(&self) -> f64 {
        f64::from(self.covered) / f64::from(self.estimates)
    }

    fn worst_of_19_in_20(&mut self) -> f64 {
        self.errors_where_wanted_seen.sort_by(f64::total_cmp);
        self.errors_where_wanted_seen[self.errors_where_wanted_seen.len() * 95 / 100]
    }
}

fn quality(order: Order, rates: &[f64], seeds: u64) -> Vec<Quality> {
    let per_rate = rates.iter().map(|&rate| {
        let mut quality = Quality::default();
        for seed in 0..seeds {
            let mut guest = SimGuest::new(MANY, rate, seed);
            guest.order = order;
            let options = SamplingOptions { cpu_share: 0.1, ..options(&[20, 40], seed ^ 0x5eed) };
            for estimate in guest.curve(options).windows {
                quality.add(guest.truth(&estimate), &estimate);
            }
        }
        quality
    });
    per_rate.collect()
}

#[test]
fn intervals_cover_the_truth_as_often_as_they_say_and_errors_are_small() {
    let rates = [25_000.0, 50_000.0, 100_000.0, 225_000.0];
    let mut all = quality(Order::Scattered, &rates, 260);
    let (runs, covered) = all.iter().fold((0, 0), |(runs, covered), of| (runs + of.estimates, covered + of.covered));
    for (rate, quality) in rates.iter().zip(&mut all) {
        let (coverage, error) = (quality.coverage(), quality.worst_of_19_in_20());
        println!(
            "{rate} pages/s: {runs} estimates, coverage {coverage:.4}, 95th percentile of the error {error:.4}",
            runs = quality.estimates
        );
        assert!((0.93..=0.97).contains(&coverage), "{rate}: {coverage}");
        assert!(error <= 0.10 && quality.errors_where_wanted_seen.len() > 250, "{rate}: {error}");
    }
    assert!(runs >= 2080 && (0.93..=0.97).contains(&(f64::from(covered) / f64::from(runs))), "{covered} of {runs}");
}

#[test]
fn a_sequential_writer_and_a_hot_set_are_covered_too() {
    // Strata that are written wholly or not at all, and windows that all have the same pages written: intervals may only be too wide.
    let sequential = quality(Order::Sequential, &[25_000.0, 100_000.0], 100);
    for mut quality in sequential.into_iter().chain(quality(Order::HotSet, &[25_000.0, 100_000.0], 100)) {
        let (coverage, error) = (quality.coverage(), quality.worst_of_19_in_20());
        println!("coverage {coverage:.4}, 95th percentile of the error {error:.4}");
        assert!(coverage >= 0.93 && error <= 0.10, "{coverage} {error}");
    }
}

#[test]
fn a_guest_that_writes_in_bursts_gets_wider_intervals() {
    let (mut covered, mut widened) = (0, 0);
    for seed in 0..100 {
        let mut guest = SimGuest::new(40_000, 400_000.0, seed);
        guest.bursts_ns = Some(15_000_000);
        let estimate = guest.curve(options(&[5], seed)).windows.remove(0);
        let truth = guest.truth(&estimate);
        covered += u32::from(estimate.unique_pages_low as f64 <= truth && truth <= estimate.unique_pages_high as f64);
        widened += u32::from(estimate.variance_ratio > 1.0);
    }
    println!("{covered} of 100 covered, {widened} widened");
    assert!(covered >= 88 && widened >= 98, "{covered} covered, {widened} widened");
}

#[test]
fn the_curve_rises_with_the_window_and_stays_within_the_budget() {
    let guest = SimGuest::new(200_000, 20_000.0, 3);
    let curve = guest.curve(options(&[1280, 5, 20, 80, 320, 5], 4));
    let asked: Vec<u64> = curve.windows.iter().map(|window| window.window_ns / 1_000_000).collect();
    assert_eq!(asked, [5, 20, 80, 320, 1280]);
    for estimate in &curve.windows {
        let truth = guest.truth(estimate);
        let half = 1.3 * (estimate.unique_pages_high - estimate.unique_pages_low) as f64;
        assert!((estimate.unique_pages as f64 - truth).abs() <= half, "{truth} {estimate:?}");
        // Each page's own interval is the window's.
        let close = |ns: u64| (ns as f64 / estimate.window_ns as f64 - 1.0).abs() < 0.02;
        assert!(close(estimate.shortest_interval_ns) && close(estimate.longest_interval_ns), "{estimate:?}");
    }
    assert!(curve.read_ns as f64 <= 0.032 * curve.elapsed_ns as f64, "{curve:?}");
    assert!(curve.elapsed_ns < 12_000_000_000, "{curve:?}");
    // The same seed, the same sample.
    let again = SimGuest::new(200_000, 20_000.0, 3);
    assert_eq!(again.curve(options(&[5, 20, 80, 320, 1280], 4)), curve);
}

#[test]
fn a_small_memory_is_read_whole_and_exact() {
    for pages in [1, 2, 3, 25, 100, 1024] {
        let guest = SimGuest::new(pages, 0.0, 1);
        let curve = guest.curve(options(&[5, 80], 1));
        for estimate in &curve.windows {
            let interval = (estimate.unique_pages_low, estimate.unique_pages, estimate.unique_pages_high);
            assert_eq!((interval, estimate.sampled_pages, estimate.is_exact), ((0, 0, 0), pages, true), "{pages}");
        }
    }
    // Every page written in each window, the last one too.
    let guest = SimGuest::new(100, 1e6, 1);
    let estimate = guest.curve(options(&[5], 1)).windows.remove(0);
    assert_eq!((estimate.unique_pages_low, estimate.unique_pages, estimate.unique_pages_high), (100, 100, 100));
    // A part of them, and how many is exact: 20 in 5 ms, by one more or less where a page falls on a window's edge.
    let guest = SimGuest::new(100, 4000.0, 1);
    let estimate = guest.curve(options(&[5], 1)).windows.remove(0);
    assert!(estimate.is_exact && (15..=25).contains(&estimate.unique_pages), "{estimate:?}");
}

#[test]
fn no_change_and_nothing_but_change_have_intervals_that_say_how_sure_that_is() {
    let idle = SimGuest::new(1 << 20, 0.0, 1).curve(options(&[20], 1)).windows.remove(0);
    // The rule of three, as Wilson has it: 3.84 of n.
    let most = (1 << 20) as f64 * 3.85 / (idle.sampled_pages as f64 + 3.84);
    assert_eq!((idle.changed_pages, idle.unique_pages, idle.unique_pages_low), (0, 0, 0));
    assert!(idle.unique_pages_high > 0 && idle.unique_pages_high as f64 <= most + 1.0, "{idle:?}");
    // What shows no change is looked at as often as the budget allows for.
    assert!(idle.sampled_pages > 10_000, "{idle:?}");
    let guest = SimGuest::new(1 << 16, 1e8, 1);
    let busy = guest.curve(options(&[5], 1)).windows.remove(0);
    assert_eq!((busy.unique_pages, busy.unique_pages_high), (1 << 16, 1 << 16));
    assert!(
        busy.unique_pages_low < 1 << 16 && busy.unique_pages_low > 65_000 && busy.changed_pages == busy.sampled_pages
    );
}

#[test]
fn zeros_and_compression_come_from_the_same_pages() {
    let mut guest = SimGuest::new(20_000, 0.0, 1);
    guest.zeros_from = 5_000;
    let curve = guest.curve(options(&[5], 9));
    let zeros = curve.zero_pages.unwrap();
    assert!((zeros.share - 0.75).abs() < 0.02 && zeros.share_low < 0.75 && zeros.share_high > 0.75, "{zeros:?}");
    // Half of each page is noise.
    let compression = curve.compression.unwrap();
    assert!((0.5..0.54).contains(&compression.ratio) && compression.sampled_pages == 512, "{compression:?}");
    assert!(compression.ratio_low <= compression.ratio && compression.ratio <= compression.ratio_high);
    guest.zeros_from = 0;
    let curve = guest.curve(options(&[5], 9));
    assert!(curve.compression.is_none() && (curve.zero_pages.unwrap().share - 1.0).abs() < 1e-9);
}

#[test]
fn memory_with_a_hole_and_a_slot_that_cannot_be_read() {
    let mut guest = SimGuest::new(30_000, 30_000.0, 1);
    let range = |start, pages| MemoryRange { start: Gpa(start), bytes: pages * PAGE };
    guest.ranges = vec![range(0, 10_000), range(1 << 32, 10_000), range(1 << 40, 10_000)];
    guest.unreadable = (10_000..20_000).collect();
    let curve = guest.curve(options(&[80], 1));
    assert_eq!((curve.population_pages, curve.windows[0].unreadable_pages), (20_000, 0));
    assert_eq!(curve.unreadable_ranges.len(), 1);
    assert_eq!((curve.unreadable_ranges[0].start, curve.unreadable_ranges[0].bytes), (Gpa(1 << 32), 10_000 * PAGE));
    // Two thirds of 2400 are in the other two.
    assert!(curve.windows[0].unique_pages.abs_diff(1600) < 200, "{curve:?}");
    // One that can be read at its beginning only.
    guest.unreadable = (15_000..20_000).collect();
    let curve = guest.curve(options(&[80], 1));
    let estimate = &curve.windows[0];
    assert!(
        curve.population_pages == 30_000 && estimate.unreadable_pages * 5 > estimate.sampled_pages * 4 / 5,
        "{estimate:?}"
    );
    assert!(estimate.unique_pages.abs_diff(2000) < 250 && !estimate.is_exact, "{estimate:?}");
    guest.unreadable = (0..30_000).collect();
    let refused = Sampler::new(guest.clone(), guest.clock.clone(), options(&[80], 1)).unwrap_err();
    assert!(matches!(&refused, SamplingError::Unreadable(reason) if reason.contains("secret")), "{refused}");
    guest.ranges.clear();
    let refused = Sampler::new(guest.clone(), guest.clock.clone(), options(&[80], 1)).unwrap_err();
    assert!(refused.to_string().contains("no RAM"), "{refused}");
}

#[test]
fn a_vm_that_ends_midway_leaves_what_was_finished() {
    let mut guest = SimGuest::new(1000, 1000.0, 1);
    guest.ends_at = Duration::from_millis(1000);
    let Err(SamplingError::Ended { finished }) = guest.sampler(options(&[5, 1280], 1)).measure() else { panic!() };
    assert_eq!(finished.iter().map(|window| window.window_ns).collect::<Vec<_>>(), [5_000_000]);
    guest.ends_at = Duration::ZERO;
    assert!(matches!(
        Sampler::new(guest.clone(), guest.clock.clone(), options(&[5], 1)),
        Err(SamplingError::Ended { .. })
    ));
}

#[test]
fn options_that_cannot_be_followed_are_refused() {
    let guest = SimGuest::new(10, 0.0, 1);
    let base = SamplingOptions::default();
    for bad in [
        SamplingOptions { windows: Vec::new(), ..base.clone() },
        SamplingOptions { windows: vec![Duration::ZERO], ..base.clone() },
        SamplingOptions { windows: vec![Duration::from_secs(61)], ..base.clone() },
        SamplingOptions { cpu_share: 0.0, ..base.clone() },
        SamplingOptions { cpu_share: f64::NAN, ..base.clone() },
        SamplingOptions { cpu_share: 1.1, ..base.clone() },
        SamplingOptions { time_per_window: Duration::MAX, ..base.clone() },
        SamplingOptions { pilot_pages: 0, ..base.clone() },
        SamplingOptions { changed_wanted: 0, ..base.clone() },
    ] {
        let made = Sampler::new(guest.clone(), guest.clock.clone(), bad.clone());
        assert!(matches!(made, Err(SamplingError::Options(_))), "{bad:?}");
    }
}

#[test]
fn where_a_writer_is_shows_in_the_regions_and_their_sum_is_the_whole() {
    for seed in 0..8 {
        let mut guest = SimGuest::new(64 * 512, 4000.0, seed);
        guest.order = Order::Sequential;
        let curve = guest.curve(options(&[320, 1280], seed));
        let heat = &curve.heat;
        assert_eq!((heat.region_bytes, heat.regions.len(), heat.windows), (2 << 20, 64, 1));
        let sum: u64 = heat.regions.iter().map(|region| region.unique_pages).sum();
        let window = curve.windows.last().unwrap();
        assert!((window.unique_pages_low..=window.unique_pages_high).contains(&sum), "{sum} of {window:?}");
        // 5120 pages in a row lie in eleven regions of 512; what was read last was read a moment later.
        let written: Vec<usize> = (0..64).filter(|&index| heat.regions[index].changed_pages > 0).collect();
        let apart = written.windows(2).filter(|pair| pair[1] - pair[0] > 1).count();
        assert!((10..=14).contains(&written.len()) && apart <= 1, "{written:?}");
    }
}

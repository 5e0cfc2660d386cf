//! Histograms of first-write times: when, after all of a guest's memory was write-protected, each page was written first. One
//! arming gives the whole curve, since the pages first written within t are those written in an interval of length t.
//!
//! Owns how such a histogram becomes a [`WriteCurve`]. Its bins are the arithmetic that the BPF programs share
//! ([`dunlin_ebpf::first_write_bin`]). Must not know who filled it.

use std::time::Duration;

use dunlin_ebpf::{FIRST_WRITE_BINS, first_write_bin, first_write_bin_start_ns};

use super::curve::{CurvePoint, MAX_INTERVAL_NS, WriteCurve};
use super::shape::MAX_MEMORY_BYTES;
use super::units::PAGE_SIZE;

/// The least share of its time that a writer is taken to have run. A fault costs what it costs only on average: where the
/// faults seem to have taken all of a writer's time and more, its time between them is not known, only that it was short.
const LEAST_RUN: f64 = 1.0 / 64.0;
/// How much dearer than measured faults may be for the upper edge: they are measured on a guest that does nothing else, and cost one with page
/// tables, caches and other vCPUs of its own up to twice as much (`cargo xtask bench tracking`, the loads `*-max`).
const DEARER: f64 = 2.5;
/// What write protection did to a writer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slowed {
    /// What a first write cost it, beyond the write itself.
    pub fault_cost: Duration,
    /// The part of its time that it did not want to run; none where that is not known.
    pub idle: Option<f64>,
    /// By which part longer its work may have taken for other reasons.
    pub longer: f64,
}

impl Slowed {
    /// A thread that is idle for this part of its time works to a clock: what faults take from it, it makes up for.
    pub const PACED_IDLE: f64 = 0.1;
    /// How much dearer than measured faults are likely to be: see `DEARER`.
    pub const LIKELY_DEARER: f64 = 1.5;
}

/// The first-write times of one writer's pages within one armed window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstWrites {
    window_ns: u64,
    bins: Vec<u64>,
    /// Pages that each counted one stands for.
    every: u64,
    /// When the window began, after the moment that times count from.
    begin_ns: u64,
    /// How far that may be off.
    begin_within_ns: u64,
}

impl FirstWrites {
    /// An empty histogram of a window of this length; a window longer than a day counts as a day, an empty one as a nanosecond.
    pub fn new(window: Duration) -> Self {
        let window_ns = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX).clamp(1, MAX_INTERVAL_NS);
        Self { window_ns, bins: vec![0; FIRST_WRITE_BINS as usize], every: 1, begin_ns: 0, begin_within_ns: 0 }
    }

    /// A histogram as it was counted elsewhere: missing bins are empty, further ones are ignored.
    pub fn from_bins(window: Duration, bins: &[u64]) -> Self {
        let mut histogram = Self::new(window);
        for (bin, &count) in histogram.bins.iter_mut().zip(bins) {
            *bin = count;
        }
        histogram
    }

    /// One page of so many was protected, and stands for them.
    #[must_use]
    pub fn standing_for(self, pages: u64) -> Self {
        Self { every: pages.max(1), ..self }
    }

    /// The window began so long after the moment that times count from, give or take: pages are protected one after the other.
    #[must_use]
    pub fn begun(self, after: Duration, within: Duration) -> Self {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).min(MAX_INTERVAL_NS);
        Self { begin_ns: ns(after), begin_within_ns: ns(within), ..self }
    }

    /// Counts `pages` pages that were first written `after` the arming.
    pub fn add(&mut self, after: Duration, pages: u64) {
        let ns = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bin) = self.bins.get_mut(first_write_bin(ns) as usize) {
            *bin = bin.saturating_add(pages);
        }
    }

    /// The window's length.
    pub const fn window(&self) -> Duration {
        Duration::from_nanos(self.window_ns)
    }

    /// The pages that were counted within the window.
    pub fn counted(&self) -> u64 {
        self.edges().last().map_or(0, |&(_, pages)| pages)
    }

    /// The curve: pages first written until each bin's end, and until the window's. What came after the window is not in it.
    ///
    /// The lower edge is the curve as seen. What a writer had written at time t it would, without the faults, have written at t - cost·F(t), with F
    /// the faults until then; so it is for one that only computes, and the upper edge says so of faults that are dear ([`DEARER`]). One
    /// that works to a clock makes up for them. Which it is, its idle time says: the value is the curve as seen for one that has idle time, the
    /// corrected one for one that has none, and their middle where that is not known. Right only for a single vCPU: see [`WriteCurve::sum`].
    /// The edges hold nothing of chance: neither how far windows differ, nor that a part of the pages stands for all.
    pub fn curve(&self, slowed: &Slowed) -> WriteCurve {
        let edges = self.edges();
        let cost = slowed.fault_cost.as_nanos() as f64;
        let seen = self.curve_through(&edges);
        let (likely, dear) =
            (self.curve_through(&without(&edges, cost)), self.curve_through(&without(&edges, cost * DEARER)));
        let within = self.begin_within_ns as f64;
        let points = edges.iter().map(|&(at, _)| {
            let time = at as f64;
            let as_seen = seen.at_ns(time).unique_pages;
            // Behind the last time that it ran until: at most as fast as until then.
            let corrected = likely.at_ns(time).high_pages.max(as_seen);
            let value = match slowed.idle {
                Some(idle) if idle >= Slowed::PACED_IDLE => as_seen,
                Some(_) => corrected,
                None => as_seen.midpoint(corrected),
            };
            let low = seen.at_ns((time - within).max(1.0)).unique_pages.min(value);
            let high = dear.at_ns(time * (1.0 + slowed.longer.max(0.0)) + within).high_pages.max(value);
            CurvePoint { interval_ns: at, unique_pages: value, low_pages: low, high_pages: high }
        });
        WriteCurve::from_measured(points.collect()).unwrap_or(seen)
    }

    /// `(time, pages counted before it)` at the end of each bin that is not empty, and at the window's end. At least one,
    /// rising; never more pages than any VM has.
    fn edges(&self) -> Vec<(u64, u64)> {
        let most = MAX_MEMORY_BYTES / PAGE_SIZE as u64 / self.every;
        let mut edges = Vec::new();
        let mut pages = 0u64;
        for (index, &count) in self.bins.iter().enumerate() {
            if count == 0 {
                continue;
            }
            let bin = index as u32;
            if first_write_bin_start_ns(bin).saturating_sub(self.begin_ns) >= self.window_ns {
                break;
            }
            pages = pages.saturating_add(count).min(most);
            let end = if bin + 1 < FIRST_WRITE_BINS { first_write_bin_start_ns(bin + 1) } else { u64::MAX };
            // What was counted before the window began was written at its very begin.
            let end = end.saturating_sub(self.begin_ns);
            if 0 < end && end < self.window_ns {
                edges.push((end, pages));
            }
        }
        edges.push((self.window_ns, pages));
        edges
    }

    /// The curve through `edges`, of which there is at least one, each page standing for its others.
    fn curve_through(&self, edges: &[(u64, u64)]) -> WriteCurve {
        let points = edges.iter().map(|&(at, pages)| CurvePoint::exact(at, (pages * self.every) as f64)).collect();
        // Times rise, there are fewer of them than points may be, and pages are bounded: there is nothing to refuse.
        WriteCurve::from_measured(points).expect("edges of bins are points of a curve")
    }
}

/// The same counts at the times that the writer had run until then, with each fault taking `cost` nanoseconds. Counts that would lie at the same
/// time, or before the ones before them, belong to the latest time among them.
fn without(edges: &[(u64, u64)], cost: f64) -> Vec<(u64, u64)> {
    let mut run: Vec<(u64, u64)> = Vec::with_capacity(edges.len());
    for &(at, pages) in edges {
        let own = (at as f64 - cost * pages as f64).max(at as f64 * LEAST_RUN).max(1.0) as u64;
        match run.last_mut() {
            Some(last) if last.0 >= own => last.1 = pages,
            _ => run.push((own, pages)),
        }
    }
    run
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    proptest! {
        /// Every time is in the bin that its start says, also around each power of two.
        #[test]
        fn bins_hold_their_times(bits in 0..64u32, near in 0..9u64, any in any::<u64>()) {
            for ns in [any >> bits, (1u64 << bits).saturating_add(near).saturating_sub(4)] {
                let bin = first_write_bin(ns);
                prop_assert!(bin < FIRST_WRITE_BINS);
                prop_assert!(first_write_bin_start_ns(bin) <= ns);
                prop_assert!(bin + 1 == FIRST_WRITE_BINS || ns < first_write_bin_start_ns(bin + 1), "{ns} in {bin}");
            }
        }

        /// Any counts become a curve that ends with the window, whose band holds what was seen.
        #[test]
        fn any_bins_make_a_curve(
            bins in prop::collection::vec(prop_oneof![Just(0), 0..1000u64, any::<u64>()], 0..200),
            window in 1..u64::MAX, cost in 0..100_000u64, idle in prop::option::of(0.0..1.0f64),
        ) {
            let window = Duration::from_nanos(window >> (window % 50));
            let histogram = FirstWrites::from_bins(window, &bins);
            let curve = histogram.curve(&Slowed { fault_cost: Duration::from_nanos(cost), idle, longer: 0.0 });
            prop_assert!(WriteCurve::new(curve.points().to_vec()).is_ok(), "{:?}", WriteCurve::new(curve.points().to_vec()));
            prop_assert_eq!(curve.last().interval_ns, histogram.window_ns);
            prop_assert_eq!(curve.last().low_pages as u64, histogram.counted());
        }
    }

    #[test]
    fn bins_grow_by_an_eighth_of_an_octave() {
        assert_eq!((FIRST_WRITE_BINS, first_write_bin(0), first_write_bin(16_383)), (186, 0, 0));
        assert_eq!((first_write_bin(16_384), first_write_bin(18_431), first_write_bin(18_432)), (1, 1, 2));
        assert_eq!(
            (first_write_bin((1 << 37) - 1), first_write_bin(1 << 37), first_write_bin(u64::MAX)),
            (184, 185, 185)
        );
        assert_eq!(first_write_bin_start_ns(u32::MAX), 1 << 37);
        for bin in 0..FIRST_WRITE_BINS {
            assert_eq!(first_write_bin(first_write_bin_start_ns(bin)), bin);
            if (1..FIRST_WRITE_BINS - 1).contains(&bin) {
                let (start, end) = (first_write_bin_start_ns(bin), first_write_bin_start_ns(bin + 1));
                assert!(end - start <= start / 8, "bin {bin} is too wide");
            }
        }
    }

    /// A writer of `pages` pages, each at `rate` writes per second, of which each fault takes `cost`.
    fn simulated(pages: u32, rate: f64, cost: Duration, window: Duration) -> FirstWrites {
        let mut histogram = FirstWrites::new(window);
        for page in 0..pages {
            // The quantile at which this page is first written, in the guest's own time; each fault before it delays it.
            let own = -(1.0 - (f64::from(page) + 0.5) / f64::from(pages)).ln() / rate;
            histogram.add(Duration::from_secs_f64(own) + cost * page, 1);
        }
        histogram
    }

    #[test]
    fn without_a_cost_the_histogram_is_the_curve() {
        let curve = simulated(10_000, 20.0, Duration::ZERO, MS * 500).curve(&Slowed::default());
        for ms in [5, 20, 80, 320] {
            let truth = 10_000.0 * -(-20.0 * f64::from(ms) / 1e3).exp_m1();
            let read = curve.at(MS * ms);
            assert!((read.unique_pages / truth - 1.0).abs() < 0.02, "{ms} ms: {read:?}, {truth}");
            assert!(!read.extrapolated && (read.low_pages - read.unique_pages).abs() < 1.0);
        }
    }

    /// Of a writer that never waits.
    fn computing(fault_cost: Duration) -> Slowed {
        Slowed { fault_cost, idle: Some(0.0), longer: 0.0 }
    }

    #[test]
    fn a_writer_that_only_computes_is_given_back_what_faults_took() {
        let cost = Duration::from_micros(5);
        let armed = simulated(10_000, 20.0, cost, MS * 500);
        for ms in [5, 20, 80] {
            let truth = 10_000.0 * -(-20.0 * f64::from(ms) / 1e3).exp_m1();
            let read = armed.curve(&computing(cost)).at(MS * ms);
            assert!(read.low_pages < truth * 0.99, "at {ms} ms faults cost nothing");
            assert!((read.unique_pages / truth - 1.0).abs() < 0.05, "{ms} ms: {read:?}, {truth}");
            // Faults that are twice as dear as was measured.
            let read = armed.curve(&computing(cost / 2)).at(MS * ms);
            assert!(read.unique_pages < truth * 0.98 && truth < read.high_pages, "{ms} ms: {read:?}, {truth}");
            // Not known whether it waits.
            let unknown = armed.curve(&Slowed { fault_cost: cost, ..Slowed::default() }).at(MS * ms);
            assert!((read.low_pages..truth).contains(&unknown.unique_pages), "{ms} ms: {unknown:?}, {truth}");
        }
    }

    #[test]
    fn a_writer_that_works_to_a_clock_is_taken_as_seen() {
        let cost = Duration::from_micros(5);
        let armed = simulated(10_000, 20.0, Duration::ZERO, MS * 500);
        for ms in [5, 20, 80] {
            let truth = 10_000.0 * -(-20.0 * f64::from(ms) / 1e3).exp_m1();
            let read = armed.curve(&Slowed { fault_cost: cost, idle: Some(0.5), longer: 0.0 }).at(MS * ms);
            assert!((read.unique_pages / truth - 1.0).abs() < 0.02 && read.high_pages > truth, "{ms} ms: {read:?}");
        }
    }

    #[test]
    fn a_part_of_the_pages_stands_for_all_and_loses_a_part_of_the_time() {
        let cost = Duration::from_micros(5);
        let whole = simulated(16_000, 20.0, Duration::ZERO, MS * 500);
        let part = simulated(1000, 20.0, cost, MS * 500).standing_for(16);
        assert_eq!(part.counted(), 1000);
        for ms in [20, 80, 320] {
            let truth = whole.curve(&Slowed::default()).at(MS * ms).unique_pages;
            let read = part.curve(&computing(cost)).at(MS * ms);
            assert!((read.unique_pages / truth - 1.0).abs() < 0.02, "{ms} ms: {read:?}, {truth}");
            // A fault for each of sixteen pages: the whole band is narrow.
            assert!((read.high_pages - read.low_pages) / truth < 0.3, "{ms} ms: {read:?}");
        }
    }

    #[test]
    fn a_window_that_began_late_is_shorter_by_that() {
        let mut histogram = FirstWrites::new(MS * 100);
        (0..1000).for_each(|i| histogram.add(MS * 10 + Duration::from_micros(i * 100), 1));
        let late = histogram.begun(MS * 10, MS).curve(&Slowed::default());
        for ms in [20, 40, 80] {
            let read = late.at(MS * ms);
            assert!((read.unique_pages - f64::from(ms) * 10.0).abs() < 2.0, "{ms} ms: {read:?}");
            assert!((read.high_pages - read.unique_pages - 10.0).abs() < 2.0, "a millisecond more or less: {read:?}");
            // A curve is concave, so the lower edge gives way.
            assert!(read.low_pages < read.unique_pages, "{read:?}");
        }
    }

    #[test]
    fn faults_that_seem_to_take_all_the_time_leave_a_band_and_no_nonsense() {
        // 100 000 faults of 10 µs are twice the window.
        let mut histogram = FirstWrites::new(MS * 500);
        (0..100_000).for_each(|i| histogram.add(Duration::from_micros(i * 5), 1));
        let curve = histogram.curve(&computing(Duration::from_micros(10)));
        let read = curve.at(MS * 100);
        assert!(read.high_pages > 10.0 * read.low_pages && read.high_pages.is_finite(), "{read:?}");
    }

    #[test]
    fn what_came_after_the_window_is_not_in_the_curve() {
        let mut histogram = FirstWrites::new(MS * 10);
        histogram.add(MS * 9, 5);
        histogram.add(MS * 20, 7);
        assert_eq!(histogram.counted(), 5);
    }
}

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

/// The first-write times of one writer's pages within one armed window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstWrites {
    window_ns: u64,
    bins: Vec<u64>,
}

impl FirstWrites {
    /// An empty histogram of a window of this length; a window longer than a day counts as a day, an empty one as a nanosecond.
    pub fn new(window: Duration) -> Self {
        let window_ns = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX).clamp(1, MAX_INTERVAL_NS);
        Self { window_ns, bins: vec![0; FIRST_WRITE_BINS as usize] }
    }

    /// A histogram as it was counted elsewhere: missing bins are empty, further ones are ignored.
    pub fn from_bins(window: Duration, bins: &[u64]) -> Self {
        let mut histogram = Self::new(window);
        for (bin, &count) in histogram.bins.iter_mut().zip(bins) {
            *bin = count;
        }
        histogram
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

    /// All pages written within the window.
    pub fn pages(&self) -> u64 {
        self.edges().last().map_or(0, |&(_, pages)| pages)
    }

    /// The curve: pages first written until each bin's end, and until the window's. What came after the window is not in it.
    ///
    /// `fault_cost` is what a first write of an armed guest costs its writer. The lower edge is the curve as seen; the upper edge
    /// is that of a writer that never waits for anything else: what it had written at time t it would, without the faults, have
    /// written at t - cost·U(t). A writer that works to the clock catches up and is on the lower edge, one that only computes is
    /// on the upper; the truth lies between, and the value is their middle. Right only for a single vCPU: see [`curve_of_vm`].
    pub fn curve(&self, fault_cost: Duration) -> WriteCurve {
        let edges = self.edges();
        let seen = curve_through(&edges);
        let cost = fault_cost.as_nanos() as f64;
        // The same counts at the times that the writer had run until then. Counts that would lie at the same time, or before the
        // ones before them, belong to the latest time among them.
        let mut run: Vec<(u64, u64)> = Vec::with_capacity(edges.len());
        for &(at, pages) in &edges {
            let own = (at as f64 - cost * pages as f64).max(at as f64 * LEAST_RUN).max(1.0) as u64;
            match run.last_mut() {
                Some(last) if last.0 >= own => last.1 = pages,
                _ => run.push((own, pages)),
            }
        }
        let run = curve_through(&run);
        let points = edges
            .iter()
            .zip(seen.points())
            .map(|(&(at, _), point)| {
                let low = point.unique_pages;
                // Behind the last time that it ran until: at most as fast as until then.
                let high = run.at_ns(at as f64).high_pages.max(low);
                CurvePoint { interval_ns: at, unique_pages: low.midpoint(high), low_pages: low, high_pages: high }
            })
            .collect();
        WriteCurve::from_measured(points).unwrap_or(seen)
    }

    /// `(time, pages first written before it)` at the end of each bin that is not empty, and at the window's end. At least one,
    /// rising; never more pages than any VM has.
    fn edges(&self) -> Vec<(u64, u64)> {
        let most = MAX_MEMORY_BYTES / PAGE_SIZE as u64;
        let mut edges = Vec::new();
        let mut pages = 0u64;
        for (index, &count) in self.bins.iter().enumerate() {
            if count == 0 {
                continue;
            }
            let bin = index as u32;
            if first_write_bin_start_ns(bin) >= self.window_ns {
                break;
            }
            pages = pages.saturating_add(count).min(most);
            let end = if bin + 1 < FIRST_WRITE_BINS { first_write_bin_start_ns(bin + 1) } else { self.window_ns };
            if end < self.window_ns {
                edges.push((end, pages));
            }
        }
        edges.push((self.window_ns, pages));
        edges
    }
}

/// The curve of a whole VM from the histograms of its vCPUs, which lose their time to faults each on its own; none without
/// any. A page counts for the vCPU that wrote it first.
pub fn curve_of_vm<'a>(vcpus: impl IntoIterator<Item = &'a FirstWrites>, fault_cost: Duration) -> Option<WriteCurve> {
    let curves: Vec<WriteCurve> = vcpus.into_iter().map(|vcpu| vcpu.curve(fault_cost)).collect();
    WriteCurve::sum(&curves)
}

/// The curve through `edges`, of which there is at least one.
fn curve_through(edges: &[(u64, u64)]) -> WriteCurve {
    let points = edges.iter().map(|&(at, pages)| CurvePoint::exact(at, pages as f64)).collect();
    // Times rise, there are fewer of them than points may be, and pages are bounded: there is nothing to refuse.
    WriteCurve::from_measured(points).expect("edges of bins are points of a curve")
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
            window in 1..u64::MAX, cost in 0..100_000u64,
        ) {
            let window = Duration::from_nanos(window >> (window % 50));
            let histogram = FirstWrites::from_bins(window, &bins);
            let curve = histogram.curve(Duration::from_nanos(cost));
            prop_assert!(WriteCurve::new(curve.points().to_vec()).is_ok(), "{:?}", WriteCurve::new(curve.points().to_vec()));
            prop_assert_eq!(curve.last().interval_ns, histogram.window_ns);
            prop_assert_eq!(curve.last().low_pages as u64, histogram.pages());
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
        let curve = simulated(10_000, 20.0, Duration::ZERO, MS * 500).curve(Duration::ZERO);
        for ms in [5, 20, 80, 320] {
            let truth = 10_000.0 * -(-20.0 * f64::from(ms) / 1e3).exp_m1();
            let read = curve.at(MS * ms);
            assert!((read.unique_pages / truth - 1.0).abs() < 0.02, "{ms} ms: {read:?}, {truth}");
            assert!(!read.extrapolated && (read.low_pages - read.unique_pages).abs() < 1.0);
        }
    }

    #[test]
    fn the_band_reaches_from_what_was_seen_to_what_a_writer_without_faults_does() {
        let cost = Duration::from_micros(5);
        let armed = simulated(10_000, 20.0, cost, MS * 500);
        let curve = armed.curve(cost);
        for ms in [5, 20, 80] {
            let truth = 10_000.0 * -(-20.0 * f64::from(ms) / 1e3).exp_m1();
            let read = curve.at(MS * ms);
            assert!(read.low_pages < truth * 0.99, "at {ms} ms faults cost nothing");
            assert!((read.high_pages / truth - 1.0).abs() < 0.05, "{ms} ms: {read:?}, {truth}");
        }
    }

    #[test]
    fn each_vcpu_loses_only_its_own_time() {
        let cost = Duration::from_micros(5);
        let vcpus = [simulated(10_000, 20.0, cost, MS * 500), simulated(10_000, 20.0, cost, MS * 500)];
        let (vm, one) = (curve_of_vm(&vcpus, cost).unwrap(), vcpus[0].curve(cost));
        for ms in [5, 80, 500] {
            let (vm, one) = (vm.at(MS * ms), one.at(MS * ms));
            assert!((vm.high_pages - 2.0 * one.high_pages).abs() < 1.0, "{ms} ms");
            assert!((vm.low_pages - 2.0 * one.low_pages).abs() < 1.0, "{ms} ms");
        }
        assert_eq!(curve_of_vm([], cost), None);
    }

    #[test]
    fn faults_that_seem_to_take_all_the_time_leave_a_band_and_no_nonsense() {
        // 100 000 faults of 10 µs are twice the window.
        let mut histogram = FirstWrites::new(MS * 500);
        (0..100_000).for_each(|i| histogram.add(Duration::from_micros(i * 5), 1));
        let curve = histogram.curve(Duration::from_micros(10));
        let read = curve.at(MS * 100);
        assert!(read.high_pages > 10.0 * read.low_pages && read.high_pages.is_finite(), "{read:?}");
    }

    #[test]
    fn what_came_after_the_window_is_not_in_the_curve() {
        let mut histogram = FirstWrites::new(MS * 10);
        histogram.add(MS * 9, 5);
        histogram.add(MS * 20, 7);
        assert_eq!(histogram.pages(), 5);
    }
}

//! How often, and for how long, a vCPU was out of its guest.

pub use dunlin_ebpf::EXIT_TIME_BINS;

/// Exits for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitTimes {
    /// How many.
    pub count: u64,
    /// Sum of the times until the guest went on, in nanoseconds; zero where the kernel does not tell.
    pub total_ns: u64,
    /// The longest since counting began, in nanoseconds.
    pub longest_ns: u64,
    /// How many took [2^n, 2^(n+1)) nanoseconds. Their sum may be less than `count`: the last exit is still under way.
    pub bins: [u32; EXIT_TIME_BINS],
}

impl Default for ExitTimes {
    fn default() -> Self {
        Self { count: 0, total_ns: 0, longest_ns: 0, bins: [0; EXIT_TIME_BINS] }
    }
}

impl ExitTimes {
    /// What happened since `before`. Counters that went back belong to a new thread of the same number.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        if self.count < before.count || self.total_ns < before.total_ns {
            return self.clone();
        }
        Self {
            count: self.count - before.count,
            total_ns: self.total_ns - before.total_ns,
            longest_ns: self.longest_ns,
            bins: std::array::from_fn(|bin| self.bins[bin].wrapping_sub(before.bins[bin])),
        }
    }

    /// Adds another's.
    pub fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.total_ns += other.total_ns;
        self.longest_ns = self.longest_ns.max(other.longest_ns);
        for (bin, more) in self.bins.iter_mut().zip(other.bins) {
            *bin = bin.saturating_add(more);
        }
    }

    /// The mean time, in nanoseconds; none where no time is known.
    pub fn mean_ns(&self) -> Option<f64> {
        let timed: u64 = self.bins.iter().map(|&count| u64::from(count)).sum();
        (timed > 0).then(|| self.total_ns as f64 / timed as f64)
    }

    /// A time that at least `share` (0 to 1) of the exits did not exceed, in nanoseconds: the upper end of its bin, so at most twice too
    /// high; none where no time is known.
    pub fn quantile_ns(&self, share: f64) -> Option<u64> {
        let timed: u64 = self.bins.iter().map(|&count| u64::from(count)).sum();
        let wanted = (share.clamp(0.0, 1.0) * timed as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let bin = self.bins.iter().position(|&count| {
            seen += u64::from(count);
            seen >= wanted
        })?;
        Some((2u64 << bin).min(self.longest_ns.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(of: &[u64]) -> ExitTimes {
        let mut times = ExitTimes::default();
        for &ns in of {
            times.count += 1;
            times.total_ns += ns;
            times.longest_ns = times.longest_ns.max(ns);
            times.bins[ns.ilog2() as usize] += 1;
        }
        times
    }

    #[test]
    fn quantiles_are_at_most_twice_too_high() {
        let all: Vec<u64> = (1..=1000).map(|n| n * 37).collect();
        let times = times(&all);
        for share in [0.01, 0.5, 0.9, 0.99, 1.0] {
            let truth = all[((share * 1000.0) as usize).clamp(1, 1000) - 1];
            let told = times.quantile_ns(share).unwrap();
            assert!(told >= truth && told <= 2 * truth, "{share}: {told} for {truth}");
        }
        assert_eq!(ExitTimes::default().quantile_ns(0.5), None);
        assert!((times.mean_ns().unwrap() - 37.0 * 500.5).abs() < 1e-6);
    }

    #[test]
    fn only_what_is_new_counts() {
        let (before, mut after) = (times(&[100, 200]), times(&[100, 200]));
        after.add(&times(&[5000]));
        let new = after.since(&before);
        assert_eq!((new.count, new.total_ns, new.bins[12]), (1, 5000, 1));
        assert_eq!(times(&[7]).since(&before).count, 1);
    }
}

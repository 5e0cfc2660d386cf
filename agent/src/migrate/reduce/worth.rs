//! Whether compressing is worth its time on one stream at present.
//!
//! The rule: compress if that takes less time for a page than the bytes which it spares would take on the wire. All three are measured, all the time: a byte's time on the
//! wire is what the stream waited for the bandwidth limit and for the socket; what compressing takes is CPU time, which does not depend on who else
//! wants the CPU. While it is not worth it, one piece in [`TRIAL_EVERY`] is compressed all the same, to see whether that has changed.

use std::time::Duration;

/// One piece in so many is given to a way that is not the best one so far.
const TRIAL_EVERY: u32 = 32;
/// How much of what is known a new piece replaces: one part in so many.
const MEMORY: f64 = 8.0;

/// A ratio of two quantities that are seen piece by piece, the latest counting most.
#[derive(Clone, Copy, Debug, Default)]
struct Ratio {
    over: f64,
    under: f64,
}

impl Ratio {
    fn see(&mut self, over: f64, under: f64) {
        let keep = 1.0 - 1.0 / MEMORY;
        (self.over, self.under) = (self.over * keep + over, self.under * keep + under);
    }

    fn value(self) -> Option<f64> {
        (self.under > 0.0).then(|| self.over / self.under)
    }
}

/// One way to compress, as it has been so far.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    /// CPU seconds a page.
    cost: Ratio,
    /// Bytes spared a page.
    spared: Ratio,
}

/// The judge of one stream.
#[derive(Clone, Debug)]
pub(super) struct Worth {
    /// Seconds a byte.
    wire: Ratio,
    ways: Vec<Way>,
    since_trial: u32,
    next_trial: usize,
}

impl Worth {
    /// Between so many ways to compress.
    pub(super) fn new(ways: usize) -> Self {
        Self { wire: Ratio::default(), ways: vec![Way::default(); ways], since_trial: 0, next_trial: 0 }
    }

    /// Which way to go with the next piece; none: as it is.
    pub(super) fn choose(&mut self) -> Option<usize> {
        let wire = self.wire.value()?;
        if self.ways.is_empty() {
            return None;
        }
        // What nobody has tried yet is tried first.
        if let Some(untried) = self.ways.iter().position(|way| way.cost.value().is_none()) {
            return Some(untried);
        }
        let gain = |way: &Way| way.spared.value().unwrap_or(0.0) * wire - way.cost.value().unwrap_or(f64::MAX);
        let best = (0..self.ways.len()).max_by(|&a, &b| gain(&self.ways[a]).total_cmp(&gain(&self.ways[b])));
        let best = best.filter(|&best| gain(&self.ways[best]) > 0.0);
        self.since_trial += 1;
        if self.since_trial >= TRIAL_EVERY {
            self.since_trial = 0;
            self.next_trial = (self.next_trial + 1) % self.ways.len();
            return Some(self.next_trial);
        }
        best
    }

    /// A piece of `pages` was compressed in `cpu`, and is `spared` bytes shorter for that.
    pub(super) fn compressed(&mut self, way: usize, pages: u64, cpu: Duration, spared: u64) {
        if let Some(way) = self.ways.get_mut(way) {
            way.cost.see(cpu.as_secs_f64(), pages as f64);
            way.spared.see(spared as f64, pages as f64);
        }
    }

    /// So many bytes were sent, and that took so long, waiting included.
    pub(super) fn sent(&mut self, bytes: u64, took: Duration) {
        self.wire.see(took.as_secs_f64(), bytes as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream on a link of so many bytes a second; each way costs so many microseconds a page and leaves such a part of it. How many of 3200 pieces went each way,
    /// and as they are.
    fn play(worth: &mut Worth, bytes_per_second: f64, ways: &[(f64, f64)]) -> Vec<u32> {
        const PAGES: u64 = 32;
        let mut taken = vec![0; ways.len() + 1];
        for _ in 0..3200 {
            let way = worth.choose();
            let mut bytes = PAGES as f64 * 4096.0;
            if let Some(way) = way {
                let (micros, left) = ways[way];
                let spared = bytes * (1.0 - left);
                bytes -= spared;
                worth.compressed(way, PAGES, Duration::from_secs_f64(micros * 1e-6 * PAGES as f64), spared as u64);
            }
            worth.sent(bytes as u64, Duration::from_secs_f64(bytes / bytes_per_second));
            taken[way.unwrap_or(ways.len())] += 1;
        }
        taken
    }

    #[test]
    fn only_while_the_link_is_slower_than_compressing() {
        let lz4 = [(5.0, 0.5)];
        // Half a page in 5 µs: worth it below 2048 / 5e-6 = 410 MB/s.
        for (rate, compresses) in [(60e6, true), (380e6, true), (450e6, false), (4e9, false)] {
            let taken = play(&mut Worth::new(1), rate, &lz4);
            assert!(if compresses { taken[0] >= 3100 } else { taken[0] <= 110 }, "{rate}: {taken:?}");
        }
        // It is looked at again and again.
        let mut worth = Worth::new(1);
        let fast = play(&mut worth, 4e9, &lz4);
        let slow = play(&mut worth, 60e6, &lz4);
        let fast_again = play(&mut worth, 4e9, &lz4);
        assert!(fast[0] <= 110 && slow[0] >= 3000 && fast_again[0] <= 150, "{fast:?} {slow:?} {fast_again:?}");
    }

    #[test]
    fn what_does_not_shrink_is_left_alone() {
        let taken = play(&mut Worth::new(1), 60e6, &[(3.0, 1.0)]);
        assert!(taken[0] <= 110, "{taken:?}");
    }

    #[test]
    fn of_two_ways_the_one_that_spares_more_time() {
        let ways = [(5.0, 0.5), (20.0, 0.3)];
        // A page takes 80 µs: the thorough one spares 57 − 20, the fast one 41 − 5; at a third of the rate it is worth it.
        let fast = play(&mut Worth::new(2), 60e6, &ways);
        let slow = play(&mut Worth::new(2), 20e6, &ways);
        assert!(slow[1] > 3000 && slow[2] == 1, "{slow:?}");
        assert!(fast[0] + fast[1] > 3100, "{fast:?}");
        let faster = play(&mut Worth::new(2), 150e6, &ways);
        assert!(faster[0] > 3000, "{faster:?}");
    }
}

//! Owns what a memory workload is (its settings), which page it writes next, and how it keeps its rate.

use crate::page::Fill;
use crate::units;

/// Order in which pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Pattern {
    /// One after the other, round and round.
    Sequential = 0,
    /// Uniformly random.
    Random = 1,
    /// 90 % of the writes go to the first 10 % of the pages.
    HotCold = 2,
}

impl Pattern {
    /// Parses the name that the command line uses.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "seq" => Some(Self::Sequential),
            "random" => Some(Self::Random),
            "hotcold" => Some(Self::HotCold),
            _ => None,
        }
    }

    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "seq",
            Self::Random => "random",
            Self::HotCold => "hotcold",
        }
    }

    /// The inverse of `self as u8`; unknown values read as `Sequential`.
    pub fn from_u8(value: u8) -> Self {
        match value {
            1 => Self::Random,
            2 => Self::HotCold,
            _ => Self::Sequential,
        }
    }
}

/// Rate value that means "as fast as it goes".
pub const UNTHROTTLED: u64 = u64::MAX;

/// Settings of one vCPU's workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Working set.
    pub working_set_bytes: u64,
    /// Pages per second; 0 is stopped, [`UNTHROTTLED`] is no limit.
    pub rate_pages_per_second: u64,
    /// Order of the writes.
    pub pattern: Pattern,
    /// Share of a page that each write replaces.
    pub share_percent: u8,
    /// Look of the data.
    pub fill: Fill,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            working_set_bytes: 16 << 20,
            rate_pages_per_second: 0,
            pattern: Pattern::Sequential,
            share_percent: 100,
            fill: Fill::Random,
        }
    }
}

impl Spec {
    /// Changes one setting by name (`ws`, `rate`, `pattern`, `share`, `fill`); false when name or value is not understood.
    pub fn set(&mut self, name: &str, value: &str) -> bool {
        let understood = match name {
            "ws" => units::size_bytes(value).map(|bytes| self.working_set_bytes = bytes),
            "rate" if value == "max" => {
                self.rate_pages_per_second = UNTHROTTLED;
                Some(())
            }
            "rate" => value.parse().ok().map(|rate| self.rate_pages_per_second = rate),
            "pattern" => Pattern::parse(value).map(|pattern| self.pattern = pattern),
            "share" => value.parse().ok().filter(|share| *share <= 100).map(|share| self.share_percent = share),
            "fill" => Fill::parse(value).map(|fill| self.fill = fill),
            _ => None,
        };
        understood.is_some()
    }

    /// Applies a list `name:value,name:value`; false when any part is not understood (the others are still applied).
    pub fn set_list(&mut self, list: &str) -> bool {
        list.split(',').filter(|part| !part.is_empty()).fold(true, |good, part| {
            let done = part.split_once(':').is_some_and(|(name, value)| self.set(name, value));
            good && done
        })
    }
}

/// A small xorshift generator: enough for picking pages and blocks.
#[derive(Clone, Copy, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Starts from any seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 random bits.
    #[inline]
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit` (0 when `limit` is 0); `limit` must fit 32 bits.
    #[inline]
    pub fn below(&mut self, limit: u64) -> u64 {
        ((self.bits() >> 32) * limit) >> 32
    }
}

/// Picks the next page to write.
#[derive(Clone, Copy, Debug)]
pub struct Picker {
    pattern: Pattern,
    pages: u64,
    hot_pages: u64,
    position: u64,
    dice: Dice,
}

impl Picker {
    /// A picker over `pages` pages (at least one).
    pub fn new(pattern: Pattern, pages: u64, seed: u64) -> Self {
        let pages = pages.max(1);
        Self { pattern, pages, hot_pages: (pages / 10).max(1), position: 0, dice: Dice::new(seed) }
    }

    /// Index of the next page.
    #[inline]
    pub fn pick(&mut self) -> u64 {
        match self.pattern {
            Pattern::Sequential => {
                let page = self.position;
                self.position = if page + 1 == self.pages { 0 } else { page + 1 };
                page
            }
            Pattern::Random => self.dice.below(self.pages),
            Pattern::HotCold => {
                let cold_pages = self.pages - self.hot_pages;
                if cold_pages == 0 || self.dice.below(10) != 0 {
                    self.dice.below(self.hot_pages)
                } else {
                    self.hot_pages + self.dice.below(cold_pages)
                }
            }
        }
    }
}

/// Keeps a rate by the time stamp counter. What a pause of the machine made it miss is dropped, not caught up.
#[derive(Clone, Copy, Debug)]
pub struct Pacer {
    rate: u64,
    tsc_hz: u64,
    start: u64,
    done: u64,
    /// Pages that were due but dropped since the backlog had grown above 20 ms.
    pub dropped_pages: u64,
}

impl Pacer {
    /// Starts at time `now` (TSC).
    pub fn new(rate_pages_per_second: u64, tsc_hz: u64, now: u64) -> Self {
        Self { rate: rate_pages_per_second, tsc_hz, start: now, done: 0, dropped_pages: 0 }
    }

    /// Number of pages that should be written now; `u64::MAX` when there is no limit.
    pub fn due(&mut self, now: u64) -> u64 {
        if self.rate == UNTHROTTLED || self.rate == 0 {
            return self.rate;
        }
        let elapsed = u128::from(now.saturating_sub(self.start));
        let target = (elapsed * u128::from(self.rate) / u128::from(self.tsc_hz)) as u64;
        let backlog = target.saturating_sub(self.done);
        let limit = self.rate / 50 + 1;
        if backlog > limit {
            self.dropped_pages += backlog - limit;
            self.done = target - limit;
            return limit;
        }
        backlog
    }

    /// Counts pages as written.
    pub fn wrote(&mut self, pages: u64) {
        self.done += pages;
        // Start a new epoch now and then, so that the products above stay small.
        if self.done >= self.rate && self.rate != UNTHROTTLED {
            self.start += self.tsc_hz;
            self.done -= self.rate;
        }
    }

    /// Time (TSC) at which the next page is due.
    pub fn next_due(&self) -> u64 {
        if self.rate == 0 || self.rate == UNTHROTTLED {
            return u64::MAX;
        }
        let cycles = u128::from(self.done + 1) * u128::from(self.tsc_hz) / u128::from(self.rate);
        self.start + cycles as u64 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_parse_by_list_and_by_name() {
        let mut spec = Spec::default();
        assert!(spec.set_list("ws:64M,rate:50000,pattern:hotcold,share:10,fill:text"));
        assert_eq!(
            spec,
            Spec {
                working_set_bytes: 64 << 20,
                rate_pages_per_second: 50_000,
                pattern: Pattern::HotCold,
                share_percent: 10,
                fill: Fill::Text
            }
        );
        assert!(spec.set("rate", "max"));
        assert_eq!(spec.rate_pages_per_second, UNTHROTTLED);
        for (name, value) in
            [("share", "101"), ("rate", "fast"), ("pattern", "zigzag"), ("fill", "x"), ("ws", "-1"), ("no", "1")]
        {
            assert!(!spec.set(name, value), "{name}={value}");
        }
        assert!(!spec.set_list("rate:5,bad"));
        assert_eq!(spec.rate_pages_per_second, 5);
    }

    #[test]
    fn sequential_visits_every_page_in_turn() {
        let mut picker = Picker::new(Pattern::Sequential, 3, 1);
        let seen: Vec<u64> = (0..7).map(|_| picker.pick()).collect();
        assert_eq!(seen, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn random_stays_inside_and_reaches_all() {
        let mut picker = Picker::new(Pattern::Random, 64, 1);
        let mut seen = [false; 64];
        (0..4000).for_each(|_| seen[picker.pick() as usize] = true);
        assert!(seen.iter().all(|seen| *seen));
    }

    #[test]
    fn hotcold_puts_nine_of_ten_writes_on_a_tenth() {
        let mut picker = Picker::new(Pattern::HotCold, 1000, 1);
        let hot = (0..100_000).filter(|_| picker.pick() < 100).count();
        assert!((88_500..91_500).contains(&hot), "{hot}");
        let mut single = Picker::new(Pattern::HotCold, 1, 1);
        assert!((0..100).all(|_| single.pick() == 0));
    }

    #[test]
    fn pacer_keeps_the_rate_over_many_epochs() {
        let hz = 3_000_000_000;
        let mut pacer = Pacer::new(50_000, hz, 1_000);
        let (mut now, mut written) = (1_000u64, 0);
        while now < 1_000 + 10 * hz {
            now += hz / 1_000;
            let due = pacer.due(now);
            pacer.wrote(due);
            written += due;
        }
        assert!((499_900..=500_100).contains(&written), "{written}");
        assert_eq!(pacer.dropped_pages, 0);
    }

    #[test]
    fn pacer_keeps_odd_and_slow_rates() {
        for rate in [1, 3, 7, 999] {
            let hz = 2_000_003;
            let mut pacer = Pacer::new(rate, hz, 0);
            let (mut now, mut written) = (0, 0);
            while now < 10 * hz {
                now = pacer.next_due().max(now + 1);
                let due = pacer.due(now);
                pacer.wrote(due);
                written += due;
            }
            assert!(written.abs_diff(10 * rate) <= 1, "{rate}: {written}");
        }
    }

    #[test]
    fn a_pause_is_not_caught_up() {
        let hz = 1_000_000;
        let mut pacer = Pacer::new(1000, hz, 0);
        let due = pacer.due(5 * hz);
        assert_eq!(due, 21);
        pacer.wrote(due);
        assert_eq!(pacer.due(5 * hz), 0);
        assert_eq!(pacer.dropped_pages, 4979);
        assert_eq!(pacer.due(5 * hz + hz / 100), 10);
    }

    #[test]
    fn stopped_and_unthrottled_have_no_due_time() {
        assert_eq!(Pacer::new(0, 1000, 0).due(99), 0);
        assert_eq!(Pacer::new(UNTHROTTLED, 1000, 0).due(99), u64::MAX);
        assert_eq!(Pacer::new(0, 1000, 0).next_due(), u64::MAX);
    }
}

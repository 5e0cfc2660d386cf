//! What the guest says of its own writing: its `WINDOW` lines, what they come to, and what they must come to by the pattern.

use super::super::guest::WORKING_SET_MIB;
use super::super::measure::Samples;

/// Pages of the working set.
const PAGES: f64 = ((WORKING_SET_MIB << 20) / 4096) as f64;
/// Pages that any guest of one vCPU writes besides, and does not count: four of stacks and counters of its two tasks, its scheduler's, its timer's
/// and console's. What an armed second of a guest whose writer is stopped shows.
const OTHER_PAGES: f64 = 8.0;
const MIB: f64 = 1_048_576.0;

/// The order in which the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    /// One page after the other.
    Sequential,
    /// At random.
    Random,
    /// Nine writes of ten to a tenth of the pages.
    HotCold,
}

impl Pattern {
    /// Its name on the guest's command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sequential => "seq",
            Self::Random => "random",
            Self::HotCold => "hotcold",
        }
    }

    /// Different pages of the working set that so many writes are expected to hit.
    fn distinct(self, writes: f64) -> f64 {
        let random = |pages: f64, writes: f64| pages * (1.0 - (-writes / pages).exp());
        match self {
            Self::Sequential => writes.min(PAGES),
            Self::Random => random(PAGES, writes),
            Self::HotCold => random(PAGES * 0.1, writes * 0.9) + random(PAGES * 0.9, writes * 0.1),
        }
    }
}

/// One `WINDOW` line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Window {
    cycles: u64,
    written: u64,
    longest_gap_ns: u64,
    /// Nanoseconds since its begin, pages of the working set, pages of the writer's books.
    marks: Vec<(f64, f64, f64)>,
}

/// The windows in `bytes` of a console; not a line that is cut.
pub(super) fn windows(bytes: &[u8], tsc_hz: u64) -> Vec<Window> {
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let text = String::from_utf8_lossy(&bytes[..whole]);
    text.lines().filter_map(|line| window(line, tsc_hz)).collect()
}

fn window(line: &str, tsc_hz: u64) -> Option<Window> {
    let mut words = line.strip_prefix("WINDOW ")?.split(' ').filter_map(|word| word.split_once('='));
    let fields: Vec<(&str, u64)> =
        words.by_ref().filter_map(|(name, value)| Some((name, value.parse().ok()?))).collect();
    let field = |name: &str| fields.iter().find(|field| field.0 == name).map(|field| field.1);
    let cycles = field("end_tsc")?.checked_sub(field("start_tsc")?).filter(|&cycles| cycles > 0)?;
    let marks = fields.iter().filter_map(|&(name, distinct)| {
        let ms: u32 = name.strip_prefix("distinct_")?.strip_suffix("ms")?.parse().ok()?;
        Some((f64::from(ms) * 1e6, distinct as f64, field(&format!("books_{ms}ms"))? as f64))
    });
    let mut marks: Vec<_> = marks.collect();
    let length_ns = cycles as f64 * 1e9 / tsc_hz as f64;
    if marks.last().is_none_or(|mark| mark.0 < length_ns - 1.0) {
        marks.push((length_ns, field("distinct")? as f64, field("books")? as f64));
    }
    Some(Window { cycles, written: field("written")?, longest_gap_ns: field("longest_gap_ns")?, marks })
}

/// How the guest fared over some windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pace {
    /// All writes.
    pub(super) pages_per_second: f64,
    /// The median of the longest gaps, one a window.
    pub(super) gap_ms: f64,
}

impl Pace {
    /// The mean over the windows; none without any.
    pub(super) fn of(windows: &[Window], tsc_hz: u64) -> Option<Self> {
        let cycles: u64 = windows.iter().map(|window| window.cycles).sum();
        let written: u64 = windows.iter().map(|window| window.written).sum();
        Some(Self { pages_per_second: written as f64 * tsc_hz as f64 / cycles as f64, gap_ms: gap_ms(windows)? })
    }

    /// The window in the middle: where nothing is measured, one that the host held up says nothing of the guest.
    fn median(windows: &[Window], tsc_hz: u64) -> Option<Self> {
        let mut paces = Samples::default();
        for window in windows {
            paces.push(window.written as f64 * tsc_hz as f64 / window.cycles as f64);
        }
        Some(Self { pages_per_second: paces.median()?, gap_ms: gap_ms(windows)? })
    }

    /// How much slower than `control`, in percent of it.
    pub(super) fn slowdown(&self, control: &Self) -> f64 {
        (1.0 - self.pages_per_second / control.pages_per_second) * 100.0
    }
}

fn gap_ms(windows: &[Window]) -> Option<f64> {
    let mut gaps = Samples::default();
    for window in windows {
        gaps.push(window.longest_gap_ns as f64 / 1e6);
    }
    gaps.median()
}

/// U(t) of a guest that is left alone.
#[derive(Clone, Debug)]
pub(super) struct Truth {
    pattern: Pattern,
    /// How it fared.
    pub(super) pace: Pace,
    /// Pages per second of its slowest and its fastest window.
    range: (f64, f64),
    /// The marks of all windows, averaged.
    marks: Vec<(f64, f64, f64)>,
}

impl Truth {
    /// From the windows of a control run; none without any.
    pub(super) fn of(pattern: Pattern, windows: &[Window], tsc_hz: u64) -> Option<Self> {
        let pace = Pace::median(windows, tsc_hz)?;
        let mean = |index: usize| {
            let of: Vec<&(f64, f64, f64)> = windows.iter().filter_map(|window| window.marks.get(index)).collect();
            let sum =
                |part: fn(&(f64, f64, f64)) -> f64| of.iter().map(|mark| part(mark)).sum::<f64>() / of.len() as f64;
            (sum(|mark| mark.0), sum(|mark| mark.1), sum(|mark| mark.2))
        };
        let marks = (0..windows.first()?.marks.len()).map(mean).collect();
        let paces = windows.iter().map(|window| window.written as f64 * tsc_hz as f64 / window.cycles as f64);
        let range = paces.fold((f64::INFINITY, 0.0), |(least, most), pace| (pace.min(least), pace.max(most)));
        Some(Self { pattern, pace, range, marks })
    }

    /// The same guest at the pace that it had while it was measured.
    pub(super) fn at_pace(&self, pace: Pace) -> Self {
        Self { pace, ..self.clone() }
    }

    /// The same as [`Self::pages`] at the paces of its slowest and its fastest window: what is true of an unthrottled guest is known no better.
    pub(super) fn range(&self, ns: f64) -> (f64, f64) {
        let at = |pages_per_second| self.at_pace(Pace { pages_per_second, ..self.pace }).pages(ns);
        (at(self.range.0), at(self.range.1))
    }

    /// Different pages in `ns`, of all that the VM writes: by the pattern and the pace that it had, and with the books and the other pages.
    pub(super) fn pages(&self, ns: f64) -> f64 {
        self.pattern.distinct(self.pace.pages_per_second * ns / 1e9) + self.books(ns) + OTHER_PAGES
    }

    /// The same as MiB/s.
    pub(super) fn mib_per_second(&self, ns: f64) -> f64 {
        mib_per_second(self.pages(ns), ns)
    }

    /// How far the marks, as the guest counted, lie from the pattern's prediction at most, in percent.
    pub(super) fn model_error(&self) -> f64 {
        let off = self.marks.iter().map(|&(ns, distinct, books)| {
            let counted = distinct + books + OTHER_PAGES;
            (counted / self.pages(ns) - 1.0).abs() * 100.0
        });
        off.fold(0.0, f64::max)
    }

    /// The guest's count at the last mark, as MiB/s.
    pub(super) fn counted_mib_per_second(&self) -> f64 {
        self.marks.last().map_or(f64::NAN, |&(ns, distinct, books)| mib_per_second(distinct + books + OTHER_PAGES, ns))
    }

    /// Between marks on a straight line.
    fn books(&self, ns: f64) -> f64 {
        let mut before = (0.0, 0.0);
        for &(at, _, books) in &self.marks {
            if ns <= at {
                return before.1 + (books - before.1) * (ns - before.0) / (at - before.0);
            }
            before = (at, books);
        }
        before.1
    }
}

/// Pages in so many nanoseconds as MiB/s.
pub(super) fn mib_per_second(pages: f64, ns: f64) -> f64 {
    pages * 4096.0 / MIB * 1e9 / ns
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "WINDOW cpu=0 start_tsc=1000 end_tsc=2000 distinct=900 books=9 written=1000 dropped=0 longest_gap_ns=2000000 \
                        distinct_5ms=10 books_5ms=3 distinct_20ms=20 books_20ms=3\n";

    #[test]
    fn lines_are_read_and_a_cut_one_is_left_out() {
        let text = format!("READY x=1\n{LINE}HB 1 2\n{}", LINE.trim_end());
        let found = windows(text.as_bytes(), 1000);
        let marks = vec![(5e6, 10.0, 3.0), (20e6, 20.0, 3.0), (1e9, 900.0, 9.0)];
        assert_eq!(found, [Window { cycles: 1000, written: 1000, longest_gap_ns: 2_000_000, marks }]);
        assert_eq!(windows(LINE.replace("end_tsc=2000", "end_tsc=5").as_bytes(), 1000), []);
        // A mark at the window's end is the window.
        let same = windows(LINE.replace("end_tsc=2000", "end_tsc=1020").as_bytes(), 1000);
        assert_eq!(same[0].marks.len(), 2);
    }

    #[test]
    fn truth_is_the_patterns_at_the_pace_that_the_guest_had() {
        let found = windows(LINE.repeat(3).as_bytes(), 1000);
        let truth = Truth::of(Pattern::Sequential, &found, 1000).unwrap();
        assert_eq!(truth.pace, Pace { pages_per_second: 1000.0, gap_ms: 2.0 });
        // 500 pages, books between 3 at 20 ms and 9 at 1 s, and the others.
        assert!((truth.pages(510e6) - (510.0 + 6.0 + OTHER_PAGES)).abs() < 1e-9);
        assert_eq!(truth.range(510e6), (truth.pages(510e6), truth.pages(510e6)));
        // At 5 ms the guest counted 10 + 3 + 8 where 5 + 3 + 8 are predicted.
        assert!((truth.model_error() - 31.25).abs() < 1e-9, "{}", truth.model_error());
        let slower = Pace { pages_per_second: 750.0, gap_ms: 0.0 };
        assert!((slower.slowdown(&truth.pace) - 25.0).abs() < 1e-9);
    }

    #[test]
    fn patterns_end_at_the_working_set() {
        for pattern in [Pattern::Sequential, Pattern::Random, Pattern::HotCold] {
            assert!((pattern.distinct(1e9) - PAGES).abs() < 1.0, "{pattern:?}");
            assert!((pattern.distinct(1.0) - 1.0).abs() < 1e-3, "{pattern:?}");
        }
        assert!(
            (Pattern::HotCold.distinct(PAGES) - PAGES * (0.1 + 0.9 * (1.0 - (-1.0f64 / 9.0).exp()))).abs()
                < PAGES * 1e-4
        );
    }
}

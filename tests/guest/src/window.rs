//! Owns the guest's own truth of its writing: how many different pages the writer wrote, window after window, and how many of them in the
//! window's first milliseconds. Pure: it is told of each write and each look at the clock, and keeps one bit a page in memory that it is
//! given.

use core::fmt::Write;

use crate::ledger::gap_cycles;
use crate::page::PAGE_BYTES;
use crate::units::{cycles_to_ns, ns_to_cycles};
use crate::workload::Dice;

/// Moments of a window at which the pages so far are noted, in milliseconds; those before its end count.
pub const MARKS_MS: [u64; 6] = [5, 20, 80, 320, 1000, 1280];
/// Writer's pages whose entries of the sequence table share a page.
const ENTRIES_PER_PAGE: usize = PAGE_BYTES / 4;
/// Time between the end of a window and the begin of the next, at least: the last one is told and forgotten meanwhile.
const PAUSE_NS: u64 = 20_000_000;
/// What is added at random to that, at most, so that windows do not fall in step with batches of writes.
const JITTER_NS: u64 = 16_000_000;

/// Pages that were written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Different pages of the working set.
    pub distinct: u64,
    /// Different pages of the writer's own books: sequence table and window bits.
    pub books: u64,
}

/// One window. Times are of the time stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// When it began.
    pub start: u64,
    /// When it ended.
    pub end: u64,
    /// Different pages written in it.
    pub unique: Written,
    /// Writes in it: a page that was written twice counts twice.
    pub writes: u64,
    /// Pages that were due in it and dropped after a pause (`Pacer::dropped_pages`).
    pub dropped: u64,
    /// The longest time for which the writer wanted to run in it and was not seen running, in cycles.
    pub longest_gap: u64,
    /// Different pages at each mark.
    pub marks: [Option<Written>; MARKS_MS.len()],
}

/// The windows of one writer.
#[derive(Debug)]
pub struct Windows<'a> {
    bits: &'a mut [u64],
    length: u64,
    marks: [u64; MARKS_MS.len()],
    pause: u64,
    jitter: u64,
    dice: Dice,
    now: Report,
    next_mark: usize,
    last_seen: u64,
    dropped_before: u64,
}

impl<'a> Windows<'a> {
    /// Words of bits that `pages` pages need.
    pub const fn words(pages: u64) -> usize {
        pages.div_ceil(64) as usize
    }

    /// Windows of `length_ns`; the first begins soon after `now`. `bits` has a bit for each page.
    pub fn new(bits: &'a mut [u64], length_ns: u64, tsc_hz: u64, now: u64) -> Self {
        let mut windows = Self {
            bits,
            length: ns_to_cycles(length_ns, tsc_hz).max(1),
            marks: MARKS_MS.map(|ms| ns_to_cycles(ms * 1_000_000, tsc_hz)),
            pause: ns_to_cycles(PAUSE_NS, tsc_hz),
            jitter: ns_to_cycles(JITTER_NS, tsc_hz),
            dice: Dice::new(now),
            now: Report::default(),
            next_mark: 0,
            last_seen: 0,
            dropped_before: 0,
        };
        windows.restart(now, 0);
        windows
    }

    /// Forgets the window under way; the next begins after a pause from `now` on. `dropped` as for [`Windows::look`].
    pub fn restart(&mut self, now: u64, dropped: u64) {
        self.bits.fill(0);
        let start = now + self.pause + self.dice.below(self.jitter.min(u64::from(u32::MAX)));
        self.now = Report { start, end: start + self.length, ..Report::default() };
        self.next_mark = 0;
        self.last_seen = 0;
        self.dropped_before = dropped;
    }

    /// Looks at the clock before a batch of writes. `planned` is the end of a sleep before this look, else 0; `dropped` is the pacer's
    /// count. Returns the window that is over; then [`Windows::restart`] is next. A write counts at the last look before it.
    pub fn look(&mut self, now: u64, planned: u64, dropped: u64) -> Option<Report> {
        if now < self.now.start {
            self.dropped_before = dropped;
            return None;
        }
        let gap = gap_cycles(self.last_seen, planned, now);
        self.now.longest_gap = self.now.longest_gap.max(gap);
        self.last_seen = now;
        let elapsed = now - self.now.start;
        while let Some(&mark) = self.marks.get(self.next_mark)
            && mark <= elapsed
        {
            if mark <= self.length {
                self.now.marks[self.next_mark] = Some(self.unique());
            }
            self.next_mark += 1;
        }
        if now < self.now.end {
            return None;
        }
        self.now.unique = self.unique();
        self.now.dropped = dropped - self.dropped_before;
        Some(self.now)
    }

    /// Counts a write of page `index`, after the look that it belongs to.
    #[inline]
    pub fn wrote(&mut self, index: u64) {
        // Zero until the first look within the window.
        if self.last_seen == 0 {
            return;
        }
        self.now.writes += 1;
        if let Some(word) = self.bits.get_mut(index as usize / 64) {
            let bit = 1 << (index % 64);
            self.now.unique.distinct += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// The pages so far.
    fn unique(&self) -> Written {
        let table = self.bits.chunks(ENTRIES_PER_PAGE / 64).filter(|words| words.iter().any(|word| *word != 0)).count();
        let bits = (self.bits.len() * 8).div_ceil(PAGE_BYTES);
        let idle = self.now.unique.distinct == 0;
        Written { books: if idle { 0 } else { (table + bits) as u64 }, ..self.now.unique }
    }
}

impl Report {
    /// Writes the `WINDOW` line.
    pub fn line(&self, out: &mut impl Write, cpu: usize, tsc_hz: u64) {
        let _ = write!(
            out,
            "WINDOW cpu={cpu} start_tsc={} end_tsc={} distinct={} books={} written={} dropped={} longest_gap_ns={}",
            self.start,
            self.end,
            self.unique.distinct,
            self.unique.books,
            self.writes,
            self.dropped,
            cycles_to_ns(self.longest_gap, tsc_hz)
        );
        for (ms, mark) in MARKS_MS.iter().zip(&self.marks) {
            if let Some(Written { distinct, books }) = mark {
                let _ = write!(out, " distinct_{ms}ms={distinct} books_{ms}ms={books}");
            }
        }
        let _ = out.write_str("\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A counter of 1 MHz.
    const HZ: u64 = 1_000_000;

    /// Looks at `at` and then writes `pages`.
    fn step(windows: &mut Windows, at: u64, pages: impl IntoIterator<Item = u64>) -> Option<Report> {
        let over = windows.look(at, 0, 0);
        if over.is_none() {
            pages.into_iter().for_each(|page| windows.wrote(page));
        }
        over
    }

    #[test]
    fn pages_count_once_and_at_the_marks_before_which_they_were_written() {
        let mut bits = [0; Windows::words(4096)];
        let mut windows = Windows::new(&mut bits, 100_000_000, HZ, 0);
        // Before the window nothing counts.
        let start = windows.now.start;
        assert_eq!(step(&mut windows, start - 1, 0..9), None);
        step(&mut windows, start, [0, 1, 0, 1100]);
        // Exactly at 5 ms: what follows is written after it.
        step(&mut windows, start + 5_000, [2, 1]);
        step(&mut windows, start + 90_000, [4095]);
        let over = step(&mut windows, start + 100_000, []).unwrap();
        assert_eq!((over.start, over.end, over.writes), (start, start + 100_000, 7));
        assert_eq!(over.unique, Written { distinct: 5, books: 3 + 1 });
        let at = |distinct, books| Some(Written { distinct, books });
        assert_eq!(over.marks, [at(3, 3), at(4, 3), at(4, 3), None, None, None]);
        assert_eq!(over.longest_gap, 85_000);

        windows.restart(start + 100_000, 0);
        let start = windows.now.start;
        step(&mut windows, start, [1]);
        assert_eq!(step(&mut windows, start + 100_000, []).unwrap().unique.distinct, 1, "it begins with none");
    }

    #[test]
    fn a_window_without_writes_has_no_pages_of_its_own_either() {
        let mut bits = [0; 1];
        let mut windows = Windows::new(&mut bits, 1_000_000_000, HZ, 0);
        let start = windows.now.start;
        step(&mut windows, start, []);
        let over = step(&mut windows, start + 1_290_000, []).unwrap();
        assert_eq!(over.unique, Written::default());
        assert_eq!(over.marks[4], Some(Written::default()), "a mark at the very end counts");
        assert_eq!(over.marks[5], None, "and one behind it does not, though it was looked at later");
    }

    #[test]
    fn gaps_and_dropped_pages_are_those_of_the_window() {
        let mut bits = [0; 1];
        let mut windows = Windows::new(&mut bits, 50_000_000, HZ, 0);
        let start = windows.now.start;
        windows.look(start - 5, 0, 40);
        windows.look(start, 0, 40);
        // A sleep that was planned is no gap, its lateness is.
        windows.look(start + 20_000, start + 19_000, 40);
        let over = windows.look(start + 50_000, start + 49_900, 45).unwrap();
        assert_eq!((over.longest_gap, over.dropped), (1_000, 5));
    }

    #[test]
    fn begins_are_spread() {
        let mut bits = [0; 1];
        let mut windows = Windows::new(&mut bits, 1_000_000_000, HZ, 7);
        let mut pauses = std::collections::BTreeSet::new();
        for turn in 1..50 {
            let now = turn * 1_100_000;
            windows.restart(now, 0);
            let pause = windows.now.start - now;
            assert!((20_000..36_000).contains(&pause), "{pause}");
            pauses.insert(pause / 1_000);
        }
        assert!(pauses.len() > 8, "{pauses:?}");
    }

    #[test]
    fn the_longest_line_fits_the_console() {
        let most = Written { distinct: 4 << 20, books: 1 << 13 };
        let report = Report {
            start: u64::MAX,
            end: u64::MAX,
            unique: most,
            writes: 1 << 40,
            dropped: 1 << 40,
            longest_gap: 1 << 40,
            marks: [Some(most); MARKS_MS.len()],
        };
        let mut line = crate::text::Buffer::<512>::new();
        report.line(&mut line, 15, 3_000_000_000);
        let text = std::str::from_utf8(line.as_bytes()).unwrap();
        assert!(!line.truncated && text.ends_with("distinct_1280ms=4194304 books_1280ms=8192\n"), "{text}");
    }
}

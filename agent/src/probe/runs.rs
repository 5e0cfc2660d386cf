//! The runs under way of a thread (see [`dunlin_ebpf::Thread`]), added to what their maps have: each page once, while the program goes on
//! counting.
//!
//! Owns how a record is read that is written meanwhile. Must not know where the maps are.
//!
//! What is promised of the sums of one sample: each holds at some moment of that sample; none is smaller than in the sample before, but
//! for an entry that the kernel has dropped; a run that could not be read comes with the next sample. Two sums of one thread may be of
//! different moments.

use dunlin_ebpf::{CodeKey, CodeRun, SpaceCounters, SpaceKey, SpaceRun, ThreadKey};

/// How often a record that changes under the reader's eyes is read again. A vCPU whose every event ends a run is not to be had between
/// two of them; then its sums are those of the map.
const TRIES: usize = 16;

/// A kind of run.
pub(super) trait Run: Copy {
    /// Of the map that ended runs are put into.
    type Key: Copy + Eq;
    /// What that map has of a key.
    type Sum: Copy;

    /// Whose run it is.
    fn key(&self, thread: ThreadKey) -> Self::Key;

    /// See [`SpaceRun::changes`].
    fn changes(&self) -> u64;

    /// The sum with this run in it; none if there is neither.
    fn added_to(&self, sum: Option<Self::Sum>) -> Option<Self::Sum>;
}

impl Run for SpaceRun {
    type Key = SpaceKey;
    type Sum = SpaceCounters;

    fn key(&self, ThreadKey { tgid, tid }: ThreadKey) -> SpaceKey {
        SpaceKey { tgid, tid, root: self.root }
    }

    fn changes(&self) -> u64 {
        self.changes
    }

    fn added_to(&self, sum: Option<SpaceCounters>) -> Option<SpaceCounters> {
        if self.pages_made_writable == 0 {
            return sum;
        }
        let mut sum = sum.unwrap_or(SpaceCounters::NONE);
        sum.pages_made_writable += self.pages_made_writable;
        if let Some(bin) = sum.first_writes.get_mut(self.bin as usize) {
            *bin = bin.wrapping_add(self.first_writes);
        }
        Some(sum)
    }
}

impl Run for CodeRun {
    type Key = CodeKey;
    type Sum = u64;

    fn key(&self, ThreadKey { tgid, tid }: ThreadKey) -> CodeKey {
        CodeKey { tgid, tid, root: self.root, instruction: self.instruction }
    }

    fn changes(&self) -> u64 {
        self.changes
    }

    fn added_to(&self, sum: Option<u64>) -> Option<u64> {
        if self.pages == 0 { sum } else { Some(sum.unwrap_or(0) + self.pages) }
    }
}

/// The sums that a thread's run makes different from what a walk over the map has told.
///
/// `before` is the record as it was before that walk: its run may have ended since, and its entry may have been walked over before that.
/// A record that was read while it changed tells a key of which nothing is counted, or one whose entry the walk saw whole: the program
/// writes the entry first.
pub(super) fn settle<R: Run>(
    thread: ThreadKey,
    before: R,
    mut record: impl FnMut() -> Option<R>,
    mut sum: impl FnMut(R::Key) -> Option<R::Sum>,
) -> Vec<(R::Key, R::Sum)> {
    let old = before.key(thread);
    let mut ended = None;
    for attempt in 0..TRIES {
        if attempt > 0 {
            // The program may have been interrupted in the middle of a change, by this very thread.
            std::thread::yield_now();
        }
        // Three readings with one and the same even number: the second was whole, and no run ended from the first to the third.
        let Some(first) = record() else { return Vec::new() };
        let Some(now) = record() else { return Vec::new() };
        let (key, old_sum) = (now.key(thread), sum(old));
        let key_sum = if key == old { old_sum } else { sum(key) };
        let Some(last) = record() else { return Vec::new() };
        if first.changes() % 2 == 0 && first.changes() == now.changes() && now.changes() == last.changes() {
            let current = now.added_to(key_sum).map(|sum| (key, sum));
            let old = old_sum.filter(|_| key != old).map(|sum| (old, sum));
            return old.into_iter().chain(current).collect();
        }
        if first.changes() >= before.changes() + 2 {
            ended = old_sum.map(|sum| (old, sum));
        }
    }
    ended.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const THREAD: ThreadKey = ThreadKey { tgid: 1, tid: 2 };

    /// The program, one write to memory at a time.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Change,
        PutIntoMap,
        Root(u64),
        Instruction(u64),
        Clear,
        Count(u64),
    }

    #[derive(Default)]
    struct Program {
        run: CodeRun,
        map: BTreeMap<(u64, u64), u64>,
        truth: BTreeMap<(u64, u64), u64>,
        steps: std::collections::VecDeque<Step>,
        /// How many steps happen before each reading of a word.
        pace: Vec<u8>,
        readings: usize,
    }

    impl Program {
        fn new(events: &[(u64, u64)], pace: Vec<u8>) -> Self {
            let mut steps = std::collections::VecDeque::new();
            let mut at = (0, 0);
            for &place in events {
                if place != at {
                    let change = [
                        Step::Change,
                        Step::PutIntoMap,
                        Step::Root(place.0),
                        Step::Instruction(place.1),
                        Step::Clear,
                        Step::Change,
                    ];
                    steps.extend(change);
                    at = place;
                }
                steps.push_back(Step::Count(1));
            }
            Self { steps, pace, ..Self::default() }
        }

        fn step(&mut self) {
            let at = (self.run.root, self.run.instruction);
            match self.steps.pop_front() {
                Some(Step::Change) => self.run.changes += 1,
                Some(Step::PutIntoMap) if self.run.pages > 0 => *self.map.entry(at).or_default() += self.run.pages,
                Some(Step::Root(root)) => self.run.root = root,
                Some(Step::Instruction(instruction)) => self.run.instruction = instruction,
                Some(Step::Clear) => self.run.pages = 0,
                Some(Step::Count(pages)) => {
                    self.run.pages += pages;
                    *self.truth.entry(at).or_default() += pages;
                }
                Some(Step::PutIntoMap) | None => {}
            }
        }

        fn pause(&mut self) {
            let steps = self.pace.get(self.readings % self.pace.len().max(1)).copied().unwrap_or(0);
            self.readings += 1;
            for _ in 0..steps {
                self.step();
            }
        }

        /// Word by word, in an order that changes.
        fn record(&mut self) -> CodeRun {
            let mut read = CodeRun::default();
            let from = self.readings;
            for word in 0..4 {
                self.pause();
                match (from + word) % 4 {
                    0 => read.root = self.run.root,
                    1 => read.instruction = self.run.instruction,
                    2 => read.pages = self.run.pages,
                    _ => read.changes = self.run.changes,
                }
            }
            read
        }

        fn sum(&mut self, key: CodeKey) -> Option<u64> {
            self.pause();
            self.map.get(&(key.root, key.instruction)).copied()
        }
    }

    fn sample(program: &RefCell<Program>, places: &[(u64, u64)]) -> BTreeMap<(u64, u64), u64> {
        let before = program.borrow_mut().record();
        let mut sums = BTreeMap::new();
        for &(root, instruction) in places {
            let key = CodeKey { tgid: 1, tid: 2, root, instruction };
            if let Some(sum) = program.borrow_mut().sum(key) {
                sums.insert((root, instruction), sum);
            }
        }
        let settled =
            settle(THREAD, before, || Some(program.borrow_mut().record()), |key| program.borrow_mut().sum(key));
        sums.extend(settled.into_iter().map(|(key, sum)| ((key.root, key.instruction), sum)));
        sums
    }

    proptest! {
        #[test]
        fn no_page_is_counted_twice_and_none_is_taken_back(
            events in prop::collection::vec((1u64..3, 1u64..4, 1usize..12), 1..60),
            // A change is over before the reader gives up: so slow is no program.
            pace in prop::collection::vec(prop_oneof![4 => Just(0u8), 1 => 0..7u8], 1..32),
        ) {
            let events: Vec<(u64, u64)> =
                events.into_iter().flat_map(|(root, code, times)| std::iter::repeat_n((root, code), times)).collect();
            let places: Vec<(u64, u64)> = (1..3).flat_map(|root| (1..4).map(move |code| (root, code))).collect();
            let program = RefCell::new(Program::new(&events, pace));
            let mut last = BTreeMap::new();
            for _ in 0..20 {
                let sums = sample(&program, &places);
                for (place, &sum) in &sums {
                    let truth = program.borrow().truth.get(place).copied().unwrap_or(0);
                    prop_assert!(sum <= truth, "{place:?}: {sum} of {truth}");
                }
                for (place, &sum) in &last {
                    let now = sums.get(place).copied().unwrap_or(0);
                    prop_assert!(now >= sum, "{place:?}: {sum}, then {now}");
                }
                last = sums;
            }
            while !program.borrow().steps.is_empty() {
                program.borrow_mut().step();
            }
            prop_assert_eq!(sample(&program, &places), program.borrow().truth.clone());
        }
    }
}

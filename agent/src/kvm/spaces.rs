//! Which address space of one vCPU wrote what, and what each may write.
//!
//! Owns the division of a vCPU's limit among its address spaces. Statistical: pages are known by vCPU, and the space by looks at what is loaded; pages that came
//! between two looks at different spaces are put down to both, by what each wrote from look to look while it stayed. Must not know how a vCPU is looked at or held.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::model::bucket::Bucket;
use crate::model::{AddressSpace, PagesPerSecond, max_min};

/// How often the limit is divided anew.
const DIVIDE_EVERY: Duration = Duration::from_millis(100);
/// A space that was not loaded for this long is not there any more.
const FORGET_AFTER: Duration = Duration::from_secs(5);
/// Spaces that were loaded within this time are on the vCPU together.
const TOGETHER: Duration = Duration::from_millis(100);
/// The most spaces that are told apart; when more come, the one that was loaded longest ago is forgotten.
const MOST: usize = 256;

/// One address space.
#[derive(Clone, Debug)]
struct Space {
    /// While it may not write as it likes.
    bucket: Option<Bucket>,
    /// Written since the limit was divided last.
    pages: f64,
    /// It owed something since then.
    owed: bool,
    seen: Duration,
    /// Pages from one look to the next while it stayed loaded; none: it never did.
    steady: Option<f64>,
}

/// The address spaces of one vCPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Spaces {
    loaded: Option<AddressSpace>,
    /// Written since the last look.
    pending: f64,
    known: BTreeMap<AddressSpace, Space>,
    divided: Duration,
}

/// What a look at a vCPU says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owed {
    /// How long the space that is loaded must not write.
    pub(super) debt: Duration,
    /// Whether others are on the vCPU too, and wait for it to be switched.
    pub(super) has_others: bool,
    /// Whether one that is not loaded owes something.
    pub(super) other_owes: bool,
}

impl Spaces {
    /// The vCPU wrote so many pages.
    pub(super) fn charge(&mut self, pages: f64) {
        self.pending += pages;
    }

    /// The vCPU was looked at: `space` is loaded. `limit` is what it may write in all.
    pub(super) fn look(&mut self, space: AddressSpace, limit: PagesPerSecond, now: Duration) -> Owed {
        let pages = std::mem::take(&mut self.pending);
        match self.loaded.replace(space) {
            Some(before) if before != space => {
                let part = self.part_of_first(before, space);
                self.put_down(before, pages * part, now, false);
                self.put_down(space, pages * (1.0 - part), now, true);
            }
            _ => {
                self.put_down(space, pages, now, true);
                if let Some(known) = self.known.get_mut(&space) {
                    known.steady = Some(known.steady.map_or(pages, |before| 0.9 * before + 0.1 * pages));
                }
            }
        }
        if now.saturating_sub(self.divided) >= DIVIDE_EVERY {
            self.divide(limit, now);
        }
        let others =
            || self.known.iter().filter(|&(&other, of)| other != space && now.saturating_sub(of.seen) < TOGETHER);
        let has_others = others().next().is_some();
        let other_owes = others().any(|(_, of)| of.bucket.is_some_and(|bucket| !bucket.debt(now).is_zero()));
        let Some(loaded) = self.known.get_mut(&space) else {
            return Owed { debt: Duration::ZERO, has_others, other_owes };
        };
        let debt = loaded.bucket.map_or(Duration::ZERO, |bucket| bucket.debt(now));
        loaded.owed |= !debt.is_zero();
        Owed { debt, has_others, other_owes }
    }

    /// Of pages that either of two spaces wrote, the first one's part.
    fn part_of_first(&self, first: AddressSpace, second: AddressSpace) -> f64 {
        let steady = |space| self.known.get(&space).and_then(|known| known.steady);
        match (steady(first), steady(second)) {
            (Some(one), Some(other)) if one + other > 0.0 => one / (one + other),
            // One that never stays from look to look hardly runs.
            (Some(one), None) if one > 0.0 => 1.0,
            (None, Some(other)) if other > 0.0 => 0.0,
            _ => 0.5,
        }
    }

    fn put_down(&mut self, space: AddressSpace, pages: f64, now: Duration, is_loaded: bool) {
        if self.known.len() >= MOST && !self.known.contains_key(&space) {
            let oldest = self.known.iter().min_by_key(|(_, space)| space.seen).map(|(&space, _)| space);
            oldest.map(|oldest| self.known.remove(&oldest));
        }
        let of =
            self.known.entry(space).or_insert(Space { bucket: None, pages: 0.0, owed: false, seen: now, steady: None });
        of.pages += pages;
        if is_loaded {
            of.seen = now;
        }
        if let Some(bucket) = &mut of.bucket {
            bucket.charge(pages, now);
        }
    }

    /// Divides the limit max-min fairly, by what each wrote since it was divided last; one that owed wants as much as there is.
    fn divide(&mut self, limit: PagesPerSecond, now: Duration) {
        let span = now.saturating_sub(self.divided).as_secs_f64();
        let first = self.divided.is_zero();
        self.divided = now;
        self.known.retain(|_, space| now.saturating_sub(space.seen) < FORGET_AFTER);
        if first {
            // Nobody knows since when they have written; a limit holds from the first look on all the same.
            for space in self.known.values_mut() {
                space.bucket = Some(Bucket::new(limit, now));
                space.pages = 0.0;
            }
            return;
        }
        let wanted: Vec<f64> = self
            .known
            .values()
            .map(|space| if space.owed { limit.0 + space.pages / span } else { space.pages / span })
            .collect();
        let line = max_min(&wanted, limit.0).line;
        for (space, wanted) in self.known.values_mut().zip(wanted) {
            match (line.filter(|&line| wanted > line), &mut space.bucket) {
                (Some(line), Some(bucket)) => bucket.set_rate(PagesPerSecond(line), now),
                (Some(line), empty) => *empty = Some(Bucket::new(PagesPerSecond(line), now)),
                (None, bucket) => *bucket = None,
            }
            space.pages = 0.0;
            space.owed = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROGUE: AddressSpace = AddressSpace(0x1000);
    const OTHER: AddressSpace = AddressSpace(0x2000);
    const LIMIT: PagesPerSecond = PagesPerSecond(5000.0);

    /// Slices of 4 ms in turn; whoever owes is held for the rest of its slice. Returns what each wrote in a second, and for how many milliseconds each ran.
    fn run(rogue_per_ms: f64, other_per_ms: f64) -> ([f64; 2], [u64; 2]) {
        let mut spaces = Spaces::default();
        let (mut written, mut ran) = ([0.0; 2], [0u64; 2]);
        for ms in 1..=3000u64 {
            let who = usize::from(ms / 4 % 2 == 1);
            let now = Duration::from_secs(7) + Duration::from_millis(ms);
            let owed = spaces.look([ROGUE, OTHER][who], LIMIT, now);
            if !owed.debt.is_zero() {
                continue;
            }
            let pages = [rogue_per_ms, other_per_ms][who];
            spaces.charge(pages);
            if ms > 2000 {
                written[who] += pages;
                ran[who] += 1;
            }
        }
        (written, ran)
    }

    #[test]
    fn who_writes_too_much_is_held_and_who_shares_its_vcpu_is_not() {
        let (written, ran) = run(100.0, 1.0);
        // 500 pages a second are the other's.
        assert!((written[0] / 4500.0 - 1.0).abs() < 0.1, "{written:?}");
        assert!(ran[1] >= 490, "{ran:?}");
        // Two that write alike share alike.
        let (written, _) = run(100.0, 100.0);
        assert!((written[0] / 2500.0 - 1.0).abs() < 0.1 && (written[1] / 2500.0 - 1.0).abs() < 0.1, "{written:?}");
        // Both within the limit: nobody is held.
        assert_eq!(run(4.0, 4.0).1, [500, 500]);
    }

    #[test]
    fn however_many_spaces_come_few_are_kept() {
        let mut spaces = Spaces::default();
        for root in 0..10_000u64 {
            spaces.charge(1.0);
            spaces.look(AddressSpace(root << 12), LIMIT, Duration::from_micros(1_000_000 + root));
        }
        assert!(spaces.known.len() <= MOST);
    }
}

//! A bandwidth limit that begins low and follows what the VM dirties, so that a migration takes of the link what it needs and no more.
//!
//! After Clark et al., "Live Migration of Virtual Machines", NSDI 2005, section 5.2 ("dynamic rate-limiting"): the first round goes at an administrator's minimum, each next one at what
//! the last one dirtied per second and a constant more (50 Mbit/s), up to the maximum. Here what is added is in proportion, so that rounds shrink alike on any link.

use std::time::Duration;

use super::pacer::Pace;
use crate::model::{BytesPerSecond, PageCount};

/// By so much a round may be faster than the VM dirties: rounds shrink to 1/(1 + this) each.
const MARGIN: f64 = 0.5;
/// A round that leaves more than this part of what the one before left was too slow: the next one has the whole limit.
const NO_GAIN: f64 = 0.9;
/// A round that came this close to its limit was held back by nothing else.
pub const KEPT_TO: f64 = 0.8;

/// The limit of one migration, from `least` to `most`.
#[derive(Clone, Copy, Debug)]
pub struct Adaptive {
    least: BytesPerSecond,
    most: BytesPerSecond,
    /// What was set last; what is another is an operator's, and stays.
    set: BytesPerSecond,
    /// What the last round left.
    left: Option<PageCount>,
}

impl Adaptive {
    /// A limit that stands at `least`.
    pub const fn new(least: BytesPerSecond, most: BytesPerSecond) -> Self {
        Self { least, most, set: least, left: None }
    }

    /// A round that took so long has left `dirtied` pages; `carried` is its goodput, if it was long enough to say. What they may be expected to go at while the VM stands: that is what pre-copy is judged by.
    pub fn follow(
        &mut self,
        dirtied: PageCount,
        took: Duration,
        carried: Option<BytesPerSecond>,
        pace: &Pace,
    ) -> BytesPerSecond {
        let held_to = self.set;
        let gained = self.left.is_none_or(|before| (dirtied.0 as f64) < before.0 as f64 * NO_GAIN);
        self.left = Some(dirtied);
        let wanted = BytesPerSecond::over(dirtied.bytes(), took).0 as f64 * (1.0 + MARGIN);
        let next = if gained { (wanted as u64).clamp(self.least.0, self.most.0) } else { self.most.0 };
        let is_ours = self.set_to(BytesPerSecond(next), pace);
        let last = if is_ours { self.most } else { pace.limit().unwrap_or(self.most) };
        // Below its limit it is the link that carries no more.
        carried
            .filter(|carried| (carried.0 as f64) < held_to.0 as f64 * KEPT_TO)
            .map_or(last, |carried| last.min(carried))
    }

    /// The VM is about to stand: what is left has the whole limit.
    pub(super) fn open(&mut self, pace: &Pace) {
        self.set_to(self.most, pace);
    }

    /// Whether it is still ours to set.
    fn set_to(&mut self, limit: BytesPerSecond, pace: &Pace) -> bool {
        let is_ours = pace.limit() == Some(self.set);
        if is_ours {
            self.set = limit;
            pace.set_limit(Some(limit));
        }
        is_ours
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limit(pace: &Pace) -> u64 {
        pace.limit().unwrap().0 / MIB
    }

    #[test]
    fn the_limit_follows_what_is_dirtied_between_its_bounds_and_the_last_round_has_all() {
        let (least, most) = (BytesPerSecond(10 * MIB), BytesPerSecond(100 * MIB));
        let (mut adaptive, pace) = (Adaptive::new(least, most), Pace::new(Some(least)));
        let second = Duration::from_secs(1);
        // 40 MiB a second are dirtied; while the VM stands all of the limit is there.
        let expected = adaptive.follow(PageCount(40 * 256), second, Some(least), &pace);
        assert_eq!((limit(&pace), expected), (60, most));
        adaptive.follow(PageCount(256), second, None, &pace);
        assert_eq!(limit(&pace), 10);
        // Nothing was gained, however little is dirtied.
        adaptive.follow(PageCount(255), second, Some(least), &pace);
        assert_eq!(limit(&pace), 100);
        adaptive.follow(PageCount(200), second, None, &pace);
        assert_eq!(limit(&pace), 10);
        adaptive.follow(PageCount(1 << 30), second, Some(least), &pace);
        assert_eq!(limit(&pace), 100);
        // A link that carries less is believed.
        let slow = BytesPerSecond(30 * MIB);
        assert_eq!(adaptive.follow(PageCount(1 << 30), second, Some(slow), &pace), slow);
        adaptive.follow(PageCount(0), second, Some(slow), &pace);
        assert_eq!(limit(&pace), 10);
        adaptive.open(&pace);
        assert_eq!(limit(&pace), 100);
    }

    #[test]
    fn what_an_operator_sets_stays() {
        let (least, most) = (BytesPerSecond(10 * MIB), BytesPerSecond(100 * MIB));
        let (mut adaptive, pace) = (Adaptive::new(least, most), Pace::new(Some(least)));
        pace.set_limit(Some(BytesPerSecond(25 * MIB)));
        let set = BytesPerSecond(25 * MIB);
        assert_eq!(adaptive.follow(PageCount(40 * 256), Duration::from_secs(1), None, &pace), set);
        adaptive.open(&pace);
        assert_eq!(limit(&pace), 25);
        pace.set_limit(None);
        adaptive.open(&pace);
        assert_eq!(pace.limit(), None);
    }
}

//! Prediction: how long each way of moving a VM would take, for how long the VM would stand, what would be sent, and what that would cost the
//! guest, from its writable working set curve; and which way to take. Policy: pure, and judged by the same rules as the migration itself
//! ([`crate::migrate::Convergence`], [`crate::stun::Budget`]).
//!
//! Must not know how a curve was measured, nor how memory moves.

mod choose;
pub mod experience;
mod plan;
mod pull;
mod push;
mod writing;

use std::time::Duration;

use serde::Serialize;

pub use choose::{Choice, choose};
pub use plan::{Mover, Plan};

use self::writing::{Edge, Writing};
use crate::migrate::{Adaptive, GUEST_FIRST, OnStuck, Pace, SourceOptions};
use crate::model::{BytesPerSecond, PAGE_SIZE, PageCount, WriteCurve};
use crate::track::{Terms, TermsError, TwoClasses};

/// What an operator asks of the ways besides the terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What the link itself carries, where the terms' bandwidth is a limit below it.
    pub link: Option<BytesPerSecond>,
    /// Where a limit begins that follows what the VM dirties: the terms' bandwidth is the most that it rises to.
    pub least: Option<BytesPerSecond>,
    /// Rounds of `hybrid` before the VM moves.
    pub hybrid_rounds: u32,
}

impl Default for Asked {
    fn default() -> Self {
        Self { link: None, least: None, hybrid_rounds: SourceOptions::default().hybrid_rounds }
    }
}

/// How far the goodput may be from what was said of it, up or down.
const GOODPUT_BAND: f64 = 0.1;

/// What there is to move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// All of it.
    pub pages: PageCount,
    /// What of it is not zero, and so is sent.
    pub filled: f64,
    /// The least that may be, in pages.
    pub filled_low: f64,
    /// The most.
    pub filled_high: f64,
}

impl Memory {
    /// Memory of whose contents nothing is known: all of it counts.
    pub const fn full(pages: PageCount) -> Self {
        let all = pages.0 as f64;
        Self { pages, filled: all, filled_low: all, filled_high: all }
    }
}

/// How one way of moving goes, if one edge of what is known is the truth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Course {
    /// From the first page until the VM runs at the target and needs nothing more of the source; absent if that never comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_ns: Option<u64>,
    /// For how long the VM stands; absent if it never comes to that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_ns: Option<u64>,
    /// Pages sent; of what never ends, until that is plain.
    pub wire_bytes: u64,
    /// Rounds while the VM runs at the source.
    pub rounds: u32,
    /// Whether rounds got within the downtime by themselves; true where there are none.
    pub converges: bool,
    /// The part of its time that the guest's writers lose by being slowed or by waiting for pages, 0 to 1, while it lasts; what the VM stands
    /// is not in it.
    pub guest_slowdown: f64,
}

/// What is to be expected of one way of moving.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// The way.
    pub plan: Plan,
    /// Whether this VM can be moved so today; else it is what the formula says.
    pub is_available: bool,
    /// With the numbers as measured.
    pub expected: Course,
    /// With the curve's lower edge, the least memory that may be in use, and a tenth more goodput.
    pub best: Course,
    /// With its upper edge, the most memory, and a tenth less.
    pub worst: Course,
    /// Whether the VM is expected to stand no longer than the downtime.
    pub meets_downtime: bool,
}

impl Prediction {
    /// The three courses' least and greatest of something: less written may also mean a round more, so the edges need not lie around the middle.
    pub fn span<T: Ord>(&self, of: impl Fn(&Course) -> T) -> (T, T) {
        let mut all = [&self.expected, &self.best, &self.worst].map(of);
        all.sort_unstable();
        let [least, _, most] = all;
        (least, most)
    }

    /// The longest that the VM may stand; none if for ever.
    pub fn longest_blackout_ns(&self) -> Option<u64> {
        let (_, longest) = self.span(|course| course.blackout_ns.unwrap_or(u64::MAX));
        (longest != u64::MAX).then_some(longest)
    }
}

impl Course {
    /// Whether the VM stands for at most `downtime`.
    pub fn within(&self, downtime: Duration) -> bool {
        self.blackout_ns.is_some_and(|blackout| u128::from(blackout) <= downtime.as_nanos())
    }
}

/// What a course is reckoned from: one edge of everything.
struct Case<'a> {
    writing: Writing,
    /// Pages that are sent first.
    filled: f64,
    /// Pages per second.
    bandwidth: f64,
    /// The same for what QEMU sends of a paused VM, which it does not limit.
    unlimited: f64,
    /// The same of the first round, where the limit follows what the VM dirties.
    least: Option<f64>,
    hybrid_rounds: u32,
    terms: &'a Terms,
}

/// What rounds carry: the bandwidth, or what a limit allows that follows what the VM dirties.
struct Goodput {
    bandwidth: f64,
    following: Option<(Adaptive, Pace)>,
}

impl Goodput {
    fn of(case: &Case<'_>) -> Self {
        let following = case.least.map(|least| {
            let least = bytes_per_second(least);
            (Adaptive::new(least, case.goodput()), Pace::new(Some(least)))
        });
        Self { bandwidth: case.bandwidth, following }
    }

    /// Pages per second of the next round.
    fn now(&self) -> f64 {
        let limit = self.following.as_ref().and_then(|(_, pace)| pace.limit());
        limit.map_or(self.bandwidth, |limit| limit.0 as f64 / PAGE_SIZE as f64)
    }

    /// A round that took so long has left `dirtied` pages. What they may be expected to go at while the VM stands.
    fn follow(&mut self, dirtied: PageCount, took: Duration) -> BytesPerSecond {
        match &mut self.following {
            Some((adaptive, pace)) => adaptive.follow(dirtied, took, None, pace),
            None => bytes_per_second(self.bandwidth),
        }
    }
}

fn bytes_per_second(pages: f64) -> BytesPerSecond {
    BytesPerSecond((pages * PAGE_SIZE as f64) as u64)
}

impl Case<'_> {
    /// Seconds that so many pages take.
    fn time(&self, pages: f64) -> f64 {
        pages / self.bandwidth
    }

    /// Seconds that switching over takes besides pages. CPU and device state are in the fixed cost, which is measured with them.
    fn fixed(&self) -> f64 {
        (self.terms.switch_cost + self.terms.rtt).as_secs_f64()
    }

    fn goodput(&self) -> BytesPerSecond {
        bytes_per_second(self.bandwidth)
    }

    fn rtt(&self) -> f64 {
        self.terms.rtt.as_secs_f64()
    }
}

fn nanos(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

fn wire_bytes(pages: f64) -> u64 {
    (pages * PAGE_SIZE as f64) as u64
}

/// What is to be expected of each way of moving that `mover` has, and of those that only a formula knows yet, if the VM goes on writing like
/// `curve`. A curve that ends before the first round does is drawn on by a fit of two classes, as [`crate::track::forecast`] does.
///
/// # Errors
/// Under these terms no VM could be moved.
pub fn predict(
    curve: &WriteCurve,
    memory: &Memory,
    mover: Mover,
    terms: &Terms,
    asked: &Asked,
) -> Result<Vec<Prediction>, TermsError> {
    terms.memory_time()?;
    let unlimited = asked.link.map_or(terms.bandwidth, |link| link.max(terms.bandwidth)).0 as f64 / PAGE_SIZE as f64;
    let bandwidth = terms.pages_per_second().0;
    let least = asked.least.map(|least| least.0.min(terms.bandwidth.0).max(1) as f64 / PAGE_SIZE as f64);
    let first = memory.filled_high.max(memory.pages.0 as f64) / (least.unwrap_or(bandwidth) * (1.0 - GOODPUT_BAND));
    let first = Duration::from_secs_f64(first.min(86_400.0));
    let curve = TwoClasses::fit(curve, memory.pages).extend(curve, first, memory.pages);
    let case = |edge, filled, part| Case {
        writing: Writing::new(&curve, edge, memory.pages),
        filled,
        bandwidth: bandwidth * part,
        unlimited: unlimited * part,
        least: least.map(|least| least * part),
        hybrid_rounds: asked.hybrid_rounds,
        terms,
    };
    let expected = case(Edge::Middle, memory.filled, 1.0);
    let best = case(Edge::Low, memory.filled_low, 1.0 + GOODPUT_BAND);
    let worst = case(Edge::High, memory.filled_high, 1.0 - GOODPUT_BAND);
    let predictions = mover.plans().iter().map(|&plan| {
        let [expected, best, worst] = [&expected, &best, &worst].map(|case| course(plan, case));
        Prediction {
            plan,
            is_available: mover.can_move(),
            meets_downtime: expected.within(terms.downtime),
            expected,
            best,
            worst,
        }
    });
    Ok(predictions.collect())
}

fn course(plan: Plan, case: &Case<'_>) -> Course {
    match plan {
        Plan::StopAndCopy => push::stop_and_copy(case),
        Plan::PreCopy => push::pre_copy(case, OnStuck::Stop),
        Plan::PreCopyStun => push::pre_copy(case, OnStuck::Stun),
        Plan::PreCopyPostCopy => push::pre_copy(case, OnStuck::PostCopy),
        Plan::QemuPreCopy => push::qemu(case, false),
        Plan::QemuAutoConverge => push::qemu(case, true),
        Plan::DemandPaging => pull::demand_paging(case),
        Plan::PostCopy => pull::post_copy(case),
        Plan::Hybrid => pull::hybrid(case, case.hybrid_rounds, writing::Protected::PageByPage, GUEST_FIRST),
        Plan::QemuPostCopy => pull::hybrid(case, 1, writing::Protected::AtOnce, Duration::ZERO),
    }
}

#[cfg(test)]
mod tests;

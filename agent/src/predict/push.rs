//! Moving while the VM runs at the source: rounds, iterated on the curve itself (t' = U(t)/B, `docs/`, "Convergence"), under the rules of those who
//! carry them out.

use std::time::Duration;

use super::pull::follow;
use super::writing::Protected;
use super::{Case, Course, Goodput, nanos, wire_bytes};
use crate::migrate::{Convergence, GUEST_FIRST, LOOK_EVERY, OnStuck, SourceOptions, Verdict};
use crate::model::{PageCount, PagesPerSecond};
use crate::stun::{Budget, Remaining, STRETCH};

/// No round of QEMU is looked at beyond this one.
const MOST_ROUNDS: u32 = 1000;
/// A round that leaves more than this of what it sent, at a throttle that does not rise any more, never ends.
const FLAT: f64 = 0.99;

/// Everything moves once while the VM stands: memory ÷ bandwidth, and the switch.
pub(super) fn stop_and_copy(case: &Case<'_>) -> Course {
    let took = nanos(case.time(case.filled) + case.fixed());
    Course {
        total_ns: Some(took),
        blackout_ns: Some(took),
        wire_bytes: wire_bytes(case.filled),
        rounds: 0,
        converges: true,
        guest_slowdown: 0.0,
    }
}

/// Dunlin's own pre-copy, stopped by its own judge; with [`OnStuck::Stun`] writers are held to what its budget leaves them. If it gives up the VM stands for what
/// is left, or with [`OnStuck::PostCopy`] moves before it.
pub(super) fn pre_copy(case: &Case<'_>, on_stuck: OnStuck) -> Course {
    let stun = on_stuck == OnStuck::Stun;
    let terms = case.terms;
    let mut judge = Convergence::new(terms.downtime, terms.switch_cost, SourceOptions::default().max_rounds);
    let memory_time = terms.downtime.saturating_sub(terms.switch_cost);
    let budget = Budget { stretch: STRETCH, memory_time };
    let (mut due, mut left) = (case.writing.all_due(), case.filled);
    let (mut rounds, mut sent, mut total, mut held) = (0, 0.0, 0.0, 0.0);
    let mut goodput = Goodput::of(case);
    let converges = loop {
        let took = left / goodput.now() + case.rtt();
        let allowed = budget.allowed(&Remaining {
            elapsed: Duration::from_secs_f64(total),
            memory: PageCount(case.filled as u64),
            unsent: PageCount(left as u64),
            dirty: PageCount(0),
            goodput: PagesPerSecond(goodput.now()),
        });
        sent += left;
        total += took;
        rounds += 1;
        due = case.writing.after_round(&due, took, 1.0, Protected::PageByPage);
        left = case.writing.due_pages(&due);
        if stun && let Some(allowed) = allowed.map(|allowed| allowed.0 * took).filter(|&allowed| allowed < left) {
            // What a held writer has written since the last look it sleeps for: a round that is shorter than the time between two looks meets it asleep.
            let allowed = if took < LOOK_EVERY.as_secs_f64() { 0.0 } else { allowed };
            held += took * (1.0 - allowed / left);
            due = due.scaled(allowed / left);
            left = allowed;
        }
        let took = Duration::from_secs_f64(took);
        let dirtied = PageCount(left.round() as u64);
        match judge.judge(dirtied, took, goodput.follow(dirtied, took), terms.rtt) {
            Verdict::Another => {}
            Verdict::Converged => break true,
            Verdict::GaveUp(_) => break false,
        }
    };
    if on_stuck == OnStuck::PostCopy && !converges {
        return follow(case, &due, (total + GUEST_FIRST.as_secs_f64(), sent, rounds));
    }
    let blackout = case.time(left) + case.fixed();
    Course {
        total_ns: Some(nanos(total + blackout)),
        blackout_ns: Some(nanos(blackout)),
        wire_bytes: wire_bytes(sent + left),
        rounds,
        converges,
        guest_slowdown: if total > 0.0 { held / total } else { 0.0 },
    }
}

/// QEMU's pre-copy: it stops the VM once what is left is at most bandwidth × downtime limit (nothing is taken off for the switch), never gives up, and sends what is left without its limit (`migration/migration.c`, migration_completion_precopy). With
/// `auto_converge` it slows all vCPUs when a round dirties more than half of what it sends, for the second time each: to 20 % first, then by 10 %
/// more, up to 99 %; it looks once a second at most (`migration/ram.c`, migration_trigger_throttle). Where it looks in the midst of a round, the round is taken as a whole
/// here.
pub(super) fn qemu(case: &Case<'_>, auto_converge: bool) -> Course {
    let fits = case.terms.downtime.as_secs_f64() * case.bandwidth;
    let (mut due, mut left) = (case.writing.all_due(), case.filled);
    let (mut rounds, mut sent, mut total, mut held) = (0, 0.0, 0.0, 0.0);
    let (mut throttle, mut high, mut unlooked): (f64, u32, f64) = (0.0, 0, 0.0);
    let ends = loop {
        if left <= fits {
            break true;
        }
        let may_rise = auto_converge && throttle < 0.99;
        let took = case.time(left) + case.rtt();
        let before = left;
        sent += left;
        total += took;
        held += took * throttle;
        rounds += 1;
        due = case.writing.after_round(&due, took, 1.0 - throttle, Protected::AtOnce);
        left = case.writing.due_pages(&due);
        if rounds >= MOST_ROUNDS || (left > before * FLAT && !may_rise) {
            break left <= fits;
        }
        unlooked += took;
        if may_rise && unlooked >= 1.0 {
            unlooked = 0.0;
            high += u32::from(left > before / 2.0);
            if high >= 2 {
                high = 0;
                throttle = if throttle > 0.0 { (throttle + 0.1).min(0.99) } else { 0.2 };
            }
        }
    };
    let blackout = left / case.unlimited + case.fixed();
    Course {
        total_ns: ends.then(|| nanos(total + blackout)),
        blackout_ns: ends.then(|| nanos(blackout)),
        wire_bytes: wire_bytes(sent + if ends { left } else { 0.0 }),
        rounds,
        converges: ends,
        guest_slowdown: if total > 0.0 { held / total } else { 0.0 },
    }
}

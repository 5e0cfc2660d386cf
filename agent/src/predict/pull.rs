//! Moving the VM first and its memory afterwards: the VM stands for the switch alone, each page travels once, and the guest waits for pages that it
//! touches before they have come (Hines and Gopalan, "Post-copy based live virtual machine migration", VEE 2009).
//!
//! Only writes show in a curve: pages that a guest reads and never writes are waited for as well, so what it loses is a lower bound.

use std::time::Duration;

use super::writing::{Due, Protected};
use super::{Case, Course, Goodput, nanos, wire_bytes};
use crate::migrate::GUEST_FIRST;
use crate::model::PageCount;

/// Halvings that settle how far the guest gets.
const STEPS: u32 = 60;

/// Everything is pushed behind the VM: total = memory ÷ bandwidth, the switch, and the time in which the guest goes first. A page that is touched s into the push of length t has not
/// come with a chance of 1 - s/t.
pub(super) fn post_copy(case: &Case<'_>) -> Course {
    let push = case.time(case.filled);
    let due = case.writing.all_due();
    let lost = lost(case, push, |ran| case.writing.touched_before_they_come(&due, ran));
    Course {
        total_ns: Some(nanos(push + GUEST_FIRST.as_secs_f64() + case.fixed())),
        blackout_ns: Some(nanos(case.fixed())),
        wire_bytes: wire_bytes(case.filled),
        rounds: 0,
        converges: true,
        guest_slowdown: lost,
    }
}

/// So many rounds while the VM runs at the source, then post-copy of what the last one left, in which the guest goes `guest_first`. A limit that follows what the VM dirties is the most behind them.
pub(super) fn hybrid(case: &Case<'_>, rounds: u32, protected: Protected, guest_first: Duration) -> Course {
    let mut goodput = Goodput::of(case);
    let (mut due, mut left, mut total, mut sent) = (case.writing.all_due(), case.filled, 0.0, 0.0);
    for _ in 0..rounds {
        let round = left / goodput.now() + case.rtt();
        (total, sent) = (total + round, sent + left);
        due = case.writing.after_round(&due, round, 1.0, protected);
        left = case.writing.due_pages(&due);
        goodput.follow(PageCount(left.round() as u64), Duration::from_secs_f64(round));
    }
    total += guest_first.as_secs_f64();
    Course { converges: true, ..follow(case, &due, (total, sent, rounds)) }
}

/// So many pages have been sent in rounds that took so many seconds; the VM moves, and what is due follows it.
pub(super) fn follow(case: &Case<'_>, due: &Due, (before, sent, rounds): (f64, f64, u32)) -> Course {
    let left = case.writing.due_pages(due);
    let push = case.time(left);
    let lost = lost(case, push, |ran| case.writing.touched_before_they_come(due, ran));
    let total = before + push;
    Course {
        total_ns: Some(nanos(total + case.fixed())),
        blackout_ns: Some(nanos(case.fixed())),
        wire_bytes: wire_bytes(sent + left),
        rounds,
        converges: false,
        guest_slowdown: if total > 0.0 { lost * push / total } else { 0.0 },
    }
}

/// Nothing is pushed: each page that is touched is waited for. It ends when the rest is fetched, which takes as long as a push; what the guest loses is told for
/// as long as that.
pub(super) fn demand_paging(case: &Case<'_>) -> Course {
    let fetch = case.time(case.filled);
    Course { guest_slowdown: lost(case, fetch, |ran| case.writing.pages(ran)), ..post_copy(case) }
}

/// The part of `time` (seconds) that the guest waits in, if it has to wait for so many pages when it runs for a time: it waits a round trip and a
/// page's own time for each, and runs in what is left. Both rise, so halving finds where they meet.
fn lost(case: &Case<'_>, time: f64, waits: impl Fn(f64) -> f64) -> f64 {
    if time <= 0.0 {
        return 0.0;
    }
    let each = case.rtt() + case.time(1.0);
    let (mut runs, mut too_long) = (0.0, time);
    for _ in 0..STEPS {
        let middle = f64::midpoint(runs, too_long);
        if middle + each * waits(middle) <= time { runs = middle } else { too_long = middle }
    }
    1.0 - runs / time
}

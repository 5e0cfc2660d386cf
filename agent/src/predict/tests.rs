//! The model beside closed forms, and what must hold whatever a guest writes.

use proptest::prelude::*;

use super::*;
use crate::model::curve::tests::curve_of;
use crate::model::{CurvePoint, WriteCurve};

/// 1 GiB, 1 GiB/s: all of it takes a second.
const PAGES: u64 = 1 << 18;
const LINK: f64 = 1.0 * (1u64 << 30) as f64;

fn terms(part_of_link: f64, downtime_ms: u64) -> Terms {
    Terms {
        bandwidth: BytesPerSecond((LINK * part_of_link) as u64),
        downtime: Duration::from_millis(downtime_ms),
        switch_cost: Duration::from_millis(3),
        rtt: Duration::ZERO,
    }
}

fn memory() -> Memory {
    Memory::full(PageCount(PAGES))
}

/// So many different pages a second, all of memory in turn.
fn even(pages_per_second: f64) -> WriteCurve {
    let end = (PAGES as f64 / pages_per_second).min(80_000.0);
    let point = |seconds: f64| CurvePoint::exact((seconds * 1e9) as u64, pages_per_second * seconds);
    WriteCurve::from_measured([0.01, 0.1, 1.0].map(|part| point(part * end)).to_vec()).unwrap()
}

/// So many pages, all of them within a millisecond, and no others.
fn fixed(pages: f64) -> WriteCurve {
    WriteCurve::new([1e6, 1e9, 1e10].map(|ns| CurvePoint::exact(ns as u64, pages)).to_vec()).unwrap()
}

fn of(curve: &WriteCurve, mover: Mover, terms: &Terms, plan: Plan) -> Prediction {
    asked(curve, mover, terms, &Asked::default(), plan)
}

fn asked(curve: &WriteCurve, mover: Mover, terms: &Terms, asked: &Asked, plan: Plan) -> Prediction {
    let all = predict(curve, &memory(), mover, terms, asked).unwrap();
    all.into_iter().find(|prediction| prediction.plan == plan).unwrap()
}

fn seconds(ns: Option<u64>) -> f64 {
    ns.unwrap() as f64 / 1e9
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{a} is not {b}");
}

#[test]
fn stop_and_copy_is_memory_over_bandwidth() {
    let found = of(&even(1000.0), Mover::Dunlin, &terms(0.5, 30), Plan::StopAndCopy);
    close(seconds(found.expected.total_ns), 2.003);
    assert_eq!(found.expected.blackout_ns, found.expected.total_ns);
    close(seconds(found.best.total_ns), 2.0 / 1.1 + 0.003);
    close(seconds(found.worst.total_ns), 2.0 / 0.9 + 0.003);
    assert!(found.is_available && !found.meets_downtime);
}

/// QEMU protects all pages when a round begins: rounds of a writer with an even rate are the textbook's geometric series.
#[test]
fn an_even_writer_makes_a_geometric_series_under_qemu() {
    let part: f64 = 0.4;
    let found = of(&even(part * PAGES as f64), Mover::Qemu, &terms(1.0, 30), Plan::QemuPreCopy).expected;
    // Until what is left fits 30 ms.
    let rounds = (0.03f64.ln() / part.ln()).ceil() as i32;
    assert_eq!(found.rounds, rounds as u32);
    close(seconds(found.total_ns), (1.0 - part.powi(rounds + 1)) / (1.0 - part) + 0.003);
    close(seconds(found.blackout_ns), part.powi(rounds) + 0.003);
}

/// QEMU sends what is left of the paused VM as fast as the link goes; rounds keep to the limit.
#[test]
fn qemu_limits_no_last_pages() {
    let limited = terms(0.1, 30);
    let of = |link| {
        let beside = Asked { link, ..Asked::default() };
        asked(&even(2000.0), Mover::Qemu, &limited, &beside, Plan::QemuPreCopy).expected
    };
    let (alone, beside) = (of(None), of(Some(BytesPerSecond(LINK as u64))));
    let last = seconds(alone.blackout_ns) - 0.003;
    assert!(last > 0.001, "{alone:?}");
    close(seconds(beside.blackout_ns), last / 10.0 + 0.003);
    close(seconds(alone.total_ns) - seconds(beside.total_ns), last * 0.9);
    assert_eq!((alone.rounds, alone.wire_bytes), (beside.rounds, beside.wire_bytes));
    assert_eq!(of(Some(BytesPerSecond(1))), alone, "a link carries what its limit lets through");
}

/// Dunlin protects each page when it is sent: of what is written in the first round half comes behind it; later what was not sent counts whole.
#[test]
fn an_even_writer_leaves_half_behind_the_first_round() {
    let part: f64 = 0.4;
    let found = of(&even(part * PAGES as f64), Mover::Dunlin, &terms(1.0, 100), Plan::PreCopy).expected;
    let mut left = vec![1.0];
    for round in 0..found.rounds as usize {
        let (sent, writes) = (left[round], left[round] * part);
        left.push(sent * writes / 2.0 + (1.0 - sent) * writes);
    }
    close(left[1], 0.2);
    close(seconds(found.total_ns), left.iter().sum::<f64>() + 0.003);
    close(seconds(found.blackout_ns), left.last().unwrap() + 0.003);
    assert!(found.converges && found.rounds >= 2, "{found:?}");
}

#[test]
fn a_fixed_set_is_sent_until_that_is_plain_and_then_stood_for() {
    let set = PAGES as f64 / 4.0;
    let never = of(&fixed(set), Mover::Dunlin, &terms(1.0, 30), Plan::PreCopy);
    let course = never.expected;
    assert_eq!((course.rounds, course.converges, never.meets_downtime), (2, false, false), "{course:?}");
    assert!((seconds(course.blackout_ns) / 0.253 - 1.0).abs() < 0.01, "{course:?}");
    assert!((seconds(course.total_ns) / 1.503 - 1.0).abs() < 0.01, "{course:?}");
    let qemu = of(&fixed(set), Mover::Qemu, &terms(1.0, 30), Plan::QemuPreCopy).expected;
    assert_eq!((qemu.total_ns, qemu.blackout_ns, qemu.converges), (None, None, false));
    // One that fits.
    let fits = of(&fixed(1000.0), Mover::Dunlin, &terms(1.0, 30), Plan::PreCopy);
    assert!(fits.meets_downtime && fits.expected.rounds <= 3, "{fits:?}");
    assert!((seconds(fits.expected.blackout_ns) - 1000.0 / PAGES as f64 - 0.003).abs() < 1e-3, "{fits:?}");
}

#[test]
fn after_a_push_each_page_has_been_sent_once_and_waits_are_of_the_pages_touched_too_soon() {
    let rate = 20_000.0;
    let terms = Terms { rtt: Duration::from_micros(500), ..terms(1.0, 30) };
    let found = of(&even(rate), Mover::Dunlin, &terms, Plan::PostCopy).expected;
    close(seconds(found.total_ns), 1.0035 + GUEST_FIRST.as_secs_f64());
    close(seconds(found.blackout_ns), 0.0035);
    assert_eq!(found.wire_bytes, PAGES * 4096);
    // Half of the pages that it touches have not come; each takes a round trip and a page's time.
    let each = 0.0005 + 1.0 / PAGES as f64;
    close(found.guest_slowdown, 1.0 - 1.0 / (1.0 + each * rate / 2.0));
    // Without a push none has.
    let paging = of(&even(rate), Mover::Dunlin, &terms, Plan::DemandPaging).expected;
    close(paging.guest_slowdown, 1.0 - 1.0 / (1.0 + each * rate));
    // After a round only what was written in it is missing.
    let hybrid = of(&even(rate), Mover::Dunlin, &terms, Plan::Hybrid).expected;
    let left = rate / 2.0 * 1.0005;
    assert!((hybrid.wire_bytes as f64 / 4096.0 - PAGES as f64 - left).abs() < 2.0, "{hybrid:?}");
    close(seconds(hybrid.blackout_ns), 0.0035);
    assert!(hybrid.guest_slowdown < found.guest_slowdown);
}

/// What the rounds before left of an even writer is its part of memory: of what a round sends half of what is written meanwhile comes behind it, of the rest all of it.
#[test]
fn each_round_of_hybrid_leaves_what_was_written_behind_it() {
    let part: f64 = 0.4;
    let rounds = |hybrid_rounds| {
        let more = Asked { hybrid_rounds, ..Asked::default() };
        asked(&even(part * PAGES as f64), Mover::Dunlin, &terms(1.0, 30), &more, Plan::Hybrid).expected
    };
    let mut left: f64 = 1.0;
    let mut sent = 0.0;
    for count in 1..=4 {
        sent += left;
        let writes = left * part;
        left = left * writes / 2.0 + (1.0 - left) * writes;
        let found = rounds(count);
        assert_eq!(found.rounds, count);
        assert!((found.wire_bytes as f64 / 4096.0 - (sent + left) * PAGES as f64).abs() < 2.0, "{found:?}");
        close(seconds(found.total_ns), sent + left + 0.003 + GUEST_FIRST.as_secs_f64());
        close(seconds(found.blackout_ns), 0.003);
    }
    assert_eq!(rounds(1), of(&even(part * PAGES as f64), Mover::Dunlin, &terms(1.0, 30), Plan::Hybrid).expected);
}

/// A limit that follows: the first round goes at the least, each later one at half as much again as was dirtied, the last pages at the most.
#[test]
fn a_limit_that_follows_makes_rounds_longer_and_the_blackout_no_longer() {
    let least = |part: f64| Asked { least: Some(BytesPerSecond((LINK * part) as u64)), ..Asked::default() };
    let terms = &terms(1.0, 100);
    let pre_copy = |curve: &WriteCurve, more: &Asked| asked(curve, Mover::Dunlin, terms, more, Plan::PreCopy).expected;
    // One that hardly writes goes at the least, once.
    let idle = pre_copy(&even(1.0), &least(0.1));
    assert!((seconds(idle.total_ns) - 10.003).abs() < 0.01 && idle.converges, "{idle:?}");
    // A writer of 0.2 of memory a second: round by round.
    let part: f64 = 0.2;
    let writer = even(part * PAGES as f64);
    let found = pre_copy(&writer, &least(0.25));
    let (mut rate, mut left, mut total) = (0.25f64, 1.0f64, 0.0);
    for _ in 0..found.rounds {
        let took = left / rate;
        total += took;
        let writes = (took * part).min(1.0);
        left = left * writes / 2.0 + (1.0 - left) * writes;
        rate = (left / took * 1.5).clamp(0.25, 1.0);
    }
    close(seconds(found.total_ns), total + left + 0.003);
    close(seconds(found.blackout_ns), left + 0.003);
    let fast = pre_copy(&writer, &Asked::default());
    assert!(found.converges && fast.total_ns < found.total_ns, "{found:?} {fast:?}");
    // A least that is the most is a limit that stays; what has no rounds knows no least.
    assert_eq!(pre_copy(&writer, &least(1.0)), fast);
    for plan in [Plan::StopAndCopy, Plan::PostCopy] {
        let [with, without] =
            [least(0.1), Asked::default()].map(|more| asked(&even(1.0), Mover::Dunlin, terms, &more, plan).expected);
        assert_eq!((with.total_ns, with.blackout_ns), (without.total_ns, without.blackout_ns));
    }
    // Hybrid's rounds follow as well; what the last one leaves goes at the most.
    let more = Asked { hybrid_rounds: 3, ..least(0.2) };
    let found = asked(&writer, Mover::Dunlin, terms, &more, Plan::Hybrid).expected;
    let (mut rates, mut left, mut total) = (vec![0.2f64], 1.0f64, 0.0);
    for round in 0..3 {
        let took = left / rates[round];
        total += took;
        let writes = (took * part).min(1.0);
        left = left * writes / 2.0 + (1.0 - left) * writes;
        rates.push((left / took * 1.5).clamp(0.2, 1.0));
    }
    assert!(rates[2] > 0.2, "{rates:?}");
    close(seconds(found.total_ns), total + left + 0.003 + GUEST_FIRST.as_secs_f64());
}

#[test]
fn writers_are_held_only_as_far_as_that_is_needed() {
    let unthrottled = fixed(PAGES as f64 / 2.0);
    let held = of(&unthrottled, Mover::Dunlin, &terms(1.0, 30), Plan::PreCopyStun);
    assert!(held.meets_downtime && held.expected.converges, "{held:?}");
    assert!(held.expected.guest_slowdown > 0.3, "{held:?}");
    // A last short round meets writers asleep.
    assert!(seconds(held.expected.blackout_ns) < 0.005, "{held:?}");
    assert!(seconds(held.expected.total_ns) < 1.5, "{held:?}");
    let idle = of(&even(100.0), Mover::Dunlin, &terms(1.0, 30), Plan::PreCopyStun);
    assert_eq!(idle.expected, of(&even(100.0), Mover::Dunlin, &terms(1.0, 30), Plan::PreCopy).expected);
    assert!(idle.expected.guest_slowdown.abs() < f64::EPSILON);
}

#[test]
fn auto_converge_ends_what_pre_copy_alone_does_not_and_slows_everybody() {
    let writer = even(1.2 * PAGES as f64);
    assert_eq!(of(&writer, Mover::Qemu, &terms(1.0, 30), Plan::QemuPreCopy).expected.total_ns, None);
    let slowed = of(&writer, Mover::Qemu, &terms(1.0, 30), Plan::QemuAutoConverge).expected;
    assert!(slowed.converges && slowed.guest_slowdown > 0.1, "{slowed:?}");
    assert!(seconds(slowed.total_ns) > 4.0, "{slowed:?}");
}

#[test]
fn the_simplest_way_that_is_sure_to_fit_is_chosen() {
    let chosen = |curve: &WriteCurve, mover, terms: &Terms| {
        choose(&predict(curve, &memory(), mover, terms, &Asked::default()).unwrap(), terms.downtime)
    };
    let plan = |curve: &WriteCurve, mover, terms: &Terms| chosen(curve, mover, terms).unwrap().plan;
    assert_eq!(plan(&even(1.0), Mover::Dunlin, &terms(1.0, 1200)), Plan::StopAndCopy);
    assert_eq!(plan(&even(1000.0), Mover::Dunlin, &terms(1.0, 30)), Plan::PreCopy);
    let never = fixed(PAGES as f64 / 2.0);
    assert_eq!(plan(&never, Mover::Dunlin, &terms(1.0, 30)), Plan::PreCopyStun);
    assert_eq!(plan(&never, Mover::Qemu, &terms(1.0, 30)), Plan::QemuPostCopy);
    assert_eq!(chosen(&never, Mover::Unknown, &terms(1.0, 30)), None);
    let why = chosen(&even(1000.0), Mover::Dunlin, &terms(1.0, 30)).unwrap();
    assert!(why.meets_downtime && why.reason.ends_with("of 30.00 ms allowed"), "{why:?}");
}

#[test]
fn commands_are_what_an_operator_types() {
    let of =
        |plan: Plan| plan.commands("web1", BytesPerSecond(125_000_000), Duration::from_millis(300), &Asked::default());
    assert_eq!(
        of(Plan::PreCopyStun),
        [
            "dunlin migrate web1 --to tcp://TARGET:PORT --bandwidth 1Gbit --downtime 300ms --strategy pre-copy --on-stuck stun"
        ]
    );
    assert_eq!(
        of(Plan::QemuAutoConverge),
        [
            "virsh migrate --live --bandwidth 119 --auto-converge web1 qemu+ssh://TARGET/system",
            "virsh migrate-setmaxdowntime web1 300"
        ]
    );
    for (bandwidth, text) in [(50_000_000, "400Mbit"), (20 << 20, "20MiB/s"), (7, "7B/s")] {
        let downtime = Duration::from_millis(30);
        let command = &Plan::PreCopy.commands("web1", BytesPerSecond(bandwidth), downtime, &Asked::default())[0];
        assert!(command.contains(&format!("--bandwidth {text} ")), "{command}");
        assert_eq!(text.parse(), Ok(BytesPerSecond(bandwidth)));
    }
    let more = Asked { least: Some(BytesPerSecond(12_500_000)), hybrid_rounds: 3, ..Asked::default() };
    let command = &Plan::Hybrid.commands("web1", BytesPerSecond(125_000_000), Duration::from_millis(30), &more)[0];
    assert!(
        command.contains("--bandwidth 100Mbit..1Gbit ") && command.ends_with("hybrid --hybrid-rounds 3"),
        "{command}"
    );
}

#[test]
fn terms_that_no_vm_meets_are_refused() {
    assert!(matches!(
        predict(&even(1.0), &memory(), Mover::Dunlin, &terms(0.0, 30), &Asked::default()),
        Err(TermsError::NoBandwidth)
    ));
    assert!(matches!(
        predict(&even(1.0), &memory(), Mover::Dunlin, &terms(1.0, 2), &Asked::default()),
        Err(TermsError::NoBudget { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// More bandwidth never makes worse what has no rounds, nor keeps rounds from getting there; and the edges lie around the middle.
    #[test]
    fn more_bandwidth_is_no_worse(
        hot in 1e3..1e5f64, hot_rate in 0.1..100.0f64, cold in 1e3..1e5f64, cold_rate in 0.001..0.1f64, part in 0.05..1.0f64, more in 1.0..4.0f64,
    ) {
        let curve = curve_of(&[(hot, hot_rate), (cold, cold_rate)], &[1.0, 5.0, 20.0, 80.0, 320.0, 1280.0]);
        for plan in [Plan::StopAndCopy, Plan::PostCopy, Plan::DemandPaging] {
            let [less, more] = [part, part * more].map(|part| of(&curve, Mover::Dunlin, &terms(part, 30), plan).expected);
            prop_assert!(more.total_ns <= less.total_ns && more.blackout_ns <= less.blackout_ns, "{plan}: {less:?} {more:?}");
            prop_assert!(more.wire_bytes == less.wire_bytes);
        }
        let [less, more] = [part, part * more].map(|part| of(&curve, Mover::Qemu, &terms(part, 30), Plan::QemuPreCopy).expected);
        prop_assert!(more.converges || !less.converges, "{less:?} {more:?}");
        for mover in [Mover::Dunlin, Mover::Qemu] {
            for found in predict(&curve, &memory(), mover, &terms(part, 30), &Asked::default()).unwrap() {
                for course in [&found.best, &found.expected, &found.worst] {
                    prop_assert!((0.0..=1.0).contains(&course.guest_slowdown), "{found:?}");
                    prop_assert!(course.wire_bytes >= (PAGES - 1) * 4096, "{found:?}");
                    prop_assert!(course.total_ns >= course.blackout_ns, "{found:?}");
                }
                if found.plan != Plan::PreCopyStun {
                    prop_assert!(found.expected.converges || !found.worst.converges, "{found:?}");
                }
            }
        }
    }

    /// The groups of a curve are the curve.
    #[test]
    fn groups_are_the_curve(hot in 1.0..1e5f64, hot_rate in 0.1..1e3f64, cold in 1.0..1e5f64, cold_rate in 0.001..1.0f64, at in 0.0..1.28f64) {
        let curve = curve_of(&[(hot, hot_rate), (cold, cold_rate)], &[1.0, 5.0, 20.0, 80.0, 320.0, 1280.0]);
        let writing = Writing::new(&curve, Edge::Middle, PageCount(PAGES));
        let (got, want) = (writing.pages(at), curve.at_ns(at * 1e9).unique_pages);
        prop_assert!((got - want).abs() <= 1e-6 * (1.0 + want), "{got} {want}");
        // Behind a first round with each page protected when it is sent: the mean of the curve.
        let due = writing.after_round(&writing.all_due(), at.max(1e-3), 1.0, writing::Protected::PageByPage);
        let steps = 2000;
        let mean: f64 = (0..steps).map(|i| writing.pages(at.max(1e-3) * (f64::from(i) + 0.5) / f64::from(steps))).sum::<f64>() / f64::from(steps);
        prop_assert!((writing.due_pages(&due) - mean).abs() <= 1e-3 * (1.0 + mean), "{} {mean}", writing.due_pages(&due));
    }
}

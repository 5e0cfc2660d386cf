//! Whether pre-copy would bring a VM within a downtime, and what it would cost.
//!
//! With U(t) the curve, M the memory, B the goodput: the first round takes t_0 = M/B, and each further one t' = U(t)/B. As U
//! is concave this falls to the largest t* with U(t*) = B·t* and no further. Of a downtime D only D' = D - F - RTT is left for
//! memory, F being the fixed cost of the switch. So pre-copy gets there if t* <= D', which for a concave U is **U(D')/D' <= B**: the
//! rate of unique pages over an interval as long as the memory's part of the downtime decides alone (the docs, "Convergence").

use std::time::Duration;

use serde::Serialize;

use super::fit::TwoClasses;
use crate::model::units::{PAGE_SIZE, display_duration};
use crate::model::{BytesPerSecond, PageCount, PagesPerSecond, UniqueRate, WriteCurve};

/// How far the goodput may be from what was measured of it, up or down.
const GOODPUT_BAND: f64 = 0.1;
/// Pre-copy that carries more than this, in memories, is slow.
const SLOW_WIRE: f64 = 1.5;
/// So are more rounds than this.
const SLOW_ROUNDS: u32 = 30;
/// A round that leaves more than this share of what the round before left buys nothing (as pre-copy itself judges).
const NO_GAIN: f64 = 0.9;
/// No forecast looks further: what then still shrinks does so for hours.
const MAX_ROUNDS: u32 = 1000;

/// The link, and what the move may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Goodput for pages.
    pub bandwidth: BytesPerSecond,
    /// The downtime that is allowed.
    pub downtime: Duration,
    /// What a switch costs in any case.
    pub switch_cost: Duration,
    /// The link's round trip.
    pub rtt: Duration,
}

/// Terms under which no VM could be moved, whatever it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// No bandwidth.
    #[error("a bandwidth of zero carries nothing; give that of the link")]
    NoBandwidth,
    /// The downtime is spent before the first page.
    #[error("a downtime of {} is spent before the first page: the switch and a round trip alone take {}; allow more", display_duration(*.downtime), display_duration(*.fixed))]
    NoBudget {
        /// What was allowed.
        downtime: Duration,
        /// What is spent in any case.
        fixed: Duration,
    },
}

impl Terms {
    /// D': what the downtime leaves for memory.
    ///
    /// # Errors
    /// Nothing is left, or there is no bandwidth.
    pub fn memory_time(&self) -> Result<Duration, TermsError> {
        if self.bandwidth.0 == 0 {
            return Err(TermsError::NoBandwidth);
        }
        let fixed = self.switch_cost.saturating_add(self.rtt);
        match self.downtime.checked_sub(fixed) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(TermsError::NoBudget { downtime: self.downtime, fixed }),
        }
    }

    /// The goodput in pages.
    pub fn pages_per_second(&self) -> PagesPerSecond {
        PagesPerSecond(self.bandwidth.0 as f64 / PAGE_SIZE as f64)
    }
}

/// The answer in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feasibility {
    /// It gets there.
    Converges,
    /// It gets there, but sends much of the memory again.
    ConvergesSlowly,
    /// Within what is known of the link and the curve, it may or may not.
    Uncertain,
    /// It never does, however long it goes on.
    Never,
}

/// How pre-copy goes if one edge of what is known is the truth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outlook {
    /// Whether it gets within the downtime.
    pub converges: bool,
    /// Rounds while the VM runs. Without convergence it is taken to end as pre-copy does: when a round leaves more than nine tenths
    /// of what the one before left.
    pub rounds: u32,
    /// From the first page until the VM runs at the target.
    pub total_ns: u64,
    /// The round while the VM is paused.
    pub last_round_ns: u64,
    /// That, the switch and a round trip.
    pub downtime_ns: u64,
    /// All pages sent.
    pub wire_bytes: u64,
    /// The same in memories; 1 of no memory.
    pub wire_ratio: f64,
    /// t*: no round gets shorter than this.
    pub shortest_round_ns: u64,
}

/// A forecast.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// The answer.
    pub feasibility: Feasibility,
    /// The answer for people, with by how much the VM would have to write less.
    pub reason: String,
    /// D': the memory's part of the downtime.
    pub memory_time_ns: u64,
    /// U(D')/D'.
    pub unique: UniqueRate,
    /// What the link carries, in pages per second: as much may be written.
    pub allowed_pages_per_second: f64,
    /// By which part the rate must fall, 0 to 1; 0 if it need not.
    pub must_fall_by: f64,
    /// With the numbers as measured.
    pub expected: Outlook,
    /// With the curve's lower edge and a tenth more goodput.
    pub best: Outlook,
    /// With its upper edge and a tenth less.
    pub worst: Outlook,
}

/// Which edge of the curve.
#[derive(Clone, Copy)]
enum Edge {
    Low,
    Middle,
    High,
}

/// Whether pre-copy of `memory` (what is not zero and not free) converges, if the VM writes like `curve`. A curve that ends before the
/// first round does is drawn on by a fit of two classes; its band there is as wide as concavity leaves it.
///
/// # Errors
/// Under these terms no VM could be moved.
pub fn forecast(curve: &WriteCurve, memory: PageCount, terms: &Terms) -> Result<Forecast, TermsError> {
    let budget = terms.memory_time()?;
    // As long as the first round may take; a curve has no longer intervals than a day.
    let first = memory.0 as f64 / (terms.pages_per_second().0 * (1.0 - GOODPUT_BAND));
    let first = Duration::from_secs_f64(first.min(86_400.0));
    let curve = &TwoClasses::fit(curve, memory).extend(curve, first, memory);
    let look = |edge, bandwidth| outlook(curve, edge, memory, terms, bandwidth, budget);
    let allowed = terms.pages_per_second().0;
    let expected = look(Edge::Middle, allowed);
    let best = look(Edge::Low, allowed * (1.0 + GOODPUT_BAND));
    let worst = look(Edge::High, allowed * (1.0 - GOODPUT_BAND));
    let unique = curve.rate_over(budget);
    let feasibility = if !best.converges {
        Feasibility::Never
    } else if !worst.converges {
        Feasibility::Uncertain
    } else if expected.wire_ratio > SLOW_WIRE || expected.rounds > SLOW_ROUNDS {
        Feasibility::ConvergesSlowly
    } else {
        Feasibility::Converges
    };
    let must_fall_by = if expected.converges { 0.0 } else { (1.0 - allowed / unique.pages_per_second).clamp(0.0, 1.0) };
    let reason = words(feasibility, &expected, &unique, terms, budget, must_fall_by);
    Ok(Forecast {
        feasibility,
        reason,
        memory_time_ns: budget.as_nanos() as u64,
        unique,
        allowed_pages_per_second: allowed,
        must_fall_by,
        expected,
        best,
        worst,
    })
}

/// The recurrence, at `bandwidth` pages per second.
fn outlook(
    curve: &WriteCurve,
    edge: Edge,
    memory: PageCount,
    terms: &Terms,
    bandwidth: f64,
    budget: Duration,
) -> Outlook {
    let memory = memory.0 as f64;
    // No more than all of it can be written.
    let pages = |ns: f64| {
        let here = curve.at_ns(ns);
        let pages = match edge {
            Edge::Low => here.low_pages,
            Edge::Middle => here.unique_pages,
            Edge::High => here.high_pages,
        };
        pages.min(memory)
    };
    let time = |pages: f64| pages / bandwidth * 1e9;
    let budget = budget.as_nanos() as f64;
    let first = time(memory);
    let converges = first <= budget || time(pages(budget)) <= budget;
    let (mut left, mut sent, mut rounds) = (memory, 0.0, 0);
    while time(left) > budget && rounds < MAX_ROUNDS {
        let next = pages(time(left));
        sent += left;
        rounds += 1;
        let gained = next <= left * NO_GAIN;
        left = next;
        if !gained && !converges {
            break;
        }
    }
    let fixed = (terms.switch_cost.saturating_add(terms.rtt)).as_nanos() as f64;
    let wire = sent + left;
    Outlook {
        converges,
        rounds,
        total_ns: (time(wire) + fixed) as u64,
        last_round_ns: time(left) as u64,
        downtime_ns: (time(left) + fixed) as u64,
        wire_bytes: (wire * PAGE_SIZE as f64) as u64,
        wire_ratio: if memory > 0.0 { wire / memory } else { 1.0 },
        shortest_round_ns: shortest_round(first, |ns| time(pages(ns))),
    }
}

/// The largest fixed point of `next` up to `first`. `next(t)/t` falls and `next(first) <= first`, so halving finds it.
fn shortest_round(first: f64, next: impl Fn(f64) -> f64) -> u64 {
    let (mut low, mut high) = (0.0, first);
    for _ in 0..100 {
        let middle = f64::midpoint(low, high);
        if next(middle) > middle { low = middle } else { high = middle }
    }
    high as u64
}

fn words(
    feasibility: Feasibility,
    expected: &Outlook,
    unique: &UniqueRate,
    terms: &Terms,
    budget: Duration,
    must_fall_by: f64,
) -> String {
    let rate = |pages: f64| format!("{:.1} MiB/s", PagesPerSecond(pages).mebibytes_per_second());
    let rates = format!(
        "in {} it writes different pages at {} ({} to {}), and the link carries {}",
        display_duration(budget),
        rate(unique.pages_per_second),
        rate(unique.low_pages_per_second),
        rate(unique.high_pages_per_second),
        rate(terms.pages_per_second().0),
    );
    let cost = format!(
        "about {} in {} rounds and {:.2} memories sent, {} of downtime",
        display_duration(Duration::from_nanos(expected.total_ns)),
        expected.rounds,
        expected.wire_ratio,
        display_duration(Duration::from_nanos(expected.downtime_ns)),
    );
    let less = format!("it would have to write {:.0} % less", (must_fall_by * 100.0).ceil());
    match feasibility {
        Feasibility::Converges => format!("pre-copy converges: {rates}; {cost}"),
        Feasibility::ConvergesSlowly => format!("pre-copy converges slowly: {rates}; {cost}"),
        Feasibility::Uncertain if expected.converges => {
            format!("pre-copy may fail to converge, if the link or the curve is at the worse end: {rates}; {cost}")
        }
        Feasibility::Uncertain => {
            format!("pre-copy may converge, if the link or the curve is at the better end: {rates}; else {less}")
        }
        Feasibility::Never => format!(
            "pre-copy never converges: {rates}; {less}, and no round gets shorter than {}",
            display_duration(Duration::from_nanos(expected.shortest_round_ns))
        ),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::curve::tests::curve_of;

    const GIB: u64 = 1 << 30;
    const DENSE: [f64; 24] = [
        0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 80.0, 120.0, 200.0, 320.0, 500.0, 800.0, 1280.0,
        2560.0, 5120.0, 10_240.0, 20_480.0, 40_960.0, 81_920.0,
    ];

    fn terms(bandwidth: f64, downtime: f64) -> Terms {
        Terms {
            bandwidth: BytesPerSecond(bandwidth as u64),
            downtime: Duration::from_secs_f64(downtime),
            switch_cost: Duration::ZERO,
            rtt: Duration::ZERO,
        }
    }

    /// One class of `bytes`, at first written at `rate` bytes per second.
    fn writer(bytes: f64, rate: f64) -> WriteCurve {
        curve_of(&[(bytes / 4096.0, rate / bytes)], &DENSE)
    }

    #[test]
    fn the_checks_of_the_literature_are_met() {
        // Peter Xu's run: 24 GiB, of which 20 GiB are written at 800 MB/s, 1.10 GB/s of goodput, 300 ms.
        let xu = forecast(&writer(20.0 * GIB as f64, 800e6), PageCount(24 << 18), &terms(1.1e9, 0.3)).unwrap();
        assert!((xu.expected.total_ns as f64 / 55.0e9 - 1.0).abs() < 0.03, "{xu:?}");
        assert!((xu.expected.wire_ratio - 2.35).abs() < 0.06, "{xu:?}");
        assert_eq!(xu.feasibility, Feasibility::ConvergesSlowly);

        // Cloud Hypervisor's log: all of 5418 MiB is hot, 2.87 s at 1886 MiB/s and no way down.
        let log =
            forecast(&writer(5418.0 * 1048576.0, 50e9), PageCount(6144 << 8), &terms(1886.0 * 1048576.0, 0.3)).unwrap();
        assert_eq!(log.feasibility, Feasibility::Never);
        assert!((log.expected.last_round_ns as f64 / 2.87e9 - 1.0).abs() < 0.02, "{log:?}");
        assert!((log.expected.shortest_round_ns as f64 / 2.87e9 - 1.0).abs() < 0.02, "{log:?}");
    }

    #[test]
    fn rounds_follow_the_table_of_the_literature() {
        // 16 GiB, 95 Gbit/s, 10 ms: rounds, final ms and wire by the share of the link and of memory that is written.
        let (memory, bandwidth) = (16.0 * GIB as f64, 95e9 / 8.0);
        for (share, of_memory, rounds, last_ms, wire) in
            [(0.1, 0.05, 2, 6.0, 1.05), (0.5, 0.25, 6, 6.8, 1.38), (0.8, 1.0, 18, 8.5, 2.91)]
        {
            let curve = writer(memory * of_memory, bandwidth * share);
            let got = forecast(&curve, PageCount(16 << 18), &terms(bandwidth, 0.01)).unwrap().expected;
            assert!(got.rounds.abs_diff(rounds) <= 1, "{share} {of_memory}: {got:?}");
            assert!((got.last_round_ns as f64 / 1e6 - last_ms).abs() < 1.5, "{share} {of_memory}: {got:?}");
            assert!((got.wire_ratio / wire - 1.0).abs() < 0.05, "{share} {of_memory}: {got:?}");
        }
    }

    #[test]
    fn a_short_window_is_drawn_on_to_the_first_round() {
        // The first round takes 24 s and the window was 1.28 s long: Peter Xu's run as it would be measured.
        let short = curve_of(&[(f64::from(20 << 18), 800e6 / (20.0 * GIB as f64))], &DENSE[..18]);
        let got = forecast(&short, PageCount(24 << 18), &terms(1.1e9, 0.3)).unwrap();
        assert!((got.expected.total_ns as f64 / 55.0e9 - 1.0).abs() < 0.1, "{got:?}");
        assert!(got.best.wire_ratio < got.expected.wire_ratio && got.expected.wire_ratio < got.worst.wire_ratio);
        assert!(!got.unique.extrapolated);
    }

    #[test]
    fn an_idle_vm_takes_one_round() {
        let idle = forecast(&curve_of(&[], &DENSE), PageCount(1 << 18), &terms(1e9, 0.03)).unwrap();
        assert_eq!(
            (idle.feasibility, idle.expected.rounds, idle.expected.last_round_ns),
            (Feasibility::Converges, 1, 0)
        );
        assert_eq!(idle.expected.wire_bytes, GIB);
        // One that fits the downtime is just stopped.
        let small = forecast(&writer(1e6, 1e9), PageCount(1000), &terms(1e9, 0.03)).unwrap();
        assert_eq!((small.feasibility, small.expected.rounds), (Feasibility::Converges, 0));
    }

    #[test]
    fn near_the_edge_the_answer_is_that_it_is_near() {
        // U(D')/D' is 95 % of the link: within a tenth of it.
        let near = forecast(&writer(64.0 * GIB as f64, 0.95e9), PageCount(64 << 18), &terms(1e9, 0.03)).unwrap();
        assert_eq!((near.feasibility, near.expected.converges), (Feasibility::Uncertain, true));
        let beyond = forecast(&writer(64.0 * GIB as f64, 2e9), PageCount(64 << 18), &terms(1e9, 0.03)).unwrap();
        assert_eq!(beyond.feasibility, Feasibility::Never);
        assert!((beyond.must_fall_by - 0.5).abs() < 0.01 && beyond.reason.contains("50 % less"), "{}", beyond.reason);
    }

    #[test]
    fn impossible_terms_are_told_apart_from_busy_vms() {
        let idle = curve_of(&[], &DENSE);
        let refused = |terms: Terms| forecast(&idle, PageCount(1), &terms).unwrap_err();
        assert_eq!(refused(terms(0.0, 1.0)), TermsError::NoBandwidth);
        let spent = Terms { switch_cost: Duration::from_millis(29), rtt: Duration::from_millis(1), ..terms(1e9, 0.03) };
        assert!(refused(spent).to_string().contains("alone take 30.00 ms"), "{}", refused(spent));
    }

    proptest! {
        /// The one number decides as the recurrence does, and the three outlooks are in order.
        #[test]
        fn the_rate_over_the_budget_decides(
            hot in 1e6..1e9f64, hot_rate in 1e7..1e11f64, cold in 1e8..1e11f64, cold_rate in 1e5..1e9f64, bandwidth in 1e8..2e10f64,
            budget in 0.002..0.5f64,
        ) {
            let curve = curve_of(&[(hot / 4096.0, hot_rate / hot), (cold / 4096.0, cold_rate / cold)], &DENSE);
            let got = forecast(&curve, PageCount(32 << 18), &terms(bandwidth, budget)).unwrap();
            let beyond = got.expected.shortest_round_ns as f64 - budget * 1e9;
            prop_assert!(beyond.abs() < 2.0 || got.expected.converges == (beyond < 0.0), "{:?}", got);
            if got.expected.converges && got.expected.rounds < MAX_ROUNDS {
                prop_assert!(got.expected.last_round_ns as f64 <= budget * 1e9 + 1.0);
            }
            prop_assert!(got.best.converges || !got.expected.converges);
            prop_assert!(got.expected.converges || !got.worst.converges);
            prop_assert!(got.expected.wire_ratio >= 1.0 || got.expected.rounds == 0);
            prop_assert_eq!(got.must_fall_by > 0.0, !got.expected.converges, "{:?}", got);
        }
    }
}

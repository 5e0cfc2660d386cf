//! Which sources of events to do without when the BPF programs take more of a core than they may.
//!
//! All programs together may use a share of one core, by the kernel's own `run_time_ns`. Above it, the sources are gone through from
//! the most worth to the least, and each stays that fits with those that stay; the others are shed. Below, they come
//! back, the most worth first, once what they would cost fits with room to spare. A source that is away costs nothing and tells nothing, so its cost is estimated: what a run cost when it was last
//! seen, times the runs to expect, which the caller may know better than the memory of the last ones. That memory fades, since a
//! storm that drove a source out may be over. Every decision comes with its reason.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// The share of one core that all programs may use together, unless configured otherwise.
pub const DEFAULT_BUDGET: f64 = 0.01;
/// A source comes back only if the estimate stays below this part of the budget.
const ROOM: f64 = 0.8;
/// A source stays away for at least so many intervals.
pub const MIN_INTERVALS_AWAY: u32 = 5;
/// After so many intervals more, a source's remembered runs count half.
const FADES_IN: u32 = 30;

/// A source that can be shed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSpec {
    /// Its name, for people.
    pub name: String,
    /// The programs that run only for it.
    pub programs: Vec<String>,
    /// Whether it tells which pages were written. Of those that told some, one is never shed.
    pub gives_pages: bool,
}

/// What one program used in the last interval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// Its name.
    pub program: String,
    /// Time on a CPU, in nanoseconds.
    pub run_time_ns: u64,
    /// How often it ran.
    pub runs: u64,
}

/// What to do with a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It is attached and stays so.
    Keep,
    /// Detach it.
    Shed,
    /// It is detached and stays so.
    StayAway,
    /// Attach it again.
    Restore,
}

/// A decision on one source.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// The source.
    pub source: String,
    /// What to do.
    pub action: Action,
    /// The part of one core that it used; of one that is away, the estimate.
    pub share_of_core: f64,
    /// Why.
    pub reason: String,
}

/// The decisions after one interval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BudgetReport {
    /// What was allowed, as a part of one core.
    pub budget_share_of_core: f64,
    /// What all programs used.
    pub used_share_of_core: f64,
    /// What is left of it once the decisions are carried out, estimates of what comes back included.
    pub expected_share_of_core: f64,
    /// Whether even that is too much, as nothing more can be shed.
    pub still_above: bool,
    /// For each source, from the least worth to the most.
    pub decisions: Vec<Decision>,
}

/// One source and what is remembered of it.
#[derive(Debug)]
struct Source {
    spec: SourceSpec,
    /// How many intervals it has been away; none when it is attached.
    away: Option<u32>,
    /// When it last ran: nanoseconds a run, and runs a second.
    ns_a_run: f64,
    runs_a_second: f64,
}

/// The judge. One for each set of loaded programs.
#[derive(Debug)]
pub struct BudgetJudge {
    budget: f64,
    sources: Vec<Source>,
}

impl BudgetJudge {
    /// A judge for `budget`, a part of one core above 0 and at most 1 (what is neither counts as [`DEFAULT_BUDGET`]); `sources` from the
    /// least worth, which is shed first, to the most; all of them attached.
    pub fn new(budget: f64, sources: Vec<SourceSpec>) -> Self {
        let budget = if budget > 0.0 && budget <= 1.0 { budget } else { DEFAULT_BUDGET };
        let sources =
            sources.into_iter().map(|spec| Source { spec, away: None, ns_a_run: 0.0, runs_a_second: 0.0 }).collect();
        Self { budget, sources }
    }

    /// Judges the last `interval`. `costs` names every program that ran, those of no source too, which always stay. `expected` are
    /// runs per second of sources that are away, where the caller can tell (the events that another source counts).
    ///
    /// The caller carries out what is decided before the next interval begins.
    pub fn judge(
        &mut self,
        interval: Duration,
        costs: &[ProgramCost],
        expected: &BTreeMap<String, f64>,
    ) -> BudgetReport {
        let ns = (interval.as_nanos() as f64).max(1.0);
        let used = costs.iter().map(|cost| cost.run_time_ns as f64).sum::<f64>() / ns;
        let shares: Vec<f64> = self.sources.iter_mut().map(|source| source.learn(ns, costs)).collect();
        let estimates: Vec<f64> = self.sources.iter().map(|source| source.estimate(expected)).collect();
        let mut decisions: Vec<Decision> = (self.sources.iter().zip(&shares).zip(&estimates))
            .map(|((source, &share), &estimate)| match source.away {
                None => source.decide(Action::Keep, share, "the budget is kept with it".to_owned()),
                Some(_) => source.decide(Action::StayAway, estimate, String::new()),
            })
            .collect();
        // What a source that is away still used, as it was detached late, ends with this interval too.
        let late: f64 =
            self.sources.iter().zip(&shares).filter(|(s, _)| s.away.is_some()).map(|(_, share)| share).sum();
        let mut rest = (used - late).max(0.0);
        if self.is_above(rest) {
            rest = self.shed(rest, used, &shares, &mut decisions);
        }
        let shed_now = decisions.iter().any(|decision| decision.action == Action::Shed);
        self.restore(&mut rest, shed_now, &estimates, &mut decisions);
        BudgetReport {
            budget_share_of_core: self.budget,
            used_share_of_core: used,
            expected_share_of_core: rest,
            still_above: self.is_above(rest),
            decisions,
        }
    }

    /// Whether `share` of a core is too much; rounding is not.
    fn is_above(&self, share: f64) -> bool {
        share > self.budget * (1.0 + 1e-9)
    }

    /// Sheds what does not fit; returns what is left of `rest`.
    fn shed(&mut self, rest: f64, used: f64, shares: &[f64], decisions: &mut [Decision]) -> f64 {
        let attached: Vec<usize> = (0..self.sources.len()).rev().filter(|&i| self.sources[i].away.is_none()).collect();
        let own = (rest - attached.iter().map(|&i| shares[i]).sum::<f64>()).max(0.0);
        // The source of pages that stays: the most worth that fits, else the cheapest. One that ran never told no pages.
        let pages = || attached.iter().copied().filter(|&i| self.sources[i].spec.gives_pages && shares[i] > 0.0);
        let must = pages()
            .find(|&i| !self.is_above(own + shares[i]))
            .or_else(|| pages().min_by(|&a, &b| shares[a].total_cmp(&shares[b])));
        let mut kept = own + must.map_or(0.0, |i| shares[i]);
        for i in attached {
            let (share, decision) = (shares[i], &mut decisions[i]);
            let reason = if must == Some(i) {
                "it is the last source of pages that stays"
            } else if share <= 0.0 {
                "it used nothing, so shedding it would save nothing"
            } else if !self.is_above(kept + share) {
                kept += share;
                "it fits with those that are worth more"
            } else {
                self.sources[i].away = Some(0);
                let reason = format!("all programs used {}, and the budget is {}", percent(used), percent(self.budget));
                *decision = self.sources[i].decide(Action::Shed, share, reason);
                continue;
            };
            reason.clone_into(&mut decision.reason);
        }
        kept
    }

    /// Lets the most worthy source come back that fits; one an interval, so that the next shows what it cost.
    fn restore(&mut self, rest: &mut f64, shed_now: bool, estimates: &[f64], decisions: &mut [Decision]) {
        let room = self.budget * ROOM;
        let full = shed_now || self.is_above(*rest);
        let mut restored = false;
        for ((source, &estimate), decision) in self.sources.iter_mut().zip(estimates).zip(decisions).rev() {
            let Some(away) = source.away.filter(|_| decision.action == Action::StayAway) else { continue };
            source.away = Some(away.saturating_add(1));
            let reason = if full {
                "others are above the budget".to_owned()
            } else if away + 1 < MIN_INTERVALS_AWAY {
                format!("away for {} of at least {MIN_INTERVALS_AWAY} intervals", away + 1)
            } else if *rest + estimate > room {
                format!(
                    "with it about {} would be used; it comes back below {}",
                    percent(*rest + estimate),
                    percent(room)
                )
            } else if restored {
                "one source at a time comes back".to_owned()
            } else {
                restored = true;
                *rest += estimate;
                source.away = None;
                let reason = format!("with it about {} of {} will be used", percent(*rest), percent(self.budget));
                *decision = source.decide(Action::Restore, estimate, reason);
                continue;
            };
            decision.reason = reason;
        }
    }
}

impl Source {
    /// Takes in what its programs used, which it returns as a share of one core.
    fn learn(&mut self, interval_ns: f64, costs: &[ProgramCost]) -> f64 {
        let mine = costs.iter().filter(|cost| self.spec.programs.contains(&cost.program));
        let (run_time, runs) =
            mine.fold((0.0, 0.0), |sum, cost| (sum.0 + cost.run_time_ns as f64, sum.1 + cost.runs as f64));
        match self.away {
            None => {
                if runs > 0.0 {
                    self.ns_a_run = run_time / runs;
                }
                self.runs_a_second = runs / interval_ns * 1e9;
            }
            Some(away) if away > 0 && away % FADES_IN == 0 => self.runs_a_second /= 2.0,
            Some(_) => {}
        }
        run_time / interval_ns
    }

    /// What it would use, as a share of one core.
    fn estimate(&self, expected: &BTreeMap<String, f64>) -> f64 {
        let told = expected.get(&self.spec.name).copied().filter(|runs| runs.is_finite() && *runs >= 0.0);
        told.unwrap_or(self.runs_a_second) * self.ns_a_run / 1e9
    }

    fn decide(&self, action: Action, share_of_core: f64, reason: String) -> Decision {
        Decision { source: self.spec.name.clone(), action, share_of_core, reason }
    }
}

fn percent(share: f64) -> String {
    format!("{:.2} % of a core", share * 100.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn spec(name: &str, gives_pages: bool) -> SourceSpec {
        SourceSpec { name: name.to_owned(), programs: vec![format!("{name}_program")], gives_pages }
    }

    /// Sources, and what each run of theirs costs.
    struct Host {
        judge: BudgetJudge,
        attached: Vec<bool>,
        ns_a_run: Vec<u64>,
    }

    impl Host {
        fn new(gives_pages: &[bool], ns_a_run: &[u64]) -> Self {
            let sources = gives_pages.iter().enumerate().map(|(i, &pages)| spec(&format!("s{i}"), pages)).collect();
            Self {
                judge: BudgetJudge::new(DEFAULT_BUDGET, sources),
                attached: vec![true; gives_pages.len()],
                ns_a_run: ns_a_run.to_vec(),
            }
        }

        /// One second with so many events for each source.
        fn second(&mut self, runs: &[u64]) -> BudgetReport {
            let costs: Vec<ProgramCost> = (0..runs.len())
                .filter(|&i| self.attached[i])
                .map(|i| ProgramCost {
                    program: format!("s{i}_program"),
                    run_time_ns: runs[i] * self.ns_a_run[i],
                    runs: runs[i],
                })
                .collect();
            let report = self.judge.judge(SECOND, &costs, &BTreeMap::new());
            for (attached, decision) in self.attached.iter_mut().zip(&report.decisions) {
                let (before, after) = match decision.action {
                    Action::Keep => (true, true),
                    Action::Shed => (true, false),
                    Action::StayAway => (false, false),
                    Action::Restore => (false, true),
                };
                assert_eq!(*attached, before, "{decision:?}");
                assert!(!decision.reason.is_empty(), "{decision:?}");
                *attached = after;
            }
            report
        }
    }

    proptest! {
        /// Whatever the events: after each interval as much is shed as must be and no more than can be; nothing comes back too soon;
        /// pages are always told.
        #[test]
        fn the_budget_is_kept_and_nothing_flutters(
            pages in prop::collection::vec(any::<bool>(), 4),
            cost in prop::collection::vec(0..2000u64, 4),
            seconds in prop::collection::vec(prop::collection::vec(prop_oneof![Just(0), 0..1000u64, 0..20_000u64], 4), 1..80),
        ) {
            let mut host = Host::new(&pages, &cost);
            let mut shed_at = [None; 4];
            for (now, runs) in seconds.iter().enumerate() {
                let before = host.attached.clone();
                let report = host.second(runs);
                let share = |i: usize| (runs[i] * cost[i]) as f64 / 1e9;
                let used: f64 = (0..4).filter(|&i| before[i]).map(share).sum();
                prop_assert!((report.used_share_of_core - used).abs() < 1e-9);
                let stayed: f64 = (0..4).filter(|&i| before[i] && host.attached[i]).map(share).sum();
                // Those that told pages, at first and at last; and those that cost something and stayed.
                let told: Vec<usize> = (0..4).filter(|&i| before[i] && pages[i] && share(i) > 0.0).collect();
                let costly: Vec<usize> = (0..4).filter(|&i| before[i] && host.attached[i] && share(i) > 0.0).collect();
                if stayed > DEFAULT_BUDGET + 1e-12 {
                    prop_assert!(report.still_above && costly.len() == 1 && told.contains(&costly[0]), "more could be shed");
                    prop_assert!(told.iter().all(|&i| share(i) >= share(costly[0])), "a cheaper source of pages could stay");
                }
                prop_assert!(told.is_empty() || told.iter().any(|&i| host.attached[i]), "no source of pages is left");
                // Nobody is shed in favour of those that are worth less.
                for i in (0..4).filter(|&i| before[i] && !host.attached[i]) {
                    let worth_more: f64 = costly.iter().filter(|&&j| j > i || told.contains(&j)).map(|&j| share(j)).sum();
                    prop_assert!(worth_more + share(i) > DEFAULT_BUDGET, "shed though it fits");
                }
                if used <= DEFAULT_BUDGET {
                    prop_assert!(report.decisions.iter().all(|d| d.action != Action::Shed), "shed without need");
                }
                let mut restored = 0;
                for i in 0..4 {
                    if before[i] && !host.attached[i] {
                        shed_at[i] = Some(now);
                    } else if !before[i] && host.attached[i] {
                        restored += 1;
                        prop_assert!(now - shed_at[i].unwrap() >= MIN_INTERVALS_AWAY as usize, "back after {}", now - shed_at[i].unwrap());
                        prop_assert!(report.expected_share_of_core <= DEFAULT_BUDGET * ROOM + 1e-12);
                    }
                }
                prop_assert!(restored <= 1);
            }
        }

        /// With events that do not change, it settles: below the budget if that is possible, and with no change for ever longer.
        #[test]
        fn a_steady_load_settles(pages in prop::collection::vec(any::<bool>(), 4), runs in prop::collection::vec(0..20_000u64, 4)) {
            let mut host = Host::new(&pages, &[1000; 4]);
            let mut changes = 0;
            for _ in 0..100 {
                let before = host.attached.clone();
                let report = host.second(&runs);
                changes += usize::from(before != host.attached);
                let stuck = pages.iter().zip(&host.attached).any(|(&pages, &attached)| pages && attached);
                prop_assert!(!report.still_above || stuck);
            }
            // Each tries to come back once its memory has faded, at most twice in so long, and is shed again.
            prop_assert!(changes <= 4 + 4 * 2 * 3, "{changes} changes");
        }
    }

    #[test]
    fn the_least_worth_goes_first_and_comes_back_last() {
        // 4 + 5 + 6.5 ms of the 10 that are allowed.
        let mut host = Host::new(&[false, false, true], &[1000; 3]);
        let busy = host.second(&[4000, 5000, 6500]);
        assert_eq!(host.attached, [false, false, true]);
        assert_eq!(busy.decisions[0].reason, "all programs used 1.55 % of a core, and the budget is 1.00 % of a core");
        assert!((busy.expected_share_of_core - 0.0065).abs() < 1e-9 && !busy.still_above);
        // Calm: 1 ms; 5 ms more fit below 8, then 4 ms more do not.
        let calm: Vec<Vec<bool>> = (0..20)
            .map(|_| {
                host.second(&[0, 5000, 1000]);
                host.attached.clone()
            })
            .collect();
        assert_eq!(calm[3], [false, false, true]);
        assert_eq!(calm[4], [false, true, true]);
        assert_eq!(calm[19], [false, true, true]);
        let told = host.second(&[0, 5000, 1000]).decisions.remove(0);
        assert!(told.reason.contains("comes back below 0.80 %"), "{told:?}");
    }

    #[test]
    fn what_costs_little_stays_beside_what_is_worth_more() {
        // The second alone is too much; the first and the last fit without it.
        let mut host = Host::new(&[false, false, true], &[1000; 3]);
        host.second(&[500, 50_000, 5000]);
        assert_eq!(host.attached, [true, false, true]);
        // Of two sources of pages that fit only one at a time, the more worthy stays; one that is silent is no reason to shed one
        // that is not.
        let mut host = Host::new(&[true, true, true], &[1000; 3]);
        host.second(&[6000, 7000, 0]);
        assert_eq!(host.attached, [false, true, true]);
        assert!(host.second(&[0, 20_000, 0]).still_above && host.attached[1]);
    }

    #[test]
    fn a_caller_that_knows_the_events_is_believed() {
        let mut judge = BudgetJudge::new(0.01, vec![spec("a", false), spec("b", true)]);
        let cost =
            |name: &str, runs| ProgramCost { program: format!("{name}_program"), run_time_ns: runs * 1000, runs };
        judge.judge(SECOND, &[cost("a", 20_000), cost("b", 1000)], &BTreeMap::new());
        let expected = |runs| BTreeMap::from([("a".to_owned(), runs)]);
        for _ in 0..10 {
            let report = judge.judge(SECOND, &[cost("b", 1000)], &expected(20_000.0));
            assert_eq!(report.decisions[0].action, Action::StayAway);
        }
        let report = judge.judge(SECOND, &[cost("b", 1000)], &expected(100.0));
        assert_eq!(report.decisions[0].action, Action::Restore);
    }

    #[test]
    fn what_belongs_to_no_source_stays_and_is_counted() {
        let mut judge = BudgetJudge::new(f64::NAN, vec![spec("a", true)]);
        let own = ProgramCost { program: "own".to_owned(), run_time_ns: 50_000_000, runs: 1 };
        let report = judge.judge(SECOND, &[own], &BTreeMap::new());
        assert!(report.still_above && (report.budget_share_of_core - DEFAULT_BUDGET).abs() < 1e-12);
        assert!(report.decisions[0].reason.contains("used nothing"), "{report:?}");
    }
}

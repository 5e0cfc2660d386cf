//! What migrations that are over say of the next one: what a switch costs besides the last pages, what the link carries, and how far predictions were off.
//!
//! Medians of the last few: one slow disk or busy host moves them little, and a changed host shows after as many migrations.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::model::BytesPerSecond;
use crate::model::foretold::{CostFrom, MigrationRecord};

/// So many of the last records are looked at.
const LAST: usize = 9;

/// What is known of a switch before it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedCost {
    /// What it costs besides the last pages and a round trip.
    pub cost: Duration,
    /// Where that was taken from.
    pub from: CostFrom,
    /// From how many migrations.
    pub migrations: u32,
}

impl FixedCost {
    /// One that nothing was measured for.
    pub const fn unmeasured(cost: Duration, from: CostFrom) -> Self {
        Self { cost, from, migrations: 0 }
    }
}

/// Values of the last records to `peer`, the newest first; else of those to any peer, and then false.
fn last(
    records: &[MigrationRecord],
    peer: Option<&str>,
    of: impl Fn(&MigrationRecord) -> Option<u64>,
) -> (Vec<u64>, bool) {
    let newest = || records.iter().rev();
    let of_peer = newest().filter(|record| Some(record.peer.as_str()) == peer).filter_map(&of).take(LAST);
    let own: Vec<u64> = of_peer.collect();
    if own.is_empty() { (newest().filter_map(&of).take(LAST).collect(), false) } else { (own, true) }
}

fn median(mut values: Vec<u64>) -> Option<u64> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

/// What a switch is to be expected to cost: the median of the last migrations to `peer`, else of the last to anybody, else `default`. `records` are the oldest first.
pub fn fixed_cost(records: &[MigrationRecord], peer: Option<&str>, default: Duration) -> FixedCost {
    let (costs, is_peers) = last(records, peer, |record| Some(record.fixed_cost_ns));
    let migrations = costs.len() as u32;
    let from = if is_peers { CostFrom::Peer } else { CostFrom::OtherPeers };
    median(costs).map_or(FixedCost::unmeasured(default, CostFrom::Default), |cost| FixedCost {
        cost: Duration::from_nanos(cost),
        from,
        migrations,
    })
}

/// What the link to `peer` carries, by its last migrations without a limit, those by `strategy` if there were any: with no limit the hosts' processors are one, and a VM that runs has its
/// part of them. None if there was none.
pub fn goodput(records: &[MigrationRecord], peer: &str, strategy: Option<&str>) -> Option<BytesPerSecond> {
    let of = |record: &MigrationRecord| {
        record.goodput_bytes_per_second.filter(|&goodput| record.limit_bytes_per_second.is_none() && goodput > 0)
    };
    of_strategy(records, peer, strategy, of).map(BytesPerSecond)
}

/// The median of the last records to `peer` by `strategy`, else of all to it.
fn of_strategy(
    records: &[MigrationRecord],
    peer: &str,
    strategy: Option<&str>,
    of: impl Fn(&MigrationRecord) -> Option<u64>,
) -> Option<u64> {
    let alike = |record: &MigrationRecord| of(record).filter(|_| Some(record.strategy.as_str()) == strategy);
    [last(records, Some(peer), alike), last(records, Some(peer), &of)]
        .into_iter()
        .find_map(|(values, is_peers)| median(values).filter(|_| is_peers))
}

/// The round trip to `peer`, by its last migrations; none if there was none.
pub fn rtt(records: &[MigrationRecord], peer: &str) -> Option<Duration> {
    let (trips, is_peers) = last(records, Some(peer), |record| Some(record.rtt_ns));
    median(trips).filter(|_| is_peers).map(Duration::from_nanos)
}

/// What a migration takes besides its rounds, its blackout and the pages that follow, by the last ones to `peer`, those by `strategy` if there were any, else to anybody; zero if there was
/// none.
pub fn setup(records: &[MigrationRecord], peer: &str, strategy: Option<&str>) -> Duration {
    let of = |record: &MigrationRecord| Some(record.setup_ns);
    of_strategy(records, peer, strategy, of)
        .or_else(|| median(last(records, None, of).0))
        .map_or(Duration::ZERO, Duration::from_nanos)
}

/// How far the predictions for one way of moving were off, without regard to the sign.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PlanErrors {
    /// The way, as `dunlin predict` names it.
    pub plan: String,
    /// Migrations that had been predicted.
    pub migrations: u32,
    /// Half of them were no further off in the total time, in percent; absent where none foresaw an end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_median_percent: Option<f64>,
    /// The furthest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_worst_percent: Option<f64>,
    /// The same of the blackout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_median_percent: Option<f64>,
    /// The furthest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_worst_percent: Option<f64>,
    /// The same of the blackout, in nanoseconds: of a short one a percentage says little.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_median_ns: Option<u64>,
    /// The furthest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_worst_ns: Option<u64>,
}

/// How far predictions were off, by way of moving.
pub fn errors(records: &[MigrationRecord]) -> Vec<PlanErrors> {
    let mut by_plan: BTreeMap<&str, Vec<&MigrationRecord>> = BTreeMap::new();
    for record in records {
        if let Some(prediction) = &record.prediction {
            by_plan.entry(&prediction.plan).or_default().push(record);
        }
    }
    let plans = by_plan.into_iter().map(|(plan, records)| {
        let percents = |of: fn(&MigrationRecord) -> Option<f64>| {
            let mut errors: Vec<f64> = records.iter().filter_map(|record| of(record)).map(f64::abs).collect();
            errors.sort_by(f64::total_cmp);
            (errors.get(errors.len() / 2).copied(), errors.last().copied())
        };
        let (total_median_percent, total_worst_percent) =
            percents(|record| record.prediction.as_ref()?.total_error_percent);
        let (blackout_median_percent, blackout_worst_percent) =
            percents(|record| record.prediction.as_ref()?.blackout_error_percent);
        let off =
            |record: &&MigrationRecord| Some(record.prediction.as_ref()?.blackout_ns?.abs_diff(record.blackout_ns));
        let blackouts: Vec<u64> = records.iter().filter_map(off).collect();
        PlanErrors {
            plan: plan.to_owned(),
            migrations: records.len() as u32,
            total_median_percent,
            total_worst_percent,
            blackout_median_percent,
            blackout_worst_percent,
            blackout_worst_ns: blackouts.iter().max().copied(),
            blackout_median_ns: median(blackouts),
        }
    });
    plans.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MigrationId;
    use crate::model::foretold::{Foretold, ForetoldFrom};

    fn record(peer: &str, fixed_ms: u64, limit: Option<u64>) -> MigrationRecord {
        MigrationRecord {
            unix_ms: 0,
            migration_id: MigrationId::random(),
            vm_name: "a".parse().unwrap(),
            peer: peer.to_owned(),
            strategy: "pre-copy".to_owned(),
            memory_bytes: 0,
            limit_bytes_per_second: limit,
            goodput_bytes_per_second: Some(fixed_ms * 1000),
            rtt_ns: fixed_ms,
            fixed_cost_ns: fixed_ms * 1_000_000,
            setup_ns: 5,
            total_ns: 1,
            blackout_ns: 10_000_000,
            wire_bytes: 1,
            prediction: None,
        }
    }

    #[test]
    fn the_last_migrations_to_the_peer_count_then_those_to_others_then_the_default() {
        let default = Duration::from_millis(3);
        let ms = |found: FixedCost| (found.cost.as_millis(), found.from, found.migrations);
        assert_eq!(ms(fixed_cost(&[], Some("b"), default)), (3, CostFrom::Default, 0));
        let mut records = vec![record("c", 7, None)];
        assert_eq!(ms(fixed_cost(&records, Some("b"), default)), (7, CostFrom::OtherPeers, 1));
        records.extend([2, 90, 1].map(|cost| record("b", cost, None)));
        assert_eq!(
            ms(fixed_cost(&records, Some("b"), default)),
            (2, CostFrom::Peer, 3),
            "one slow switch moves nothing"
        );
        // What is older than the last nine does not count.
        records.extend([5; 9].map(|cost| record("b", cost, None)));
        assert_eq!(ms(fixed_cost(&records, Some("b"), default)), (5, CostFrom::Peer, 9));
        assert_eq!(fixed_cost(&records, None, default).from, CostFrom::OtherPeers);
    }

    #[test]
    fn a_limited_migration_says_nothing_of_the_link() {
        let records = [record("b", 4, None), record("b", 1, Some(1000)), record("c", 9, None)];
        assert_eq!(goodput(&records, "b", None), Some(BytesPerSecond(4000)));
        assert_eq!((goodput(&records[1..], "b", None), rtt(&records, "d")), (None, None));
        assert_eq!(rtt(&records, "b"), Some(Duration::from_nanos(4)));
    }

    #[test]
    fn migrations_by_the_same_strategy_count_before_others() {
        let mut records = [record("b", 4, None), record("b", 6, None), record("b", 8, None), record("c", 9, None)];
        (records[0].strategy, records[0].setup_ns) = ("stop-and-copy".to_owned(), 70);
        records[3].strategy = "hybrid".to_owned();
        let of = |strategy: &str| goodput(&records, "b", Some(strategy)).map(|goodput| goodput.0);
        assert_eq!([of("stop-and-copy"), of("hybrid")], [Some(4000), Some(6000)], "another host's says nothing");
        let setup_of = |strategy: &str| setup(&records, "b", Some(strategy)).as_nanos();
        assert_eq!([setup_of("stop-and-copy"), setup_of("hybrid")], [70, 5]);
    }

    #[test]
    fn errors_are_told_by_plan_without_their_sign() {
        let foretold = |plan: &str, percent: f64, blackout_ns| Foretold {
            plan: plan.to_owned(),
            from: ForetoldFrom::Curve,
            bandwidth_bytes_per_second: 1,
            fixed_cost_ns: 0,
            fixed_cost_from: CostFrom::Default,
            total_ns: Some(1),
            blackout_ns,
            wire_bytes: 1,
            rounds: 1,
            total_error_percent: Some(percent),
            blackout_error_percent: None,
            wire_error_percent: None,
        };
        let with = |prediction| MigrationRecord { prediction: Some(prediction), ..record("b", 1, None) };
        let records = [
            with(foretold("pre-copy", -20.0, Some(12_000_000))),
            with(foretold("pre-copy", 5.0, Some(9_000_000))),
            with(foretold("pre-copy", 10.0, None)),
            record("b", 1, None),
            with(foretold("hybrid", 1.0, None)),
        ];
        let [hybrid, pre_copy] = <[PlanErrors; 2]>::try_from(errors(&records)).unwrap();
        assert_eq!((hybrid.plan.as_str(), hybrid.migrations, hybrid.blackout_worst_ns), ("hybrid", 1, None));
        assert_eq!((pre_copy.migrations, pre_copy.total_median_percent), (3, Some(10.0)));
        assert_eq!((pre_copy.total_worst_percent, pre_copy.blackout_worst_ns), (Some(20.0), Some(2_000_000)));
    }
}

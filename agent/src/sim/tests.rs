//! Whole migrations under every seed, strategy and fault.

use super::*;
use crate::migrate::outcomes::Whereabouts;
use crate::model::Ending;

#[test]
fn plain_migrations_move_the_vm() {
    for seed in 0..200 {
        let run = simulate(&Scenario::random(seed));
        assert!(run.violations.is_empty(), "seed {seed}: {:#?}\n{}", run.violations, run.trace);
        assert_eq!(run.ending(), Some(Ending::Moved), "seed {seed}: {run:#?}");
        assert_eq!(run.left, Whereabouts::RunsAtTarget, "seed {seed}");
    }
}

#[test]
fn one_seed_is_one_order_of_events() {
    for seed in 0..20 {
        let (first, second) = (simulate(&Scenario::random(seed)), simulate(&Scenario::random(seed)));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.report, second.report, "seed {seed}");
        eprintln!(
            "{} {:?}",
            first.operations,
            first.report.map(|r| (r.rounds.len(), r.streams, r.strategy, r.blackout_ns, r.reason))
        );
    }
}

#[test]
fn a_machine_that_forgets_dirty_pages_is_found_out() {
    let caught = (0..20)
        .filter(|&seed| {
            let mut scenario = Scenario::new(seed);
            scenario.forget_one_dirty_page_in = Some(20);
            simulate(&scenario).violations.iter().any(|violation| violation.contains("I3"))
        })
        .count();
    assert!(caught >= 15, "only {caught} of 20 machines that lose writes were found out");
}

pub(super) fn all_faults() -> Vec<Fault> {
    use std::time::Duration;
    let heals = |ms| Some(Duration::from_millis(ms));
    let stall = |from_source, from_target, heals_after| Fault::Stall { from_source, from_target, heals_after };
    vec![
        Fault::KillManager(Side::Source),
        Fault::KillMachine(Side::Source),
        Fault::KillManager(Side::Target),
        Fault::KillMachine(Side::Target),
        Fault::Cut { heals_after: None },
        Fault::Cut { heals_after: heals(50) },
        Fault::Cut { heals_after: heals(2500) },
        stall(true, true, None),
        stall(true, false, None),
        stall(false, true, None),
        stall(true, true, heals(500)),
        stall(true, true, heals(4000)),
        stall(true, false, heals(4000)),
        stall(false, true, heals(4000)),
        Fault::DiskFull(Side::Source),
        Fault::DiskFull(Side::Target),
        Fault::DieAfterAppend(Side::Source),
        Fault::DieAfterAppend(Side::Target),
        Fault::Cancel(Side::Source),
        Fault::Cancel(Side::Target),
    ]
}

#[test]
fn explore() {
    use std::collections::BTreeMap;
    let mut seen: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let mut bad = BTreeMap::new();
    let started = std::time::Instant::now();
    let mut runs = 0;
    let mut note = |scenario: Scenario, name: String| {
        let fault = scenario.faults[0].1;
        let run = simulate(&scenario);
        runs += 1;
        let Some((_, window)) = run.struck.first() else { return };
        let key = format!(
            "{window:?} {fault:?}: {:?} found {:?} left {:?} stale {}",
            run.ending(),
            run.found,
            run.left,
            run.stale_prepared
        );
        let entry = seen.entry(key).or_insert((0, name.clone()));
        entry.0 += 1;
        for violation in &run.violations {
            let v = violation.split(": ").skip(1).collect::<Vec<_>>().join(": ");
            bad.entry(format!("{window:?} {fault:?}: {}", v.split('[').next().unwrap()))
                .or_insert((0, name.clone()))
                .0 += 1;
        }
    };
    for fault in all_faults() {
        for side in Side::BOTH {
            for &step in crate::model::Step::ALL {
                for seed in 0..3 {
                    note(Scenario::new(seed).with(Trigger::Step(side, step), fault), format!("{side:?} {step} {seed}"));
                }
            }
        }
        if std::env::var_os("OPS").is_some() {
            let all = simulate(&Scenario::new(7)).operations;
            for n in 1..=all {
                note(Scenario::new(7).with(Trigger::Operation(n), fault), format!("op {n}"));
            }
        }
    }
    let mut out = String::new();
    for (key, (n, name)) in &seen {
        out += &format!("{n:5} {key}   [{name}]\n");
    }
    out += "BAD\n";
    for (key, (n, name)) in &bad {
        out += &format!("{n:5} {key}   [{name}]\n");
    }
    out += &format!("{runs} runs in {:?}\n", started.elapsed());
    std::fs::write("/tmp/sim-explore.txt", out).unwrap();
}

//! Whole migrations under every seed, strategy and fault. `DUNLIN_SIM_SCALE=n` runs n times as many.

use std::collections::BTreeSet;
use std::time::Duration;

use super::*;
use crate::migrate::outcomes::{
    Failure, LENT_OUTCOMES, OUTCOMES, OWING_OUTCOMES, Whereabouts, Window, outcome, outcome_lent, outcome_owing,
};
use crate::migrate::{Compress, OnStuck, Reducers, Safety, Strategy};
use crate::model::{BytesPerSecond, Ending, Step};

/// Says at the end of a test how many migrations it has simulated.
struct Told(&'static str);

impl Drop for Told {
    fn drop(&mut self) {
        println!("{}: {} simulated migrations", self.0, run::COUNT.load(std::sync::atomic::Ordering::Relaxed));
    }
}

fn scale() -> u64 {
    std::env::var("DUNLIN_SIM_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Every fault, in all its forms.
fn all_faults() -> Vec<Fault> {
    let heals = |milliseconds| Some(Duration::from_millis(milliseconds));
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

/// The steps that each side passes in a migration that goes well.
fn all_steps() -> Vec<(Side, Step)> {
    use Step::*;
    let source = [Connected, Offered, Reserved, Round, Paused, StateMoved, Prepared, Released, Running, Discarded];
    let target = [Offered, Reserved, StateMoved, Prepared, Owned, Announced, Running];
    source.into_iter().map(|step| (Side::Source, step)).chain(target.map(|step| (Side::Target, step))).collect()
}

fn assert_unbroken(run: &Run, scenario: &Scenario) {
    assert!(run.violations.is_empty(), "{:#?}\n{scenario:?}\n{run:#?}\n{}", run.violations, run.trace);
}

/// Compares a run with one fault with its row of the outcome table.
fn assert_in_table(run: &Run, scenario: &Scenario) -> Option<(Failure, Window)> {
    assert_unbroken(run, scenario);
    let &[(fault, window)] = &run.struck[..] else { return None };
    let failure = fault.failure()?;
    let row = match scenario.safety {
        _ if !scenario.may_run_owing() => outcome,
        Some(_) => outcome_lent,
        None => outcome_owing,
    };
    let row = row(failure, window).expect("the table is complete");
    let end = (run.ending(), run.found);
    let told = format!("{scenario:?}\n{run:#?}\n{}", run.trace);
    assert!(row.ends.contains(&end), "{failure}, {window}: {end:?} is not in the table\n{told}");
    assert!(row.copy_may_wait || !run.stale_prepared, "{failure}, {window}: a prepared copy was left\n{told}");
    // What waits goes on with nothing lost once it is resolved.
    let crashed = run.found == Whereabouts::Crashed;
    assert!(
        crashed || matches!(run.left, Whereabouts::RunsAtSource | Whereabouts::RunsAtTarget),
        "{failure}, {window}: the VM is {} in the end\n{told}",
        run.left
    );
    Some((failure, window))
}

#[test]
fn plain_migrations_move_the_vm() {
    let _told = Told("plain_migrations_move_the_vm");
    for seed in 0..200 * scale() {
        let scenario = Scenario::random(seed);
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        assert_eq!(run.ending(), Some(Ending::Moved), "seed {seed}: {run:#?}");
        assert_eq!(run.left, Whereabouts::RunsAtTarget, "seed {seed}");
    }
}

/// A writer that no link carries is slowed, and by no more than it takes; without that, pre-copy gives up and the VM stands for as long as what is left takes.
#[test]
fn a_writer_that_would_keep_it_from_ending_is_slowed() {
    for seed in 0..6 * scale() {
        let mut scenario = Scenario::new(seed);
        scenario.guest.writes_per_second = 50_000;
        scenario.guest.working_set = 6000;
        scenario.guest.hot_set = 5000;
        scenario.guest.busy = Duration::from_secs(60);
        scenario.network.bandwidth = BytesPerSecond(20 << 20);
        scenario.network.latency = Duration::from_micros(100);
        scenario.downtime = Duration::from_millis(15);
        let blackout = |on_stuck| {
            scenario.on_stuck = on_stuck;
            let run = simulate(&scenario);
            assert_unbroken(&run, &scenario);
            assert_eq!(run.ending(), Some(Ending::Moved), "seed {seed}: {run:#?}");
            run.report.unwrap()
        };
        let mut blackout = blackout;
        let (stopped, stunned) = (blackout(OnStuck::Stop), blackout(OnStuck::Stun));
        assert!(stopped.reason.contains("gave up") && stopped.blackout_ns > 500_000_000, "seed {seed}: {stopped:#?}");
        assert!(stunned.reason.is_empty(), "seed {seed}: {stunned:#?}");
        assert!(stunned.blackout_ns < 15_000_000, "seed {seed}: {stunned:#?}");
        let stun = stunned.stun.as_ref().unwrap();
        assert!(stun.vcpus.len() == 1 && stun.guest_time_lost_ns > 0 && stun.gave_up.is_empty(), "{stun:#?}");
        // What is not zero, sent once. A tenth of a second has passed before anything is known, a tenth of it all here.
        let full: u64 = stunned.rounds[0].pages - stunned.rounds[0].zero_pages;
        let ideal_ns = full * 4096 * 1_000_000_000 / (20 << 20);
        assert!(stunned.total_ns < ideal_ns * 9 / 5, "seed {seed}: {ideal_ns} {stunned:#?}");
    }
}

#[test]
fn one_seed_is_one_order_of_events() {
    let mut hashes = BTreeSet::new();
    for seed in 0..10 {
        let fault = all_faults()[seed as usize];
        let scenario = Scenario::random(seed).with(Trigger::Operation(100 + 40 * seed), fault);
        let (first, second) = (simulate(&scenario), simulate(&scenario));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.report, second.report, "seed {seed}");
        hashes.insert(first.trace_hash);
    }
    assert_eq!(hashes.len(), 10, "other seeds must give other orders");
}

#[test]
fn broken_machines_are_found_out() {
    let finds = |sabotage, invariant: &str, trigger, fault| {
        (0..20)
            .filter(|&seed| {
                let mut scenario = Scenario::new(seed).with(trigger, fault);
                scenario.sabotage = Some(sabotage);
                scenario.guest.writes_per_second = 100_000;
                simulate(&scenario).violations.iter().any(|violation| violation.contains(invariant))
            })
            .count()
    };
    let never = (Trigger::Operation(u64::MAX), Fault::FlipPageBit);
    let forgets = finds(Sabotage::ForgetsWrites, "I3", never.0, never.1);
    assert!(forgets >= 10, "only {forgets} of 20 machines that lose writes were found out");
    let killed = (Trigger::Step(Side::Source, Step::Released), Fault::KillManager(Side::Source));
    let resumes = finds(Sabotage::ResumesAfterReleased, "I", killed.0, killed.1);
    assert!(resumes >= 10, "only {resumes} of 20 machines with a broken gate were found out");
    let killed = (Trigger::Step(Side::Source, Step::Paused), Fault::KillManager(Side::Source));
    assert_eq!(finds(Sabotage::KeepsLogging, "I4", killed.0, killed.1), 20);
}

/// Somebody in the target's network has the VM's address: a target that is to refuse does so while the VM runs, however short the migration is.
#[test]
fn a_conflict_is_known_before_the_vm_stands() {
    use crate::announce::conflict::OnConflict;
    for seed in 0..60 * scale() {
        let mut scenario = Scenario::random(seed);
        scenario.conflict = Some(OnConflict::Refuse);
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        let report = run.report.as_ref().unwrap();
        assert_eq!((report.ending, run.left), (Ending::Refused, Whereabouts::RunsAtSource), "seed {seed}: {run:#?}");
        assert_eq!(report.blackout_ns, 0, "seed {seed}: it stood for it: {report:#?}");
        assert!(report.reason.contains("answers for 10.0.0.1"), "{}", report.reason);
        let asked = report.network.as_ref().and_then(|network| network.asked.as_ref());
        assert_eq!(asked.map(|asked| asked.conflicts.len()), Some(1), "seed {seed}: {report:#?}");

        scenario.conflict = Some(OnConflict::Warn);
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        assert_eq!(run.ending(), Some(Ending::Moved), "seed {seed}: {run:#?}");
    }
}

/// The same while something else goes wrong.
#[test]
fn faults_beside_a_conflict_lose_nothing() {
    use crate::announce::conflict::OnConflict;
    for (policy, seeds) in [(OnConflict::Refuse, 0..scale()), (OnConflict::Warn, 0..scale())] {
        for (side, step) in all_steps() {
            for fault in all_faults() {
                for seed in seeds.clone() {
                    let seed = seed * 1000 + step as u64 * 20 + side as u64;
                    let mut scenario = Scenario::new(seed).with(Trigger::Step(side, step), fault);
                    scenario.conflict = Some(policy);
                    assert_unbroken(&simulate(&scenario), &scenario);
                }
            }
        }
    }
}

/// A guest that frees pages all the time, and uses again at once what it has named as free.
fn freeing(seed: u64) -> Scenario {
    let mut scenario = Scenario::new(seed);
    scenario.reducers.free_pages = true;
    scenario.guest.frees_one_in = 2;
    scenario.guest.writes_per_second = 100_000;
    scenario.guest.working_set = 3000;
    scenario.guest.hot_set = 1000;
    scenario
}

#[test]
fn free_pages_are_left_out_and_none_is_lost_that_is_used_again() {
    let spared = |run: &Run| {
        let report = run.report.as_ref().unwrap();
        let free = report.reducers.iter().find(|reducer| reducer.name == "free-pages").unwrap();
        assert_eq!(free.reason, "");
        (free.pages, report.wire_bytes)
    };
    for seed in 0..60 * scale() {
        let mut scenario = freeing(seed);
        scenario.strategy = if seed % 3 == 0 { Strategy::Hybrid } else { Strategy::PreCopy };
        // Hashes of all memory know of them.
        scenario.verify = seed % 3 == 1;
        scenario.reducers.dedup = seed % 2 == 0;
        scenario.reducers.delta_bytes = if seed % 4 < 2 { 1 << 20 } else { 0 };
        scenario.network.bandwidth = BytesPerSecond((8 << 20) << (seed % 4));
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        assert_eq!((run.ending(), run.left), (Some(Ending::Moved), Whereabouts::RunsAtTarget), "seed {seed}: {run:#?}");
        // All but the working set was never used.
        assert!(spared(&run).0 > scenario.memory_pages - 3000, "seed {seed}: {run:#?}");
    }
}

/// What is written before its page goes travels with it, also where writes are logged long before.
#[test]
fn asking_for_free_pages_leaves_no_more_behind_the_first_round() {
    let left = |seed: u64, free_pages: bool| {
        let mut scenario = Scenario::new(seed);
        scenario.reducers.free_pages = free_pages;
        scenario.guest.working_set = 6000;
        scenario.guest.hot_set = 6000;
        scenario.guest.busy = Duration::from_secs(10);
        scenario.network.bandwidth = BytesPerSecond(40 << 20);
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        run.report.unwrap().rounds[0].dirtied_pages
    };
    let [without, with] = [false, true].map(|free_pages| (0..10).map(|seed| left(seed, free_pages)).sum::<u64>());
    assert!(with * 10 < without * 11, "{with} pages are left instead of {without}");
}

#[test]
fn a_guest_asked_for_free_pages_before_its_writes_are_logged_is_found_out() {
    let found = |seed: &u64| {
        let mut scenario = freeing(*seed);
        // Slow enough for it to be asked before later rounds, too.
        scenario.network.bandwidth = BytesPerSecond(8 << 20);
        scenario.sabotage = Some(Sabotage::NamesOldFreePages);
        simulate(&scenario).violations.iter().any(|violation| violation.contains("I3"))
    };
    let found = (0..20).filter(found).count();
    assert!(found >= 10, "only {found} of 20 were found out");
}

#[test]
fn faults_at_every_step_end_as_the_table_says() {
    let _told = Told("faults_at_every_step_end_as_the_table_says");
    let mut reached = BTreeSet::new();
    for (side, step) in all_steps() {
        for fault in all_faults() {
            for seed in 0..scale() {
                let seed = seed * 1000 + step as u64 * 20 + side as u64;
                let mut scenario = Scenario::new(seed).with(Trigger::Step(side, step), fault);
                scenario.streams = 1 + (seed % 3) as u16;
                reached.extend(assert_in_table(&simulate(&scenario), &scenario));
            }
        }
    }
    for row in OUTCOMES {
        assert!(reached.contains(&(row.failure, row.when)), "{}, {}: no run came here", row.failure, row.when);
    }
}

#[test]
fn faults_before_every_operation_end_as_the_table_says() {
    let _told = Told("faults_before_every_operation_end_as_the_table_says");
    let faults = all_faults();
    for seed in 0..scale() {
        let scenario = Scenario::new(seed + 7);
        let operations = simulate(&scenario).operations;
        for operation in 1..=operations {
            // The handover is short: every fault at each of its operations. Before it they take turns.
            let every = operation + 70 > operations;
            let turn = (operation + seed) as usize % faults.len();
            for (index, &fault) in faults.iter().enumerate() {
                if every || index == turn {
                    let scenario = scenario.clone().with(Trigger::Operation(operation), fault);
                    assert_in_table(&simulate(&scenario), &scenario);
                }
            }
        }
    }
}

#[test]
fn several_faults_break_no_invariant() {
    let _told = Told("several_faults_break_no_invariant");
    for seed in 0..300 * scale() {
        let mut rng = rng::Rng(seed ^ 0xfa17);
        let mut scenario = Scenario::random(seed);
        let operations = simulate(&scenario).operations;
        for _ in 0..=rng.below(3) {
            let fault = all_faults()[rng.below(20) as usize];
            let late = operations.saturating_sub(rng.below(80));
            let operation = if rng.one_in(3) { 1 + rng.below(operations) } else { late.max(1) };
            scenario = scenario.with(Trigger::Operation(operation), fault);
        }
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        let machine_died =
            run.struck.iter().any(|(fault, _)| matches!(fault, Fault::KillMachine(_) | Fault::DieAfterAppend(_)));
        assert!(machine_died || run.left != Whereabouts::Crashed, "seed {seed}: {run:#?}");
    }
}

/// Longer than a paused VM waits for its target: it is waited for while the VM runs.
#[test]
fn a_boot_image_that_takes_long_does_not_lengthen_the_blackout() {
    for strategy in [Strategy::PreCopy, Strategy::StopAndCopy] {
        let mut scenario = Scenario::new(1);
        scenario.strategy = strategy;
        scenario.stall = Duration::from_secs(10);
        scenario.image_cost = Duration::from_secs(5);
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        assert_eq!((run.ending(), run.left), (Some(Ending::Moved), Whereabouts::RunsAtTarget), "{run:#?}");
    }
}

#[test]
fn a_flipped_bit_is_found_by_digest_or_verify() {
    for seed in 0..20 {
        let mut scenario = Scenario::new(seed).with(Trigger::Step(Side::Source, Step::Round), Fault::FlipPageBit);
        scenario.verify = true;
        // Packed, a bit may be many.
        if seed % 2 == 1 {
            let compress = if seed % 4 == 1 { Compress::Lz4 } else { Compress::Zstd(1) };
            scenario.reducers = Reducers { compress, delta_bytes: 1 << 20, dedup: true, ..Reducers::default() };
        }
        // A page that is written again heals by itself: keep the guest from it.
        scenario.guest.writes_per_second = 0;
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        assert_eq!(
            (run.ending(), run.left),
            (Some(Ending::Failed), Whereabouts::RunsAtSource),
            "seed {seed}: {run:#?}"
        );
        let mut scenario = Scenario::new(seed).with(Trigger::Step(Side::Source, Step::Paused), Fault::FlipPageBit);
        scenario.strategy = Strategy::StopAndCopy;
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        assert_eq!(run.ending(), Some(Ending::Failed), "seed {seed}: {run:#?}");
    }
}

/// The strategies by which the VM runs before its memory is there.
const OWING: [Strategy; 3] = [Strategy::PostCopy, Strategy::Hybrid, Strategy::DemandPaging];

#[test]
fn faults_at_every_step_of_a_vm_that_is_owed_pages_end_as_the_table_says() {
    let _told = Told("faults_at_every_step_of_a_vm_that_is_owed_pages_end_as_the_table_says");
    let mut reached = BTreeSet::new();
    for (side, step) in all_steps() {
        for (index, fault) in all_faults().into_iter().enumerate() {
            for turn in 0..2 * scale() {
                let seed = turn * 1000 + step as u64 * 20 + side as u64;
                let mut scenario = Scenario::new(seed).with(Trigger::Step(side, step), fault);
                scenario.strategy = OWING[(index + step as usize + turn as usize) % 3];
                scenario.streams = 1 + (seed % 3) as u16;
                reached.extend(assert_in_table(&simulate(&scenario), &scenario));
            }
        }
    }
    for row in OWING_OUTCOMES.iter().filter(|row| row.when == Window::Owing) {
        assert!(reached.contains(&(row.failure, row.when)), "{}, {}: no run came here", row.failure, row.when);
    }
}

/// Whatever strikes while pages are owed, and whenever: on slow and fast links, with writers slow and fast.
#[test]
fn faults_at_any_time_of_a_vm_that_is_owed_pages_end_as_the_table_says() {
    let _told = Told("faults_at_any_time_of_a_vm_that_is_owed_pages_end_as_the_table_says");
    let mut sent_twice = 0;
    for seed in 0..150 * scale() {
        let mut rng = rng::Rng(seed ^ 0x0e1d);
        let mut scenario = Scenario::random(seed);
        scenario.strategy = OWING[rng.below(3) as usize];
        if rng.one_in(4) {
            // It is seen not to end.
            (scenario.strategy, scenario.on_stuck) = (Strategy::PreCopy, OnStuck::PostCopy);
            scenario.guest.working_set = 3000;
            scenario.guest.hot_set = 2000;
            scenario.network.bandwidth = BytesPerSecond(16 << 20);
        }
        scenario.guest.writes_per_second = [0, 300, 5_000, 20_000][rng.below(4) as usize];
        let operations = simulate(&scenario).operations;
        let fault = all_faults()[rng.below(20) as usize];
        let scenario = scenario.with(Trigger::Operation(1 + rng.below(operations)), fault);
        let run = simulate(&scenario);
        assert_in_table(&run, &scenario);
        // A manager that takes another's place ends it.
        if let Some(recovered) = &run.recovered {
            assert_eq!(recovered.ending, Ending::Moved, "seed {seed}: {run:#?}");
        }
        let owed = run.report.as_ref().and_then(|report| report.post_copy.as_ref());
        sent_twice += owed.map_or(0, |owed| owed.sent_pages.saturating_sub(owed.owed_pages));
    }
    assert!(sent_twice > 0, "what was on its way when contact was lost is sent again");
}

#[test]
fn what_never_held_data_is_not_owed_and_what_is_written_meanwhile_is() {
    for strategy in [Strategy::PostCopy, Strategy::DemandPaging] {
        for seed in 0..20 {
            let mut scenario = Scenario::new(seed);
            (scenario.strategy, scenario.guest.working_set) = (strategy, 600);
            scenario.guest.writes_per_second = 200_000;
            let run = simulate(&scenario);
            assert!(run.violations.is_empty(), "{run:#?}");
            let report = run.report.unwrap();
            let owed = report.post_copy.unwrap().owed_pages;
            assert!((1..=600).contains(&owed), "{strategy}: {owed} of {} bytes", report.memory_bytes);
        }
    }
}

#[test]
fn what_is_written_all_the_time_is_sent_ahead_with_what_lies_around_it() {
    for seed in 0..20 {
        let mut scenario = Scenario::new(seed);
        (scenario.strategy, scenario.guest.working_set, scenario.guest.hot_set) = (Strategy::PostCopy, 2000, 3);
        scenario.guest.writes_per_second = 200_000;
        let run = simulate(&scenario);
        assert!(run.violations.is_empty(), "{run:#?}");
        let rounds = run.report.unwrap().rounds;
        let ahead = rounds.iter().map(|round| (round.pages, round.paused)).collect::<Vec<_>>();
        assert!(matches!(ahead[..], [(pages, false)] if (4..=512).contains(&pages)), "seed {seed}: {ahead:?}");
        scenario.strategy = Strategy::DemandPaging;
        assert_eq!(
            simulate(&scenario).report.unwrap().rounds.len(),
            0,
            "of that nothing is sent but what is asked for"
        );
    }
}

#[test]
fn a_machine_that_does_not_wait_for_missing_pages_is_found_out() {
    let found = |seed: &u64| {
        let seed = *seed;
        let killed = (Trigger::Step(Side::Source, Step::Running), Fault::KillManager(Side::Target));
        let mut scenario = Scenario::new(seed).with(killed.0, killed.1);
        scenario.strategy = Strategy::DemandPaging;
        scenario.sabotage = Some(Sabotage::ClosesFaults);
        simulate(&scenario).violations.iter().any(|violation| violation.contains("I3"))
    };
    let found = (0..20).filter(found).count();
    assert!(found >= 10, "only {found} of 20 were found out");
}

/// Leases and increments of a simulation.
const SAFETY: Safety = Safety { lease: Duration::from_millis(800), every: Duration::from_millis(15) };

/// A VM on loan: a slow link, so that it is owed pages for some time.
fn on_loan(seed: u64, strategy: Strategy) -> Scenario {
    let mut scenario = Scenario::new(seed);
    (scenario.strategy, scenario.safety) = (strategy, Some(SAFETY));
    scenario.guest.working_set = 600;
    scenario.guest.hot_set = 100;
    scenario.guest.busy = Duration::from_secs(60);
    scenario.guest.writes_per_second = 3000;
    scenario.network.bandwidth = BytesPerSecond(8 << 20);
    scenario
}

#[test]
fn a_vm_on_loan_arrives_and_has_sent_increments_back() {
    let mut increments = 0;
    for seed in 0..12 * scale() {
        let scenario = on_loan(seed, OWING[seed as usize % 3]);
        let run = simulate(&scenario);
        assert_unbroken(&run, &scenario);
        assert_eq!((run.ending(), run.left), (Some(Ending::Moved), Whereabouts::RunsAtTarget), "{seed}: {run:#?}");
        let report = run.report.unwrap();
        let loan = report.loan.unwrap();
        assert_eq!(loan.taken_back_increment, None);
        increments += loan.increments;
    }
    assert!(increments > 60, "{increments}");
}

#[test]
fn faults_at_every_step_of_a_loan_end_as_the_table_says() {
    let _told = Told("faults_at_every_step_of_a_loan_end_as_the_table_says");
    let mut reached = BTreeSet::new();
    let lent = [Side::Source, Side::Target].map(|side| (side, Step::Lent));
    for (side, step) in all_steps().into_iter().chain(lent) {
        for (index, fault) in all_faults().into_iter().enumerate() {
            for seed in 0..scale() {
                let seed = seed * 1000 + step as u64 * 20 + side as u64;
                let mut scenario =
                    on_loan(seed, OWING[(index + step as usize) % 3]).with(Trigger::Step(side, step), fault);
                scenario.streams = 1 + (seed % 3) as u16;
                reached.extend(assert_in_table(&simulate(&scenario), &scenario));
            }
        }
    }
    for row in LENT_OUTCOMES {
        assert!(reached.contains(&(row.failure, row.when)), "{}, {}: no run came here", row.failure, row.when);
    }
}

/// Whatever strikes a loan, and whenever. What is taken back has had increments, mostly.
#[test]
fn faults_at_any_time_of_a_loan_end_as_the_table_says() {
    let _told = Told("faults_at_any_time_of_a_loan_end_as_the_table_says");
    let (mut taken_back, mut advanced) = (0, 0);
    for seed in 0..150 * scale() {
        let mut rng = rng::Rng(seed ^ 0x1ea5e);
        let mut scenario = on_loan(seed, OWING[rng.below(3) as usize]);
        scenario.guest.writes_per_second = [0, 300, 3_000, 20_000][rng.below(4) as usize];
        scenario.streams = 1 + rng.below(3) as u16;
        let operations = simulate(&scenario).operations;
        let fault = all_faults()[rng.below(20) as usize];
        let scenario = scenario.with(Trigger::Operation(1 + rng.below(operations)), fault);
        let run = simulate(&scenario);
        assert_in_table(&run, &scenario);
        let loan = run.report.as_ref().and_then(|report| report.loan.as_ref());
        let increment = loan.and_then(|loan| loan.taken_back_increment);
        taken_back += u64::from(increment.is_some());
        advanced += u64::from(increment.is_some_and(|increment| increment > 0));
    }
    assert!(taken_back > 20 && advanced > 15, "{taken_back} were taken back, {advanced} from an increment");
}

#[test]
fn a_machine_that_outruns_its_lease_is_found_out() {
    let found = |seed: &u64| {
        let mut scenario = on_loan(*seed, Strategy::DemandPaging)
            .with(Trigger::Step(Side::Source, Step::Lent), Fault::Cut { heals_after: None });
        scenario.sabotage = Some(Sabotage::OutrunsLease);
        simulate(&scenario).violations.iter().any(|violation| violation.contains("I1"))
    };
    let found = (0..20).filter(found).count();
    assert!(found >= 10, "only {found} of 20 were found out");
}

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

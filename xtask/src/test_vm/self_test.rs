//! Whether the test machine notices what goes wrong: tests that fail, hang, leave a process, run out of memory, and a kernel that panics.
//!
//! The tests are `tests/tests/bed_faults.rs`. What is expected of each is the table below.

use dunlin_linux::protocol::Verdict;

use super::report::Report;
use crate::summary::Totals;

/// The suite of tests that go wrong.
pub(super) const SUITE: &str = "bed_faults";
/// The variable without which they refuse to run.
pub(super) const ALLOWED: &str = "DUNLIN_BED_FAULTS";
/// How long one of them may take.
pub(super) const LIMIT_S: u64 = 15;

/// What must be said of each test: its verdict, and words in its detail.
const EXPECTED: [(&str, Verdict, &str); 5] = [
    ("a_fine_test", Verdict::Passed, ""),
    ("b_fails", Verdict::Failed, "exit status: 101"),
    ("c_hangs_with_a_child", Verdict::TimedOut, "killed with all that it started"),
    ("d_leaves_a_process", Verdict::Failed, "left running: sleep"),
    ("e_runs_out_of_memory", Verdict::Failed, "ran out of memory"),
];
/// The test during which the machine must die.
const PANICS: &str = "f_panics_the_kernel";

/// Compares what a run said with what it should have.
pub(super) fn judge(report: &Report) -> Totals {
    let mut totals = Totals::default();
    let mut check = |what: &str, fine: bool, found: &str| {
        println!(
            "{:4} self-test: {what}{}",
            if fine { "PASS" } else { "FAIL" },
            if fine { String::new() } else { format!(": {found}") }
        );
        if fine { totals.passed += 1 } else { totals.failed += 1 }
    };
    for (name, verdict, words) in EXPECTED {
        let test = report.tests.iter().find(|test| test.name == name);
        let fine = test
            .is_some_and(|test| test.verdict == verdict && test.detail.as_deref().unwrap_or_default().contains(words));
        check(name, fine, &format!("{test:?}"));
    }
    let problem = report.problem.as_deref().unwrap_or_default();
    check(PANICS, problem.contains("without a verdict") && problem.contains(PANICS), problem);
    totals
}

#[cfg(test)]
mod tests {
    use super::super::report::Test;
    use super::*;

    #[test]
    fn only_what_was_expected_is_fine() {
        let mut report = Report::default();
        assert_eq!(judge(&report).passed, 0);
        report.tests.extend(EXPECTED.map(|(name, verdict, words)| Test {
            suite: SUITE.into(),
            name: name.into(),
            verdict,
            detail: Some(words.into()),
            took_ms: 0,
            first_try: None,
        }));
        report.problem = Some(format!("it ended without a verdict during bed_faults::{PANICS} (...)"));
        assert_eq!(judge(&report), Totals { passed: 6, failed: 0, skipped: 0, at_second_try: 0 });
        report.tests[2].verdict = Verdict::Passed;
        assert_eq!(judge(&report), Totals { passed: 5, failed: 1, skipped: 0, at_second_try: 0 });
    }
}

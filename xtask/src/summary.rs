//! Reading the totals out of a test runner's output.

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Ran and were fine.
    pub(crate) passed: u64,
    /// Ran and were not, or died, or hung.
    pub(crate) failed: u64,
    /// Did not run.
    pub(crate) skipped: u64,
    /// Those of the passed that were fine only when they were run once more.
    pub(crate) at_second_try: u64,
}

/// A test runner, by how it sums up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runner {
    /// `Summary [...]`, once. It passes on what a failed test printed, libtest's summary of that one test among it.
    Nextest,
    /// `test result: ...`, once a binary.
    Libtest,
}

impl Totals {
    /// Takes in what another runner counted.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.at_second_try += other.at_second_try;
    }

    /// Takes in one line of a runner's output, if it is a summary.
    pub(crate) fn read(&mut self, runner: Runner, line: &str) {
        let line = line.trim();
        let counts = match runner {
            Runner::Nextest => line.strip_prefix("Summary [").and_then(|rest| Some(rest.split_once(']')?.1)),
            Runner::Libtest => line.strip_prefix("test result:"),
        };
        for part in counts.unwrap_or_default().split([',', ';', ':', '.']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(number)), Some(kind)) = (words.next().map(str::parse::<u64>), words.next()) else { continue };
            match kind {
                "passed" => self.passed += number,
                "failed" | "timed" | "exec" => self.failed += number,
                "skipped" | "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed", self.passed)?;
        if self.at_second_try > 0 {
            write!(f, " ({} at the second try)", self.at_second_try)?;
        }
        write!(f, ", {} failed, {} skipped", self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runners_are_understood() {
        let libtest =
            "test result: FAILED. 3 passed; 1 failed; 4 ignored; 0 measured; 9 filtered out; finished in 0.24s";
        let nextest = "     Summary [   0.249s] 9 tests run: 5 passed (1 slow), 1 failed, 1 timed out, 2 skipped";
        let partial = "     Summary [ 170.1s] 1/2 tests run: 1 passed, 0 skipped";
        let mut totals = Totals::default();
        for line in [nextest, libtest, partial, "test the_summary ... ok"] {
            totals.read(Runner::Nextest, line);
        }
        assert_eq!(totals, Totals { passed: 6, failed: 2, skipped: 2, at_second_try: 0 });
        totals.read(Runner::Libtest, libtest);
        totals.read(Runner::Libtest, nextest);
        assert_eq!(totals, Totals { passed: 9, failed: 3, skipped: 6, at_second_try: 0 });
        assert_eq!(totals.to_string(), "9 passed, 3 failed, 6 skipped");
        totals.add(Totals { passed: 2, at_second_try: 1, ..Totals::default() });
        assert_eq!(totals.to_string(), "11 passed (1 at the second try), 3 failed, 6 skipped");
    }
}

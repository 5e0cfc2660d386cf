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
}

impl Totals {
    /// Takes in one line of output, if it is a summary: nextest's `Summary [...]`, or libtest's `test result:`.
    pub(crate) fn read(&mut self, line: &str) {
        let line = line.trim();
        let counts = if line.starts_with("Summary [") {
            line.split_once(']').map(|(_, rest)| rest)
        } else {
            line.strip_prefix("test result:")
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
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runners_are_understood() {
        let mut totals = Totals::default();
        for line in [
            "     Summary [   0.249s] 7 tests run: 5 passed (1 slow), 1 failed, 1 timed out, 2 skipped",
            "test result: ok. 3 passed; 1 failed; 4 ignored; 0 measured; 9 filtered out; finished in 0.24s",
            "test the_summary ... ok",
            "     Summary [ 170.1s] 1/2 tests run: 1 passed, 0 skipped",
        ] {
            totals.read(line);
        }
        assert_eq!(totals, Totals { passed: 9, failed: 3, skipped: 6 });
        assert_eq!(totals.to_string(), "9 passed, 3 failed, 6 skipped");
    }
}

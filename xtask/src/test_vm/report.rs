//! What a run in the test machine showed: gathered from the machine's messages, kept as JSON, printed as a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use dunlin_linux::protocol::{Message, Verdict};
use serde::{Deserialize, Serialize};

use super::machine::End;
use crate::summary::Totals;

/// The form of a kept report.
pub(crate) const SCHEMA: &str = "dunlin.test-vm/v1";

/// One kernel's run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// [`SCHEMA`].
    pub(crate) schema: String,
    /// How the kernel was asked for.
    pub(crate) label: String,
    /// `uname -r` inside; empty if it never came up.
    pub(crate) kernel: String,
    /// How the machine ran.
    pub(crate) accelerator: String,
    /// From the start of QEMU to its end.
    pub(crate) took_ms: u64,
    /// Why the run as a whole is none, if so.
    pub(crate) problem: Option<String>,
    /// Modules that are missing or were refused, and why.
    pub(crate) missing_modules: BTreeMap<String, String>,
    /// Every test.
    pub(crate) tests: Vec<Test>,
    /// `dunlin doctor`: what each check said.
    pub(crate) doctor: BTreeMap<String, String>,
}

/// One test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Test {
    /// Its suite.
    pub(crate) suite: String,
    /// Its name.
    pub(crate) name: String,
    /// How it ended.
    pub(crate) verdict: Verdict,
    /// Why, if it was no success.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
    /// How long it took.
    pub(crate) took_ms: u64,
    /// How it ended before, if this is what its second try showed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_try: Option<String>,
}

/// Takes a machine's messages.
#[derive(Debug)]
pub(crate) struct Gatherer {
    report: Report,
    nonce: String,
    done: bool,
    /// What the running test has printed, for the case that it fails.
    words: Vec<String>,
    running: Option<String>,
}

impl Gatherer {
    /// For a run whose job has `nonce`.
    pub(crate) fn new(label: &str, accelerator: &str, nonce: &str, missing_modules: &[String]) -> Self {
        let missing = missing_modules.iter().map(|name| (name.clone(), "not in the kernel's package".to_owned()));
        let report = Report {
            schema: SCHEMA.to_owned(),
            label: label.to_owned(),
            accelerator: accelerator.to_owned(),
            missing_modules: missing.collect(),
            ..Report::default()
        };
        Self { report, nonce: nonce.to_owned(), done: false, words: Vec::new(), running: None }
    }

    /// Takes one message; returns the lines to be printed for it.
    pub(crate) fn hear(&mut self, message: Message) -> Vec<String> {
        match message {
            Message::Started { kernel, uptime_ms } => {
                let line = format!("Linux {kernel} is up after {:.1} s", uptime_ms as f64 / 1e3);
                self.report.kernel = kernel;
                vec![line]
            }
            Message::NoModule { name, problem } => {
                let line = format!("module {name} is missing: {problem}");
                self.report.missing_modules.insert(name, problem);
                vec![line]
            }
            Message::Begins { suite, test } => {
                self.words.clear();
                self.running = Some(format!("{suite}::{test}"));
                Vec::new()
            }
            Message::Output { line, .. } => {
                self.words.push(line);
                Vec::new()
            }
            Message::Object { suite, object } => {
                if suite == "doctor" {
                    self.report.take_doctor(&object);
                }
                self.words.push(object.to_string());
                Vec::new()
            }
            Message::Test { suite, test, verdict, detail, took_ms } => {
                self.running = None;
                let word = match verdict {
                    Verdict::Passed => "PASS",
                    Verdict::Failed => "FAIL",
                    Verdict::TimedOut => "TIMEOUT",
                };
                let because = detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
                let mut lines = Vec::new();
                if verdict != Verdict::Passed {
                    lines.extend(self.words.drain(..).map(|line| format!("    {line}")));
                } else {
                    // A test's own figures are worth a reader's time.
                    lines.extend(self.words.drain(..).filter_map(|line| Some(format!("    {}", shown(&line)?))));
                }
                lines.push(format!("{word:7} [{:7.3} s] {suite}::{test}{because}", took_ms as f64 / 1e3));
                self.report.tests.push(Test { suite, name: test, verdict, detail, took_ms, first_try: None });
                lines
            }
            Message::Done { nonce, .. } => {
                self.done = nonce == self.nonce;
                Vec::new()
            }
        }
    }

    /// The whole run, judged: a machine that died, hung, or ran no test has failed, whatever it said before.
    pub(crate) fn finish(mut self, end: End, took_ms: u64) -> Report {
        let during = self.running.as_ref().map(|test| format!(" during {test}")).unwrap_or_default();
        let problem = match end {
            End::Fine | End::NotFine if !self.done => Some("it ended without its last message".to_owned()),
            End::Fine if self.report.tests.is_empty() => Some("no test was run".to_owned()),
            End::Fine if self.report.tests.iter().any(|test| test.verdict != Verdict::Passed) => {
                Some("it said that all was fine, and a test was not".to_owned())
            }
            End::Fine | End::NotFine => None,
            End::Silent(code) => Some(format!(
                "it ended without a verdict{during} (a panic, an oops, or no root; QEMU's exit code {}): see its console",
                code.map_or_else(|| "none".to_owned(), |code| code.to_string())
            )),
            End::OutOfTime => Some(format!("it was killed{during}, because its time was up: see its console")),
        };
        self.report.problem = problem;
        self.report.took_ms = took_ms;
        self.report
    }
}

impl Report {
    /// Takes in what `dunlin doctor --json` printed.
    pub(super) fn take_doctor(&mut self, object: &serde_json::Value) {
        for check in object["checks"].as_array().into_iter().flatten() {
            if let (Some(name), Some(result)) = (check["name"].as_str(), check["result"].as_str()) {
                self.doctor.insert(name.to_owned(), result.to_owned());
            }
        }
    }

    /// How many tests ended how; a run that is none counts as a failed test.
    pub(crate) fn totals(&self) -> Totals {
        let passed = self.tests.iter().filter(|test| test.verdict == Verdict::Passed).count() as u64;
        let failed = self.tests.len() as u64 - passed + u64::from(self.problem.is_some());
        Totals { passed, failed, skipped: 0, at_second_try: self.at_second_try(None) as u64 }
    }

    /// Tests that failed in a run that was one: those that a second try is for.
    pub(crate) fn failed(&self) -> Vec<(String, String)> {
        let failed = self.tests.iter().filter(|test| self.problem.is_none() && test.verdict != Verdict::Passed);
        failed.map(|test| (test.suite.clone(), test.name.clone())).collect()
    }

    /// Puts what a second try of the failed tests showed in the place of what the first did. A test that it says nothing of, or a
    /// machine that went wrong in it, stays as it was.
    pub(crate) fn take_second_try(&mut self, second: &Self) {
        for test in self.tests.iter_mut().filter(|test| test.verdict != Verdict::Passed) {
            let again = second.tests.iter().find(|again| (&again.suite, &again.name) == (&test.suite, &test.name));
            if let Some(again) = again.filter(|_| second.problem.is_none()) {
                let before = test.detail.take().unwrap_or_else(|| "failed".to_owned());
                *test = Test { first_try: Some(before), ..again.clone() };
            }
        }
        self.took_ms += second.took_ms;
    }

    /// Tests, of a suite or of all, that passed when they were tried again.
    fn at_second_try(&self, suite: Option<&str>) -> usize {
        let of_suite = self.tests.iter().filter(|test| suite.is_none_or(|name| test.suite == name));
        of_suite.filter(|test| test.verdict == Verdict::Passed && test.first_try.is_some()).count()
    }

    /// Passed and all tests of a suite.
    fn suite(&self, name: &str) -> (usize, usize) {
        let tests = || self.tests.iter().filter(|test| test.suite == name);
        (tests().filter(|test| test.verdict == Verdict::Passed).count(), tests().count())
    }
}

/// What a test wants to be seen also when it passes: from `shows` on. libtest writes the first of such lines behind the test's name.
fn shown(line: &str) -> Option<&str> {
    let text = line.split_once(" ... ").map_or(line, |(_, behind)| behind);
    text.starts_with("shows ").then_some(text)
}

/// All runs side by side: suites, then what `dunlin doctor` found.
pub(crate) fn table(reports: &[Report]) -> String {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let column = |of: &dyn Fn(&Report) -> String| reports.iter().map(of).collect::<Vec<_>>();
    rows.push((String::new(), column(&|report| report.label.clone())));
    rows.push((
        "kernel".into(),
        column(&|report| if report.kernel.is_empty() { "did not come up".into() } else { report.kernel.clone() }),
    ));
    rows.push(("time".into(), column(&|report| format!("{:.0} s", report.took_ms as f64 / 1e3))));
    let mut suites: Vec<&str> = Vec::new();
    for test in reports.iter().flat_map(|report| &report.tests) {
        if !suites.contains(&test.suite.as_str()) {
            suites.push(&test.suite);
        }
    }
    for suite in suites.into_iter().filter(|&suite| suite != "doctor") {
        rows.push((
            format!("suite {suite}"),
            column(&|report| {
                let (passed, all) = report.suite(suite);
                match (all, report.at_second_try(Some(suite))) {
                    (0, _) => "not run".into(),
                    (_, 0) => format!("{passed} of {all} passed"),
                    (_, again) => format!("{passed} of {all} passed ({again} at the second try)"),
                }
            }),
        ));
    }
    let checks: std::collections::BTreeSet<&str> =
        reports.iter().flat_map(|report| report.doctor.keys().map(String::as_str)).collect();
    for check in checks {
        rows.push((
            check.to_owned(),
            column(&|report| report.doctor.get(check).cloned().unwrap_or_else(|| "not tried".into())),
        ));
    }
    let modules: std::collections::BTreeSet<&str> =
        reports.iter().flat_map(|report| report.missing_modules.keys().map(String::as_str)).collect();
    for module in modules {
        rows.push((
            format!("module {module}"),
            column(&|report| {
                if report.missing_modules.contains_key(module) { "MISSING".into() } else { "loaded".into() }
            }),
        ));
    }
    let first = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let widths: Vec<usize> =
        (0..reports.len()).map(|index| rows.iter().map(|(_, cells)| cells[index].len()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for (name, cells) in rows {
        let _ = write!(out, "{name:first$}");
        for (cell, width) in cells.iter().zip(&widths) {
            let _ = write!(out, "  {cell:width$}");
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(verdict: Verdict) -> Message {
        Message::Test { suite: "s".into(), test: "t".into(), verdict, detail: None, took_ms: 1 }
    }

    fn run(messages: Vec<Message>, end: End) -> Report {
        let mut gatherer = Gatherer::new("6.12", "in software", "n", &[]);
        for message in messages {
            gatherer.hear(message);
        }
        gatherer.finish(end, 1)
    }

    #[test]
    fn a_run_is_good_only_if_all_its_signs_agree() {
        let done = |nonce: &str| Message::Done { nonce: nonce.into(), passed: 1, failed: 0 };
        let good = run(vec![test(Verdict::Passed), done("n")], End::Fine);
        assert_eq!((good.problem.clone(), good.totals().passed, good.totals().failed), (None, 1, 0));
        for (messages, end) in [
            (vec![test(Verdict::Passed)], End::Fine),
            (vec![test(Verdict::Passed), done("another run's")], End::Fine),
            (vec![done("n")], End::Fine),
            (vec![test(Verdict::TimedOut), done("n")], End::Fine),
            (vec![test(Verdict::Passed), done("n")], End::Silent(Some(0))),
            (vec![test(Verdict::Passed), done("n")], End::OutOfTime),
        ] {
            let report = run(messages, end);
            assert!(report.problem.is_some() && report.totals().failed > 0, "{report:?}");
        }
        let failed = run(vec![test(Verdict::Failed), done("n")], End::NotFine);
        assert_eq!((failed.problem.clone(), failed.totals().failed), (None, 1));
        let died = run(vec![Message::Begins { suite: "s".into(), test: "boom".into() }], End::Silent(Some(0)));
        assert!(died.problem.unwrap().contains("during s::boom"));
    }

    #[test]
    fn a_failure_shows_what_the_test_printed() {
        let mut gatherer = Gatherer::new("6.12", "in software", "n", &[]);
        let output = |line: &str| Message::Output { suite: "s".into(), test: None, line: line.into() };
        gatherer.hear(Message::Begins { suite: "s".into(), test: "t".into() });
        gatherer.hear(output("noise"));
        gatherer.hear(output("test t ... shows 5 things"));
        assert_eq!(gatherer.hear(test(Verdict::Passed)), ["    shows 5 things", "PASS    [  0.001 s] s::t"]);
        gatherer.hear(output("why"));
        assert_eq!(gatherer.hear(test(Verdict::Failed))[0], "    why");
    }

    #[test]
    fn a_second_try_is_told_apart_and_only_a_whole_one_counts() {
        let done = || Message::Done { nonce: "n".into(), passed: 0, failed: 1 };
        let first = run(vec![test(Verdict::TimedOut), done()], End::NotFine);
        assert_eq!(first.failed(), [("s".to_owned(), "t".to_owned())]);
        let after = |second: &Report| {
            let mut report = first.clone();
            report.take_second_try(second);
            (report.totals().to_string(), table(&[report]))
        };
        let (totals, text) = after(&run(vec![test(Verdict::Passed), done()], End::Fine));
        assert_eq!(totals, "1 passed (1 at the second try), 0 failed, 0 skipped");
        assert!(text.contains("suite s  1 of 1 passed (1 at the second try)\n"), "{text}");
        for (messages, end) in [
            (vec![test(Verdict::Failed), done()], End::NotFine),
            (vec![test(Verdict::Passed)], End::Silent(None)),
            (vec![done()], End::Fine),
        ] {
            assert_eq!(after(&run(messages, end)).0, "0 passed, 1 failed, 0 skipped");
        }
        // A machine that died is no failed test: there is nothing that could be tried alone.
        assert!(run(vec![test(Verdict::Failed)], End::Silent(None)).failed().is_empty());
    }

    #[test]
    fn kernels_stand_side_by_side() {
        let mut one = run(vec![test(Verdict::Passed)], End::NotFine);
        one.doctor.insert("kvm".into(), "works".into());
        let mut other = one.clone();
        (other.label, other.tests) = ("6.1".into(), Vec::new());
        other.doctor.clear();
        let text = table(&[one, other]);
        assert!(text.contains("suite s  1 of 1 passed    not run\n"), "{text}");
        assert!(text.contains("kvm      works            not tried\n"), "{text}");
    }
}

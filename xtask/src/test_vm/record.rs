//! The compatibility page: `docs/src/compatibility.md`, made from reports that `cargo xtask test-vm --record` keeps in
//! `docs/compatibility`. A verdict on the page was printed by a run; what was never run reads *untested*.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use dunlin_linux::protocol::{SuiteKind, Verdict};

use super::report::{Report, SCHEMA, Test};
use super::suites::Programs;
use crate::run;
use crate::workspace::root;

/// How the development host's own report is called.
const HOST: &str = "host";

/// What has never been run, and reads so.
const UNTESTED: [&str; 7] = [
    "Intel processors (VMX, EPT, PML)",
    "AMD processors without software emulation between",
    "ARM64",
    "Linux 5.14 (RHEL 9)",
    "Linux 5.15 (Ubuntu 22.04)",
    "Linux 6.8 (Ubuntu 24.04)",
    "PREEMPT_RT hosts",
];

/// What a group of tests proves: words for the page, the suite, and a part of the tests' names (empty: all of the suite).
const PROOFS: [(&str, &str, &str); 21] = [
    ("hosted machine: boot, pause, reset, save and restore", "kvm", "machine_tests"),
    ("hosted machine: test guest moves, nothing lost", "kvm", "guest_tests"),
    ("dirty bitmap and dirty ring: no write lost", "kvm", "dirty"),
    ("guest clocks and frequencies", "kvm", "time_tests"),
    ("dirty-rate: hosted and foreign VMs", "tracking", ""),
    ("doctor --prove: tracking error, cost, moves", "prove", ""),
    ("BPF counts exits as tracefs does (within 1 %)", "kernel", "exits_counted"),
    ("counting without type information", "kernel", "without_type_information"),
    ("pages logged: function entry and kernel probe count the same", "kernel", "functions_entry"),
    ("exits: the processor's reasons and times", "kernel", "processors_reasons"),
    ("agent: VMs come and go, floods are shed, nothing stays", "agent", ""),
    ("processes of a Linux guest named with what each writes", "attribution", "two_processes"),
    ("names from outside, with page table isolation, by System.map", "guest-names", ""),
    ("sampled and soft-dirty: rates of foreign and hosted VMs", "regimes", ""),
    ("stock Linux boots with 1 and 2 vCPUs, restarts, switches off", "linux", "stock_kernels"),
    ("entropy and balloon by stock drivers", "linux", "balloon"),
    ("working Linux moved 20 times under delay and loss", "linux", "twenty_times"),
    ("truncated kernel image refused", "linux", "truncated"),
    ("foreign Linux VM: rate seen is the rate written", "foreign", "the_rate_seen"),
    ("foreign Linux VM: soft-dirty", "foreign", "soft_dirty"),
    ("foreign Linux VM: one vCPU held back (cgroup v2)", "foreign", "held_back"),
];

fn folder() -> PathBuf {
    root().join("docs/compatibility")
}

fn page() -> PathBuf {
    root().join("docs/src/compatibility.md")
}

/// Keeps what the runs showed, with a report of this host beside, and makes the page anew.
pub(super) fn record(reports: &[Report], programs: &Programs) -> Result<()> {
    for report in reports {
        ensure!(report.problem.is_none(), "the run on {} is none, so it is not recorded", report.label);
        keep(report)?;
    }
    keep(&host(programs)?)?;
    fs::write(page(), render(&kept()?))?;
    println!("recorded in {} and {}", folder().display(), page().display());
    Ok(())
}

fn keep(report: &Report) -> Result<()> {
    fs::create_dir_all(folder())?;
    let mut report = report.clone();
    // What differs from run to run says nothing about the kernel.
    report.took_ms = 0;
    report.tests.iter_mut().for_each(|test| test.took_ms = 0);
    let path = folder().join(format!("{}.json", report.label));
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n").with_context(|| format!("write {}", path.display()))
}

/// All that is kept, this host last.
fn kept() -> Result<Vec<Report>> {
    let entries = fs::read_dir(folder()).with_context(|| format!("list {}", folder().display()))?;
    let mut reports = Vec::new();
    for entry in entries.flatten() {
        let bytes = fs::read(entry.path())?;
        let report: Report = serde_json::from_slice(&bytes).with_context(|| entry.path().display().to_string())?;
        ensure!(report.schema == SCHEMA, "{} is no report", entry.path().display());
        reports.push(report);
    }
    reports.sort_by(|a, b| (a.label == HOST, &b.kernel).cmp(&(b.label == HOST, &a.kernel)));
    Ok(reports)
}

/// This host: `dunlin doctor`, and those of the suites that it can run, as the bed runs them.
fn host(programs: &Programs) -> Result<Report> {
    // Only the version: what a host's owner has put behind it says nothing to others.
    let kernel = run::output("uname", &["-r"]).unwrap_or_default();
    let kernel = kernel.split('-').next().unwrap_or_default().to_owned();
    let mut report = Report { schema: SCHEMA.into(), label: HOST.into(), kernel, ..Report::default() };
    report.accelerator = "directly".into();
    for suite in programs.suites(None, false)? {
        match &suite.kind {
            SuiteKind::Objects => {
                println!("{HOST} | suite {}", suite.name);
                let scratch = tempfile::tempdir()?;
                let places =
                    ["--run-dir", "--state-dir"].map(|option| format!("{option}={}", scratch.path().display()));
                // Without the folders that the table names for the machine.
                let words = suite.arguments.iter().take_while(|word| !word.ends_with("-dir"));
                let mut command = Command::new(&suite.program);
                command.args(words).args(places).stdin(Stdio::null()).stderr(Stdio::null());
                let output = command.output().context("dunlin doctor")?;
                report.take_doctor(&serde_json::from_slice(&output.stdout).context("dunlin doctor")?);
                let verdict = if output.status.success() { Verdict::Passed } else { Verdict::Failed };
                let (suite, name) = (suite.name, "(program)".to_owned());
                report.tests.push(Test { suite, name, verdict, detail: None, took_ms: 0, first_try: None });
            }
            SuiteKind::Tests { ignored_too: true, .. } => {}
            SuiteKind::Tests { only, .. } => {
                println!("{HOST} | suite {}", suite.name);
                let mut command = Command::new(&suite.program);
                command.args(only).args(["--test-threads", "1"]).current_dir(root().join("tests"));
                let output =
                    command.env("DUNLIN_BIN", root().join("target/debug/dunlin")).stdin(Stdio::null()).output()?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                // 101: libtest's, when a test failed. Anything else has not run them all.
                ensure!(matches!(output.status.code(), Some(0 | 101)), "suite {}: {}", suite.name, output.status);
                report.tests.extend(text.lines().filter_map(|line| libtest(&suite.name, line)));
            }
        }
    }
    Ok(report)
}

/// A line `test NAME ... ok`, or `FAILED`.
fn libtest(suite: &str, line: &str) -> Option<Test> {
    let (name, end) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let verdict = match end.trim() {
        "ok" => Verdict::Passed,
        "FAILED" => Verdict::Failed,
        _ => return None,
    };
    Some(Test { suite: suite.into(), name: name.into(), verdict, detail: None, took_ms: 0, first_try: None })
}

/// What the tests of a proof say together.
fn verdict(report: &Report, suite: &str, part: &str) -> String {
    let tests: Vec<_> = report.tests.iter().filter(|test| test.suite == suite && test.name.contains(part)).collect();
    let passed = tests.iter().filter(|test| test.verdict == Verdict::Passed).count();
    match (passed, tests.len()) {
        (_, 0) => "*untested*".into(),
        (passed, all) if passed == all => "works".into(),
        (passed, all) => format!("**fails** ({passed} of {all} tests pass)"),
    }
}

fn render(reports: &[Report]) -> String {
    let mut out = String::from(
        "# Compatibility\n\n\
         Made from the reports in `docs/compatibility` by `cargo xtask test-vm --kernel 6.12 --kernel 6.1 --record`; do not edit. Each verdict was \
         printed by a run of the suites on that kernel; what was never run reads *untested*.\n\n",
    );
    let _ = writeln!(out, "| column | kernel | how it ran |\n|---|---|---|");
    for report in reports {
        let _ = writeln!(out, "| {} | {} | {} |", report.label, report.kernel, report.accelerator);
    }
    out.push_str("\n`host` recorded the others. Suites that need a Linux guest, or a kernel such as the test machine has, were not run on it.\n");
    let cells = |of: &dyn Fn(&Report) -> String| -> String {
        reports.iter().fold(String::new(), |row, report| row + " " + &of(report) + " |")
    };
    let heads = cells(&|report| report.label.clone());
    let rule = "---|".repeat(reports.len());
    let _ = write!(out, "\n## What the suites prove\n\n| feature |{heads}\n|---|{rule}\n");
    for (words, suite, part) in PROOFS {
        let _ = writeln!(out, "| {words} |{}", cells(&|report| verdict(report, suite, part)));
    }
    let _ = write!(out, "\n## What `dunlin doctor` finds\n\n| capability |{heads}\n|---|{rule}\n");
    let checks: BTreeSet<&String> = reports.iter().flat_map(|report| report.doctor.keys()).collect();
    for check in checks {
        let of = |report: &Report| report.doctor.get(check).cloned().unwrap_or_else(|| "*untested*".into());
        let _ = writeln!(out, "| `{check}` |{}", cells(&of));
    }
    let _ = write!(out, "\n## Never run\n\n| host | every feature above |\n|---|---|\n");
    for host in UNTESTED {
        let _ = writeln!(out, "| {host} | *untested* |");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_what_the_kept_reports_say() {
        let text = fs::read_to_string(page()).unwrap();
        assert!(
            text == render(&kept().unwrap()),
            "run `cargo xtask test-vm --record` again, or undo the edit of the page"
        );
    }

    #[test]
    fn what_was_not_run_is_untested_and_what_fails_is_said() {
        let mut report = Report { label: "x".into(), ..Report::default() };
        assert_eq!(verdict(&report, "kvm", "dirty"), "*untested*");
        report.tests.extend(libtest("kvm", "test a::dirty::one ... ok"));
        assert_eq!(verdict(&report, "kvm", "dirty"), "works");
        report.tests.extend(libtest("kvm", "test a::dirty::two ... FAILED"));
        assert_eq!(verdict(&report, "kvm", "dirty"), "**fails** (1 of 2 tests pass)");
        assert_eq!(verdict(&report, "kvm", "guest"), "*untested*");
        assert!(libtest("kvm", "test a ... ignored, because").is_none() && libtest("kvm", "running 2 tests").is_none());
        let page = render(&[report]);
        assert!(page.contains("| Intel processors (VMX, EPT, PML) | *untested* |"), "{page}");
    }
}

//! `dunlin doctor --prove` as an operator runs it: on this very host, and where something is in the way.
//!
//! Figures are looked at for what they must be whatever the load: costs are never asserted.
#![cfg(target_arch = "x86_64")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use dunlin_tests::{OwnProcess, dunlin, guest};
use serde_json::Value;

/// The command, with everything that it makes below `folder`.
fn prove(program: Command, folder: &Path, guest: &Path) -> Command {
    let mut command = program;
    command.args(["doctor", "--prove", "--json", "--guest"]).arg(guest).env("TMPDIR", folder);
    command
}

/// Nothing lies in `folder`, and no process has it in its command line.
fn assert_nothing_left(folder: &Path) {
    let left: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let name = folder.to_str().unwrap();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&line).contains(name), "{} is left", process.path().display());
    }
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no line {name}: {report:#}"))
}

fn figure<'a>(report: &'a Value, line: &str, name: &str) -> &'a Value {
    let figures = check(report, line)["figures"].as_array().unwrap();
    figures.iter().find(|figure| figure["name"] == name).unwrap_or_else(|| panic!("no figure {name}: {report:#}"))
}

#[test]
fn this_host_is_proven_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let output = prove(dunlin(), folder.path(), &guest::elf().unwrap()).output().unwrap();
    let report = report(&output);
    assert_eq!((output.status.code(), &report["proven"]), (Some(0), &true.into()), "{report:#}");
    assert_eq!(report["schema"], "dunlin.proof/v1");
    assert!(report["duration_ns"].as_u64().is_some_and(|ns| ns < 60_000_000_000), "{report:#}");
    for name in ["guest", "tracking-error", "tracking-cost", "migration", "migration-verified"] {
        assert_eq!(check(&report, name)["result"], "works", "{report:#}");
    }
    let median = |line, name| figure(&report, line, name)["median"].as_f64().unwrap();
    // 250 ms of 20 000 pages a second are 5000 different pages of 32 768: each is seen once.
    assert!(median("tracking-error", "armed-error-at-20000").abs() < 10.0, "{report:#}");
    assert!(median("tracking-error", "guest-wrote-at-20000") > 10_000.0, "{report:#}");
    assert!(median("tracking-error", "passive-seen-at-20000") < 50.0, "{report:#}");
    for name in ["untracked", "passive-to-untracked", "armed-to-untracked", "untracked-to-untracked"] {
        assert!(median("tracking-cost", name) > 0.0, "{report:#}");
        assert_eq!(figure(&report, "tracking-cost", name)["samples"], 5, "{report:#}");
    }
    let (blackout, total) = (median("migration", "blackout"), median("migration", "total"));
    assert!(blackout > 0.0 && blackout <= total, "{report:#}");
    assert!((median("migration-verified", "verified") - 65536.0).abs() < 0.5, "{report:#}");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("what tracking costs"), "{words}");
    assert_nothing_left(folder.path());
}

#[test]
fn without_the_right_to_use_bpf_the_rest_is_proven() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Command::new("setpriv");
    let without = "-bpf,-perfmon,-sys_admin";
    program.args([format!("--bounding-set={without}"), format!("--inh-caps={without}")]).arg(dunlin().get_program());
    let output = prove(program, folder.path(), &guest::elf().unwrap()).output().unwrap();
    let report = report(&output);
    for name in ["tracking-error", "tracking-cost"] {
        let line = check(&report, name);
        assert_eq!(line["result"], "refused", "{report:#}");
        assert!(line["detail"].as_str().unwrap().contains("CAP_BPF") && line["remedy"].is_string(), "{line:#}");
    }
    assert_eq!((output.status.code(), &report["proven"]), (Some(0), &true.into()), "{report:#}");
    assert_nothing_left(folder.path());
}

#[test]
fn a_guest_that_does_not_boot_fails_what_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let work = tempfile::tempdir().unwrap();
    let cut = work.path().join("guest");
    let whole = std::fs::read(guest::elf().unwrap()).unwrap();
    std::fs::write(&cut, &whole[..whole.len() / 3]).unwrap();
    let output = prove(dunlin(), folder.path(), &cut).output().unwrap();
    let report = report(&output);
    assert_eq!((output.status.code(), &report["proven"]), (Some(1), &false.into()), "{report:#}");
    let line = check(&report, "guest");
    assert_eq!(line["result"], "failed", "{report:#}");
    assert!(line["detail"].as_str().unwrap().contains("the machine ended"), "{line:#}");
    assert_nothing_left(folder.path());
    // And one that is not there: refused before anything is tried.
    let output = prove(dunlin(), folder.path(), Path::new("/none/guest")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/none/guest"));
    assert_nothing_left(folder.path());
}

#[test]
fn ctrl_c_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for moment in ["keeps time", "from what the guest wrote", "moves within"] {
        let mut command = prove(dunlin(), folder.path(), &guest::elf().unwrap());
        let mut process = OwnProcess::new(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
        let words = process.child_mut().stderr.take().unwrap();
        let mut lines = BufReader::new(words).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains(moment)), "{moment}");
        process.signal(rustix::process::Signal::INT).unwrap();
        let status = process.wait_for(std::time::Duration::from_secs(30)).unwrap().expect("it ends");
        assert_eq!(status.code(), Some(6), "{moment}");
        assert_nothing_left(folder.path());
    }
}

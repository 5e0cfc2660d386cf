//! Runs suites: each test of a test binary in a process and control group of its own, bounded in time.
//!
//! A test that hangs is killed with all that it started; one that leaves a process behind has failed.

use std::fs;
use std::io::{BufRead, BufReader, PipeReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dunlin_linux::protocol::{Job, Message, Suite, SuiteKind, Verdict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cgroup::Group;
use crate::port::Port;

/// How long a test's children may take to follow it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs everything; how many tests passed and failed.
pub(crate) fn run_all(job: &Job, port: &Port) -> Result<(u64, u64)> {
    let (mut passed, mut failed) = (0, 0);
    for suite in &job.suites {
        let mut count = |verdict| if verdict == Verdict::Passed { passed += 1 } else { failed += 1 };
        match &suite.kind {
            SuiteKind::Tests { only, ignored_too } => match list(job, suite, only, *ignored_too) {
                Ok(tests) => {
                    for test in tests {
                        let arguments = [
                            &suite.arguments[..],
                            &["--exact", &test, "--include-ignored", "--nocapture"].map(str::to_owned),
                        ];
                        count(run(job, suite, &test, &arguments.concat(), port)?);
                    }
                }
                Err(error) => {
                    let detail = Some(format!("its tests could not be listed: {error:#}"));
                    say_test(port, suite, "(list)", Verdict::Failed, detail, Duration::ZERO);
                    count(Verdict::Failed);
                }
            },
            SuiteKind::Objects => count(run(job, suite, "(program)", &suite.arguments, port)?),
        }
    }
    Ok((passed, failed))
}

fn prepared(job: &Job, suite: &Suite, arguments: &[String]) -> Command {
    let mut command = crate::command(&suite.program);
    command.args(arguments).current_dir(&job.folder).stdin(Stdio::null());
    command.envs(job.environment.iter().map(|(name, value)| (name, value)));
    command
}

/// The tests of a binary that are to be run.
fn list(job: &Job, suite: &Suite, only: &[String], ignored_too: bool) -> Result<Vec<String>> {
    let listing = |more: &[&str]| -> Result<Vec<String>> {
        let arguments = [&["--list", "--format", "terse"], more].concat();
        let output = prepared(job, suite, &arguments.iter().map(|&word| word.to_owned()).collect::<Vec<_>>())
            .output()
            .with_context(|| format!("start {}", suite.program.display()))?;
        ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    };
    let mut tests = listing(&[])?;
    if !ignored_too {
        let ignored = listing(&["--ignored"])?;
        tests.retain(|test| !ignored.contains(test));
    }
    tests.retain(|test| only.is_empty() || only.iter().any(|part| test.contains(part.as_str())));
    Ok(tests)
}

fn say_test(port: &Port, suite: &Suite, test: &str, verdict: Verdict, detail: Option<String>, took: Duration) {
    let (suite, test) = (suite.name.clone(), test.to_owned());
    port.say(&Message::Test { suite, test, verdict, detail, took_ms: took.as_millis() as u64 });
}

/// Runs one test, or program, to its end or limit.
fn run(job: &Job, suite: &Suite, test: &str, arguments: &[String], port: &Port) -> Result<Verdict> {
    static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let group = Group::new(NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed))?;
    port.say(&Message::Begins { suite: suite.name.clone(), test: test.to_owned() });
    let kills_before = kills_for_memory();
    let began = Instant::now();
    let (reader, writer) = std::io::pipe()?;
    let mut command = prepared(job, suite, arguments);
    command.stdout(writer.try_clone()?).stderr(writer);
    group.start_in(&mut command)?;
    let started = command.spawn();
    // Our own ends for writing are in the command.
    drop(command);
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            let detail = Some(format!("{} could not be started: {error}", suite.program.display()));
            say_test(port, suite, test, Verdict::Failed, detail, began.elapsed());
            return Ok(Verdict::Failed);
        }
    };
    let (verdict, detail) = std::thread::scope(|scope| -> Result<_> {
        scope.spawn(|| pass_on(reader, suite, test, port));
        let limit = Duration::from_secs(suite.limit_s);
        let status = wait(&mut child, limit)?;
        let left = if status.is_some() { leftovers(&group) } else { Vec::new() };
        // This also ends what holds the pipe, so that the reader's thread ends.
        group.kill();
        if status.is_none() {
            child.wait()?;
        }
        Ok(judge(status, &left, limit))
    })?;
    let kills = kills_for_memory().saturating_sub(kills_before);
    let detail = match (kills, detail) {
        (0, detail) => detail,
        (kills, detail) => {
            let words = format!("the machine ran out of memory: the kernel killed {kills} processes");
            Some(detail.map_or(words.clone(), |detail| format!("{detail}; {words}")))
        }
    };
    drop(group);
    dunlin_linux::system::reap();
    say_test(port, suite, test, verdict, detail, began.elapsed());
    Ok(verdict)
}

fn judge(status: Option<ExitStatus>, left: &[String], limit: Duration) -> (Verdict, Option<String>) {
    match status {
        None => (Verdict::TimedOut, Some(format!("still running after {limit:?}; killed with all that it started"))),
        Some(status) if !status.success() => (Verdict::Failed, Some(status.to_string())),
        Some(_) if !left.is_empty() => (Verdict::Failed, Some(format!("left running: {}", left.join(", ")))),
        Some(_) => (Verdict::Passed, None),
    }
}

/// What still runs when the children of an ended test have had their time to follow it.
fn leftovers(group: &Group) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        dunlin_linux::system::reap();
        let left = group.inmates();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for the end of `child`; none if it has not come within `limit`.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let pid = Pid::from_raw(child.id() as i32).context("pid zero")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
    let limit = Timespec::try_from(limit)?;
    let ended = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)))?;
    Ok(if ended == 0 { None } else { Some(child.wait()?) })
}

/// Passes a program's lines on: those that are objects of ours as such.
fn pass_on(reader: PipeReader, suite: &Suite, test: &str, port: &Port) {
    for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if suite.kind == SuiteKind::Objects
            && let Ok(object @ serde_json::Value::Object(_)) = serde_json::from_str(&line)
        {
            port.say(&Message::Object { suite: suite.name.clone(), object });
        } else {
            port.say(&Message::Output { suite: suite.name.clone(), test: Some(test.to_owned()), line });
        }
    }
}

/// How many processes the kernel has killed for want of memory since it started.
fn kills_for_memory() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let counts = text.lines().filter_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok());
    counts.sum()
}

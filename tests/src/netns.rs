//! Network namespaces that remove themselves.
//!
//! Owns: making, entering and deleting one namespace, and sweeping those of dead test processes. Must not know what is
//! built inside them (see [`crate::topology`]).
//!
//! They are persisted as `ip netns` does it (a bind mount under `/run/netns`), so that `ip netns exec NAME tcpdump` works
//! while a test stands in a debugger. The name carries pid and start time of its maker, so that a later test can tell
//! an orphan from a namespace in use.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::panic;
use std::process::{Command, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tempfile::TempDir;

use crate::process::OwnProcess;

const PREFIX: &str = "dunlin-test";
const DIRECTORY: &str = "/run/netns";

static SEQUENCE: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// A network namespace of this test process; dropping it deletes it with all that is inside.
#[derive(Debug)]
pub struct Netns {
    name: String,
    handle: File,
}

impl Netns {
    /// Makes a namespace with loopback up. The first call of a process sweeps orphans (see [`sweep_orphans`]).
    ///
    /// # Errors
    /// No `ip` command, or no right to make namespaces.
    pub fn new(label: &str) -> Result<Self> {
        SWEEP.call_once(|| {
            if let Err(error) = sweep_orphans() {
                eprintln!("netns: orphans could not be swept: {error:#}");
            }
        });
        let name = format!("{}{label}", own_prefix()?);
        ip(["netns", "add", &name])?;
        // From here the namespace must go away on every path.
        let handle = match File::open(format!("{DIRECTORY}/{name}")) {
            Ok(handle) => handle,
            Err(error) => {
                delete(&name);
                return Err(error).with_context(|| format!("open namespace {name}"));
            }
        };
        let netns = Self { name, handle };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The name under `/run/netns`, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `body` on a new thread inside the namespace and returns its result; a panic inside goes on outside.
    /// Sockets opened, and threads and processes started by `body`, stay in the namespace.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(std::os::fd::AsFd::as_fd(&self.handle), Some(LinkNameSpaceType::Network))
                        .unwrap_or_else(|error| panic!("cannot enter namespace {}: {error}", self.name));
                    body()
                })
                .join()
        });
        result.unwrap_or_else(|payload| panic::resume_unwind(payload))
    }

    /// Runs a command line inside the namespace to its end, split at white space; returns its standard output.
    ///
    /// # Errors
    /// It cannot be started or does not exit with zero; the error carries its standard error.
    pub fn run(&self, command_line: &str) -> Result<String> {
        let mut words = command_line.split_whitespace();
        let program = words.next().context("empty command line")?;
        let output = self.output(Command::new(program).args(words))?;
        ensure!(
            output.status.success(),
            "`{command_line}` in {}: {}: {}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a command inside the namespace to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        let program = command.get_program().to_owned();
        self.enter(|| command.stdin(Stdio::null()).output()).with_context(|| format!("start {}", program.display()))
    }

    /// Starts a command inside the namespace; it is killed when the result is dropped.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<OwnProcess> {
        let program = command.get_program().to_owned();
        let child = self.enter(|| command.spawn()).with_context(|| format!("start {}", program.display()))?;
        Ok(OwnProcess::new(child))
    }

    /// One `ip` command inside the namespace, such as `link set lo up`.
    ///
    /// # Errors
    /// What `ip` said.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        ip(["-n", &self.name].into_iter().chain(arguments.split_whitespace()))
    }

    /// The pids of the processes inside the namespace.
    ///
    /// # Errors
    /// What `ip` said.
    pub fn inmates(&self) -> Result<Vec<u32>> {
        let text = ip(["netns", "pids", &self.name])?;
        text.split_whitespace().map(|pid| pid.parse().with_context(|| format!("pid `{pid}`"))).collect()
    }

    /// Several `ip` commands inside the namespace, in one process; stops at the first that fails.
    ///
    /// # Errors
    /// What `ip` said, with the line's number.
    pub fn ip_batch<S: AsRef<str>>(&self, lines: &[S]) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start ip (package iproute2)")?;
        let text: String = lines.iter().flat_map(|line| [line.as_ref(), "\n"]).collect();
        // A refused line ends `ip` early; its own words are the better error than our broken pipe.
        let written = child.stdin.take().context("no standard input")?.write_all(text.as_bytes());
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "ip -batch in {}: {}\n{text}",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        written.context("write to ip -batch")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// The beginning of a name that tells its maker.
fn own_prefix() -> Result<String> {
    let pid = std::process::id();
    let start = start_time_ticks(pid).context("own start time")?;
    Ok(format!("{PREFIX}-{pid}-{start}-{}-", SEQUENCE.fetch_add(1, Ordering::Relaxed)))
}

/// A folder of this test process; dropping it deletes it. What dead processes left is deleted first.
///
/// # Errors
/// No room for it.
pub fn own_folder() -> Result<TempDir> {
    for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
        let Some((pid, start)) = entry.file_name().to_str().and_then(maker) else { continue };
        if start_time_ticks(pid) != Some(start) {
            let _another_sweeper_was_faster = fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new().prefix(&own_prefix()?).tempdir().context("make a folder for temporary files")
}

/// Deletes the namespaces whose maker is dead, and kills what still runs in them. Returns their names.
///
/// # Errors
/// The directory of namespaces cannot be read.
pub fn sweep_orphans() -> Result<Vec<String>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {DIRECTORY}")),
    };
    let mut swept = Vec::new();
    for entry in entries {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let Some((pid, start)) = maker(&name) else { continue };
        if start_time_ticks(pid).is_some_and(|now| now == start) {
            continue;
        }
        for inmate in ip(["netns", "pids", &name]).unwrap_or_default().split_whitespace() {
            // The pid comes from the kernel's own list of tasks inside a namespace that only a dead test used.
            if let Some(inmate) = inmate.parse().ok().and_then(Pid::from_raw) {
                let _gone_already = kill_process(inmate, Signal::KILL);
            }
        }
        delete(&name);
        swept.push(name);
    }
    Ok(swept)
}

/// Pid and start time of the process that made the namespace called `name`; `None` if it is not one of ours.
fn maker(name: &str) -> Option<(u32, u64)> {
    let mut parts = name.strip_prefix(PREFIX)?.strip_prefix('-')?.split('-');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Field 22 of `/proc/PID/stat`: when the process started, in clock ticks after boot; `None` if there is no such process.
fn start_time_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name (field 2) may hold blanks and parentheses: count from its last closing one.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn delete(name: &str) {
    if let Err(error) = ip(["netns", "del", name]) {
        eprintln!("netns: {name} stays behind: {error:#}");
    }
}

/// Runs `ip` with `arguments`; returns its standard output.
fn ip<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<String> {
    let mut command = Command::new("ip");
    command.args(arguments).stdin(Stdio::null());
    let output = command.output().context("start ip (package iproute2)")?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_apart_and_go_away_even_on_panic() {
        let netns = Netns::new("apart").unwrap();
        let path = format!("{DIRECTORY}/{}", netns.name());
        assert!(fs::exists(&path).unwrap());
        netns.ip_batch(&["link add d0 type bridge", "link set d0 up"]).unwrap();
        assert!(netns.run("ip -br link").unwrap().contains("d0"));
        let inside = netns.enter(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
        assert_ne!(inside, fs::read_link("/proc/thread-self/ns/net").unwrap());
        let caught = panic::catch_unwind(move || {
            let _moved_in = &netns;
            netns.enter(|| panic!("as planned"));
        });
        assert!(caught.is_err());
        assert!(!fs::exists(&path).unwrap(), "the namespace outlived its guard");
    }

    #[test]
    fn errors_carry_the_words_of_the_tool() {
        let netns = Netns::new("errors").unwrap();
        let error = netns.ip_batch(&["link set nonesuch up"]).unwrap_err().to_string();
        assert!(error.contains("nonesuch"), "{error}");
        assert!(netns.run("false").is_err());
    }

    #[test]
    fn orphans_are_swept_and_the_living_are_not() {
        // Our own pid with another start time stands for a dead process whose pid was given away again.
        let orphan = format!("{PREFIX}-{}-1-999-orphan", std::process::id());
        ip(["netns", "add", &orphan]).unwrap();
        let mut inmate =
            Command::new("ip").args(["netns", "exec", &orphan, "sleep", "600"]).stdin(Stdio::null()).spawn().unwrap();
        // `ip netns exec` is inside once it has become `sleep`.
        while !fs::read_to_string(format!("/proc/{}/comm", inmate.id())).unwrap().starts_with("sleep") {
            thread::yield_now();
        }
        let living = Netns::new("living").unwrap();
        sweep_orphans().unwrap();
        assert!(!inmate.wait().unwrap().success(), "the inmate was not killed");
        assert!(!fs::exists(format!("{DIRECTORY}/{orphan}")).unwrap());
        assert!(fs::exists(format!("{DIRECTORY}/{}", living.name())).unwrap());
        assert_eq!(maker("dunlin-test-12-34-5-x"), Some((12, 34)));
        assert_eq!(maker("someone-elses"), None);
    }
}

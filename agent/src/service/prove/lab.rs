//! The laboratory of `dunlin doctor --prove`: a private folder, machines in processes of ours, and what their guests say.
//!
//! Owns that nothing stays, however an experiment ends, and that every wait has an end. Must not know what is measured.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::ProveError;
use crate::migrate::CancelFlag;
use crate::model::chain;
use crate::model::units::display_duration;
use crate::probe::ProbeError;
use crate::service::machine::Places;
use crate::service::out::complain;
use crate::service::registry::Registry;

/// How long a guest may take to be ready, or to say something.
pub(super) const GUEST_LIMIT: Duration = Duration::from_secs(15);
/// The VM's name.
pub(super) const NAME: &str = "prove";
/// The VM's memory.
pub(super) const MEMORY_BYTES: u64 = 256 << 20;
/// How often the guest tells its counters.
pub(super) const STAT: Duration = Duration::from_millis(50);
/// How long all of it may take.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// Why one experiment has no figures.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// This host lacks it.
    Missing(String),
    /// This host forbids it.
    Refused(String),
    /// It went wrong.
    Failed(String),
    Cancelled,
}

impl From<ProbeError> for Obstacle {
    fn from(error: ProbeError) -> Self {
        match error {
            ProbeError::Refused(_) => Self::Refused(error.to_string()),
            _ => Self::Missing(chain(&error)),
        }
    }
}

pub(super) fn failed(what: &str, error: &dyn std::error::Error) -> Obstacle {
    Obstacle::Failed(format!("{what}: {}", chain(error)))
}

pub(super) fn file(path: &Path, source: io::Error) -> ProveError {
    ProveError::File { path: path.display().to_string(), source }
}

/// What an experiment has at hand.
pub(super) struct Lab<'a> {
    pub(super) folder: &'a Path,
    pub(super) kernel: PathBuf,
    pub(super) cancel: &'a CancelFlag,
    pub(super) deadline: Instant,
    pub(super) show_progress: bool,
}

impl Lab<'_> {
    pub(super) fn tell(&self, words: &str) {
        if self.show_progress {
            complain!("{words}");
        }
    }

    /// Waits for something, or until it is too late for it.
    pub(super) fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut happened: impl FnMut() -> Result<Option<T>, Obstacle>,
    ) -> Result<T, Obstacle> {
        let end = (Instant::now() + limit).min(self.deadline);
        loop {
            if self.cancel.is_set() {
                return Err(Obstacle::Cancelled);
            }
            if let Some(value) = happened()? {
                return Ok(value);
            }
            if Instant::now() >= end {
                return Err(Obstacle::Failed(format!("waited in vain for {what}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Lets time pass.
    pub(super) fn pass(&self, span: Duration) -> Result<(), Obstacle> {
        let until = Instant::now() + span;
        if until > self.deadline {
            return Err(Obstacle::Failed(format!("{} were not enough", display_duration(LIMIT))));
        }
        self.wait("the clock", span * 2, || Ok((Instant::now() >= until).then_some(())))
    }

    /// Boots a guest whose vCPUs each do `workload`, and waits until it is ready.
    pub(super) fn boot(&self, workload: &str) -> Result<Guest, Obstacle> {
        let places = self.places("a");
        let console = self.folder.join("console-a");
        let _ = fs::remove_file(&console);
        let exe = std::env::current_exe().map_err(|e| failed("this program's own file", &e))?;
        let log = fs::File::create(self.folder.join("log-a")).map_err(|e| failed("a log", &e))?;
        let mut command = Command::new(exe);
        command
            .args(["vm", "run", "--name", NAME, "--cpus", "2", "--memory", &MEMORY_BYTES.to_string(), "--kernel"])
            .arg(&self.kernel)
            .args(["--cmdline", &format!("dunlin.stat={}ms dunlin.wl={workload}", STAT.as_millis())])
            .arg("--serial")
            .arg(format!("file={}", console.display()))
            .arg("--run-dir")
            .arg(&places.run_dir)
            .arg("--state-dir")
            .arg(&places.state_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // SAFETY: between fork and exec only async-signal-safe calls are made. A session of its own keeps the terminal's
        // Ctrl-C from it, which this process answers in order; and it does not outlive this process.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
            });
        }
        let child = command.spawn().map_err(|e| failed("starting a machine", &e))?;
        let mut guest = Guest { process: OwnChild(child), console, places };
        self.wait("a guest that is ready", GUEST_LIMIT, || {
            if let Ok(Some(status)) = guest.process.0.try_wait() {
                let log = fs::read_to_string(self.folder.join("log-a")).unwrap_or_default();
                let last = log.lines().next_back().unwrap_or("it says nothing").to_owned();
                return Err(Obstacle::Failed(format!("the machine ended ({status}): {last}")));
            }
            Ok(guest.lines().iter().any(|line| line.starts_with("READY ")).then_some(()))
        })?;
        Ok(guest)
    }

    pub(super) fn places(&self, host: &str) -> Places {
        Places { run_dir: self.folder.join(host).join("run"), state_dir: self.folder.join(host).join("state") }
    }
}

/// Kills the machines at a place of a laboratory: nobody else's are listed there.
pub(super) fn kill_machines(places: &Places) {
    for entry in Registry::new(&places.run_dir).list() {
        if let Some(pid) = Pid::from_raw(entry.pid as i32) {
            let _gone_already = kill_process(pid, Signal::KILL);
        }
    }
}

/// A folder that goes away with its content.
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    pub(super) fn make() -> Result<Self, ProveError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("dunlin-prove-{}", uuid::Uuid::new_v4().simple()));
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(|source| file(&path, source))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            complain!("dunlin: {} could not be removed: {error}", self.0.display());
        }
    }
}

/// A process that is killed and waited for when it is no longer needed.
pub(super) struct OwnChild(pub(super) Child);

impl Drop for OwnChild {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest that runs.
pub(super) struct Guest {
    pub(super) process: OwnChild,
    pub(super) console: PathBuf,
    pub(super) places: Places,
}

/// What the guest says of itself in one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) uptime_ns: u64,
    pub(super) pages_written: u64,
    /// What it found wrong with its memory, interrupts and timers.
    pub(super) errors: u64,
}

/// The members of a `STAT` line that count what must not happen.
pub(super) const ERRORS: [&str; 5] =
    ["page_mismatches", "ipi_lost", "ipi_doubled", "timer_stalls", "address_space_mismatches"];

impl Stat {
    /// The guest's word is checked like anybody's: a line that is none is no line.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let line = line.strip_prefix("STAT ")?;
        let find =
            |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok());
        let errors = ERRORS.iter().try_fold(0u64, |sum, name| Some(sum.saturating_add(find(name)?)))?;
        Some(Self { uptime_ns: find("uptime_ns")?, pages_written: find("pages_written")?, errors })
    }

    /// Pages a second since `before`; `None` if no time passed.
    pub(super) fn rate_since(&self, before: &Self) -> Option<f64> {
        let ns = self.uptime_ns.checked_sub(before.uptime_ns).filter(|&ns| ns > 0)?;
        let pages = self.pages_written.checked_sub(before.pages_written)?;
        Some(pages as f64 * 1e9 / ns as f64)
    }
}

/// A heartbeat's number and time stamp.
pub(super) fn heartbeat(line: &str) -> Option<(u64, u64)> {
    let (number, tsc) = line.strip_prefix("HB ")?.split_once(' ')?;
    Some((number.parse().ok()?, u64::from_str_radix(tsc, 16).ok()?))
}

impl Guest {
    /// All whole lines of the console.
    pub(super) fn lines(&self) -> Vec<String> {
        lines_of(&self.console)
    }

    /// The guest's counters as of now: the first line that comes from here on.
    pub(super) fn stat(&self, lab: &Lab<'_>) -> Result<Stat, Obstacle> {
        let count = |lines: &[String]| lines.iter().filter(|line| line.starts_with("STAT ")).count();
        let before = count(&self.lines());
        lab.wait("the guest's counters", GUEST_LIMIT, || {
            let lines = self.lines();
            Ok(if count(&lines) > before { lines.iter().rev().find_map(|line| Stat::parse(line)) } else { None })
        })
    }

    /// What the guest itself wrote in pages a second while `act` went on.
    pub(super) fn rate_while(
        &self,
        lab: &Lab<'_>,
        act: impl FnOnce() -> Result<(), Obstacle>,
    ) -> Result<f64, Obstacle> {
        let before = self.stat(lab)?;
        act()?;
        self.stat(lab)?.rate_since(&before).ok_or_else(|| Obstacle::Failed("the guest's counters went back".to_owned()))
    }
}

pub(super) fn lines_of(console: &Path) -> Vec<String> {
    let bytes = fs::read(console).unwrap_or_default();
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    String::from_utf8_lossy(&bytes[..whole]).lines().map(str::to_owned).collect()
}

/// For fuzzing: reads a line of the guest's console. A rate that comes of it is a number.
///
/// # Panics
/// If that promise is broken.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_line(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let stats: Vec<Stat> = text.lines().filter_map(Stat::parse).collect();
    for pair in stats.windows(2) {
        assert!(pair[1].rate_since(&pair[0]).is_none_or(f64::is_finite));
    }
    for line in text.lines() {
        let _ = heartbeat(line);
    }
}

/// Lines that are right.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let stat = |uptime: u64| {
        let errors = ERRORS.join("=0 ");
        format!("STAT uptime_ns={uptime} pages_written={uptime} {errors}=0\n")
    };
    vec![b"HB 7 ff".to_vec(), (stat(1_000_000) + &stat(2_000_000)).into_bytes()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_guests_lines_are_read() {
        let line = "STAT uptime_ns=2000000000 pages_written=500 page_mismatches=1 ipi_lost=0 ipi_doubled=2 ticks=9 \
                    timer_stalls=0 address_space_mismatches=0 irq_lost=0 block_mismatches=0 block_errors=0";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(stat, Stat { uptime_ns: 2_000_000_000, pages_written: 500, errors: 3 });
        let before = Stat { uptime_ns: 1_000_000_000, pages_written: 100, errors: 0 };
        assert_eq!(stat.rate_since(&before), Some(400.0));
        assert_eq!((before.rate_since(&stat), stat.rate_since(&stat)), (None, None));
        assert_eq!(Stat::parse("STAT uptime_ns=2 pages_written=500"), None);
        assert_eq!(heartbeat("HB 7 ff"), Some((7, 255)));
        assert_eq!(heartbeat("HB 7 zz"), None);
    }

    proptest! {
        #[test]
        fn no_line_makes_the_reader_panic(line in "(STAT|HB)? ?[a-z_=0-9 ]{0,200}") {
            let _ = Stat::parse(&line);
            let _ = heartbeat(&line);
        }
    }
}

//! What the test guest says on its serial console, read from the file that the machine writes.
//!
//! Owns the guest's line format as far as the suites need it (`tests/guest/README.md`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::wait::wait_for;

/// How often the guest beats, at least, and reports: waits below end long before.
const LIMIT: Duration = Duration::from_secs(20);

/// One machine's serial file.
#[derive(Clone, Debug)]
pub struct SerialLog {
    path: PathBuf,
}

impl SerialLog {
    /// The file need not exist yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All whole lines.
    pub fn lines(&self) -> Vec<String> {
        let bytes = fs::read(&self.path).unwrap_or_default();
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        String::from_utf8_lossy(&bytes[..whole]).lines().map(str::to_owned).collect()
    }

    /// The number of the last heartbeat.
    pub fn heartbeat(&self) -> Option<u64> {
        self.lines().iter().rev().find_map(|line| line.strip_prefix("HB ")?.split(' ').next()?.parse().ok())
    }

    /// Waits until the guest is up.
    ///
    /// # Errors
    /// It is not in time.
    pub fn await_ready(&self) -> Result<()> {
        wait_for("the guest's READY line", LIMIT, || {
            self.lines().iter().any(|line| line.starts_with("READY ")).then_some(())
        })
        .with_context(|| self.tail())
    }

    /// Waits until the heart has beaten again.
    ///
    /// # Errors
    /// It does not.
    pub fn await_beat(&self) -> Result<()> {
        let before = self.heartbeat();
        wait_for("a heartbeat", LIMIT, || (self.heartbeat() > before).then_some(())).with_context(|| self.tail())
    }

    /// Waits for the guest's next report and looks whether its memory, interrupts and address spaces are whole.
    ///
    /// # Errors
    /// It counted a mistake, or says nothing any more.
    pub fn check_guest(&self) -> Result<()> {
        let reports = |lines: &[String]| lines.iter().filter(|line| line.starts_with("STAT ")).count();
        let before = reports(&self.lines());
        let report = wait_for("the guest's STAT line", LIMIT, || {
            let lines = self.lines();
            (reports(&lines) > before).then(|| lines.into_iter().rfind(|line| line.starts_with("STAT "))).flatten()
        })
        .with_context(|| self.tail())?;
        let wrong = ["page_mismatches", "ipi_lost", "ipi_doubled", "timer_stalls", "address_space_mismatches"];
        for name in wrong {
            let found = report.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            ensure!(found == Some("0"), "{name} is {found:?}: {report}");
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let lines = self.lines();
        format!("{} ends: {:?}", self.path.display(), &lines[lines.len().saturating_sub(4)..])
    }
}

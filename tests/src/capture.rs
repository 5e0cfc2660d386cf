//! All frames at an interface, as an independent reader takes and reads them: `tshark`.
//!
//! Owns the process and its file. Must not know what the frames are for.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::netns::{Netns, own_folder};
use crate::process::OwnProcess;
use crate::wait::wait_for;

const LIMIT: Duration = Duration::from_secs(20);

/// A capture that goes on until it is ended or dropped.
#[derive(Debug)]
pub struct Capture {
    process: OwnProcess,
    folder: TempDir,
}

/// What was captured.
#[derive(Debug)]
pub struct Captured {
    file: PathBuf,
    _folder: TempDir,
}

impl Capture {
    /// Begins at `interface` of a namespace; returns when frames are taken.
    ///
    /// # Errors
    /// No `dumpcap`, or it does not begin.
    pub fn start(netns: &Netns, interface: &str) -> Result<Self> {
        let folder = own_folder()?;
        let said = folder.path().join("said");
        let mut command = Command::new("dumpcap");
        command.args(["-q", "-i", interface, "-w"]).arg(folder.path().join("frames"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&said)?);
        let process = netns.spawn(&mut command).context("dumpcap")?;
        let words = || std::fs::read_to_string(&said).unwrap_or_default();
        // It names the file when its socket is open.
        wait_for("dumpcap to begin", LIMIT, || words().contains("File:").then_some(())).with_context(words)?;
        Ok(Self { process, folder })
    }

    /// Ends it when it has taken a frame with these `last` bytes: what came before that is taken, too.
    ///
    /// # Errors
    /// No such frame comes, or it does not end well.
    pub fn finish(mut self, last: &[u8]) -> Result<Captured> {
        let file = self.folder.path().join("frames");
        let has = |bytes: Vec<u8>| bytes.windows(last.len()).any(|window| window == last);
        wait_for("the last frame", LIMIT, || std::fs::read(&file).is_ok_and(has).then_some(()))?;
        self.process.signal(Signal::INT)?;
        let status = self.process.wait_for(LIMIT)?.context("dumpcap does not end")?;
        ensure!(status.success(), "dumpcap ended with {status}");
        Ok(Captured { file, _folder: self.folder })
    }
}

impl Captured {
    /// The frames that a display filter of Wireshark's lets through: for each what was asked for, with a `;` between.
    ///
    /// # Errors
    /// No such field, or no such filter.
    pub fn read(&self, filter: &str, fields: &[&str]) -> Result<Vec<String>> {
        let mut command = Command::new("tshark");
        // Checksums that no network card fills in here are not taken for wrong ones.
        command.args(["-n", "-T", "fields", "-E", "separator=;", "-Y", filter, "-r"]).arg(&self.file);
        for field in fields {
            command.args(["-e", field]);
        }
        let output = command.stdin(Stdio::null()).output().context("tshark")?;
        ensure!(output.status.success(), "tshark: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
    }
}

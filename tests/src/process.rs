//! A child process that does not outlive its owner.
//!
//! Owns: killing by the handle of the process that we started, never by name.

use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A process of ours; killed and reaped on drop.
#[derive(Debug)]
pub struct OwnProcess {
    child: Child,
    reaped: bool,
}

impl OwnProcess {
    /// Takes over a child.
    pub fn new(child: Child) -> Self {
        Self { child, reaped: false }
    }

    /// Its pid.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal, such as `Signal::INT` for Ctrl-C.
    ///
    /// # Errors
    /// The process is gone. Once it was waited for, its number may be another process's: that one is spared.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        ensure!(!self.reaped, "process {} has ended", self.id());
        kill_process(self.pid()?, signal).with_context(|| format!("signal {signal:?} to {}", self.id()))
    }

    /// Waits for its end; `Ok(None)` if it still runs after `limit`.
    ///
    /// # Errors
    /// The kernel cannot say.
    pub fn wait_for(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        if !self.reaped {
            let pidfd: OwnedFd = pidfd_open(self.pid()?, PidfdFlags::empty()).context("pidfd_open")?;
            let limit = Timespec::try_from(limit).context("time limit")?;
            if retry_on_intr(|| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))).context("poll pidfd")?
                == 0
            {
                return Ok(None);
            }
        }
        let status = self.child.wait().context("wait")?;
        self.reaped = true;
        Ok(Some(status))
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(self.child.id() as i32).context("pid zero")
    }
}

impl Drop for OwnProcess {
    fn drop(&mut self) {
        if !self.reaped {
            let _gone_already = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_waited_for_signalled_and_killed_on_drop() {
        let start = || OwnProcess::new(Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap());
        let mut sleeper = start();
        assert!(sleeper.wait_for(Duration::from_millis(1)).unwrap().is_none());
        sleeper.signal(Signal::TERM).unwrap();
        let status = sleeper.wait_for(Duration::from_secs(10)).unwrap().unwrap();
        assert!(!status.success());
        assert_eq!(sleeper.wait_for(Duration::ZERO).unwrap(), Some(status));
        let path = {
            let dropped = start();
            format!("/proc/{}", dropped.id())
        };
        assert!(!std::fs::exists(path).unwrap());
    }
}

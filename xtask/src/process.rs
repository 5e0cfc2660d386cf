//! Child processes of a task: none outlives it.
//!
//! Owns killing, by the handle or the pid of what we started, never by name. Grandchildren that lose their parent (the
//! machine that a receiving manager started) become our children and are swept too.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitOptions};

use crate::interrupt;
use crate::run;

/// A child process; killed and reaped on drop.
#[derive(Debug)]
pub(crate) struct OwnChild {
    child: Child,
    name: String,
    errors: std::path::PathBuf,
}

impl OwnChild {
    /// Starts `command` in a process group of its own (Ctrl-C reaches only us, and we end it in order). Its standard error
    /// goes to the file `errors`, and is shown should it fail.
    pub(crate) fn start(command: &mut Command, errors: &Path) -> Result<Self> {
        let name = run::words(command);
        command.stdin(Stdio::null()).process_group(0);
        command.stderr(File::create(errors).with_context(|| format!("{} could not be made", errors.display()))?);
        // SAFETY: between fork and exec only prctl is called, which is a plain system call.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let child = command.spawn().with_context(|| format!("{name} could not be started"))?;
        Ok(Self { child, name, errors: errors.to_owned() })
    }

    /// The child itself, for its pipes.
    pub(crate) fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// An error if it has ended.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait().context("wait")? {
            None => Ok(()),
            Some(status) => bail!("{} ended early ({status}): {}", self.name, self.words()),
        }
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        interrupt::wait_for(limit, &self.name, || Ok(child.try_wait()?))
    }

    /// Waits for its end, which must be a success.
    pub(crate) fn finish(&mut self, limit: Duration) -> Result<()> {
        let status = self.wait(limit)?;
        if !status.success() {
            bail!("{} failed ({status}): {}", self.name, self.words());
        }
        Ok(())
    }

    /// The end of what it said on standard error.
    pub(crate) fn words(&self) -> String {
        let text = std::fs::read(&self.errors).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text = text.unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(5)..].join("; ")
    }
}

impl Drop for OwnChild {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Makes us the parent of orphaned descendants; on drop every child that is left is killed and reaped.
#[derive(Debug)]
pub(crate) struct Sweeper(());

impl Sweeper {
    /// Starts adopting.
    pub(crate) fn new() -> Result<Self> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("adopting orphans")?;
        Ok(Self(()))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        // A killed child may hand us children of its own.
        for _ in 0..100 {
            let children = children();
            if children.is_empty() {
                return;
            }
            for pid in children {
                let _gone_already = rustix::process::kill_process(pid, Signal::KILL);
                let _reaped = rustix::process::waitpid(Some(pid), WaitOptions::empty());
            }
        }
    }
}

/// All children of this process.
fn children() -> Vec<Pid> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let text: Vec<String> = lists.collect();
    text.iter().flat_map(|list| list.split_whitespace()).filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

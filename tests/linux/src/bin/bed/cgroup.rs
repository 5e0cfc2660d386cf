//! A control group for each test: what it started is known, and can be ended at once.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dunlin_linux::system;

const ROOT: &str = "/sys/fs/cgroup";
/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(20);

/// Mounts the hierarchy (version 2) and hands its controllers to groups below.
pub(crate) fn mount() -> Result<()> {
    system::mount_kernel_fs("cgroup2", ROOT, "")?;
    hand_on(Path::new(ROOT))
}

/// Hands all controllers of a group to those below it. One that the kernel keeps is the tests' to miss.
fn hand_on(group: &Path) -> Result<()> {
    let controllers = fs::read_to_string(group.join("cgroup.controllers"))?;
    for controller in controllers.split_whitespace() {
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    Ok(())
}

/// One test's group; on drop what is left in it is killed, and it is removed. The test starts in the group `test` below it, so that it can make
/// others beside its own, with controllers: a group that hands controllers on must have no processes.
#[derive(Debug)]
pub(crate) struct Group(PathBuf);

impl Group {
    /// Makes a group.
    pub(crate) fn new(number: usize) -> Result<Self> {
        let path = Path::new(ROOT).join(format!("bed-{number}"));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        let group = Self(path);
        hand_on(&group.0)?;
        fs::create_dir(group.0.join("test"))?;
        Ok(group)
    }

    /// Has `command` start inside.
    pub(crate) fn start_in(&self, command: &mut Command) -> Result<()> {
        let procs = fs::File::options().write(true).open(self.0.join("test/cgroup.procs"))?;
        // SAFETY: only a write to an open descriptor between fork and exec; `0` stands for the writer itself.
        unsafe {
            command.pre_exec(move || rustix::io::write(&procs, b"0").map(drop).map_err(Into::into));
        }
        Ok(())
    }

    /// The names of the processes inside, at any depth.
    pub(crate) fn inmates(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut folders = vec![self.0.clone()];
        while let Some(folder) = folders.pop() {
            let pids = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            names.extend(pids.split_whitespace().filter(|pid| !is_zombie(pid)).map(|pid| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                format!("{} ({pid})", name.trim())
            }));
            folders.extend(children(&folder));
        }
        names
    }

    /// Kills everything inside.
    pub(crate) fn kill(&self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
    }
}

/// A process that has ended and waits to be waited for by process 1.
fn is_zombie(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')))
}

fn children(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
        let deadline = Instant::now() + GONE;
        while !self.inmates().is_empty() && Instant::now() < deadline {
            // The kernel tells the emptiness of a group only to who polls its events file.
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut all = vec![self.0.clone()];
        let mut next = 0;
        while next < all.len() {
            let below = children(&all[next]);
            all.extend(below);
            next += 1;
        }
        for folder in all.iter().rev() {
            if let Err(error) = fs::remove_dir(folder) {
                eprintln!("bed: {} stays: {error}", folder.display());
            }
        }
    }
}

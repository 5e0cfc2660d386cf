//! A small disk of one test's own, to be filled up: a tmpfs in the mount namespace of one thread and its children.

use std::fs;
use std::io::Write;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tempfile::TempDir;

/// Runs `body` on a new thread with a mount namespace of its own: what it mounts is seen by the processes that it starts
/// and by nobody else, and is gone when the last of them has ended.
pub fn in_own_mounts<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: only this thread's mounts and working folder become its own; no descriptors are unshared.
                unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("a mount namespace");
                run(&["mount", "--make-rprivate", "/"]).expect("private mounts");
                body()
            })
            .join()
    });
    result.unwrap_or_else(|payload| panic::resume_unwind(payload))
}

fn run(words: &[&str]) -> Result<()> {
    let mut command = Command::new(words[0]);
    let output = command.args(&words[1..]).stdin(Stdio::null()).output().with_context(|| format!("{words:?}"))?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A disk of 64 KiB; unmounted on drop.
#[derive(Debug)]
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// Mounts one. Only inside [`in_own_mounts`].
    ///
    /// # Errors
    /// No right to mount.
    pub fn mount() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dunlin-disk-").tempdir()?;
        run(&["mount", "-t", "tmpfs", "-o", "size=64k", "dunlin-test", &folder.path().display().to_string()])?;
        Ok(Self { folder })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Writes until nothing more fits: new files stay empty.
    ///
    /// # Errors
    /// Another error than a full disk.
    pub fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.filler())?;
        loop {
            match file.write_all(&[0; 4096]) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Refuses every write: also what would still fit into the last block of a file.
    ///
    /// # Errors
    /// What `mount` said.
    pub fn freeze(&self) -> Result<()> {
        run(&["mount", "-o", "remount,ro", &self.path().display().to_string()])
    }

    /// Takes writes again.
    ///
    /// # Errors
    /// What `mount` said.
    pub fn make_room(&self) -> Result<()> {
        run(&["mount", "-o", "remount,rw", &self.path().display().to_string()])?;
        match fs::remove_file(self.filler()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = run(&["umount", "--lazy", &self.path().display().to_string()]) {
            eprintln!("disk: {error:#}");
        }
    }
}

//! Trials of folders: whether they can be written, and how long stable storage takes.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::statfs;

use crate::model::units::display_duration;

/// `TMPFS_MAGIC`.
const TMPFS: i64 = 0x0102_1994;

/// Makes a socket in a folder, or in the nearest parent that exists.
///
/// # Errors
/// What the kernel answered.
pub fn run_folder(folder: &Path) -> io::Result<String> {
    let scratch = Scratch::below(folder)?;
    UnixListener::bind(scratch.0.join("s"))?;
    Ok(folder.display().to_string())
}

/// Writes and syncs a file in a folder, or in the nearest parent that exists.
///
/// # Errors
/// What the kernel answered, or that the folder does not outlive the host's memory.
pub fn state_folder(folder: &Path) -> io::Result<String> {
    let scratch = Scratch::below(folder)?;
    let mut file = fs::File::create(scratch.0.join("journal"))?;
    let mut quickest = None;
    for _ in 0..5 {
        file.write_all(&[b'x'; 512])?;
        let start = Instant::now();
        file.sync_data()?;
        quickest = Some(start.elapsed()).min(quickest).or(Some(start.elapsed()));
    }
    if statfs(&scratch.0)?.f_type == TMPFS {
        return Err(io::Error::other(format!(
            "{} is in memory: the journal would not outlive the host",
            folder.display()
        )));
    }
    Ok(format!("{}, fsync in {}", folder.display(), display_duration(quickest.unwrap_or_default())))
}

/// A folder that is removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn below(folder: &Path) -> io::Result<Self> {
        let parent = folder.ancestors().find(|parent| parent.is_dir()).unwrap_or(Path::new("/"));
        let scratch = parent.join(format!(".dunlin-doctor-{}", std::process::id()));
        fs::create_dir(&scratch)?;
        Ok(Self(scratch))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_yet_is_tried_and_not_made() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("a/b");
        run_folder(&folder).unwrap();
        let _ = state_folder(&folder);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}

//! A disk whose bytes are a file's bytes: a regular file or a block device.
//!
//! Owns the descriptor, the lock against a second user, and what was written but not yet made durable. Must not know
//! virtio, nor when a VM runs.
//!
//! The lock is an open-file-description lock (advisory, also seen by other hosts on a shared file system that forwards
//! locks): one writer or any number of readers. Who holds it cannot be asked of the kernel, so errors cannot name them.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use crate::model::DiskSpec;
use crate::shm::{Sink, Source};

/// Bytes in a sector, the unit of a disk's size and addresses (virtio 1.2, 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// A disk could not be opened or locked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened, or its size not be found.
    #[error("disk {}: cannot {action}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not a file with sectors in it.
    #[error("disk {}: {problem}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: &'static str,
    },
    /// Another process uses it.
    #[error(
        "disk {} is in use by another process (another VM?), which holds a lock on it; stop that one, or let both open it \
         `readonly`",
        path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
}

/// An open disk.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    path: PathBuf,
    readonly: bool,
    sectors: u64,
    locked: bool,
    unflushed: bool,
    /// A write-back that failed while the guest was not asking: it is told at its next flush.
    owed: Option<io::Error>,
}

impl RawDisk {
    /// Opens the disk that `spec` names. Takes no lock: nobody uses it yet.
    ///
    /// # Errors
    /// A file that cannot be opened as asked, or has no whole sector.
    pub fn open(spec: &DiskSpec) -> Result<Self, DiskError> {
        let path = spec.path.clone();
        let failed = |action| {
            let path = path.clone();
            move |source| DiskError::Open { path, action, source }
        };
        let action = if spec.readonly { "open it for reading" } else { "open it for writing" };
        let mut file = OpenOptions::new().read(true).write(!spec.readonly).open(&path).map_err(failed(action))?;
        let kind = file.metadata().map_err(failed("stat it"))?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(DiskError::Unusable { path, problem: "it is neither a regular file nor a block device" });
        }
        // Unlike the metadata's length this holds for block devices too.
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed("find its size"))?;
        if bytes < SECTOR_BYTES {
            return Err(DiskError::Unusable { path, problem: "it has not one whole sector of 512 bytes" });
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            tracing::warn!(path = %path.display(), bytes, "the disk ends inside a sector; the guest will not see its tail");
        }
        let sectors = bytes / SECTOR_BYTES;
        Ok(Self { file, path, readonly: spec.readonly, sectors, locked: false, unflushed: false, owed: None })
    }

    /// The file's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it must not be written.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Its size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether something was written since the last flush.
    pub fn unflushed(&self) -> bool {
        self.unflushed
    }

    /// Reads at a byte offset; fewer bytes than asked for only where the file ends.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn read(&self, into: &mut Sink<'_>, offset: u64) -> io::Result<usize> {
        into.read_at(&self.file, offset)
    }

    /// Writes at a byte offset; says how many bytes were taken.
    ///
    /// # Errors
    /// What the kernel answered; refused for a read-only disk.
    pub fn write(&mut self, from: &Source<'_>, offset: u64) -> io::Result<usize> {
        if self.readonly {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.unflushed = true;
        from.write_at(&self.file, offset)
    }

    /// Makes durable what was written (`fdatasync`), because the guest asks; costs nothing if nothing was.
    ///
    /// # Errors
    /// What the kernel answers now, or answered to a [`RawDisk::flush_for_handover`] before: Linux reports a lost page
    /// once, and whoever wrote it must hear of it.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(owed) = self.owed.take() {
            return Err(owed);
        }
        if self.unflushed {
            rustix::fs::fdatasync(self.file.as_fd())?;
            self.unflushed = false;
        }
        Ok(())
    }

    /// The same with nobody asking: before another host takes over.
    ///
    /// # Errors
    /// As for [`RawDisk::flush`]; the guest will hear of it too.
    pub fn flush_for_handover(&mut self) -> io::Result<()> {
        self.flush().inspect_err(|error| self.owe(error))
    }

    /// Remembers a failed write-back for the guest's next flush.
    pub fn owe(&mut self, error: &io::Error) {
        self.owed = Some(error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error));
    }

    /// Another handle on the file, to write back in another thread what is dirty so far. Report a failure with
    /// [`RawDisk::owe`].
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn write_back_handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Takes the disk for this process alone (or, read-only, for readers alone). Idempotent.
    ///
    /// # Errors
    /// Another process has it.
    pub fn lock(&mut self) -> Result<(), DiskError> {
        if !self.locked {
            let kind = if self.readonly { libc::F_RDLCK } else { libc::F_WRLCK };
            self.set_lock(kind).map_err(|source| match source.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => DiskError::Locked { path: self.path.clone() },
                _ => DiskError::Open { path: self.path.clone(), action: "lock it", source },
            })?;
            self.locked = true;
        }
        Ok(())
    }

    /// Gives the disk up. Idempotent.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn unlock(&mut self) -> io::Result<()> {
        if self.locked {
            self.set_lock(libc::F_UNLCK)?;
            self.locked = false;
        }
        Ok(())
    }

    fn set_lock(&self, kind: libc::c_int) -> io::Result<()> {
        // All of the file, whatever its length becomes.
        let range = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: the kernel reads one whole `flock`.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &Path, readonly: bool) -> DiskSpec {
        DiskSpec { path: path.to_owned(), readonly }
    }

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let open = |readonly| RawDisk::open(&spec(file.path(), readonly)).unwrap();
        let (mut writer, mut second, mut reader, mut other) = (open(false), open(false), open(true), open(true));
        writer.lock().unwrap();
        writer.lock().unwrap();
        for (who, disk) in [("writer", &mut second), ("reader", &mut reader)] {
            let error = disk.lock().expect_err(who);
            assert!(matches!(&error, DiskError::Locked { path } if path == file.path()), "{error}");
        }
        writer.unlock().unwrap();
        reader.lock().unwrap();
        other.lock().unwrap();
        assert!(second.lock().is_err());
        drop((reader, other));
        second.lock().unwrap();
        drop(second);
        writer.lock().unwrap();
    }

    #[test]
    fn a_read_only_disk_is_not_written_and_a_flush_follows_writes_only() {
        let file = image(1024);
        let mut disk = RawDisk::open(&spec(file.path(), true)).unwrap();
        assert!(disk.write(&Source::default().host(&[1; 512]), 0).is_err());
        assert!(!disk.unflushed());
        let mut disk = RawDisk::open(&spec(file.path(), false)).unwrap();
        assert_eq!(disk.write(&Source::default().host(&[1; 512]), 512).unwrap(), 512);
        assert!(disk.unflushed());
        disk.flush().unwrap();
        assert!(!disk.unflushed());
        let mut back = [0; 512];
        assert_eq!(disk.read(&mut Sink::default().host(&mut back), 512).unwrap(), 512);
        assert_eq!(back, [1; 512]);
    }

    #[test]
    fn a_write_back_that_failed_unasked_is_told_at_the_next_flush() {
        let file = image(1024);
        let mut disk = RawDisk::open(&spec(file.path(), false)).unwrap();
        disk.owe(&io::Error::from_raw_os_error(libc::EIO));
        assert!(disk.flush_for_handover().is_err());
        assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
        disk.flush().unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let short = image(511);
        for (path, readonly) in [
            (Path::new("/nonexistent/disk.img"), false),
            (Path::new("/dev/null"), false),
            (Path::new("/"), true),
            (short.path(), true),
        ] {
            let error = RawDisk::open(&spec(path, readonly)).expect_err(&path.display().to_string());
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
        assert_eq!(RawDisk::open(&spec(image(1025).path(), false)).unwrap().sectors(), 2);
    }
}

//! Memory files and shared mappings of them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use crate::model::HUGE_PAGE_BYTES;

/// Makes a memory file of `bytes`, sealed against change of size, so that nobody who maps it can be made to fault.
///
/// # Errors
/// What the kernel answered: no memory, or a file limit.
pub fn memory_file(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Makes a file for guest RAM of `bytes`, in huge pages where the host lets it: receiving into them, and walking them for
/// holes, costs a fraction of what 4 KiB pages cost.
///
/// Most hosts keep huge pages from memory files (`shmem_enabled` is `never`), but not from a tmpfs that is mounted for
/// them. The mount is visible nowhere and goes with the file. Without CAP_SYS_ADMIN it is an ordinary memory file.
///
/// # Errors
/// What the kernel answered: no memory, or a file limit.
pub fn ram_file(bytes: u64) -> io::Result<OwnedFd> {
    match huge_file(bytes) {
        Ok(file) => Ok(file),
        Err(error) => {
            tracing::info!("guest RAM in 4 KiB pages, no tmpfs of huge pages: {error}");
            memory_file("dunlin-ram", bytes)
        }
    }
}

/// An unlinked file in a tmpfs of its own that hands out huge pages to mappings that ask for them.
fn huge_file(bytes: u64) -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "huge", "advise")?;
    // Partly used huge pages count in full.
    fsconfig_set_string(context.as_fd(), "size", bytes.next_multiple_of(HUGE_PAGE_BYTES).to_string())?;
    fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    let open = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&mount, ".", open, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::ftruncate(&file, bytes)?;
    Ok(file)
}

/// Whether nobody can make a mapping of `file` fault by shortening it: it is sealed, or (tmpfs files cannot be sealed) it
/// has no name, so that only the machine's own process and those it was handed to can reach it.
fn cannot_shrink(file: BorrowedFd<'_>) -> io::Result<bool> {
    if rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return Ok(true);
    }
    Ok(rustix::fs::fstat(file)?.st_nlink == 0)
}

/// A shared mapping of a whole memory file; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain shared memory, handed out only as atomics, and stays until drop.
unsafe impl Send for Mapping {}
// SAFETY: as above; all access through a shared reference is atomic.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all `len` bytes of `file` for reading and writing.
    ///
    /// # Errors
    /// A file that is shorter than `len` or that others could shorten (they could make us fault), or what
    /// the kernel answered.
    pub fn of(file: impl AsFd, len: usize) -> io::Result<Self> {
        let file = file.as_fd();
        let size = rustix::fs::fstat(file)?.st_size as u64;
        if size < len as u64 || len == 0 || !cannot_shrink(file)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a file of {size} bytes cannot be mapped as {len} bytes that stay"),
            ));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file that keeps its size.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned address zero"))?;
        Ok(Self { start, len })
    }

    /// The first byte's address, for handing to KVM or the kernel.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping is empty (it never is).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All bytes.
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: `start..start+len` is mapped for as long as `self` lives, and AtomicU8 has the layout of u8.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len) }
    }

    /// All whole 64-bit words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mappings are page-aligned, `len / 8` words lie inside, and AtomicU64 has the layout of u64.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `of` mapped, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_a_name_is_no_memory() {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(4096).unwrap();
        assert!(Mapping::of(named.as_file(), 4096).is_err());
    }

    #[test]
    fn ram_holds_what_is_written_with_and_without_huge_pages() {
        let bytes = 5 << 20;
        for file in [ram_file(bytes).unwrap(), memory_file("plain", bytes).unwrap()] {
            let mapping = Mapping::of(&file, bytes as usize).unwrap();
            mapping.words()[512 * 700].store(7, std::sync::atomic::Ordering::Relaxed);
            let again = Mapping::of(&file, bytes as usize).unwrap();
            assert_eq!(again.words()[512 * 700].load(std::sync::atomic::Ordering::Relaxed), 7);
            assert!(Mapping::of(&file, bytes as usize + 1).is_err());
        }
    }
}

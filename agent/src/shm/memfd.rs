//! Memory files and shared mappings of them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

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
    /// A file that is shorter than `len` or not sealed against shrinking (another process could make us fault), or what
    /// the kernel answered.
    pub fn of(file: impl AsFd, len: usize) -> io::Result<Self> {
        let file = file.as_fd();
        let size = rustix::fs::fstat(file)?.st_size as u64;
        let seals = rustix::fs::fcntl_get_seals(file)?;
        if size < len as u64 || !seals.contains(SealFlags::SHRINK) || len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("memory file of {size} bytes (seals {seals:?}) cannot be mapped as {len} bytes"),
            ));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice; the seal keeps every page of it backed.
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

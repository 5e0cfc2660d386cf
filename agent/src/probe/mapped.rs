//! A BPF array of 64-bit values, mapped: read, and taken from, while the kernel counts, with no system call.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

/// The mapping; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct MappedArray {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is plain shared memory, handed out only as atomics, and stays until drop.
unsafe impl Send for MappedArray {}

impl MappedArray {
    /// Maps the first `words` values of `map`, which was made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// What the kernel answered: it refuses a mapping longer than the map.
    pub(crate) fn of(map: impl AsFd, words: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; a BPF map never shrinks.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), words * 8, protection, MapFlags::SHARED, map.as_fd(), 0)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned address zero"))?;
        Ok(Self { start, words })
    }

    /// The values.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: `words` values are mapped for as long as `self` lives, aligned to a page.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for MappedArray {
    fn drop(&mut self) {
        // SAFETY: exactly what `of` mapped, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.words * 8) };
    }
}

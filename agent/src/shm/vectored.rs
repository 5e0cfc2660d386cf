//! Vectored reads and writes straight from and into guest memory: one system call, no copy in between.
//!
//! Owns the iovec arrays. Must not know what the bytes mean, nor mark them dirty: whoever reads into guest memory marks
//! what was written, after it was written.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Memory that a write takes its bytes from.
#[derive(Debug, Default)]
pub struct Source<'a> {
    vectors: Vec<libc::iovec>,
    memory: PhantomData<&'a [u8]>,
}

/// Memory that a read puts its bytes into.
#[derive(Debug, Default)]
pub struct Sink<'a> {
    vectors: Vec<libc::iovec>,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Source<'a> {
    /// Adds bytes of our own.
    #[must_use]
    pub fn host(mut self, bytes: &'a [u8]) -> Self {
        self.vectors.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
        self
    }

    /// Adds guest memory.
    #[must_use]
    pub fn guest<B: BitmapSlice>(mut self, slices: &[VolatileSlice<'a, B>]) -> Self {
        self.vectors.extend(slices.iter().map(vector));
        self
    }

    /// Writes all of it as one message or at the file's position; says how many bytes were taken.
    ///
    /// # Errors
    /// What the kernel answered; `EINVAL` for more pieces than it takes (1024).
    pub fn write(&self, file: impl AsFd) -> io::Result<usize> {
        let count = self.vectors.len() as libc::c_int;
        // SAFETY: each vector points at memory that is borrowed for 'a, and the kernel only reads it.
        retry(|| unsafe { libc::writev(file.as_fd().as_raw_fd(), self.vectors.as_ptr(), count) })
    }

    /// Writes all of it at `offset` of a file; says how many bytes were taken.
    ///
    /// # Errors
    /// As for [`Source::write`].
    pub fn write_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let (count, offset) = (self.vectors.len() as libc::c_int, file_offset(offset)?);
        // SAFETY: each vector points at memory that is borrowed for 'a, and the kernel only reads it.
        retry(|| unsafe { libc::pwritev(file.as_fd().as_raw_fd(), self.vectors.as_ptr(), count, offset) })
    }
}

impl<'a> Sink<'a> {
    /// Adds a buffer of our own.
    #[must_use]
    pub fn host(mut self, bytes: &'a mut [u8]) -> Self {
        self.vectors.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        self
    }

    /// Adds guest memory.
    #[must_use]
    pub fn guest<B: BitmapSlice>(mut self, slices: &[VolatileSlice<'a, B>]) -> Self {
        self.vectors.extend(slices.iter().map(vector));
        self
    }

    /// Reads one message, or from the file's position; says how many bytes were put in.
    ///
    /// # Errors
    /// As for [`Source::write`].
    pub fn read(&mut self, file: impl AsFd) -> io::Result<usize> {
        let count = self.vectors.len() as libc::c_int;
        // SAFETY: each vector points at memory that is borrowed mutably, or is guest memory that lives for 'a and that
        // nobody holds plain references into.
        retry(|| unsafe { libc::readv(file.as_fd().as_raw_fd(), self.vectors.as_ptr(), count) })
    }

    /// Reads from `offset` of a file; says how many bytes were put in.
    ///
    /// # Errors
    /// As for [`Source::write`].
    pub fn read_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let (count, offset) = (self.vectors.len() as libc::c_int, file_offset(offset)?);
        // SAFETY: as in `read`.
        retry(|| unsafe { libc::preadv(file.as_fd().as_raw_fd(), self.vectors.as_ptr(), count, offset) })
    }
}

fn vector<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> libc::iovec {
    // The guard pins nothing on Linux; the slice's lifetime, which Source and Sink carry, keeps the mapping.
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    offset.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn pieces_are_filled_and_emptied_in_order() {
        let mut file: File = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let (mut guest, mut host) = ([0u8; 4], [0u8; 3]);
        let got = {
            let slice = VolatileSlice::from(&mut guest[..]);
            Sink::default().guest(&[slice]).host(&mut host).read_at(&file, 2).unwrap()
        };
        assert_eq!((got, &guest, &host), (7, b"2345", b"678"));
        let slice = VolatileSlice::from(&mut guest[..]);
        assert_eq!(Source::default().host(b"ab").guest(&[slice]).write_at(&file, 0).unwrap(), 6);
        let mut all = [0; 10];
        Sink::default().host(&mut all).read_at(&file, 0).unwrap();
        assert_eq!(&all, b"ab23456789");
    }

    #[test]
    fn an_offset_beyond_what_a_file_can_have_is_an_error() {
        let file: File = tempfile::tempfile().unwrap();
        assert!(Source::default().host(b"x").write_at(&file, u64::MAX).is_err());
        assert!(Sink::default().host(&mut [0]).read_at(&file, u64::MAX).is_err());
    }
}

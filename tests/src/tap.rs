//! The reader's end of a tap: what a VMM would hold.
//!
//! Owns: one tap descriptor that sends and receives raw frames. Must not know what they mean. Apart from the product's own
//! tap on purpose: a test that measures a mechanism should not stand on it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use dunlin::port::FramePort;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

/// An open tap; while it is open the interface has a carrier.
#[derive(Debug)]
pub struct TestTap {
    file: File,
}

impl TestTap {
    /// Opens the tap `name` of the calling thread's network namespace (and makes it if it is not there).
    ///
    /// # Errors
    /// No right to, or the name is taken by something else.
    pub fn open(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: all-zero bytes are a valid `ifreq`, a plain C struct with a union of plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= request.ifr_name.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives through the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { file })
    }

    /// The next frame that the kernel hands to the VM; `None` if none came within `limit`.
    ///
    /// # Errors
    /// The tap is gone.
    pub fn receive(&self, limit: Duration) -> io::Result<Option<Vec<u8>>> {
        let limit = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput)?;
        if retry_on_intr(|| poll(&mut [PollFd::new(&self.file.as_fd(), PollFlags::IN)], Some(&limit)))? == 0 {
            return Ok(None);
        }
        let mut frame = vec![0; 65_536];
        let length = (&self.file).read(&mut frame)?;
        frame.truncate(length);
        Ok(Some(frame))
    }
}

impl FramePort for TestTap {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.file.write_all(frame)
    }
}

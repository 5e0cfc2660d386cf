//! One connection of a link, in the clear or encrypted, behind one face.
//!
//! Owns the socket's time-outs. Must not know what flows. Any thread may read while another writes; clones are one connection, which closes with the last of them.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::secure::Secure;

/// A connection.
#[derive(Clone, Debug)]
pub(super) enum Stream {
    /// Plain TCP.
    Plain(Arc<TcpStream>),
    /// TLS over TCP.
    Secure(Arc<Secure>),
}

impl Stream {
    /// A connection in the clear.
    pub(super) fn plain(socket: TcpStream) -> Self {
        Self::Plain(Arc::new(socket))
    }

    /// The socket, for its options. Its bytes are only read and written through this type.
    pub(super) fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Secure(secure) => secure.socket(),
        }
    }

    /// Whether what is written is copied and changed by this process before the kernel has it.
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self, Self::Secure(_))
    }

    /// How it is encrypted, for people: `tls1.3` and the cipher suite's name, or `none`.
    pub(super) fn encryption(&self) -> String {
        match self {
            Self::Plain(_) => "none".to_owned(),
            Self::Secure(secure) => secure.encryption(),
        }
    }

    /// Sends small writes at once, and ends reads and writes after these times with [`io::ErrorKind::WouldBlock`].
    pub(super) fn set_up(&self, read: Duration, write: Duration) -> io::Result<()> {
        set_up(self.socket(), read, write)
    }

    /// Ends both directions; whoever reads or writes hears so at once.
    pub(super) fn shutdown(&self) {
        let _ = self.socket().shutdown(Shutdown::Both);
    }

    /// Whether the peer has closed the connection, or the kernel has given it up.
    pub(super) fn is_closed(&self) -> bool {
        poll_for(self.socket(), PollFlags::RDHUP, Duration::ZERO).is_ok_and(|ready| ready)
    }

    /// Waits until a read would not wait: bytes are there, or the end, or an error.
    pub(super) fn await_data(&self, timeout: Duration) -> io::Result<bool> {
        match self {
            Self::Plain(socket) => poll_for(socket, PollFlags::IN, timeout),
            Self::Secure(secure) => secure.await_data(Instant::now() + timeout),
        }
    }
}

/// See [`Stream::set_up`].
pub(super) fn set_up(socket: &TcpStream, read: Duration, write: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(read))?;
    socket.set_write_timeout(Some(write))
}

/// Whether a socket becomes ready within a time; a signal ends the wait, too.
pub(super) fn poll_for(socket: impl AsFd, flags: PollFlags, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    match poll(&mut [PollFd::from_borrowed_fd(socket.as_fd(), flags)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether an error of a socket with a time-out means that the time is up.
pub(super) fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(buffer)])
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => (&mut socket.as_ref()).read_vectored(buffers),
            Stream::Secure(secure) => secure.read(buffers),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => (&mut socket.as_ref()).write_vectored(slices),
            Stream::Secure(secure) => secure.write(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

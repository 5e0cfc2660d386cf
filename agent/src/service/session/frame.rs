//! Messages and file descriptors over a Unix stream socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::model::MAX_BOOT_IMAGE_BYTES;

/// The longest message: a boot image, and what is around it.
const MAX_MESSAGE_BYTES: usize = MAX_BOOT_IMAGE_BYTES + 4096;
/// The most descriptors that travel with a message: of a machine's network ports, or RAM and dirty bitmap.
pub(in crate::service) const MAX_FDS: usize = 32;

/// The session ended or broke its protocol.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The other process closed the socket, or the kernel refused.
    #[error("the session socket failed: {0}")]
    Io(#[from] io::Error),
    /// Bytes that are no message.
    #[error("the session's protocol was broken: {0}")]
    Protocol(String),
}

/// One end of a session.
#[derive(Debug)]
pub struct SessionSocket {
    stream: UnixStream,
}

impl SessionSocket {
    /// Takes a connected socket.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Lets every later wait end after `limit`; `None` waits for ever.
    pub fn set_patience(&self, limit: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(limit)?;
        self.stream.set_write_timeout(limit)
    }

    /// The process at the other end.
    pub fn peer_pid(&self) -> io::Result<rustix::process::Pid> {
        Ok(rustix::net::sockopt::socket_peercred(&self.stream)?.pid)
    }

    /// The user and the process at the other end, for the audit log.
    pub fn peer_name(&self) -> String {
        rustix::net::sockopt::socket_peercred(&self.stream).map_or_else(
            |_| "uid=? pid=?".to_owned(),
            |peer| format!("uid={} pid={}", peer.uid.as_raw(), peer.pid.as_raw_nonzero()),
        )
    }

    /// The socket, for polling.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Sends a message, with descriptors beside its first byte.
    pub fn send<T: Serialize>(&mut self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), SessionError> {
        // The length's place first, so that a boot image is not copied once more.
        let mut frame =
            postcard::to_extend(message, vec![0; 4]).map_err(|error| SessionError::Protocol(error.to_string()))?;
        let length = frame.len() - 4;
        if length > MAX_MESSAGE_BYTES {
            return Err(SessionError::Protocol(format!("a message of {length} bytes is not to be sent")));
        }
        frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
        let mut sent = 0;
        if !fds.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(SessionError::Protocol(format!("{} descriptors are more than {MAX_FDS}", fds.len())));
            }
            let flags = SendFlags::NOSIGNAL;
            sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(&frame)], &mut control, flags)
                .map_err(io::Error::from)?;
        }
        self.stream.write_all(&frame[sent..])?;
        Ok(())
    }

    /// Waits for a message and the descriptors beside it.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<(T, Vec<OwnedFd>), SessionError> {
        let mut length = [0; 4];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut slices = [IoSliceMut::new(&mut length)];
            match rustix::net::recvmsg(&self.stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
                Ok(received) => break received.bytes,
            }
        };
        if got == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        self.stream.read_exact(&mut length[got..])?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_MESSAGE_BYTES {
            return Err(SessionError::Protocol(format!("a message of {length} bytes")));
        }
        let mut payload = Vec::new();
        if (&self.stream).take(length as u64).read_to_end(&mut payload)? != length {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        match postcard::take_from_bytes(&payload) {
            Ok((message, [])) => Ok((message, fds)),
            Ok((_, rest)) => Err(SessionError::Protocol(format!("{} bytes behind the end of a message", rest.len()))),
            Err(error) => Err(SessionError::Protocol(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::session::{Reply, Request};

    #[test]
    fn descriptors_arrive_beside_their_message() {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut near, mut far) = (SessionSocket::new(near), SessionSocket::new(far));
        let file = crate::shm::memory_file("x", 4096).unwrap();
        near.send(&Reply::Done, &[file.as_fd(), file.as_fd()]).unwrap();
        near.send(&Reply::Frames(3), &[]).unwrap();
        let (first, fds): (Reply, _) = far.recv().unwrap();
        assert!(matches!(first, Reply::Done) && fds.len() == 2);
        let (second, fds): (Reply, _) = far.recv().unwrap();
        assert!(matches!(second, Reply::Frames(3)) && fds.is_empty());
        drop(near);
        assert!(matches!(far.recv::<Request>(), Err(SessionError::Io(_))));
    }

    #[test]
    fn rubbish_is_an_error() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut far = SessionSocket::new(far);
        near.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(far.recv::<Request>(), Err(SessionError::Protocol(_))));
        near.write_all(&[1, 0, 0, 0, 0xff]).unwrap();
        assert!(matches!(far.recv::<Request>(), Err(SessionError::Protocol(_))));
    }
}

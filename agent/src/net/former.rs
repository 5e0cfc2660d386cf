//! The taps of a VM that has left: what the network still brings to them.
//!
//! Owns descriptors of the taps, beside those of the machine, which reads them no more. Must not know where frames go.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::tap::HEADER_BYTES;
use crate::model::RelayedFrame;
use crate::port::FormerPorts;

/// The largest frame that a tap hands out, with its header.
const MOST_BYTES: usize = 65535 + 14 + HEADER_BYTES;

/// The taps, in the order of the VM's ports; non-blocking.
pub struct FormerTaps {
    taps: Vec<OwnedFd>,
    buffer: Vec<u8>,
}

impl FormerTaps {
    /// These taps.
    pub fn new(taps: Vec<OwnedFd>) -> Self {
        Self { taps, buffer: vec![0; MOST_BYTES] }
    }
}

impl FormerPorts for FormerTaps {
    fn take(&mut self, frames: &mut Vec<RelayedFrame>, most: usize, timeout: Duration) -> io::Result<()> {
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let mut waits: Vec<PollFd<'_>> = self.taps.iter().map(|tap| PollFd::new(tap, PollFlags::IN)).collect();
        match poll(&mut waits, Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        for (port, tap) in self.taps.iter().enumerate() {
            while frames.len() < most {
                match rustix::io::read(tap, &mut self.buffer[..]) {
                    Ok(read) if read > HEADER_BYTES => {
                        let bytes = self.buffer[HEADER_BYTES..read].to_vec();
                        frames.push(RelayedFrame { port: port as u16, bytes });
                    }
                    Ok(0) | Err(Errno::AGAIN) => break,
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn frames_come_with_their_port_and_without_the_header() {
        let pairs = [0, 1].map(|_| UnixDatagram::pair().unwrap());
        let taps = pairs.iter().map(|(near, _)| {
            near.set_nonblocking(true).unwrap();
            near.try_clone().unwrap().into()
        });
        let mut former = FormerTaps::new(taps.collect());
        let mut frames = Vec::new();
        former.take(&mut frames, 10, Duration::ZERO).unwrap();
        assert!(frames.is_empty());
        let [first, second] = [1u8, 2].map(|value| [&[0; HEADER_BYTES][..], &[value; 60]].concat());
        pairs[1].1.send(&second).unwrap();
        pairs[0].1.send(&first).unwrap();
        pairs[0].1.send(&[0; HEADER_BYTES]).unwrap();
        pairs[0].1.send(&second).unwrap();
        former.take(&mut frames, 2, Duration::from_secs(5)).unwrap();
        former.take(&mut frames, 10, Duration::from_secs(5)).unwrap();
        let told: Vec<(u16, u8)> = frames.iter().map(|frame| (frame.port, frame.bytes[0])).collect();
        assert_eq!(told, [(0, 1), (0, 2), (1, 2)]);
        assert!(frames.iter().all(|frame| frame.bytes.len() == 60));
    }
}

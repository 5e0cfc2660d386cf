//! The taps of a VM that stands or has left: what the network still brings to them.
//!
//! Owns descriptors of the taps, beside those of the machine, which reads them no more, and a thread while frames are kept: a tap alone holds 1000 (`txqueuelen`). Must not know where frames go.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::tap::HEADER_BYTES;
use crate::model::RelayedFrame;
use crate::port::FormerPorts;

/// The largest frame that a tap hands out, with its header.
const MOST_BYTES: usize = 65535 + 14 + HEADER_BYTES;
/// The most that is kept, in bytes, as much as a relay carries; the rest stays in the taps.
const MOST_KEPT_BYTES: usize = 32 << 20;

/// The taps, in the order of the VM's ports; non-blocking.
pub struct FormerTaps {
    reader: Reader,
    keeper: Option<Keeper>,
    kept: VecDeque<RelayedFrame>,
}

/// Reads the taps.
struct Reader {
    taps: Arc<Vec<OwnedFd>>,
    buffer: Vec<u8>,
}

/// A thread that keeps what comes, until it is told to end. Nobody else reads meanwhile.
struct Keeper {
    end: Arc<OwnedFd>,
    thread: JoinHandle<Vec<RelayedFrame>>,
}

impl FormerTaps {
    /// These taps.
    pub fn new(taps: Vec<OwnedFd>) -> Self {
        Self { reader: Reader::new(Arc::new(taps)), keeper: None, kept: VecDeque::new() }
    }

    /// Nothing is kept any more but what was.
    fn end_keeping(&mut self) -> io::Result<()> {
        let Some(Keeper { end, thread }) = self.keeper.take() else { return Ok(()) };
        rustix::io::write(&*end, &1u64.to_ne_bytes())?;
        self.kept.extend(thread.join().map_err(|_| io::Error::other("the keeper of frames has panicked"))?);
        Ok(())
    }
}

impl Drop for FormerTaps {
    fn drop(&mut self) {
        if let Err(error) = self.end_keeping() {
            tracing::warn!("frames that came while the VM stood: {error}");
        }
    }
}

impl Keeper {
    fn start(mut reader: Reader) -> io::Result<Self> {
        let end = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let ends = Arc::clone(&end);
        let thread = std::thread::Builder::new().name("keep-frames".into()).spawn(move || reader.keep(&ends))?;
        Ok(Self { end, thread })
    }
}

impl Reader {
    fn new(taps: Arc<Vec<OwnedFd>>) -> Self {
        Self { taps, buffer: vec![0; MOST_BYTES] }
    }

    /// Waits for frames or for `end`, at most `timeout` if there is one; `false` if it is the end.
    fn wait(&self, end: Option<&OwnedFd>, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout =
            timeout.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) });
        let all = self.taps.iter().chain(end);
        let mut waits: Vec<PollFd<'_>> = all.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        match poll(&mut waits, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(end.is_none() || waits.last().is_some_and(|end| end.revents().is_empty()))
    }

    /// Hands out what is there until `takes` wants no more.
    fn read(&mut self, mut takes: impl FnMut(RelayedFrame) -> bool) -> io::Result<()> {
        for (port, tap) in self.taps.iter().enumerate() {
            loop {
                match rustix::io::read(tap, &mut self.buffer[..]) {
                    Ok(read) if read > HEADER_BYTES => {
                        let bytes = self.buffer[HEADER_BYTES..read].to_vec();
                        if !takes(RelayedFrame { port: port as u16, bytes }) {
                            return Ok(());
                        }
                    }
                    Ok(0) | Err(Errno::AGAIN) => break,
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Keeps what comes until the end. A port that cannot be read is for whoever takes from it later to find.
    fn keep(&mut self, end: &OwnedFd) -> Vec<RelayedFrame> {
        let (mut frames, mut bytes) = (Vec::new(), 0);
        while bytes < MOST_KEPT_BYTES && self.wait(Some(end), None).unwrap_or(false) {
            let read = self.read(|frame| {
                bytes += frame.bytes.len();
                frames.push(frame);
                bytes < MOST_KEPT_BYTES
            });
            if read.is_err() {
                break;
            }
        }
        frames
    }
}

impl FormerPorts for FormerTaps {
    fn take(&mut self, frames: &mut Vec<RelayedFrame>, most: usize, timeout: Duration) -> io::Result<()> {
        self.end_keeping()?;
        while frames.len() < most
            && let Some(frame) = self.kept.pop_front()
        {
            frames.push(frame);
        }
        if frames.len() < most {
            self.reader.wait(None, Some(if frames.is_empty() { timeout } else { Duration::ZERO }))?;
            self.reader.read(|frame| {
                frames.push(frame);
                frames.len() < most
            })?;
        }
        Ok(())
    }

    fn keep(&mut self) {
        if self.keeper.is_some() {
            return;
        }
        match Keeper::start(Reader::new(Arc::clone(&self.reader.taps))) {
            Ok(keeper) => self.keeper = Some(keeper),
            Err(error) => tracing::warn!("a tap holds only what its queue does: {error}"),
        }
    }

    fn give_back(&mut self) -> Vec<RelayedFrame> {
        if let Err(error) = self.end_keeping() {
            tracing::warn!("frames that came while the VM stood: {error}");
        }
        std::mem::take(&mut self.kept).into()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn taps<const N: usize>() -> ([UnixDatagram; N], FormerTaps) {
        let pairs = [(); N].map(|()| UnixDatagram::pair().unwrap());
        let taps = pairs.each_ref().map(|(near, _)| {
            near.set_nonblocking(true).unwrap();
            near.try_clone().unwrap().into()
        });
        (pairs.map(|(_, far)| far), FormerTaps::new(taps.into()))
    }

    fn told(frames: &[RelayedFrame]) -> Vec<(u16, u8)> {
        frames.iter().map(|frame| (frame.port, frame.bytes[0])).collect()
    }

    #[test]
    fn frames_come_with_their_port_and_without_the_header() {
        let (network, mut former) = taps::<2>();
        let mut frames = Vec::new();
        former.take(&mut frames, 10, Duration::ZERO).unwrap();
        assert!(frames.is_empty());
        let [first, second] = [1u8, 2].map(|value| [&[0; HEADER_BYTES][..], &[value; 60]].concat());
        network[1].send(&second).unwrap();
        network[0].send(&first).unwrap();
        network[0].send(&[0; HEADER_BYTES]).unwrap();
        network[0].send(&second).unwrap();
        former.take(&mut frames, 2, Duration::from_secs(5)).unwrap();
        former.take(&mut frames, 10, Duration::from_secs(5)).unwrap();
        assert_eq!(told(&frames), [(0, 1), (0, 2), (1, 2)]);
        assert!(frames.iter().all(|frame| frame.bytes.len() == 60));
    }

    /// Far more than a port holds, and each once and in order, whoever takes it: a relay, or the VM that goes on here.
    #[test]
    fn what_comes_while_the_vm_stands_is_kept() {
        let frame = |number: u8| [&[0; HEADER_BYTES][..], &[number; 60]].concat();
        let wanted: Vec<(u16, u8)> = (0..=255).map(|number| (0, number)).collect();
        for goes_on_here in [false, true] {
            let (network, mut former) = taps::<1>();
            former.keep();
            // A full port makes the sender wait: it goes on only because frames are taken out.
            for number in 0..=255 {
                network[0].send(&frame(number)).unwrap();
            }
            let mut frames = Vec::new();
            if goes_on_here {
                frames = former.give_back();
            }
            former.take(&mut frames, 300, Duration::ZERO).unwrap();
            assert_eq!(told(&frames), wanted);
            network[0].send(&frame(7)).unwrap();
            former.take(&mut frames, 300, Duration::from_secs(5)).unwrap();
            assert_eq!(frames.len(), 257);
        }
        let (_network, mut former) = taps::<1>();
        former.keep();
        drop(former);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let (network, mut former) = taps::<1>();
        network[0].set_nonblocking(true).unwrap();
        former.keep();
        let frame = vec![1; 60_000];
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let mut refused = 0;
        while refused < 100 && std::time::Instant::now() < deadline {
            match network[0].send(&frame) {
                Ok(_) => refused = 0,
                Err(_) => {
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        assert_eq!(refused, 100, "it goes on taking frames");
        let bytes: usize = former.give_back().iter().map(|frame| frame.bytes.len()).sum();
        assert!((MOST_KEPT_BYTES..MOST_KEPT_BYTES + 60_000).contains(&bytes), "{bytes}");
    }
}

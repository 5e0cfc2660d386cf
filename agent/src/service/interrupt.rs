//! Ctrl-C and `kill`: an orderly end instead of a sudden one.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Has the next SIGINT or SIGTERM, or another thread, end a wait.
#[derive(Debug)]
pub struct Interrupt {
    woken: UnixStream,
}

/// Interrupts when it is dropped.
#[derive(Debug)]
pub struct Wake {
    /// The other end notices that it is closed.
    _wake: UnixStream,
}

impl Interrupt {
    /// Takes both signals for this process.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn install() -> io::Result<Self> {
        let (woken, wake) = UnixStream::pair()?;
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::low_level::pipe::register(signal, wake.try_clone()?)?;
        }
        Ok(Self { woken })
    }

    /// One that no signal wakes, but a [`Wake`].
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn by_hand() -> io::Result<(Self, Wake)> {
        let (woken, wake) = UnixStream::pair()?;
        Ok((Self { woken }, Wake { _wake: wake }))
    }

    /// Waits until `deadline`; true if a signal has come, then at once and ever after.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_hours(1));
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.woken, PollFlags::IN)], timeout.as_ref()) {
                Ok(0) if Instant::now() >= deadline => return false,
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                // A socket that cannot be polled will never wake us: end rather than run on deaf.
                Ok(_) | Err(_) => return true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_thread_ends_the_wait() {
        let (interrupt, wake) = Interrupt::by_hand().unwrap();
        assert!(!interrupt.wait_until(Instant::now() + Duration::from_millis(5)));
        let waking = std::thread::spawn(move || drop(wake));
        assert!(interrupt.wait_until(Instant::now() + Duration::from_secs(60)));
        waking.join().unwrap();
    }

    #[test]
    fn a_signal_ends_the_wait_and_all_later_ones() {
        let interrupt = Interrupt::install().unwrap();
        assert!(!interrupt.wait_until(Instant::now() + Duration::from_millis(5)));
        signal_hook::low_level::raise(signal_hook::consts::SIGINT).unwrap();
        assert!(interrupt.wait_until(Instant::now() + Duration::from_secs(60)));
        assert!(interrupt.wait_until(Instant::now() + Duration::from_secs(60)));
    }
}

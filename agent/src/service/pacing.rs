//! One host's bucket of announcement frames, shared by all processes that announce there.
//!
//! Owns the file `announce.pace` in the run folder: the two times of [`Bucket`], in nanoseconds of `CLOCK_MONOTONIC`, little endian, under a lock. It is worth nothing after a
//! boot, nor when it cannot be read: announcing goes on in any case.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::announce::pace::{Bucket, Turn, Urgency};
use crate::port::{Clock, FramePort};

/// The file's name in the run folder.
pub const FILE: &str = "announce.pace";
/// How long a wait may take to notice that it is cancelled.
const CANCEL_LATENCY: Duration = Duration::from_millis(10);

/// The limit of one host, as one process sees it.
#[derive(Debug)]
pub struct Pacer {
    frames_per_second: Option<u32>,
    file: Option<File>,
    /// Where there is no file: what this process alone sends.
    own: Mutex<Bucket>,
}

impl Pacer {
    /// Joins those who announce at the host of `run_dir`. Without a limit nobody waits, and nothing is written.
    pub fn join(run_dir: &Path, frames_per_second: Option<u32>) -> Self {
        let open = || {
            std::fs::create_dir_all(run_dir)?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(run_dir.join(FILE))
        };
        let file = frames_per_second.and_then(|_| {
            open()
                .inspect_err(|error| {
                    tracing::warn!(
                        "{}: {error}: this process paces its announcements alone",
                        run_dir.join(FILE).display()
                    );
                })
                .ok()
        });
        Self { frames_per_second, file, own: Mutex::default() }
    }

    /// Waits until `frames` may leave at once; `false` if `cancel` was set before.
    pub fn wait(&self, frames: u32, urgency: Urgency, clock: &dyn Clock, cancel: &AtomicBool) -> bool {
        let Some(rate) = self.frames_per_second else { return true };
        let mut place = None;
        loop {
            let now = clock.now();
            let (until, done) = match self.with_bucket(|bucket| bucket.take(rate, urgency, frames, place, now)) {
                Turn::At(time) => (time, true),
                Turn::AskAt(time) => (time, false),
            };
            loop {
                if cancel.load(Ordering::Acquire) {
                    return false;
                }
                let left = until.saturating_sub(clock.now());
                if left.is_zero() {
                    break;
                }
                clock.sleep(left.min(CANCEL_LATENCY));
            }
            if done {
                return true;
            }
            place = Some(until);
        }
    }

    /// `frames` of a first round have left already: others wait for them.
    pub fn charge(&self, frames: u32, clock: &dyn Clock) {
        if let Some(rate) = self.frames_per_second {
            self.with_bucket(|bucket| bucket.take(rate, Urgency::First, frames, None, clock.now()));
        }
    }

    fn with_bucket<T>(&self, change: impl FnOnce(&mut Bucket) -> T) -> T {
        let mut own = self.own.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(file) = &self.file else { return change(&mut own) };
        // Without the lock it is still better to look than not to.
        let locked = flock(file, FlockOperation::LockExclusive).is_ok();
        let mut bucket = read(file).unwrap_or(*own);
        let result = change(&mut bucket);
        *own = bucket;
        if let Err(error) = write(file, bucket) {
            tracing::debug!("{FILE}: {error}");
        }
        if locked {
            let _unlocked = flock(file, FlockOperation::Unlock);
        }
        result
    }
}

fn read(file: &File) -> io::Result<Bucket> {
    let mut times = [[0; 8]; 2];
    for (at, time) in times.iter_mut().enumerate() {
        file.read_exact_at(time, 8 * at as u64)?;
    }
    let [paid_at, queue_ends_at] = times.map(|time| Duration::from_nanos(u64::from_le_bytes(time)));
    Ok(Bucket { paid_at, queue_ends_at })
}

fn write(file: &File, bucket: Bucket) -> io::Result<()> {
    let times = [bucket.paid_at, bucket.queue_ends_at].map(|time| (time.as_nanos() as u64).to_le_bytes());
    file.write_all_at(times.as_flattened(), 0)
}

/// A port whose frames wait for their turn. When cancelled they are refused.
pub struct PacedPort<'a> {
    /// Where they leave.
    pub port: &'a mut dyn FramePort,
    /// Who lets them.
    pub pacer: &'a Pacer,
    /// Which round they belong to.
    pub urgency: Urgency,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Ends the waiting.
    pub cancel: &'a AtomicBool,
}

impl FramePort for PacedPort<'_> {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        if self.pacer.wait(1, self.urgency, self.clock, self.cancel) {
            self.port.send(frame)
        } else {
            Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"))
        }
    }
}

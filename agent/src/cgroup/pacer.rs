//! Has the scheduler keep a short quota.
//!
//! The kernel looks whether a thread has used its quota at its tick, or when something else takes the CPU. With 250 ticks a second a thread that may run for 1 ms runs for 4, and
//! is held for four periods to make up for it. So a thread of real-time priority wakes up each half millisecond on the CPU where the limited one was seen last: what it
//! preempts is looked at. It does nothing else, and takes 4 to 5 % of that CPU while somebody is limited (2 CPUs, Linux 6.18, by its own schedstat).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};

/// Half of the least quota: who has just begun is not held, and what is run too much is less than the next quota, so that no period is left out.
const WAKE_EVERY: Duration = Duration::from_micros(500);
/// After so many times it looks where the thread is.
const LOOK_EVERY: u32 = 8;
/// The field of `/proc/PID/stat` behind the name that says on which CPU the thread was last (proc(5), field 39).
const PROCESSOR: usize = 36;

/// The pacer of one limited thread. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Pacer {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// Starts it. None: it cannot be; then the limit holds in the mean, and a hold may be longer.
    pub(super) fn start(process: u32, thread: u32) -> Option<Self> {
        let stat = File::open(format!("/proc/{process}/task/{thread}/stat")).ok()?;
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let run = move || {
            if let Err(error) = pace(&stat, &told) {
                tracing::warn!(
                    "thread {thread} may be held for longer at a time than is allowed, since nothing can be run each half millisecond with real-time priority: {error}"
                );
            }
        };
        let thread = std::thread::Builder::new().name("pacer".to_owned()).spawn(run).ok()?;
        Some(Self { ends, thread: Some(thread) })
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Until it is told to end, or the thread has ended.
fn pace(stat: &File, ends: &AtomicBool) -> io::Result<()> {
    become_real_time()?;
    let (mut wakes, mut at) = (0, None);
    while !ends.load(Ordering::Relaxed) {
        if wakes % LOOK_EVERY == 0 {
            let mut text = [0; 1024];
            let Ok(count) = stat.read_at(&mut text, 0) else { return Ok(()) };
            let cpu = processor(&text[..count]).filter(|&cpu| cpu < CpuSet::MAX_CPU);
            if let Some(cpu) = cpu.filter(|_| cpu != at) {
                let mut there = CpuSet::new();
                there.set(cpu);
                // A CPU that is not ours: the thread is paced again when it has left it.
                let _ = sched_setaffinity(None, &there);
                at = Some(cpu);
            }
        }
        wakes = wakes.wrapping_add(1);
        std::thread::sleep(WAKE_EVERY);
    }
    Ok(())
}

fn processor(stat: &[u8]) -> Option<usize> {
    // The name may hold anything: count from behind its closing bracket.
    let behind = stat.iter().rposition(|&byte| byte == b')')? + 1;
    let text = std::str::from_utf8(&stat[behind..]).ok()?;
    text.split_ascii_whitespace().nth(PROCESSOR)?.parse().ok()
}

/// Gives the calling thread the least real-time priority.
fn become_real_time() -> io::Result<()> {
    let least = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters are a live local for the length of the call, which reads them only; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const least) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_found_behind_any_name() {
        let own = std::fs::read("/proc/self/stat").unwrap();
        assert!(processor(&own).is_some_and(|cpu| cpu < CpuSet::MAX_CPU));
        let line = format!("7 (a) b) R {} 1 0", (4..39).map(|_| "0").collect::<Vec<_>>().join(" "));
        assert_eq!(processor(line.as_bytes()), Some(1));
        assert_eq!((processor(b"7 (a) R 1"), processor(b""), processor(b")")), (None, None, None));
    }
}

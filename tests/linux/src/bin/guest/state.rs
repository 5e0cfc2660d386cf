//! What the guest has done and seen: counters that all its work writes, and the report of them.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use dunlin_linux::system;
use serde_json::{Value, json};

use crate::clock::{ClockState, now_ns};
use crate::writer::WriterCounters;

/// The counters.
#[derive(Debug)]
pub(crate) struct State {
    /// Lines that the echo service has answered.
    pub(crate) echoed: AtomicU64,
    /// Copies of the file that were whole.
    pub(crate) copies: AtomicU64,
    /// Copies that were not, and reads or writes that failed.
    pub(crate) copy_errors: AtomicU64,
    /// Bytes copied so far.
    pub(crate) copied_bytes: AtomicU64,
    /// The clocks.
    pub(crate) clock: ClockState,
    writers: Vec<WriterCounters>,
}

/// Words in the kernel's log that nothing should bring about. Not a TSC that is marked unstable: in software its counter does not go as
/// real time does, and a guest then has the paravirtual clock.
const BAD_WORDS: [&str; 9] = [
    "soft lockup",
    "kvm-clock' as unstable",
    "BUG:",
    "cut here",
    "Oops",
    "stall",
    "hung task",
    "I/O error",
    "Call Trace",
];

impl State {
    /// All zero.
    pub(crate) fn new(writers: Vec<WriterCounters>) -> Self {
        let zero = || AtomicU64::new(0);
        let clock = ClockState::default();
        Self { echoed: zero(), copies: zero(), copy_errors: zero(), copied_bytes: zero(), clock, writers }
    }

    /// What does not change.
    pub(crate) fn identity(&self) -> Value {
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        json!({ "kernel": system::kernel(), "cpus": cpus, "clocksource": clocksource(), "writers": self.writers.len() })
    }

    /// Everything.
    pub(crate) fn report(&self) -> Value {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let writers: Vec<Value> = self.writers.iter().map(WriterCounters::report).collect();
        json!({
            "schema": "dunlin.linux-guest/v1",
            "identity": self.identity(),
            "uptime_ms": system::uptime_ms(),
            "realtime_ns": now_ns(rustix::time::ClockId::Realtime),
            "monotonic_ns": now_ns(rustix::time::ClockId::Monotonic),
            "echoed": load(&self.echoed),
            "copies": load(&self.copies),
            "copied_bytes": load(&self.copied_bytes),
            "copy_errors": load(&self.copy_errors),
            "clock": self.clock.report(),
            "writers": writers,
            "memory_kib": memory(),
            "rng": read("/sys/devices/virtual/misc/hw_random/rng_current"),
            "complaints": complaints(),
        })
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn clocksource() -> String {
    read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
}

/// `/proc/meminfo`: total and free.
fn memory() -> Value {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
    };
    json!({ "total": of("MemTotal"), "free": of("MemFree"), "available": of("MemAvailable") })
}

/// Lines of the kernel's log that should not be there.
fn complaints() -> Vec<String> {
    // The whole log, without taking it from anybody: SYSLOG_ACTION_READ_ALL.
    let mut log = vec![0u8; 1 << 18];
    // SAFETY: the kernel writes at most the given length into the buffer.
    let length = unsafe { libc::klogctl(3, log.as_mut_ptr().cast(), log.len() as libc::c_int) };
    let text = String::from_utf8_lossy(&log[..usize::try_from(length).unwrap_or(0)]).into_owned();
    let bad = text.lines().filter(|line| BAD_WORDS.iter().any(|word| line.contains(word)));
    bad.take(20).map(str::to_owned).collect()
}

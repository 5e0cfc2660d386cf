//! How fast a VMM answers while its vCPUs are held: a held thread may hold a lock of it.
//!
//! Owns a thread that asks once a second and waits, so that nobody else does.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::foreign::qmp::{Qmp, QmpError};

/// How often is asked.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A VMM that takes longer is asked again.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What is known of a VMM's answers. Dropping it ends the asking.
#[derive(Debug)]
pub(super) struct Answers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    ends: AtomicBool,
    /// Nanoseconds of the last answer; 0: none yet.
    last_ns: AtomicU64,
    /// When was asked what is not answered yet.
    asked: Mutex<Option<Instant>>,
}

impl Answers {
    /// Connects to the monitor at `path`, and begins to ask.
    pub(super) fn ask(path: &Path) -> Result<Self, QmpError> {
        let mut qmp = Qmp::connect(path, PATIENCE)?;
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let ask = move || {
            while !own.ends.load(Ordering::Relaxed) {
                match own.time(&mut qmp) {
                    Ok(()) | Err(QmpError::Silent { .. }) => {}
                    Err(error) => {
                        tracing::debug!("{error}");
                        own.last_ns.store(0, Ordering::Relaxed);
                        return;
                    }
                }
                std::thread::park_timeout(ASK_EVERY);
            }
        };
        let thread = std::thread::Builder::new().name("answers".to_owned()).spawn(ask).ok();
        Ok(Self { shared, thread })
    }

    /// How long the last answer took, or one that has not come yet has been taking, if that is longer.
    pub(super) fn last(&self) -> Option<Duration> {
        let waiting = self.shared.asked().map(|since| since.elapsed());
        let last = Some(self.shared.last_ns.load(Ordering::Relaxed)).filter(|&ns| ns > 0).map(Duration::from_nanos);
        last.max(waiting.filter(|waiting| *waiting > last.unwrap_or_default()))
    }
}

impl Shared {
    fn asked(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn time(&self, qmp: &mut Qmp) -> Result<(), QmpError> {
        let began = Instant::now();
        *self.asked() = Some(began);
        let answer = qmp.order("query-status", &json!({}), PATIENCE);
        let took = began.elapsed();
        *self.asked() = None;
        self.last_ns.store(took.as_nanos() as u64, Ordering::Relaxed);
        answer.map(drop)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        // One that waits for a VMM that hangs ends by itself.
        if let Some(thread) = self.thread.take().filter(|_| self.shared.asked().is_none()) {
            thread.thread().unpark();
        }
    }
}

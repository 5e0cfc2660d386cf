//! Ctrl-C and SIGTERM as a question that every long wait asks, so that what was built is taken down in order.
//!
//! Tests do not install it: a test runner ends them by itself, and the next run sweeps what they left.

use std::io;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// How long a sleep may be deaf.
const SLICE: Duration = Duration::from_millis(20);

/// From now on SIGINT and SIGTERM set the flag instead of ending the process; a second one ends it at once.
///
/// # Errors
/// The kernel does not let go of the signals.
pub fn install() -> io::Result<()> {
    let flag = FLAG.get_or_init(Arc::default);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(flag))?;
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

/// Whether a signal has come.
pub fn is_set() -> bool {
    FLAG.get().is_some_and(|flag| flag.load(Ordering::Acquire))
}

/// An error once a signal has come.
///
/// # Errors
/// It has.
pub fn check() -> Result<()> {
    if is_set() {
        bail!("interrupted");
    }
    Ok(())
}

/// Sleeps, unless a signal comes.
///
/// # Errors
/// A signal came.
pub fn sleep(time: Duration) -> Result<()> {
    wait(time, || Ok(None::<()>)).map(|_| ())
}

/// Asks `done` every few milliseconds until it answers; `None` if it has not within `limit`.
///
/// # Errors
/// A signal came, or `done` failed.
pub fn wait<T>(limit: Duration, mut done: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = Instant::now() + limit;
    loop {
        check()?;
        if let Some(answer) = done()? {
            return Ok(Some(answer));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        thread::sleep(left.min(SLICE));
    }
}

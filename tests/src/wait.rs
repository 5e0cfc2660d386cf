//! Waiting for what another process makes true, where the kernel offers no single event for it: short looks, one deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks.
const TICK: Duration = Duration::from_millis(4);

/// Looks until `look` has found something.
///
/// # Errors
/// Nothing was found within `limit`; the error says what was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let until = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() >= until {
            bail!("waited {limit:?} in vain for {what}");
        }
        std::thread::sleep(TICK);
    }
}

//! Warnings that a guest can provoke: at most one a second and device reaches the log, the rest are counted.
//!
//! Owns the rate limit. Must not know what is warned of.

use std::fmt::Display;
use std::sync::Mutex;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// The log of one device's complaints about its guest.
#[derive(Debug)]
pub struct Complaints {
    device: String,
    state: Mutex<(Option<Instant>, u64)>,
}

impl Complaints {
    /// A log in the name of `device`.
    pub fn new(device: impl Into<String>) -> Self {
        Self { device: device.into(), state: Mutex::new((None, 0)) }
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Logs `what`, or counts it as suppressed.
    pub fn warn(&self, what: &dyn Display) {
        if let Some(suppressed) = self.admit(Instant::now()) {
            tracing::warn!(device = %self.device, suppressed, "{what}");
        }
    }

    /// How many were suppressed since the last that was let through, if one may pass now.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if state.0.is_some_and(|last| now.duration_since(last) < INTERVAL) {
            state.1 += 1;
            return None;
        }
        state.0 = Some(now);
        Some(std::mem::take(&mut state.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_passes_and_the_rest_is_counted() {
        let complaints = Complaints::new("net0");
        let start = Instant::now();
        let passed: Vec<_> = (0..25)
            .map(|n| complaints.admit(start + Duration::from_millis(100) * n))
            .map(|n| n.unwrap_or(99))
            .collect();
        assert_eq!(passed.iter().filter(|n| **n != 99).collect::<Vec<_>>(), [&0, &9, &9]);
    }
}

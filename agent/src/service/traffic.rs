//! How much others send over the interface that a migration goes over: joins its counters, read before and after, with what the migration itself sent.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::link::Address;
use crate::model::LinkReport;
use crate::net::NetError;
use crate::net::traffic::Meter;

/// Less time says nothing of what is sent per second.
const LEAST_TIME: Duration = Duration::from_millis(200);
/// Bytes on the interface for each byte of a stream: segments of 1448 bytes with Ethernet's, IP's and TCP's headers.
const HEADERS: f64 = (1448.0 + 66.0) / 1448.0;

/// A count of what an interface has sent.
#[derive(Clone, Copy, Debug)]
struct Count {
    at: Instant,
    sent_bytes: u64,
}

/// The traffic of one migration's interface.
#[derive(Debug)]
pub(super) struct Traffic {
    meter: Meter,
    /// When it was looked at first, and when the migration began.
    first: Count,
    began: Count,
}

impl Traffic {
    /// Begins to look; none where nothing can be seen, which is said and stops nothing.
    pub(super) fn toward(address: &Address) -> Option<Self> {
        let peer: SocketAddr = *address.resolve().ok()?.first()?;
        let open = || -> Result<Self, NetError> {
            let meter = Meter::toward(peer)?;
            let count = Count { at: Instant::now(), sent_bytes: meter.sent_bytes()? };
            Ok(Self { meter, first: count, began: count })
        };
        open().inspect_err(|error| tracing::debug!("other traffic cannot be seen: {error}")).ok()
    }

    fn count(&self) -> Option<Count> {
        Some(Count { at: Instant::now(), sent_bytes: self.meter.sent_bytes().ok()? })
    }

    /// The migration begins now.
    pub(super) fn begin(&mut self) {
        self.began = self.count().unwrap_or(self.began);
    }

    /// What others have sent, of a migration that is over and has sent so many bytes itself.
    pub(super) fn report(&self, own_bytes: u64) -> LinkReport {
        let interface = self.meter.name().to_owned();
        if self.meter.is_loopback() {
            return LinkReport { interface, ..LinkReport::default() };
        }
        let own = (own_bytes as f64 * HEADERS) as u64;
        LinkReport {
            interface,
            encryption: String::new(),
            other_bytes_per_second: self.count().and_then(|now| per_second(&self.began, &now, own)),
            other_before_bytes_per_second: per_second(&self.first, &self.began, 0),
        }
    }
}

fn per_second(from: &Count, to: &Count, own_bytes: u64) -> Option<u64> {
    let time = to.at.saturating_duration_since(from.at);
    let others = to.sent_bytes.saturating_sub(from.sent_bytes).saturating_sub(own_bytes);
    (time >= LEAST_TIME).then(|| (others as f64 / time.as_secs_f64()) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ones_own_is_taken_off_and_moments_say_nothing() {
        let at = Instant::now();
        let from = Count { at, sent_bytes: 1000 };
        let to = |ms, sent_bytes| Count { at: at + Duration::from_millis(ms), sent_bytes };
        assert_eq!(per_second(&from, &to(2000, 9000), 4000), Some(2000));
        assert_eq!(per_second(&from, &to(2000, 4000), 4000), Some(0), "reckoned headers may be more than there were");
        assert_eq!(per_second(&from, &to(100, 9000), 0), None);
    }
}

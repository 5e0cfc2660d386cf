//! Asks the guest to hold back its own writers: lines on the second serial port, for guests that offer it.
//!
//! Owns the words of the channel (docs/src/internals/stun-channel.md) and what the guest has said. Must not know who is to be held, or why. Whoever asks also looks
//! whether the guest does it: it may have stopped listening, or never have meant it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::bus::DeviceError;
use super::console::Input;
use super::serial::{Output, Serial};

/// The longest line that means something.
const LONGEST_LINE: usize = 32;
/// The device's name in errors, and in a saved machine.
pub(super) const NAME: &str = "serial1";

/// What the guest has said.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// A line that is not complete yet; one byte longer than the longest if it is too long.
    line: Mutex<Vec<u8>>,
    offers: AtomicBool,
}

impl Said {
    fn understand(&self, line: &[u8]) {
        match line.trim_ascii() {
            b"offer 1" => self.offers.store(true, Ordering::Release),
            b"withdraw" => self.offers.store(false, Ordering::Release),
            // A terminal echoes what it is sent; versions that are not known here are no offer.
            _ => {}
        }
    }
}

impl Output for Said {
    fn output(&self, bytes: &[u8]) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if byte == b'\n' {
                if line.len() <= LONGEST_LINE {
                    self.understand(&line);
                }
                line.clear();
            } else if line.len() <= LONGEST_LINE {
                line.push(byte);
            }
        }
    }
}

/// The port, and what is said on it.
pub(crate) struct StunPort {
    serial: Arc<Serial>,
    said: Arc<Said>,
    /// The registers after power-on, saved.
    fresh: Vec<u8>,
}

impl StunPort {
    /// A port on which nothing was said.
    pub(super) fn new() -> io::Result<Self> {
        let said = Arc::new(Said::default());
        let serial = Arc::new(Serial::new(NAME, said.clone())?);
        let fresh = serial.save();
        Ok(Self { serial, said, fresh })
    }

    /// The registers.
    pub(super) fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// Whether the guest has offered to hold its writers.
    pub(super) fn is_offered(&self) -> bool {
        self.said.offers.load(Ordering::Acquire)
    }

    /// Asks that the writers of a vCPU stand for so long from now on, in whole milliseconds; zero lets them go.
    pub(super) fn ask(&self, vcpu: u32, time: Duration) {
        self.serial.input(format!("hold {vcpu} {}\n", time.as_millis()).as_bytes());
    }

    /// The state for a saved machine; none if the guest has never touched the port.
    pub(super) fn save(&self) -> Option<Vec<u8>> {
        let (offers, registers) = (self.is_offered(), self.serial.save());
        (offers || registers != self.fresh).then(|| [vec![offers.into()], registers].concat())
    }

    /// Takes a saved state.
    pub(super) fn restore(&self, bytes: &[u8]) -> Result<(), DeviceError> {
        let bad = |problem: &str| DeviceError::State { device: NAME.into(), problem: problem.into() };
        let (offers, registers) = bytes.split_first().ok_or_else(|| bad("it is too short"))?;
        self.serial.restore(registers)?;
        self.said.offers.store(*offers != 0, Ordering::Release);
        Ok(())
    }

    /// Back to the state after power-on.
    pub(super) fn reset(&self) {
        self.serial.reset();
        self.said.line.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.said.offers.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn says(port: &StunPort, text: &str) {
        port.serial.write(0, text.as_bytes());
    }

    fn reads(port: &StunPort, count: usize) -> String {
        let mut bytes = vec![0; count];
        port.serial.read(0, &mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_guest_offers_is_asked_and_withdraws() {
        let port = StunPort::new().unwrap();
        assert_eq!((port.is_offered(), port.save()), (false, None));
        says(&port, "off");
        says(&port, "er 1\r\n");
        assert!(port.is_offered());
        port.ask(1, Duration::from_micros(50_900));
        assert_eq!(reads(&port, 10), "hold 1 50\n");
        // What a terminal sends back, what is too long, and other versions say nothing.
        says(&port, &format!("hold 1 50\nwithdraw{}\noffer 2\n", " ".repeat(LONGEST_LINE)));
        assert!(port.is_offered());
        says(&port, "withdraw\n");
        assert!(!port.is_offered());
    }

    #[test]
    fn an_offer_moves_with_the_machine_and_ends_with_a_reset() {
        let [port, other] = [(); 2].map(|()| StunPort::new().unwrap());
        says(&port, "offer 1\n");
        port.ask(0, Duration::from_millis(7));
        other.restore(&port.save().unwrap()).unwrap();
        assert!(other.is_offered());
        assert_eq!(reads(&other, 9), "hold 0 7\n");
        other.reset();
        assert_eq!((other.is_offered(), other.save()), (false, None));
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_guest_or_a_saved_machine_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let port = StunPort::new().unwrap();
            port.serial.write(0, &bytes);
            let _ = port.restore(&bytes);
        }
    }
}

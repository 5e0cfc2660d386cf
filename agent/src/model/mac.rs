//! Ethernet addresses, and the one that a VM is given when its operator names none.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A unicast Ethernet (EUI-48) address, written `02:00:00:aa:bb:cc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// Text or bytes that are no usable MAC address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is no unicast MAC address; write six hex pairs such as 02:00:00:00:00:01")]
pub struct MacError(String);

impl MacAddress {
    /// Takes six bytes.
    ///
    /// # Errors
    /// A group address (lowest bit of the first byte set) or the all-zero address is refused: no station has one.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        let mac = Self(bytes);
        if bytes[0] & 1 == 1 || bytes == [0; 6] { Err(MacError(mac.to_string())) } else { Ok(mac) }
    }

    /// The six bytes in transmission order.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&pairs.join(":"))
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(refuse)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refuse())?;
        }
        if parts.next().is_some() {
            return Err(refuse());
        }
        Self::new(bytes).map_err(|_| refuse())
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_groups_are_refused() {
        let mac: MacAddress = "02:00:00:aa:BB:0c".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:00:aa:bb:0c");
        for bad in ["", "02:00", "01:00:5e:00:00:01", "00:00:00:00:00:00", "02:00:00:00:00:01:02", "2:0:0:0:0:1"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad} was accepted");
        }
    }
}

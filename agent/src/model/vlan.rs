//! VLAN tags of an Ethernet frame: one (IEEE 802.1Q) or two (802.1ad, "QinQ").

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A VLAN's number, 1 to 4094: 0 marks a frame that has only a priority, 4095 is reserved (IEEE 802.1Q-2022 table 9-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VlanId(u16);

/// The tags that a station's frames carry, written `42` or `100.42`: the outer one, of the provider, first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum VlanTags {
    /// One tag of the type 0x8100 (802.1Q).
    One(VlanId),
    /// Two tags: the outer one of the type 0x88a8 (802.1ad), the inner one of the type 0x8100.
    Two {
        /// The provider's.
        outer: VlanId,
        /// The customer's.
        inner: VlanId,
    },
}

/// Text that is no VLAN.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no VLAN; write one number from 1 to 4094, or OUTER.INNER such as 100.42")]
pub struct VlanError(String);

impl VlanId {
    /// Takes a number; none if it is outside 1 to 4094.
    pub const fn new(number: u16) -> Option<Self> {
        if matches!(number, 1..=4094) { Some(Self(number)) } else { None }
    }

    /// The number.
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for VlanTags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(id) => write!(f, "{}", id.0),
            Self::Two { outer, inner } => write!(f, "{}.{}", outer.0, inner.0),
        }
    }
}

impl FromStr for VlanTags {
    type Err = VlanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `u16` also reads `+42`, which nobody writes for a VLAN.
        let id = |part: &str| {
            let digits = part.bytes().all(|byte| byte.is_ascii_digit());
            part.parse().ok().filter(|_| digits).and_then(VlanId::new)
        };
        let tags = match text.split_once('.') {
            None => id(text).map(Self::One),
            Some((outer, inner)) => id(outer).zip(id(inner)).map(|(outer, inner)| Self::Two { outer, inner }),
        };
        tags.ok_or_else(|| VlanError(text.to_owned()))
    }
}

impl TryFrom<String> for VlanTags {
    type Error = VlanError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<VlanTags> for String {
    fn from(tags: VlanTags) -> Self {
        tags.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_what_is_reserved_is_refused() {
        for good in ["1", "4094", "100.42"] {
            assert_eq!(good.parse::<VlanTags>().unwrap().to_string(), good);
        }
        for bad in ["", "0", "4095", "70000", "+1", "1.", ".1", "1.0", "1.2.3", "a", "1 "] {
            assert!(bad.parse::<VlanTags>().is_err(), "{bad} was accepted");
        }
    }
}

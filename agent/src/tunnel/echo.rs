//! Whether the other end of a tunnel answers: a frame that asks, and one that answers.
//!
//! Owns their format. An Ethernet frame to the group address `01:80:c2:00:00:0e`, which no bridge forwards (IEEE 802.1Q-2018, table 8-1), of the local experimental type `0x88b5` (IEEE 802-2014, 9.2.2), so that
//! no guest and no LAN ever sees one. After the type: [`MARK`], a byte that is 1 in a question and 2 in an answer, eight bytes that the answer repeats, zeros.

use crate::model::MacAddress;

/// The type of such frames.
pub const ETHER_TYPE: u16 = 0x88b5;
/// No bridge forwards what is sent there.
const GROUP: [u8; 6] = [0x01, 0x80, 0xc2, 0x00, 0x00, 0x0e];
/// What makes them ours, and the version of what follows.
const MARK: [u8; 8] = *b"dunlin\x00\x01";
/// Ethernet addresses and type.
const HEADER_BYTES: usize = 14;
const KIND_AT: usize = HEADER_BYTES + MARK.len();
const NUMBER_AT: usize = KIND_AT + 1;
const LEAST_BYTES: usize = NUMBER_AT + 8;
const QUESTION: u8 = 1;
const ANSWER: u8 = 2;

/// What a frame of these says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// Whether it answers; else it asks.
    pub is_answer: bool,
    /// Which question.
    pub number: u64,
    /// Its length behind the Ethernet header.
    pub packet_bytes: usize,
}

impl Echo {
    /// A question with so many bytes behind the Ethernet header, of at least 17.
    pub fn question(number: u64, packet_bytes: usize) -> Self {
        Self { is_answer: false, number, packet_bytes }
    }

    /// The answer to a question: as long as it, so that both ways are tried.
    #[must_use]
    pub fn answer(self) -> Self {
        Self { is_answer: true, ..self }
    }

    /// As a frame.
    pub fn frame(self, from: MacAddress) -> Vec<u8> {
        let mut frame = vec![0; (HEADER_BYTES + self.packet_bytes).max(LEAST_BYTES)];
        frame[..6].copy_from_slice(&GROUP);
        frame[6..12].copy_from_slice(&from.bytes());
        frame[12..HEADER_BYTES].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        frame[HEADER_BYTES..KIND_AT].copy_from_slice(&MARK);
        frame[KIND_AT] = if self.is_answer { ANSWER } else { QUESTION };
        frame[NUMBER_AT..LEAST_BYTES].copy_from_slice(&self.number.to_be_bytes());
        frame
    }

    /// Reads a frame; none if it is no such one.
    pub fn read(frame: &[u8]) -> Option<Self> {
        let ours = frame.get(..6)? == GROUP
            && frame.get(12..HEADER_BYTES)? == ETHER_TYPE.to_be_bytes()
            && frame.get(HEADER_BYTES..KIND_AT)? == MARK;
        let is_answer = match *frame.get(KIND_AT)? {
            QUESTION => false,
            ANSWER => true,
            _ => return None,
        };
        let number = u64::from_be_bytes(frame.get(NUMBER_AT..LEAST_BYTES)?.try_into().ok()?);
        ours.then_some(Self { is_answer, number, packet_bytes: frame.len() - HEADER_BYTES })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_asked_is_answered(number: u64, packet_bytes in 17usize..9000) {
            let mac: MacAddress = "fe:00:00:00:00:01".parse().unwrap();
            let question = Echo::question(number, packet_bytes);
            prop_assert_eq!(Echo::read(&question.frame(mac)), Some(question));
            let answer = question.answer();
            prop_assert_eq!(Echo::read(&answer.frame(mac)), Some(answer));
            prop_assert!(answer.is_answer && answer.number == number && answer.packet_bytes == packet_bytes);
        }

        #[test]
        fn no_frame_panics(frame in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(Echo::read(&frame), None);
        }

        #[test]
        fn a_spoilt_frame_is_none_of_ours(at in 12usize..23, bit in 0u8..8) {
            let mut frame = Echo::question(7, 46).frame("fe:00:00:00:00:01".parse().unwrap());
            frame[at] ^= 1 << bit;
            // The kind's bits 0 and 1 together would make an answer of a question.
            prop_assert_eq!(Echo::read(&frame), None);
        }
    }
}

//! The bytes on the link, version 1: greeting, control frames, page-stream frames.
//!
//! All integers are little-endian. Every header carries a CRC-32 (ISO-HDLC) of itself and a sequence number, so a
//! flipped, lost, doubled or replayed header is an error and never a write to the wrong page. Pure: bytes in, values out;
//! the fuzz targets call this module.

use serde::de::DeserializeOwned;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::model::{MigrationId, PAGE_SIZE, Packing, PageRun, RegionId};

/// The newest version that this build speaks.
pub const VERSION: u16 = 1;
/// The oldest version that this build speaks.
pub const OLDEST_VERSION: u16 = 1;
/// The longest control message, in bytes. CPU and device state of the largest machine fits many times over.
pub const MAX_CONTROL_BYTES: u32 = 64 << 20;
/// The longest run of pages in one frame.
pub const MAX_RUN_PAGES: u32 = 512;
/// The longest run of packed pages in one frame: both ends keep room for it beside the memory itself.
pub const MAX_PACKED_PAGES: u32 = 64;

const MAGIC: [u8; 8] = *b"DUNLIN\r\n";
const CONTROL_MAGIC: u32 = 0x4c54_4344;
const BULK_MAGIC: u16 = 0x4b42;

/// Bytes that no peer of this version sends.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// Not a Dunlin peer, or bytes out of step.
    #[error("bad magic in {0}")]
    Magic(&'static str),
    /// A header that was changed on its way.
    #[error("bad checksum in {0}")]
    Checksum(&'static str),
    /// No version in common.
    #[error(
        "the peer speaks versions {oldest} to {newest}, this build {OLDEST_VERSION} to {VERSION}; upgrade the older side"
    )]
    Version {
        /// The peer's oldest.
        oldest: u16,
        /// The peer's newest.
        newest: u16,
    },
    /// A frame lost, doubled or replayed.
    #[error("frame {got} where frame {wanted} was due")]
    Sequence {
        /// What came.
        got: u32,
        /// What was due.
        wanted: u32,
    },
    /// A length or count beyond its limit.
    #[error("{what} of {value} is beyond the limit of {limit}")]
    Limit {
        /// What it is.
        what: &'static str,
        /// What came.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A kind that this version does not know.
    #[error("unknown {0}")]
    Kind(&'static str),
    /// A payload that is no message.
    #[error("a message that does not decode: {0}")]
    Message(postcard::Error),
    /// A payload that is more than a message.
    #[error("{0} bytes behind the end of a message")]
    Trailing(usize),
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The control stream of a migration.
    Control,
    /// Page stream number n of a migration.
    Bulk(u16),
}

/// The first bytes of every connection, sent by both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The oldest version that the sender speaks.
    pub oldest: u16,
    /// The newest version that the sender speaks.
    pub newest: u16,
    /// What the connection is for.
    pub purpose: Purpose,
    /// The migration.
    pub migration: MigrationId,
}

/// Length of an encoded [`Hello`].
pub const HELLO_BYTES: usize = size_of::<RawHello>();
/// Length of an encoded control header.
pub const CONTROL_HEADER_BYTES: usize = size_of::<RawControl>();
/// Length of an encoded page-stream header.
pub const BULK_HEADER_BYTES: usize = size_of::<RawBulk>();

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHello {
    magic: [u8; 8],
    oldest: U16,
    newest: U16,
    purpose: U16,
    index: U16,
    migration: [u8; 16],
    reserved: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawControl {
    magic: U32,
    sequence: U32,
    length: U32,
    payload_crc: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawBulk {
    magic: U16,
    kind: U16,
    sequence: U32,
    region: U16,
    packing: U16,
    count: U32,
    first: U64,
    bytes: U32,
    crc: U32,
}

/// The CRC of everything before the last four bytes of a header.
fn header_crc(header: &[u8]) -> U32 {
    U32::new(crc32fast::hash(&header[..header.len() - 4]))
}

impl Hello {
    /// A greeting of this build.
    pub const fn new(purpose: Purpose, migration: MigrationId) -> Self {
        Self { oldest: OLDEST_VERSION, newest: VERSION, purpose, migration }
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let (purpose, index) = match self.purpose {
            Purpose::Control => (1, 0),
            Purpose::Bulk(index) => (2, index),
        };
        let mut raw = RawHello {
            magic: MAGIC,
            oldest: self.oldest.into(),
            newest: self.newest.into(),
            purpose: U16::new(purpose),
            index: index.into(),
            migration: self.migration.0.into_bytes(),
            reserved: U32::ZERO,
            crc: U32::ZERO,
        };
        raw.crc = header_crc(raw.as_bytes());
        let mut bytes = [0; HELLO_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// From bytes; agrees on a version.
    ///
    /// # Errors
    /// Anything that this build cannot talk to.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, WireError> {
        let raw = RawHello::read_from_bytes(bytes).map_err(|_| WireError::Magic("greeting"))?;
        if raw.magic != MAGIC {
            return Err(WireError::Magic("greeting"));
        }
        if raw.crc != header_crc(bytes) {
            return Err(WireError::Checksum("greeting"));
        }
        let (oldest, newest) = (raw.oldest.get(), raw.newest.get());
        if oldest > VERSION || newest < OLDEST_VERSION || oldest > newest {
            return Err(WireError::Version { oldest, newest });
        }
        let purpose = match raw.purpose.get() {
            1 => Purpose::Control,
            2 => Purpose::Bulk(raw.index.get()),
            _ => return Err(WireError::Kind("purpose")),
        };
        Ok(Self { oldest, newest, purpose, migration: MigrationId(Uuid::from_bytes(raw.migration)) })
    }
}

/// The header in front of a control message.
pub fn encode_control(sequence: u32, payload: &[u8]) -> [u8; CONTROL_HEADER_BYTES] {
    let mut raw = RawControl {
        magic: U32::new(CONTROL_MAGIC),
        sequence: sequence.into(),
        length: U32::new(payload.len() as u32),
        payload_crc: U32::new(crc32fast::hash(payload)),
        crc: U32::ZERO,
    };
    raw.crc = header_crc(raw.as_bytes());
    let mut bytes = [0; CONTROL_HEADER_BYTES];
    bytes.copy_from_slice(raw.as_bytes());
    bytes
}

/// Reads a control header: the payload's length and CRC.
///
/// # Errors
/// A header that is damaged, out of order, or announces more than [`MAX_CONTROL_BYTES`].
pub fn decode_control(bytes: &[u8; CONTROL_HEADER_BYTES], wanted: u32) -> Result<(usize, u32), WireError> {
    let raw = RawControl::read_from_bytes(bytes).map_err(|_| WireError::Magic("control header"))?;
    if raw.magic.get() != CONTROL_MAGIC {
        return Err(WireError::Magic("control header"));
    }
    if raw.crc != header_crc(bytes) {
        return Err(WireError::Checksum("control header"));
    }
    if raw.sequence.get() != wanted {
        return Err(WireError::Sequence { got: raw.sequence.get(), wanted });
    }
    if raw.length.get() > MAX_CONTROL_BYTES {
        let (value, limit) = (u64::from(raw.length.get()), u64::from(MAX_CONTROL_BYTES));
        return Err(WireError::Limit { what: "control message length", value, limit });
    }
    Ok((raw.length.get() as usize, raw.payload_crc.get()))
}

/// Reads the payload of a control message, which must be a whole message and nothing else.
///
/// # Errors
/// Bytes that are none, or more.
pub fn decode_message<M: DeserializeOwned>(payload: &[u8]) -> Result<M, WireError> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(WireError::Trailing(rest.len())),
        Err(error) => Err(WireError::Message(error)),
    }
}

/// A frame of a page stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkFrame {
    /// A round begins.
    StartRound {
        /// Which.
        round: u32,
        /// Whether it is hashed, and the last.
        digested: bool,
    },
    /// `run.count` pages follow the header.
    Pages(RegionId, PageRun),
    /// Pages of zeros; nothing follows.
    Zeros(RegionId, PageRun),
    /// A round ends.
    EndRound(u32),
    /// Pages that the other end is to send at once.
    Want(RegionId, PageRun),
    /// So many bytes follow the header, into which the pages were packed.
    Packed(RegionId, PageRun, Packing, u32),
}

/// The header of a page-stream frame.
pub fn encode_bulk(sequence: u32, frame: BulkFrame) -> [u8; BULK_HEADER_BYTES] {
    let (kind, region, count, first) = match frame {
        BulkFrame::StartRound { round, digested } => (1, 0, round, u64::from(digested)),
        BulkFrame::Pages(region, run) => (2, region.0, run.count, run.first.0),
        BulkFrame::Zeros(region, run) => (3, region.0, run.count, run.first.0),
        BulkFrame::EndRound(round) => (4, 0, round, 0),
        BulkFrame::Want(region, run) => (5, region.0, run.count, run.first.0),
        BulkFrame::Packed(region, run, ..) => (6, region.0, run.count, run.first.0),
    };
    let (packing, bytes) = match frame {
        BulkFrame::Packed(.., packing, bytes) => (packing.number(), bytes),
        _ => (0, 0),
    };
    let mut raw = RawBulk {
        magic: U16::new(BULK_MAGIC),
        kind: U16::new(kind),
        sequence: sequence.into(),
        region: region.into(),
        packing: packing.into(),
        count: count.into(),
        first: first.into(),
        bytes: bytes.into(),
        crc: U32::ZERO,
    };
    raw.crc = header_crc(raw.as_bytes());
    let mut bytes = [0; BULK_HEADER_BYTES];
    bytes.copy_from_slice(raw.as_bytes());
    bytes
}

/// Reads a page-stream header. Whether a run lies inside its region is the receiver's business.
///
/// # Errors
/// A header that is damaged, out of order, unknown, or announces more than [`MAX_RUN_PAGES`] pages of data, [`MAX_PACKED_PAGES`] packed ones, or packed
/// ones that are no shorter than the pages are.
pub fn decode_bulk(bytes: &[u8; BULK_HEADER_BYTES], wanted: u32) -> Result<BulkFrame, WireError> {
    let raw = RawBulk::read_from_bytes(bytes).map_err(|_| WireError::Magic("page-stream header"))?;
    if raw.magic.get() != BULK_MAGIC {
        return Err(WireError::Magic("page-stream header"));
    }
    if raw.crc != header_crc(bytes) {
        return Err(WireError::Checksum("page-stream header"));
    }
    if raw.sequence.get() != wanted {
        return Err(WireError::Sequence { got: raw.sequence.get(), wanted });
    }
    let region = RegionId(raw.region.get());
    let run = PageRun::new(raw.first.get(), raw.count.get());
    match raw.kind.get() {
        1 => Ok(BulkFrame::StartRound { round: raw.count.get(), digested: raw.first.get() == 1 }),
        2 | 5 if run.count > MAX_RUN_PAGES => {
            Err(WireError::Limit { what: "run of pages", value: u64::from(run.count), limit: u64::from(MAX_RUN_PAGES) })
        }
        2 => Ok(BulkFrame::Pages(region, run)),
        3 => Ok(BulkFrame::Zeros(region, run)),
        4 => Ok(BulkFrame::EndRound(raw.count.get())),
        5 => Ok(BulkFrame::Want(region, run)),
        6 => {
            let bytes = raw.bytes.get();
            let packing = Packing::from_number(raw.packing.get()).ok_or(WireError::Kind("packing"))?;
            if run.count > MAX_PACKED_PAGES {
                let (value, limit) = (u64::from(run.count), u64::from(MAX_PACKED_PAGES));
                return Err(WireError::Limit { what: "run of packed pages", value, limit });
            }
            if u64::from(bytes) >= u64::from(run.count) * PAGE_SIZE as u64 {
                let (value, limit) = (u64::from(bytes), u64::from(run.count) * PAGE_SIZE as u64);
                return Err(WireError::Limit { what: "length of packed pages", value, limit });
            }
            Ok(BulkFrame::Packed(region, run, packing, bytes))
        }
        _ => Err(WireError::Kind("page-stream frame")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame() -> impl Strategy<Value = BulkFrame> {
        let run = || (any::<u16>(), any::<u64>(), 1..=MAX_RUN_PAGES);
        prop_oneof![
            (any::<u32>(), any::<bool>()).prop_map(|(round, digested)| BulkFrame::StartRound { round, digested }),
            run().prop_map(|(region, first, count)| BulkFrame::Pages(RegionId(region), PageRun::new(first, count))),
            run().prop_map(|(region, first, count)| BulkFrame::Zeros(RegionId(region), PageRun::new(first, count))),
            any::<u32>().prop_map(BulkFrame::EndRound),
            run().prop_map(|(region, first, count)| BulkFrame::Want(RegionId(region), PageRun::new(first, count))),
            (any::<u16>(), any::<u64>(), 1..=MAX_PACKED_PAGES, prop::sample::select(&Packing::ALL[..]), 0..4096u32)
                .prop_map(|(region, first, count, packing, bytes)| BulkFrame::Packed(
                    RegionId(region),
                    PageRun::new(first, count),
                    packing,
                    bytes
                )),
        ]
    }

    proptest! {
        #[test]
        fn frames_round_trip(frame in frame(), sequence: u32) {
            prop_assert_eq!(decode_bulk(&encode_bulk(sequence, frame), sequence), Ok(frame));
        }

        /// CRC-32 detects every burst of up to 32 bits, so surely one flipped bit.
        #[test]
        fn a_flipped_bit_is_an_error(frame in frame(), bit in 0..BULK_HEADER_BYTES * 8) {
            let mut bytes = encode_bulk(5, frame);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_bulk(&bytes, 5).is_err());
        }

        #[test]
        fn rubbish_is_an_error(bytes: [u8; 32], control: [u8; 20], hello: [u8; 40]) {
            prop_assert!(decode_bulk(&bytes, 0).is_err());
            prop_assert!(decode_control(&control, 0).is_err());
            prop_assert!(Hello::decode(&hello).is_err());
        }

        #[test]
        fn greetings_round_trip(index: u16, id: [u8; 16]) {
            let hello = Hello::new(Purpose::Bulk(index), MigrationId(Uuid::from_bytes(id)));
            prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
    }

    #[test]
    fn replays_and_long_lengths_are_refused() {
        let bytes = encode_bulk(3, BulkFrame::EndRound(1));
        assert_eq!(decode_bulk(&bytes, 4), Err(WireError::Sequence { got: 3, wanted: 4 }));
        let long = BulkFrame::Pages(RegionId::RAM, PageRun::new(0, MAX_RUN_PAGES + 1));
        assert!(matches!(decode_bulk(&encode_bulk(0, long), 0), Err(WireError::Limit { .. })));
        for (count, bytes) in [(MAX_PACKED_PAGES + 1, 1), (1, PAGE_SIZE as u32), (2, u32::MAX), (0, 0)] {
            let packed = BulkFrame::Packed(RegionId::RAM, PageRun::new(0, count), Packing::Lz4, bytes);
            assert!(matches!(decode_bulk(&encode_bulk(0, packed), 0), Err(WireError::Limit { .. })), "{packed:?}");
        }
        let mut header = encode_control(0, b"x");
        header[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = header_crc(&header);
        header[16..].copy_from_slice(crc.as_bytes());
        assert!(matches!(decode_control(&header, 0), Err(WireError::Limit { .. })));
    }

    #[test]
    fn a_message_is_all_of_its_payload() {
        assert_eq!(decode_message::<(u8, bool)>(&[7, 1]), Ok((7, true)));
        assert_eq!(decode_message::<(u8, bool)>(&[7, 1, 0]), Err(WireError::Trailing(1)));
        assert!(matches!(decode_message::<(u8, bool)>(&[7]), Err(WireError::Message(_))));
    }

    #[test]
    fn a_newer_peer_is_told_which_versions_there_are() {
        let mut hello = Hello::new(Purpose::Control, MigrationId(Uuid::nil()));
        (hello.oldest, hello.newest) = (VERSION + 1, VERSION + 2);
        assert!(matches!(Hello::decode(&hello.encode()), Err(WireError::Version { .. })));
    }
}

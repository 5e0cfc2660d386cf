//! The container of a saved machine: named, versioned sections behind a magic number, under one checksum.
//!
//! Owns framing. Must not know what a section holds. The bytes are a peer's or a file's word: every length is checked,
//! nothing panics. All integers are little-endian:
//!
//! ```text
//! magic "DUNLINMS" | u32 format | u32 sections |
//! per section: u8 tag length | tag | u32 version | u32 payload length | payload |
//! u32 CRC-32 of all bytes before
//! ```
//!
//! A payload made of fields has `u16 kind | u32 length | bytes` for each.
//!
//! Compatibility: a reader takes its own version and the one before, of the format and of each section. What is newer is
//! refused by name, never guessed at.

/// The first bytes of a saved machine.
const MAGIC: &[u8; 8] = b"DUNLINMS";
/// The newest format that is written and read.
const FORMAT: u32 = 1;
/// The most sections.
const MAX_SECTIONS: u32 = 4096;
/// The longest tag.
pub const MAX_TAG_BYTES: usize = 32;
/// The largest saved machine.
pub const MAX_STATE_BYTES: usize = 64 << 20;

/// Bytes that are no saved machine, or not one for this version.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// Not a container, cut off, or larger than any machine's.
    #[error("the saved state is damaged: {0}")]
    Damaged(&'static str),
    /// The checksum differs.
    #[error("the saved state is damaged: checksum {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Of the bytes as they are.
        found: u32,
        /// Of the bytes as they were.
        expected: u32,
    },
    /// Written by a newer Dunlin.
    #[error("{what} has version {found}; this Dunlin reads up to {newest}: update this host first")]
    TooNew {
        /// The format or the section.
        what: String,
        /// What was found.
        found: u32,
        /// What can be read.
        newest: u32,
    },
    /// Something that the machine needs is not there.
    #[error("the saved state has no {0}")]
    Missing(String),
    /// Something that the machine does not have.
    #[error("the saved state has a section {0} that this machine has no place for")]
    Unexpected(String),
    /// A field's content.
    #[error("the saved state's {what} is not valid: {problem}")]
    Invalid {
        /// The field.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Builds a container.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    sections: u32,
}

impl Default for Writer {
    fn default() -> Self {
        let mut bytes = Vec::with_capacity(32 << 10);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        Self { bytes, sections: 0 }
    }
}

impl Writer {
    /// Adds a section.
    ///
    /// # Panics
    /// If the tag is longer than [`MAX_TAG_BYTES`] or the payload than 4 GiB: programming errors.
    pub fn section(&mut self, tag: &str, version: u32, payload: &[u8]) {
        assert!((1..=MAX_TAG_BYTES).contains(&tag.len()), "section tag `{tag}`");
        let length = u32::try_from(payload.len()).expect("a section is far below 4 GiB");
        self.bytes.push(tag.len() as u8);
        self.bytes.extend_from_slice(tag.as_bytes());
        self.bytes.extend_from_slice(&version.to_le_bytes());
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(payload);
        self.sections += 1;
    }

    /// The container.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes[12..16].copy_from_slice(&self.sections.to_le_bytes());
        let checksum = crc32fast::hash(&self.bytes);
        self.bytes.extend_from_slice(&checksum.to_le_bytes());
        self.bytes
    }
}

/// A section as it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// Its name.
    pub tag: &'a str,
    /// Its version.
    pub version: u32,
    /// Its content.
    pub payload: &'a [u8],
}

impl Section<'_> {
    /// Refuses a version above `newest`.
    pub fn expect_version(&self, newest: u32) -> Result<(), StateError> {
        if self.version > newest || self.version == 0 {
            return Err(StateError::TooNew { what: format!("section {}", self.tag), found: self.version, newest });
        }
        Ok(())
    }
}

/// The sections of a container, each to be taken once.
#[derive(Debug)]
pub struct Sections<'a>(Vec<Section<'a>>);

impl<'a> Sections<'a> {
    /// Reads a whole container of at most `limit` bytes.
    pub fn parse(bytes: &'a [u8], limit: usize) -> Result<Self, StateError> {
        parse_up_to(bytes, limit).map(Self)
    }

    /// Takes a section's content, of a version up to `newest`.
    pub fn take(&mut self, tag: &str, newest: u32) -> Result<&'a [u8], StateError> {
        self.take_if_there(tag, newest)?.ok_or_else(|| StateError::Missing(tag.to_owned()))
    }

    /// Takes the content of a section that need not be there, of a version up to `newest`.
    pub fn take_if_there(&mut self, tag: &str, newest: u32) -> Result<Option<&'a [u8]>, StateError> {
        let Some(index) = self.0.iter().position(|section| section.tag == tag) else { return Ok(None) };
        let section = self.0.swap_remove(index);
        section.expect_version(newest)?;
        Ok(Some(section.payload))
    }

    /// Refuses what was not taken.
    pub fn finish(self) -> Result<(), StateError> {
        self.0.first().map_or(Ok(()), |section| Err(StateError::Unexpected(section.tag.to_owned())))
    }
}

/// Reads the container of a whole machine.
pub fn parse(bytes: &[u8]) -> Result<Vec<Section<'_>>, StateError> {
    parse_up_to(bytes, MAX_STATE_BYTES)
}

/// Reads a whole container of at most `limit` bytes.
pub fn parse_up_to(bytes: &[u8], limit: usize) -> Result<Vec<Section<'_>>, StateError> {
    if bytes.len() > limit {
        return Err(StateError::Damaged("it is too large"));
    }
    let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(StateError::Damaged("it is too short"))?;
    let mut cursor = Cursor(body);
    if cursor.take(MAGIC.len())? != MAGIC {
        return Err(StateError::Damaged("it does not start as a saved machine does"));
    }
    // Before the checksum: a newer format may end differently.
    let format = cursor.u32()?;
    if format > FORMAT || format == 0 {
        return Err(StateError::TooNew { what: "the saved state".into(), found: format, newest: FORMAT });
    }
    let (found, expected) = (crc32fast::hash(body), u32::from_le_bytes(*checksum));
    if found != expected {
        return Err(StateError::Checksum { found, expected });
    }
    let count = cursor.u32()?;
    if count > MAX_SECTIONS {
        return Err(StateError::Damaged("it has too many sections"));
    }
    let mut sections: Vec<Section<'_>> = Vec::new();
    for _ in 0..count {
        let tag_length = usize::from(cursor.take(1)?[0]);
        if !(1..=MAX_TAG_BYTES).contains(&tag_length) {
            return Err(StateError::Damaged("a section's name is too long"));
        }
        let tag = std::str::from_utf8(cursor.take(tag_length)?)
            .map_err(|_| StateError::Damaged("a section's name is no text"))?;
        let version = cursor.u32()?;
        let length = cursor.u32()?;
        let payload = cursor.take(length as usize)?;
        if sections.iter().any(|section| section.tag == tag) {
            return Err(StateError::Damaged("a section is there twice"));
        }
        sections.push(Section { tag, version, payload });
    }
    if !cursor.0.is_empty() {
        return Err(StateError::Damaged("something follows the last section"));
    }
    Ok(sections)
}

/// Adds a field to a payload.
pub fn put_field(payload: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    payload.extend_from_slice(&kind.to_le_bytes());
    payload.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    payload.extend_from_slice(bytes);
}

/// Reads a payload made of fields.
pub fn fields(payload: &[u8]) -> Result<Vec<(u16, &[u8])>, StateError> {
    let mut cursor = Cursor(payload);
    let mut fields = Vec::new();
    while !cursor.0.is_empty() {
        let kind = u16::from_le_bytes(*cursor.chunk()?);
        let length = cursor.u32()?;
        fields.push((kind, cursor.take(length as usize)?));
    }
    Ok(fields)
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(StateError::Damaged("it is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn chunk<const N: usize>(&mut self) -> Result<&'a [u8; N], StateError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(StateError::Damaged("it is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, StateError> {
        Ok(u32::from_le_bytes(*self.chunk()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.section("vm", 1, b"interrupts");
        writer.section("net0", 3, b"");
        writer.finish()
    }

    #[test]
    fn sections_come_back_as_they_were() {
        let bytes = sample();
        let sections = parse(&bytes).unwrap();
        assert_eq!(sections[0], Section { tag: "vm", version: 1, payload: b"interrupts" });
        assert_eq!(sections[1], Section { tag: "net0", version: 3, payload: b"" });
        assert!(sections[1].expect_version(3).is_ok());
        let refused = sections[1].expect_version(2).unwrap_err();
        assert!(refused.to_string().contains("net0 has version 3; this Dunlin reads up to 2"), "{refused}");
    }

    #[test]
    fn a_newer_format_is_named_before_anything_else() {
        let mut bytes = sample();
        bytes[8] = 2;
        assert!(matches!(parse(&bytes), Err(StateError::TooNew { found: 2, newest: 1, .. })));
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_found() {
        let bytes = sample();
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_err());
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&flipped).is_err(), "bit {bit}");
        }
    }

    proptest! {
        /// With a fresh checksum, so that what lies behind it is reached.
        #[test]
        fn no_bytes_make_the_reader_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = sample();
            let body = bytes.len() - 4;
            for (index, value) in changes {
                bytes[index.index(body)] = value;
            }
            let checksum = crc32fast::hash(&bytes[..body]);
            bytes[body..].copy_from_slice(&checksum.to_le_bytes());
            if let Ok(sections) = parse(&bytes) {
                for section in sections {
                    let _ = fields(section.payload);
                }
            }
        }
    }
}

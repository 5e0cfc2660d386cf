//! Owns the format of a page that the memory workload writes: how it is filled, rewritten and checked.
//!
//! A page is 512 words. Word 0 is the tag (who owns it and which page it is), word 1 the sequence number with the size and
//! fill of the last rewrite, word 2 the sum of the body, word 3 a check over words 0 to 2. The rest is the body. A rewrite
//! replaces the first `words` words of the body; what stood there must be exactly what the last rewrite put there, and its
//! sequence must be the one in the writer's own table, so that an old but self-consistent page is noticed too.

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// 64-bit words of a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Words before the body.
pub const HEADER_WORDS: usize = 4;
/// Words of the body.
pub const BODY_WORDS: usize = PAGE_WORDS - HEADER_WORDS;

const TAG_XOR: u64 = 0xd071_17d0_5eed_0001;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A page as the workload sees it.
pub type Page = [u64; PAGE_WORDS];

/// What body words look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fill {
    /// Zero but for one word of each rewrite.
    Zero = 0,
    /// Compressible English text.
    Text = 1,
    /// Incompressible pseudo-random words.
    Random = 2,
}

impl Fill {
    /// Parses the name that the command line uses.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "zero" => Some(Self::Zero),
            "text" => Some(Self::Text),
            "random" => Some(Self::Random),
            _ => None,
        }
    }

    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Text => "text",
            Self::Random => "random",
        }
    }

    /// The inverse of `self as u8`; unknown values read as `Zero`.
    pub fn from_u8(value: u8) -> Self {
        match value {
            1 => Self::Text,
            2 => Self::Random,
            _ => Self::Zero,
        }
    }
}

/// Number of body words that a rewrite of `share_percent` replaces.
pub fn share_words(share_percent: u8) -> usize {
    (BODY_WORDS * usize::from(share_percent.min(100))).div_ceil(100)
}

/// The tag of page `index` of vCPU `cpu`.
pub fn tag(cpu: u32, index: u64) -> u64 {
    (index | u64::from(cpu + 1) << 48) ^ TAG_XOR
}

/// Which part of a page was not what it had to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// Word 0.
    Tag = 1,
    /// The sequence number in word 1.
    Sequence = 2,
    /// The check in word 3.
    HeaderCheck = 3,
    /// A body word that the last rewrite had written.
    Body = 4,
    /// The sum of the whole body (full verification only).
    BodySum = 5,
    /// The sum of the sequence table against the number of writes (full verification only).
    SequenceTable = 6,
}

impl Part {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tag => "tag",
            Self::Sequence => "sequence",
            Self::HeaderCheck => "header_check",
            Self::Body => "body",
            Self::BodySum => "body_sum",
            Self::SequenceTable => "sequence_table",
        }
    }

    /// The inverse of `self as u8`.
    pub fn from_u8(value: u8) -> Option<Self> {
        [Self::Tag, Self::Sequence, Self::HeaderCheck, Self::Body, Self::BodySum, Self::SequenceTable]
            .into_iter()
            .find(|part| *part as u8 == value)
    }
}

/// One page that was not what it had to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What was wrong.
    pub part: Part,
    /// Word of the page where it was seen.
    pub word: usize,
    /// What had to be there.
    pub expected: u64,
    /// What was there.
    pub found: u64,
}

/// What a rewrite puts into a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Tag of the page.
    pub tag: u64,
    /// Sequence number that it gets.
    pub sequence: u32,
    /// Look of the new words.
    pub fill: Fill,
    /// Number of body words replaced.
    pub words: usize,
}

/// Fills a page that has no history: the whole body is written.
pub fn initialise(page: &mut Page, tag: u64, sequence: u32, fill: Fill) {
    let sum = write_body(page, fill, key(tag, sequence), BODY_WORDS);
    seal(page, tag, sequence, fill, BODY_WORDS, sum);
}

/// Checks that `page` is what the writer last put there (`old_sequence`), then replaces part of it.
/// On a mismatch the page is left untouched.
#[inline]
pub fn rewrite(page: &mut Page, old_sequence: u32, new: &Rewrite) -> Result<(), Mismatch> {
    let (old_fill, old_words) = check_header(page, new.tag, old_sequence)?;
    let old_key = key(new.tag, old_sequence);
    let known = new.words.min(old_words);
    let mut old_sum = check_body(page, old_fill, old_key, known)?;
    for word in &page[HEADER_WORDS + known..HEADER_WORDS + new.words.max(known)] {
        old_sum = old_sum.wrapping_add(*word);
    }
    let new_sum = write_body(page, new.fill, key(new.tag, new.sequence), new.words);
    let sum = page[2].wrapping_sub(old_sum).wrapping_add(new_sum);
    // A shorter rewrite leaves the tail of the last one in place; only the words written now are known by rule.
    seal(page, new.tag, new.sequence, new.fill, new.words, sum);
    Ok(())
}

/// Checks a whole page: header, the words of the last rewrite, and the sum of the body.
pub fn verify(page: &Page, tag: u64, sequence: u32) -> Result<(), Mismatch> {
    let (fill, words) = check_header(page, tag, sequence)?;
    check_body(page, fill, key(tag, sequence), words)?;
    let found = page[HEADER_WORDS..].iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
    match found == page[2] {
        true => Ok(()),
        false => Err(Mismatch { part: Part::BodySum, word: 2, expected: page[2], found }),
    }
}

fn check_header(page: &Page, tag: u64, sequence: u32) -> Result<(Fill, usize), Mismatch> {
    if page[0] != tag {
        return Err(Mismatch { part: Part::Tag, word: 0, expected: tag, found: page[0] });
    }
    if page[1] as u32 != sequence {
        return Err(Mismatch {
            part: Part::Sequence,
            word: 1,
            expected: u64::from(sequence),
            found: page[1] & 0xffff_ffff,
        });
    }
    let expected = header_check(page[0], page[1], page[2]);
    if page[3] != expected {
        return Err(Mismatch { part: Part::HeaderCheck, word: 3, expected, found: page[3] });
    }
    let words = ((page[1] >> 32) as usize & 0xffff).min(BODY_WORDS);
    Ok((Fill::from_u8((page[1] >> 48) as u8), words))
}

fn seal(page: &mut Page, tag: u64, sequence: u32, fill: Fill, words: usize, sum: u64) {
    page[0] = tag;
    page[1] = u64::from(sequence) | (words as u64) << 32 | (fill as u64) << 48;
    page[2] = sum;
    page[3] = header_check(page[0], page[1], page[2]);
}

#[inline]
fn header_check(tag: u64, meta: u64, sum: u64) -> u64 {
    mix(mix(tag ^ meta.rotate_left(17)) ^ sum)
}

#[inline]
fn key(tag: u64, sequence: u32) -> u64 {
    mix(tag ^ u64::from(sequence).wrapping_mul(GOLDEN))
}

#[inline]
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[inline(always)]
fn word<const FILL: u8>(key: u64, index: usize) -> u64 {
    match FILL {
        1 => TEXT[(key as usize).wrapping_add(index) % TEXT.len()],
        2 => {
            let x = key.wrapping_add((index as u64).wrapping_mul(GOLDEN));
            let x = x ^ (x << 13);
            let x = x ^ (x >> 7);
            x ^ (x << 17)
        }
        _ => {
            if index == 0 {
                key | 1
            } else {
                0
            }
        }
    }
}

fn check_body(page: &Page, fill: Fill, key: u64, words: usize) -> Result<u64, Mismatch> {
    match fill {
        Fill::Zero => check_body_as::<0>(page, key, words),
        Fill::Text => check_body_as::<1>(page, key, words),
        Fill::Random => check_body_as::<2>(page, key, words),
    }
}

#[inline(always)]
fn check_body_as<const FILL: u8>(page: &Page, key: u64, words: usize) -> Result<u64, Mismatch> {
    let body = &page[HEADER_WORDS..HEADER_WORDS + words];
    let (mut sum, mut difference) = (0u64, 0u64);
    for (index, found) in body.iter().enumerate() {
        sum = sum.wrapping_add(*found);
        difference |= *found ^ word::<FILL>(key, index);
    }
    if difference == 0 {
        return Ok(sum);
    }
    let index = (0..words).find(|index| body[*index] != word::<FILL>(key, *index)).unwrap_or(0);
    Err(Mismatch {
        part: Part::Body,
        word: HEADER_WORDS + index,
        expected: word::<FILL>(key, index),
        found: body[index],
    })
}

fn write_body(page: &mut Page, fill: Fill, key: u64, words: usize) -> u64 {
    match fill {
        Fill::Zero => write_body_as::<0>(page, key, words),
        Fill::Text => write_body_as::<1>(page, key, words),
        Fill::Random => write_body_as::<2>(page, key, words),
    }
}

#[inline(always)]
fn write_body_as<const FILL: u8>(page: &mut Page, key: u64, words: usize) -> u64 {
    let mut sum = 0u64;
    for (index, slot) in page[HEADER_WORDS..HEADER_WORDS + words].iter_mut().enumerate() {
        let value = word::<FILL>(key, index);
        *slot = value;
        sum = sum.wrapping_add(value);
    }
    sum
}

/// 512 bytes of text as 64 words.
static TEXT: [u64; 64] = text_words(
    b"A dunlin is a small wader of the shore; its flocks rise, turn and settle as one, and no bird is ever in two places. \
So it is with a machine that moves: pages fly ahead while it goes on writing, what it wrote again flies again, and when little \
is left it holds its breath, the last of it crosses over, and it wakes where it has arrived, not knowing that it slept at all. \
Whoever watches from the shore counts the birds before and after, and finds that none was lost and none came over twice. Fly, little one, and settle well. ",
);

const fn text_words(bytes: &[u8]) -> [u64; 64] {
    let mut words = [0u64; 64];
    let mut index = 0;
    while index < 512 {
        words[index / 8] |= (bytes[index] as u64) << (8 * (index % 8));
        index += 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh(fill: Fill) -> Page {
        let mut page = [0u64; PAGE_WORDS];
        initialise(&mut page, tag(0, 7), 1, fill);
        page
    }

    fn step(sequence: u32, fill: Fill, share_percent: u8) -> Rewrite {
        Rewrite { tag: tag(0, 7), sequence, fill, words: share_words(share_percent) }
    }

    #[test]
    fn every_mix_of_fill_and_share_verifies() {
        let fills = [Fill::Zero, Fill::Text, Fill::Random];
        let mut page = fresh(Fill::Text);
        let mut sequence = 1;
        for share in [0, 1, 100, 50, 3, 77, 100, 0, 10] {
            for fill in fills {
                rewrite(&mut page, sequence, &step(sequence + 1, fill, share)).unwrap();
                sequence += 1;
                verify(&page, tag(0, 7), sequence).unwrap();
            }
        }
    }

    #[test]
    fn share_rewrites_that_much_and_no_more() {
        let mut page = fresh(Fill::Random);
        let before = page;
        rewrite(&mut page, 1, &step(2, Fill::Random, 25)).unwrap();
        let changed = (HEADER_WORDS..PAGE_WORDS).filter(|i| page[*i] != before[*i]).count();
        assert_eq!(changed, share_words(25));
        assert_eq!(share_words(25), 127);
        assert_eq!(share_words(0), 0);
        assert_eq!(share_words(100), BODY_WORDS);
    }

    #[test]
    fn an_old_but_consistent_page_is_caught_by_its_sequence() {
        let mut page = fresh(Fill::Random);
        let old = page;
        rewrite(&mut page, 1, &step(2, Fill::Random, 100)).unwrap();
        verify(&old, tag(0, 7), 1).unwrap();
        let error = rewrite(&mut old.clone(), 2, &step(3, Fill::Random, 100)).unwrap_err();
        assert_eq!((error.part, error.expected, error.found), (Part::Sequence, 2, 1));
    }

    #[test]
    fn another_page_in_its_place_is_caught_by_its_tag() {
        let mut other = [0u64; PAGE_WORDS];
        initialise(&mut other, tag(1, 7), 1, Fill::Zero);
        assert_eq!(verify(&other, tag(0, 7), 1).unwrap_err().part, Part::Tag);
    }

    #[test]
    fn any_flipped_bit_is_caught_by_verify() {
        for fill in [Fill::Zero, Fill::Text, Fill::Random] {
            let mut page = fresh(fill);
            rewrite(&mut page, 1, &step(2, fill, 30)).unwrap();
            for word in 0..PAGE_WORDS {
                let mut broken = page;
                broken[word] ^= 1 << (word % 64);
                assert!(verify(&broken, tag(0, 7), 2).is_err(), "{fill:?} word {word}");
            }
        }
    }

    #[test]
    fn a_torn_page_is_caught_before_it_is_overwritten() {
        let mut page = fresh(Fill::Random);
        let old = page;
        rewrite(&mut page, 1, &step(2, Fill::Random, 100)).unwrap();
        page[256..].copy_from_slice(&old[256..]);
        let error = rewrite(&mut page, 2, &step(3, Fill::Random, 100)).unwrap_err();
        assert_eq!((error.part, error.word), (Part::Body, 256));
    }

    #[test]
    fn names_round_trip() {
        for fill in [Fill::Zero, Fill::Text, Fill::Random] {
            assert_eq!(Fill::parse(fill.name()), Some(fill));
            assert_eq!(Fill::from_u8(fill as u8), fill);
        }
        for value in 1..=6 {
            assert_eq!(Part::from_u8(value).unwrap() as u8, value);
        }
        assert_eq!(Part::from_u8(0), None);
    }
}

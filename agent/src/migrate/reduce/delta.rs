//! The difference of two pages as bytes: run-length encoding of their XOR (the idea: Svärd, Hudzia, Tordsson, Elmroth, "Evaluation of Delta Compression
//! Techniques for Efficient Live Migration of Large Virtual Machines", VEE 2011).
//!
//! A delta is a sequence of steps: so many words of 8 bytes are alike (u16, little-endian), so many differ (u16, at least 1), and their XOR.

use super::Page;
use crate::model::PAGE_SIZE;

const WORD: usize = 8;
const WORDS: usize = PAGE_SIZE / WORD;
/// Bytes in front of the words of a step.
const STEP: usize = 4;
/// A longer delta is not worth its base: half a page.
pub(super) const MOST_BYTES: usize = PAGE_SIZE / 2;

/// A delta that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes that are no delta of a page")]
pub(super) struct DeltaError;

fn word(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0; WORD];
    word.copy_from_slice(&bytes[index * WORD..][..WORD]);
    u64::from_le_bytes(word)
}

/// Appends to `out` what turns `base` into `page`. False, and nothing appended, if that is longer than [`MOST_BYTES`].
pub(super) fn encode(base: &Page, page: &Page, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let (mut at, mut alike_from) = (0, 0);
    while at < WORDS {
        if word(base, at) == word(page, at) {
            at += 1;
            continue;
        }
        let first = at;
        while at < WORDS && word(base, at) != word(page, at) {
            at += 1;
        }
        if out.len() - start + STEP + (at - first) * WORD > MOST_BYTES {
            out.truncate(start);
            return false;
        }
        out.extend_from_slice(&((first - alike_from) as u16).to_le_bytes());
        out.extend_from_slice(&((at - first) as u16).to_le_bytes());
        for index in first..at {
            out.extend_from_slice(&(word(base, index) ^ word(page, index)).to_le_bytes());
        }
        alike_from = at;
    }
    true
}

/// Turns the base in `page` into what the delta was made of.
///
/// # Errors
/// Bytes that no [`encode`] wrote; `page` then holds anything.
pub(super) fn apply(mut delta: &[u8], page: &mut [u8]) -> Result<(), DeltaError> {
    let mut at = 0;
    while let Some((&[a, b, c, d], rest)) = delta.split_first_chunk::<STEP>() {
        let (alike, differ) = (usize::from(u16::from_le_bytes([a, b])), usize::from(u16::from_le_bytes([c, d])));
        let first = (at + alike) * WORD;
        let target = page.get_mut(first..first + differ * WORD).filter(|words| !words.is_empty()).ok_or(DeltaError)?;
        let (words, rest) = rest.split_at_checked(differ * WORD).ok_or(DeltaError)?;
        target.iter_mut().zip(words).for_each(|(byte, xor)| *byte ^= xor);
        at += alike + differ;
        delta = rest;
    }
    if delta.is_empty() { Ok(()) } else { Err(DeltaError) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_delta_makes_the_page_of_its_base(base: [u8; 32], changes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..120)) {
            let base: Page = std::array::from_fn(|at| base[at % 32]);
            let mut page = base;
            for &(at, value) in &changes {
                page[at] = value;
            }
            let mut out = vec![9];
            prop_assert!(encode(&base, &page, &mut out), "120 words and as many steps fit");
            prop_assert!(out.len() - 1 <= changes.len() * (STEP + WORD));
            let mut back = base;
            prop_assert_eq!(apply(&out[1..], &mut back), Ok(()));
            prop_assert_eq!(back, page);
            for cut in 1..out.len().min(30) {
                let mut back = base;
                let wrong = apply(&out[1..cut], &mut back).is_err() || back != page || cut == out.len();
                prop_assert!(wrong);
            }
        }

        #[test]
        fn any_bytes_are_applied_or_refused(delta in prop::collection::vec(prop_oneof![any::<u8>(), Just(0u8), Just(2u8)], 0..80)) {
            let _ = apply(&delta, &mut [7; PAGE_SIZE]);
        }
    }

    #[test]
    fn a_page_that_is_another_has_no_delta() {
        let mut out = vec![1, 2];
        assert!(!encode(&[0; PAGE_SIZE], &[7; PAGE_SIZE], &mut out));
        assert_eq!(out, [1, 2]);
        assert!(encode(&[7; PAGE_SIZE], &[7; PAGE_SIZE], &mut out));
        assert_eq!(out, [1, 2], "no difference is no bytes");
    }

    #[test]
    fn steps_beyond_the_page_are_refused() {
        let step = |alike: u16, differ: u16, words: usize| {
            [&alike.to_le_bytes()[..], &differ.to_le_bytes(), &vec![1; words * WORD]].concat()
        };
        let apply = |delta: &[u8]| apply(delta, &mut [0; PAGE_SIZE]);
        assert_eq!(apply(&step(511, 1, 1)), Ok(()));
        for wrong in [step(512, 1, 1), step(511, 2, 2), step(u16::MAX, u16::MAX, 1), step(0, 0, 0), step(0, 2, 1)] {
            assert_eq!(apply(&wrong), Err(DeltaError), "{wrong:?}");
        }
        assert_eq!(apply(&[step(0, 1, 1), vec![0; 3]].concat()), Err(DeltaError));
    }
}

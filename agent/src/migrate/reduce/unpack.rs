//! The target's part of one page stream: what pages were packed into becomes the pages again, or an error.
//!
//! Nothing of it is trusted: a run becomes exactly as many pages as it announced, made beside the VM's memory and copied there when it is whole; a base or a page that is
//! referred to must have the hash that the source named.

use xxhash_rust::xxh3::xxh3_64;

use super::codec::Decompressor;
use super::delta;
use crate::migrate::bytes::{copy_in, copy_out};
use crate::model::{PAGE_SIZE, Packing, PageRun};
use crate::port::{BulkReceiver, LinkError, Region};

/// Names that one message may have.
const MOST_NAMES: usize = 16;
/// Of an unknown name so much is repeated, in characters.
const MOST_OF_A_NAME: usize = 32;

/// Packed pages that cannot be what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum UnpackError {
    /// The source had not said that it would come.
    #[error("pages packed as {} came unannounced", .0.name())]
    Unannounced(Packing),
    /// Not as many bytes as the pages have, or bytes that no packer writes.
    #[error("{} bytes that do not become {pages} pages", .packing.name())]
    Malformed {
        /// What they were said to be.
        packing: Packing,
        /// How many pages were announced.
        pages: u32,
    },
    /// What is spoken of is not what is held here.
    #[error("the page at {place} that a packed one ({}) builds on is not the one that the source speaks of", .packing.name())]
    OtherPage {
        /// How it was packed.
        packing: Packing,
        /// Its number in the region.
        place: u64,
    },
}

/// The packings of these names.
///
/// # Errors
/// A name that this build does not know.
pub(in crate::migrate) fn known_packings(names: &[String]) -> Result<Vec<Packing>, String> {
    if names.len() > MOST_NAMES {
        return Err(format!("{} reducers are more than there are", names.len()));
    }
    let known = |name: &String| {
        Packing::from_name(name).ok_or_else(|| {
            let name: String = name.chars().take(MOST_OF_A_NAME).collect();
            format!("this host does not know the reducer `{name}`; leave it out, or upgrade dunlin here")
        })
    };
    names.iter().map(known).collect()
}

/// Copies the page at a place of what the target holds; false if there is no such place.
type Held<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> bool;

/// Makes the pages of `run` of what they were packed into. `pages` is as long as they are.
///
/// # Errors
/// Bytes that are not exactly these pages, or that speak of others than those that are held.
fn unpack(
    packing: Packing,
    run: PageRun,
    bytes: &[u8],
    (held, decompressor): (Held<'_>, &mut Decompressor),
    pages: &mut [u8],
) -> Result<(), UnpackError> {
    let malformed = UnpackError::Malformed { packing, pages: run.count };
    // A page that the source speaks of, and that must have this hash.
    let mut fetch = |place: u64, hash: &[u8; 8], page: &mut [u8]| {
        if held(place, page) && xxh3_64(page) == u64::from_le_bytes(*hash) {
            Ok(())
        } else {
            Err(UnpackError::OtherPage { packing, place })
        }
    };
    let mut rest = bytes;
    match packing {
        Packing::Lz4 | Packing::Zstd => {
            return if decompressor.decompress(packing, bytes, pages) { Ok(()) } else { Err(malformed) };
        }
        Packing::Known => {
            for page in pages.chunks_exact_mut(PAGE_SIZE) {
                let (place, behind) = rest.split_first_chunk().ok_or(malformed)?;
                let (hash, behind) = behind.split_first_chunk().ok_or(malformed)?;
                fetch(u64::from_le_bytes(*place), hash, page)?;
                rest = behind;
            }
        }
        Packing::Delta => {
            for (place, page) in run.indices().zip(pages.chunks_exact_mut(PAGE_SIZE)) {
                let (hash, behind) = rest.split_first_chunk().ok_or(malformed)?;
                let (length, behind) = behind.split_first_chunk().ok_or(malformed)?;
                let (delta, behind) =
                    behind.split_at_checked(usize::from(u16::from_le_bytes(*length))).ok_or(malformed)?;
                fetch(place, hash, page)?;
                delta::apply(delta, page).map_err(|_| malformed)?;
                rest = behind;
            }
        }
    }
    if rest.is_empty() { Ok(()) } else { Err(malformed) }
}

/// Receives packed pages from one stream.
#[derive(Default)]
pub(in crate::migrate) struct Unpacker {
    decompressor: Decompressor,
    packed: Vec<u8>,
    pages: Vec<u8>,
}

impl Unpacker {
    /// Takes the packed run that `receiver` announced last, `bytes` long, and puts its pages where they belong. The link bounds both lengths.
    ///
    /// # Errors
    /// The link failed, or what came is not what was sent.
    pub(in crate::migrate) fn take(
        &mut self,
        (packing, run, bytes): (Packing, PageRun, u32),
        announced: &[Packing],
        region: &dyn Region,
        receiver: &mut dyn BulkReceiver,
        keep_waiting: &mut dyn FnMut() -> bool,
    ) -> Result<(), LinkError> {
        let protocol = |error: UnpackError| LinkError::Protocol(error.to_string());
        if !announced.contains(&packing) {
            return Err(protocol(UnpackError::Unannounced(packing)));
        }
        self.packed.resize(bytes as usize, 0);
        self.pages.resize(run.byte_len(), 0);
        receiver.read_packed(&mut self.packed, keep_waiting)?;
        let mut held = |place: u64, page: &mut [u8]| {
            let at = PageRun::new(place, 1);
            let is_there = at.fits(region.spec().pages);
            if is_there {
                copy_out(region.bytes(at), page);
            }
            is_there
        };
        unpack(packing, run, &self.packed, (&mut held, &mut self.decompressor), &mut self.pages).map_err(protocol)?;
        copy_in(&self.pages, region.bytes(run));
        Ok(())
    }
}

/// For fuzzing: how many pages, packed as what, then the bytes. Exactly these pages come out, or an error.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    let [packing, count, bytes @ ..] = input else { return };
    let Some(packing) = Packing::from_number(u16::from(packing % 8)) else { return };
    let run = PageRun::new(3, u32::from(count % 8) + 1);
    let mut pages = vec![0; run.byte_len()];
    let mut held = |place: u64, page: &mut [u8]| {
        page.copy_from_slice(&fuzz_page(place));
        place < 16
    };
    let mut decompressor = Decompressor::default();
    if unpack(packing, run, bytes, (&mut held, &mut decompressor), &mut pages).is_ok() {
        let mut again = vec![0xee; run.byte_len()];
        assert_eq!(unpack(packing, run, bytes, (&mut held, &mut decompressor), &mut again), Ok(()));
        assert!(pages == again, "bytes that were not sent are among the pages");
    }
}

/// What a fuzzed target holds.
#[cfg(any(test, feature = "fuzz"))]
fn fuzz_page(place: u64) -> super::Page {
    std::array::from_fn(|at| (place.wrapping_mul(3) as usize).wrapping_add(at / 256) as u8)
}

/// One of each packing, of two pages.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    use super::codec::{Codec, Compressor};
    let hash = |place: u64| xxh3_64(&fuzz_page(place)).to_le_bytes();
    let pages = [fuzz_page(3), fuzz_page(4)].concat();
    let seed = |packing: Packing, bytes: &[u8]| [&[packing.number() as u8, 1], bytes].concat();
    let compressed = [Codec::Lz4, Codec::Zstd(1)]
        .map(|codec| seed(codec.packing(), Compressor::new(codec).compress(&pages).unwrap_or_default()));
    let delta = |place: u64| {
        let mut delta = Vec::new();
        let mut page = fuzz_page(place);
        page[800] ^= 5;
        delta::encode(&fuzz_page(place), &page, &mut delta);
        [&hash(place)[..], &(delta.len() as u16).to_le_bytes(), &delta].concat()
    };
    let known = |place: u64| [place.to_le_bytes(), hash(place)].concat();
    let built =
        [seed(Packing::Delta, &[delta(3), delta(4)].concat()), seed(Packing::Known, &[known(9), known(15)].concat())];
    compressed.into_iter().chain(built).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(seed: &[u8]) -> Result<Vec<u8>, UnpackError> {
        let packing = Packing::from_number(seed[0].into()).unwrap();
        let mut pages = vec![0xee; 2 * PAGE_SIZE];
        let mut held = |place: u64, page: &mut [u8]| {
            page.copy_from_slice(&fuzz_page(place));
            place < 16
        };
        unpack(packing, PageRun::new(3, 2), &seed[2..], (&mut held, &mut Decompressor::default()), &mut pages)
            .map(|()| pages)
    }

    #[test]
    fn each_packing_becomes_its_pages() {
        let mut changed = [fuzz_page(3), fuzz_page(4)];
        let plain = changed.concat();
        for page in &mut changed {
            page[800] ^= 5;
        }
        let expected = [plain.clone(), plain, changed.concat(), [fuzz_page(9), fuzz_page(15)].concat()];
        for (seed, expected) in fuzz_seeds().iter().zip(expected) {
            assert!(unpacked(seed) == Ok(expected), "{}", seed[0]);
        }
    }

    #[test]
    fn another_base_or_place_is_an_error_and_never_another_page() {
        let [.., delta, known] = &fuzz_seeds()[..] else { panic!("four seeds") };
        let wrong = |seed: &[u8], at: usize, value: u8| {
            let mut seed = seed.to_vec();
            seed[at] = value;
            unpacked(&seed)
        };
        let other = |packing, place| Err(UnpackError::OtherPage { packing, place });
        // The hash of the first base; the place, then the hash, of the first reference; a place beyond memory.
        assert_eq!(wrong(delta, 2, delta[2] ^ 1), other(Packing::Delta, 3));
        assert_eq!(wrong(known, 2, 8), other(Packing::Known, 8));
        assert_eq!(wrong(known, 12, known[12] ^ 1), other(Packing::Known, 9));
        assert_eq!(wrong(known, 2, 16), other(Packing::Known, 16));
        for seed in fuzz_seeds() {
            let short = unpacked(&seed[..seed.len() - 1]);
            let long = unpacked(&[&seed[..], &[0]].concat());
            assert!(matches!(short, Err(UnpackError::Malformed { .. })), "{}: {short:?}", seed[0]);
            assert!(matches!(long, Err(UnpackError::Malformed { .. })) || seed[0] <= 2, "{}: {long:?}", seed[0]);
        }
    }
}

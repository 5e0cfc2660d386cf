//! Compression of a run of pages, and back with bounds: what comes from a peer becomes exactly the pages that it announced, or an error.

use crate::model::Packing;

/// What does not shrink by one part in so many goes as it is: unpacking costs the target time.
const LEAST_SAVING: usize = 16;

/// A way to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// An LZ4 block.
    Lz4,
    /// A Zstandard frame, by this level.
    Zstd(i32),
}

impl Codec {
    pub(super) fn packing(self) -> Packing {
        match self {
            Self::Lz4 => Packing::Lz4,
            Self::Zstd(_) => Packing::Zstd,
        }
    }
}

/// Compresses for one stream.
pub(super) struct Compressor {
    codec: Codec,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    out: Vec<u8>,
}

impl Compressor {
    /// One for `codec`.
    pub(super) fn new(codec: Codec) -> Self {
        let zstd = match codec {
            Codec::Lz4 => None,
            // Without it nothing shrinks, and everything goes as it is.
            Codec::Zstd(level) => zstd::bulk::Compressor::new(level).ok(),
        };
        Self { codec, zstd, out: Vec::new() }
    }

    pub(super) fn packing(&self) -> Packing {
        self.codec.packing()
    }

    /// What `pages` become; none if that is hardly shorter.
    pub(super) fn compress(&mut self, pages: &[u8]) -> Option<&[u8]> {
        let most = pages.len() - pages.len() / LEAST_SAVING;
        let length = match (self.codec, &mut self.zstd) {
            (Codec::Lz4, _) => {
                self.out.resize(lz4_flex::block::get_maximum_output_size(pages.len()), 0);
                lz4_flex::block::compress_into(pages, &mut self.out).ok()?
            }
            (Codec::Zstd(_), Some(zstd)) => {
                self.out.resize(most, 0);
                // An error is that it does not fit.
                zstd.compress_to_buffer(pages, &mut self.out[..]).ok()?
            }
            (Codec::Zstd(_), None) => return None,
        };
        (length <= most).then(|| &self.out[..length])
    }
}

/// Decompresses for one stream.
#[derive(Default)]
pub(super) struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Makes pages of `bytes`; false if those are not exactly what fills `pages`.
    pub(super) fn decompress(&mut self, packing: Packing, bytes: &[u8], pages: &mut [u8]) -> bool {
        let length = match packing {
            Packing::Lz4 => lz4_flex::block::decompress_into(bytes, pages).ok(),
            Packing::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Decompressor::new().ok();
                }
                self.zstd.as_mut().and_then(|zstd| zstd.decompress_to_buffer(bytes, pages).ok())
            }
            Packing::Delta | Packing::Known => None,
        };
        length == Some(pages.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::PAGE_SIZE;

    const CODECS: [Codec; 3] = [Codec::Lz4, Codec::Zstd(1), Codec::Zstd(9)];

    /// Pages with more or less order in them.
    fn pages() -> impl Strategy<Value = Vec<u8>> {
        (1..5usize, any::<[u8; 16]>(), 0..4096usize).prop_map(|(pages, words, random)| {
            let mut state = 1u64;
            (0..pages * PAGE_SIZE)
                .map(|at| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    if at % PAGE_SIZE < random { (state >> 56) as u8 } else { words[at % 16] }
                })
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_compressed_comes_back(pages in pages()) {
            for codec in CODECS {
                let mut compressor = Compressor::new(codec);
                let mut decompressor = Decompressor::default();
                let mut decompress =
                    |bytes: &[u8], pages: &mut [u8]| decompressor.decompress(codec.packing(), bytes, pages);
                for _ in 0..2 {
                    let Some(packed) = compressor.compress(&pages) else { continue };
                    prop_assert!(packed.len() <= pages.len() - pages.len() / LEAST_SAVING);
                    let mut back = vec![1; pages.len()];
                    prop_assert!(decompress(packed, &mut back) && back == pages);
                    // One page more or less than was announced is an error.
                    prop_assert!(!decompress(packed, &mut vec![0; pages.len() + PAGE_SIZE]));
                    prop_assert!(!decompress(packed, &mut vec![0; pages.len() - PAGE_SIZE]));
                    prop_assert!(!decompress(&packed[..packed.len() - 1], &mut back));
                }
            }
        }
    }

    #[test]
    fn what_does_not_shrink_goes_as_it_is() {
        let mut state = 7u64;
        let noise: Vec<u8> = (0..8 * PAGE_SIZE)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        for codec in CODECS {
            assert!(Compressor::new(codec).compress(&noise).is_none(), "{codec:?}");
            assert!(Compressor::new(codec).compress(&[7; PAGE_SIZE]).is_some_and(|packed| packed.len() < 100));
        }
    }
}

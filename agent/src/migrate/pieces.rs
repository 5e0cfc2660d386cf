//! Cuts pages that are to be sent into what goes as a mark, because it is zero, and what goes as bytes.

use super::zeros::BLOCK_PAGES;
use crate::model::PageRun;
use crate::port::{BytesView, Region};

/// Whether what was never written is worth asking for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holes {
    /// It is left untouched, and is zero.
    Asked,
    /// There is hardly any: every page is read.
    Ignored,
    /// Zero or not, everything goes as bytes.
    Filled,
}

/// Hands each piece of `run` in order to `each`: whether it is zero, else bytes of at most `longest` pages. `zeros` finds the zero ones among at most
/// [`BLOCK_PAGES`], as [`super::zeros::zero_bits`] does.
pub(super) fn pieces<E>(
    region: &dyn Region,
    run: PageRun,
    holes: Holes,
    longest: impl Fn() -> u32,
    mut zeros: impl FnMut(BytesView<'_>) -> u64,
    mut each: impl FnMut(PageRun, bool) -> Result<(), E>,
) -> Result<(), E> {
    let data = if holes == Holes::Asked { region.data_within(run) } else { vec![run] };
    let mut at = run.first.0;
    for part in data.into_iter().chain([PageRun::new(run.end(), 0)]) {
        if at < part.first.0 {
            each(PageRun::new(at, (part.first.0 - at) as u32), true)?;
        }
        at = part.end();
        let mut found = Found { run: PageRun::new(part.first.0, 0), is_zero: false };
        let mut first = part.first.0;
        while first < part.end() {
            let block = PageRun::new(first, BLOCK_PAGES.min((part.end() - first) as u32));
            let bits = if holes == Holes::Filled { 0 } else { zeros(region.bytes(block)) };
            while first < block.end() {
                let offset = first - block.first.0;
                let is_zero = bits >> offset & 1 == 1;
                let alike = (if is_zero { !bits } else { bits } >> offset).trailing_zeros();
                if is_zero != found.is_zero {
                    found.hand_out(0, &longest, &mut each)?;
                    found.is_zero = is_zero;
                }
                let count = alike.min((block.end() - first) as u32);
                found.run.count += count;
                first += u64::from(count);
            }
            // What was looked at is still in the cache.
            found.hand_out(longest(), &longest, &mut each)?;
        }
        found.hand_out(0, &longest, &mut each)?;
    }
    Ok(())
}

/// Pages that are alike, and have not been handed out.
struct Found {
    run: PageRun,
    is_zero: bool,
}

impl Found {
    /// Hands out pieces until fewer than `least` pages are left; zeros only if all are wanted.
    fn hand_out<E>(
        &mut self,
        least: u32,
        longest: impl Fn() -> u32,
        mut each: impl FnMut(PageRun, bool) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.run.count > 0 && self.run.count >= least && !(self.is_zero && least > 0) {
            let count = if self.is_zero { self.run.count } else { self.run.count.min(longest().max(1)) };
            each(PageRun { count, ..self.run }, self.is_zero)?;
            self.run = PageRun::new(self.run.first.0 + u64::from(count), self.run.count - count);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::migrate::owed_testing::Memory;
    use crate::migrate::zeros::zero_bits;

    proptest! {
        /// Every page once and in order, zeros as zeros, nothing longer than it may be, and no piece shorter than it could be.
        #[test]
        fn pieces_cover_the_run(
            full in prop::collection::btree_set(0..300u64, 0..200), first in 0..200u64, count in 1..100u32, longest in 1..80u32, all: bool,
        ) {
            let memory = Memory::of(300);
            for &page in &full {
                memory.fill(PageRun::new(page, 1), 7);
            }
            let run = PageRun::new(first, count);
            let mut found: Vec<(PageRun, bool)> = Vec::new();
            let holes = if all { Holes::Filled } else { Holes::Ignored };
            pieces(&memory, run, holes, || longest, zero_bits, |piece, is_zero| {
                found.push((piece, is_zero));
                Ok::<(), ()>(())
            }).unwrap();
            let pages: Vec<u64> = found.iter().flat_map(|(piece, _)| piece.indices()).collect();
            prop_assert_eq!(pages, run.indices().collect::<Vec<_>>());
            for &(piece, is_zero) in &found {
                prop_assert!(is_zero || piece.count <= longest);
                prop_assert!(piece.indices().all(|page| is_zero == (!all && !full.contains(&page))));
            }
            for pair in found.windows(2) {
                prop_assert!(pair[0].1 != pair[1].1 || (!pair[0].1 && pair[0].0.count == longest));
            }
        }
    }
}

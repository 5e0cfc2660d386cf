//! Cuts pages that are to be sent into what goes as a mark, because it is zero, and what goes as bytes.

use super::digest::zero_page;
use crate::model::PageRun;
use crate::port::Region;

/// Whether what was never written is worth asking for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holes {
    /// It is left untouched, and is zero.
    Asked,
    /// There is hardly any: every page is read.
    Ignored,
}

/// Hands each piece of `run` in order to `each`: whether it is zero, else bytes of at most `longest` pages.
pub(super) fn pieces<E>(
    region: &dyn Region,
    run: PageRun,
    holes: Holes,
    longest: impl Fn() -> u32,
    mut each: impl FnMut(PageRun, bool) -> Result<(), E>,
) -> Result<(), E> {
    let is_zero = |page: u64| zero_page(region.bytes(PageRun::new(page, 1)));
    let data = if holes == Holes::Asked { region.data_within(run) } else { vec![run] };
    let mut at = run.first.0;
    for part in data.into_iter().chain([PageRun::new(run.end(), 0)]) {
        if at < part.first.0 {
            each(PageRun::new(at, (part.first.0 - at) as u32), true)?;
            at = part.first.0;
        }
        while at < part.end() {
            let zero = is_zero(at);
            let limit = if zero { part.end() } else { part.end().min(at + u64::from(longest())) };
            let end = (at + 1..limit).find(|&page| is_zero(page) != zero).unwrap_or(limit);
            each(PageRun::new(at, (end - at) as u32), zero)?;
            at = end;
        }
    }
    Ok(())
}
